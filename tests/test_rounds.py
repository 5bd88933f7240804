"""What a failing row costs a step-time run: itself. And when torch.compile pays."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import step_time
import torch
from lib import categories, history, measure, payback, rounds, waterfall

from ect.config import Config, DataConfig
from ect.data import load
from ect.presets import PRESETS
from tests.tiny import NET

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LOST = "CUDA error: an illegal memory access was encountered"


class Bench:
    """Runs the command on rows of one's own, which take no time worth mentioning."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.news, self.now = folder, [""], 0.0
        self.steps: dict[str, Callable[[], None]] = {}
        self.builds: dict[str, Callable[[], None]] = {}
        keep = history.keep

        def spy(path: Path, line: dict[str, Any]) -> None:
            keep(path, line)
            self.news.append(line["partial"])

        case = waterfall.Case("digits", replace(PRESETS["digits"], batch=4, net=NET), load(DataConfig()))
        monkeypatch.setattr(history, "keep", spy)
        monkeypatch.setattr(waterfall, "case", lambda net, device, batch: replace(case, name=net))
        monkeypatch.setattr(waterfall, "rows", self.rows)
        monkeypatch.setattr(rounds, "Products", lambda runner: self.builder("products")(None, CPU).products)
        monkeypatch.setattr(measure, "clock", lambda device: ("fake", lambda: self.now))

    def rows(self, device: torch.device) -> list[waterfall.Row]:
        names = ("plain", "+channels-last", "+flat optimizer", "+compile")
        return [waterfall.Row(name, "fp32", self.builder(name)) for name in names]

    def builder(self, name: str) -> Callable[..., Any]:
        class Step:
            def __call__(step, nimg: int, stage: int) -> torch.Tensor:
                self.now += 0.3
                self.steps.get(name, lambda: None)()
                return torch.zeros(())

            def products(step) -> None:
                step(0, 0)

            def tensors(step) -> list[torch.Tensor]:
                return [torch.zeros(1)]

        def build(case: waterfall.Case, device: torch.device) -> Any:
            self.builds.get(name, lambda: None)()
            return Step()

        return build

    def __call__(self, *options: str) -> int:
        return step_time.main(
            ["--device", "cpu", "--rounds", "3", "--results", str(self.folder), "--net", "digits", *options]
        )

    def lines(self, suffix: str = ".jsonl") -> list[dict[str, Any]]:
        return [line for path in self.folder.glob(f"*{suffix}") for line in history.read(path)]

    def in_round(self, number: int) -> bool:
        return any(news.startswith(f"round {number - 1} of") for news in self.news)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def raising(error: BaseException, when: Callable[[], bool] = lambda: True) -> Callable[[], None]:
    def step() -> None:
        if when():
            raise error

    return step


