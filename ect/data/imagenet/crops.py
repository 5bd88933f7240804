"""Small squares of pictures of any size, as the data sets of the field have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from PIL import Image

from ect.data.readers.pictures import fit

Crop = Literal["dhariwal", "center"]


def dhariwal(image: Image.Image, resolution: int) -> Image.Image:
    """Return the central square of an RGB picture in `resolution` pixels, as the pictures of EDM2 and ADM are made.

    The picture is halved by means of 2x2 pixels while its shorter side is at least twice as long, then brought to it by a
    bicubic filter, then cropped. Source: Dhariwal and Nichol, 2021 (arXiv 2105.05233), the data of their ImageNet models.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


CROPS: dict[Crop, Callable[[Image.Image, int], Image.Image]] = {"dhariwal": dhariwal, "center": fit}
