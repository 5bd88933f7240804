"""One loader for every data set: uint8 images, and class labels where they are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from ect.config import DataConfig
from ect.data.readers import cifar10, idx, image_files
from ect.data.readers.labels import one_hot
from ect.errors import UserError


@dataclass(frozen=True)
class Dataset:
    """Images at rest.

    name: short name for logs and model files
    images: uint8 [N, H, W, C], contiguous; H = W is a power of two, C = 1 (grey) or 3 (RGB)
    labels: float32 [N, L], one-hot rows or vectors, or None
    """

    name: str
    images: torch.Tensor
    labels: torch.Tensor | None

    @property
    def resolution(self) -> int:
        """Width and height in pixels."""
        return self.images.shape[1]

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return self.images.shape[3]

    @property
    def label_dim(self) -> int:
        """Length of a label vector; 0 without labels."""
        return 0 if self.labels is None else self.labels.shape[1]


def load(cfg: DataConfig) -> Dataset:
    """Read the data set that `cfg.source` names.

    Formats: 'digits' (ships with the package); CIFAR-10 as the python tarball or its extracted folder; EDM's zip, or
    the same tree as a folder, with labels in dataset.json; any folder of images, whose top-level folders are the
    classes; an IDX image file such as train-images-idx3-ubyte.gz. Labels are kept only if `cfg.labels`. With
    `cfg.resolution` every image is cropped to its central square and resized to that width.

    Raises UserError, naming file, expectation and remedy, for data that is missing, damaged, of mixed or unsuitable
    size or colour mode, or not labelled as asked.
    """
    if cfg.resolution is not None and not image_files.is_resolution(cfg.resolution):
        raise UserError(f"--data.resolution {cfg.resolution}: expected a power of two from 4 on, such as 32")
    images: np.ndarray
    labels: np.ndarray | None
    if cfg.source == "digits":
        name, (images, labels) = "digits", _digits()
    else:
        name, (images, labels) = _read_path(Path(cfg.source).expanduser(), cfg)
    if cfg.resolution is not None:
        images = image_files.fit_all(images, cfg.resolution)
    return Dataset(
        name,
        torch.from_numpy(np.require(images, requirements=["C", "W"])),
        torch.from_numpy(labels) if cfg.labels and labels is not None else None,
    )


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """1,797 scans of handwritten digits, uint8 [1797, 8, 8, 1]; the file's 17 levels 0..16 become 0..255."""
    with resources.files("ect.data").joinpath("digits.npz").open("rb") as file, np.load(file) as arrays:
        levels, labels = arrays["images"], arrays["labels"]
    return np.rint(levels * (255 / 16)).astype(np.uint8)[..., None], one_hot(labels, 10)


def _read_path(path: Path, cfg: DataConfig) -> tuple[str, tuple[np.ndarray, np.ndarray | None]]:
    """Name and arrays of the data set at `path`, by the reader that its name and contents call for."""
    if cifar10.claims(path):
        return "cifar10", cifar10.read(path)
    if path.is_dir():
        return path.resolve().name, image_files.read_folder(path, cfg.labels, cfg.resolution)
    if not path.exists():
        raise UserError(
            f"--data.source {cfg.source}: no such file or folder (looked for {path.absolute()}). Pass 'digits', or a "
            "path: CIFAR-10 tarball or folder, EDM zip, folder of images, IDX file"
        )
    if path.suffix.lower() == ".zip":
        return path.stem, image_files.read_zip(path, cfg.labels, cfg.resolution)
    if idx.claims(path):
        return path.name.split(".")[0], idx.read(path, cfg.labels, cfg.resolution)
    raise UserError(
        f"--data.source {cfg.source}: not a data set file. Expected cifar-10-python.tar.gz, a .zip in EDM's layout or "
        "an IDX file (*-images-idx3-ubyte, plain or .gz); for single images pass the folder that holds them"
    )
