"""All kinds of readers, by name, and hypothesis at work on one of them."""

from __future__ import annotations

import gc
import importlib
import time
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings

from tests.fuzz.bounded import bounded

READERS = [path.stem for path in sorted(Path(__file__).parent.glob("*.py")) if "INPUTS = " in path.read_text(encoding="utf-8")
           and path.name != Path(__file__).name]  # fmt: skip
"""Modules of this package that have INPUTS, a strategy, and `read`, which writes one of them into a folder and reads it."""
QUIET = dict(database=None, deadline=None, suppress_health_check=list(HealthCheck), verbosity=Verbosity.quiet)


def explore(name: str, folder: Path, examples: int, number: int | None = None) -> int:
    """Read so many spoilt files of one kind, the same each time, or by the seed `number`.

    Returns how many were whole enough to give a value. Raises what a reader got wrong; the file that it read last is in the
    folder.
    """
    module, taken = importlib.import_module(f"tests.fuzz.{name}"), 0

    def read(spoilt: Any) -> None:
        nonlocal taken
        taken += bounded(lambda: module.read(folder, spoilt)) is None

    phases = [Phase.generate]  # shrinking takes minutes; the folder has the file
    run = settings(max_examples=examples, derandomize=number is None, phases=phases, **QUIET)(
        given(module.INPUTS)(read)
    )  # type: ignore[arg-type]
    (run if number is None else seed(number)(run))()
    return taken


def explore_for(name: str, folder: Path, seconds: float, number: int) -> tuple[int, int]:
    """Explore by one seed after another until the time is up; returns how many files were read, and how many gave a value."""
    end, count, taken = time.monotonic() + seconds, 0, 0
    while time.monotonic() < end:
        print(f"{name}: {count:,} files read, next seed {number + count}", flush=True)
        taken += explore(name, folder, BATCH, number + count)
        gc.collect()  # what hypothesis leaves of a seed, of which `bounded` froze each part once
        count += BATCH
    return count, taken


BATCH = 200
"""Files of one seed."""
