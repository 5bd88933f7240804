"""The diagnosis by noise level: its sums by hand, on every path of a step, and over ranks; rows and picture of a run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from ect.config import LogConfig, ObjectiveConfig
from ect.job import Job
from ect.objective import ConsistencyObjective, Mapping
from ect.objectives.distillation import ConsistencyDistillation
from ect.objectives.gaps import BINS, LOW, Gaps, Level, means
from ect.options import parse
from ect.ranks.distributed import World
from ect.show import levels
from ect.step import TrainStep
from tests.test_job import interrupt_after, rows
from tests.test_step import make, put
from tests.tiny import config, run

CPU = torch.device("cpu")
LEVELS = LogConfig(stats_kimg=0.016, sample_kimg=0, checkpoint_kimg=0.032, levels=True)


def alone(part: Tensor) -> list[Tensor]:
    return [part]


def pairs(n: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return t, r, D_t, target, y."""
    g = torch.Generator().manual_seed(0)
    t = (2 * torch.randn(n, generator=g)).exp()
    r = torch.where(torch.arange(n) % 5 == 0, 0.0, 0.8 * t)
    D_t, target, y = (torch.randn(n, 1, 4, 4, generator=g) for _ in range(3))
    return t, r, D_t, target, y


def test_the_means_by_hand() -> None:
    t, r, D_t, target, y = pairs()
    gaps = Gaps(CPU)
    for half in (slice(0, 25), slice(25, 40)):
        gaps.add(t[half], r[half], D_t[half], target[half], y[half])
    got = gaps.row(alone)
    by_bin: dict[int, list[tuple[float, float, float]]] = {}
    for i in range(len(t)):
        gap, difference = float(t[i] - r[i]), (D_t[i] - target[i]).double().flatten()
        A, B = float(difference @ (D_t[i] - y[i]).double().flatten()) / gap, float(difference @ difference) / gap**2
        by_bin.setdefault(math.floor(math.log(t[i])), []).append((A, B, gap))
    assert len(by_bin) > 4
    want = {
        f"levels/{place + 0.5}/{name}": value
        for place, found in by_bin.items()
        for name, value in zip(("A", "B", "gap", "images"), [*np.mean(found, axis=0), len(found)], strict=True)
    }
    assert got == pytest.approx(want, rel=1e-5)
    assert gaps.row(alone) == {} and gaps.sums.abs().sum() == 0


def test_a_gap_is_suggested_back_where_answers_are_straight() -> None:
    """Where D moves with v per unit of t, and y is where it would be at 0, A / B is t itself: any gap would do."""
    t = torch.full([8], 3.0)
    v = torch.randn(8, 1, 4, 4)
    gaps = Gaps(CPU)
    gaps.add(t, 0.9 * t, 3.0 * v, 2.7 * v, torch.zeros_like(v))
    (level,) = means([gaps.row(alone)]).values()
    assert level.suggested == pytest.approx(3) and level.gap == pytest.approx(0.3) and level.images == 8
    assert math.isnan(Level(1.0, 0.0, 1.0, 1.0).suggested)


def test_what_is_not_finite_or_far_out_spoils_no_bin() -> None:
    t, _, D_t, target, y = pairs(4)
    D_t[1, 0, 0, 0] = math.inf
    t[2], t[3] = 1e-9, 1e9
    gaps = Gaps(CPU)
    gaps.add(t, torch.zeros_like(t), D_t, target, y)
    assert gaps.sums.isfinite().all() and gaps.sums[:, -1].sum() == 3
    assert gaps.sums[0, -1] == gaps.sums[BINS - 1, -1] == 1 and LOW == -7


def test_rows_are_averaged_by_their_pairs() -> None:
    t, *rest = pairs()
    whole, parts = Gaps(CPU), []
    whole.add(t, *rest)
    for part in (slice(0, 10), slice(10, 40)):
        gaps = Gaps(CPU)
        gaps.add(t[part], *(x[part] for x in rest))
        parts.append(gaps.row(alone))
    got, want = means([{"loss": 1.0}, *parts]), means([whole.row(alone)])
    assert list(got) == list(want) == sorted(want)
    for middle, level in want.items():
        assert got[middle] == pytest.approx(level, rel=1e-6)


