"""The log of one phase: rows of stats.jsonl, events of history.jsonl, and the numbers of the lines that are damaged."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ect.show.log import HISTORY, STATS

_MAX_LINE = 1 << 20  # bytes; ours have some hundred


@dataclass
class Records:
    """The JSON objects of a file of lines that have a whole `nimg`, and the numbers of the other lines, from 1."""

    there: bool = False
    found: list[dict[str, Any]] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    unreadable: str = ""
    """The reason where the file cannot be read at all."""

    def numbers(self, name: str) -> list[tuple[int, float]]:
        """Return (nimg, value) of each record in which `name` is a finite number."""
        pairs = ((record["nimg"], number(record.get(name))) for record in self.found)
        return [(nimg, value) for nimg, value in pairs if value is not None]

    def last(self, name: str) -> float | None:
        """Return the value of `name` in the last record where it is a finite number."""
        values = self.numbers(name)
        return values[-1][1] if values else None

    def has(self, name: str) -> bool:
        return any(name in record for record in self.found)


@dataclass
class Phase:
    """The records of a phase in its folder."""

    folder: Path
    stats: Records
    history: Records

    @staticmethod
    def read(folder: Path) -> Phase:
        return Phase(folder, read(folder / STATS), read(folder / HISTORY))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of statistics; those of evaluations have no loss."""
        return [row for row in self.stats.found if "loss" in row]

    @property
    def ending(self) -> dict[str, Any] | None:
        """The event that tells how the last start or resume ended, or None.

        Of several ranks each may write one: the end of the training counts first, then a loss, which the others follow from.
        """
        names = [event.get("event") for event in self.history.found]
        begun = max((i for i, name in enumerate(names) if name in ("start", "resume")), default=0)
        after = self.history.found[begun:]
        for name in ("end", "lost"):
            if found := [event for event in after if event.get("event") == name]:
                return found[-1]
        return after[-1] if after and after[-1].get("event") in ("stop", "diverged", "failed") else None

    @property
    def reached(self) -> int:
        """The images seen up to the last record of any kind."""
        return max((record["nimg"] for record in [*self.stats.found, *self.history.found]), default=0)


def read(path: Path) -> Records:
    """Read a file of lines. Nothing in it raises: what is no record of ours is counted as damaged."""
    records = Records(path.is_file())
    try:
        for count, line in enumerate(_lines(path), 1) if records.there else ():
            record = _record(line)
            if record is None:
                records.damaged.append(count)
            else:
                records.found.append(record)
    except OSError as error:
        records.unreadable = error.strerror or str(error)
    return records


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file; of one that is too long, the begin, which is no record."""
    with path.open("rb") as file:
        while line := file.readline(_MAX_LINE):
            whole = line
            while not whole.endswith(b"\n") and (whole := file.readline(_MAX_LINE)):
                pass
            yield line


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    nimg = record.get("nimg") if isinstance(record, dict) else None
    return record if type(nimg) is int and 0 <= nimg < 2**63 else None


def number(value: object) -> float | None:
    """Return a finite number of JSON as a float, None for anything else."""
    try:
        return float(value) if type(value) in (int, float) and math.isfinite(value) else None  # type: ignore[arg-type]
    except OverflowError:
        return None