@pytest.mark.slow
def test_rows_that_fail_cost_no_other(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """One while it is built, one in a round, and the floor, which is none of the rows."""
    bench.builds["+channels-last"] = raising(TypeError("got an unexpected keyword argument\nand much more"))
    bench.steps["+flat optimizer"] = raising(RuntimeError("no kernel image"), lambda: bench.in_round(2))
    bench.steps["products"] = raising(ValueError("no products"), lambda: bench.in_round(3))
    assert bench() == 0
    (line,) = bench.lines()
    rows = line["rows"]
    assert rows["+channels-last"] == {"ms": None, "why": "TypeError: got an unexpected keyword argument"}
    assert rows["+flat optimizer"] == {"ms": None, "why": "RuntimeError: no kernel image"}
    assert [rows[name]["ms"] for name in ("plain", "+compile")] == pytest.approx([300] * 2)
    assert rows["plain"]["ratio"] == 1 and len(rows["+compile"]["ratio_iqr"]) == 2
    assert line["floor"] == {"ms": None, "what": "none: ValueError: no products"}
    out = capsys.readouterr().out
    assert "TypeError: got an unexpected keyword argument" in out and "and much more" not in out
    assert not bench.lines(".partial")


@pytest.mark.slow
def test_a_row_that_fails_in_its_first_steps_or_profile_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.steps["+compile"] = raising(torch.OutOfMemoryError("CUDA out of memory"))
    bench.steps["+flat optimizer"] = raising(ValueError())
    take = categories.take

    def profiled(step: Any, *args: Any) -> Any:
        if "+channels-last" not in found:
            return take(step, *args)
        raise OSError("no profiler")

    found: list[str] = []
    bench.builds["+channels-last"] = lambda: found.append("+channels-last")
    bench.builds["+flat optimizer"] = found.clear
    monkeypatch.setattr(categories, "take", profiled)
    assert bench() == 0
    why = {name: row.get("why") for name, row in bench.lines()[0]["rows"].items()}
    assert why == {
        "plain": None, "+channels-last": "OSError: no profiler", "+flat optimizer": "ValueError",
        "+compile": "out of memory, try a smaller --batch",
    }  # fmt: skip


def test_the_floor_may_fail_before_the_rounds(bench: Bench) -> None:
    bench.builds["products"] = raising(OSError("no trace"))
    assert bench() == 0
    assert bench.lines()[0]["floor"] == {"ms": None, "what": "none: OSError: no trace"}


@pytest.mark.slow
def test_the_first_row_may_fail_as_well(bench: Bench) -> None:
    bench.steps["plain"] = raising(RuntimeError("no"), lambda: bench.in_round(3))
    assert bench() == 0
    rows = bench.lines()[0]["rows"]
    assert rows["plain"] == {"ms": None, "why": "RuntimeError: no"}
    assert bench.lines()[0]["floor"]["ms"] == pytest.approx(300)
    assert rows["+channels-last"]["ratio"] == 1 and rows["+compile"]["ms"] > 0


@pytest.mark.slow
def test_nothing_that_runs_is_an_answer_and_costs_no_other_network(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = [True] * 4
    for name in ("plain", "+channels-last", "+flat optimizer", "+compile"):
        bench.builds[name] = raising(RuntimeError("no GPU"), lambda: bool(failing and failing.pop()))
    assert bench("--net", "ddpmpp") == 1
    assert "no row ran (RuntimeError: no GPU)" in capsys.readouterr().out
    assert [line["net"] for line in bench.lines()] == ["ddpmpp"]


@pytest.mark.parametrize("number", [1, 2])
def test_a_run_that_ends_in_the_middle_keeps_what_it_paid_for(number: int, bench: Bench) -> None:
    """On disk before the step that kills it: SIGKILL would leave the same."""
    seen: list[dict[str, Any]] = []

    def killed() -> None:
        if bench.in_round(2) if number == 2 else bench.news[-1].startswith("+flat optimizer"):
            seen.extend(bench.lines(".partial"))
            raise KeyboardInterrupt

    bench.steps["+compile"] = killed
    with pytest.raises(KeyboardInterrupt):
        bench()
    assert bench.lines() == []
    (line,) = seen
    assert line == bench.lines(".partial")[0]
    rows = line["rows"]
    assert all(rows[name]["ms"] == pytest.approx(300) for name in ("plain", "+channels-last", "+flat optimizer"))
    assert ("+compile" in rows) == (number == 2)
    assert rows["plain"]["launches"] >= 0 and rows["plain"]["start"] > 0
    for table in step_time.tables(line):
        assert len(table.rows) >= 3
    bench.steps.clear()
    assert bench() == 0 and bench.lines()[0]["rows"]["+compile"]["ms"] > 0 and not bench.lines(".partial")


def test_a_torn_line_costs_no_other(bench: Bench) -> None:
    assert bench() == 0
    (path,) = bench.folder.glob("*.jsonl")
    path.write_text(path.read_text() + path.read_text()[:-40])
    assert len(bench.lines()) == 1
    assert bench() == 0 and len(bench.lines()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("early", [True, False])
def test_a_row_that_takes_the_device_along_leaves_the_earlier_figures(
    early: bool, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead: list[str] = []

    def die() -> None:
        if dead or early or bench.in_round(2):
            dead.append(LOST)
            raise RuntimeError(LOST)

    for name in ("+flat optimizer", "+compile"):
        bench.steps[name] = die
    bench.steps["plain"] = bench.steps["+channels-last"] = raising(RuntimeError(LOST), lambda: bool(dead))
    monkeypatch.setattr(measure, "lost", lambda device: dead[0] if dead else None)
    assert bench() == 0
    (line,) = bench.lines()
    rows = line["rows"]
    assert line["rounds"] == (0 if early else 1)
    assert [rows[name]["ms"] for name in ("plain", "+channels-last")] == pytest.approx([300] * 2)
    dropped = [name for name, row in rows.items() if row.get("why") == f"RuntimeError: {LOST}"]
    assert len(dropped) == 1
    assert not early or rows["+compile"]["why"] == f"the device was lost before: {LOST}"


def test_what_is_lost_is_asked_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure.lost(CPU) is None

    def synchronize(device: torch.device) -> None:
        raise RuntimeError(f"{LOST}\nCUDA kernel errors might be asynchronously reported")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert measure.lost(GPU) == LOST


@pytest.mark.slow
def test_a_row_that_takes_too_long_to_start_costs_no_other(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    def endless() -> None:
        try:
            while True:
                time.sleep(0.01)
        except Exception:  # as torch.compile does
            pytest.fail("the limit was taken for an error of the row's")

    bench.builds["+compile"] = endless
    assert bench("--limit", "0.5", "--rows", "+compile", "+flat optimizer") == 0
    rows = bench.lines()[0]["rows"]
    assert rows["+compile"] == {"ms": None, "why": "over 0.5 s to start"}
    assert rows["plain"]["ms"] > 0 and rows["+flat optimizer"]["ms"] > 0
    assert "over 0.5 s to start" in capsys.readouterr().out
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_compile_pays_after_its_start_by_its_gain(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"+graph": {"ms": 50.0, "start": 10.0}, "+compile": {"ms": 48.0, "start": 130.0}}
    found = payback.steps(rows, "+graph", "+compile")
    assert found["steps"] == 60_000 and "120.0 s more" in found["why"] and "2.00 ms less" in found["why"]
    said = payback.sentence(found, PRESETS["cifar10-1h"])
    assert "after 60,000 steps" in said and "8,000 steps" in said and "from 25,000 on, an estimate" in said
    slower = {**rows, "+compile": {"ms": 50.0, "start": 130.0}}
    assert payback.steps(slower, "+graph", "+compile")["steps"] is None
    assert ": never" in payback.sentence(payback.steps(slower, "+graph", "+compile"), PRESETS["digits"])
    assert payback.steps({**rows, "+compile": {"ms": 1.0, "start": 9.0}}, "+graph", "+compile")["steps"] == 0
    for absent in ({}, {"+compile": {"ms": None, "why": "over 300 s to start"}}):
        found = payback.steps({"+graph": rows["+graph"], **absent}, "+graph", "+compile")
        assert found["steps"] is None and "not known" in found["why"] and "+compile" in found["why"]
    assert bench() == 0
    assert bench.lines()[0]["payback"]["rows"] == ["+flat optimizer", "+compile"]
    assert "+compile pays for its start, against +flat optimizer: never" in " ".join(capsys.readouterr().out.split())


def test_the_rows_that_say_when_compile_pays_differ_in_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Config] = []
    monkeypatch.setattr(waterfall, "train_step", lambda cfg, state, stream: made.append(cfg))
    case = waterfall.Case("digits", replace(PRESETS["digits"], batch=4, net=NET), load(DataConfig()))
    for device in (CPU, GPU):
        rows = {row.name: row for row in waterfall.rows(device) if device.type not in row.not_on}
        for name in waterfall.compile_rows(device):
            rows[name].build(case, CPU)
            assert rows[name].captured == (device.type == "cuda") == made[-1].graph
        assert made[-2] == replace(made[-1], compile=False) and made[-1].compile
    assert list(rows)[-2:] == ["+graph", "+compile"]


def test_starts_are_measured_with_an_empty_compiler_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    with step_time.empty_compiler_cache():
        inside = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        assert inside.parent.is_dir() and not inside.exists() and os.environ["TRITON_CACHE_DIR"] != str(inside)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine" and "TRITON_CACHE_DIR" not in os.environ
    assert not inside.parent.exists()
