"""CIFAR-10's tarball: the archive, its compression, and the pickles in it. A batch has four rows here, not 10,000."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import tarfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import strategies as st

from ect.data.readers import cifar10
from tests.fuzz.mutations import WORDS, spoilt
from tests.fuzz.snapshots import programs

ROWS = 4
BATCH = {
    b"data": np.zeros((ROWS, 3072), np.uint8),
    b"labels": [0, 1, 2, 9],
    b"batch_label": b"one",
    b"filenames": [b"a.png"] * ROWS,
}
BATCHES = [pickle.dumps(BATCH, protocol) for protocol in (2, 4)]
PACKS = [bytes, gzip.compress, bz2.compress, lzma.compress]


def archive(members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT, **changes: Any) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as new:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for field, value in changes.items():
                setattr(member, field, value)
            new.addfile(member, io.BytesIO(data))
    return file.getvalue()


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """A whole archive of batches, of which one may be spoilt."""
    batches = [BATCHES[0]] * 5
    spoil = spoilt(BATCHES[0]) | spoilt(BATCHES[1]) | programs() | st.just(BATCHES[1])
    batches[draw(st.integers(0, 4))] = draw(spoil)
    members = [(f"{cifar10.FOLDER}/data_batch_{i + 1}", data) for i, data in enumerate(batches)]
    extra = [
        (name[:90].encode("utf-8", "replace").decode().replace("\0", ""), b"x")
        for name in draw(st.lists(st.sampled_from(WORDS), max_size=2))
    ]
    form = draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
    kinds = st.sampled_from(
        [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE]
    )
    changes = {"type": draw(kinds)} if draw(st.integers(0, 5)) == 0 else {}
    return archive([*extra, *members], form, **changes)


PLAIN = archive([(f"{cifar10.FOLDER}/data_batch_{i + 1}", BATCHES[0]) for i in range(5)])
PACKED = st.builds(lambda pack, data: pack(data), st.sampled_from(PACKS), archives())
INPUTS = st.one_of(
    PACKED, spoilt(PLAIN), *(spoilt(pack(PLAIN)) for pack in PACKS[1:]), spoilt(PLAIN).map(gzip.compress)
)


def read(folder: Path, data: bytes) -> Any:
    path = folder / "cifar-10-python.tar.gz"
    path.write_bytes(data)
    with mock.patch.object(cifar10, "ROWS", ROWS):
        return cifar10.read(path)
