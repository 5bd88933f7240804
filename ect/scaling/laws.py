"""Forms that a figure F may have as a function of the compute C, each fitted to points by least squares in ln F.

    power law              F = a C^-b
    constant               F = a
    logarithm              F = a - b ln C
    exponential            F = a e^(-b C)
    power law with floor   F = a C^-b + c

Errors in ln F are relative errors of F, and so all forms are measured by one scale. Residuals are taken as independent, normal
and of one variance; seeds are replicates. The power law is a straight line in ln C and ln F, and so its confidence intervals
are those of linear regression, by Student's t (Draper & Smith, Applied Regression Analysis, chapter 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ect.errors import UserError

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
LEVEL = 0.95
"""Confidence of intervals and bands."""
POWER_LAW = "power law"
_STEEPEST = 20.0  # of an exponent that is looked for
_PATIENCE = 60  # evaluations of a fit: where there is no curve to find, it would look for long
_FLOORS = (0.0, 0.6)  # parts of the least figure: the floors from which a fit begins


def library() -> Any:
    """Return scipy, with the parts that are used here. Raises UserError where it is not installed."""
    try:
        import scipy.optimize
        import scipy.stats
    except ImportError as error:
        raise UserError(
            "python -m ect.scaling: scipy, which fits the laws, is not installed; pip install "
            "'easy-consistency-tuning[scaling]'"
        ) from error
    return scipy


@dataclass(frozen=True)
class PowerLaw:
    """The fit F = a C^-b, a straight line in logarithms.

    Args: middle: the mean of ln C of the points. level: ln F there. exponent: b. residual: standard deviation of ln F about
    the line. count: points, at least 3. width: sum of squares of ln C about the middle.
    """

    middle: float
    level: float
    exponent: float
    residual: float
    count: int
    width: float

    @classmethod
    def fit(cls, compute: Array, figure: Array) -> PowerLaw:
        """Fit points, at least 3 at 2 places, of which both numbers are above 0."""
        x, y = np.log(compute), np.log(figure)
        middle, level = float(x.mean()), float(y.mean())
        width = float(((x - middle) ** 2).sum())
        exponent = -float(((x - middle) * y).sum()) / width
        rest = y - level + exponent * (x - middle)
        residual = float(np.sqrt((rest**2).sum() / (len(x) - 2)))
        return cls(middle, level, exponent, residual, len(x), width)

    @property
    def factor(self) -> float:
        """The factor a."""
        return float(np.exp(self.level + self.exponent * self.middle))

    def __call__(self, compute: Array) -> Array:
        """Return the figures at these computes."""
        return np.exp(self.level - self.exponent * (np.log(compute) - self.middle))

    def __str__(self) -> str:
        return f"{self.factor:.4g} C^{-self.exponent:.4g}"

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Return the confidence interval of the exponent."""
        reach = self._quantile(level) * self.residual / self.width**0.5
        return self.exponent - reach, self.exponent + reach

    def band(self, compute: Array, level: float = LEVEL, of_a_point: bool = False) -> tuple[Array, Array]:
        """Return lower and upper ends of the confidence band of the curve at these computes.

        of_a_point: the band of one more point there, which has a residual of its own.
        """
        x = np.log(compute) - self.middle
        spread = np.sqrt(float(of_a_point) + 1 / self.count + x**2 / self.width)
        reach = self._quantile(level) * self.residual * spread
        return self(compute) * np.exp(-reach), self(compute) * np.exp(reach)

    def _quantile(self, level: float) -> float:
        return float(library().stats.t.ppf((1 + level) / 2, self.count - 2))


@dataclass(frozen=True)
class Form:
    """A fitted form: its name, its formula with numbers, and its figures at computes; one may be below 0 beyond the points."""

    name: str
    formula: str
    curve: Callable[[Array], Array]

    def error(self, compute: Array, figure: Array) -> float:
        """Return the root mean square of ln F - ln of the form at points; infinite where the form is not above 0."""
        there = self.curve(compute)
        if not (there > 0).all():
            return float("inf")
        return float(np.sqrt(np.mean((np.log(figure) - np.log(there)) ** 2)))


