"""Schedules are pure functions of nimg; their boundaries are pinned here."""

from __future__ import annotations

import math

import pytest

from ect.config import ObjectiveConfig, OptimConfig
from ect.schedule import cooldown, ema_betas_at, lr_at, stage_at


def test_stage_boundaries() -> None:
    cfg = ObjectiveConfig(stage_kimg=12.8, n_stages=6)
    assert [stage_at(n, cfg) for n in (0, 12_799, 12_800, 64_000, 76_800, 10**9)] == [0, 0, 1, 5, 5, 5]


def test_warmup_and_linear_decay() -> None:
    cfg = OptimConfig(lr=1.0, warmup_kimg=6.4, decay="linear", decay_kimg=38.4)
    rates = [lr_at(n, 64, 76_800, cfg) for n in (0, 6_336, 38_400, 57_600, 76_800)]
    assert rates == pytest.approx([0.01, 1.0, 1.0, 0.5, 0.0])


def test_rsqrt_decay() -> None:
    cfg = OptimConfig(lr=1e-3, decay="rsqrt", decay_kimg=256)
    rates = [lr_at(n, 128, 10**7, cfg) for n in (0, 256_000, 1_024_000)]
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4])
    assert lr_at(10**9, 128, 10**9, OptimConfig(lr=1e-4)) == 1e-4


def test_the_factor_falls_as_one_minus_the_root() -> None:
    assert [cooldown(done, 0.2) for done in (0.0, 0.5, 0.8)] == pytest.approx([1, 1, 1], abs=1e-7)
    assert [cooldown(done, 0.2) for done in (0.85, 0.95, 1.0, 1.1)] == pytest.approx([0.5, 1 - 0.75**0.5, 0, 0])
    assert cooldown(0.25, 1.0) == 0.5


def test_the_learning_rate_cools_down_over_the_last_share() -> None:
    cfg = OptimConfig(lr=2.0, decay="cooldown", cooldown_share=0.25, warmup_kimg=1.0)
    rates = [lr_at(n, 100, 10_000, cfg) for n in (0, 400, 7_400, 8_125, 9_900)]
    assert rates == pytest.approx([0.2, 1.0, 2.0, 1.0, 2 * (1 - 0.96**0.5)])


def test_ema_ramp() -> None:
    assert ema_betas_at(0, 128, OptimConfig(emas=(".9993",))) == (0.9993,)
    cfg = OptimConfig(emas=(".995", ".9", "0"), ema_rampup=0.05)
    assert ema_betas_at(0, 64, cfg) == (0.0, 0.0, 0.0)
    assert ema_betas_at(6_400, 64, cfg) == pytest.approx((0.5 ** (64 / 320), 0.5 ** (64 / 320), 0.0))
    assert ema_betas_at(10, 1, cfg) == pytest.approx((0.25, 0.25, 0.0))  # half an image is a half-life too
    assert ema_betas_at(10**9, 64, cfg) == pytest.approx((0.995, 0.9, 0.0))


def test_half_lives_of_the_recipes() -> None:
    assert math.log(0.5) / math.log(0.9999) == pytest.approx(6931, abs=1)
    assert math.log(0.5) / math.log(0.9993) * 128 / 1000 == pytest.approx(127, abs=0.5)
