"""The words of --target: a figure of quality at which a run may end."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

MAX_FIGURE = 10**6
EXPECTED = (
    f"COLUMN=FIGURE or COLUMN@EVALUATIONS=FIGURE, such as fid=2.73 or fid@1=4.5, a figure from 0 to {MAX_FIGURE:,}"
)
_FORM = re.compile(r"(?P<column>[^=@]*[^=@\s])(@(?P<nfe>[1-9][0-9]{0,5}))?=(?P<figure>[0-9.eE+-]+)")


@dataclass(frozen=True)
class Wanted:
    """A column of the quality table, in any case of letters, and its figure by so many network evaluations (None: not said)."""

    column: str
    figure: float
    nfe: int | None


def wanted(text: str) -> Wanted | None:
    """Return what --target means; None where it is not of the form, or the figure is no number that can be reached."""
    found = _FORM.fullmatch(text)
    if found is None:
        return None
    try:
        figure = float(found["figure"])
    except ValueError:
        return None
    if not (math.isfinite(figure) and 0 <= figure <= MAX_FIGURE):
        return None
    return Wanted(found["column"], figure, int(found["nfe"]) if found["nfe"] else None)
