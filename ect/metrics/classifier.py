"""A small classifier of one data set, whose features measure generated images: its network, its file, and how it is found.

A features file (.npz) belongs to one data set: it holds the SHA-256 of the images, the weights in fp16, and the statistics
of the images' features, which for 60,000 images cost minutes. `python -m ect.metrics.features` makes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ect.errors import UserError
from ect.files import npz
from ect.files.atomic import atomic
from ect.files.resume import data_fingerprint
from ect.metrics.frechet import Array, Statistics

WIDTH = 64  # features
CHUNK = 128  # images a forward pass: the fastest of those tried
COARSEST = 7  # pixels: images are halved until their side is at most this
SHIPPED = Path(__file__).parent
_ABOUT = ("data", "shape", "levels", "classes", "count", "mean", "scatter")
_BYTES = 1 << 27  # of a features file, unpacked; those of grey images of 28x28 have 0.7 MB
_LARGEST = (4096, 64, 100_000)  # side, channels and classes of what it may describe
Images = Tensor | NDArray[np.uint8]


def build_network(side: int, channels: int, classes: int) -> nn.Sequential:
    """Return the classifier, [N, channels, side, side] in [-1, 1] -> logits; all but its last layer give the 64 features."""
    layers: list[nn.Module] = [
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.SiLU(),
    ]
    while side > COARSEST:
        layers += [nn.MaxPool2d(2), nn.Conv2d(32, 32, 3, padding=1), nn.SiLU()]
        side //= 2
    layers += [nn.Flatten(), nn.Linear(32 * side * side, WIDTH), nn.SiLU(), nn.Linear(WIDTH, classes)]
    return nn.Sequential(*layers)


def as_array(images: Images) -> NDArray[np.uint8]:
    """Return uint8 [N, H, W, C] as an array of numpy. Raises ValueError for images of another type or shape."""
    array = images.cpu().numpy() if isinstance(images, Tensor) else images
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1] != array.shape[2]:
        raise ValueError(f"images must be uint8 squares [N, H, H, C], found {array.dtype} {list(array.shape)}")
    return array


def levels_of(images: Images) -> int:
    """Return the number of steps from black to white that the images use: 16 for the digits' scans, else 255."""
    found = np.unique(as_array(images))
    steps = max(len(found) - 1, 1)
    return steps if np.array_equal(found, np.rint(np.arange(steps + 1) * (255 / steps))) else 255


def pixel_features(images: Images, levels: int) -> Array:
    """Return the pixels of uint8 [N, H, W, C], rounded to the data's own levels, as float64 [N, C * H * W] in [-1, 1].

    Rounding to the levels keeps the metrics from telling generated from real images by their grey values alone.
    """
    array = as_array(images).transpose(0, 3, 1, 2)
    pixels: Array = np.round(array.reshape(len(array), -1) / 255 * levels) / (levels / 2) - 1
    return pixels


@dataclass(frozen=True)
class ImageStatistics:
    """Statistics of a set of images from which the figures follow; two of them merge exactly, so a set may come in chunks."""

    features: Statistics
    pixels: Statistics
    classes: NDArray[np.int64]
    """[classes]: images of each predicted class."""

    def merge(self, other: ImageStatistics) -> ImageStatistics:
        """Return the statistics of the union of both sets."""
        features, pixels = self.features.merge(other.features), self.pixels.merge(other.pixels)
        return ImageStatistics(features, pixels, self.classes + other.classes)

    @property
    def imbalance(self) -> float:
        """Half the L1 distance of the predicted classes' frequencies from uniform: 0 is balanced, 0.9 one class of ten."""
        return float(np.abs(self.classes / self.classes.sum() - 1 / len(self.classes)).sum() / 2)


