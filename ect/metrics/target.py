"""The target of a run: a figure of the quality table that ends it, and the evaluations that came to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ect.config.target import wanted
from ect.errors import UserError
from ect.metrics.evaluator import Column
from ect.sampler import Sampler


@dataclass(frozen=True)
class Target:
    """A figure of `column`, of samples by `nfe` network evaluations, and the words of --target that ask for it."""

    text: str
    column: str
    figure: float
    nfe: int
    rises: bool = False
    """True where the column is better the higher it is, so that the figure is a least one."""

    @classmethod
    def find(cls, text: str, columns: Sequence[Column], samplers: Sequence[Sampler]) -> Target:
        """Return what --target means, well formed, to a run that is rated in these columns, by these samplers.

        Without a number of evaluations it means the most of them. Raises UserError where there is no such column, its figures
        cannot be computed, or no sampler makes so many evaluations.
        """
        asked = wanted(text)
        assert asked is not None
        named = {column.name.lower(): column for column in columns}
        column = named.get(asked.column.lower())
        if column is None:
            known = ", ".join(column.name for column in columns)
            raise UserError(f"--target {text}: samples of this run are not rated by {asked.column}; choose of {known}")
        if column.missing is not None:
            raise UserError(f"--target {text}: {column.name} cannot be computed here: {column.missing}")
        rated = sorted(sampler.nfe for sampler in samplers)
        if asked.nfe is not None and asked.nfe not in rated:
            known = " or ".join(map(str, rated))
            raise UserError(
                f"--target {text}: samples are made by {known} evaluations, not by {asked.nfe}; give one of those"
            )
        return cls(text, column.name, asked.figure, asked.nfe or rated[-1], column.rises)

    def met(self, figure: float) -> bool:
        """Say whether a figure is as good as the target; NaN is not."""
        return figure >= self.figure if self.rises else figure <= self.figure

    def __str__(self) -> str:
        bound = "at least" if self.rises else "at most"
        return f"{self.column} of {bound} {self.figure:g} by {self.nfe} evaluation{'s' * (self.nfe > 1)}"


@dataclass(frozen=True)
class Crossing:
    """An evaluation that came to a target, and the second one, of other seeds, that confirms it or does not."""

    target: str
    """The words of --target."""
    nimg: int
    seconds: float
    """Wall clock of the phase, all its resumptions together, when the figure was seen first."""
    figure: float
    second_figure: float
    second_seconds: float
    """Wall clock of the phase when the second evaluation was done."""
    confirmed: bool

    def __str__(self) -> str:
        seen = f"{self.target}: {self.figure:.4g} after {self.nimg / 1000:g} kimg and {self.seconds:.0f} s"
        then = (
            "which confirms it: the run ends here" if self.confirmed else "which does not confirm it: the run goes on"
        )
        return f"{seen}; images of other seeds have {self.second_figure:.4g} at {self.second_seconds:.0f} s, {then}"
