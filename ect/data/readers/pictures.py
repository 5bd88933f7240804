"""Image files as one uint8 array: decoding by PIL, conversion, and what is said where the images are not of one kind."""

from __future__ import annotations

import functools
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
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from ect.data.readers import effort, space
from ect.errors import UserError

Convert = Literal["rgb", "grey"]
CHANNELS = {"L": 1, "RGB": 3}
_ALWAYS, _RATIO = 150 << 20, 90
_IN_PYTHON = 200.0
"""The cost of a pixel that PIL decodes in Python, such as one of a PPM whose largest value is not 255."""
_SURVEYED = 10_000
"""Files that are looked at to say what kinds there are."""
MAX_SIDE = 4096
"""Largest width of an image to train on, in pixels."""
FORMATS = [
    "AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP",
]  # fmt: skip
"""The formats of PIL that are read. The others start a program (EPS), hold a picture of any format or size inside (IPTC, ICO,
ICNS), unpack without a bound (FITS), take a microsecond a pixel (QOI, DDS), or are no pictures."""
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
_COLOURS = {"L": "grey", "RGB": "RGB", "P": "palette", "1": "black and white", "LA": "grey with transparency"}
_COLOURS |= {"RGBA": "RGB with transparency", "I;16": "16-bit grey", "I;16B": "16-bit grey", "I": "16-bit grey"}


@dataclass(frozen=True)
class Source:
    """Files under `path`: posix names relative to it, in sorted order, how to read one, and how many bytes it has."""

    path: Path
    names: list[str]
    read: Callable[[str], bytes]
    size: Callable[[str], int]


@dataclass
class _Room:
    """The work that the files read so far may ask for, so that small files do not fill the memory, or take hours.

    decoded: values of pixels. spent: microseconds beside them.
    """

    read: int = 0
    decoded: float = 0.0
    spent: float = 0.0

    def has(self, data: bytes) -> bool:
        """Count a file that is not open yet, and return whether there is room for the work that it asks for."""
        self.read, self.spent = self.read + len(data), self.spent + effort.of(data)
        return self.spent <= effort.most(self.read)

    def take(self, where: Path, data: bytes, image: ImageFile.ImageFile, convert: Convert | None) -> None:
        """Count the pixels of a file, whose header alone is read yet. Raises UserError where they are too many."""
        pixels, plain = image.width * image.height, convert != "rgb" and "transparency" not in image.info
        cost = {"1": 1.5, "L": 2.0}.get(image.mode, 3.0) if plain else 3.0  # as measured, in time
        if image.tile and image.tile[0].codec_name in Image.DECODERS:
            cost = _IN_PYTHON
        self.decoded += cost * pixels * effort.passes(data)
        if self.decoded > most_bytes(self.read):
            raise UserError(
                f"{where}: {pixels:,} pixels in {len(data):,} bytes: so small files hold no pictures so large. Remove it, or "
                "save such pictures without compression"
            )


def most_bytes(read: int) -> int:
    """Return how many bytes of pixels the pictures in so many bytes of files can have: photos have 10 to 50 times as many."""
    return max(_ALWAYS, _RATIO * read)


def extensions() -> set[str]:
    """Return the extensions, with their dot and in lower case, of the files in FORMATS that this PIL can open."""
    known = formats()
    return {extension for extension, name in Image.registered_extensions().items() if name in known}


@functools.cache
def formats() -> list[str]:
    """Return those of FORMATS that this PIL knows."""
    Image.init()
    return [name for name in FORMATS if name in Image.ID]


def opened(data: bytes) -> ImageFile.ImageFile:
    """Return a picture, opened by its content in one of FORMATS: a file named .png may be PostScript."""
    return Image.open(io.BytesIO(data), formats=formats())


def is_resolution(size: int) -> bool:
    """Return whether a network can take images of this width: a multiple of 4, which it can halve twice, up to MAX_SIDE."""
    return 4 <= size <= MAX_SIDE and size % 4 == 0


