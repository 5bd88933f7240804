"""The curves of a phase: loss and quality over images and minutes, from its rows, and curves.csv."""

from __future__ import annotations

import contextlib
import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ect.files.atomic import atomic
from ect.show.log import STATS

CURVES = "curves.csv"


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of stats.jsonl; a damaged line is passed over. Raises OSError where they cannot be read."""
    found: list[dict[str, Any]] = []
    for line in (run_dir / STATS).read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            found += [row] * isinstance(row, dict)
    return found


@dataclass
class Curves:
    """Figures of a phase by the images seen."""

    minutes: dict[int, float] = field(default_factory=dict)
    """Wall clock of the phase, over all its resumptions; of rows that earlier versions wrote there is none."""
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    """The loss first, then the figures of evaluations by their names in stats.jsonl, such as nfe2/FDc."""

    @classmethod
    def read(cls, run_dir: Path) -> Curves:
        """Read the rows of a run folder. Raises OSError where they cannot be read."""
        curves = cls(values={"loss": {}})
        for row in rows(run_dir):
            nimg, seconds = row.get("nimg"), row.get("seconds")
            if type(nimg) is not int:
                continue
            for name, value in row.items():
                if (name == "loss" or is_quality(name)) and isinstance(value, float | int):
                    curves.add(nimg, name, value, seconds)
        return curves

    def add(self, nimg: int, name: str, value: float, seconds: float | None) -> None:
        """Add a figure unless it is not finite, and the seconds of the phase where known."""
        if not math.isfinite(value):
            return
        self.values.setdefault(name, {})[nimg] = float(value)
        if isinstance(seconds, float | int):
            self.minutes[nimg] = seconds / 60

    def over_kimg(self, name: str) -> list[tuple[float, float]]:
        """Return the points (kimg, value) of a curve."""
        return [(nimg / 1000, value) for nimg, value in sorted(self.values.get(name, {}).items())]

    def over_minutes(self, name: str) -> list[tuple[float, float]]:
        """Return the points (minutes, value) of a curve, as far as their minutes are known."""
        found = sorted(self.values.get(name, {}).items())
        return [(self.minutes[nimg], value) for nimg, value in found if nimg in self.minutes]

    def write(self, run_dir: Path) -> None:
        """Write curves.csv, atomically: nimg, minutes, loss and every figure, a line for each number of images."""
        every = sorted({nimg for curve in self.values.values() for nimg in curve})
        with atomic(run_dir / CURVES) as temp, temp.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["nimg", "minutes", *self.values])
            for nimg in every:
                minutes = f"{self.minutes[nimg]:.4f}" if nimg in self.minutes else ""
                table.writerow([nimg, minutes, *(curve.get(nimg, "") for curve in self.values.values())])


def is_quality(name: str) -> bool:
    """Say whether a row's value of this name is a figure of an evaluation, by the first seeds or the second."""
    return "/" in name and not name.startswith("levels/")
