"""Quality of generated 8x8 digits: Frechet distances of a small fixed network's features (FDc) and of the pixels (FDp).

The network is a classifier of the 10 digits; its weights ship with the package. The command that made them, with the
same bits for the same seed and torch build, in about 10 CPU seconds:

    python -m ect.metrics.features [--out ect/metrics/digits_features.npz] [--seed 0]

FDp alone is too blind (a Gaussian with the data's mean and covariance has FDp near 0), so both are reported. Both are
biased upwards for few samples and depend on the extractor: compare only figures of equal sample counts and of this one.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ect.config import SEED, DataConfig, refuse_beyond
from ect.errors import UserError
from ect.files.atomic import atomic
from ect.metrics.evaluator import Column, Evaluator
from ect.metrics.frechet import Array, Statistics, frechet_distance
from ect.ranks.distributed import World
from ect.ranks.launch import launch

WEIGHTS = Path(__file__).with_name("digits_features.npz")
LEVELS = 16  # the scans hold the integers 0..16
BATCH = 64  # images a training step
HELD_OUT = 360  # of 1797 images, for the accuracy
CHUNK = 128  # images a forward pass: the fastest of those tried
Images = Tensor | NDArray[np.uint8]


def build_network() -> nn.Sequential:
    """Return the classifier, [N, 1, 8, 8] in [-1, 1] -> 10 logits; all but its last layer give the 64 features."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.SiLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.SiLU(), nn.Flatten(),
        nn.Linear(512, 64), nn.SiLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


def pixel_features(images: Images) -> Array:
    """Return the 64 pixels on the data's own 17 levels, as float64 [N, 64] in [-1, 1]; images are uint8 [N, 8, 8, 1].

    Rounding to the levels keeps the metrics from telling generated from real images by their grey values alone.
    """
    array = images.cpu().numpy() if isinstance(images, Tensor) else images
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != (8, 8, 1):
        raise ValueError(f"digits must be uint8 [N, 8, 8, 1], found {array.dtype} {list(array.shape)}")
    pixels: Array = np.round(array.reshape(-1, 64) / 255 * LEVELS) / (LEVELS / 2) - 1
    return pixels


@dataclass(frozen=True)
class DigitsStatistics:
    """Statistics of a set of digits from which the figures follow; two of them merge exactly, so a set may come in chunks."""

    features: Statistics
    pixels: Statistics
    classes: NDArray[np.int64]
    """[10]: images of each predicted class."""

    @classmethod
    def of(cls, images: Images) -> DigitsStatistics:
        """Return the statistics of uint8 [N, 8, 8, 1], N >= 1."""
        pixels = pixel_features(images)
        features = _features(pixels)
        with torch.no_grad():
            predicted = _network()[-1](torch.from_numpy(features)).argmax(1)
        return cls(Statistics.of(features), Statistics.of(pixels), np.bincount(predicted, minlength=10))

    def merge(self, other: DigitsStatistics) -> DigitsStatistics:
        """Return the statistics of the union of both sets."""
        features, pixels = self.features.merge(other.features), self.pixels.merge(other.pixels)
        return DigitsStatistics(features, pixels, self.classes + other.classes)

    def distance(self, other: DigitsStatistics) -> tuple[float, float]:
        """Return (FDc, FDp)."""
        return frechet_distance(self.features, other.features), frechet_distance(self.pixels, other.pixels)

    @property
    def imbalance(self) -> float:
        """Half the L1 distance of the predicted classes' frequencies from uniform: 0 is balanced, 0.9 one class."""
        return float(np.abs(self.classes / self.classes.sum() - 0.1).sum() / 2)


