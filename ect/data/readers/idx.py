"""IDX files, the format of MNIST and its kin: NAME-images-idx3-ubyte with NAME-labels-idx1-ubyte, plain or .gz."""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from pathlib import Path

import numpy as np

from ect.data.readers.labels import one_hot, refuse_too_many
from ect.data.readers.pictures import check_size
from ect.errors import UserError
from ect.files.foreign import what_is_at

MAX_BYTES = 2**33
"""Largest amount of image data read, whatever the header promises."""
_ALWAYS, _RATIO = 2**26, 16
"""Bytes read of any file, or so many times its size: MNIST is compressed by 4.7, and a small file must not fill the memory."""

_NAME = re.compile(r"(.*)images([-.])idx3-ubyte(\.gz)?", re.IGNORECASE)


def claims(path: Path) -> bool:
    """Return whether `path` is named as an IDX image file, or is a folder that holds one."""
    return bool(_images_in(path)) if path.is_dir() else _named(path)


def _images_in(folder: Path) -> list[Path]:
    """Return the IDX image files of a folder; of MNIST's two, the training set alone. A file and its .gz twin count once."""
    named = [file for file in folder.iterdir() if _named(file) and file.is_file()]
    found = {file.name.removesuffix(".gz"): file for file in sorted(named, reverse=True)}
    training = {name: file for name, file in found.items() if name.startswith("train-")}
    return list((training or found).values())


def _named(path: Path) -> bool:
    return _NAME.fullmatch(path.name) is not None


def read(path: Path, labels: bool, resolution: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Return images uint8 [N, H, W, 1], and if `labels` float32 one-hot [N, L].

    path: the image file, or the folder that holds it (MNIST's training set, where it has that and the test set). The label
    file lies beside it. Images must be squares whose side is a multiple of 4, unless the caller will crop and resize them to
    `resolution`. Raises UserError naming a file that is missing or does not fit.
    """
    if path.is_dir():
        inside = _images_in(path)
        if len(inside) > 1:
            names = ", ".join(sorted(file.name for file in inside))
            raise UserError(f"--data.source {path}: several sets of images ({names}); pass the one to train on")
        path = inside[0]
    images = _read_array(path, 3)
    if resolution is None:
        check_size(images[0], path)
    return images[..., None], _read_labels(path, len(images)) if labels else None


def _read_labels(images_path: Path, count: int) -> np.ndarray:
    match = _NAME.fullmatch(images_path.name)
    assert match is not None
    plain = images_path.with_name(f"{match[1]}labels{match[2]}idx1-ubyte")
    candidates = [plain, plain.with_name(plain.name + ".gz")]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        raise UserError(f"{plain}: no such file, nor with .gz. Put the labels there, or train without --data.labels")
    indices = _read_array(path, 1)
    if len(indices) != count:
        raise UserError(
            f"{path}: {len(indices)} labels for {count} images in {images_path.name}. Use files that belong together"
        )
    classes = int(indices.max()) + 1
    refuse_too_many(path, count, classes, count)
    return one_hot(indices, classes)


def _read_array(path: Path, ndim: int) -> np.ndarray:
    """Read a uint8 array of `ndim` dimensions: bytes 0, 0, 8 (uint8), ndim; big-endian 32-bit sizes; the values."""
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
            header = file.read(4 + 4 * ndim)
            if len(header) != 4 + 4 * ndim or header[:4] != bytes([0, 0, 8, ndim]):
                raise UserError(f"{path}: not an IDX file of {ndim}-dimensional uint8 data. Use the original file")
            shape = struct.unpack(f">{ndim}I", header[4:])
            size = math.prod(shape)
            if size == 0:  # whatever its other sizes say: no array can have some of them
                what = "images" if ndim == 3 else "labels"
                raise UserError(f"{path}: it holds no {what} (sizes {shape}). Use the original file")
            most = min(MAX_BYTES, max(_ALWAYS, _RATIO * path.stat().st_size))
            values = file.read(min(size, most) + 1)  # one byte more than promised, to notice an excess
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({what_is_at(path) or error}). Copy or download it again") from error
    if size > most == len(values) - 1 < MAX_BYTES:
        raise UserError(
            f"{path}: its header promises {size:,} bytes of data, more than {_RATIO} for each of its own. Unpack it "
            "with gunzip, if it is what it says"
        )
    if len(values) != size:
        found = f"more than {size}" if len(values) > size else str(len(values))
        raise UserError(f"{path}: its header promises {size} bytes of data, found {found}. Copy or download it again")
    return np.frombuffer(values, np.uint8).reshape(shape)
