"""The judge of a search: it rates choices on images of their own, and what was found on others.

Whatever is chosen by its figure has too good a figure. So there are three sets of seeds, and no two share one. A search sees
the first alone; its finalists are compared by the second; the report has the third, whose seeds are those of ect.evaluate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from ect.config import EvalConfig
from ect.data import Dataset
from ect.errors import UserError
from ect.files.kept import FOLDER
from ect.files.run_folder import CONFIG, load
from ect.metrics import Evaluator, QualityRow, RemoteEvaluator, make_evaluator, quality_rows, quality_table, reference
from ect.models import EDMPrecond
from ect.ranks.distributed import World
from ect.sampler import Sampler
from ect.show.table import Table

FIRST = 2**31
"""The first seed of a search. Behind it there is room below 2^32: torch's generator of a CPU tells 32 bits apart."""
REPEATS = 3
"""Sets of images on which the report has what was found, as ect.evaluate has it."""
LESS_IS_BETTER = ("FDc", "FDp", "FID", "KID", "FD-DINOv2")
"""The metrics that a search can lower."""


def seeds(samples: int) -> dict[str, range]:
    """Return the seeds of the images by which choices are rated, of those of the finalists, and of those of the report."""
    return {
        "search": range(FIRST, FIRST + samples),
        "finals": range(FIRST + samples, FIRST + 2 * samples),
        "report": range(REPEATS * samples),
    }


@dataclass
class Judge:
    """Rates networks by one figure, of which less is better.

    Args: evaluator: rank 0's counts. metric: the figure's column. samples: images of a rating. batch: images a forward pass.
    All ranks of `world` rate together, and get the same figures.
    """

    evaluator: Evaluator
    metric: str
    samples: int
    batch: int = 256
    device: torch.device = torch.device("cpu")
    world: World = World()
    progress: Progress = field(default_factory=lambda: Progress(disable=True))
    ratings: int = 0
    """Choices rated so far, a set of images each."""

    def rate(self, net: EDMPrecond, sampler: Sampler, finals: bool = False) -> float:
        """Return the figure of a choice, on the images of the search, or else of its finals."""
        first = seeds(self.samples)["finals" if finals else "search"][0]
        (row,) = self._rows(net, [sampler], first)
        self.ratings += 1
        for task in self.progress.task_ids:
            self.progress.advance(task)
        return row.mean(self.metric)

    def report(self, net: EDMPrecond, samplers: Sequence[Sampler]) -> list[QualityRow]:
        """Return all figures of a network by each sampler, on images that no search has seen."""
        return self._rows(net, samplers, 0, REPEATS)

    def _rows(self, net: EDMPrecond, samplers: Sequence[Sampler], first: int, repeats: int = 1) -> list[QualityRow]:
        return quality_rows(
            net, self.evaluator, samplers, samples=self.samples, repeats=repeats, seed=first, batch=self.batch,
            device=self.device, world=self.world,
        )  # fmt: skip

    def table(self, found: Sequence[tuple[str, Sequence[QualityRow]]], title: str) -> Table:
        """Return the table of what `report` gave, each choice by its name."""
        lines, headers = [], ["sampler"]
        for name, rows in found:
            headers, cells = quality_table(rows, self.evaluator.columns)
            lines += [[name, *cell] for cell in cells]
        return Table(["", *headers], lines, title)


def judge(
    data: Dataset, folder: Path, metric: str | None, samples: int, batch: int, device: torch.device, world: World
) -> Judge:
    """Return the judge of a data set.

    Args: folder: of the caches of metrics, and of the run whose config.json may name their weights. metric: None: the first
    that can be computed and lowered. Raises UserError where there is no such metric.
    """
    evaluator: Evaluator = RemoteEvaluator()
    if world.rank == 0:
        weights = load(folder).eval.weights if (folder / CONFIG).is_file() else None
        evaluator = make_evaluator(data, EvalConfig(samples=samples, weights=weights), folder, device=device)
    return Judge(evaluator, world.first(lambda: lowered(evaluator, metric)), samples, batch, device, world)


def lowered(evaluator: Evaluator, asked: str | None) -> str:
    """Return the metric that was asked for, or else the first that can be computed and is better the lower it is.

    Raises UserError where there is none, or it is not the one that was asked for.
    """
    known = [column.name for column in evaluator.available if column.name in LESS_IS_BETTER]
    if asked in known or (asked is None and known):
        return asked or known[0]
    missing = "; ".join(evaluator.notes)
    there = f"expected one of {', '.join(known)}" if known else f"no metric can be computed: {missing}"
    raise UserError(f"--metric {asked}: {there}" if asked is not None else there)


def run_of(model: Path) -> Path | None:
    """Return the folder of the run that a model file of a run lies in, or that is meant itself; None of any other file."""
    folder = model.parent.parent if model.parent.name == FOLDER else model.parent
    if model.is_dir():
        folder = model
    elif not model.name.startswith(("checkpoint-", "weights-")):
        return None
    return folder if (folder / CONFIG).is_file() else None


def data_of(net: EDMPrecond, info: dict[str, object], model: Path, source: str | None) -> tuple[Dataset, Path]:
    """Return the images that a model is compared with, and the folder for the caches of metrics.

    They are those of `source`, in the size of the model's, else of the run that the model lies in, else those that the model
    file means. Raises UserError where there are none, or they do not fit.
    """
    run = run_of(model)
    if run is None:
        size = None if source is None else net.img_resolution
        return reference(net, dict(info), str(model), source, size), Path("runs") / f"evaluation-{model.stem}"
    data = load(run).data
    return reference(net, dict(info), str(model), source or data.source, data.resolution, data.convert), run


def minutes(seconds: float, ratings: int, samples: int) -> str:
    """Say what a search has cost."""
    return f"searched for {seconds / 60:.1f} minutes: {ratings} ratings of {samples:,} images each"


def gains(before: QualityRow, after: QualityRow, console: Console) -> None:
    """Print, for each figure of which less is better, how it changed."""
    for name in (name for name in before.values[0] if name in LESS_IS_BETTER):
        old, new = before.mean(name), after.mean(name)
        console.print(
            f"{name} at {after.sampler.nfe} NFE: {old:.4g} -> {new:.4g} ({(new / old - 1):+.1%})", highlight=False
        )
