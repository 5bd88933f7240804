"""python -m ect.scaling: its runs and their costs, what goes on where it was stopped, its folder, its report and refusals."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ect import train
from ect.assembly import flat_state, network_spec, objective_type, train_step
from ect.config import Config, DataConfig
from ect.data import Dataset, ImageStream, load
from ect.errors import UserError
from ect.files.lock import locked
from ect.files.run_folder import load as config_of
from ect.models import build
from ect.options import parse
from ect.presets import PRESETS
from ect.ranks.distributed import World
from ect.scaling import __main__ as scaling
from ect.scaling import cells as files
from ect.scaling import grid as grids
from ect.scaling import runs
from ect.scaling.counted import Counted, of_an_image
from ect.scaling.grid import Grid, Run, base_config, images_of, stretched, teacher_config
from ect.scaling.runs import Runner
from ect.show.dry_run import command

TINY = "--widths 8 --kimg .064 .1 --seeds 3 --pretrain-kimg .064 --samples 16 --jobs 2 --device cpu"
POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows ends processes at once")


@pytest.fixture
def small(tmp_path: Path) -> Grid:
    base = base_config("digits", 0.064, 16, "cpu")
    return Grid(base, load(DataConfig()), (8, 12), (4.8, 76.8), (0, 1), tmp_path / "study")


def test_a_cell_is_the_recipe_stretched_from_a_teacher_of_its_width_and_seed(small: Grid) -> None:
    run = small.tuning(12, 4.8, 1)
    cfg, whole = run.cfg, small.tuning(12, 76.8, 1).cfg
    assert (cfg.net.model_channels, cfg.seed, cfg.threads, cfg.pretrain) == (12, 1, 1, None)
    assert (cfg.objective.stage_kimg, cfg.optim.warmup_kimg, cfg.optim.decay_kimg) == pytest.approx((0.8, 0.4, 2.4))
    assert (whole.objective, whole.optim, whole.total_kimg) == (
        PRESETS["digits"].objective, PRESETS["digits"].optim, PRESETS["digits"].total_kimg
    )  # fmt: skip
    assert run.after is not None and cfg.init_from == run.after.folder == small.out / "w12-s1-teacher"
    teacher = run.after.cfg
    assert (teacher.objective.kind, teacher.total_kimg, teacher.eval.samples) == ("diffusion", 0.064, 0)
    assert (teacher.net, teacher.seed) == (cfg.net, cfg.seed) and cfg.eval.samples == 16
    assert images_of(cfg) == 4800 and images_of(replace(cfg, total_kimg=0.065)) == 128


def test_all_runs_are_there_once_and_teachers_come_before_their_cells(small: Grid) -> None:
    found = small.runs()
    names = [run.name for run in found]
    assert len(set(names)) == len(names) == 2 * (2 + 4)
    assert names[:4] == ["w12-s0-teacher", "w8-s0-teacher", "w12-s0-76.8kimg", "w8-s0-76.8kimg"]
    assert all(run.after is None or names.index(run.after.name) < names.index(run.name) for run in found)


def test_the_command_of_a_run_means_its_configuration(small: Grid) -> None:
    for run in small.runs():
        assert parse(shlex.split(command(run.cfg))[3:]) == run.cfg


@pytest.mark.parametrize("kind", ["consistency", "diffusion"])
def test_flops_are_those_of_the_network_on_a_cpu(kind: str) -> None:
    """Counted by torch's own counter while the network runs. There attention is plain products; the kernel that is counted
    computes the first of its two anew in its backward pass."""
    data, base = load(DataConfig()), base_config("digits", None, None, "cpu")
    cfg = base if kind == "consistency" else teacher_config(base)
    cfg = replace(cfg, batch=4, net=replace(cfg.net, model_channels=8))
    found = of_an_image(cfg, data)
    net = build(network_spec(cfg.net, objective_type(cfg.objective).precond, data, 0)).train()
    net.model.on_ops = False  # inside of an op nothing is counted
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(3, 1, 8, 8), torch.ones(3))
    assert counter.get_total_flops() == 3 * found.evaluation
    again = counter.get_flop_counts()["Global"][torch.ops.aten.bmm] / 3 / 2
    step = train_step(cfg, flat_state(cfg, net), ImageStream(data, 0, "cpu", 4))
    with FlopCounterMode(display=False) as counter:
        step(0, 0)
    assert counter.get_total_flops() == 4 * (found.update - again) and again > 0
    passes = {"consistency": 4, "diffusion": 3}[kind]  # one forward, twice as much backward, and the target's forward
    assert found.update == pytest.approx(passes * found.evaluation, rel=0.03)
    assert found.parameters == sum(p.numel() for p in net.parameters())


class Here:
    """A process of `python -m ect.train` that runs here, at once."""

    started: list[list[str]] = []  # noqa: RUF012

    def __init__(self, words: list[str], stdout: Any, **more: Any) -> None:
        assert words[:3] == [sys.executable, "-m", "ect.train"] and more["start_new_session"]
        self.started.append(words[3:])
        with open(os.dup(stdout.fileno()), "w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            self.returncode = train.main(words[3:])

    def poll(self) -> int:
        return self.returncode

    def terminate(self) -> None: ...

    def wait(self) -> int:
        return self.returncode


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """Runs start in this process; the list has their command lines."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(Here, "started", [])
    monkeypatch.setattr(
        runs, "subprocess", SimpleNamespace(Popen=Here, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
    )
    yield Here.started
    torch.set_num_threads(threads)


def status(line: str, out: Path) -> int:
    return scaling.main([*shlex.split(line), "--out", str(out)])


@pytest.mark.slow
def test_a_study_trains_what_is_missing_and_reports(
    tmp_path: Path, here: list[list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, memory = tmp_path / "study", {}

    def once(cfg: Config, data: Dataset) -> Counted:
        """Counting takes longer than training here."""
        if (key := (cfg.net, cfg.objective.kind)) not in memory:
            memory[key] = of_an_image(cfg, data)
        return memory[key]

    monkeypatch.setattr(grids, "of_an_image", once)
    assert status(TINY, out) == 0
    said = capsys.readouterr().out
    assert len(here) == 3 and "3 of 3 runs, w8-s3-0.064kimg is done; about 0.0 minutes left" in said
    assert "FDc against training FLOPs: a power law is not supported: too few points" in said
    cells = files.read(out / "cells.jsonl", "--report")
    assert [(one.width, one.kimg, one.seed, one.images) for one in cells] == [(8, 0.064, 3, 64), (8, 0.1, 3, 128)]
    for one in cells:
        folder = out / f"w{one.width}-s3-{one.kimg}kimg"
        counted = once(config_of(folder), load(DataConfig()))
        assert (one.model_flops, one.training_flops) == (counted.evaluation, counted.update * one.images)
        assert one.teacher_flops == pytest.approx(3 * one.model_flops * 64, rel=0.03) and one.seconds > 0
        rows = json.loads((folder / "results.json").read_text())["rows"]
        assert one.figure("nfe2/FDc") == rows[1]["mean"]["FDc"] and rows[1]["sampler"]["nfe"] == 2
        assert rows[0]["samples"] == one.samples == 16
    report = (out / "report.md").read_text()
    assert f"python -m ect.scaling {TINY} --out {out}" in report and "(scaling.svg)" in report
    assert "It trained 3 of 3 runs in " in report and "minutes, 2 at a time." in report
    assert f"| 8 | 0.1 | {cells[1].training_flops:.4g} | {cells[1].figure('nfe2/FDc'):.4g} |" in report

    # What is finished stays, and what has begun goes on.
    (out / "w8-s3-0.1kimg" / "results.json").unlink()
    here.clear()
    assert status(f"{TINY} --metric FDp --nfe 1", out) == 0
    assert here == [["--resume", str(out / "w8-s3-0.1kimg")]]
    said = capsys.readouterr().out
    assert "2 of 3 runs are there already" in said and "FDp at 1 network evaluation" in said
    assert files.read(out / "cells.jsonl", "--report")[0] == cells[0]
    here.clear()
    assert status(TINY.replace("--kimg .064 .1", "--kimg .064"), out) == 0
    assert here == [] and files.read(out / "cells.jsonl", "--report") == cells[:1]

    # Another study has another folder.
    for changed, words in (
        (TINY.replace("16 --jobs", "17 --jobs"), "--eval.samples 16, and this one has 17"),
        (TINY.replace("--pretrain-kimg .064", "--pretrain-kimg .1"), "--total-kimg 0.064, and this one has 0.1"),
    ):
        capsys.readouterr()
        assert status(changed, out) == 2 and here == []
        assert f"error: --out {out}: its study was begun with {words}" in capsys.readouterr().err
    (out / "study.json").write_text("{")
    assert status(TINY, out) == 2 and "study.json: not what a study wrote" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_fails_ends_the_study_with_its_last_words(
    tmp_path: Path, here: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverges(argv: list[str]) -> int:
        print("step 3\nerror: the loss is not finite\n")
        return 3

    monkeypatch.setattr(train, "main", diverges)
    out = tmp_path / "study"
    assert status(TINY, out) == 2
    said = capsys.readouterr().err
    log = out / "logs" / "w8-s3-teacher.txt"
    assert f"{out / 'w8-s3-teacher'}: its run ended with status 3: error: the loss is not finite (all of it" in said
    assert len(said.splitlines()) == 1 and str(log) in said and "step 3" in log.read_text()


STUB = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def stop(*_):
    (folder / "stopped").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
(folder / "began").touch()
time.sleep(60)
"""


def stubs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str = STUB
) -> tuple[Runner, list[subprocess.Popen[bytes]]]:
    """A runner of two processes that wait to be told to stop."""
    made: list[subprocess.Popen[bytes]] = []

    def start(words: list[str], **more: Any) -> subprocess.Popen[bytes]:
        place = Path(words[words.index("--run-dir") + 1])
        place.mkdir()
        made.append(subprocess.Popen([sys.executable, "-c", text, str(place)], **more))
        return made[-1]

    monkeypatch.setattr(
        runs, "subprocess", SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
    )
    cfgs = [replace(PRESETS["digits"], run_dir=folder / name) for name in ("a", "b", "c")]
    return Runner([Run(cfg.run_dir.name, cfg) for cfg in cfgs if cfg.run_dir], 2, folder, lambda said: None), made


def wait_for(*paths: Path) -> None:
    deadline, pause = time.monotonic() + 60, threading.Event()
    while not all(path.exists() for path in paths) and time.monotonic() < deadline:
        pause.wait(0.01)  # time.sleep is patched


@POSIX
def test_a_signal_stops_the_runs_once_and_waits_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, made = stubs(tmp_path, monkeypatch)

    def interrupted(seconds: float) -> None:
        wait_for(tmp_path / "a" / "began", tmp_path / "b" / "began")
        raise KeyboardInterrupt(15)

    monkeypatch.setattr(runs.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner()
    assert [process.returncode for process in made] == [0, 0]  # and no third was begun
    assert (tmp_path / "a" / "stopped").exists() and (tmp_path / "b" / "stopped").exists()
    assert all(os.getsid(os.getpid()) != process.pid for process in made)


@POSIX
def test_a_second_signal_ends_them_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, made = stubs(tmp_path, monkeypatch, STUB.replace("sys.exit(0)", "time.sleep(60)"))
    monkeypatch.setattr(runs, "_LOOK", 0.0)
    runner._start(waiting := [*runner.runs])
    wait_for(tmp_path / "a" / "began", tmp_path / "b" / "began")
    real = made[0].wait

    def again() -> int:
        raise KeyboardInterrupt(2)

    monkeypatch.setattr(made[0], "wait", again)
    with pytest.raises(KeyboardInterrupt):
        runner._stop()
    assert (real(), made[1].wait()) == (-9, -9) and len(waiting) == 1


@POSIX
def test_a_run_that_was_stopped_by_another_hand_stops_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 0 without results: ect.train saved and ended, since somebody told it to."""
    runner, made = stubs(tmp_path, monkeypatch, STUB.replace("time.sleep(60)", "print('Stopped; all is saved.')"))
    with pytest.raises(UserError, match=r"a: its run ended with status 0: Stopped; all is saved\. \(all of it is in "):
        runner()
    assert len(made) == 2 and all(process.poll() is not None for process in made)


def test_a_folder_with_other_things_is_left_alone(
    tmp_path: Path, here: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("x")
    before = [*tmp_path.rglob("*")]
    assert status(TINY, tmp_path) == 2
    assert f"--out {tmp_path}: a folder with other things than a study; choose another" in capsys.readouterr().err
    assert [*tmp_path.rglob("*")] == before and here == []


def test_one_process_at_a_time_works_on_a_study(
    tmp_path: Path, here: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path):
        assert status(TINY, tmp_path) == 2
    assert f"{tmp_path}: another process works in this folder (host " in capsys.readouterr().err
    assert not [*tmp_path.iterdir()] and here == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--preset nothing", "--preset nothing: no such preset"),
        ("--preset cifar10-1h", "presets with one: digits, digits-one-stage, "),
        ("--widths 10", "--widths 10: expected 1 to 20 multiples of 4 up to 4,096, each once"),
        ("--kimg 2 2", "--kimg 2.0 2.0: expected 1 to 20 lengths above 0, each once"),
        ("--kimg nan", "--kimg nan: expected a finite number"),
        ("--seeds -1", "--seeds -1: expected 1 to 20 seeds from 0 to 2^31 - 1, each once"),
        ("--jobs 0", "--jobs 0: expected at least 1"),
        ("--samples 1", "--samples 1: expected at least 2"),
        ("--nfe 4", "--nfe 4: the runs of --preset digits are rated by 1, 2 evaluations"),
        ("--metric imbalance", "--metric imbalance: expected one of FDc, FDp"),
        ("--report x --jobs 3", "--jobs 3: --report trains nothing; leave it out"),
    ],
)
def test_what_cannot_be_is_refused(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main(["--device", "cpu", *shlex.split(line)] if "--report" not in line else shlex.split(line)) == 2
    assert said in capsys.readouterr().err


def test_several_ranks_are_refused() -> None:
    with pytest.raises(UserError, match="starts processes of its own, --jobs at a time; leave torchrun out"):
        scaling.work(scaling.Options(), World(rank=0, size=2), "")


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": [], "seconds": {}}', '{"rows": 5, "about": {}, "seconds": {}}'])
def test_damaged_results_of_a_run_are_told(text: str, small: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "of_an_image", lambda cfg, data: Counted(4.0, 1.0, 10))
    folder = small.tuning(8, 4.8, 0).folder
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(text)
    with pytest.raises(
        UserError, match=r"results\.json: cannot be read \((.|\n)*\); remove .*, and it is trained again"
    ):
        small.cells()


def test_a_stretched_recipe_keeps_its_shape() -> None:
    cfg = stretched(PRESETS["digits"], 38.4)
    assert cfg.objective.stage_kimg * cfg.objective.n_stages == pytest.approx(cfg.total_kimg)
    assert (cfg.total_kimg, cfg.optim.decay_kimg, cfg.optim.warmup_kimg) == (38.4, 19.2, 3.2)