@dataclass(frozen=True)
class Classifier:
    """A trained classifier with what it knows of its data set.

    net: in float64, so that features agree between machines to far below any figure printed. shape: (H, W, C) of its
    images. levels: from black to white. data: SHA-256 of the images. features: statistics of the data set's features, [64];
    None while they are not known.
    """

    net: nn.Sequential
    shape: tuple[int, int, int]
    levels: int
    data: str
    features: Statistics | None = None

    @torch.no_grad()
    def __call__(self, pixels: Array) -> tuple[Array, NDArray[np.int64]]:
        """Return (features [N, 64], predicted classes [N]) of what `pixel_features` gave, [N, C * H * W]."""
        height, width, channels = self.shape
        body, last = self.net[:-1], self.net[-1]
        images = torch.from_numpy(pixels).reshape(-1, channels, height, width)
        features = torch.cat([body(images[i : i + CHUNK]) for i in range(0, len(images), CHUNK)])
        return features.numpy(), last(features).argmax(1).numpy()

    @property
    def classes(self) -> int:
        """Number of classes that it tells apart."""
        return int(self.net[-1].out_features)  # type: ignore[arg-type]

    def pixels(self, images: Images) -> Array:
        """Return the pixels of uint8 [N, H, W, C] on the data's levels. Raises ValueError for images of another shape."""
        if (shape := as_array(images).shape[1:]) != self.shape:
            raise ValueError(f"images must be uint8 {['N', *self.shape]}, found {['N', *shape]}")
        return pixel_features(images, self.levels)

    def statistics(self, images: Images) -> ImageStatistics:
        """Return the statistics of uint8 [N, H, W, C], N >= 1."""
        pixels = self.pixels(images)
        features, predicted = self(pixels)
        counts = np.bincount(predicted, minlength=self.classes)
        return ImageStatistics(Statistics.of(features), Statistics.of(pixels), counts)


def save(path: Path, classifier: Classifier) -> None:
    """Write a features file. Raises UserError where it cannot be written, ValueError without the data's statistics."""
    known = classifier.features
    if known is None:
        raise ValueError("a features file holds the statistics of its data")
    weights = {name: tensor.numpy().astype(np.float16) for name, tensor in classifier.net.state_dict().items()}
    about: dict[str, Any] = {
        "data": np.array(classifier.data), "shape": np.array(classifier.shape), "levels": np.array(classifier.levels),
        "classes": np.array(classifier.classes), "count": np.array(known.count), "mean": known.mean,
        "scatter": known.scatter,
    }  # fmt: skip
    with atomic(path) as temp, temp.open("wb") as file:
        np.savez_compressed(file, **weights, **about)


def load(path: Path) -> Classifier:
    """Read a features file. Raises UserError naming it where it is damaged."""
    try:
        about = npz.read(path, _ABOUT, _BYTES)
        height, width, channels = (int(size) for size in about["shape"])
        classes = int(about["classes"])
        if not all(1 <= n <= most for n, most in zip((height, channels, classes), _LARGEST, strict=True)):
            raise ValueError(f"it is for images {height}x{width} of {channels} channels, {classes} classes")
        net = build_network(height, channels, classes)
        weights = npz.read(path, net.state_dict(), _BYTES)
        net.load_state_dict({name: torch.from_numpy(array.astype(np.float32)) for name, array in weights.items()})
        known = Statistics(int(about["count"]), about["mean"], about["scatter"])
        if known.count < 1 or known.mean.shape != (WIDTH,) or known.scatter.shape != (WIDTH, WIDTH):
            raise ValueError(f"its statistics are not those of {WIDTH} features")
        if not (np.isfinite(known.mean).all() and np.isfinite(known.scatter).all()):
            raise ValueError("its statistics are not finite")
        data, levels = str(about["data"]), int(about["levels"])
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise UserError(
            f"{path}: not a features file ({error}); make it anew, see python -m ect.metrics.features --help"
        ) from error
    return Classifier(net.double().eval(), (height, width, channels), levels, data, known)


def of(path: Path) -> str:
    """Return the SHA-256 of the images that a features file belongs to; empty where it does not say so."""
    try:
        return str(npz.read(path, ["data"], _BYTES)["data"])
    except ValueError:
        return ""


def cached(data: str) -> Path:
    """Return the place in torch's cache of the features file of a data set, by the SHA-256 of its images."""
    return Path(torch.hub.get_dir()) / "checkpoints" / f"ect-features-{data[:16]}.npz"


def find(images: Tensor) -> Path | None:
    """Return the features file of a data set uint8 [N, H, W, C]: one that ships, else one in torch's cache; or None."""
    data = data_fingerprint(images, None)
    return next((path for path in (*sorted(SHIPPED.glob("*_features.npz")), cached(data)) if of(path) == data), None)
