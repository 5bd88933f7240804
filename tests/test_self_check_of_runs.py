"""The self-check of whole runs: a run goes on without what failed, writes it down, and a resume keeps it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from ect_kernels import check, dispatch
from rich.console import Console
from safetensors.torch import load_file

from ect import evaluate, sample
from ect.data import load
from ect.errors import UserError
from ect.files.checkpoint import load_model
from ect.files.run_folder import resolved
from ect.job import Job
from ect.options import parse
from ect.ranks import self_check
from ect.ranks.distributed import World
from ect.trainer import Trainer
from tests.planted import NAME, off_by_2_percent, plant, sound
from tests.tiny import config, run

CPU = torch.device("cpu")
DIGITS = Path(__file__).parents[1] / "ect/models/digits.safetensors"


@pytest.fixture(autouse=True)
def _nothing_refused() -> Iterator[None]:
    yield
    dispatch.clear_refused()
    dispatch.set_choice(None)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ect.trainer.Trainer.grids", lambda self: None)
    monkeypatch.setattr("ect.show.comparison.SEEDS", range(1))


def checked(**changes: Any) -> Any:
    return config(self_check=True, total_kimg=0.016, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run whose optimizer's first choice is wrong: its folder, and what it said."""
    folder, said = tmp_path_factory.mktemp("whole") / "run", StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ect.trainer.Trainer.grids", lambda self: None)
        plant(patch, "radam_ema", off_by_2_percent)
        assert Job(checked(run_dir=folder), Console(file=said, width=10_000)).run()
    dispatch.clear_refused()
    return folder, said.getvalue()


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_run_goes_on_without_what_failed_and_writes_it_down(
    whole: tuple[Path, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, out = whole
    found = resolved(folder)
    assert found["kernels"]["radam_ema"] == "reference" and found["device"] == "cpu"
    assert list(found["refused"]) == [f"radam_ema={NAME}"] and not found["compile"] and not found["graph"]
    said = f"self-check: radam_ema: {NAME} failed and is not used: radam_ema(params"
    assert said in out and said in (folder / "results.md").read_text()
    assert json.loads((folder / "results.json").read_text())["checked"][0].startswith(said)
    request.getfixturevalue("pytorch_ops")  # as with the planted backend, beside which there is no other
    run(config(total_kimg=0.016), tmp_path / "plain")
    got, want = (load_file(f / "checkpoint-000000.016.state.safetensors") for f in (folder, tmp_path / "plain"))
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_resume_keeps_what_was_refused_or_says_what_changed(
    whole: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    plant(monkeypatch, "radam_ema", sound)  # which would pass now
    kept = run(parse(["--resume", str(folder)]), folder)
    assert resolved(folder) == resolved(whole[0]) and not any("before" in line for line in kept.checked)
    dispatch.clear_refused()
    values = json.loads((folder / "config.json").read_text())
    values["resolved"]["device"] = "another GPU"
    (folder / "config.json").write_text(json.dumps(values))
    told = run(parse(["--resume", str(folder)]), folder).checked
    assert "device: cpu, before the resume another GPU" in told
    assert f"radam_ema: on {NAME}, before the resume on reference" in told
    assert resolved(folder)["refused"] == {}


def test_a_device_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    recorded = {"device": "NVIDIA H100", "refused": {"levels=triton": "it failed"}}
    self_check.keep(recorded, torch.device("cuda"))
    assert dispatch.refused(torch.device("cuda", 0)) == {("levels", "triton"): "it failed"}


def test_a_name_stands_above_what_was_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = {"device": "cpu", "refused": {"levels=emulated": "it failed", "gone=cuda": "it failed"}}
    dispatch.set_choice("levels=emulated")
    self_check.keep(recorded, CPU)
    assert dispatch.refused(CPU) == {}
    dispatch.set_choice(None)
    self_check.keep(recorded, CPU)
    assert dispatch.refused(CPU) == {("levels", "emulated"): "it failed"}


def test_a_backend_asked_for_by_name_is_refused_before_anything_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, "radam_ema", off_by_2_percent)
    monkeypatch.setattr(dispatch, "NAMES", (*dispatch.NAMES, NAME))
    with pytest.raises(UserError, match=f"--kernels: radam_ema: backend '{NAME}' failed its check: .*params: "):
        Job(checked(run_dir=tmp_path / "run", kernels=f"radam_ema={NAME}"), Console(quiet=True)).run()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_no_self_check_checks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "check", pytest.fail)
    cfg = replace(checked(), self_check=False)
    assert Trainer(cfg, tmp_path, load(cfg.data), CPU).checked == []


def test_the_ops_of_the_network_are_those_that_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(check, "check", lambda calls, *rest: seen.append(calls))
    dispatch.set_choice("*=reference")
    cfg = checked(kernels="*=reference")
    Trainer(cfg, tmp_path, load(cfg.data), CPU)
    (calls,) = seen
    functions = {call.function for call in calls}
    norms = {f"{op}{way}" for op in ("group_norm_silu", "residual_group_norm_silu") for way in ("", "_bwd")}
    assert functions == norms | {"levels", "perturb", "consistency_loss", "radam_ema"}


def test_a_refused_start_takes_no_number_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "radam_ema", off_by_2_percent)
    monkeypatch.setattr(dispatch, "NAMES", (*dispatch.NAMES, NAME))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="failed its check"):
        Job(checked(run_dir=None, kernels=f"radam_ema={NAME}"), Console(quiet=True)).run()
    assert not list(tmp_path.iterdir())


def test_images_are_made_on_ops_that_were_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    net, _ = load_model(DIGITS)
    assert self_check.of_sampling(net, CPU) == []
    gpu = torch.device("cuda")
    seen: list[str] = []

    def failing(calls: Any, device: torch.device, world: World) -> list[str]:
        seen.extend(call.function for call in calls)
        dispatch.refuse("group_norm_silu", "triton", device, "y: off")
        return []

    monkeypatch.setattr(self_check, "_ops", failing)
    line = "group_norm_silu: triton failed its check and is not used: y: off"
    assert self_check.of_sampling(net, gpu) == [line]
    assert set(seen) == {"group_norm_silu", "residual_group_norm_silu"}
    assert next(net.parameters()).device.type == "cpu" and net.model.on_ops is None


@pytest.mark.slow
@pytest.mark.parametrize("command", [sample, evaluate])
def test_sampling_and_evaluation_check_theirs(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(self_check, "of_sampling", lambda net, device, world: ["an op: failed"])
    options = ["--samples", "4"] if command is evaluate else ["--seeds", "0-3", "--out", str(tmp_path / "x.png")]
    monkeypatch.chdir(tmp_path)
    command.main([str(DIGITS), "--device", "cpu", *options])
    assert "an op: failed" in capsys.readouterr().out
