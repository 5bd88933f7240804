"""Numbers gone bad: what a run says of them, when it stops, and what it keeps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ect_kernels.radam_ema import SCALE_RANGE
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from ect.config import LogConfig, OptimConfig
from ect.errors import Diverged
from ect.files.checkpoint import Checkpoints, load_model
from ect.job import Job
from ect.optim import FlatState
from ect.options import parse
from ect.ranks.first_bad import all_finite
from ect.ranks.health import PATIENCE, Health
from ect.step import TrainStep
from ect.train import main
from tests.test_distributed import needs_gloo, torchrun
from tests.tiny import config, run

LOG = LogConfig(stats_kimg=0.016, sample_kimg=0, checkpoint_kimg=0.016, keep=1)
TINY = (
    "--preset digits --pretrain None --batch 8 --net.model-channels 8 --net.channel-mult 1 --net.num-blocks 1 "
    "--net.attn-resolutions --objective.n-stages 4 --eval.samples 0 --log.sample-kimg 0 --threads 1 "
    "--optim.warmup-kimg 0 --optim.decay constant --optim.decay-kimg 0 --log.stats-kimg .016 --log.checkpoint-kimg .016"
)


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int], change: Callable[[TrainStep], None]) -> None:
    """Call `change` before the updates of these numbers, counted from 0."""
    original = TrainStep.__call__

    def call(self: TrainStep, nimg: int, stage: int) -> Tensor:
        if nimg // self.batch in steps:
            change(self)
        return original(self, nimg, stage)

    monkeypatch.setattr(TrainStep, "__call__", call)


def spoil_loss(monkeypatch: pytest.MonkeyPatch, steps: set[int], value: float = math.nan) -> None:
    now = False
    original = TrainStep.loss

    def loss(self: TrainStep, i: int) -> Tensor:
        return original(self, i) * (value if now else 1.0)

    def begin(step: TrainStep) -> None:
        nonlocal now
        now = True

    monkeypatch.setattr(TrainStep, "loss", loss)
    call = TrainStep.__call__

    def one(self: TrainStep, nimg: int, stage: int) -> Tensor:
        nonlocal now
        now = nimg // self.batch in steps
        return call(self, nimg, stage)

    monkeypatch.setattr(TrainStep, "__call__", one)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]


def stems(folder: Path) -> dict[str, bool]:
    """Whether each checkpoint is healthy."""
    return {path.stem: json.loads(path.read_text())["healthy"] for path in sorted(folder.glob("checkpoint-*.json"))}


def check_finite(folder: Path) -> None:
    files = sorted(folder.glob("checkpoint-*.safetensors"))
    assert files and all(all_finite([t for t in load_file(file).values() if t.numel()]) for file in files)


@pytest.mark.slow
def test_a_learning_rate_that_is_far_too_high_ends_the_run_with_status_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main([*TINY.split(), "--total-kimg", ".4", "--optim.lr", "1e6", "--run-dir", str(folder)]) == 3
    out, err = capsys.readouterr()
    assert "the run diverged and stopped at" in err and len(err.splitlines()) == 1
    assert "a loss or most gradients were not finite since the last row" in " ".join(out.split())
    found = rows(folder)
    bad = [row["bad_steps"] > 0 for row in found]
    assert bad[-PATIENCE:] == [True] * PATIENCE and len(found) < 25 and not any(bad[:-PATIENCE])
    healthy = [stem for stem, well in stems(folder).items() if well]
    assert (folder / "latest").read_text().strip() == healthy[-1]
    assert f"last healthy checkpoint is {folder / healthy[-1]}.safetensors" in err
    assert not list(folder.glob("results*")) and not (folder / "samples.png").exists()
    check_finite(folder)
    assert load_model(folder)[1]["nimg"] == Checkpoints.load(folder)[1]["nimg"]


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_last_healthy_checkpoint_outlives_bad_ones_and_the_resume_starts_there(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cfg = tmp_path / "run", config(log=LOG)
    with monkeypatch.context() as patch:
        spoil_loss(patch, set(range(4, 99)), value)
        with pytest.raises(
            Diverged, match=r"stopped at 0\.08 kimg: .* in the last 3 row.*first bad tensor is the gradient of"
        ):
            Job(replace(cfg, run_dir=folder), Console(quiet=True)).run()
    assert [(row["loss"] is None, row["bad_steps"]) for row in rows(folder)] == [(False, 0)] * 2 + [(True, 2)] * 3
    assert stems(folder) == {
        "checkpoint-000000.032": True,
        "checkpoint-000000.064": False,
    }  # the one of 0.048 is pruned
    check_finite(folder)
    run(parse(["--resume", str(folder)]), folder)
    whole = run(cfg, tmp_path / "whole").run_dir
    got, want = (Checkpoints.load(path)[0] for path in (folder, whole))
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    assert list(stems(folder).values()) == [True]


@pytest.mark.slow
def test_rows_apart_do_not_stop_a_run_but_the_last_row_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        spoil_loss(patch, {0, 1, 3, 6})
        run(config(log=LOG), tmp_path / "run")
    found = rows(tmp_path / "run")
    assert [row["bad_steps"] for row in found] == [2, 1, 0, 1, 0]
    assert [row["loss"] is None for row in found] == [True, False, False, False, False]  # the mean of the finite ones
    spoil_loss(monkeypatch, {9})
    with pytest.raises(Diverged, match=r"in the last 1 row"):
        run(config(log=LOG), tmp_path / "last")
    assert (tmp_path / "last" / "latest").read_text().strip() == "checkpoint-000000.064"


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("arena", ["params", "exp_avg_sq", "ema0"])
def test_a_state_that_is_not_finite_is_never_saved(
    arena: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {3}, lambda step: step.state.saved_arenas()[arena][8:].fill_(value))
    with pytest.raises(Diverged, match=r"stopped at 0\.0(32|8) kimg: .*first bad tensor is (params|exp_avg_sq|ema0)\."):
        run(config(log=LOG), tmp_path / "run")
    assert (tmp_path / "run" / "latest").read_text().strip() == "checkpoint-000000.016"
    check_finite(tmp_path / "run")


@pytest.mark.slow
def test_a_tallied_interval_survives_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(log=replace(LOG, stats_kimg=0.04, checkpoint_kimg=0.032, keep=9))
    spoil_loss(monkeypatch, {1})
    run(cfg, tmp_path / "run")
    before = rows(tmp_path / "run")
    run(replace(cfg, resume=tmp_path / "run" / "checkpoint-000000.032.safetensors"), tmp_path)
    after = rows(tmp_path / "run")
    assert [row["bad_steps"] for row in before] == [1, 0]
    assert [(row["loss"], row["bad_steps"]) for row in after] == [(row["loss"], row["bad_steps"]) for row in before]


def health_of_20_weights(loss_scale: float | None) -> Health:
    return Health(SimpleNamespace(state=FlatState(nn.Linear(4, 4), loss_scale=loss_scale)))  # type: ignore[arg-type]


def update(health: Health, bad: int, loss: float = 1.0) -> None:
    """One update, `bad` of whose 20 gradient values are not finite."""
    values = torch.full((20,), 0.1)
    values[:bad] = math.nan
    health.state.load_grads([values[:16].view(4, 4), values[16:]])
    health.state.step()
    health.add(torch.tensor(loss))


@pytest.mark.parametrize(
    ("bad", "loss", "counts"), [(0, 1.0, 0), (10, 1.0, 0), (11, 1.0, 1), (0, math.inf, 1), (20, 1.0, 1)]
)
def test_an_update_is_bad_by_its_loss_or_by_most_of_its_gradients(bad: int, loss: float, counts: int) -> None:
    health = health_of_20_weights(None)
    update(health, bad, loss)
    update(health, 0)
    assert health.row() == {"loss": 1.0, "bad_steps": counts} and health.bad_rows == counts


def test_few_bad_updates_are_told_once_and_do_not_make_a_row_bad() -> None:
    """The unit of PATIENCE: a row, at least half of whose updates are bad."""
    health, said = health_of_20_weights(None), []
    for bad in ([0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 1], [1, 0, 1], [0, 1], [0, 0]):
        for one in bad:
            update(health, 20 * one)
        assert health.row()["bad_steps"] == sum(bad) and health.bad_rows == [0, 1][2 * sum(bad) >= len(bad)] + (
            bad == [0, 1]
        )
        said.append(health.judge(3000, False, Path))
    assert [text is not None for text in said] == [True, False, False, True, False, False, False]
    assert (
        said[0] is not None and "since the last row of statistics, in 1 of 3 updates; the run stops after 3 " in said[0]
    )


@pytest.mark.parametrize(
    ("rows", "last", "stops"),
    [
        ([[1], [1]], False, False), ([[1], [1], [1]], False, True), ([[1], [1], [0], [1]], False, False),
        ([[0, 0, 1]], True, True), ([[1, 0, 0]], True, False), ([[1, 1, 0]], True, False), ([[0, 0, 1], [0]], True, False),
    ],
)  # fmt: skip
def test_a_run_stops_after_three_bad_rows_or_at_a_bad_end(
    rows: list[list[int]], last: bool, stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    health, searched = health_of_20_weights(None), []
    monkeypatch.setattr("ect.ranks.health.first_bad", lambda step, nimg: searched.append(nimg))
    health.step.batch = 8
    try:
        for i, row in enumerate(rows, 1):
            for one in row:
                update(health, 20 * one)
            health.row()
            health.judge(1000 * i, last and i == len(rows), Path)
    except Diverged:
        assert stops and searched == [1000 * len(rows) - 8]  # where the last update began
    else:
        assert not stops


def test_the_sum_of_finite_losses_is_finite() -> None:
    health = health_of_20_weights(None)
    for _ in range(4):
        update(health, 0, 3e38)
    assert all_finite(health.saved()[1].values()) and health.row()["loss"] == pytest.approx(3e38)


def test_the_largest_gradient_norm_of_a_row_is_kept_over_a_resume() -> None:
    health, other = health_of_20_weights(None), health_of_20_weights(None)
    for size in (3.0, 1.0):
        health.state.grad_norm.fill_(size)
        health.add(torch.tensor(1.0))
    _, tensors, numbers = health.saved()
    other.restore(tensors, numbers)
    other.state.grad_norm.fill_(math.inf)  # of a skipped step
    other.add(torch.tensor(1.0))
    for one in (health, other):
        one.row()
        assert one.grad_norm_max == 3.0


def test_a_skipped_step_counts_only_where_the_loss_scale_can_fall_no_further() -> None:
    health = health_of_20_weights(4 * SCALE_RANGE[0])
    update(health, 20, math.nan)
    assert math.isnan(health.row()["loss"]) and health.bad_rows == 0
    update(health, 1)
    update(health, 1)
    assert health.row()["bad_steps"] == 2 and health.bad_rows == 1
    update(health, 0)
    assert health.row() == {"loss": 1.0, "bad_steps": 0} and health.bad_rows == 0


@pytest.mark.slow
def test_fp16_skips_its_first_steps_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_loss(monkeypatch, {0, 1, 2, 3, 4, 5})
    run(config(log=LOG, precision="fp16", optim=OptimConfig(lr=1e-4)), tmp_path / "run")
    found = rows(tmp_path / "run")
    assert [row["bad_steps"] for row in found] == [0] * 5 and found[-1]["skipped"] == 6
    assert found[-1]["loss_scale"] == 2.0**10 and all(stems(tmp_path / "run").values())
    check_finite(tmp_path / "run")


@pytest.mark.slow
def test_a_gpu_that_has_no_room_left_for_the_search_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: TrainStep, i: int) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    spoil(monkeypatch, {9}, lambda step: step.state.params.fill_(1e38))
    original = Health.row

    def row(self: Health) -> dict[str, Any]:
        monkeypatch.setattr(TrainStep, "loss", full)
        return original(self)

    monkeypatch.setattr(Health, "row", row)
    with pytest.raises(Diverged, match=r"row\(s\) of statistics\. The last healthy"):
        run(config(log=replace(LOG, stats_kimg=0)), tmp_path / "run")


@needs_gloo
def test_all_ranks_stop_where_one_of_them_goes_bad(tmp_path: Path) -> None:
    with torchrun("-m", "tests.diverging_ranks", str(tmp_path), "loss", cwd=tmp_path) as process:
        _, err = process.communicate(timeout=120)
    said = [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]
    assert process.returncode != 0 and all(
        text.startswith("Diverged: the run diverged and stopped at 0.08") and "tensor is the gradient of model." in text
        for text in said
    )
    assert err.count("error: the run diverged") == 1 and "exitcode  : 3" in err
    assert stems(tmp_path / "run") == {"checkpoint-000000.032": True, "checkpoint-000000.064": False}
    assert (tmp_path / "run" / "latest").read_text().strip() == "checkpoint-000000.032"
    assert [row["bad_steps"] for row in rows(tmp_path / "run")] == [0, 0, 2, 2, 2]
    check_finite(tmp_path / "run")
