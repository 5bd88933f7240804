"""Claims about recorded lines of the ledger, each of which `ledger.py --check` asserts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lib import ledger_lines
from lib.ledger_lines import Line
from lib.paired import Comparison, compare
from lib.recipes import BASE, SETS


@dataclass(frozen=True)
class Claim:
    """A recipe wins or loses against another on a data set.

    by: "quality": the FDc at `nfe` evaluations, of runs that cost the same, is at most `at_most` of the other's
    (geometric mean over seeds). "time": so is the cost at which the recipe first has the other's final FDc (median over seeds).
    at_most below 1 claims a win, and wants every rule of a win (see ledger.py) to hold.
    """

    data: str
    recipe: str
    nfe: int
    at_most: float
    by: Literal["quality", "time"] = "quality"
    than: str = BASE
    length: float = 1.0

    def __str__(self) -> str:
        what = "FDc" if self.by == "quality" else "time to the other's FDc"
        length = "" if self.length == 1 else f", length {self.length:g}"
        where = f"{self.data}{length}, {self.nfe} evaluation{'s' * (self.nfe > 1)}"
        return f"{where}: {self.recipe}'s {what} is at most {self.at_most:g} of {self.than}'s"

    def verdict(self, lines: Sequence[Line]) -> tuple[bool, str]:
        """Return whether it holds of these lines, and what they say."""
        mine = [line for line in lines if line["data"] == self.data]
        if self.by == "time":
            shares = ledger_lines.share_of_time(mine, self.recipe, self.than, self.length, self.nfe)
            if len(shares) < SETS[self.data].seeds:
                return False, f"not recorded: {len(shares)} of {SETS[self.data].seeds} seeds"
            median = statistics.median(shares.values())
            return median <= self.at_most, f"{median:.2f}"
        found = quality(mine, self.recipe, self.than, self.length, self.nfe)
        if found is None or found.seeds < SETS[self.data].seeds:
            return False, f"not recorded: {found.seeds if found else 0} of {SETS[self.data].seeds} seeds"
        return found.ratio <= self.at_most and (found.wins or self.at_most >= 1), str(found)


def quality(lines: Sequence[Line], recipe: str, than: str, length: float, nfe: int) -> Comparison | None:
    """Compare a recipe's runs of a length with another's that cost as much; None where none is recorded."""
    ours = ledger_lines.of(lines, recipe, length)
    sides = (ours, ledger_lines.as_dear(ours, lines, than))
    return compare(*({seed: ledger_lines.figure(line, nfe) for seed, line in side.items()} for side in sides))


CLAIMS: tuple[Claim, ...] = ()
"""A line each, once the lines are recorded that show it."""
