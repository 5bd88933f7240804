"""Is a power law supported? Points of the largest compute are held out of the fits, and predicted by them.

The rule stands here before any figure is seen. Of the places (different computes) of the points, the largest fourth is held
out, one place at least. A power law is supported only if all of this holds:

- there are at least PLACES places;
- the confidence interval of its exponent lies above 0;
- it predicts each held-out point within its band. The bands are so wide that all points lie within them with 95 %;
- no other form predicts them better. A form is better if its error, the root mean square in ln F, is smaller by a hundredth;
- all points together rule out a floor of half of the least figure. Without this, points over too narrow a range, or too uneven
  ones, would support a power law where they cannot tell it from a curve that ends at a floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ect.scaling.laws import LEVEL, POWER_LAW, Array, Form, Mask, PowerLaw, allows, alternatives

PLACES = 5
"""Different computes that a verdict takes."""
_BETTER = 0.99
_FLOOR = 0.5  # of the least figure


@dataclass(frozen=True)
class Verdict:
    """A power law of points, and what is said of it.

    Args: reasons: against it; none: it is supported. held: bool, a point: held out of the fits. law: fitted to the others.
    whole: to all points. forms: all forms, the power law first, fitted without the held-out points; errors: of each at those.
    The four are None or empty where there are too few places.
    """

    compute: Array
    figure: Array
    reasons: tuple[str, ...]
    held: Mask | None = None
    law: PowerLaw | None = None
    whole: PowerLaw | None = None
    forms: tuple[Form, ...] = ()
    errors: tuple[float, ...] = ()

    @property
    def supported(self) -> bool:
        return not self.reasons

    def __str__(self) -> str:
        if self.reasons or self.held is None:
            return f"A power law is not supported: {'; '.join(self.reasons)}."
        count = int(self.held.sum())
        what = f"the {count} held-out points" if count > 1 else "the held-out point"
        return f"A power law is supported: it predicts {what} within its band, and no other form predicts better."


def judge(compute: Sequence[float], figure: Sequence[float]) -> Verdict:
    """Return the verdict on points, of which all numbers are finite and above 0."""
    x, y = np.array(compute, dtype=np.float64), np.array(figure, dtype=np.float64)
    if (places := len(np.unique(x))) < PLACES:
        return Verdict(x, y, (f"too few points: it takes {PLACES} different computes, and these have {places}",))
    held = held_out(x)
    with np.errstate(all="ignore"):  # a fit that tries a steep curve finds infinity, and turns back
        law = PowerLaw.fit(x[~held], y[~held])
        forms = (Form(POWER_LAW, str(law), law), *alternatives(x[~held], y[~held]))
        errors = tuple(form.error(x[held], y[held]) for form in forms)
        reasons = [*_slope(law), *_outside(law, x[held], y[held]), *_better(forms, errors), *_floor(x, y)]
        return Verdict(x, y, tuple(reasons), held, law, PowerLaw.fit(x, y), forms, errors)


def held_out(compute: Array) -> Mask:
    """Return which points are held out, bool: those of the largest fourth of the different computes, of one at least."""
    places = np.unique(compute)
    held: Mask = compute >= places[-max(1, len(places) // 4)]
    return held


def _slope(law: PowerLaw) -> list[str]:
    low, high = law.interval()
    if low > 0:
        return []
    return [f"the exponent may be 0 or of the other sign ({low:.3g} to {high:.3g} with {LEVEL:.0%})"]


def _outside(law: PowerLaw, compute: Array, figure: Array) -> list[str]:
    """Say how many held-out points lie outside of the law's band, and on which side."""
    low, high = law.band(compute, 1 - (1 - LEVEL) / len(compute), of_a_point=True)
    sides = [("above", int((figure > high).sum())), ("below", int((figure < low).sum()))]
    return [
        f"{count} of {len(compute)} held-out points lie{'s' * (count == 1)} {side} its band"
        + (", as where a floor is near" if side == "above" else "")
        for side, count in sides
        if count
    ]


def _better(forms: Sequence[Form], errors: Sequence[float]) -> list[str]:
    better = [(error, form.name) for form, error in zip(forms, errors, strict=True) if error < _BETTER * errors[0]]
    if not better:
        return []
    error, name = min(better)
    return [f"another form, {name}, predicts the held-out points better (error {error:.3g} against {errors[0]:.3g})"]


def _floor(compute: Array, figure: Array) -> list[str]:
    if not allows(compute, figure, _FLOOR * float(figure.min())):
        return []
    return [f"the points allow a floor at {_FLOOR:g} of the least figure: too narrow a range, or too uneven, to tell"]
