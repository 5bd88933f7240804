"""python -m ect.tangent trains the features of a data set by which --objective.direction features finds its direction.

They are a small network that tells how an image was augmented. They belong to one data set, are trained on its images alone,
and lie in torch's cache, where a run finds them. On a CPU the same seed gives the same bits, on one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ect.config import BATCH, FOURS, FROM_1, SEED, DataConfig, Limit, at_most, refuse_beyond
from ect.data import load
from ect.errors import UserError
from ect.files.resume import data_fingerprint
from ect.ranks.device import resolve, set_threads
from ect.ranks.distributed import World
from ect.ranks.launch import launch
from ect.tangent import file
from ect.tangent.training import train


@dataclass(frozen=True)
class Data:
    """The images, by the options of ect.train."""

    source: str = "digits"
    """The data set, as ect.train has it."""
    resolution: int | None = None
    """The images' size, likewise."""
    convert: Literal["rgb", "grey"] | None = None
    """Make a folder or zip of images RGB or grey, likewise."""


@dataclass(frozen=True)
class Options:
    """Train the features of a data set for --objective.direction features, and keep them where a run finds them."""

    data: Data = Data()
    steps: int = 1500
    """Updates of the features. More of them cost more, and tell augmentations better."""
    batch: int = 128
    """Images a step."""
    seed: int = 0
    """Seed of weights, batches and augmentations."""
    device: str = "auto"
    """'auto' (CUDA where there is one), 'cpu', 'cuda', 'cuda:1'."""
    out: Path | None = None
    """File to write (.npz). Default: the place in torch's cache where a run looks for it."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; exit with status 2 and one message where the user can mend it."""

    def work(options: Options, world: World) -> int:
        set_threads(1, world)
        print(make(options))
        return 0

    if status := launch(lambda: tyro.cli(Options, args=args, prog=file.COMMAND), work):
        raise SystemExit(status)


def make(options: Options) -> str:
    """Train, write the file, and return a line with its place and how well the features tell augmentations.

    Raises UserError for options that cannot be, and for data that cannot be read.
    """
    out, source = options.out, options.data
    if out is not None and (out.suffix != ".npz" or not out.parent.is_dir() or out.is_dir()):
        raise UserError(f"--out {out}: name a file NAME.npz in a folder that is there")
    refuse_beyond(
        {
            "seed": (options.seed, SEED),
            "steps": (options.steps, FROM_1, at_most(10**7)),
            "batch": (options.batch, Limit("at least 2", lambda count: count >= 2), BATCH),
            "data.resolution": (source.resolution, FOURS, at_most(4096)),
        }
    )
    device = resolve(options.device)
    images = load(DataConfig(source.source, resolution=source.resolution, convert=source.convert)).images
    data = data_fingerprint(images, None)
    out = out or file.cached(data)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written there ({error.strerror}); choose another place with --out"
        ) from error
    found = train(images, options.steps, options.batch, options.seed, device)
    file.save(out, found.features, data)
    share = f"{found.error / found.variance:.0%}"
    return f"{out}: the labels' error is {found.error:.4f}, {share} of their variance of {found.variance:.4f}"


if __name__ == "__main__":
    main()
