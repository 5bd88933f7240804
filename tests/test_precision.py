"""The two precision benchmarks: their rows are what they are called, and their verdicts can fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import digits_quality
import precision
import precision_quality
import pytest

from ect.config import DataConfig
from ect.cost.signal_noise import LEVELS
from ect.data import load
from ect.files.checkpoint import load_model
from ect.presets import PRESETS

IMAGES = load(DataConfig()).images[:64]


@pytest.mark.slow
def test_the_ends_are_where_rounding_hurts() -> None:
    found = precision.measure(load_model(precision.DIGITS)[0], IMAGES, None)
    assert list(found["fp32"]) == list(LEVELS)
    for t in LEVELS:
        assert found["fp32"][t] < 0.01 * found["fp16, fp32 ends"][t]
        assert found["fp16 everywhere"][t] > 1.2 * found["fp16, fp32 ends"][t]
        assert found["bf16, fp32 ends"][t] > 4 * found["fp16, fp32 ends"][t]
    assert found["fp16 everywhere"][0.1] > 1.5 * found["fp16, fp32 ends"][0.1]
    assert found["TF32 everywhere"][0.02] > found["fp16, fp32 ends"][0.02]


def rows(ratio: float) -> dict[str, dict[float, float]]:
    """Twice the noise of `ratio` at one level only."""
    tf32 = dict.fromkeys(LEVELS, 0.1)
    return {"TF32 everywhere": tf32, "fp16, fp32 ends": {**tf32, 3.0: 0.1 * ratio}, "fp32": dict.fromkeys(LEVELS, 1e-4)}


@pytest.mark.parametrize(("ratio", "code"), [(1.29, 0), (1.31, 1)])
def test_check_fails_above_the_bar(
    ratio: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precision, "measure", lambda *args: rows(ratio))
    assert precision.main(["--samples", "2"]) == 0
    assert precision.main(["--samples", "2", "--check", "--markdown"]) == code
    out = capsys.readouterr().out
    assert ("fails" if code else "holds") + f", {ratio:.3f} times at t = 3" in out
    assert "| arithmetic | t = 0.02 |" in out and "emulated" in out


@pytest.mark.slow
def test_fp16_is_at_most_1_3_times_tf32() -> None:
    """Over a third of the digits, which moves the ratio by 2 %; of the arithmetics the two that `--check` compares."""
    images = load(DataConfig()).images[:600]
    found = precision.measure(load_model(precision.DIGITS)[0], images, None, precision.COMPARED)
    assert list(found) == list(precision.COMPARED)
    assert precision.worst(found)[0] <= precision.BAR


def test_the_command_measures_every_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    status = precision.main(["--samples", "8", "--check"])  # so few images decide nothing
    out = capsys.readouterr().out
    assert "8 images of digits" in out and f"times TF32: {'fails' if status else 'holds'}" in out
    assert all(name in out for name in (*precision.COMPARED, "fp16 everywhere", "bf16, fp32 ends"))


def test_data_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert precision.main(["--data.resolution", "16", "--samples", "2"]) == 2
    assert "made for 1 channel(s) of 8x8" in capsys.readouterr().err
    assert precision.main([str(tmp_path / "none.safetensors")]) == 2
    assert precision.main(["--samples", "0"]) == 2


def line(seed: int, name: str, fdc: float, kimg: float = PRESETS["digits"].total_kimg) -> dict[str, Any]:
    result = {f"{nfe} NFE": {"FDc": fdc / nfe, "FDp": 0.01, "nfe": nfe} for nfe in (1, 2)}
    return {"seed": seed, "precision": name, "kimg": kimg, "device": "cpu", "torch": "", "result": result}


def write(path: Path, *lines: dict[str, Any]) -> list[str]:
    """Put lines into a results file; returns the options that name it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return ["--results", str(path)]


@pytest.mark.parametrize(
    ("half", "good"),
    [
        ((40.0, 60.0, 50.0), True),
        ((50.0, 70.0, 60.0), True),  # 10 apart, both deviations 10: 14 are allowed
        ((55.0, 75.0, 65.0), False),
        ((64.0, 65.0, 66.0), False),
    ],
)
def test_equal_within_the_spread(
    half: tuple[float, ...], good: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    single = (40.0, 60.0, 50.0)
    lines = [line(s, name, v) for name, vs in (("fp32", single), ("fp16", half)) for s, v in enumerate(vs)]
    options = write(tmp_path / "results.jsonl", *lines)
    assert precision_quality.main(["--report", "--check", *options]) == (0 if good else 1)
    assert precision_quality.main(["--report", "--markdown", *options]) == 0
    assert ", ".join(f"{a - b:+.1f}" for a, b in zip(half, single, strict=True)) in capsys.readouterr().out


def test_missing_seeds_are_not_equality(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line(s, name, 50.0 + s) for name in ("fp32", "fp16") for s in range(3)]
    options = write(tmp_path / "results.jsonl", *lines[:-1])
    assert precision_quality.main(["--report", "--check", *options]) == 1
    assert "not decided, fp16 has 2 and fp32 3 of 3 seeds" in capsys.readouterr().out
    one = write(tmp_path / "one.jsonl", lines[0], lines[3])
    assert precision_quality.main(["--report", "--check", "--seeds", "0", *one]) == 1


def test_only_what_is_missing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def tune(seed: int, name: str, options: precision_quality.Options) -> dict[str, Any]:
        calls.append((seed, name))
        return line(seed, name, 50.0)

    monkeypatch.setattr(precision_quality, "tune", tune)
    options = write(tmp_path / "results.jsonl", line(0, "fp32", 40.0), line(0, "fp16", 40.0, kimg=1.0))
    for _ in range(2):
        precision_quality.main(["--seeds", "0", "1", "--precisions", "fp32", "fp16", *options])
    assert calls == [(0, "fp16"), (1, "fp32"), (1, "fp16")]


@pytest.mark.slow
def test_tunings_share_a_teacher_and_differ_in_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits_quality, "SAMPLES", 20)
    trained = []

    def train(cfg: Any, folder: Path) -> Path:
        trained.append((cfg.objective.kind, cfg.precision, cfg.init_from))
        return digits_quality.train(cfg, folder)

    monkeypatch.setattr(precision_quality, "train", train)
    options = precision_quality.Options(kimg=0.128, folder=tmp_path / "teachers")
    single, half = (precision_quality.tune(3, name, options) for name in ("fp32", "fp16"))
    (start,) = (tmp_path / "teachers").iterdir()
    assert trained == [("diffusion", "fp32", None), ("consistency", "fp32", start), ("consistency", "fp16", start)]
    assert half["loss_scale"] > 0 and "loss_scale" not in single
    assert set(half["result"]) == {"1 NFE", "2 NFE"} and half["result"]["2 NFE"]["FDc"] > 0