def alternatives(compute: Array, figure: Array) -> list[Form]:
    """Fit all forms but the power law to points, of which all numbers are above 0."""
    return [
        _constant(figure), _logarithm(compute, figure), _exponential(compute, figure), with_floor(compute, figure)
    ]  # fmt: skip


def _constant(figure: Array) -> Form:
    value = float(np.exp(np.log(figure).mean()))
    return Form("constant", f"{value:.4g}", lambda compute: np.full(np.shape(compute), value))


def _exponential(compute: Array, figure: Array) -> Form:
    """Fit a line to ln F over C."""
    middle, level = float(compute.mean()), float(np.log(figure).mean())
    rate = -float(((compute - middle) * np.log(figure)).sum()) / float(((compute - middle) ** 2).sum())
    factor = float(np.exp(level + rate * middle))
    return Form(
        "exponential",
        f"{factor:.4g} exp({-rate:.4g} C)",
        lambda compute: np.exp(level - rate * (compute - middle)),
    )


def _logarithm(compute: Array, figure: Array) -> Form:
    """Fit the logarithms of its values at both ends, which keeps it above 0 between them."""
    low, high = float(np.log(compute.min())), float(np.log(compute.max()))

    def curve(ends: Array, compute: Array) -> Array:
        share = (np.log(compute) - low) / (high - low)
        return np.exp(ends[0]) * (1 - share) + np.exp(ends[1]) * share

    line = PowerLaw.fit(compute, figure)
    start = np.log(line(np.exp(np.array([low, high]))))
    found = library().optimize.least_squares(lambda ends: np.log(curve(ends, compute) / figure), start, method="lm")
    ends = found.x
    slope = float(np.exp(ends[0]) - np.exp(ends[1])) / (high - low)
    return Form(
        "logarithm",
        f"{float(np.exp(ends[0])) + slope * low:.4g} - {slope:.4g} ln C",
        lambda compute: curve(ends, compute),
    )


def with_floor(compute: Array, figure: Array, floor: float | None = None) -> Form:
    """Fit a C^-b + c with b and c of at least 0, from several floors c on, and keep the best; floor: c, where it is given."""
    middle, least = float(np.log(compute).mean()), float(figure.min())
    x, y = np.log(compute) - middle, np.log(figure)
    low, high = (0.0, least) if floor is None else (floor * (1 - 1e-9), floor * (1 + 1e-9))

    def curve(parameters: Array, x: Array) -> Array:
        return np.exp(parameters[0] - parameters[1] * x) + parameters[2]

    def slopes(parameters: Array) -> Array:
        rest, all_of_it = np.exp(parameters[0] - parameters[1] * x), curve(parameters, x)
        return np.stack([rest, -x * rest, np.ones_like(x)], axis=1) / all_of_it[:, None]

    fits = []
    for start in [share * least for share in _FLOORS] if floor is None else [floor]:
        line = PowerLaw.fit(compute, figure - start)
        begin = [line.level, min(max(line.exponent, 1e-6), _STEEPEST / 2), start]
        fits.append(
            library().optimize.least_squares(
                lambda parameters: np.log(curve(parameters, x)) - y, begin, jac=slopes, x_scale=[1, 1, least],
                bounds=([-np.inf, 0, low], [np.inf, _STEEPEST, high]), max_nfev=_PATIENCE,
            )
        )  # fmt: skip
    level, exponent, found = min(fits, key=lambda fit: float(fit.cost)).x
    factor = float(np.exp(level + exponent * middle))
    return Form(
        "power law with floor",
        f"{factor:.4g} C^{-exponent:.4g} + {found:.4g}",
        lambda compute: curve(np.array([level, exponent, found]), np.log(compute) - middle),
    )


def allows(compute: Array, figure: Array, floor: float) -> bool:
    """Say whether the points allow a power law with this floor: an F test at 5 %, one-sided, against the best floor.

    Points at 3 places at least, and 4 of them.
    """
    best, there = (with_floor(compute, figure, c).error(compute, figure) ** 2 for c in (None, floor))
    freedom = len(compute) - 3
    limit = float(library().stats.f.ppf(2 * LEVEL - 1, 1, freedom))
    return (there - best) * freedom <= limit * best
