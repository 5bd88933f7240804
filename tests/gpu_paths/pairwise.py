"""A small set of cases in which every two values of different axes meet."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]
Axes = Mapping[str, Sequence[Any]]


Rule = Callable[[Case], bool]  # of a case, or of a part of one: whether there is such a thing


def anything(case: Case) -> bool:
    return True


def product(axes: Axes, allowed: Rule = anything) -> list[Case]:
    """All cases."""
    cases = (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
    return [case for case in cases if allowed(case)]


def cover(axes: Axes, allowed: Rule = anything) -> list[Case]:
    """Cases that show every pair: each begins with a pair not seen yet, and takes along as many others as it can, greedily."""
    left = {
        frozenset(((a, x), (b, y)))
        for (a, xs), (b, ys) in itertools.combinations(axes.items(), 2)
        for x, y in itertools.product(xs, ys)
        if allowed({a: x, b: y})
    }
    order = {axis: {value: k for k, value in enumerate(values)} for axis, values in axes.items()}
    chosen = []
    while left:
        # The first in the order of the axes, so that the cases are the same in every process.
        case = dict(min(left, key=lambda pair: sorted((list(axes).index(a), order[a][x]) for a, x in pair)))
        for axis, values in axes.items():
            if axis not in case:
                possible = [value for value in values if allowed(case | {axis: value})]
                case[axis] = max(
                    possible, key=lambda v: sum(frozenset(((axis, v), known)) in left for known in case.items())
                )
        left -= pairs(case)
        chosen.append({axis: case[axis] for axis in axes})
    return chosen


def pairs(case: Case) -> set[frozenset[Any]]:
    return set(map(frozenset, itertools.combinations(case.items(), 2)))


def name(case: Case) -> str:
    """A test's id."""
    return ", ".join(
        str(axis if value is True else value) for axis, value in case.items() if value not in (None, False)
    )
