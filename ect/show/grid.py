"""Grids of images, enlarged enough to see, as PNG files."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ect.files.atomic import atomic

_TARGET = 900  # pixels; the largest whole enlargement within it gives 450 to 900


GRID_SEEDS = range(64)
"""The images of a grid, the same in every run: grids of different runs and times can be compared."""


def make_grid(images: Tensor, columns: int | None = None, scale: int | None = None, pad: int = 2) -> Tensor:
    """Lay out images row by row on white."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise ValueError(f"a grid takes uint8 [N, H, W, 1 or 3], N > 0; got {images.dtype} {list(images.shape)}")
    n, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    if scale is None:
        fit = min((_TARGET - pad) // columns - pad, ((_TARGET - pad) // rows - pad) * width // height)
        scale = max(1, fit // width)
    tiles = images.cpu().repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    step_y, step_x = height * scale + pad, width * scale + pad
    canvas = torch.full((rows * step_y + pad, columns * step_x + pad, channels), 255, dtype=torch.uint8)
    for i, tile in enumerate(tiles):
        y, x = pad + i // columns * step_y, pad + i % columns * step_x
        canvas[y : y + height * scale, x : x + width * scale] = tile
    return canvas


def save_png(image: Tensor, path: Path, durable: bool = True) -> None:
    """Write one image, uint8 [H, W, 1 or 3], atomically (`ect.files.atomic.atomic`, which raises UserError)."""
    array = image.cpu().numpy()
    with atomic(path, durable) as temp:
        Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(temp, "PNG")


def save_grid(images: Tensor, path: Path, columns: int | None = None, scale: int | None = None, pad: int = 2) -> None:
    """Write `make_grid` as a PNG file, atomically. Raises UserError where `path` cannot be written."""
    save_png(make_grid(images, columns, scale, pad), Path(path))
