"""One loader for every data set: uint8 images, and class labels where they are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from ect.config import DataConfig
from ect.data.readers import cifar10, idx, image_files
from ect.data.readers.image_files import Read
from ect.data.readers.labels import one_hot
from ect.data.readers.pictures import MAX_SIDE, fit_all, is_resolution
from ect.errors import UserError

TEACHER = "teacher"
"""The --data.source of a run whose teacher draws its images (ect.files.drawn)."""


@dataclass(frozen=True)
class Dataset:
    """Images at rest.

    name: short name for logs and model files
    images: uint8 [N, H, W, C], contiguous; H = W is a multiple of 4, C = 1 (grey) or 3 (RGB)
    labels: float32 [N, L], one-hot rows or vectors, or None; very many one-hot rows are uint8
    notes: what was left out or changed while reading, as lines for the log
    """

    name: str
    images: torch.Tensor
    labels: torch.Tensor | None
    notes: tuple[str, ...] = ()

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

    @property
    def has_classes(self) -> bool:
        """True where each label is one class, a row of zeros with a single one."""
        labels = self.labels
        if labels is None or labels.dtype == torch.uint8:
            return labels is not None
        return bool(((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all())

    def describe(self) -> str:
        """Say what it is, in a line: name, images, size, colour, and the classes with their counts."""
        size = f"{self.resolution}x{self.resolution} {'grey' if self.channels == 1 else 'RGB'}"
        return f"{self.name}: {len(self.images):,} images, {size}, {self._classes()}"

    def _classes(self) -> str:
        if self.labels is None:
            return "no labels"
        if not self.has_classes:
            return f"label vectors of {self.label_dim} numbers"
        counts = self.labels.sum(0).int().tolist()
        empty = [str(i) for i, count in enumerate(counts) if count == 0]
        text = f"{self.label_dim} classes of {min(counts):,} to {max(counts):,} images"
        if self.label_dim == 1:
            text = "a single class, from which a network learns nothing"
        if empty:
            text += f"; without images: class {', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}"
        return text


def load(cfg: DataConfig) -> Dataset:
    """Read the data set that `cfg.source` names.

    Formats: 'digits' (ships with the package); CIFAR-10 as the python tarball or its extracted folder; EDM's zip, or
    the same tree as a folder, with labels in dataset.json; any folder of images, whose top-level folders are the
    classes; an IDX image file such as train-images-idx3-ubyte.gz, or its folder. Labels are kept only if `cfg.labels`. With
    `cfg.resolution` every image is cropped to its central square and resized to that width. Grey 28x28 is padded to
    32x32, unless cfg.resolution is another; with `cfg.convert` image files become grey or RGB.

    Raises UserError, naming file, expectation and remedy, for data that is missing, damaged, of mixed or unsuitable
    size or colour mode, or not labelled as asked.
    """
    if cfg.resolution is not None and not is_resolution(cfg.resolution):
        raise UserError(f"--data.resolution {cfg.resolution}: expected a multiple of 4, such as 32, up to {MAX_SIDE:,}")
    if cfg.source == TEACHER:
        raise UserError(f"--data.source {TEACHER}: such images are drawn for a run of ect.train alone; give a path")
    if cfg.source == "digits":
        name, (images, labels, notes) = "digits", Read(*_digits(), [])
    else:
        try:
            path = Path(cfg.source).expanduser()
            path.lstat()  # which fails otherwise than by a FileNotFoundError where no file can have this name
        except FileNotFoundError:
            pass  # what is expected there, the readers say
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~ of a user that there is not
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"--data.source {cfg.source}: cannot be read ({reason}). Give another path") from error
        try:
            name, (images, labels, notes) = _read_path(path, cfg)
        except OSError as error:  # such as a folder that others may not list
            raise UserError(f"--data.source {cfg.source}: cannot be read ({error}). Give another path") from error
    padded = 32 if images.shape[1:] == (28, 28, 1) else None  # as the field has it for MNIST and its kin
    if (resolution := cfg.resolution or padded) is not None:
        images = fit_all(images, resolution)
    return Dataset(
        name,
        torch.from_numpy(np.require(images, requirements=["C", "W"])),
        torch.from_numpy(labels) if cfg.labels and labels is not None else None,
        tuple(notes),
    )


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Return the 1,797 scans of handwritten digits, uint8 [1797, 8, 8, 1]; the file's 17 levels 0..16 become 0..255."""
    with resources.files("ect.data").joinpath("digits.npz").open("rb") as file, np.load(file) as arrays:
        levels, labels = arrays["images"], arrays["labels"]
    return np.rint(levels * (255 / 16)).astype(np.uint8)[..., None], one_hot(labels, 10)


def _read_path(path: Path, cfg: DataConfig) -> tuple[str, Read]:
    """Return the name and arrays of the data set at `path`, by the reader that its name and contents call for."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"--data.source {cfg.source}: a pipe or a device, which may never end. Give a file or a folder")
    if cifar10.claims(path):
        return "cifar10", Read(*cifar10.read(path), [])
    if idx.claims(path):
        return path.name.split(".")[0], Read(*idx.read(path, cfg.labels, cfg.resolution), [])
    how = cfg.labels, cfg.resolution, cfg.convert
    if path.is_dir():
        return path.resolve().name, image_files.read_folder(path, *how)
    if not path.exists():
        raise UserError(
            f"--data.source {cfg.source}: no such file or folder (looked for {path.absolute()}). Pass 'digits', or a "
            "path: CIFAR-10 tarball or folder, EDM zip, folder of images, IDX file"
        )
    if path.suffix.lower() == ".zip":
        return path.stem, image_files.read_zip(path, *how)
    raise UserError(
        f"--data.source {cfg.source}: not a data set file. Expected cifar-10-python.tar.gz, a .zip in EDM's layout or "
        "an IDX file (*-images-idx3-ubyte, plain or .gz); for single images pass the folder that holds them"
    )
