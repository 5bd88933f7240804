"""Files .npz: statistics of a data set as EDM has them, features of both kinds; arrays, spoilt archives, foreign headers."""

from __future__ import annotations

import io
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from ect.metrics import classifier
from ect.metrics.fidelity import read_statistics
from ect.tangent import file
from ect.tangent.network import Features
from tests.fuzz.mutations import HUGE, spoilt

SHIPPED = classifier.SHIPPED / "digits_features.npz"
COMPRESSIONS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
TYPES = ["<f4", "<f8", "|O", "<U9", "|S1000000", "<i8", "|V0", "|S0", "<U0", "[('a', '<f4')]", "<M8[s]", "nonsense"]
LENGTHS = st.sampled_from([*HUGE, 2, 8, 2048, 4096])


def member(header: str, body: bytes, version: tuple[int, int] = (1, 0)) -> bytes:
    text = header.encode("latin-1", "replace") + b"\n"
    return b"\x93NUMPY" + bytes(version) + len(text).to_bytes(2 if version == (1, 0) else 4, "little") + text + body


@st.composite
def arrays(draw: st.DrawFn) -> bytes:
    """An array that says what it likes of itself."""
    shape = tuple(draw(st.lists(LENGTHS, max_size=3)))
    kind = draw(st.sampled_from(TYPES))
    quoted = kind if kind.startswith("[") else repr(kind)
    header = f"{{'descr': {quoted}, 'fortran_order': {draw(st.booleans())}, 'shape': {shape}, }}"
    header = draw(
        st.sampled_from(
            [header, header, header, "(" * 5000, "{" * 90, "-" * 9000 + "1", "1", header.replace("shape", "a")]
        )
    )
    return member(header, draw(st.binary(max_size=64)), draw(st.sampled_from([(1, 0), (1, 0), (2, 0), (3, 0), (9, 9)])))


def _directions() -> bytes:
    """A file of tangent features."""
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        file.save(Path(folder) / "a.npz", Features(8, 1), "0" * 64)
        return (Path(folder) / "a.npz").read_bytes()


WHOLE = {"features": SHIPPED.read_bytes(), "statistics": SHIPPED.read_bytes(), "directions": _directions()}
"""A valid file for each reader; that of statistics finds none of its arrays there, unless a strategy puts them in."""


@st.composite
def archives(draw: st.DrawFn, data: bytes) -> bytes:
    """A valid archive of which some arrays are others, or absent."""
    found = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as old,
        zipfile.ZipFile(found, "w", draw(st.sampled_from(COMPRESSIONS))) as new,
    ):
        names = old.namelist()
        touched = draw(st.sets(st.sampled_from([*names, "mu.npy", "sigma.npy"]), max_size=3))
        for name in [*names, *(touched - set(names))]:
            whole = old.read(name) if name in names else member("{}", b"")
            other = draw(st.one_of(arrays(), spoilt(whole), st.none())) if name in touched else whole
            if other is not None:
                new.writestr(name, other)
    return found.getvalue()


INPUTS = st.one_of(
    [st.tuples(st.one_of(archives(data), spoilt(data), arrays()), st.just(reader)) for reader, data in WHOLE.items()]
)


def read(folder: Path, given: tuple[bytes, str]) -> Any:
    data, reader = given
    path = folder / "arrays.npz"
    path.write_bytes(data)
    if reader == "statistics":
        return read_statistics(path)
    if reader == "directions":
        features, _ = file.load(path)
        return features.distance(*torch.zeros(2, 1, features.channels, 8, 8))
    classifier.of(path)
    found = classifier.load(path)
    return found.statistics(np.zeros((1, *found.shape), np.uint8))
