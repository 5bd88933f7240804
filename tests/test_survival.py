"""One failure in a benchmark costs its own figure and no other."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import digits_quality
import ops
import precision
import precision_quality
import pytest
import torch
from ect_kernels import dispatch
from lib import measure

from ect.files.checkpoint import load_model
from ect.objective import Denoiser


@pytest.fixture
def quick_ops(monkeypatch: pytest.MonkeyPatch) -> dict[str, Exception]:
    """Two ops whose backends do nothing, but raise what stands in the returned dictionary: {"<op> <backend> <pass>": error}."""
    errors: dict[str, Exception] = {}
    op = ""

    def benches(name: str, *args: Any) -> list[Any]:
        nonlocal op
        op = name
        case = type("Case", (), {"name": "any"})
        return [type("Bench", (), {"case": case, "function": None})]

    def check(function: Any, backend: str, case: Any, device: torch.device) -> list[Any]:
        if error := errors.get(f"{op} {backend} check"):
            raise error
        return []

    def times(bench: Any, backend: str, device: torch.device) -> Iterator[tuple[str, float, int]]:
        for name in ("fwd", "bwd"):
            if error := errors.get(f"{op} {backend} {name}"):
                raise error
            yield name, 0.123, 10**6

    monkeypatch.setattr(ops.cases, "benches", benches)
    monkeypatch.setattr(ops.truth, "check", check)
    monkeypatch.setattr(ops, "times", times)
    monkeypatch.setattr(ops, "_load_emulator", lambda *args: None)
    monkeypatch.setattr(dispatch.Op, "usable", lambda self, device: ["reference", "triton"])
    return errors


COMMAND = ["--device", "cpu", "--op", "levels", "--op", "perturb"]


def test_a_backend_that_raises_costs_no_other(
    quick_ops: dict[str, Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ops.main(COMMAND) == 0
    assert capsys.readouterr().out.count("123.000") == 8
    quick_ops["levels reference check"] = TypeError("params given twice\nand more")
    quick_ops["levels triton bwd"] = RuntimeError("no kernel image")
    quick_ops["perturb reference check"] = AssertionError("error 3, bar 2")
    assert ops.main(COMMAND) == 1
    out = capsys.readouterr().out
    assert out.count("123.000") == 3
    assert all(
        text in " ".join(out.split()) for text in ("TypeError: params given", "RuntimeError: no kernel", "error 3, bar")
    )


def test_a_shape_that_a_backend_does_not_take_is_no_fault(quick_ops: dict[str, Exception]) -> None:
    quick_ops["levels triton check"] = dispatch.BackendError("too wide")
    assert ops.main(COMMAND) == 0


def test_each_op_is_printed_before_the_next_begins(
    quick_ops: dict[str, Exception], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick_ops["perturb reference check"] = KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        ops.main(COMMAND)
    assert capsys.readouterr().out.count("123.000") == 4
    monkeypatch.setattr(measure, "lost", lambda device: "an illegal memory access")
    assert ops.main(COMMAND) == 1
    assert "the device was lost: an illegal" in capsys.readouterr().out


@pytest.mark.slow
def test_an_arithmetic_that_fails_costs_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any) -> Denoiser:
        raise RuntimeError("no bf16 here")

    net, images = load_model(precision.DIGITS)[0], torch.zeros(2, 8, 8, 1, dtype=torch.uint8)
    monkeypatch.setattr(precision, "all_in_fp16", broken)
    found = precision.measure(net, images, None)
    assert "fp16 everywhere" not in found and len(found) == 4
    assert "fp16 everywhere: left out, RuntimeError: no bf16 here" in capsys.readouterr().err
    monkeypatch.setattr(precision, "measure", lambda *args: {"fp32": found["fp32"]})
    assert precision.main(["--samples", "2"]) == 1
    assert "not decided" in capsys.readouterr().out


def test_a_seed_that_fails_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.loads(line) for line in digits_quality.RESULTS.read_text().splitlines()]
    results = tmp_path / "results.jsonl"

    def one_seed(seed: int, folder: Path) -> Any:
        if seed == 1:
            raise OSError("disk full")
        return lines[0]["result"]

    monkeypatch.setattr(digits_quality, "one_seed", one_seed)
    monkeypatch.setattr(
        sys, "argv", ["digits_quality.py", "--seeds", "0", "1", "2", "--check", "--results", str(results)]
    )
    assert digits_quality.main() == 1
    assert [json.loads(line)["seed"] for line in results.read_text().splitlines()] == [0, 2]
    assert "seed 1 failed: OSError: disk full" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["digits_quality.py", "--seeds", "1", "--results", str(tmp_path / "none.jsonl")])
    assert digits_quality.main() == 1


def test_a_tuning_that_fails_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"FDc": 1.0, "FDp": 1.0, "nfe": 1}

    def tune(seed: int, name: str, options: precision_quality.Options) -> dict[str, Any]:
        if name == "fp16":
            raise RuntimeError("no fp16")
        result = {f"{nfe} NFE": row for nfe in (1, 2)}
        return {"seed": seed, "precision": name, "kimg": options.kimg, "result": result}

    monkeypatch.setattr(precision_quality, "tune", tune)
    results = tmp_path / "results.jsonl"
    assert precision_quality.main(["--seeds", "0", "1", "--check", "--results", str(results)]) == 1
    assert [json.loads(line)["precision"] for line in results.read_text().splitlines()] == ["fp32", "bf16"] * 2
    assert "seed 0, fp16 failed: RuntimeError: no fp16" in capsys.readouterr().out
