"""--posthoc: the average of any width, after the training, of the power-profile averages that a run kept.

An average by a power profile weighs the weights after t of T images by (gamma + 1) / T (t / T)^gamma. Of the combinations of
stored averages that one is taken whose profile is nearest to the wanted one, by least squares over t.
Source: Karras et al., 2024 (EDM2, arXiv 2312.02696), section 3.2 and its appendix.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ect.config.emas import power_exponent

Vector = NDArray[np.float64]


def posthoc_coefficients(
    in_nimg: ArrayLike, in_sigma_rel: ArrayLike, out_nimg: ArrayLike, out_sigma_rel: ArrayLike
) -> Vector:
    """Return the coefficients of stored averages in that of another width: fp64 [N], one for each, in order; they sum to 1.

    Args: in_nimg, in_sigma_rel: images seen and relative width of each stored average, [N]: lists, arrays, or tensors on the
    CPU. out_nimg, out_sigma_rel: the same of the wanted one, single numbers. Raises ValueError where shapes do not fit,
    there is no average, nimg is not above 0, or a width is none (`power_exponent`).
    """
    t, gamma = _profiles(in_nimg, in_sigma_rel)
    wanted = _profiles(out_nimg, out_sigma_rel)
    if len(wanted[0]) != 1:
        raise ValueError(f"{len(wanted[0])} averages are wanted; expected one")
    # Of unit profiles, so that early ones, which are high and short, do not spoil the condition; of two alike each gets half.
    norms = np.sqrt(np.diagonal(overlaps(t, gamma, t, gamma)))
    unit = overlaps(t, gamma, t, gamma) / np.outer(norms, norms)
    solved: Vector = np.linalg.lstsq(unit, overlaps(t, gamma, *wanted)[:, 0] / norms, rcond=None)[0] / norms
    return solved / solved.sum()


def distance(
    coefficients: Vector, in_nimg: ArrayLike, in_sigma_rel: ArrayLike, out_nimg: float, out_sigma_rel: float
) -> float:
    """Return how far the combination's profile is from the wanted one: the L2 norm of their difference over the latter's."""
    (t, gamma), wanted = _profiles(in_nimg, in_sigma_rel), _profiles(out_nimg, out_sigma_rel)
    own, (cross,), ((norm,),) = overlaps(t, gamma, t, gamma), overlaps(*wanted, t, gamma), overlaps(*wanted, *wanted)
    square = coefficients @ own @ coefficients - 2 * coefficients @ cross + norm
    return float(np.sqrt(max(square, 0.0) / norm))


def overlaps(t_a: Vector, gamma_a: Vector, t_b: Vector, gamma_b: Vector) -> Vector:
    """Return the inner products of the profiles of lengths t_a, t_b and exponents gamma_a, gamma_b: [A] and [B] give [A, B]."""
    t_a, gamma_a = t_a[:, None], gamma_a[:, None]
    ratio = (t_a / t_b) ** np.where(t_a < t_b, gamma_b, -gamma_a)
    product: Vector = (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))
    return product


def _profiles(nimg: Any, sigma_rel: Any) -> tuple[Vector, Vector]:
    """Return lengths in images and exponents, both [N]."""
    t, width = (np.atleast_1d(np.asarray(values, dtype=np.float64)) for values in (nimg, sigma_rel))
    if t.ndim != 1 or t.shape != width.shape or t.size == 0:
        raise ValueError(f"nimg {t.shape} and sigma_rel {width.shape}: expected one number each for every average")
    if not (t > 0).all():
        raise ValueError(f"nimg is {t.min():g}, expected images seen, above 0")
    return t, np.array([power_exponent(float(one)) for one in width])
