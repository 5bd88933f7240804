"""The gap t - r beside the one that the network's own answers suggest, by noise level: sums of a run, as it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

LOW, BINS = -7, 12
"""Bins of ln t, of width 1, from e^-7 to e^5. What lies beyond counts in the first or the last."""
PREFIX = "levels/"


class Level(NamedTuple):
    """Means over the pairs of one bin.

    With v = (D_t - D_r) / (t - r) and e = D_t - y: A = <v, e> and B = ||v||^2. gap: t - r. images: how many pairs.
    """

    A: float
    B: float
    gap: float
    images: float

    @property
    def suggested(self) -> float:
        """Return A / B, to which the best gap is proportional, in the unit of t; nan without any movement."""
        return self.A / self.B if self.B else float("nan")


class Gaps:
    """Sums over pairs by bins of ln t, on the device, to which a step adds; no atomics, no wait for the device.

    Source: ADCM (arXiv 2510.17266), whose best gap is lambda / (1 + lambda) A / B. It needs no derivative of the network: the
    pair has the difference already.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(BINS, len(Level._fields), dtype=torch.float64, device=device)
        self._bins = torch.arange(BINS, device=device)

    @torch.no_grad()
    def add(self, t: Tensor, r: Tensor, D_t: Tensor, target: Tensor, y: Tensor) -> None:
        """Add pairs at levels t > r >= 0 [N]: answers, targets and clean images [N, C, H, W]. Rows not finite are left out."""
        gap = t - r
        v = (D_t - target) / gap.view(-1, 1, 1, 1)
        rows = torch.stack(
            [(v * (D_t - y)).flatten(1).sum(1), v.square().flatten(1).sum(1), gap, torch.ones_like(gap)], 1
        )
        rows = torch.where(rows.isfinite().all(1, keepdim=True), rows, 0.0).double()
        place = (t.log() - LOW).floor().clamp(0, BINS - 1)
        self.sums += (place == self._bins.view(-1, 1)).double() @ rows

    def total(self, gather: Callable[[Tensor], list[Tensor]]) -> Tensor:
        """Return the sums over all ranks, on the CPU. gather: of ect.ranks.distributed.World."""
        return torch.stack(gather(self.sums.cpu())).sum(0)

    def row(self, gather: Callable[[Tensor], list[Tensor]]) -> dict[str, float]:
        """Return the means since the last call, by the names levels/<middle of the bin>/<field>, and begin anew."""
        total = self.total(gather)
        self.sums.zero_()
        found: dict[str, float] = {}
        for i, sums in enumerate(total.tolist()):
            if sums[-1]:
                level = _means(sums)
                name = f"{PREFIX}{LOW + i + 0.5}/"
                found |= {name + field: value for field, value in level._asdict().items()}
        return found


def means(rows: Iterable[dict[str, float]]) -> dict[float, Level]:
    """Return the means over rows of statistics, each pair counted once, by the middle of the bin of ln t."""
    sums: dict[float, list[float]] = {}
    for row in rows:
        for name, images in row.items():
            if name.startswith(PREFIX) and name.endswith("/images"):
                stem = name.removesuffix("images")
                kept = sums.setdefault(float(stem.removeprefix(PREFIX)[:-1]), [0.0] * len(Level._fields))
                for i, field in enumerate(Level._fields[:-1]):
                    kept[i] += row[stem + field] * images
                kept[-1] += images
    return {middle: _means(kept) for middle, kept in sorted(sums.items())}


def _means(sums: list[float]) -> Level:
    A, B, gap, images = sums
    return Level(A / images, B / images, gap / images, images)
