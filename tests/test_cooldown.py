"""Runs that branch off a trunk to cool down; the trunk stays as it is. The schedule itself is test_schedule's."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ect.config import OptimConfig
from ect.data import load
from ect.errors import UserError
from ect.files.run_folder import load as load_config
from ect.files.run_folder import to_dict
from ect.job import Job
from ect.options import parse
from ect.schedule import lr_at
from ect.show.dry_run import describe
from ect.trainer import Trainer
from tests.test_job import final_state, interrupt_after, rows
from tests.tiny import config, run

COOLED = OptimConfig(lr=1e-3, decay="cooldown", cooldown_share=0.5)
TRUNK = replace(COOLED, decay="constant", cooldown_share=0.2)


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five of ten steps, at a constant rate, and checkpoints on the way."""
    folder = tmp_path_factory.mktemp("trunk") / "run"
    run(config(optim=TRUNK, total_kimg=0.04), folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps, of which the last five cool down."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(config(optim=COOLED), folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_branch_can_be_pasted_back(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config(optim=TRUNK))))
    cfg = parse(["--resume", str(tmp_path), "--cooldown", "--total-kimg", "0.2"])
    lines = describe(cfg).splitlines()
    assert cfg.cooldown and parse(shlex.split(lines[-1].removeprefix("#"))[3:]) == cfg
    assert parse(shlex.split("\n".join(line for line in lines if not line.startswith("#")))) == cfg


@pytest.mark.slow
def test_a_branch_is_the_run_that_was_to_cool_down_from_the_start(trunk: Path, whole: Path, tmp_path: Path) -> None:
    before, branch = contents(trunk), tmp_path / "branch"
    words = ["--resume", str(trunk), "--cooldown", "--total-kimg", "0.08", "--run-dir", str(branch)]
    job = Job(parse(words), Console(quiet=True))
    assert job.run() and job.run_dir == branch
    assert contents(trunk) == before
    got, want = final_state(branch), final_state(whole)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert [row["nimg"] for row in rows(branch)] == [48, 64, 80]  # the trunk's end was the end of a row
    assert rows(branch)[1:] == rows(whole)[-2:]
    cfg = load_config(branch)
    assert (cfg.optim, cfg.total_kimg, cfg.cooldown, cfg.resume) == (COOLED, 0.08, False, None)


@pytest.mark.slow
def test_a_branch_resumes_bit_for_bit(
    trunk: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--resume", str(trunk), "--cooldown", "--total-kimg", "0.08"]
    folder = tmp_path / "branch"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert not Job(parse([*words, "--run-dir", str(folder)]), Console(quiet=True)).run()
    moved = shutil.move(trunk, tmp_path / "moved")  # a branch stands alone
    try:
        run(parse(["--resume", str(folder)]), folder)
    finally:
        shutil.move(moved, trunk)
    got, want = final_state(folder), final_state(whole)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.slow
def test_one_trunk_serves_several_lengths(trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    early = str(trunk / "checkpoint-000000.032.safetensors")
    asked = {
        ("--resume", str(trunk)): (0.056, 40 / 56),  # .04 / .8 in whole steps
        ("--resume", early): (0.04, 32 / 40),
        ("--resume", early, "--optim.cooldown-share", ".5"): (0.064, 32 / 64),
    }
    for i, (words, (total, start)) in enumerate(asked.items()):
        job = Job(parse([*words, "--cooldown"]), Console(quiet=True))
        assert job.run() and job.run_dir.resolve() == tmp_path / "runs" / f"{i:05d}-digits"
        cfg = load_config(job.run_dir)
        assert (cfg.total_kimg, cfg.optim.cooldown_share) == (total, pytest.approx(1 - start))
        last = rows(job.run_dir)[-1]
        assert (last["nimg"], last["lr"]) == (
            total * 1000,
            pytest.approx(lr_at(last["nimg"] - 8, 8, last["nimg"], cfg.optim)),
        )


@pytest.mark.slow
def test_a_branch_is_refused_in_words(trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    linear = tmp_path / "linear"
    run(config(optim=replace(TRUNK, decay="linear"), total_kimg=0.008), linear)
    here = ["--resume", str(trunk), "--cooldown"]
    first = str(trunk / "checkpoint-000000.000.safetensors")
    shutil.copytree(trunk, tmp_path / "copy")
    for words, said in {
        ("--resume", str(linear), "--cooldown"): r"found --optim\.decay linear; train the trunk",
        (*here, "--optim.decay", "linear"): r"found --optim\.decay linear; leave the option out",
        (*here, "--total-kimg", "0.03"): r"--total-kimg 0\.03: expected more than the 0\.04 kimg of",
        (*here, "--total-kimg", "0.06", "--optim.cooldown-share", ".1"): r"cooldown-share 0\.1: it follows from",
        (*here, "--pretrain", "digits-diffusion"): r"--pretrain digits-diffusion: a run that cools down",
        (*here, "--optim.lr", "1"): r"--optim\.lr: checkpoint has",
        (*here, "--run-dir", str(tmp_path / "copy")): r"--run-dir .*copy: not an empty folder",
        ("--cooldown",): r"--cooldown: expected --resume with it",
        ("--optim.cooldown-share", ".1"): r"cooldown-share 0\.1: expected 0\.2, its default, without",
    }.items():
        with pytest.raises(UserError, match=said):
            Job(parse(list(words)), Console(quiet=True))
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match="is from before the first step"):
        Job(parse(["--resume", first, "--cooldown"]), Console(quiet=True))


@pytest.mark.slow
def test_a_trunk_that_pretrained_gives_its_branch_the_teacher(tmp_path: Path) -> None:
    objective = replace(config().objective, target="teacher")
    cfg = config(pretrain="digits-diffusion", pretrain_kimg=0.016, objective=objective, optim=TRUNK, total_kimg=0.04)
    run(cfg, tmp_path / "trunk")
    branch = tmp_path / "branch"
    words = ["--resume", str(tmp_path / "trunk"), "--cooldown", "--total-kimg", ".08", "--run-dir", str(branch)]
    assert Job(parse(words), Console(quiet=True)).run()
    saved = load_config(branch)
    assert (saved.pretrain, saved.init_from) == (None, tmp_path / "trunk" / "pretrain")
    assert not (branch / "pretrain").exists() and rows(branch)[-1]["nimg"] == 80
    Trainer(replace(saved, resume=branch), branch, load(saved.data), torch.device("cpu"))  # which compares the teachers
