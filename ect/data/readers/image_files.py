"""Image files: a folder of them, or EDM's zip, decoded by PIL into one uint8 array."""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

from ect.data.readers.labels import from_folders, from_json
from ect.errors import UserError

MAX_BYTES = 2**28
"""Largest file read from a zip: more is a mistake or an attack, not a training image."""

_CHANNELS = {"L": 1, "RGB": 3}
# PIL only identifies these, or starts another program to draw them.
_NOT_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class _Source:
    """Files under `path`: posix names relative to it, in sorted order, and how to read one."""

    path: Path
    names: list[str]
    read: Callable[[str], bytes]


def read_folder(root: Path, labels: bool, resolution: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """All images under `root`, in sorted order of their relative paths.

    Returns uint8 [N, H, W, C] and, if `labels`, float32 [N, L]: from dataset.json, else from the names of the top-level
    folders. With `resolution` each image is cropped to its central square and resized; without, all must be squares of
    one size, a power of two. C = 1 if all are 8-bit grey, 3 if all are RGB. Raises UserError naming the first file that
    does not fit.
    """
    names = [Path(folder, file).relative_to(root).as_posix() for folder, _, files in os.walk(root) for file in files]
    source = _Source(root, sorted(names), lambda name: (root / name).read_bytes())
    pictures = _pictures(source)
    if not labels:
        vectors = None
    elif "dataset.json" in names:
        vectors = from_json(source.read("dataset.json"), pictures, root / "dataset.json")
    else:
        vectors = from_folders(pictures, root)
    return _decode_all(source, pictures, resolution), vectors


def read_zip(path: Path, labels: bool, resolution: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """All images of a zip in EDM's layout, in sorted order of their names; nothing is unpacked to disk.

    Returns and raises as `read_folder`, but labels come from dataset.json only: the folders 00000, 00001, ... of such a
    zip are no classes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(info.filename for info in archive.infolist() if not info.is_dir())
            source = _Source(path, names, lambda name: _read_member(archive, path, name))
            pictures = _pictures(source)
            vectors = None
            if labels:
                if "dataset.json" not in names:
                    raise UserError(
                        f"{path}: --data.labels was given, but the zip holds no dataset.json. Add one, or unpack "
                        "the zip and pass the folder if its top-level folders are the classes"
                    )
                vectors = from_json(source.read("dataset.json"), pictures, path / "dataset.json")
            return _decode_all(source, pictures, resolution), vectors
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"{path}: damaged, truncated or not a zip that can be read ({error}). Copy or make it anew"
        ) from error


def is_resolution(size: int) -> bool:
    """Whether the networks can take images of this width: a power of two from 4 on."""
    return size >= 4 and size & (size - 1) == 0


def fit_all(images: np.ndarray, resolution: int) -> np.ndarray:
    """Crop and resize uint8 [N, H, W, C] to [N, resolution, resolution, C]."""
    if images.shape[1:3] == (resolution, resolution):
        return images
    grey = images.shape[3] == 1
    fitted = [np.asarray(_fit(Image.fromarray(y[..., 0] if grey else y), resolution)) for y in images]
    return np.stack(fitted).reshape(len(images), resolution, resolution, -1)


def _read_member(archive: zipfile.ZipFile, path: Path, name: str) -> bytes:
    size = archive.getinfo(name).file_size
    if size > MAX_BYTES:
        raise UserError(
            f"{path / name}: {size} bytes unpacked, more than the {MAX_BYTES} accepted. Remove it from the zip"
        )
    return archive.read(name)


def _pictures(source: _Source) -> list[str]:
    """The names with an extension that PIL can open; hidden files (and macOS' ._ twins) are left out."""
    Image.init()
    formats = Image.OPEN.keys() - _NOT_PICTURES
    extensions = {extension for extension, name in Image.registered_extensions().items() if name in formats}
    pictures = []
    for name in source.names:
        leaf = PurePosixPath(name)
        if leaf.suffix.lower() in extensions and not leaf.name.startswith("."):
            pictures.append(name)
    if not pictures:
        raise UserError(
            f"{source.path}: no images in it. Expected .png, .jpg or other files that PIL reads; check --data.source"
        )
    return pictures


def _decode_all(source: _Source, names: list[str], resolution: int | None) -> np.ndarray:
    """uint8 [N, H, W, C], C = 1 if every image is grey ('L'), 3 if every one is RGB."""
    first = _decode(source, names[0], resolution)
    if resolution is None:
        check_size(first, source.path / names[0])
    images = np.empty((len(names), *first.shape), np.uint8)
    images[0] = first
    for i, name in enumerate(names[1:], start=1):
        y = _decode(source, name, resolution)
        if y.shape[2] != first.shape[2]:
            kind = {1: "grey", 3: "RGB"}
            raise UserError(
                f"{source.path / name}: {kind[y.shape[2]]}, but {names[0]} is {kind[first.shape[2]]}. "
                "Expected all grey or all RGB: convert the images of one kind"
            )
        if y.shape != first.shape:
            raise UserError(
                f"{source.path / name}: {y.shape[1]}x{y.shape[0]} pixels, but {names[0]} has "
                f"{first.shape[1]}x{first.shape[0]}. Expected one size: {_resolution_remedy(first)}"
            )
        images[i] = y
    return images


def _decode(source: _Source, name: str, resolution: int | None) -> np.ndarray:
    """One image as uint8 [H, W, C], turned as its EXIF tag says, cropped and resized if `resolution` is given."""
    where = source.path / name
    try:
        with Image.open(io.BytesIO(source.read(name))) as image:
            mode = image.mode
            if mode in _CHANNELS:
                upright = ImageOps.exif_transpose(image)
                y = np.asarray(upright if resolution is None else _fit(upright, resolution))
                return y.reshape(*y.shape[:2], _CHANNELS[mode])
    except _UNREADABLE as error:
        raise UserError(f"{where}: cannot be read as an image ({error}). Restore or remove the file") from error
    raise UserError(
        f"{where}: colour mode {mode}. Expected 8-bit grey (L) or RGB, without palette or transparency: convert the "
        "images, for example by: magick mogrify -background white -alpha remove -depth 8 -define png:color-type=2 *.png"
    )


def check_size(y: np.ndarray, where: Path) -> None:
    """Raise UserError unless the image [H, W, ...] read from `where` is a square of a power of two."""
    if y.shape[0] != y.shape[1] or not is_resolution(y.shape[0]):
        raise UserError(
            f"{where}: {y.shape[1]}x{y.shape[0]} pixels. Expected a square whose side is a power of two from 4 on: "
            f"{_resolution_remedy(y)}"
        )


def _resolution_remedy(y: np.ndarray) -> str:
    nearest = 2 ** max(2, round(math.log2(min(y.shape[:2]))))
    return f"crop and resize all images with --data.resolution {nearest} (or another power of two)"


def _fit(image: Image.Image, resolution: int) -> Image.Image:
    """Crop to the central square, then resize by PIL's Lanczos filter (antialiased when it shrinks)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square if side == resolution else square.resize((resolution, resolution), Image.Resampling.LANCZOS)
