"""Whole runs into which NaN and inf are put: they stop, name what went bad, and no file holds such a number."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ect_kernels.radam_ema import SCALE_RANGE

from ect.config import Config, DataConfig, ObjectiveConfig, OptimConfig
from ect.errors import Diverged, UserError
from ect.files.checkpoint import Checkpoints, read_model
from ect.options import parse
from ect.step import TrainStep
from tests.test_distributed import needs_gloo, torchrun
from tests.test_first_bad import spoil_output
from tests.test_health import LOG, check_finite, spoil, spoil_loss, stems
from tests.tiny import config, run

THREE = OptimConfig(emas=(".9", ".99", ".999"))
FIRST_BAD = 4  # the number of the first update that is spoiled
FIFTH = 5 * 8 / 1000


def half(cfg: Config) -> Config:
    return replace(cfg, precision="fp16")


def into(name: str, value: float) -> Callable[[TrainStep], None]:
    """Put a value into a tensor of the state."""

    def change(step: TrainStep) -> None:
        tensor = step.state.loss_scale if name == "loss_scale" else step.state.saved_arenas()[name]
        assert tensor is not None
        tensor.view(-1)[-1 if tensor.dim() == 0 else 8 :] = value

    return change


def labels(step: TrainStep, value: float) -> None:
    assert step.stream.labels is not None
    step.stream.labels[:] = value


def gradient(step: TrainStep, value: float) -> None:
    for parameter in step.state.inputs:
        parameter.register_hook(lambda grad: torch.full_like(grad, value))


def activation(step: TrainStep, value: float) -> None:
    spoil_output(step.net.get_submodule("model.enc.8x8_block0.conv1"), value)


def at_the_floor(step: TrainStep, value: float) -> None:
    assert step.state.loss_scale is not None
    step.state.loss_scale.fill_(SCALE_RANGE[0])
    activation(step, value)


KINDS: dict[str, tuple[Callable[[TrainStep, float], None], Config, str]] = {
    "data": (labels, config(data=DataConfig(labels=True)), "class_labels, an input of model"),
    "activation": (activation, config(), "the output of model.enc.8x8_block0.conv1"),
    "activation, accumulated": (activation, config(batch_per_device=4), "the output of model.enc.8x8_block0.conv1"),
    "gradient": (gradient, config(), "the gradient of model.map_layer0.weight"),
    "fp16 at the scale's floor": (at_the_floor, half(config()), "the output of model.enc.8x8_block0.conv1"),
}


def one_in_all(folder: Path) -> None:
    """Every checkpoint is finite, in each of its files; and so is what a resume and a sampler take."""
    check_finite(folder)
    assert (folder / "latest").read_text().strip() == "checkpoint-000000.032"
    assert Checkpoints.load(folder)[1]["nimg"] == read_model(folder).info["nimg"] == 32


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_goes_bad_stops_the_run_and_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, cfg, name = KINDS[kind]
    value = math.inf if "activation" in kind else math.nan
    spoil(monkeypatch, {FIRST_BAD}, lambda step: change(step, value))
    with pytest.raises(Diverged, match=rf"^the run diverged and stopped at 0\.08 kimg: .*tensor is {name}\. The last"):
        run(replace(cfg, log=replace(LOG, keep=9)), tmp_path / "run")
    one_in_all(tmp_path / "run")
    for page in ("report.md", "report.html"):
        assert "The run diverged and stopped at 0.08 kimg: " in (tmp_path / "run" / page).read_text()
    rows = [json.loads(line) for line in (tmp_path / "run" / "stats.jsonl").read_text().splitlines()]
    assert [row["bad_steps"] for row in rows] == [0, 0, 2, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "value"),
    [("ema0", math.inf), ("ema1", math.nan), ("ema2", -math.inf), ("loss_scale", math.nan), ("loss_scale", math.inf)],
)
def test_a_state_with_such_a_number_is_never_saved(
    place: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An infinite loss scale is bounded by the step itself, as one that overflows is."""
    spoil(monkeypatch, {FIRST_BAD}, into(place, value))
    cfg = config(log=replace(LOG, keep=9), optim=THREE)
    if place == "loss_scale" and value == math.inf:
        run(half(cfg), tmp_path / "run")
        check_finite(tmp_path / "run")
        return
    with pytest.raises(Diverged, match=rf"the loss scale are not finite; the first bad tensor is {place}"):
        run(half(cfg) if place == "loss_scale" else cfg, tmp_path / "run")
    one_in_all(tmp_path / "run")


