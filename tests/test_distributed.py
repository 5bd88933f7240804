"""Two gloo processes on the CPU do what one does; signals, failures and bad input end all of them. No GPU, hence no NCCL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from ect.config import EvalConfig, OptimConfig
from ect.data import load
from ect.errors import UserError
from ect.job import Job
from ect.options import parse
from ect.ranks import device, launch
from ect.ranks.distributed import World, check_share
from ect.ranks.stop import ECHO_SECONDS, StopSignal
from ect.sample import Options, sample
from ect.show.log import RunLog
from ect.step import TrainStep
from ect.trainer import Trainer
from tests.ranks import searches
from tests.tiny import BATCH, STEPS, config, run

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
CLOCKS = ("sec_per_kimg", "seconds", "memory_bytes")
HALVES = config(
    batch_per_device=BATCH // 2,  # sums as two ranks do, so two ranks must give the same bits
    eval=EvalConfig(samples=64, batch=16),
    log=replace(config().log, eval_kimg=0.048, levels=True, weights_kimg=0.024, averages_kimg=0.024),
    optim=replace(config().optim, decay="constant", emas=("rel:.1",)),  # a trunk
)


def needs_gloo(test: Any) -> Any:
    """Marks for what starts processes, or reads what they left: they need torch.distributed with gloo, and seconds."""
    absent = sys.platform == "win32" or not torch.distributed.is_gloo_available()
    return pytest.mark.slow(pytest.mark.skipif(absent, reason="needs torch.distributed with gloo")(test))


@contextmanager
def torchrun(*command: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """Two processes; afterwards none is left, whatever happened."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*TORCHRUN, *command], cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.communicate(timeout=60)  # torchrun kills, after 30 s, what does not end by itself


