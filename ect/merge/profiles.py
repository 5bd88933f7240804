"""Averages of the weights that a run kept, as coefficients, the earliest first: what a single average can be."""

from __future__ import annotations

import numpy as np

from ect.merge.blend import Coefficients

GAMMAS = (0.5, 0.8, 0.9, 0.95, 0.97, 0.99)
"""The decays, from one kept file to the one before, of the exponential averages."""


def uniform(count: int, last: int | None = None) -> Coefficients:
    """Return the coefficients of the plain mean of the last of `count` files; None: of all."""
    last = count if last is None else last
    return np.where(np.arange(count) >= count - last, 1 / last, 0.0)


def exponential(count: int, gamma: float) -> Coefficients:
    """Return the coefficients of an exponential average: each file counts gamma times as much as the next one."""
    falling = gamma ** np.arange(count - 1.0, -1.0, -1.0)
    return falling / falling.sum()


def averages(count: int) -> dict[str, Coefficients]:
    """Return by name the averages that a search begins with: means of the last 1, 2, 4, ... files, and exponential ones."""
    lasts = sorted({min(2**k, count) for k in range(count.bit_length() + 1)})
    means = {f"mean of the last {last}" if last > 1 else "the last weights": uniform(count, last) for last in lasts}
    return means | {f"exponential, {gamma:g} a file": exponential(count, gamma) for gamma in GAMMAS}
