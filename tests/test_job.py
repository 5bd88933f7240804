"""Whole runs: files, resume bit for bit, refusals, signals, and quality of a short digits job."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from ect.config import Config, DataConfig, EvalConfig, ObjectiveConfig, OptimConfig
from ect.errors import Diverged, UserError
from ect.files.checkpoint import load_model, read_model
from ect.files.run_folder import new_run_dir
from ect.job import Job, pretrain_config
from ect.options import parse
from ect.presets import PRESETS
from ect.step import TrainStep
from ect.train import main
from tests.tiny import BATCH, STEPS, config, run

CLOCKS = ("sec_per_kimg", "seconds", "memory_bytes")


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{STEPS * BATCH / 1000:010.3f}.state.safetensors")


def rows(folder: Path) -> list[dict]:
    """stats.jsonl without what a clock or the memory counter says."""
    lines = (folder / "stats.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in lines]


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Behave as if Ctrl-C came during that step."""
    count, original = [0], TrainStep.__call__

    def call(self, nimg, stage):  # type: ignore[no-untyped-def]
        count[0] += 1
        if count[0] == steps:
            signal.raise_signal(signal.SIGINT)
        return original(self, nimg, stage)

    monkeypatch.setattr("ect.step.TrainStep.__call__", call)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(config(), folder)
    return folder


@pytest.mark.slow
def test_a_run_leaves_its_files(uninterrupted: Path) -> None:
    names = {p.name for p in uninterrupted.iterdir()}
    assert {"config.json", "stats.jsonl", "latest", "samples.png", "results.md", "results.json"} <= names
    assert {"nfe1-000000.000.png", "nfe2-000000.000.png", "nfe2-000000.080.png"} <= names
    stats = rows(uninterrupted)
    assert [row["nimg"] for row in stats] == [16, 32, 48, 64, 80]
    assert [row["stage"] for row in stats] == [0, 1, 1, 2, 3]
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 and row["nonfinite"] == 0 for row in stats)
    model = read_model(uninterrupted)
    assert model.info["nimg"] == 80 and model.info["data"] == "digits" and model.spec["precond"] == "ECMPrecond"


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [1, 5, 9])
def test_resume_continues_bit_for_bit(uninterrupted: Path, stop_at: int, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, stop_at)
        job = Job(config(run_dir=folder), Console(quiet=True))
        assert not job.run()
    assert (folder / "latest").read_text().strip() == f"checkpoint-{stop_at * BATCH / 1000:010.3f}"
    run(parse(["--resume", str(folder)]), folder)
    got, want = final_state(folder), final_state(uninterrupted)
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name
    assert rows(folder) == rows(uninterrupted)
    assert torch.equal(*(read_model(f).state["model.map_layer0.weight"] for f in (folder, uninterrupted)))


