"""Quality of generated images in the features of a small classifier of the data: FDc, FDp and the imbalance of classes.

FDc is the Frechet distance of the features, FDp that of the pixels. A classifier belongs to one data set. Those of the
digits and of Fashion-MNIST ship with the package, and these commands made them, with the same bits for the same seed and
torch build (about 10 CPU seconds for the digits, minutes for the others):

    python -m ect.metrics.features
    python -m ect.metrics.features --data datasets/fashion16 --epochs 8
    python -m ect.metrics.features --data datasets/fashion-mnist --resolution 28 --epochs 5

Any other data set with classes gets its own in the same way; without --out it lies in torch's cache, where evaluation looks
for it. FDp alone is too blind (a Gaussian with the data's mean and covariance has FDp near 0), so both are reported. Both
are biased upwards for few samples and depend on the classifier: compare only figures of equal sample counts and of one.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor, nn

from ect.config import FOURS, FROM_1, SEED, DataConfig, at_most, refuse_beyond
from ect.data import load
from ect.errors import UserError
from ect.files.resume import data_fingerprint
from ect.metrics import classifier
from ect.metrics.classifier import Classifier, Images, ImageStatistics
from ect.metrics.evaluator import Column, Evaluator
from ect.metrics.frechet import Statistics, frechet_distance
from ect.ranks.distributed import World
from ect.ranks.launch import launch

BATCH = 64  # images a training step
MAX_HELD_OUT = 5000
SOME = 4096  # images whose pixels are in memory as float64


def distance(a: ImageStatistics, b: ImageStatistics) -> tuple[float, float]:
    """Return (FDc, FDp)."""
    return frechet_distance(a.features, b.features), frechet_distance(a.pixels, b.pixels)


class FeatureEvaluator(Evaluator):
    """FDc, FDp and the imbalance of the classes of generated images; path: the features file of the data set `reference`."""

    columns = (Column("FDc"), Column("FDp"), Column("imbalance"))

    def __init__(self, path: Path, reference: Images) -> None:
        self._classifier = classifier.load(path)
        assert self._classifier.features is not None
        self._features = self._classifier.features
        pixels = (Statistics.of(self._classifier.pixels(some)) for some in chunks(reference))
        self._pixels = functools.reduce(Statistics.merge, pixels)
        self.used = {
            "extractor": {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
            "reference": {"images": len(reference)},
        }

    def evaluate(self, images: Iterable[Tensor]) -> dict[str, float]:
        """Return the three figures of at least 2 images."""
        samples = functools.reduce(ImageStatistics.merge, map(self._classifier.statistics, images))
        fdc, fdp = frechet_distance(samples.features, self._features), frechet_distance(samples.pixels, self._pixels)
        return {"FDc": fdc, "FDp": fdp, "imbalance": samples.imbalance}


def chunks(images: Images) -> Iterator[Images]:
    """Yield the images in parts that fit in memory as float64."""
    for start in range(0, len(images), SOME):
        yield images[start : start + SOME]


def held_out(count: int) -> int:
    """Return how many of `count` images measure the accuracy: a fifth, at most 5,000."""
    return min(-(-count // 5), MAX_HELD_OUT)


def train(images: Images, labels: NDArray[np.integer], seed: int, epochs: int) -> tuple[nn.Sequential, float]:
    """Return (trained classifier, its accuracy on the held-out images); one thread, deterministic by seed.

    Images are uint8 [N, H, H, C], labels [N] from 0. Shifts by up to a pixel are the only augmentation.
    """
    _, side, _, channels = images.shape
    levels = classifier.levels_of(images)
    x = torch.cat([torch.from_numpy(classifier.pixel_features(some, levels)).float() for some in chunks(images)])
    x, y = x.reshape(-1, channels, side, side), torch.as_tensor(labels, dtype=torch.int64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = classifier.build_network(side, channels, int(y.max()) + 1)
            rest, training = torch.randperm(len(x)).tensor_split([held_out(len(x))])
            steps = epochs * (len(training) // BATCH)
            optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
            padded = nn.functional.pad(x, (1, 1, 1, 1), value=-1.0)
            for _ in range(epochs):
                order = training[torch.randperm(len(training))]
                for rows in order[: len(order) // BATCH * BATCH].view(-1, BATCH):
                    dy, dx = torch.randint(3, (2,)).tolist()
                    logits = net(padded[rows, :, dy : dy + side, dx : dx + side])
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(logits, y[rows]).backward()
                    optimizer.step()
                    schedule.step()
            with torch.no_grad():
                right = sum(int((net(x[some]).argmax(1) == y[some]).sum()) for some in rest.split(classifier.CHUNK))
    finally:
        torch.set_num_threads(threads)
    return net, right / len(rest)


@dataclass(frozen=True)
class TrainOptions:
    """Train the small classifier of a data set whose features measure quality, and write its features file."""

    data: str = "digits"
    """The data set, as --data.source of ect.train; it needs classes."""
    resolution: int | None = None
    """The images' size, as --data.resolution has it."""
    epochs: int = 80
    """Passes over the images: 80 for the digits, 5 for 60,000 images."""
    out: Path | None = None
    """File to write (.npz). Default: the file that is there for this data set, else a place in torch's cache."""
    seed: int = 0
    """Seed of weights, split and batches."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; exit with status 2 and one message where the user can mend it."""

    def work(options: TrainOptions, world: World) -> int:
        print(make(options))
        return 0

    if status := launch(lambda: tyro.cli(TrainOptions, args=args, prog="python -m ect.metrics.features"), work):
        raise SystemExit(status)


def make(options: TrainOptions) -> str:
    """Train, write the features file, and return a line with its place and the held-out accuracy.

    Raises UserError for data without classes, or with too few images.
    """
    if options.out is not None and (
        options.out.suffix != ".npz" or not options.out.parent.is_dir() or options.out.is_dir()
    ):
        raise UserError(f"--out {options.out}: name a file NAME.npz in a folder that is there")
    refuse_beyond(
        {
            "seed": (options.seed, SEED),
            "epochs": (options.epochs, FROM_1, at_most(10**5)),
            "resolution": (options.resolution, FOURS, at_most(4096)),
        }
    )
    data = load(DataConfig(options.data, resolution=options.resolution, labels=True))
    images, labels = data.images, data.labels
    if labels is None or not data.has_classes:
        raise UserError(f"--data {options.data}: expected one class for each image, for a classifier to learn")
    if len(images) - held_out(len(images)) < BATCH:
        raise UserError(f"--data {options.data}: {len(images)} images are too few; expected at least {2 * BATCH}")
    net, accuracy = train(images, labels.argmax(1).numpy(), options.seed, options.epochs)
    rounded = net.half().double().eval()  # the weights that the file holds
    sha256, (_, side, _, channels) = data_fingerprint(images, None), images.shape
    made = Classifier(rounded, (side, side, channels), classifier.levels_of(images), sha256)
    known = functools.reduce(Statistics.merge, (Statistics.of(made(made.pixels(some))[0]) for some in chunks(images)))
    out = options.out or classifier.find(images) or classifier.cached(sha256)
    out.parent.mkdir(parents=True, exist_ok=True)
    classifier.save(out, replace(made, features=known))
    return f"{out}: {accuracy:.2%} of {held_out(len(images))} held-out images recognised"


if __name__ == "__main__":
    main()