class DigitsEvaluator(Evaluator):
    """FDc, FDp and the imbalance of the classes of generated digits; reference: uint8 [N, 8, 8, 1]."""

    columns = (Column("FDc"), Column("FDp"), Column("imbalance"))

    def __init__(self, reference: Images) -> None:
        self._reference = DigitsStatistics.of(reference)
        self.used = {
            "extractor": {"file": WEIGHTS.name, "sha256": hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()},
            "reference": {"images": len(reference)},
        }

    def evaluate(self, images: Iterable[Tensor]) -> dict[str, float]:
        """Return the three figures of at least 2 images."""
        samples = functools.reduce(DigitsStatistics.merge, map(DigitsStatistics.of, images))
        fdc, fdp = samples.distance(self._reference)
        return {"FDc": fdc, "FDp": fdp, "imbalance": samples.imbalance}


def train(images: Images, labels: NDArray[np.integer], seed: int, epochs: int = 80) -> tuple[nn.Sequential, float]:
    """Return (trained classifier, its accuracy on the 360 held-out images); one thread, deterministic by seed.

    Images are uint8 [N, 8, 8, 1], labels [N] in 0..9. Shifts by up to a pixel are the only augmentation.
    """
    x = torch.from_numpy(pixel_features(images)).float().reshape(-1, 1, 8, 8)
    y = torch.as_tensor(labels, dtype=torch.int64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = build_network()
            held_out, training = torch.randperm(len(x)).tensor_split([HELD_OUT])
            steps = epochs * (len(training) // BATCH)
            optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
            padded = nn.functional.pad(x, (1, 1, 1, 1), value=-1.0)
            for _ in range(epochs):
                order = training[torch.randperm(len(training))]
                for rows in order[: len(order) // BATCH * BATCH].view(-1, BATCH):
                    dy, dx = torch.randint(3, (2,)).tolist()
                    logits = net(padded[rows, :, dy : dy + 8, dx : dx + 8])
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(logits, y[rows]).backward()
                    optimizer.step()
                    schedule.step()
            with torch.no_grad():
                accuracy = (net(x[held_out]).argmax(1) == y[held_out]).double().mean().item()
    finally:
        torch.set_num_threads(threads)
    return net, accuracy


@functools.cache
def _network() -> nn.Sequential:
    """Return the shipped classifier in float64, so that features agree between machines to far below any figure printed."""
    net = build_network()
    with np.load(WEIGHTS) as file:
        net.load_state_dict({name: torch.from_numpy(file[name].astype(np.float32)) for name in net.state_dict()})
    return net.double().eval()


@torch.no_grad()
def _features(pixels: Array) -> Array:
    body = _network()[:-1]
    images = torch.from_numpy(pixels).reshape(-1, 1, 8, 8)
    return np.concatenate([body(images[i : i + CHUNK]).numpy() for i in range(0, len(images), CHUNK)])


@dataclass(frozen=True)
class TrainOptions:
    """Train the small digit classifier whose features measure quality, and write its weights."""

    out: Path = WEIGHTS
    """File to write (.npz)."""
    seed: int = 0
    """Seed of weights, split and batches."""


def make(options: TrainOptions) -> None:
    """Train, write the weights as fp16 and print the held-out accuracy. Raises UserError on a seed that is none."""
    from ect.data import load

    if options.out.suffix != ".npz" or options.out.is_dir() or not options.out.parent.is_dir():
        raise UserError(f"--out {options.out}: name a file NAME.npz in a folder that is there")
    refuse_beyond({"seed": (options.seed, SEED)})
    data = load(DataConfig("digits", labels=True))
    assert data.labels is not None
    net, accuracy = train(data.images, data.labels.argmax(1).numpy(), options.seed)
    arrays = {name: tensor.numpy().astype(np.float16) for name, tensor in net.state_dict().items()}
    with atomic(options.out) as temp, temp.open("wb") as file:
        np.savez_compressed(file, **arrays)
    print(f"{options.out}: {accuracy:.2%} of {HELD_OUT} held-out digits recognised")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; exit with status 2 and one message where the user can mend it."""
    import tyro

    def work(options: TrainOptions, world: World) -> int:
        make(options)
        return 0

    if status := launch(lambda: tyro.cli(TrainOptions, args=args, prog="python -m ect.metrics.features"), work):
        raise SystemExit(status)


if __name__ == "__main__":
    main()