def stop_in_step(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    original, count = TrainStep.__call__, [0]

    def call(self: TrainStep, nimg: int, stage: int) -> torch.Tensor:
        count[0] += 1
        if count[0] == number:
            signal.raise_signal(signal.SIGTERM)
        return original(self, nimg, stage)

    monkeypatch.setattr(TrainStep, "__call__", call)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process: `halves`, and `resumed`, which was stopped half-way."""
    folder = tmp_path_factory.mktemp("ranks")
    run(HALVES, folder / "halves")
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(patch, STEPS // 2)
        assert not Job(replace(HALVES, run_dir=folder / "resumed"), Console(quiet=True)).run()
    return folder


@pytest.fixture(scope="module")
def scenes(folder: Path) -> tuple[int, str]:
    """tests/ranks.py by two processes, in the same folder: exit status and standard error."""
    with torchrun(str(Path(__file__).with_name("ranks.py")), str(folder), cwd=folder) as process:
        _, err = process.communicate(timeout=200)
    return process.returncode, err


@pytest.fixture(scope="module")
def seen(folder: Path, scenes: tuple[int, str]) -> list[dict[str, Any]]:
    """What each rank told."""
    files = [folder / f"rank{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), scenes[1]
    return [json.loads(file.read_text()) for file in files]


def state(folder: Path, kimg: str = f"{STEPS * BATCH / 1000:010.3f}") -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{kimg}.state.safetensors")


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "stats.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in CLOCKS} for line in lines]


@needs_gloo
def test_exchanges(seen: list[dict[str, Any]]) -> None:
    for found in seen:
        assert found["sum"] == [3.0, 30.0] and found["mean"] == 0.5 and found["any"] == [True, False]
        assert found["gather"] == [0, 0, 1, 1] and found["first"] == {"rank": 0}
        assert "process 1 of 2 does not agree with process 0 on: images, nimg;" in found["refusal"]


@needs_gloo
def test_two_processes_that_accumulate_train_the_same_network(
    folder: Path, seen: list[dict[str, Any]], tmp_path: Path
) -> None:
    run(config(), tmp_path / "one")
    assert all(found["accumulated"] for found in seen)
    got, want = state(folder / "accumulated"), state(tmp_path / "one")
    assert got.keys() == want.keys()
    for name, value in want.items():
        if name.startswith(("params.", "ema0.")):
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)
    for a, b in zip(rows(folder / "accumulated"), rows(tmp_path / "one"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@needs_gloo
def test_resume_from_one_to_two_processes_ends_as_the_uninterrupted_run(
    folder: Path, seen: list[dict[str, Any]]
) -> None:
    assert all(found["resumed"] for found in seen)
    got, want = state(folder / "resumed"), state(folder / "halves")
    assert got.keys() == want.keys()
    torch.testing.assert_close(got["tally_loss"], want["tally_loss"])  # a mean of means
    assert [name for name in want.keys() - {"tally_loss"} if not torch.equal(got[name], want[name])] == []
    branch = replace(parse(["--resume", str(folder / "halves"), "--cooldown"]), total_kimg=0.096, eval=EvalConfig(0))
    run(replace(branch, run_dir=folder / "one"), folder)  # one process branches off; tests/ranks.py does it by two
    got, want = (state(folder / name, "000000.096") for name in ("cooled", "one"))
    assert all(torch.equal(got[name], want[name]) for name in want if name != "tally_loss")


@needs_gloo
def test_statistics_and_quality_are_those_of_one_process(folder: Path, seen: list[dict[str, Any]]) -> None:
    got, want = rows(folder / "resumed"), rows(folder / "halves")
    assert any("nfe2/FDc" in row for row in got) and any("levels/-1.5/A" in row for row in got)
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    results = [json.loads((folder / name / "results.json").read_text())["rows"] for name in ("resumed", "halves")]
    for a, b in zip(*results, strict=True):  # one sample that differs by one grey level would show
        assert a["values"][0] == pytest.approx(b["values"][0], rel=1e-9)


@needs_gloo
def test_samples_are_those_of_one_process(folder: Path, seen: list[dict[str, Any]], tmp_path: Path) -> None:
    sample(Options(folder / "resumed", seeds="3,7,1-9", batch=4, threads=1, out=tmp_path / "one.npz"))
    one, two = np.load(tmp_path / "one.npz"), np.load(folder / "samples.npz")
    assert two["seeds"].tolist() == [3, 7, *range(1, 10)] and np.array_equal(one["images"], two["images"])


@needs_gloo
def test_kept_weights_and_searches_are_those_of_one_process(folder: Path, seen: list[dict[str, Any]]) -> None:
    names = [f"averages/average-000000.{nimg:03}-rel.1.safetensors" for nimg in (24, 48, 72, 80)]
    names += [f"weights/weights-000000.{nimg:03}.safetensors" for nimg in (24, 48, 72)]
    for name in ("resumed", "halves"):
        paths = [path for kind in ("averages", "weights") for path in (folder / name / kind).iterdir()]
        assert sorted(path.relative_to(folder / name).as_posix() for path in paths) == names
    for name in names:
        got, want = (load_file(folder / run_dir / name) for run_dir in ("resumed", "halves"))
        assert all(torch.equal(got[key], tensor) for key, tensor in want.items())
    alone = searches(folder / "halves", World())
    assert [found["searches"] for found in seen] == [alone, alone] and len(alone["levels"]) == 1


@needs_gloo
def test_the_ranks_use_the_backends_that_work_on_all_of_them(folder: Path, seen: list[dict[str, Any]]) -> None:
    assert all(found["checked"] for found in seen)
    first, second = (found["refused"]["radam_ema=planted"] for found in seen)
    assert first == "it failed on rank 1" and "a planted failure" in second
    assert (
        json.loads((folder / "checked" / "config.json").read_text())["resolved"]["kernels"]["radam_ema"] == "reference"
    )


@needs_gloo
def test_only_rank_0_writes(folder: Path, seen: list[dict[str, Any]]) -> None:
    def names(run_dir: Path) -> list[str]:
        return sorted(path.name for path in run_dir.iterdir() if not path.name.startswith("events."))

    assert len(list((folder / "accumulated").glob("events.*"))) == 1
    whole = {name for name in names(folder / "halves") if not name.startswith("results.")}
    assert {name for name in names(folder / "resumed") if not name.startswith("results.")} - whole == {
        f"checkpoint-{STEPS // 2 * BATCH / 1000:010.3f}{kind}"
        for kind in (".json", ".safetensors", ".state.safetensors")
    }


@needs_gloo
def test_a_target_ends_all_ranks_after_the_same_step(folder: Path, seen: list[dict[str, Any]]) -> None:
    assert [found["aimed"] for found in seen] == [True, True]
    assert (folder / "aimed" / "latest").read_text().strip() == "checkpoint-000000.016"
    (crossing,) = json.loads((folder / "aimed" / "results.json").read_text())["target"]["crossings"]
    assert crossing["nimg"] == 16 and crossing["confirmed"]
    report = (folder / "aimed" / "report.md").read_text()
    assert "reached" in report and "| device | cpu, 2 processes |" in report


@needs_gloo
def test_a_signal_to_one_rank_stops_all_after_the_same_step(folder: Path, seen: list[dict[str, Any]]) -> None:
    assert [found["stopped"] for found in seen] == [False, False]
    assert (folder / "stopped" / "latest").read_text().strip() == f"checkpoint-{3 * BATCH / 1000:010.3f}"


@needs_gloo
def test_a_failing_rank_ends_the_run_with_its_own_traceback(
    folder: Path, scenes: tuple[int, str], seen: list[dict[str, Any]]
) -> None:
    status, error = scenes
    assert status != 0
    assert "rank 1 of 2 failed:\nTraceback" in error and "LookupError: a planted failure" in error
    assert 'ranks.py", line' in error and "rank 0 of 2 failed" not in error  # it only lost its partner
    assert json.loads((folder / "crashed" / "checkpoint-000000.000.json").read_text())["nimg"] == 0


@needs_gloo
def test_bad_input_is_told_once(tmp_path: Path) -> None:
    with torchrun("-m", "ect.train", "--run-dir", "run", "--batch", "9", cwd=tmp_path) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode != 0 and out == ""
    assert err.count("error: --batch 9: 2 processes cannot share it equally; choose a multiple of 2") == 1
    assert "failed:\nTraceback" not in err and not (tmp_path / "run").exists()


@needs_gloo
def test_sigterm_to_torchrun_saves_once_and_says_how_to_continue(tmp_path: Path) -> None:
    command = ["--run-dir", "run", "--pretrain", "None", "--eval.samples", "0"]
    command += ["--log.checkpoint-kimg", "0", "--log.stats-kimg", "0.1", "--log.sample-kimg", "0"]
    with torchrun("-m", "ect.train", *command, cwd=tmp_path) as process:
        stats, deadline = tmp_path / "run" / "stats.jsonl", time.monotonic() + 120
        while not (stats.is_file() and stats.stat().st_size) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert out.count("Stopped; all is saved. Continue with: python -m ect.train --resume run") == 1, err
    assert err.count("stopping after this step and saving") == 1 and "failed:\n" not in err
    assert (tmp_path / "run" / "latest").read_text().strip() != "checkpoint-000000.000"


# --- in this process ---


def test_one_process_sets_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    worlds: list[World] = []
    for size in (None, "1"):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        if size is not None:
            monkeypatch.setenv("WORLD_SIZE", size)
            monkeypatch.setenv("RANK", "0")
        assert launch.launch(lambda: 0, lambda options, world: worlds.append(world) or 5) == 5  # type: ignore[func-returns-value]
    world = worlds[0]
    assert worlds == [World(), World()] and not torch.distributed.is_initialized()
    x = torch.ones(3)
    world.sum_(x)
    assert torch.equal(x, torch.ones(3)) and world.mean(0.1) == 0.1 and world.gather(x)[0] is x
    assert world.any(True) and not world.any(False) and world.first(lambda: 7) == 7
    world.agree({"options": "x"})
    world.can_go_on(Path("run"), lambda: None, print)
    world.stop()


def test_only_whole_parts_of_a_batch() -> None:
    check_share(config(batch=12, batch_per_device=2), 3)
    check_share(config(batch=12, batch_per_device="auto"), 3)
    with pytest.raises(UserError, match="--batch 12: 5 processes cannot share it equally; choose a multiple of 5"):
        check_share(config(batch=12), 5)
    with pytest.raises(
        UserError, match="--batch-per-device 6: each of the 3 processes trains on 4 images of --batch 12"
    ):
        check_share(config(batch=12, batch_per_device=6), 3)


def test_a_gpu_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--nproc-per-node 3: this machine has 2 GPU"):
        device.resolve("cuda", World(2, 3, 2, 3))
    with pytest.raises(UserError, match="--device cuda:1: each process of torchrun takes a GPU of its own"):
        device.resolve("cuda:1", World(1, 2, 1, 2))
    assert device.resolve("cpu", World(1, 2, 1, 2)) == torch.device("cpu")
    asked: list[Any] = []
    monkeypatch.setattr(device.driver, "why_unusable", lambda index: None)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, dtype: asked.append(device))
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    assert device.resolve("cuda", World(3, 4, 1, 2)) == torch.device("cuda:1")
    assert asked == [torch.device("cuda:1")] * 2


def test_cpus_are_shared_among_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(device, "cpu_count", lambda: 6)
    for threads, processes in ((None, 1), (None, 4), (None, 8), (3, 4)):
        device.set_threads(threads, World(0, processes, 0, processes))
    assert asked == [6, 1, 1, 3]


def test_a_log_of_another_rank_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, 100, console=Console(), writes=False) as log:
        log.phase("tuning")
        log.step(8, loss=1.0)
        log.row(8, {"loss": 1.0})
        assert log.grid("nfe1", torch.zeros(4, 8, 8, 1, dtype=torch.uint8)) is None
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


@pytest.mark.slow
def test_the_echo_of_a_signal_is_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stop = StopSignal(world=World(1, 2))
    with stop.watch():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        now[0] += ECHO_SECONDS + 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


class Alone(World):
    """A rank of two that hears only itself."""

    def mean(self, value: float) -> float:
        return value

    def any(self, flag: bool) -> bool:
        return flag

    def agree(self, facts: Mapping[str, str]) -> None:
        assert facts.keys() == {"options", "images", "weights", "nimg"}
        raise UserError(facts["weights"])


@pytest.mark.slow
def test_ranks_compare_their_start_before_they_train(tmp_path: Path) -> None:
    cfg = config(optim=OptimConfig(emas=(".9", ".5")))
    told = []
    trainers = [Trainer(cfg, tmp_path, load(cfg.data), torch.device("cpu"), world=Alone(1, 2)) for _ in range(2)]
    for arena in (None, None, "params", "exp_avg_sq", "ema1"):
        trainer = trainers[len(told) > 0]
        if arena is not None:
            trainer.state.saved_arenas()[arena][3] += 1e-6
        with pytest.raises(UserError) as error, RunLog(tmp_path, 1, writes=False) as log:
            trainer.run(log)
        told.append(str(error.value))
    assert told[0] == told[1] and len(set(told)) == 4 and not list(tmp_path.iterdir())


def test_one_process_keeps_its_traceback() -> None:
    def work(options: int, world: World) -> int:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        launch.launch(lambda: 0, work)
