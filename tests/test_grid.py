"""Image grids: every pixel is where it belongs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ect.errors import UserError
from ect.show.grid import make_grid, save_grid


def test_every_pixel_of_a_grid(tmp_path: Path) -> None:
    images = torch.tensor([[[[1], [2]]], [[[3], [4]]], [[[5], [6]]]], dtype=torch.uint8)  # three of 1 x 2 pixels
    w = 255
    expected = [
        [w, w, w, w, w, w, w, w, w, w, w],
        [w, 1, 1, 2, 2, w, 3, 3, 4, 4, w],
        [w, 1, 1, 2, 2, w, 3, 3, 4, 4, w],
        [w, w, w, w, w, w, w, w, w, w, w],
        [w, 5, 5, 6, 6, w, w, w, w, w, w],
        [w, 5, 5, 6, 6, w, w, w, w, w, w],
        [w, w, w, w, w, w, w, w, w, w, w],
    ]
    save_grid(images, tmp_path / "grid.png", columns=2, scale=2, pad=1)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.mode == "L" and np.array(picture).tolist() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_colours_stay_in_their_channels(tmp_path: Path) -> None:
    images = torch.randint(256, (2, 3, 4, 3), dtype=torch.uint8)
    save_grid(images, tmp_path / "grid.png", scale=1, pad=0)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.mode == "RGB"
        assert torch.equal(torch.from_numpy(np.array(picture)), torch.cat(list(images), dim=1))


@pytest.mark.parametrize(
    ("shape", "columns", "size"),
    [
        ((64, 8, 8), None, (850, 850)),  # 13 times
        ((64, 32, 32), None, (786, 786)),  # 3 times
        ((1, 8, 8), None, (900, 900)),
        ((256, 64, 64), None, (1058, 1058)),  # never made smaller
        ((5, 8, 8), 1, (180, 892)),  # 22 times: the height decides
        ((5, 16, 8), 1, (92, 892)),  # 11 times
        ((2, 4, 8), None, (886, 224)),
    ],
)
def test_default_size_is_big_enough_to_see(shape: tuple[int, ...], columns: int | None, size: tuple[int, int]) -> None:
    grid = make_grid(torch.zeros(*shape, 1, dtype=torch.uint8), columns)
    assert (grid.shape[1], grid.shape[0]) == size


def test_an_unwritable_grid_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"grid\.png: cannot write it"):
        save_grid(torch.zeros(1, 1, 1, 1, dtype=torch.uint8), tmp_path / "missing" / "grid.png")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [([1, 2, 2, 1], torch.float32), ([1, 3, 2, 2], torch.uint8), ([2, 2, 1], torch.uint8), ([0, 2, 2, 1], torch.uint8)],
)
def test_other_tensors_are_refused(shape: list[int], dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="a grid takes uint8"):
        make_grid(torch.zeros(shape, dtype=dtype))