@pytest.mark.slow
def test_resume_from_an_older_checkpoint(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(config(), folder)
    before = final_state(folder)
    run(parse(["--resume", str(folder / "checkpoint-000000.032.safetensors")]), folder)
    for name, value in final_state(folder).items():
        assert torch.equal(value, before[name])
    assert rows(folder) == rows(uninterrupted)


@pytest.mark.slow
def test_resume_through_both_phases(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    cfg = config(pretrain="digits-diffusion", pretrain_kimg=0.08)
    whole = tmp_path / "whole"
    run(cfg, whole)
    for stop_at in (4, 14):  # in the first phase, in the second
        folder = tmp_path / f"run{stop_at}"
        with monkeypatch.context() as patch:
            interrupt_after(patch, stop_at)
            assert not Job(replace(cfg, run_dir=folder), Console(quiet=True)).run()
        run(parse(["--resume", str(folder)]), folder)
        for phase in (".", "pretrain"):
            got, want = final_state(folder / phase), final_state(whole / phase)
            assert all(torch.equal(got[name], want[name]) for name in want)
            assert rows(folder / phase) == rows(whole / phase)


def test_resume_refuses_other_maths_by_name(uninterrupted: Path) -> None:
    cfg = parse(["--resume", str(uninterrupted), "--objective.q", "4", "--optim.lr", "0.5", "--log.stats-kimg", "9"])
    with pytest.raises(UserError) as refusal:
        Job(cfg, Console(quiet=True)).run()
    text = str(refusal.value)
    assert "--objective.q: checkpoint has 2.0, command line says 4.0" in text and "--optim.lr" in text
    assert "stats" not in text


@pytest.mark.slow
def test_resume_refuses_another_pretraining_by_its_own_name(tmp_path: Path) -> None:
    run(config(pretrain="digits-diffusion", pretrain_kimg=0.016), tmp_path / "run")
    cfg = parse(["--resume", str(tmp_path / "run"), "--pretrain", "edm-cifar10"])
    with pytest.raises(
        UserError, match='--pretrain: checkpoint has "digits-diffusion", command line says "edm-cifar10"'
    ):
        Job(cfg, Console(quiet=True))


@pytest.mark.slow
def test_a_longer_run_remembers_its_length(uninterrupted: Path, tmp_path: Path) -> None:
    folder, optim = tmp_path / "run", OptimConfig(lr=1e-3)
    run(config(optim=optim), folder)
    run(parse(["--resume", str(folder), "--total-kimg", "0.096"]), folder)
    assert parse(["--resume", str(folder)]).total_kimg == 0.096
    assert read_model(folder).info["nimg"] == 96


@pytest.mark.slow
def test_a_stop_during_the_report_is_made_up_for(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "run"
    job = Job(config(run_dir=folder), Console(quiet=True))
    with monkeypatch.context() as patch:
        original = Job.finish

        def finish(self, models):  # type: ignore[no-untyped-def]
            signal.raise_signal(signal.SIGTERM)
            return original(self, models)

        patch.setattr(Job, "finish", finish)
        assert not job.run()
    assert not (folder / "results.json").exists()
    run(parse(["--resume", str(folder)]), folder)
    assert (folder / "results.json").exists()


@pytest.mark.slow
def test_an_impatient_user_gets_out(tmp_path: Path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    def step(self, nimg, stage):  # type: ignore[no-untyped-def]
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("ect.step.TrainStep.__call__", step)
    assert main(["--run-dir", str(tmp_path / "run"), "--pretrain", "None"]) == 130
    assert "last checkpoint" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_resume_refuses_other_data(uninterrupted: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    job = Job(parse(["--resume", str(uninterrupted)]), Console(quiet=True))
    job.dataset = replace(job.dataset, images=255 - job.dataset.images)
    with pytest.raises(UserError, match=r"--data\.source: digits holds other images"):
        job.run()


@pytest.mark.slow
def test_micro_batches_train_the_same_network(uninterrupted: Path, tmp_path: Path) -> None:
    run(config(batch_per_device=4), tmp_path / "run")
    got, want = final_state(tmp_path / "run"), final_state(uninterrupted)
    for name in want:
        if name.startswith("params."):
            torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_init_from_takes_architecture_from_the_checkpoint(uninterrupted: Path, tmp_path: Path) -> None:
    other = replace(config().net, model_channels=32, dropout=0.25)
    job = run(config(init_from=uninterrupted, net=other), tmp_path / "run")
    model = read_model(job.run_dir)
    assert model.spec["kwargs"]["model_channels"] == 8 and model.spec["kwargs"]["dropout"] == 0.25
    first = read_model(tmp_path / "run" / "checkpoint-000000.032.safetensors")
    assert first.state.keys() == read_model(uninterrupted).state.keys()


@pytest.mark.slow
def test_init_from_starts_at_the_teachers_weights(uninterrupted: Path, tmp_path: Path) -> None:
    cfg = config(init_from=uninterrupted, optim=OptimConfig(lr=1e-30), log=replace(config().log, keep=9))
    run(cfg, tmp_path / "run")
    teacher = read_model(uninterrupted).state
    for name, value in read_model(tmp_path / "run").state.items():
        torch.testing.assert_close(value, teacher[name], rtol=1e-6, atol=1e-7)


def test_init_from_refuses_another_image_size(uninterrupted: Path, tmp_path: Path) -> None:
    cfg = config(init_from=uninterrupted, data=DataConfig(resolution=16), run_dir=tmp_path / "run")
    with pytest.raises(UserError, match=r"the network is for 8x8 images with 1 channel.*16x16"):
        Job(cfg, Console(quiet=True)).run()
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["ddpmpp", "ncsnpp", "adm", "edm2"])
@pytest.mark.parametrize("kind", ["consistency", "diffusion"])
def test_every_network_trains_with_both_objectives_and_every_option(arch: str, kind: str, tmp_path: Path) -> None:
    cfg = config(
        total_kimg=0.016,
        net=replace(config().net, arch=arch, model_channels=16, label_dropout=0.1),
        data=DataConfig(labels=True, xflip=True, augment=0.0 if arch == "edm2" else 0.2),
        objective=ObjectiveConfig(kind=kind, mapping="const", c=0.03, weighting="inverse_c_out_sq"),  # type: ignore[arg-type]
        optim=OptimConfig(clip=1.0, optimizer="adam"),
        batch_per_device=4,
        eval=EvalConfig(samples=0, mid_t=(5.0, 0.8)),
    )
    folder = tmp_path / "run"
    run(cfg, folder)
    net, info = load_model(folder)
    assert net.label_dim == 10 and info["mid_t"] == [5.0, 0.8]
    assert (folder / ("nfe3-000000.016.png" if kind == "consistency" else "nfe35-000000.016.png")).is_file()


@pytest.mark.slow
def test_evaluation_at_intervals_goes_to_the_statistics(tmp_path: Path) -> None:
    cfg = config(eval=EvalConfig(samples=64, batch=32), log=replace(config().log, eval_kimg=0.032))
    run(cfg, tmp_path / "run")
    found = [row for row in rows(tmp_path / "run") if "nfe1/FDc" in row]
    assert [row["nimg"] for row in found] == [32, 64]
    assert found[0]["nfe1/FDc"] != found[0]["nfe2/FDc"]
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [row["sampler"]["nfe"] for row in result["rows"]] == [1, 2]
    assert "tuning" not in result["seconds"] and result["seconds"]["training"] > 0


def test_run_folders(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    assert [new_run_dir(Config()).name for _ in range(2)] == ["00000-digits", "00001-digits"]
    (tmp_path / "mine").mkdir()
    assert new_run_dir(Config(run_dir=Path("mine"))) == Path("mine")
    (tmp_path / "mine" / "x").touch()
    with pytest.raises(UserError, match="--run-dir mine: not an empty folder"):
        new_run_dir(Config(run_dir=Path("mine")))


@pytest.mark.slow
def test_non_finite_gradients_are_reported(tmp_path: Path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    def loss(self, denoiser, y, normal, eps, stage):  # type: ignore[no-untyped-def]
        return denoiser(y, normal.exp()).flatten(1).sum(1) * float("inf")

    monkeypatch.setattr("ect.objective.ConsistencyObjective.train_loss", loss)
    monkeypatch.setattr("ect.models.fused.wanted", lambda choice, x: False)  # the ops have a loss of their own
    with pytest.raises(Diverged):
        Job(config(run_dir=tmp_path / "run"), Console()).run()
    assert "non-finite gradient values were replaced" in capsys.readouterr().out
    assert rows(tmp_path / "run")[-1]["nonfinite"] > 0
    assert rows(tmp_path / "run")[-1]["loss"] is None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to send")
def test_sigterm_saves_and_exits_0_with_a_hint(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "ect.train",
        "--run-dir",
        "run",
        "--eval.samples",
        "0",
        "--log.checkpoint-kimg",
        "0",
    ]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    stats = tmp_path / "run" / "pretrain" / "stats.jsonl"
    deadline = time.monotonic() + 120
    while not (stats.is_file() and stats.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "--resume run" in out
    assert json.loads(next((tmp_path / "run" / "pretrain").glob("checkpoint-*.json")).read_text())["nimg"] >= 0
    assert (tmp_path / "run" / "pretrain" / "latest").read_text().strip() != "checkpoint-000000.000"


def test_bad_device_is_named(tmp_path: Path) -> None:
    for name in ("cuda:77", "tpu9"):
        with pytest.raises(UserError, match=f"--device {name}: not usable here"):
            Job(config(device=name, run_dir=tmp_path / "run"), Console(quiet=True))


def test_pretraining_is_the_same_trainer_with_another_objective() -> None:
    cfg = pretrain_config(PRESETS["digits"])
    assert cfg.objective.kind == "diffusion" and cfg.optim.lr == 4e-3 and cfg.pretrain is None


@pytest.mark.slow
def test_a_resume_at_the_end_removes_what_a_kill_left_of_the_last_prune(tmp_path: Path) -> None:
    folder = run(config(), tmp_path / "run").run_dir
    before = {path.name for path in folder.iterdir()}
    for kind in (".safetensors", ".state.safetensors"):  # its manifest went first
        shutil.copy(folder / f"checkpoint-000000.080{kind}", folder / f"checkpoint-000000.000{kind}")
    run(config(resume=folder), folder)
    assert {path.name for path in folder.iterdir() if not path.name.startswith("events.")} == {
        name for name in before if not name.startswith("events.")
    }


@pytest.mark.slow
def test_a_short_digits_job_shows_the_gain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of the recipe: two evaluations of ECT beat nine of the diffusion model it came from, by far in pixels."""
    cfg = PRESETS["digits"]

    def shorten(optim: OptimConfig) -> OptimConfig:
        return replace(optim, warmup_kimg=optim.warmup_kimg / 5, decay_kimg=optim.decay_kimg / 5)

    cfg = replace(
        cfg,
        total_kimg=15.36,
        objective=replace(cfg.objective, stage_kimg=cfg.objective.stage_kimg / 5),
        optim=shorten(cfg.optim),
        pretrain_kimg=15.36,
        eval=replace(cfg.eval, samples=1000),
    )
    first = PRESETS["digits-diffusion"]
    monkeypatch.setitem(PRESETS, "digits-diffusion", replace(first, optim=shorten(first.optim)))
    run(cfg, tmp_path / "run")
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    figures = {row["sampler"]["nfe"]: row["values"][0] for row in result["rows"]}
    assert list(figures) == [35, 9, 3, 1, 2]
    print({nfe: (round(v["FDc"], 1), round(v["FDp"], 3)) for nfe, v in figures.items()})
    assert figures[2]["FDc"] < 0.9 * figures[9]["FDc"] and figures[2]["FDp"] < 0.4 * figures[9]["FDp"]
    assert figures[1]["FDc"] < 0.5 * figures[3]["FDc"]


@pytest.mark.parametrize("choice", ["perturb=cuda", "levels=apex", "*=cuda"])
def test_a_backend_asked_for_by_name_that_cannot_run_is_refused(
    choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not train without a word on something else."""
    with pytest.raises(UserError, match=r"^--kernels .*: backend '(cuda|apex)' cannot run: .*; have: reference"):
        Job(config(run_dir=tmp_path / "run", kernels=choice), Console(quiet=True))
    monkeypatch.setenv("ECT_KERNELS", choice)
    with pytest.raises(UserError, match=r"^ECT_KERNELS: "):
        Job(config(run_dir=tmp_path / "run"), Console(quiet=True))
    assert not list(tmp_path.iterdir())


def test_a_job_says_what_it_trains_on_and_which_options_do_nothing(tmp_path: Path) -> None:
    net = replace(config().net, attn_resolutions=(8, 5), label_dropout=0.1)
    console = Console(record=True, width=200, quiet=False, file=io.StringIO())
    Job(replace(config(net=net), run_dir=tmp_path / "run"), console)
    lines = console.export_text().splitlines()
    assert "digits: 1,797 images, 8x8 grey, no labels" in lines
    assert "--net.attn-resolutions 5: no level of the network has this size, but 8" in lines
    assert "--net.label-dropout 0.1: there are no labels to drop; give --data.labels" in lines
