"""The weights that a run keeps every so often: model files in the folders `weights` and `averages` of the run.

Raw weights (--log.weights-kimg) are no averages: any average can be made of them afterwards. Averages by power profiles
(--log.averages-kimg) stand for whole profiles, so a few of them make an average of any width. `python -m ect.merge` does both.
Parameters are in fp16, so that many of them fit, or in fp32; buffers are as they are. A file is named by the images seen, so
one that is written again after a resume takes its own place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ect.config.emas import POWER, is_width, sigma_rel_of, spelled
from ect.errors import UserError
from ect.files.atomic import left_by_a_kill, remove
from ect.files.model_file import save_model
from ect.files.run_folder import can_make

FOLDER, AVERAGES = "weights", "averages"
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
"""The types of the parameters, by --log.kept-precision."""
_NAME = re.compile(r"weights-(\d{6,})\.(\d{3})\.safetensors")
_AVERAGE = re.compile(r"average-(\d{6,})\.(\d{3})-rel([0-9.e-]+)\.safetensors")


@dataclass(frozen=True, order=True)
class Kept:
    """The weights of a run after nimg images, in a model file: raw, or averaged by a power profile of width sigma_rel."""

    nimg: int
    path: Path
    sigma_rel: float | None = None


def keep(
    run_dir: Path, nimg: int, net: nn.Module, spec: dict[str, Any], info: dict[str, Any], precision: str = "fp16",
    entry: str | None = None,
) -> Path | None:  # fmt: skip
    """Write the weights that `net` has now, after nimg images, atomically; return the path of their model file.

    Args: spec, info: as for `save_model`. precision: a key of DTYPES. entry: that of --optim.emas where they are an average by
    a power profile; None: raw weights. Weights that are not finite, or beyond the precision, are those of a run that
    diverges: none are written, and None is returned. Raises UserError where they cannot be written.
    """
    kept = {name: parameter.detach().to(DTYPES[precision]) for name, parameter in net.named_parameters()}
    if not all(bool(parameter.isfinite().all()) for parameter in kept.values()):
        return None
    folder = run_dir / (FOLDER if entry is None else AVERAGES)
    if not folder.is_dir():  # one that is there needs no room
        with can_make(str(folder)):
            folder.mkdir(exist_ok=True)
    for left in left_by_a_kill(folder):
        remove(left)
    kind, kimg = "raw" if entry is None else "average", f"{nimg / 1000:010.3f}"
    name = f"weights-{kimg}" if entry is None else f"average-{kimg}-rel{spelled(entry).removeprefix(POWER)}"
    path = folder / f"{name}.safetensors"
    save_model(path, net.state_dict() | kept, spec, {**info, "nimg": nimg, "weights": f"{kind}, {precision}"})
    return path


def listed(run_dir: Path) -> list[Kept]:
    """Return the raw weights that a run folder has, the earliest first. Raises UserError where it has none."""
    found = [
        Kept(int(match[1] + match[2]), path)
        for path in run_dir.glob(f"{FOLDER}/weights-*.safetensors")
        if (match := _NAME.fullmatch(path.name))
    ]
    if not found:
        raise UserError(
            f"{run_dir}: no raw weights in its folder {FOLDER!r}; give the folder of a run that kept some, with "
            "--log.weights-kimg"
        )
    return sorted(found)


def averages(run_dir: Path) -> list[Kept]:
    """Return the power-profile averages that a run folder has, the earliest first. Raises UserError where it has none."""
    found = [
        Kept(int(match[1] + match[2]), path, sigma_rel)
        for path in run_dir.glob(f"{AVERAGES}/average-*.safetensors")
        if (match := _AVERAGE.fullmatch(path.name)) and is_width(sigma_rel := sigma_rel_of(POWER + match[3]) or 0.0)
    ]
    if not found:
        raise UserError(
            f"{run_dir}: no averages in its folder {AVERAGES!r}; give the folder of a run that kept some, with --optim.emas "
            "rel:.05 rel:.10 --log.averages-kimg"
        )
    return sorted(found)
