from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from ect.metrics.frechet import Statistics, frechet_distance, gaussian_distance


def samples(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) * scale + shift


def test_identical_sets_are_at_distance_zero() -> None:
    x = Statistics.of(samples(500, 16, 0))
    assert abs(frechet_distance(x, x)) < 1e-10 * np.trace(x.cov)


def test_identical_sets_smaller_than_the_dimension_are_at_distance_zero() -> None:
    x = Statistics.of(samples(10, 64, 0, scale=30.0))
    assert abs(frechet_distance(x, x)) < 1e-10 * np.trace(x.cov)


def test_diagonal_gaussians_have_the_closed_form() -> None:
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 0.0])
    mean = np.array([1.0, -2.0, 0.5])
    expected = mean @ mean + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert gaussian_distance(mean, np.diag(a), np.zeros(3), np.diag(b)) == pytest.approx(expected, rel=1e-13)


def test_a_shift_costs_its_square_and_a_scale_the_square_of_the_excess() -> None:
    x = samples(300, 8, 1)
    base, shifted, scaled = Statistics.of(x), Statistics.of(x + 3.0), Statistics.of((x - x.mean(0)) * 1.5 + x.mean(0))
    assert frechet_distance(base, shifted) == pytest.approx(9.0 * 8, rel=1e-10)
    assert frechet_distance(base, scaled) == pytest.approx(0.25 * np.trace(base.cov), rel=1e-10)


@pytest.mark.parametrize("n", [200, 2000])
def test_agrees_with_the_matrix_square_root(n: int) -> None:
    a, b = Statistics.of(samples(n, 24, 2)), Statistics.of(samples(n, 24, 3, scale=0.7, shift=0.2))
    gap = a.mean - b.mean
    root = scipy.linalg.sqrtm(a.cov @ b.cov)
    expected = gap @ gap + np.trace(a.cov) + np.trace(b.cov) - 2 * np.trace(root.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_agrees_with_the_eigenvalue_trace_and_is_symmetric() -> None:
    a, b = Statistics.of(samples(400, 12, 4)), Statistics.of(samples(300, 12, 5, shift=1.0))
    gap = a.mean - b.mean
    trace = np.sqrt(np.linalg.eigvals(a.cov @ b.cov).astype(complex)).real.sum()
    expected = gap @ gap + np.trace(a.cov) + np.trace(b.cov) - 2 * trace
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


def test_statistics_are_numpy_mean_and_covariance() -> None:
    x = samples(50, 6, 6, shift=100.0).astype(np.float32)
    s = Statistics.of(x)
    assert s.count == 50
    np.testing.assert_allclose(s.mean, x.astype(np.float64).mean(0), rtol=1e-14)
    np.testing.assert_allclose(s.cov, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-12)


def test_chunks_merge_to_the_full_statistics_also_far_from_zero() -> None:
    x = samples(101, 6, 7, shift=1e6)  # E[x^2] - mean^2 would lose 12 of 16 digits here
    full = Statistics.of(x)
    merged = Statistics.of(x[:1])
    for chunk in (x[1:40], x[40:41], x[41:]):
        merged = merged.merge(Statistics.of(chunk))
    assert merged.count == 101
    np.testing.assert_allclose(merged.mean, full.mean, rtol=1e-14)
    np.testing.assert_allclose(merged.cov, full.cov, rtol=1e-6, atol=1e-9 * np.abs(full.cov).max())
    assert abs(frechet_distance(merged, full)) < 1e-6


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((3,)), r"\[N, D\].*\(3,\)"),
        (np.zeros((0, 3)), r"N >= 1.*\(0, 3\)"),
        (np.array([[0.0, np.nan]]), "NaN"),
        (np.array([[0.0, np.inf]]), "infinite"),
    ],
)
def test_bad_features_are_refused(features: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Statistics.of(features)


def test_one_sample_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        _ = Statistics.of(np.zeros((1, 3))).cov


def test_mismatched_dimensions_are_refused() -> None:
    a, b = Statistics.of(samples(9, 3, 0)), Statistics.of(samples(9, 4, 0))
    with pytest.raises(ValueError, match=r"\(3,\).*\(4,\)"):
        frechet_distance(a, b)
