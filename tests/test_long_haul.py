"""The short form of the long haul: a run does not grow, and a run that does is found out."""

from __future__ import annotations

import json
import mmap
from dataclasses import replace
from io import BufferedIOBase as IOBase
from pathlib import Path
from typing import Any

import long_haul
import pytest
from long_haul import BARS, LOOKS, PARTS, Options, Watch, configured, growth

from ect.config import Config, EvalConfig
from tests.tiny import NET

STEPS = PARTS * LOOKS
CONFIGURED = configured
pytestmark = pytest.mark.skipif(not (long_haul.PROC / "statm").is_file(), reason="it reads Linux's /proc")


def part(**changes: float) -> dict[str, float]:
    return {"steps": 1, "memory": 700.0, "files": 6, "objects": 1000, "CPU time": 20.0, "wall": 30.0, **changes}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run of the command, with a smaller network and fewer images to rate."""

    def made(options: Options) -> Config:
        cfg = CONFIGURED(options)
        log = replace(cfg.log, sample_kimg=cfg.total_kimg / 8, eval_kimg=cfg.total_kimg / 4)
        return replace(cfg, net=NET, log=log, eval=EvalConfig(samples=2, batch=2))

    monkeypatch.setattr(long_haul, "configured", made)
    monkeypatch.setattr("ect.trainer.GRID_SEEDS", range(4))


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_run_of_a_few_hundred_steps_does_not_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but its time, which other work on the machine disturbs; and it is that of a run with all that a run writes."""
    kept: list[set[str]] = []
    original = long_haul.haul

    def haul(options: Options, folder: Path) -> Any:
        parts = original(options, folder)
        kept.append({path.name.split("-")[0] for path in folder.iterdir()})
        return parts

    monkeypatch.setattr(long_haul, "haul", haul)
    monkeypatch.setitem(BARS, "CPU time", 9.0)
    results = tmp_path / "results.jsonl"
    assert long_haul.main(["--steps", str(STEPS), "--batch", "2", "--results", str(results)]) == 0
    line = json.loads(results.read_text())
    assert (line["steps"], line["batch"], len(line["parts"])) == (STEPS, 2, PARTS)
    assert [part["steps"] for part in line["parts"]] == list(range(STEPS // PARTS, STEPS + 1, STEPS // PARTS))
    assert all(value > 0 for part in line["parts"] for value in part.values())
    assert kept[0] >= {"stats.jsonl", "history.jsonl", "nfe1", "nfe2", "checkpoint"}
    said = capsys.readouterr().out
    assert said.count("holds, the bar is") == len(BARS) and f"{STEPS:,} steps of 2 digits" in said.replace("\n", " ")
    assert long_haul.main(["--report", "--results", str(results)]) == 0 and capsys.readouterr().out == said


@pytest.mark.slow
def test_what_a_step_keeps_is_seen(tmp_path: Path) -> None:
    """Steps that do nothing but keep 1 MiB, and now and then a file and objects. They keep 320 MiB in the parts looked at; the
    process of many tests gets or gives back some more meanwhile."""
    kept: list[Any] = []
    with Watch(tmp_path, 2 * STEPS, 1) as log:
        for i in range(2 * STEPS):
            kept.append(mmap.mmap(-1, 1 << 20))  # never out of what the process of many tests has to spare
            kept[-1].write(bytes(1 << 20))
            if i % 50 == 0:
                kept += [(tmp_path / "file").open("wb"), *([] for _ in range(1000))]
            log.step(i)
    grown = growth(log.parts())
    for one in kept:
        if isinstance(one, IOBase):
            one.close()
    assert 300 < grown["memory"] < 400 and grown["files"] == 6 and 5000 < grown["objects"] < 9000


@pytest.mark.parametrize("name", BARS)
def test_each_figure_has_its_bar(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = {"steps": 200, "batch": 2, "seconds": 1.0, "device": "cpu", "torch": "2", "commit": "x"}
    much = part()[name] * (1 + BARS[name]) if name == "CPU time" else part()[name] + BARS[name]
    for end, good in ((much - 1e-6, True), (much + 1e-6, False), (0.0, True)):
        parts = [part(**{name: 1e9}), *[part()] * 8, part(**{name: end})]  # the first tenth warms up
        assert long_haul.show({**line, "parts": parts}) is good
        assert ("GREW" not in capsys.readouterr().out) is good


def test_the_run_is_the_demos_network_with_everything_on() -> None:
    cfg, demo = configured(Options(20_000, 8)), long_haul.PRESETS["digits"]
    assert cfg.net == demo.net and cfg.total_kimg == 160 and cfg.objective.stage_kimg * cfg.objective.n_stages == 160
    assert all(0 < getattr(cfg.log, f"{what}_kimg") < 10 for what in ("stats", "sample", "eval", "checkpoint"))
