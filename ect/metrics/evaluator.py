"""The parts that every quality metric has in common: named columns, and figures for one set of generated images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Column:
    """One figure of the table."""

    name: str
    missing: str | None = field(default=None, kw_only=True)
    """The reason why this evaluator cannot compute it, and the remedy; None where it can."""
    rises: bool = field(default=False, kw_only=True)
    """True where it is better the higher it is."""


class Evaluator(ABC):
    """Rates generated images against one reference, whose statistics are computed once."""

    columns: tuple[Column, ...]
    used: dict[str, Any]
    """JSON-able: what the figures rest on (files with their SHA-256, reference, counts)."""

    @abstractmethod
    def evaluate(self, images: Iterable[Tensor]) -> dict[str, float]:
        """Return one figure for each column that is not missing; images come in batches of uint8 [n, H, W, C] on the CPU."""

    @property
    def available(self) -> list[Column]:
        """The columns that `evaluate` fills."""
        return [column for column in self.columns if column.missing is None]

    @property
    def notes(self) -> list[str]:
        """One line for each reason why columns are missing: 'FID, KID, IS: ...'."""
        names: dict[str, list[str]] = {}
        for column in self.columns:
            if column.missing is not None:
                names.setdefault(column.missing, []).append(column.name)
        return [f"{', '.join(columns)}: {reason}" for reason, columns in names.items()]


class Several(Evaluator):
    """Evaluators side by side: the columns of all, in order.

    `used` is the first one's; what the others rest on stands there under their columns' names. Raises ValueError where
    two have a column of the same name.
    """

    def __init__(self, evaluators: Sequence[Evaluator]) -> None:
        self._evaluators = evaluators
        self.columns = tuple(column for evaluator in evaluators for column in evaluator.columns)
        names = [column.name for column in self.columns]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two evaluators have a column named {', '.join(sorted(twice))}; rename one")
        first, *others = evaluators
        self.used = first.used | {", ".join(c.name for c in other.columns): other.used for other in others}

    def evaluate(self, images: Iterable[Tensor]) -> dict[str, float]:
        """Return the figures of all evaluators, of the same images."""
        batches = list(images)
        return {name: figure for each in self._evaluators for name, figure in each.evaluate(batches).items()}
