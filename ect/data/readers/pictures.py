"""Image files as one uint8 array: decoding by PIL, conversion, and what is said where the images are not of one kind."""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ect.errors import UserError

Convert = Literal["rgb", "grey"]
CHANNELS = {"L": 1, "RGB": 3}
# PIL only identifies these, or starts another program to draw them.
_NOT_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
_COLOURS = {"L": "grey", "RGB": "RGB", "P": "palette", "1": "black and white", "LA": "grey with transparency"}
_COLOURS |= {"RGBA": "RGB with transparency", "I;16": "16-bit grey", "I;16B": "16-bit grey", "I": "16-bit grey"}


@dataclass(frozen=True)
class Source:
    """Files under `path`: posix names relative to it, in sorted order, and how to read one."""

    path: Path
    names: list[str]
    read: Callable[[str], bytes]


def extensions() -> set[str]:
    """Return the extensions, with their dot and in lower case, of the files that PIL can open by itself."""
    known = formats()
    return {extension for extension, name in Image.registered_extensions().items() if name in known}


def formats() -> list[str]:
    """Return the formats that PIL reads by itself. It goes by the content: a file named .png may be PostScript."""
    Image.init()
    return [name for name in Image.ID if name not in _NOT_PICTURES]


def is_resolution(size: int) -> bool:
    """Return whether a network can take images of this width: a multiple of 4, which it can halve twice."""
    return size >= 4 and size % 4 == 0


def decode_all(source: Source, resolution: int | None, convert: Convert | None) -> tuple[np.ndarray, list[str]]:
    """Return (uint8 [N, H, W, C], notes for the log) of the pictures source.names; C = 1 if all are grey, 3 if all are RGB.

    With `resolution` each image is cropped to its central square and resized; without, all must be squares of one size,
    a multiple of 4. With `convert` each becomes 'rgb' or 'grey'. Raises UserError that names the first image which does
    not fit, and counts the kinds that are there.
    """
    first, *found = _decode(source, source.names[0], resolution, convert)
    smaller, dropped = map(int, found)
    if resolution is None:
        check_size(first, source.path / source.names[0])
    images = np.empty((len(source.names), *first.shape), np.uint8)
    images[0] = first
    for i, name in enumerate(source.names[1:], start=1):
        y, small, lost = _decode(source, name, resolution, convert)
        if y.shape != first.shape:
            raise UserError(f"{source.path / name}: {_difference(y, first, source.names[0])}{_survey(source)}")
        images[i], smaller, dropped = y, smaller + small, dropped + lost
    notes = []
    if smaller:
        notes.append(f"{smaller:,} of {len(images):,} images were smaller than {resolution}x{resolution}, and enlarged")
    if dropped:
        notes.append(f"{dropped:,} of {len(images):,} images mark a colour as transparent, which was passed over")
    return images, notes


def _difference(y: np.ndarray, first: np.ndarray, name: str) -> str:
    if y.shape[2] != first.shape[2]:
        kind = {1: "grey", 3: "RGB"}
        remedy = "convert them while reading, with --data.convert rgb or grey"
        return f"{kind[y.shape[2]]}, but {name} is {kind[first.shape[2]]}. Expected all grey or all RGB: {remedy}"
    sizes = f"{y.shape[1]}x{y.shape[0]} pixels, but {name} has {first.shape[1]}x{first.shape[0]}"
    return f"{sizes}. Expected one size: {_resolution_remedy(first)}"


def _survey(source: Source) -> str:
    """Return the kinds of all images, from their headers: ' (found: 480 RGB 32x32, ...)'."""
    kinds: Counter[str] = Counter()
    for name in source.names:
        try:
            with Image.open(io.BytesIO(source.read(name)), formats=formats()) as image:
                kinds[f"{_COLOURS.get(image.mode, image.mode)} {image.width}x{image.height}"] += 1
        except _UNREADABLE:
            kinds["unreadable"] += 1
    shown = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(6))
    more = f" and {len(kinds) - 6} more kinds" if len(kinds) > 6 else ""
    return f" (found: {shown}{more})"


def _decode(
    source: Source, name: str, resolution: int | None, convert: Convert | None
) -> tuple[np.ndarray, bool, bool]:
    """Return one image as uint8 [H, W, C], whether it was enlarged, and whether it lost transparency.

    It is turned as its EXIF tag says.
    """
    where = source.path / name
    try:
        with Image.open(io.BytesIO(source.read(name)), formats=formats()) as image:
            mode = image.mode
            if convert is not None or mode in CHANNELS:
                upright = ImageOps.exif_transpose(image)
                lost = convert is None and "transparency" in image.info
                upright = upright if convert is None else converted(upright, convert)
                small = resolution is not None and min(upright.size) < resolution
                y = np.asarray(upright if resolution is None else fit(upright, resolution))
                return y.reshape(*y.shape[:2], CHANNELS[upright.mode]), small, lost
    except _UNREADABLE as error:
        unknown = isinstance(error, UnidentifiedImageError)  # its text names an address in memory
        reason = "the file is empty" if not source.read(name) else "of no known format" if unknown else error
        raise UserError(f"{where}: cannot be read as an image ({reason}). Restore or remove the file") from error
    raise UserError(
        f"{where}: colour mode {mode}. Expected 8-bit grey (L) or RGB, without palette or transparency: convert the images "
        f"while reading, with --data.convert rgb or grey{_survey(source)}"
    )


def converted(image: Image.Image, to: Convert) -> Image.Image:
    """Return the image in 8-bit RGB or grey.

    Transparent pixels lie on white; 16-bit values are divided by 257. Raises ValueError for a mode whose range is
    unknown.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit values, whose range is unknown")
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point values, whose range is unknown")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        above = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
    return image.convert({"rgb": "RGB", "grey": "L"}[to])


def check_size(y: np.ndarray, where: Path) -> None:
    """Raise UserError unless the image [H, W, ...] read from `where` is a square that a network can halve twice."""
    if y.shape[0] != y.shape[1] or not is_resolution(y.shape[0]):
        raise UserError(
            f"{where}: {y.shape[1]}x{y.shape[0]} pixels. Expected a square whose side is a multiple of 4: "
            f"{_resolution_remedy(y)}"
        )


def _resolution_remedy(y: np.ndarray) -> str:
    nearest = 2 ** max(2, round(math.log2(min(y.shape[:2]))))
    return f"crop and resize all images with --data.resolution {nearest} (or another multiple of 4)"


def fit(image: Image.Image, resolution: int) -> Image.Image:
    """Return the image's central square, resized by PIL's Lanczos filter (antialiased when it shrinks).

    Grey 28x28 becomes 32x32 by a black border.
    """
    side = min(image.size)
    if (image.mode, *image.size, resolution) == ("L", 28, 28, 32):
        return ImageOps.expand(image, 2)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square if side == resolution else square.resize((resolution, resolution), Image.Resampling.LANCZOS)


def fit_all(images: np.ndarray, resolution: int) -> np.ndarray:
    """Fit all images: uint8 [N, H, W, C] -> [N, resolution, resolution, C]."""
    if images.shape[1:3] == (resolution, resolution):
        return images
    grey = images.shape[3] == 1
    fitted = [np.asarray(fit(Image.fromarray(y[..., 0] if grey else y), resolution)) for y in images]
    return np.stack(fitted).reshape(len(images), resolution, resolution, -1)
