"""The Frechet distance between two sets of feature vectors, in float64.

    d^2 = |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))          (Dowson & Landau, 1982; FID: Heusel et al., 2017)

With S = R R^T the last trace is the sum of the singular values of R1^T R2. They keep full precision where the square
roots of the eigenvalues of S1 S2 lose half the digits, so identical sets give 0 to rounding, also with fewer samples than
features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Statistics:
    """Mean and scatter of `count` feature vectors; two of them merge exactly, so that a set may come in chunks."""

    count: int
    mean: Array
    """[D]"""
    scatter: Array
    """[D, D]: the sum of (x - mean)(x - mean)^T."""

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> Statistics:
        """Return the statistics of `features` [N, D], N >= 1. Raises ValueError for another shape or values not finite."""
        if features.ndim != 2 or len(features) == 0:
            raise ValueError(f"features must be [N, D] with N >= 1, found shape {features.shape}")
        x = features.astype(np.float64)
        if not np.isfinite(x).all():
            raise ValueError("features hold NaN or infinite values")
        mean = x.mean(axis=0)
        x -= mean
        return cls(len(x), mean, x.T @ x)

    def merge(self, other: Statistics) -> Statistics:
        """Return the statistics of the union of both sets (Chan et al., 1979: no cancellation)."""
        count = self.count + other.count
        gap = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(gap, gap) * (self.count * other.count / count)
        return Statistics(count, self.mean + gap * (other.count / count), scatter)

    @property
    def cov(self) -> Array:
        """[D, D]: the unbiased covariance. Raises ValueError for a single sample."""
        if self.count < 2:
            raise ValueError("a covariance needs at least 2 samples, found 1")
        return self.scatter / (self.count - 1)


def _root(cov: Array) -> Array:
    """Return R with R R^T = cov; eigenvalues below 0 are rounding and count as 0."""
    values, vectors = np.linalg.eigh(cov)
    root: Array = vectors * np.sqrt(values.clip(min=0))
    return root


def gaussian_distance(mean1: Array, cov1: Array, mean2: Array, cov2: Array) -> float:
    """Return the (squared) Frechet distance of N(mean1, cov1) and N(mean2, cov2); means [D], covariances [D, D]."""
    if mean1.shape != mean2.shape or cov1.shape != cov2.shape or cov1.shape != (*mean1.shape, *mean1.shape):
        shapes = f"{mean1.shape}, {cov1.shape} and {mean2.shape}, {cov2.shape}"
        raise ValueError(f"expected means [D] and covariances [D, D] of one D, found {shapes}")
    gap = mean1 - mean2
    cross = np.linalg.svd(_root(cov1).T @ _root(cov2), compute_uv=False).sum()
    return float(gap @ gap + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Return the (squared) Frechet distance between two sets, each taken as a Gaussian (n - 1 in the covariance)."""
    return gaussian_distance(a.mean, a.cov, b.mean, b.cov)
