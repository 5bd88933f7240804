"""Arrays of a .npz that may be anybody's: numbers and text alone, never a pickle, and no more than is expected."""

from __future__ import annotations

import io
import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_MARKS = 64
"""Signs and opening brackets in the header of an array, at most."""
_DAMAGED = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, OSError, EOFError, TypeError, AttributeError, IndexError,
    NotImplementedError, RuntimeError, MemoryError, SyntaxError, ArithmeticError, tokenize.TokenError,
)  # fmt: skip


def read(path: Path, names: Iterable[str], most: int) -> dict[str, np.ndarray]:
    """Return the arrays of these names, which together unpack to at most `most` bytes.

    Raises ValueError where the file is damaged, is another kind of file, lacks one of them, or holds more.
    """
    found: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in names:
                with archive.open(f"{name}.npy") as file:
                    data = file.read(most + 1)
                most -= len(data)
                if most < 0:
                    raise ValueError("it unpacks to more than such a file holds")
                found[name] = _array(data)
    except KeyError as error:
        raise ValueError(str(error.args[0])) from error
    except _DAMAGED as error:
        raise ValueError(str(error) or type(error).__name__) from error
    return found


def _array(data: bytes) -> np.ndarray:
    """Return the array of a .npy file. Its header is believed only where that many bytes follow."""
    file = io.BytesIO(data)
    version = npy.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"an array in version {version[0]}.{version[1]} of its format")
    at = 10 if version == (1, 0) else 12
    header = data[at : at + int.from_bytes(data[8:at], "little")]
    if sum(map(header.count, (b"(", b"[", b"{", b"-", b"+", b"~"))) > _MARKS:  # which Python's parser would nest
        raise ValueError("an array whose header is none of numpy's")
    shape, fortran, dtype = _HEADERS[version](file)
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which is never unpickled")
    count = math.prod(shape)
    if dtype.itemsize == 0 and count > 1:  # of texts without letters numpy would make room for one each
        raise ValueError("an array of nothing")
    if count < 0 or min(shape, default=0) < 0 or count * dtype.itemsize != len(data) - file.tell():
        raise ValueError("an array is longer or shorter than it says")
    flat = np.frombuffer(data, dtype, count, file.tell()) if count * dtype.itemsize else np.empty(count, dtype)
    return flat.reshape(shape, order="F" if fortran else "C")
