"""The wall clock of a phase of training, and where it went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PARTS = ("start", "training", "evaluation", "checkpoints", "grids")


class Clock:
    """Counts seconds from its making on, over all resumptions of a phase; what no other part takes is training.

    The start is all that comes before the first step: network, teacher, self-check. What a kill cost is not counted.
    """

    def __init__(self) -> None:
        self._before, self._since = 0.0, time.monotonic()
        self._parts = dict.fromkeys(PARTS, 0.0)
        self._open: tuple[str, float] | None = None

    @property
    def seconds(self) -> float:
        """Seconds of the phase so far."""
        return self._before + time.monotonic() - self._since

    def split(self) -> dict[str, float]:
        """Return the seconds of each of PARTS so far, which add up to those of the phase."""
        now, parts = time.monotonic(), dict(self._parts)
        if self._open is not None:
            part, begun = self._open
            parts[part] += now - begun
        total = self._before + now - self._since
        return parts | {"training": max(total - sum(parts.values()), 0.0)}

    def go_on(self, meta: dict[str, Any]) -> None:
        """Add what the phase took before, by the meta of a checkpoint; earlier versions wrote no split."""
        self._before = meta["seconds"]
        for part, seconds in meta.get("split", {}).items():
            self._parts[part] += seconds if part != "training" else 0.0

    def started(self) -> None:
        """Count all since the making of this clock as the start."""
        self._parts["start"] += time.monotonic() - self._since

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Count the block as one of PARTS. Blocks do not nest."""
        self._open = part, time.monotonic()
        try:
            yield
        finally:
            self._parts[part] += time.monotonic() - self._open[1]
            self._open = None