def of(kind: type = ConsistencyObjective, on_ops: bool = False, **how: Any) -> TrainStep:
    """A step that counts its pairs; one of ECT, xflip and dropout included."""
    how = {"xflip": True, "net": {"dropout": 0.2}, **how}
    made = make(kind(Mapping(q=2.0), gaps=Gaps(CPU)), **how)
    made.net.model.on_ops = on_ops
    put(made, 0, 1)
    made.gradients()
    return made


def counted(made: TrainStep) -> Tensor:
    (sums,) = made.objective.tensors()
    return sums


def test_every_path_counts_the_same_pairs() -> None:
    plain = of()
    want = counted(plain)
    assert want[:, -1].sum() == 12 and (want[:, 1] > 0).sum() > 3
    assert any(tensor is want for tensor in plain.tensors())  # what a capture and a self-check put back
    torch.testing.assert_close(counted(of(on_ops=True)), want, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(counted(of(micro_batch=4)), want, rtol=1e-4, atol=1e-5)
    ranks = [of(micro_batch=3, world=World(rank, 2)) for rank in range(2)]
    torch.testing.assert_close(sum(map(counted, ranks)), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(of().state.grads, make_plain().state.grads)  # and counting changes nothing


def make_plain() -> TrainStep:
    made = make(ConsistencyObjective(Mapping(q=2.0)), xflip=True, net={"dropout": 0.2})
    made.net.model.on_ops = False
    put(made, 0, 1)
    made.gradients()
    assert made.objective.tensors() == []
    return made


def test_a_distilled_pair_is_counted_too() -> None:
    objective = ConsistencyDistillation(gaps=Gaps(CPU))
    y, g = torch.randn(6, 1, 4, 4), torch.randn(6, 1, 4, 4)
    objective.train_loss(lambda x, sigma: 0.3 * x, y, torch.linspace(-1, 1, 6), g, 3, lambda x, sigma: 0.5 * x)
    assert objective.tensors()[0][:, -1].sum() == 6


@pytest.mark.slow
def test_a_run_tells_of_levels_in_rows_and_picture_also_across_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(log=LEVELS, objective=ObjectiveConfig(n_stages=4, stage_kimg=0.024, weighting="adaptive"))
    run(cfg, tmp_path / "whole")
    told = rows(tmp_path / "whole")
    images = [sum(value for name, value in row.items() if name.endswith("/images")) for row in told]
    assert images == [16] * 5
    picture = np.asarray(Image.open(tmp_path / "whole" / "levels.png"))
    for colour in levels.COLOURS.values():
        assert (picture == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(2).sum() > 100
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        assert not Job(replace(cfg, run_dir=folder), Console(quiet=True)).run()
    run(parse(["--resume", str(folder)]), folder)
    assert rows(folder) == told


def test_no_picture_without_levels(tmp_path: Path) -> None:
    (tmp_path / "stats.jsonl").write_text(json.dumps({"nimg": 1, "loss": 2.0}) + "\n")
    assert levels.plot(tmp_path) is None and not (tmp_path / "levels.png").exists()


def test_a_torn_row_is_passed_over(tmp_path: Path) -> None:
    row = {f"levels/0.5/{name}": 1.0 for name in ("A", "B", "gap", "images")}
    (tmp_path / "stats.jsonl").write_bytes(
        b'\xff\n[1]\n{"nimg": 1, "lev\n' + json.dumps(row).encode() + b'\n{"levels/0.5'
    )
    assert levels.plot(tmp_path) == tmp_path / "levels.png"


@pytest.mark.slow
def test_a_picture_that_cannot_be_drawn_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(run_dir: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(levels, "plot", full)
    with pytest.warns(UserWarning, match=r"levels\.png cannot be written, the run goes on without \(.*No space"):
        run(config(log=LEVELS, total_kimg=0.016), tmp_path / "run")
    assert (tmp_path / "run" / "results.md").is_file()
