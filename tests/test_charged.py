"""What a run of the ledger is charged: its steps, and what its recipe rests on; not what is rated or written on the way."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lib import charged, ledger_pilot, ledger_run, recipes
from torch import Tensor

from ect.config import DataConfig, EvalConfig
from ect.data import load
from ect.errors import UserError
from ect.files.checkpoint import read_model
from ect.metrics import Column, Evaluator
from ect.step import TrainStep
from ect.trainer import Trainer
from tests import tiny

CPU = torch.device("cpu")


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


class Counting(Evaluator):
    """Counts its calls, each of which takes a while on the clock of the test."""

    columns = (Column("FDc"),)

    def __init__(self, clock: list[float]) -> None:
        self.calls, self._clock = 0, clock

    def evaluate(self, images: Iterable[Tensor]) -> dict[str, float]:
        self._clock[0] += 100
        self.calls += 1
        return {"FDc": float(self.calls)}


def test_a_watch_counts_only_while_it_runs() -> None:
    watch = charged.Watch(CPU, 5.0)
    burn(0.05)
    with watch.running():
        burn(0.05)
        with watch.paused():
            burn(0.1)
    with watch.paused():
        burn(0.05)
    assert 5.05 <= watch.seconds < 5.1


def test_a_watch_waits_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: (waited.append(device), time.sleep(0.05)))
    watch = charged.Watch(torch.device("cuda"))
    with watch.running():
        pass
    assert watch.seconds >= 0.05 and waited == [torch.device("cuda")] * 2


@pytest.mark.slow
def test_steps_are_charged_also_over_a_stop_and_nothing_else_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock where a step takes 1, a rating 100 and a checkpoint 1,000."""
    cfg = tiny.config(eval=EvalConfig(samples=8, batch=8), threads=1)
    cfg = replace(cfg, log=replace(cfg.log, eval_kimg=cfg.total_kimg / 2, checkpoint_kimg=0.016))
    clock = [0.0]
    data, counting, write, step = load(cfg.data), Counting(clock), Trainer._write, TrainStep.__call__
    stops = [48]

    def slow_write(self: Trainer, *args: Any) -> Path:
        clock[0] += 1000
        self.stop.requested = self.nimg in stops
        return write(self, *args)

    def slow_step(self: TrainStep, *args: Any) -> Any:
        clock[0] += 1
        return step(self, *args)

    monkeypatch.setattr(Trainer, "_write", slow_write)
    monkeypatch.setattr(TrainStep, "__call__", slow_step)
    monkeypatch.setattr(charged.Watch, "now", lambda self: clock[0])
    with pytest.raises(KeyboardInterrupt):
        charged.train(cfg, tmp_path / "run", data, CPU, counting)
    stopped = charged.account(tmp_path / "run")
    assert 6 <= stopped["seconds"] <= 7 and counting.calls == 2  # a stop is heard after the step that follows
    stops.clear()
    model = charged.train(cfg, tmp_path / "run", data, CPU, counting)
    found = charged.account(tmp_path / "run")
    assert found["seconds"] == tiny.STEPS and counting.calls == 4
    assert [(kimg, spent, values["nfe1/FDc"], values["nfe2/FDc"]) for kimg, spent, values in found["curve"]] == [
        (0.04, 5, 1.0, 2.0), (0.08, 10, 3.0, 4.0)
    ]  # fmt: skip
    plain = tiny.run(replace(cfg, eval=EvalConfig(samples=0)), tmp_path / "plain")
    ours, theirs = read_model(model).state, read_model(plain.run_dir / model.name).state
    assert theirs and all(torch.equal(ours[name], theirs[name]) for name in theirs)  # no step is another for it


@pytest.mark.slow
def test_what_a_recipe_rests_on_is_run_once_and_charged_to_each_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "features.py"
    script.write_text(
        "import sys, time\nopen(sys.argv[1], 'a').write(sys.argv[2] + ' ' + sys.argv[3] + '\\n')\n"
        "while time.process_time() < 0.3: pass\n"
    )
    log = tmp_path / "log"
    recipe = recipes.Recipe("--objective.q 4", before=(f"{script} {log} {{data}} {{teacher}}",))
    monkeypatch.setitem(recipes.RECIPES, "mine", recipe)
    monkeypatch.setitem(
        recipes.SETS,
        "tiny",
        recipes.DataSet("--preset digits --eval.samples 20", teacher=0.002, tuning=0.002, points=1),
    )
    bench = ledger_run.Bench("tiny", tmp_path / "runs", threads=1)
    lines = [bench.line("mine", length, 0) for length in (1.0, 2.0)]
    assert log.read_text() == f"digits {bench.teacher(0)}\n"
    assert all(line["before"] >= 0.3 and line["seconds"] > line["before"] for line in lines)
    assert lines[0]["before"] == lines[1]["before"] and lines[0]["curve"][-1][1] == lines[0]["seconds"]
    assert lines[0]["options"] == recipes.options_of("tiny", "mine") and str(script) in lines[0]["options"]
    assert lines[0]["teacher"] == lines[1]["teacher"] and lines[0]["teacher"]["kimg"] > 0
    assert (
        lines[0]["pace"] > 0
        and lines[0]["samples"] == 20
        and lines[0]["curve"][-1][2].keys() >= {"nfe1/FDc", "nfe2/FDp"}
    )
    rated = bench.line(recipes.TEACHER, 1.0, 0)
    assert rated["seconds"] == 0 and rated["curve"][0][2].keys() == {"nfe35/FDc", "nfe35/FDp", "nfe35/imbalance"}
    other, digits = f"{script} {log} {{data}} all-seeds", DataConfig()
    assert bench._before(other, digits, Path("one")) == bench._before(other, digits, Path("two")) >= 0.3
    assert log.read_text().count("all-seeds") == 1
    monkeypatch.setitem(recipes.RECIPES, "broken", recipes.Recipe(before=("-c exit(3)",)))
    with pytest.raises(UserError, match=r"python -c 'exit\(3\)': ended with status 3"):
        bench.line("broken", 1.0, 0)


@pytest.mark.slow
def test_a_pilot_says_what_the_runs_will_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock where each reading is 2 seconds after the last: a step takes 2 seconds, and so does all of the sampling."""
    monkeypatch.setitem(recipes.SETS, "tiny", recipes.DataSet("--preset digits --eval.samples 320", points=2))
    readings = itertools.count(step=2)
    monkeypatch.setattr(charged.Watch, "now", lambda self: float(next(readings)))
    diffusion, tuning = ledger_pilot.pilot("tiny", 1, threads=1).rows
    image = 2 / ledger_pilot.IMAGES
    for row, evaluations in ((diffusion, 35), (tuning, 2 * 3)):
        assert row[1:5] == ["188,769", "2000", "2000", f"{image * 1e3:.2f}"] and row[6:8] == [
            "1,200",
            f"{2400 / 3600:.2f}",
        ]
        assert row[8] == f"{image * evaluations * 320 / 3600:.2f}"


def test_what_a_recipe_rests_on_is_charged_in_the_unit_of_its_line(tmp_path: Path) -> None:
    """A command that sleeps takes time on the wall, which a GPU's seconds are counted by, and hardly any of the processor's."""
    bench = object.__new__(ledger_run.Bench)
    for device, folder in (("cpu", "a"), ("cuda", "b")):
        bench.device, bench.folder = torch.device(device), tmp_path / folder
        bench.folder.mkdir()
        cost = bench._before("-S -c 'import time; time.sleep(0.5)'", DataConfig(), Path("teacher"))
        assert (cost >= 0.5) == (device == "cuda")
