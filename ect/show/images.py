"""Sampled images as files: a grid, an .npz, or a folder with a PNG file for each."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ect.errors import UserError
from ect.files.checkpoint import atomic
from ect.show.grid import save_grid, save_png

_FILES = (".png", ".npz")


def prepare(out: Path) -> None:
    """Make the folder that is written to, so that a bad --out fails before the work. Raises UserError."""
    if out.suffix not in _FILES and out.suffix[1:].isalpha() and not out.is_dir():
        raise UserError(f"--out {out}: cannot write {out.suffix} files; expected NAME.png, NAME.npz or a folder")
    if out.suffix in _FILES and out.is_dir():
        raise UserError(
            f"--out {out}: is a folder; give another name, or one without {out.suffix} for a folder of images"
        )
    folder = out.parent if out.suffix in _FILES else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"--out {out}: cannot write into {folder} ({error.strerror}); choose another place") from error


def write(
    out: Path, batches: Iterable[Tensor], seeds: Sequence[int], sigmas: Sequence[float], classes: Sequence[int]
) -> None:
    """Write the images to NAME.png (a grid), to NAME.npz with all that is given, or else into the folder `out`, by their seeds.

    Args: batches: uint8 [n, H, W, C], in the order of seeds. sigmas: noise levels that they were sampled at. classes: of each.
    """
    if out.suffix == ".png":
        save_grid(torch.cat(list(batches)), out)
    elif out.suffix == ".npz":
        arrays: dict[str, Any] = {
            "images": torch.cat(list(batches)).numpy(),
            "seeds": np.array(seeds),
            "sigmas": np.array(sigmas),
            "class": np.array(classes),
        }
        with atomic(out) as temp, temp.open("wb") as file:
            np.savez(file, **arrays)
    else:
        for seed, image in zip(seeds, itertools.chain.from_iterable(batches), strict=True):
            folder = out / f"{seed - seed % 1000:06d}"
            folder.mkdir(exist_ok=True)
            save_png(image, folder / f"{seed:06d}.png", durable=False)
