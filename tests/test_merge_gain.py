"""benchmarks/merge_gain.py: what a search gains over the best single average, as a table and as a claim."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import merge_gain
import pytest

from ect.config import OptimConfig
from ect.presets import PRESETS
from tests.tiny import config


def line(seed: int, nfe: int, found: float) -> dict[str, Any]:
    figures = {f"{metric} {n}": 10.0 for metric in ("FDc", "FDp") for n in (1, 2)}
    about = {"ratings": 4, "samples": 8, "minutes": 1.5, "best_single": "the last weights", "device": "a CPU"}
    return {"seed": seed, "nfe": nfe, **about, "single": figures, "found": figures | {f"FDc {nfe}": found}}


def test_a_search_that_loses_in_one_run_fails_the_claim(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.jsonl"
    lines = [line(0, 1, 8.0), line(0, 2, 11.0), line(1, 1, 9.0), line(1, 2, 10.0)]
    report = ["--report", "--check", "--markdown", "--results", str(results), "--seeds", "0", "1"]
    results.write_text("".join(json.dumps(one) + "\n" for one in lines))
    assert merge_gain.main(report) == 1
    out = capsys.readouterr().out
    assert "| 0 | 1 NFE | 1.5 | the last weights | 10 -> 8 | 10 -> 10 | 10 -> 10 | 10 -> 10 |" in out
    assert "| mean | 1 NFE | 1.5 |  | -15% | +0% | +0% | +0% |" in out and "fails (3 of 4 searches)" in out
    with results.open("a") as file:
        file.write(json.dumps(line(0, 2, 9.0)) + "\n")  # the latest counts
    assert merge_gain.main(report) == 0
    out = capsys.readouterr().out
    assert "holds (4 of 4 searches)" in out and "| mean | 2 NFE | 1.5 |  | +0% | +0% | -5% | +0% |" in out


@pytest.mark.slow
def test_a_seed_is_a_run_and_two_searches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("cma")
    tiny = replace(config(), optim=OptimConfig(lr=3e-2, emas=(".5",)))
    monkeypatch.setitem(PRESETS, "digits", tiny)
    monkeypatch.setattr(merge_gain, "KEPT_KIMG", 0.016)
    results, runs = tmp_path / "results.jsonl", tmp_path / "runs"
    options = shlex.split(f"--seeds 3 --ratings 10 --samples 16 --runs {runs} --results {results}")
    runs.mkdir()
    for _ in range(2):
        assert merge_gain.main(options) == 0
    found = [json.loads(text) for text in results.read_text().splitlines()]
    assert [(one["seed"], one["nfe"]) for one in found] == [(3, 1), (3, 2)] * 2
    assert [one["found"] for one in found[:2]] == [one["found"] for one in found[2:]]  # the run was there
    assert all(one["finals"]["found"] <= one["finals"]["best single"] for one in found)
    assert len(list((runs / "seed3" / "weights").iterdir())) == 5
    assert "searched at" in capsys.readouterr().out
