"""A small set of cases in which every two values of different axes meet."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

Case = dict[str, Any]
Axes = Mapping[str, Sequence[Any]]


def product(axes: Axes) -> list[Case]:
    """All cases."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def cover(axes: Axes) -> list[Case]:
    """Cases that show every pair: each begins with a pair not seen yet, and takes along as many others as it can, greedily."""
    left = {
        frozenset(((a, x), (b, y)))
        for (a, xs), (b, ys) in itertools.combinations(axes.items(), 2)
        for x, y in itertools.product(xs, ys)
    }
    order = {axis: {value: k for k, value in enumerate(values)} for axis, values in axes.items()}
    chosen = []
    while left:
        # The first in the order of the axes, so that the cases are the same in every process.
        case = dict(min(left, key=lambda pair: sorted((list(axes).index(a), order[a][x]) for a, x in pair)))
        for axis, values in axes.items():
            if axis not in case:
                case[axis] = max(values, key=lambda v: sum(frozenset(((axis, v), known)) in left for known in case.items()))
        left -= pairs(case)
        chosen.append({axis: case[axis] for axis in axes})
    return chosen


def pairs(case: Case) -> set[frozenset[Any]]:
    return set(map(frozenset, itertools.combinations(case.items(), 2)))


def name(case: Case) -> str:
    """A test's id."""
    return ", ".join(str(axis if value is True else value) for axis, value in case.items() if value not in (None, False))
