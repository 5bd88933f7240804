"""The file of a data set's features, and how a run finds it: in torch's cache, by the SHA-256 of the images."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ect.config import DataConfig
from ect.errors import UserError
from ect.files import npz
from ect.files.atomic import atomic
from ect.files.resume import data_fingerprint
from ect.tangent.network import Features

COMMAND = "python -m ect.tangent"
_ABOUT = ("data", "shape")
_BYTES = 1 << 23  # of the arrays; those of RGB images have 2 MB
_LARGEST = 4096  # pixels


def cached(data: str) -> Path:
    """Return the place in torch's cache of the features of a data set, by the SHA-256 of its images."""
    return Path(torch.hub.get_dir()) / "checkpoints" / f"ect-tangent-{data[:16]}.npz"


def save(path: Path, features: Features, data: str) -> None:
    """Write features, folded, and the SHA-256 of their images. Raises UserError where the file cannot be written."""
    weights = {name: tensor.cpu().numpy() for name, tensor in features.state_dict().items()}
    about = {"data": np.array(data), "shape": np.array([features.side, features.channels])}
    with atomic(path) as temp, temp.open("wb") as file:
        np.savez_compressed(file, **weights, **about)  # type: ignore[arg-type]


def load(path: Path) -> tuple[Features, str]:
    """Read features, on the CPU and frozen, and the SHA-256 of their images. Raises UserError naming a file that is none."""
    try:
        about = npz.read(path, _ABOUT, _BYTES)
        side, channels = (int(size) for size in about["shape"])
        if not 4 <= side <= _LARGEST or channels not in (1, 3):
            raise ValueError(f"it is for images {side}x{side} of {channels} channels")
        with torch.device("meta"):
            features = Features(side, channels)
        arrays = npz.read(path, features.state_dict(), _BYTES)
        weights = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
        if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
            raise ValueError("its weights are not finite")
        features.load_state_dict(weights, assign=True)
        data = str(about["data"])
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise UserError(f"{path}: not a file of tangent features ({error}); make it anew with {COMMAND}") from error
    return features.eval().requires_grad_(False), data


def find(images: Tensor, cfg: DataConfig) -> Features:
    """Return the features of a data set uint8 [N, H, W, C], which `cfg` names, on the CPU and frozen.

    Raises UserError, with the command that makes them, where there are none.
    """
    data = data_fingerprint(images, None)
    path = cached(data)
    command = f"{COMMAND} {_options(cfg)}"
    if not path.is_file():
        raise UserError(
            f"--objective.direction features: {cfg.source} has none yet (there is no {path}); run {command}"
        )
    features, of = load(path)
    if of != data or (features.side, features.channels) != (images.shape[1], images.shape[3]):
        raise UserError(f"--objective.direction features: {path} belongs to other images; run {command}")
    return features


def _options(cfg: DataConfig) -> str:
    """Return the options by which the command reads the same images."""
    given = {"source": cfg.source, "resolution": cfg.resolution, "convert": cfg.convert}
    return " ".join(f"--data.{name} {shlex.quote(str(value))}" for name, value in given.items() if value is not None)
