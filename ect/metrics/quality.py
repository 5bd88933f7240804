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
from ect.ranks.distributed import World
from ect.sampler import SIGMA_MAX, generate


@dataclass(frozen=True)
class Sampler:
    """One way to draw images: the consistency sampler at `sigmas`, or `heun_steps` of EDM's Heun sampler."""

    name: str
    nfe: int
    """Network evaluations an image."""
    sigmas: tuple[float, ...] | None = None
    heun_steps: int | None = None

    def options(self) -> dict[str, Any]:
        """Return the arguments of ect.sampler.generate."""
        return {"heun_steps": self.heun_steps} if self.sigmas is None else {"sigmas": self.sigmas}


def consistency_samplers(mid_t: Sequence[float]) -> list[Sampler]:
    """Return the consistency sampler at 1, 2, ... len(mid_t) + 1 evaluations: sigma 80 first, then mid_t in order."""
    sigmas = (SIGMA_MAX, *mid_t)
    return [
        Sampler(f"consistency, {nfe} step{'s' if nfe > 1 else ''}", nfe, sigmas=sigmas[:nfe])
        for nfe in range(1, len(sigmas) + 1)
    ]


def heun_samplers(steps: Sequence[int]) -> list[Sampler]:
    """Return EDM's Heun samplers; n steps take 2 n - 1 evaluations."""
    return [Sampler(f"diffusion, {n} Heun steps", 2 * n - 1, heun_steps=n) for n in steps]


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
        """Return a JSON-able dictionary: all of the above, with mean and minimum of each column."""
        names = self.values[0]
        summary = {"mean": {n: self.mean(n) for n in names}, "minimum": {n: self.minimum(n) for n in names}}
        return asdict(self) | summary


class RatedElsewhere(Evaluator):
    """The place of an evaluator on ranks other than 0: no weights, no statistics."""

    columns = ()

    def evaluate(self, images: Iterable[Tensor]) -> dict[str, float]:
        raise RuntimeError("only rank 0 rates images")


def quality_rows(
    net: EDMPrecond,
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

    All ranks of `world` make images, rank 0 computes their features and figures while the others wait, and every rank
    returns the rows. There are none where the evaluator has no column to fill: the images would be made for nothing.

    Args: net: preconditioned network in eval mode on `device`. evaluator: rank 0's counts, the others have
    `RatedElsewhere`. samples: images a repeat. seed: of the first image of the first repeat. batch: images a forward
    pass. on_images: called with the number of images just made. ema: names the weight average in the rows.
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
            for some in generate(net, seeds, batch=batch, device=device, world=world, **sampler.options()):
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
