"""The loss along a direction of features: formula, identity with ECT's, every path of a step, and whole runs."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from ect.assembly import frozen, posterior_mean, train_step
from ect.config import Config, DataConfig, LogConfig, ObjectiveConfig
from ect.cost.memory import predict
from ect.data import Dataset, ImageStream, load
from ect.errors import UserError
from ect.files.resume import data_fingerprint
from ect.job import Job
from ect.objective import ConsistencyObjective
from ect.objectives.direction import along, direction
from ect.objectives.distillation import ConsistencyDistillation
from ect.objectives.gaps import Gaps
from ect.objectives.posterior import PosteriorTarget
from ect.options import parse
from ect.ranks.distributed import World
from ect.show.idle import idle_options
from ect.step import TrainStep
from ect.tangent import file
from ect.tangent.network import Features
from ect.trainer import Trainer
from tests.test_fast_form import spied
from tests.test_job import final_state, interrupt_after, rows
from tests.test_objective_options import assert_near, gradients
from tests.test_step import DATA, make, put
from tests.tiny import config, run

CPU = torch.device("cpu")
ALONG = ObjectiveConfig(n_stages=4, stage_kimg=0.024, direction="features")


def features(dtype: torch.dtype = torch.float32, seed: int = 5) -> Features:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Features(8, 1).to(dtype).requires_grad_(False)


def euclidean(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).flatten(1).norm(dim=1)


def images(n: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 1, 8, 8, generator=g, dtype=torch.float64) for _ in range(2))
    return a, b


def levels(n: int = 6) -> tuple[Tensor, Tensor]:
    """Return t and r, every third of which is 0."""
    t = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.2
    return t, torch.where(torch.arange(n) % 3 == 0, 0.0, 0.7 * t)


def test_the_distance_by_hand() -> None:
    a, b = images()
    phi = features(torch.float64)
    want = torch.zeros(len(a), dtype=torch.float64)
    for of_a, of_b in zip(phi.maps(a), phi.maps(b), strict=True):
        for i in range(len(a)):
            for here, there in zip(of_a[i], of_b[i], strict=True):
                want[i] += (here - there).square().sum().sqrt()
    assert [tuple(map_.shape[1:]) for map_ in phi.maps(a)] == [(32, 4, 4), (64, 2, 2), (14, 1, 1)]
    torch.testing.assert_close(phi.distance(a, b), want, rtol=1e-4, atol=0)


def test_the_direction_is_the_unit_gradient_by_finite_differences() -> None:
    a, b = images(3)
    distance = features(torch.float64).distance
    got = direction(distance, a, b)
    slope, step = torch.empty_like(a), 1e-6
    for place in range(64):
        nudge = torch.zeros(64, dtype=torch.float64)
        nudge[place] = step
        there = (distance(a + nudge.view(1, 1, 8, 8), b) - distance(a - nudge.view(1, 1, 8, 8), b)) / (2 * step)
        slope.view(3, 64)[:, place] = there
    torch.testing.assert_close(got, slope / slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got.flatten(1).norm(dim=1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("c", [0.0, 0.03])
@pytest.mark.parametrize("weighting", ["inverse_gap", "adaptive"])
def test_the_value_is_the_distance_and_the_gradient_the_weighted_direction(weighting: str, c: float) -> None:
    y, eps = images()
    t, r = levels()
    w = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    phi = features(torch.float64)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return w * x / (1 + sigma.view(-1, 1, 1, 1))

    plain = ConsistencyObjective(c=c, weighting=weighting)
    got, want = (o.loss(denoiser, y, t, r, eps) for o in (replace(plain, distance=phi.distance), plain))
    torch.testing.assert_close(got, want)
    with torch.no_grad():
        T, R = t.view(-1, 1, 1, 1), r.view(-1, 1, 1, 1)
        by_w = (y + T * eps) / (1 + T)
        target = torch.where(R > 0, 0.4 * (y + R * eps) / (1 + R), y)
        weight = plain.weight(t, r, target, y)
    slope = weight * (direction(phi.distance, 0.4 * by_w, target) * by_w).flatten(1).sum(1)
    (of_got,) = torch.autograd.grad(got.sum(), w)
    (of_want,) = torch.autograd.grad(want.sum(), w)
    torch.testing.assert_close(of_got, slope.sum())
    assert not torch.isclose(of_got, of_want, rtol=0.05)


def test_along_the_euclidean_distance_it_is_ects_loss() -> None:
    y, eps = images()
    t, r = levels()
    found = []
    for distance in (None, euclidean):
        w = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        loss = ConsistencyObjective(distance=distance).loss(lambda x, sigma: w * x, y, t, r, eps)  # noqa: B023
        found.append((loss.detach(), torch.autograd.grad(loss.sum(), w)[0]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("distance", [features().distance, euclidean])
def test_where_both_agree_nothing_is_drawn_anywhere(distance: Any) -> None:
    a = images()[0].float()
    D_t = a.clone().requires_grad_(True)
    other = torch.where(torch.arange(len(a)).view(-1, 1, 1, 1) < 2, a + 0.1, a)
    loss = along(distance, D_t, other, 0.0)
    (gradient,) = torch.autograd.grad(loss.sum(), D_t)
    assert loss.isfinite().all() and (loss[2:] == 0).all() and (loss[:2] > 0).all()
    assert (gradient[2:] == 0).all()
    torch.testing.assert_close(gradient[:2].flatten(1).norm(dim=1), torch.ones(2))


def test_a_sample_that_is_not_finite_spoils_itself_alone() -> None:
    a, b = (x.float() for x in images())
    a[1, 0, 3, 3] = torch.nan
    D_t = a.requires_grad_(True)
    loss = along(features().distance, D_t, b, 0.0)
    (gradient,) = torch.autograd.grad(loss.sum(), D_t)
    bad = torch.arange(len(a)) == 1
    assert torch.equal(loss.isnan(), bad) and torch.equal(gradient.isnan().flatten(1).any(1), bad)


def of(target: str = "self", on_ops: bool = False, **how: Any) -> TrainStep:
    """A step along a direction, ready for its first images: with flips, classes and dropout."""
    hard: dict[str, Any] = {"xflip": True, "dataset": DATA, "net": {"label_dropout": 0.3, "dropout": 0.2}}
    kinds = {"self": ConsistencyObjective, "teacher": ConsistencyDistillation, "posterior": PosteriorTarget}
    objective = kinds[target](weighting="adaptive", gaps=Gaps(CPU), distance=features().distance)
    teacher: Any = None
    if target == "teacher":
        teacher = frozen(Config(), copy.deepcopy(make(**hard).net))
    elif target == "posterior":
        teacher = posterior_mean(Config(data=DataConfig(xflip=True)), ImageStream(DATA, 1))
    made = make(objective, teacher=teacher, **hard, **how)
    made.net.model.on_ops = on_ops
    put(made, 0, 3)
    return made


@pytest.mark.parametrize("target", ["self", "teacher", "posterior"])
def test_parts_ranks_and_ops_make_the_same_step(target: str) -> None:
    whole = of(target)
    want = gradients(whole)
    assert_near(gradients(of(target, micro_batch=4)), want)
    ranks = [of(target, micro_batch=3, world=World(rank, 2)) for rank in range(2)]
    assert_near(sum(map(gradients, ranks)), want)  # type: ignore[arg-type]
    assert_near(gradients(of(target, on_ops=True)), want)
    counted = sum(rank.objective.tensors()[0] for rank in ranks)  # type: ignore[attr-defined]
    torch.testing.assert_close(counted, whole.objective.tensors()[0], rtol=1e-4, atol=1e-6)


def test_it_has_no_fast_form(monkeypatch: pytest.MonkeyPatch) -> None:
    called, step = spied(monkeypatch), of(on_ops=True)
    assert step.loss(0).isfinite().all() and not called


@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_features_compute_in_fp32_beside_a_network_in_half(half: str) -> None:
    seen: list[torch.dtype] = []
    phi = features()

    def distance(a: Tensor, b: Tensor) -> Tensor:
        seen.extend([a.dtype, b.dtype, phi.labels.weight.dtype])
        return phi.distance(a, b)

    step = make(ConsistencyObjective(distance=distance), precision=half)
    full = make(ConsistencyObjective(distance=phi.distance))
    full.net.model.on_ops = True
    assert float(step(0, 2)) == pytest.approx(float(full(0, 2)), rel=0.02)
    assert seen == [torch.float32] * 3
    scale = 1.0 if step.state.loss_scale is None else float(step.state.loss_scale)
    error = (step.state.grads / scale - full.state.grads).norm() / full.state.grads.norm()
    assert 1e-5 < float(error) < 0.2


def test_a_step_takes_features_where_it_is_asked_to() -> None:
    step = make(dataset=DATA)
    cfg = config(objective=ALONG, batch=12, batch_per_device=12)
    made: Any = train_step(cfg, step.state, step.stream, features=features()).objective
    assert made.distance is not None
    with pytest.raises(ValueError, match="direction features: without features"):
        train_step(cfg, step.state, step.stream)
    with pytest.raises(ValueError, match="direction difference: with features"):
        train_step(replace(cfg, objective=ObjectiveConfig()), step.state, step.stream, features=features())


def test_it_is_of_consistency_alone() -> None:
    said = r"--objective\.direction features: expected difference with --objective\.kind diffusion"
    with pytest.raises(UserError, match=said):
        parse(["--objective.direction", "features", "--objective.kind", "diffusion"])


def test_c_does_nothing_along_features_but_in_the_adaptive_weight() -> None:
    for objective, count in (
        (ALONG, 0),
        (replace(ALONG, c=0.03), 1),
        (replace(ALONG, c=0.03, weighting="adaptive"), 0),
    ):
        said = list(idle_options(config(objective=objective), DATA))
        assert len(said) == count and all(line.startswith("--objective.c 0.03: along features") for line in said)


@pytest.mark.slow
def test_memory_has_room_for_the_features(tmp_path: Path) -> None:
    data = Dataset("nothing", torch.zeros(100, 16, 16, 3, dtype=torch.uint8), None)
    spec = Trainer(config(), tmp_path, data, CPU).spec
    size = sum(p.numel() for p in Features(16, 3).parameters()) * 4
    alone, both = (predict(config(objective=o), spec, data, CPU, 8) for o in (config().objective, ALONG))
    assert size <= both.state - alone.state < 1.1 * size
    assert both.launches > alone.launches and both.update >= alone.update


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of the digits' features in a cache of the test's own."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    path = file.cached(data_fingerprint(DATA.images, None))
    path.parent.mkdir(parents=True)
    return path


def put_features(path: Path, seed: int) -> None:
    file.save(path, features(seed=seed), data_fingerprint(DATA.images, None))


def test_a_run_without_features_is_refused_before_it_begins(tmp_path: Path, cache: Path) -> None:
    cfg = config(objective=ALONG, pretrain="digits-diffusion", run_dir=tmp_path / "run")
    with pytest.raises(UserError, match=r"digits has none yet .*; run python -m ect\.tangent --data\.source digits"):
        Job(cfg, Console(quiet=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_wants_the_same_features(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_features(cache, 5)
    log = LogConfig(stats_kimg=0.016, sample_kimg=0, checkpoint_kimg=0.032, levels=True)
    cfg = config(objective=ALONG, data=DataConfig(xflip=True, labels=True), log=log)
    run(cfg, tmp_path / "whole")
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        assert not Job(replace(cfg, run_dir=folder), Console(quiet=True)).run()
    resume = ["--resume", str(folder)]
    cache.rename(tmp_path / "away.npz")
    with pytest.raises(UserError, match=r"has none yet"):
        Job(parse(resume), Console(quiet=True))
    put_features(cache, 6)
    with pytest.raises(UserError, match=r"the features of these images are not those that the run was started with"):
        Job(parse(resume), Console(quiet=True)).run()
    (tmp_path / "away.npz").rename(cache)
    run(parse(resume), folder)
    got, want = final_state(folder), final_state(tmp_path / "whole")
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert rows(folder) == rows(tmp_path / "whole") and any("levels/-0.5/A" in row for row in rows(folder))
    trainer = Trainer(replace(cfg, resume=folder), folder, load(cfg.data), CPU)
    assert any("D_t is drawn along features of digits" in note for note in trainer.notes)
    assert trainer.step.objective.distance is not None  # type: ignore[attr-defined]
    run(replace(cfg, objective=replace(ALONG, direction="difference")), tmp_path / "plain")
    plain = final_state(tmp_path / "plain")
    assert not all(torch.equal(plain[name], want[name]) for name in want if name.startswith("params."))
    with pytest.raises(UserError, match=r'--objective\.direction: checkpoint has "features"'):
        Job(parse([*resume, "--objective.direction", "difference"]), Console(quiet=True))
