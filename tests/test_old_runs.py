"""Runs that version 0.1 left in tests/fixtures/v0.1: today's version resumes, samples and evaluates them.

A resumed run ends at the weights that version 0.1 reached: bit for bit with the CPU and the torch that made them. Others round
fp32 in other places; there the weights may be off by `ROUNDING` of the way that they went from the checkpoint to the end.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from ect import evaluate, sample
from ect.errors import UserError
from ect.files.checkpoint import load_model
from ect.files.old_configs import NO_PRESET, current
from ect.files.run_folder import load
from ect.job import Job, pretrain_config
from ect.options import parse
from ect.presets import PRESETS

FIXTURES = Path(__file__).parent / "fixtures" / "v0.1"
RUNS = ["two-phases", "diffusion-labels", "fp16"]
MADE_BY = ("2.14.1", "AMD EPYC", "25", "17", "1")
ROUNDING = 0.05
FIRST, LAST = "checkpoint-000000.032", "checkpoint-000000.064"


def machine() -> tuple[str, ...]:
    """Version of torch; name, family, model and stepping of the CPU, where Linux tells them."""
    info = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in info.read_text().splitlines()] if info.is_file() else []
    cpu = {name.strip(): value.strip() for name, _, value in lines}
    facts = ("model name", "cpu family", "model", "stepping")
    return torch.__version__.partition("+")[0], *(cpu.get(fact, "") for fact in facts)


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return copied(request.param, tmp_path)


def copied(name: str, to: Path) -> Path:
    return shutil.copytree(FIXTURES / name, to / name, ignore=shutil.ignore_patterns("final.safetensors"))


def cut_back_into_pretraining(folder: Path) -> None:
    """As the run was after 32 images of its diffusion phase."""
    for path in [*folder.glob("checkpoint-*"), *(folder / "pretrain").glob(f"{LAST}*"), folder / "latest"]:
        path.unlink()
    (folder / "pretrain" / "latest").write_text(f"{FIRST}\n")


def resume(folder: Path) -> None:
    assert Job(parse(["--resume", str(folder)]), Console(quiet=True)).run()


def assert_same_weights(got: Path, want: Path, start: Path, rounding: float = 0.0) -> None:
    """Two model files hold the same weights, but for rounding. start: those that the last steps began with. rounding: that is
    allowed, as a part of the way, on the machine that made them too: 0 for the operations of their time."""
    ours, theirs, before = (load_file(path) for path in (got, want, start))
    assert ours.keys() == theirs.keys()
    off, way = (
        math.sqrt(sum(float((a[name] - b[name]).double().square().sum()) for name in theirs))
        for a, b in ((ours, theirs), (before, theirs))
    )
    assert way > 0
    assert off <= (rounding if machine() == MADE_BY else ROUNDING) * way


@pytest.mark.slow
@pytest.mark.parametrize("operations", ["plain", "ops"])
def test_a_run_resumes_to_the_weights_of_its_time(run: Path, operations: str, request: pytest.FixtureRequest) -> None:
    if operations == "plain":
        request.getfixturevalue("pytorch_ops")
    resume(run)
    final, fixture = run / f"{LAST}.safetensors", FIXTURES / run.name
    start = fixture / f"{FIRST}.safetensors"
    # Half precision runs on the ops, whose reference has come to sum in another order.
    rounding = ROUNDING if operations == "ops" else 1e-4 if run.name == "fp16" else 0.0
    assert_same_weights(final, fixture / "final.safetensors", start, rounding)


@pytest.mark.slow
@pytest.mark.usefixtures("pytorch_ops")
@pytest.mark.parametrize("preset", ["digits-diffusion", NO_PRESET])
def test_a_run_resumes_in_its_diffusion_phase(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the phase is no preset of today's, and once more from the config.json that today's version wrote."""
    if preset == NO_PRESET:
        monkeypatch.delitem(PRESETS, "digits-diffusion")
    folder, fixture = copied("two-phases", tmp_path), FIXTURES / "two-phases"
    cut_back_into_pretraining(folder)
    for _ in range(2):
        cfg = parse(["--resume", str(folder)])
        assert (cfg.pretrain, cfg.pretrain_kimg) == (preset, 0.064)
        resume(folder)
        model = f"pretrain/{LAST}.safetensors"
        assert_same_weights(folder / model, fixture / model, fixture / "pretrain" / f"{FIRST}.safetensors")
        final = folder / f"{LAST}.safetensors"
        assert_same_weights(final, fixture / "final.safetensors", fixture / f"{FIRST}.safetensors")
        assert json.loads((folder / "config.json").read_text())["pretrain"] == preset
        cut_back_into_pretraining(folder)


def test_a_run_is_sampled(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "images.npz"
    sample.main([str(run), "--count", "3", "--threads", "1", "--out", str(out)])
    images = np.load(out)["images"]
    assert images.shape == (3, 8, 8, 1) and images.std() > 0


@pytest.mark.slow
def test_a_run_is_evaluated(run: Path, tmp_path: Path) -> None:
    options = ["--samples", "16", "--repeats", "1", "--mid-t", "0.8", "--run-dir", str(tmp_path / "rated")]
    evaluate.main([str(run), *options])
    rows = json.loads((tmp_path / "rated" / "metrics.json").read_text())["rows"]
    assert len(rows) == 2 and all(math.isfinite(row["values"][0]["FDc"]) for row in rows)


def test_a_model_file_is_loaded(run: Path) -> None:
    net, info = load_model(FIXTURES / run.name / "final.safetensors")
    assert info["nimg"] == 64 and net.img_resolution == 8


def test_the_options_of_a_diffusion_phase_become_a_preset() -> None:
    assert (load(FIXTURES / "two-phases").pretrain, load(FIXTURES / "two-phases").pretrain_kimg) == (
        "digits-diffusion",
        0.064,
    )
    assert load(FIXTURES / "diffusion-labels").pretrain is None  # its length was 0
    old = json.loads((FIXTURES / "two-phases" / "config.json").read_text())
    old["pretrain"]["optim"]["lr"] = 0.005
    assert current(old)["pretrain"] == NO_PRESET


def test_a_phase_that_began_goes_on_whatever_became_of_its_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied("two-phases", tmp_path)
    cfg, preset = load(folder), PRESETS["digits-diffusion"]
    objective = replace(preset.objective, P_mean=3.0)
    monkeypatch.setitem(PRESETS, "digits-diffusion", replace(preset, objective=objective))
    assert pretrain_config(cfg).objective == objective
    assert pretrain_config(cfg, folder / "not-begun").objective == objective
    assert pretrain_config(cfg, folder / "pretrain").objective == preset.objective


def test_a_configuration_of_a_later_version_is_refused() -> None:
    with pytest.raises(UserError, match="format 3: this version reads up to 2; update the package"):
        current({"format": 3})