@pytest.mark.slow
def test_a_teacher_that_goes_bad_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = run(config(log=LOG, objective=ObjectiveConfig(kind="diffusion")), tmp_path / "teacher").run_dir

    def change(step: TrainStep) -> None:
        assert step.teacher is not None
        step.teacher.get_parameter("model.enc.8x8_conv.weight").view(-1)[0] = math.nan

    spoil(monkeypatch, {FIRST_BAD}, change)
    objective = ObjectiveConfig(n_stages=4, stage_kimg=0.024, target="teacher")
    with pytest.raises(Diverged, match=r"tensor is the teacher's model\.enc\.8x8_conv\.weight\."):
        run(config(log=replace(LOG, keep=9), objective=objective, init_from=model), tmp_path / "run")
    one_in_all(tmp_path / "run")


@pytest.mark.slow
def test_bad_updates_here_and_there_do_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the public code, which puts numbers in their place and goes on."""
    log = replace(LOG, stats_kimg=FIFTH)
    with monkeypatch.context() as patch:
        spoil_loss(patch, {0, 3, 6})
        folder = run(config(log=log), tmp_path / "run").run_dir
    assert [json.loads(line)["bad_steps"] for line in (folder / "stats.jsonl").read_text().splitlines()] == [2, 1]
    check_finite(folder)
    spoil_loss(monkeypatch, {9})
    with pytest.raises(Diverged, match=r"in the last 1 row\(s\)"):
        run(config(log=log), tmp_path / "last")


@pytest.mark.slow
@pytest.mark.parametrize("named", [False, True])
def test_a_resume_refuses_a_state_that_is_not_finite(named: bool, tmp_path: Path) -> None:
    """Version 0.1 wrote such. What is only shown may be anything."""
    folder = run(config(log=replace(LOG, keep=9)), tmp_path / "run").run_dir
    for path in folder.glob("checkpoint-000000.080*"):
        path.unlink()
    tensors, meta, model = Checkpoints.load(folder / "checkpoint-000000.064.safetensors")
    snapshot = read_model(model)

    def write(changes: dict[str, Any]) -> None:
        Checkpoints(folder, 9).save(
            meta["nimg"], snapshot.state, snapshot.spec, snapshot.info, {**tensors, **changes}, meta
        )

    before = sorted(folder.iterdir())
    write({"exp_avg.model.map_layer0.bias": torch.full_like(tensors["exp_avg.model.map_layer0.bias"], math.nan)})
    with pytest.raises(UserError, match=r"64\.safetensors: exp_avg\.model\.map_layer0\.bias holds NaN"):
        run(parse(["--resume", str(model if named else folder)]), folder)
    assert sorted(folder.iterdir()) == before
    nan = torch.tensor(math.nan, dtype=torch.float64)
    write({"grad_norm": nan, "tally_loss": nan})
    run(parse(["--resume", str(model if named else folder)]), folder)
    for path in folder.glob("checkpoint-000000.064*"):
        path.unlink()
    check_finite(folder)


@needs_gloo
@pytest.mark.slow
def test_one_rank_whose_average_goes_bad_stops_all(tmp_path: Path) -> None:
    with torchrun("-m", "tests.diverging_ranks", str(tmp_path), "average", cwd=tmp_path) as process:
        _, err = process.communicate(timeout=120)
    said = [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]
    assert all("the loss scale are not finite; the first bad tensor is ema0.model." in text for text in said)
    assert err.count("error: the run diverged") == 1 and "exitcode  : 3" in err
    assert stems(tmp_path / "run") == {"checkpoint-000000.032": True}
    one_in_all(tmp_path / "run")
