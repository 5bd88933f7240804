"""The weight averages of a run, and the meaning of an entry of --optim.emas. This module imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

MAX_EMAS = 3
"""The most averages that one pass of the op radam_ema updates (ect_kernels.radam_ema.MAX_EMAS)."""
POWER = "rel:"


def beta_of(entry: str) -> float:
    """Return the decay per step of an entry such as ".9999"; nan where it is no number."""
    try:
        return float(entry)
    except ValueError:
        return math.nan


def emas_of(ema_beta: float) -> tuple[str, ...]:
    """Return the entry of one average with this decay per step, exactly."""
    return (spelled(str(ema_beta)),)


def spelled(entry: str) -> str:
    """Return one spelling for all that mean the same: .9999 for 0.9999 and 9999e-4."""
    text = str(beta_of(entry))
    return entry if text == "nan" else text[1:] if text.startswith("0.") else text


def are_few(entries: Sequence[str]) -> bool:
    """Say whether these are 1 to 3 averages, none of them named twice, in whatever spelling."""
    return 1 <= len({spelled(entry) for entry in entries}) == len(entries) <= MAX_EMAS


def have_no_power(entries: Sequence[str]) -> bool:
    """Say whether no entry asks for a power-function profile (Karras et al., 2024), which no version has yet."""
    return not any(entry.startswith(POWER) for entry in entries)


def are_decays(entries: Sequence[str]) -> bool:
    """Say whether every entry is a decay per step: from 0, which is the weights themselves, to below 1, which never moves."""
    return all(0 <= beta_of(entry) < 1 for entry in entries)
