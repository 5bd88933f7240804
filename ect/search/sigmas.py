"""The noise levels of a consistency sampler, searched for: level by level, on a grid, then by the golden section.

The first level is the noise itself, SIGMA_MAX, and stays. A search goes in ln sigma, since that is the scale on which
noise levels act (EDM: Karras et al., 2022). Levels have three digits, so that a command line has what was rated.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console

from ect.config import IMAGES, SIGMA_MAX, SOME, at_most, refuse_beyond
from ect.errors import UserError
from ect.files.checkpoint import load_model
from ect.models import EDMPrecond
from ect.ranks import self_check
from ect.ranks.distributed import World
from ect.sampler import SIGMA_MIN, Consistency, levels_after_first
from ect.search.judge import Judge, data_of, gains, judge, minutes
from ect.show.log import Screen

GRID = 7
"""Levels that are tried first, evenly between two neighbours in ln sigma."""
SECTIONS = 5
"""Golden sections after that: each leaves .62 of an interval, all of them a tenth."""
SWEEPS = 3
"""Times at most that all levels have their turn."""
ENOUGH = 0.002
"""A sweep that gains less than this part is the last."""
MOST = 10
"""The largest number of network evaluations that levels are searched for."""
_WIDTH = 120  # columns of a table
_GOLDEN = (math.sqrt(5) - 1) / 2

Levels = tuple[float, ...]


def find(
    model: Path, ema: int | None, numbers: Sequence[int], *, data: str | None, samples: int, batch: int,
    device: torch.device, world: World,
) -> None:  # fmt: skip
    """Print the best levels of a model for each number of network evaluations, as commands, and what they gain.

    Args: model, ema: as for `load_model`. numbers: increasing. data: None: that of the run that the model lies in. samples,
    batch: images of a rating, and of a forward pass. Raises UserError on numbers that are impossible, and as `load_model` and
    `data_of`.
    """
    refuse_beyond({"nfe": (max(numbers), at_most(MOST)), "samples": (samples, SOME, IMAGES)})
    if numbers[0] < 2:
        raise UserError(f"--nfe {numbers[0]}: a search is for levels after the first; expected numbers from 2 on")
    path = model.expanduser()
    net, info = load_model(path, device=device, ema=ema)
    for line in self_check.of_sampling(net, device, world):
        print(line)
    images, folder = data_of(net, info, path, data)
    rater = judge(images, folder, None, samples, batch, device, world)
    own = levels_after_first(None, info)
    which = shlex.quote(str(model)) + ("" if ema is None else f" --ema {ema}")
    for levels in best(net, rater, own, numbers, Screen(width=_WIDTH)):
        print(f"python -m ect.sample {which} --mid-t {_shown(levels)}")


def best(net: EDMPrecond, judge: Judge, own: Levels, numbers: Sequence[int], console: Console) -> list[Levels]:
    """Return the levels after the first one for each number of network evaluations, and print what they gain.

    Args: own: the levels with which the model is sampled. numbers: from 2 on, increasing. Levels that lose to those that their
    search began with, on images that it has not seen, give way to them.
    """
    found: list[Levels] = []
    began, report = time.monotonic(), list[Levels]()
    for nfe in numbers:
        start = own[: nfe - 1] if len(own) >= nfe - 1 or not found else found[-1]
        while len(start) < nfe - 1:
            start = one_more(start)
        ends = (_rounded(start), search(lambda levels: judge.rate(net, _sampler(levels)), start))
        found.append(min(ends, key=lambda levels: judge.rate(net, _sampler(levels), finals=True)))
        report += [start, found[-1]]
    console.print(minutes(time.monotonic() - began, judge.ratings, judge.samples), highlight=False)
    rows = [judge.report(net, [_sampler(levels)]) for levels in report]
    console.print(judge.table(list(zip(map(_shown, report), rows, strict=True)), "On images that no search has seen"))
    for (before,), (after,) in zip(rows[::2], rows[1::2], strict=True):
        gains(before, after, console)
    return found


def _shown(levels: Levels) -> str:
    return " ".join(f"{sigma:g}" for sigma in levels)


def _sampler(levels: Levels) -> Consistency:
    return Consistency((SIGMA_MAX, *levels))


def search(rate: Callable[[Levels], float], start: Levels) -> Levels:
    """Return the levels, decreasing, with the least figure that was met; never a greater one than that of `start`.

    Args: rate: what is to be small, of levels after the first one; it is asked once for each choice.
    """
    met: dict[Levels, float] = {}

    def figure(levels: Levels) -> float:
        if levels not in met:
            met[levels] = rate(levels)
        return met[levels]

    best = _rounded(start)
    for _ in range(SWEEPS):
        before = figure(best)
        for i in range(len(best)):
            best = _along(figure, best, i)
        if before - figure(best) <= ENOUGH * abs(before):
            break
    return min(met, key=lambda levels: met[levels])


def _along(figure: Callable[[Levels], float], levels: Levels, i: int) -> Levels:
    """Return the levels with the i-th one, which stays between its neighbours, at the best place found for it."""
    ends = (SIGMA_MAX, *levels, min(SIGMA_MIN, levels[-1] / 2))
    high, low = math.log(ends[i]), math.log(ends[i + 2])

    def at(x: float) -> Levels:
        return _rounded((*levels[:i], math.exp(x), *levels[i + 1 :]))

    def value(x: float) -> float:
        return figure(at(x)) if _fall(at(x)) else math.inf

    step = (high - low) / (GRID + 1)
    places = sorted([low + step * k for k in range(1, GRID + 1)] + [math.log(levels[i])])
    best = min(places, key=value)
    place = places.index(best)
    low, high = (places[place - 1] if place else low), (places[place + 1] if best != places[-1] else high)
    inner, outer = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    for _ in range(SECTIONS):
        if value(inner) <= value(outer):
            high, outer, inner = outer, inner, outer - _GOLDEN * (outer - low)
        else:
            low, inner, outer = inner, outer, inner + _GOLDEN * (high - inner)
    return at(min((best, inner, outer), key=value))


def one_more(levels: Levels) -> Levels:
    """Return the levels with another one below, at about a third of the last, to begin a search with."""
    last = levels[-1] if levels else SIGMA_MAX
    return _rounded((*levels, max(last / 3, math.sqrt(last * SIGMA_MIN))))


def _rounded(levels: Levels) -> Levels:
    return tuple(float(f"{sigma:.3g}") for sigma in levels)


def _fall(levels: Levels) -> bool:
    return all(a > b > 0 for a, b in pairwise((SIGMA_MAX, *levels)))
