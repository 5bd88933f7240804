"""The raw weights that a run keeps every so often (--log.weights-kimg): model files in the folder `weights` of the run.

They are no averages: any average can be made of them afterwards (`python -m ect.merge`). Parameters are in fp16, so that
many of them fit; buffers are as they are. A file is named by the images seen, so one that is written again after a resume
takes its own place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ect.errors import UserError
from ect.files.atomic import left_by_a_kill, remove
from ect.files.model_file import save_model
from ect.files.run_folder import can_make

FOLDER = "weights"
_NAME = re.compile(r"weights-(\d{6,})\.(\d{3})\.safetensors")


@dataclass(frozen=True, order=True)
class Kept:
    """The raw weights of a run after nimg images, in a model file."""

    nimg: int
    path: Path


def keep(run_dir: Path, nimg: int, net: nn.Module, spec: dict[str, Any], info: dict[str, Any]) -> Path | None:
    """Write the weights that `net` has now, after nimg images, atomically; return the path of their model file.

    Args: spec, info: as for `save_model`. Weights that are not finite, or beyond fp16, are those of a run that diverges: none
    are written, and None is returned. Raises UserError where they cannot be written.
    """
    halves = {name: parameter.detach().half() for name, parameter in net.named_parameters()}
    if not all(bool(half.isfinite().all()) for half in halves.values()):
        return None
    folder = run_dir / FOLDER
    with can_make(str(folder)):
        folder.mkdir(exist_ok=True)
    for left in left_by_a_kill(folder):
        remove(left)
    path = folder / f"weights-{nimg / 1000:010.3f}.safetensors"
    save_model(path, net.state_dict() | halves, spec, {**info, "nimg": nimg, "weights": "raw, fp16"})
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
