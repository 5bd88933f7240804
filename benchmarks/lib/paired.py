"""Two recipes compared over the seeds that both have: ratios of paired figures, their interval, and a sign test."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """Ratios a / b of positive figures, one a seed; below 1, a is the better.

    ratio: their geometric mean. low, high: its 95 % interval by Student's t of their logarithms; (0, inf) of a single seed.
    better: seeds whose ratio is below 1. p: of the two-sided sign test; equal figures count for neither.
    """

    seeds: int
    ratio: float
    low: float
    high: float
    better: int
    p: float

    @property
    def wins(self) -> bool:
        """True where the whole interval lies below 1."""
        return self.high < 1

    def __str__(self) -> str:
        if self.seeds == 1:
            return f"{self.ratio:.2f}, {self.better}/1"
        return f"{self.ratio:.2f} ({self.low:.2f}-{self.high:.2f}), {self.better}/{self.seeds}, p {self.p:.2g}"


def compare(a: Mapping[int, float], b: Mapping[int, float]) -> Comparison | None:
    """Compare the figures of two recipes by seed; None where they have no seed in common."""
    ratios = [a[seed] / b[seed] for seed in sorted(a.keys() & b.keys())]
    if not ratios:
        return None
    logs = [math.log(ratio) for ratio in ratios]
    count, mean, half = len(logs), statistics.fmean(logs), math.inf
    if count > 1 and math.isfinite(mean):
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * statistics.stdev(logs) / math.sqrt(count)
    better, worse = sum(log < 0 for log in logs), sum(log > 0 for log in logs)
    p = float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
    low, high = (_exp(mean - half), _exp(mean + half)) if math.isfinite(half) else (0.0, math.inf)
    return Comparison(count, _exp(mean), low, high, better, p)


def _exp(x: float) -> float:
    """Return e^x, inf where that is beyond a float."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
