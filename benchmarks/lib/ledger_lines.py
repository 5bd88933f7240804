"""Lines of benchmarks/results/ledger.jsonl, one a (data set, recipe, length, seed), and the questions asked of them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from lib.recipes import RECIPES, SETS, TEACHER, options_of

RESULTS = Path(__file__).parents[1] / "results" / "ledger.jsonl"
SAME_COST = 1.1
"""A run costs as much as another up to this share of its cost: so far the paces of two runs may differ by chance."""
Line: TypeAlias = "dict[str, Any]"
Key: TypeAlias = "tuple[str, str, float, int]"


def key(line: Line) -> Key:
    return line["data"], line["recipe"], line["length"], line["seed"]


def read(path: Path) -> dict[Key, Line]:
    """Return the latest line of each key whose options are those that its recipe has today.

    A line that a kill tore is passed by, and so is one of a recipe that is no more.
    """
    found: dict[Key, Line] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        known = line["data"] in SETS and line["recipe"] in RECIPES
        if known and line["options"] == options_of(line["data"], line["recipe"]):
            found[key(line)] = line
    return found


def append(path: Path, line: Line) -> None:
    """Append a line in one go, so that two commands may write at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.is_file() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + json.dumps(line) + "\n")


def of(lines: Iterable[Line], recipe: str, length: float) -> dict[int, Line]:
    """Return the lines of a recipe and length, by seed."""
    return {line["seed"]: line for line in lines if (line["recipe"], line["length"]) == (recipe, length)}


def figure(line: Line, nfe: int, name: str = "FDc") -> float:
    """Return a line's figure at the end of its run."""
    value: float = line["curve"][-1][2][f"nfe{nfe}/{name}"]
    return value


def quiet_pace(lines: Iterable[Line]) -> float:
    """Return the quickest pace of these lines, which are of one data set and machine: that of the machine at rest."""
    return min(line["pace"] for line in lines if line["recipe"] != TEACHER)


def seconds(line: Line, quiet: float, spent: float | None = None) -> float:
    """Return what a line cost (or `spent` of it), as its machine at rest would have taken.

    Other work slows a core down, the forward pass that gives the pace like the steps: their quotient is what counts.
    """
    return (line["seconds"] if spent is None else spent) * quiet / line["pace"]


def reached(line: Line, target: float, nfe: int) -> float | None:
    """Return the seconds, as recorded, after which the FDc was first at most `target`; None if it never was.

    A later rise does not undo it. The resolution is the interval of evaluations: nothing is interpolated.
    """
    times = (spent for _, spent, values in line["curve"] if values[f"nfe{nfe}/FDc"] <= target)
    return next(times, None)


def passes(line: Line) -> float:
    """Return what a line cost, in forward passes of its network at the pace of its machine."""
    return float(line["seconds"] / line["pace"])


def as_dear(ours: dict[int, Line], lines: Sequence[Line], base: str) -> dict[int, Line]:
    """Return the lines of the base recipe's shortest length that costs as much as `ours`, by seed; none where no length does.

    As much is within SAME_COST, in the median over the seeds that both have.
    """
    for length in sorted({line["length"] for line in lines if line["recipe"] == base}):
        theirs = of(lines, base, length)
        shares = [passes(ours[seed]) / passes(theirs[seed]) for seed in ours.keys() & theirs.keys()]
        if shares and statistics.median(shares) <= SAME_COST:
            return theirs
    return {}


def share_of_time(lines: Sequence[Line], recipe: str, base: str, length: float, nfe: int) -> dict[int, float]:
    """Return, by seed, the share of the base recipe's cost at which a recipe first has the base's final FDc, or inf."""
    found = {}
    bases = of(lines, base, 1.0)
    for seed, line in of(lines, recipe, length).items():
        if seed in bases:
            spent = reached(line, figure(bases[seed], nfe), nfe)
            found[seed] = math.inf if spent is None else spent / line["pace"] / passes(bases[seed])
    return found


def mean_and_spread(values: Sequence[float]) -> str:
    """Return the mean of figures of several seeds, and their standard deviation where there are several."""
    spread = f" +- {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3g}{spread}"
