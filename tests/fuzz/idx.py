"""IDX files: images and the labels beside them, plain and compressed."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from ect.config import DataConfig
from ect.data import load
from tests.fuzz.mutations import spoilt


def idx(*shape: int) -> bytes:
    size = 1
    for length in shape:
        size *= length
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + bytes(i % 7 for i in range(size))


IMAGES, LABELS = [idx(3, 28, 28), idx(3, 8, 8)], idx(3)
SIZES = st.sampled_from([0, 1, 2, 4, 28, 255, 65536, 2**31, 2**32 - 1])
HEADERS = st.builds(
    lambda sizes, rest: bytes([0, 0, 8, 3]) + struct.pack(">3I", *sizes) + rest,
    st.tuples(SIZES, SIZES, SIZES),
    st.binary(max_size=64),
)
INPUTS = st.tuples(
    st.one_of(*map(spoilt, IMAGES), HEADERS, st.sampled_from(IMAGES)), st.just(LABELS) | spoilt(LABELS), st.booleans(),
    st.booleans(), st.sampled_from([None, 4]), st.integers(0, 9), st.integers(0, 200),
)  # fmt: skip


def read(folder: Path, given: tuple[bytes, bytes, bool, bool, int | None, int, int]) -> Any:
    images, labels, zipped, wanted, resolution, kind, at = given
    for name, data in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", labels)):
        for suffix in ("", ".gz"):
            (folder / f"{name}{suffix}").unlink(missing_ok=True)
        packed = bytearray(gzip.compress(data, 1, mtime=0) if zipped else data)
        if zipped and kind == 0 and at < len(packed):
            packed[at] ^= 1
        if zipped and kind == 1:
            del packed[at:]
        (folder / f"{name}{'.gz' if zipped else ''}").write_bytes(bytes(packed))
    path = folder / f"train-images-idx3-ubyte{'.gz' if zipped else ''}"
    return load(DataConfig(str(path), labels=wanted, resolution=resolution)).describe()
