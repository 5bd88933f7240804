"""The quality table: one row a sampler, one column a metric, each repeat with seeds of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ect.metrics.evaluator import Column, Evaluator
from ect.models import EDMPrecond
from ect.models.guided import Guided
from ect.ranks.distributed import World
from ect.sampler import Sampler, generate


def named(sampler: Sampler, ema: str | None) -> str:
    """Return how a table names a sampler; ema: the weight average that it samples, where there are several."""
    return sampler.name if ema is None else f"{sampler.name}, EMA {ema}"


@dataclass(frozen=True)
class QualityRow:
    """The figures of one sampler."""

    sampler: Sampler
    samples: int
    """Images a repeat."""
    first_seeds: tuple[int, ...]
    """Repeat i uses the seeds first_seeds[i] ... first_seeds[i] + samples - 1, an image each."""
    values: tuple[dict[str, float], ...]
    """One evaluation a repeat, by column name."""
    seconds: float
    """Wall-clock of the sampling, all repeats together."""
    ema: str | None = None
    """The weight average, an entry of --optim.emas, where there are several."""

    def mean(self, column: str) -> float:
        """Return the mean over the repeats."""
        return fmean(value[column] for value in self.values)

    def minimum(self, column: str) -> float:
        """Return the minimum over the repeats (EDM's published FIDs are minima of three)."""
        return min(value[column] for value in self.values)

    def as_json(self) -> dict[str, Any]:
        """Return a JSON-able form: all of the above but `ema` where it is None, with mean and minimum of each column."""
        names = self.values[0]
        sampler = {"name": self.sampler.name, "nfe": self.sampler.nfe, **asdict(self.sampler)}
        summary = {"mean": {n: self.mean(n) for n in names}, "minimum": {n: self.minimum(n) for n in names}}
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return known | {"sampler": sampler} | summary


class RemoteEvaluator(Evaluator):
    """The evaluator of rank 0, as the other ranks know it: it rates nothing there, and needs no weights and no statistics."""

    columns = ()

    def evaluate(self, images: Iterable[Tensor]) -> dict[str, float]:
        raise RuntimeError("only rank 0 rates images")


def quality_rows(
    net: EDMPrecond | Guided,
    evaluator: Evaluator,
    samplers: Sequence[Sampler],
    *,
    samples: int,
    repeats: int = 1,
    seed: int = 0,
    batch: int = 256,
    device: torch.device | str = "cpu",
    on_images: Callable[[int], None] = lambda count: None,
    ema: str | None = None,
    world: World = World(),
) -> list[QualityRow]:
    """Rate `net` with each sampler; in each repeat all of them start from the same latents.

    Args: net: preconditioned network in eval mode on `device`. evaluator: rank 0's counts, the others have `RemoteEvaluator`.
    samples: images a repeat. seed: of the first image of the first repeat. batch: images a forward pass. on_images: called
    with the number of images just made. ema: names the weight average in the rows.
    No rows where the evaluator has no column to fill: the images would be made for nothing.
    """
    if not world.first(lambda: bool(evaluator.available)):
        return []
    first_seeds = tuple(seed + i * samples for i in range(repeats))
    rows = []
    for sampler in samplers:
        values, seconds = [], 0.0
        for first in first_seeds:
            start, images = time.perf_counter(), []
            seeds = range(first, first + samples)
            for some in generate(net, seeds, sampler, batch=batch, device=device, world=world):
                images.append(some)
                on_images(len(some))
            seconds += time.perf_counter() - start
            values.append(world.first(partial(evaluator.evaluate, images)))
        rows.append(QualityRow(sampler, samples, first_seeds, tuple(values), seconds, ema))
    return rows


def quality_table(rows: Sequence[QualityRow], columns: Sequence[Column]) -> tuple[list[str], list[list[str]]]:
    """Return (headers, cells) as text. A cell is 'mean (minimum)' of several repeats, or one figure, or '-' where missing."""
    headers = ["sampler", "NFE", *(column.name for column in columns)]
    cells = [
        [named(row.sampler, row.ema), str(row.sampler.nfe), *(_cell(row, column) for column in columns)] for row in rows
    ]
    return headers, cells


def _cell(row: QualityRow, column: Column) -> str:
    if column.missing is not None:
        return "-"
    mean = f"{row.mean(column.name):.4g}"
    return mean if len(row.values) == 1 else f"{mean} ({row.minimum(column.name):.4g})"