def decode_all(source: Source, resolution: int | None, convert: Convert | None) -> tuple[np.ndarray, list[str]]:
    """Return (uint8 [N, H, W, C], notes for the log) of the pictures source.names; C = 1 if all are grey, 3 if all are RGB.

    With `resolution` each image is cropped to its central square and resized; without, all must be squares of one size,
    a multiple of 4. With `convert` each becomes 'rgb' or 'grey'. Raises UserError that names the first image which does
    not fit, and counts the kinds that are there.
    """
    room = _Room()
    first, *found = _decode(source, source.names[0], resolution, convert, room)
    smaller, dropped = map(int, found)
    if resolution is None:
        check_size(first, source.path / source.names[0])
    images = _array(source, first, resolution)
    for i, name in enumerate(source.names[1:], start=1):
        y, small, lost = _decode(source, name, resolution, convert, room)
        if y.shape != first.shape:
            raise UserError(f"{source.path / name}: {_difference(y, first, source.names[0])}{_survey(source)}")
        images[i], smaller, dropped = y, smaller + small, dropped + lost
    notes = []
    if smaller:
        notes.append(f"{smaller:,} of {len(images):,} images were smaller than {resolution}x{resolution}, and enlarged")
    if dropped:
        notes.append(f"{dropped:,} of {len(images):,} images mark a colour as transparent, which was passed over")
    return images, notes


def _array(source: Source, first: np.ndarray, resolution: int | None) -> np.ndarray:
    """Return the array of all images, with the first in it. Raises UserError where there is no room for so many of its size.

    Without `resolution` that is also where the files are too small to hold them.
    """
    count, size = len(source.names), len(source.names) * first.nbytes
    if resolution is None and size > most_bytes(sum(map(source.size, source.names))):
        where = source.path / source.names[0]
        raise UserError(
            f"{where}: {first.nbytes:,} bytes of pixels, which the other files are too small to have. Remove it"
        )
    images = space.empty((count, *first.shape), f"{source.path}: {count:,} images of {first.shape[1]}x{first.shape[0]}")
    images[0] = first
    return images


def _difference(y: np.ndarray, first: np.ndarray, name: str) -> str:
    if y.shape[2] != first.shape[2]:
        kind = {1: "grey", 3: "RGB"}
        remedy = "convert them while reading, with --data.convert rgb or grey"
        return f"{kind[y.shape[2]]}, but {name} is {kind[first.shape[2]]}. Expected all grey or all RGB: {remedy}"
    sizes = f"{y.shape[1]}x{y.shape[0]} pixels, but {name} has {first.shape[1]}x{first.shape[0]}"
    return f"{sizes}. Expected one size: {_resolution_remedy(first)}"


def _survey(source: Source) -> str:
    """Return the kinds of all images, from their headers: ' (found: 480 RGB 32x32, ...)'; of very many, those of the first."""
    kinds: Counter[str] = Counter()
    room = _Room()
    for name in source.names[:_SURVEYED]:
        data = source.read(name)
        if not room.has(data):
            break
        try:
            with opened(data) as image:
                kinds[f"{_COLOURS.get(image.mode, image.mode)} {image.width}x{image.height}"] += 1
        except _UNREADABLE:
            kinds["unreadable"] += 1
    shown = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(6))
    more = f" and {len(kinds) - 6} more kinds" if len(kinds) > 6 else ""
    some = f" among the first {kinds.total():,}" if kinds.total() < len(source.names) else ""
    return f" (found{some}: {shown}{more})"


def _decode(
    source: Source, name: str, resolution: int | None, convert: Convert | None, room: _Room
) -> tuple[np.ndarray, bool, bool]:
    """Return one image as uint8 [H, W, C], whether it was enlarged, and whether it lost transparency.

    It is turned as its EXIF tag says.
    """
    where = source.path / name
    try:
        data = source.read(name)
        if not room.has(data):
            raise UserError(
                f"{where}: too much work beside its pixels: there are very many tiny files, or metadata that unpack to much. "
                "Remove it, or save such pictures without compression and metadata"
            )
        with opened(data) as upright:
            mode = upright.mode
            room.take(where, data, upright, convert)
            if convert is not None or mode in CHANNELS:
                ImageOps.exif_transpose(upright, in_place=True)  # by another image it would be twice in memory
                lost = convert is None and "transparency" in upright.info
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
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit values, whose range is unknown")
        image = Image.fromarray(((values.astype(np.int32) + 128) // 257).astype(np.uint8))  # rounded: no half is met
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
    if images.shape[1:] == (28, 28, 1) and resolution == 32:
        return np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    grey = images.shape[3] == 1
    fitted = [np.asarray(fit(Image.fromarray(y[..., 0] if grey else y), resolution)) for y in images]
    return np.stack(fitted).reshape(len(images), resolution, resolution, -1)
