"""After how many steps torch.compile has paid for its start: what its first steps cost more, by what each step gains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ect.assembly import COMPILE_PAYS_STEPS
from ect.config import Config


def steps(rows: Mapping[str, dict[str, Any]], before: str, after: str) -> dict[str, Any]:
    """Return {"rows", "steps", "why"} of step_time's rows without and with torch.compile.

    steps: None where it never pays, or where a row has no figures, as "why" says.
    """
    plain, compiled = rows.get(before, {}), rows.get(after, {})
    found: dict[str, Any] = {"rows": [before, after], "steps": None, "why": ""}
    for name, row in ((before, plain), (after, compiled)):
        if row.get("ms") is None or row.get("start") is None:
            return {**found, "why": f"not known: no figures of {name!r}"}
    cost, gain = compiled["start"] - plain["start"], (plain["ms"] - compiled["ms"]) / 1e3
    if gain <= 0:
        return {**found, "why": "never, a step gains nothing"}
    why = f"{cost:.1f} s more to start, {1e3 * gain:.2f} ms less a step"
    return {**found, "steps": max(math.ceil(cost / gain), 0), "why": why}


def sentence(found: Mapping[str, Any], cfg: Config) -> str:
    """Return the answer for the terminal, beside the recipe's length and the estimate that the trainer goes by."""
    before, after = found["rows"]
    length = round(cfg.total_kimg * 1000 / cfg.batch)
    answer = found["why"] if found["steps"] is None else f"after {found['steps']:,} steps ({found['why']})"
    return (
        f"{after} pays for its start, against {before}: {answer}. {cfg.preset} at this batch has {length:,} steps; "
        f"on a GPU the trainer compiles from {COMPILE_PAYS_STEPS:,} on, an estimate"
    )
