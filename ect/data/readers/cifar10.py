"""CIFAR-10 from its python tarball or the extracted folder, read without running anything from its pickles.

The batches are Python 2 pickles. `ect.files.safe_pickle` reads them, with a table of the names that numpy writes for an
array of bytes.
Format: https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from ect.data.readers.labels import one_hot
from ect.errors import UserError
from ect.files.foreign import what_is_at
from ect.files.pickled_tensors import ARRAYS, Array
from ect.files.safe_pickle import Budget, Machine, UnsafePickle

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
MD5 = "c58f30108f718f92721af3b95e74349a"
FOLDER = "cifar-10-batches-py"
BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
ROWS = 10_000
MAX_BYTES = 2**26
"""Largest batch file read; the real ones have 31 MB."""

MAX_UNPACKED = 2**28
"""Most bytes that the archive is unpacked to, whatever is in it; the real one has 186 MB."""
MAX_MEMBERS = 10_000

_OPENERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_TAR_SUFFIXES = (".tar.gz", ".tgz", ".tar")
_DOWNLOAD = f"Download {URL} (170 MB, md5 {MD5})"


def claims(path: Path) -> bool:
    """Return whether `path` names CIFAR-10, there or not: a tarball, or a folder with its batch files or its usual name."""
    if path.name.lower().endswith(_TAR_SUFFIXES):
        return not path.is_dir()
    folder = _batch_folder(path)
    return folder.name == FOLDER or any((folder / name).is_file() for name in BATCHES)


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the 50,000 training images.

    Images are uint8 [50000, 32, 32, 3] in the order of the batches, labels float32 one-hot [50000, 10]. The checksum is
    not enforced (the archive may have been packed anew), the structure is. Raises UserError.
    """
    if not path.exists():
        raise UserError(
            f"--data.source {path}: CIFAR-10 is not there (looked for {path.absolute()}). {_DOWNLOAD} and put it "
            "there, or pass --data.source with the path of your copy or of its extracted folder"
        )
    path = _batch_folder(path)
    batches = dict(_folder_members(path) if path.is_dir() else _tar_members(path))
    if not batches and not path.is_dir():
        raise UserError(
            f"{path}: an archive without any of CIFAR-10's files, {BATCHES[0]} to {BATCHES[-1]}. Of the tar archives only "
            "CIFAR-10's is read: unpack it, and pass --data.source with the folder"
        )
    missing = [name for name in BATCHES if name not in batches]
    if missing:
        raise UserError(f"{path}: {missing[0]} is missing; expected {BATCHES[0]} to {BATCHES[-1]}. {_DOWNLOAD} again")
    parts = [_parse_batch(batches.pop(name), path / name) for name in BATCHES]
    planes = np.concatenate([data for data, _ in parts]).reshape(-1, 3, 32, 32)
    return planes.transpose(0, 2, 3, 1), one_hot(np.concatenate([labels for _, labels in parts]), 10)


def _batch_folder(path: Path) -> Path:
    """Return `path`, or the folder that the tarball unpacks to inside it."""
    return path / FOLDER if (path / FOLDER).is_dir() else path


def _folder_members(folder: Path) -> Iterator[tuple[str, bytes]]:
    for name in BATCHES:
        if (folder / name).is_file():
            _check_size((folder / name).stat().st_size, folder / name)
            yield name, (folder / name).read_bytes()


def _tar_members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the batch files of the archive, in one pass and in memory."""
    try:
        with _unpacked(path) as file, tarfile.open(fileobj=_Limited(file, path), mode="r|") as archive:  # type: ignore[call-overload]
            for number, member in enumerate(archive):
                if number >= MAX_MEMBERS:
                    raise UserError(
                        f"{path}: more than {MAX_MEMBERS:,} files, where CIFAR-10 has eight. {_DOWNLOAD} again"
                    )
                name = PurePosixPath(member.name).name
                if name in BATCHES and member.isfile():
                    _check_size(member.size, path / name)
                    content = archive.extractfile(member)
                    assert content is not None  # a regular file
                    yield name, content.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, OverflowError) as error:
        reason = what_is_at(path) or error
        raise UserError(f"{path}: truncated, damaged or no tar archive ({reason}). {_DOWNLOAD} again") from error


def _unpacked(path: Path) -> IO[bytes]:
    """Return an archive, opened for reading without its compression."""
    with path.open("rb") as file:
        head = file.read(8)
    opened: IO[bytes] = next((opener for magic, opener in _OPENERS.items() if head.startswith(magic)), open)(path, "rb")
    return opened


@dataclass
class _Limited:
    """A file of which at most MAX_UNPACKED bytes are read: a small archive may unpack to anything."""

    file: IO[bytes]
    path: Path
    left: int = MAX_UNPACKED

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise UserError(f"{self.path}: unpacks to more than the {MAX_UNPACKED} bytes accepted. {_DOWNLOAD} again")
        return data


def _check_size(size: int, where: Path) -> None:
    if size > MAX_BYTES:
        raise UserError(
            f"{where}: {size} bytes; a CIFAR-10 batch has 31 MB, more than {MAX_BYTES} is refused. {_DOWNLOAD} again"
        )


def _parse_batch(pickled: bytes, where: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return data uint8 [10000, 3072] (1024 red, 1024 green, 1024 blue values a row) and class indices int64 [10000]."""
    batch = _unpickle(pickled, where)
    if not isinstance(batch, dict):
        raise UserError(
            f"{where}: expected a dict with data and labels, found {type(batch).__name__}. {_DOWNLOAD} again"
        )
    data, labels = (batch.get(key, batch.get(key.encode())) for key in ("data", "labels"))
    values = data.values() if isinstance(data, Array) else None
    if values is None or values.dtype != np.uint8 or values.shape != (ROWS, 3072):
        found = (
            type(data).__name__
            if values is None
            else f"shape {values.shape}"
            if values.dtype == np.uint8
            else f"{values.dtype}"
        )
        raise UserError(
            f"{where}: data must be a uint8 array of shape ({ROWS}, 3072), found {found}. {_DOWNLOAD} again"
        )
    if not (isinstance(labels, list) and len(labels) == ROWS and all(type(v) is int and 0 <= v < 10 for v in labels)):
        raise UserError(f"{where}: labels must be a list of {ROWS} integers in 0..9. {_DOWNLOAD} again")
    return values, np.array(labels)


def _unpickle(pickled: bytes, where: Path) -> Any:
    try:
        return Machine(ARRAYS, Budget(work=2 * MAX_BYTES), kind="CIFAR-10 batch").run(io.BytesIO(pickled))
    except UnsafePickle as error:
        raise UserError(f"{where}: refused: {error}. {_DOWNLOAD} again") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(
            f"{where}: truncated or damaged ({type(error).__name__}: {error}). {_DOWNLOAD} again"
        ) from error
