"""--search: the combination of a run's weights that samples best at one evaluation count, and how much it gains.

It begins with the best single average, of those that the run made itself and of `profiles.averages`. What CMA-ES finds, and
the point half-way to it, must beat that average on images that the search has not seen: else it stays. The report has both
on a third set of images, at another evaluation count and by all metrics.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ect.config import Config
from ect.files.kept import Kept
from ect.merge import lcsc
from ect.merge.blend import Blend, Coefficients, Part, parts_of
from ect.merge.profiles import averages
from ect.sampler import Sampler
from ect.search.judge import Judge, gains, minutes

MOST = 40
"""Raw weights that are combined: 20 to 50 coefficients are what CMA-ES can find in some hundred ratings."""


def parts(run: Path, cfg: Config, kept: Sequence[Kept]) -> list[Part]:
    """Return what a search combines: the run's own averages, then its raw weights, of many of them MOST, evenly."""
    few = [kept[round(i)] for i in np.linspace(0, len(kept) - 1, min(len(kept), MOST))]
    return [Part(f"EMA {entry}", run, i) for i, entry in enumerate(cfg.optim.emas)] + parts_of(few)


def single(blend: Blend) -> dict[str, Coefficients]:
    """Return the averages among the combinations, by name."""
    count, own = len(blend.parts), sum(part.ema is not None for part in blend.parts)
    made = {part.name: np.eye(count)[i] for i, part in enumerate(blend.parts[:own])}
    return made | {name: np.concatenate([np.zeros(own), c]) for name, c in averages(count - own).items()}


def search(
    blend: Blend, judge: Judge, samplers: Sequence[Sampler], ratings: int, seed: int, console: Console
) -> tuple[Coefficients, dict[str, Any]]:
    """Return the coefficients that were found, and what is to be told of them; print the report.

    Args: samplers: the one that is searched for, then those of the report beside it. ratings: of combinations, about; those
    of the averages and the finals come on top. seed: of the search's steps.
    """
    began, sampler = time.monotonic(), samplers[0]

    def rate(coefficients: Coefficients, finals: bool = False) -> float:
        blend.load(coefficients)
        return judge.rate(blend.net, sampler, finals=finals)

    known = single(blend)
    rated = {name: rate(c) for name, c in known.items()}
    best = min(rated, key=lambda name: rated[name])
    start = known[best]
    mean, met = lcsc.search(rate, start, ratings, seed)
    finals = [start, mean, met, (start + mean) / 2]
    figures = [rate(c, finals=True) for c in finals]
    found = finals[int(np.argmin(figures))]
    seconds = time.monotonic() - began
    console.print(minutes(seconds, judge.ratings, judge.samples), highlight=False)
    report = []
    for name, coefficients in ((f"best single average ({best})", start), ("found by the search", found)):
        blend.load(coefficients)
        report.append((name, judge.report(blend.net, samplers)))
    console.print(judge.table(report, "On images that no search has seen"))
    for before, after in zip(report[0][1], report[1][1], strict=True):
        gains(before, after, console)
    if found is start:
        console.print(
            "the search found nothing better than that average, which is what the file holds", highlight=False
        )
    return found, {
        "way": "search", "metric": judge.metric, "sampler": str(sampler), "samples": judge.samples, "seed": seed,
        "ratings": judge.ratings, "minutes": round(seconds / 60, 2), "best_single": best, "single": rated,
        "finals": {"best single": figures[0], "found": min(figures)},
        "report": {name: [row.as_json() for row in rows] for name, rows in report},
    }  # fmt: skip
