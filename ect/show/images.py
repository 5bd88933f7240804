"""Generated images as files: a grid, an .npz, or a folder with a PNG file for each seed."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ect.config.sampling import ONE_FILE
from ect.errors import UserError
from ect.files.atomic import atomic
from ect.files.run_folder import absent, make
from ect.show.grid import save_grid, save_png


def prepare(out: Path) -> list[str]:
    """Make the folder that `write` needs, so that a bad --out fails before the work; return what was made. Raises UserError."""
    if out.suffix.lower() not in ONE_FILE and out.suffix[1:].isalpha() and not out.is_dir():
        raise UserError(f"--out {out}: cannot write {out.suffix} files; expected NAME.png, NAME.npz or a folder")
    if out.suffix.lower() in ONE_FILE and out.is_dir():
        raise UserError(
            f"--out {out}: is a folder; give another name, or one without {out.suffix} for a folder of images"
        )
    folder = out.parent if out.suffix.lower() in ONE_FILE else out
    made = absent(folder)
    try:
        make(folder)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"--out {out}: cannot write into {folder} ({error.strerror}); choose another place") from error
    return list(map(str, made))


def write(
    out: Path, seeds: Sequence[int], batches: Iterable[Tensor], arrays: Mapping[str, Sequence[npt.ArrayLike]],
    columns: int | None = None,
) -> None:  # fmt: skip
    """Write batches of images, uint8 [n, H, W, C] and one a seed, where `out` says.

    NAME.png: a grid of so many columns, None: a square. NAME.npz: images [N, H, W, C], seeds and `arrays`. Else a
    folder: 001000/001234.png is that of seed 1234. Raises UserError where the system refuses.
    """
    if out.suffix.lower() == ".png":
        save_grid(torch.cat(list(batches)), out, columns)
    elif out.suffix.lower() == ".npz":
        images = torch.cat(list(batches)).numpy()
        named = {"images": images, "seeds": np.array(seeds)} | {
            name: np.array(values) for name, values in arrays.items()
        }
        with atomic(out) as temp, temp.open("wb") as file:
            np.savez(file, **named)  # type: ignore[arg-type]
    else:
        for seed, image in zip(seeds, itertools.chain.from_iterable(batches), strict=True):
            folder = out / f"{seed - seed % 1000:06d}"
            folder.mkdir(exist_ok=True)
            save_png(image, folder / f"{seed:06d}.png", durable=False)
