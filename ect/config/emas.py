"""The weight averages of a run, and the meaning of an entry of --optim.emas. This module imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

MAX_EMAS = 4
"""The most averages that one pass of the op radam_ema updates (ect_kernels.radam_ema.MAX_EMAS)."""
POWER = "rel:"
"""Before the width of a power profile."""
NARROWEST, WIDEST = 0.001, 0.28
"""The widths that a power profile may have. The plain mean of all weights has 1/sqrt(12), which is .289."""


def sigma_rel_of(entry: str) -> float | None:
    """Return the width of a power profile, such as .05 of "rel:.05"; None of any other entry, nan where it is no number.

    It is the profile's standard deviation over the length of the run so far (Karras et al., 2024, arXiv 2312.02696).
    """
    return _number(entry.removeprefix(POWER)) if entry.startswith(POWER) else None


@cache
def power_exponent(sigma_rel: float) -> float:
    """Return gamma of a profile that weighs the weights after t of T images by t^gamma, with standard deviation sigma_rel T.

    It is the largest root of (g + 2)^2 (g + 3) = (g + 1) / sigma_rel^2. Raises ValueError unless 0 < sigma_rel <= 12^-0.5, at
    which gamma is 0 and the profile the plain mean. Source: as of `sigma_rel_of`.
    """
    if not 0 < sigma_rel <= 12**-0.5:
        raise ValueError(f"sigma_rel is {sigma_rel}, expected a number above 0, up to 12^-0.5")
    b, c = 16 - sigma_rel**-2, 12 - sigma_rel**-2
    gamma, before = 1 / sigma_rel, math.inf
    while gamma < before:  # Newton's steps from above fall to the largest root, which is where the cubic is convex
        before = gamma
        gamma -= (((gamma + 7) * gamma + b) * gamma + c) / ((3 * gamma + 14) * gamma + b)
    return before


def beta_of(entry: str) -> float:
    """Return the decay per step of an entry such as ".9999"; nan where it is no number.

    Of a power profile, whose decay changes with every step, that is the decay of the first one, 0.
    """
    return 0.0 if entry.startswith(POWER) else _number(entry)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def emas_of(ema_beta: float) -> tuple[str, ...]:
    """Return the entry of one average with this decay per step, exactly."""
    return (spelled(str(ema_beta)),)


def spelled(entry: str) -> str:
    """Return one spelling for all that mean the same: .9999 for 0.9999 and 9999e-4, rel:.05 for rel:0.050."""
    power = POWER if entry.startswith(POWER) else ""
    text = str(_number(entry.removeprefix(power)))
    return entry if text == "nan" else power + (text[1:] if text.startswith("0.") else text)


def power_profiles(entries: Sequence[str]) -> list[int]:
    """Return the numbers of the entries that are power profiles."""
    return [i for i, entry in enumerate(entries) if entry.startswith(POWER)]


def are_few(entries: Sequence[str]) -> bool:
    """Say whether these are 1 to 4 averages, none of them named twice, in whatever spelling."""
    return 1 <= len({spelled(entry) for entry in entries}) == len(entries) <= MAX_EMAS


def is_width(sigma_rel: float) -> bool:
    """Say whether a power profile may have this width."""
    return NARROWEST <= sigma_rel <= WIDEST


def have_widths(entries: Sequence[str]) -> bool:
    """Say whether every power profile has a width that it may have."""
    return all(is_width(width) for entry in entries if (width := sigma_rel_of(entry)) is not None)


def are_decays(entries: Sequence[str]) -> bool:
    """Say whether every other entry is a decay: from 0, which is the weights themselves, to below 1, which never moves."""
    return all(0 <= beta_of(entry) < 1 for entry in entries)
