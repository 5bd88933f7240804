"""What a run of the ledger is charged: its steps, and what its recipe rests on; not what is rated or written on the way."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lib import charged, ledger_run, recipes
from torch import Tensor

from ect.config import EvalConfig
from ect.data import load
from ect.errors import UserError
from ect.files.checkpoint import read_model
from ect.metrics import Column, Evaluator
from ect.trainer import Trainer
from tests import tiny

CPU = torch.device("cpu")
RATING = 0.2  # seconds


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


class Slow(Evaluator):
    """Takes long to count its calls."""

    columns = (Column("FDc"),)
    calls = 0

    def evaluate(self, images: Iterable[Tensor]) -> dict[str, float]:
        burn(RATING)
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
    cfg = tiny.config(eval=EvalConfig(samples=8, batch=8), threads=1)
    cfg = replace(cfg, log=replace(cfg.log, eval_kimg=cfg.total_kimg / 2, checkpoint_kimg=0.016))
    data, slow, step = load(cfg.data), Slow(), Trainer.evaluate
    real = charged.Charged.save

    def save(self: charged.Charged) -> Path:
        path = real(self)
        if self.nimg == 48 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            self.stop.requested = True
        return path

    monkeypatch.setattr(charged.Charged, "save", save)
    with pytest.raises(KeyboardInterrupt):
        charged.train(cfg, tmp_path / "run", data, CPU, slow)
    before = charged.account(tmp_path / "run")["seconds"]
    start = time.process_time()
    model = charged.train(cfg, tmp_path / "run", data, CPU, slow)
    took = time.process_time() - start
    found = charged.account(tmp_path / "run")
    assert 0 < before < found["seconds"] < before + took - RATING  # the last rating is not among it
    assert [(kimg, values["nfe1/FDc"], values["nfe2/FDc"]) for kimg, _, values in found["curve"]] == [
        (0.04, 1.0, 2.0), (0.08, 3.0, 4.0)
    ]  # fmt: skip
    assert found["curve"][0][1] < found["curve"][1][1] == found["seconds"] and found["pace"] > 0
    assert slow.calls == 4 and step is Trainer.evaluate
    plain = tiny.run(replace(cfg, eval=EvalConfig(samples=0)), tmp_path / "plain")
    assert plain.run_dir.is_dir()
    (other,) = (tmp_path / "plain").glob(model.name)
    ours, theirs = read_model(model).state, read_model(other).state
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)  # rating and charging change no step


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
    assert lines[0]["samples"] == 20 and lines[0]["curve"][-1][2].keys() >= {"nfe1/FDc", "nfe2/FDp"}
    rated = bench.line(recipes.TEACHER, 1.0, 0)
    assert rated["seconds"] == 0 and rated["curve"][0][2].keys() == {"nfe35/FDc", "nfe35/FDp", "nfe35/imbalance"}
    monkeypatch.setitem(recipes.RECIPES, "broken", recipes.Recipe(before=("-c exit(3)",)))
    with pytest.raises(UserError, match=r"python -c 'exit\(3\)': ended with status 3"):
        bench.line("broken", 1.0, 0)
