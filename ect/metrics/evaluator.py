"""What every quality metric has in common: named columns, and figures for one set of generated images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor


@dataclass(frozen=True)
class Column:
    """One figure of the table."""

    name: str
    better: Literal["lower", "higher"]
    missing: str | None = None
    """Why this evaluator cannot compute it, and the remedy; None where it can."""


class Evaluator(ABC):
    """Rates generated images against one reference, whose statistics are computed once."""

    columns: tuple[Column, ...]
    used: dict[str, Any]
    """JSON-able: what the figures rest on (files with their SHA-256, reference, counts)."""

    @abstractmethod
    def evaluate(self, images: Iterable[Tensor]) -> dict[str, float]:
        """One figure for each column that is not missing; images come in batches of uint8 [n, H, W, C] on the CPU."""

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
