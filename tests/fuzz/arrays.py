"""Files .npz: statistics of a data set as EDM has them, and features of one; whole arrays, spoilt archives, foreign headers."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ect.metrics import classifier
from ect.metrics.fidelity import read_statistics
from tests.fuzz.mutations import HUGE, spoilt

SHIPPED = classifier.SHIPPED / "digits_features.npz"
COMPRESSIONS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
TYPES = ["<f4", "<f8", "|O", "<U9", "|S1000000", "<i8", "|V0", "[('a', '<f4')]", "<M8[s]", "nonsense"]
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
    header = draw(st.sampled_from([header, header, header, "(" * 5000, "{" * 90, "1", header.replace("shape", "a")]))
    return member(header, draw(st.binary(max_size=64)), draw(st.sampled_from([(1, 0), (1, 0), (2, 0), (3, 0), (9, 9)])))


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """The features that ship, of which some arrays are others, or absent."""
    file = io.BytesIO()
    with zipfile.ZipFile(SHIPPED) as old, zipfile.ZipFile(file, "w", draw(st.sampled_from(COMPRESSIONS))) as new:
        names = old.namelist()
        touched = draw(st.sets(st.sampled_from([*names, "mu.npy", "sigma.npy"]), max_size=3))
        for name in [*names, *(touched - set(names))]:
            whole = old.read(name) if name in names else member("{}", b"")
            data = draw(st.one_of(arrays(), spoilt(whole), st.none())) if name in touched else whole
            if data is not None:
                new.writestr(name, data)
    return file.getvalue()


INPUTS = st.tuples(st.one_of(archives(), spoilt(SHIPPED.read_bytes()), arrays()), st.booleans())


def read(folder: Path, given: tuple[bytes, bool]) -> Any:
    data, statistics = given
    path = folder / "arrays.npz"
    path.write_bytes(data)
    if statistics:
        return read_statistics(path)
    classifier.of(path)
    found = classifier.load(path)
    return found.statistics(np.zeros((1, *found.shape), np.uint8))
