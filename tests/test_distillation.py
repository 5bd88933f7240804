"""Consistency distillation: the formula on data whose ODE is known, the frozen network in the step, and whole runs."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from ect.assembly import frozen, network_spec
from ect.config import Config, ObjectiveConfig
from ect.cost.memory import predict
from ect.data import load
from ect.errors import UserError
from ect.files.checkpoint import load_model
from ect.job import Job
from ect.models import ECMPrecond, MaskKey, build
from ect.objective import ConsistencyObjective, Mapping
from ect.objectives.distillation import ConsistencyDistillation, euler_step
from ect.options import parse
from ect.step import TrainStep
from ect.trainer import Trainer
from tests.test_job import final_state, interrupt_after
from tests.test_step import make, put
from tests.tiny import config, run

SD = 0.5
FAST = Mapping("const", q=256.0)
TEACHER = ObjectiveConfig(n_stages=4, stage_kimg=0.024, target="teacher")


def diffusion(x: Tensor, t: Tensor) -> Tensor:
    """The denoiser of data N(0, SD^2)."""
    return x * (SD**2 / (t**2 + SD**2)).view(-1, 1, 1, 1)


def consistency(x: Tensor, t: Tensor) -> Tensor:
    """The exact solution of its ODE at level 0."""
    return x * (SD / (t**2 + SD**2).sqrt()).view(-1, 1, 1, 1)


def images(n: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    y, eps = (torch.randn(n, 1, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    return SD * y, torch.randn(n, generator=g, dtype=torch.float64), eps


@pytest.mark.parametrize("t", [0.05, 1.0, 20.0])
def test_a_step_follows_the_known_ode(t: float) -> None:
    x, _, _ = images()
    level = torch.full([len(x)], t, dtype=torch.float64)
    for r in (0.0, 0.3 * t, 0.99 * t, t):
        got = euler_step(diffusion, x, level, torch.full_like(level, r))
        torch.testing.assert_close(got, x + (r - t) * x * t / (t**2 + SD**2))  # dx/dt = (x - D) / t
    errors = []
    for gap in (0.02, 0.01):
        r = (1 - gap) * t
        exact = x * math.sqrt((r**2 + SD**2) / (t**2 + SD**2))
        errors.append(float((euler_step(diffusion, x, level, torch.full_like(level, r)) - exact).norm()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)  # of the second order in the gap
    assert torch.equal(euler_step(diffusion, x, level, torch.zeros_like(level)), diffusion(x, level))


def test_the_exact_consistency_function_has_no_loss_left() -> None:
    """And with ECT's target, whose x_r is noise apart, it has."""
    y, normal, eps = images()
    distillation = ConsistencyDistillation(FAST, weighting="uniform")
    exact = distillation.train_loss(consistency, y, normal, eps, 0, diffusion)
    other = distillation.train_loss(diffusion, y, normal, eps, 0, diffusion)
    ect = ConsistencyObjective(FAST, weighting="uniform").train_loss(consistency, y, normal, eps, 0)
    assert float(exact.mean()) < 0.01 * float(other.mean()) and float(exact.mean()) < 0.01 * float(ect.mean())


def test_rows_at_r_zero_take_the_teachers_answer() -> None:
    y, normal, eps = images()
    t = (-1.1 + 2.0 * normal).exp()
    x_t = y + t.view(-1, 1, 1, 1) * eps
    objective = ConsistencyDistillation(weighting="uniform")
    zero = objective.mapping(t, 0) == 0
    assert 0 < int(zero.sum()) < len(t)

    def student(x: Tensor, sigma: Tensor) -> Tensor:
        return 0.3 * x

    loss = objective.train_loss(student, y, normal, eps, 0, diffusion)
    want = (0.3 * x_t - diffusion(x_t, t)).flatten(1).norm(dim=1)
    torch.testing.assert_close(loss[zero], want[zero])
    assert not torch.isclose(loss, want)[~zero].any()


def test_no_gradient_reaches_teacher_or_target() -> None:
    y, normal, eps = images()
    w, v = torch.tensor(0.5, requires_grad=True), torch.tensor(0.7, requires_grad=True)
    seen: list[Tensor] = []

    def student(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(w * x)
        return seen[-1]

    loss = ConsistencyDistillation().train_loss(student, y, normal, eps, 3, lambda x, t: v * diffusion(x, t)).sum()
    of_w, of_v = torch.autograd.grad(loss, [w, v], allow_unused=True)
    assert of_w != 0 and of_v is None and [D.requires_grad for D in seen] == [False, True]
    with pytest.raises(ValueError, match="needs a teacher"):
        ConsistencyDistillation().train_loss(student, y, normal, eps, 3)


def distilling(on_ops: bool = False, **options: Any) -> TrainStep:
    """A step of `make` whose teacher has the weights that the student starts with, three times as large."""
    student = make(**options)
    teacher = frozen(Config(), copy.deepcopy(student.net))
    for p in teacher.parameters():
        p *= 3
    for net in (student.net, teacher):
        net.model.on_ops = on_ops
    options = {"seed": 1, "batch": 12, "micro_batch": student.micro_batch, "xflip": student.xflip}
    return TrainStep(ConsistencyDistillation(), student.state, student.stream, teacher=teacher, **options)


@pytest.mark.parametrize("on_ops", [False, True])
def test_the_steps_teacher_is_frozen_and_without_dropout(on_ops: bool) -> None:
    step = distilling(on_ops, net={"dropout": 0.5}, xflip=True)
    teacher, before = step.teacher, [p.clone() for p in step.teacher.parameters()]
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    put(step, 24, 2)
    got = step.loss(0)
    raw, _ = step.stream.batch(0, 12)
    y, _ = step.prepare(raw, 0)
    draws = {name: step.draw(draw, y, 0) for name, draw in step.objective.draws.items()}

    def student(x: Tensor, sigma: Tensor) -> Tensor:
        return step.net(x, sigma, None, None, MaskKey(step.key, 0))

    want = step.objective.train_loss(student, y, stage=2, teacher=teacher, **draws)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    step(0, 2)
    assert all(map(torch.equal, before, teacher.parameters()))


def test_a_distilling_step_is_the_same_in_parts_and_on_the_ops() -> None:
    whole, parts, ops = distilling(), distilling(micro_batch=4), distilling(on_ops=True)
    for nimg in (0, 12):
        want = float(whole(nimg, 3))
        for step in (parts, ops):
            assert float(step(nimg, 3)) == pytest.approx(want, rel=1e-5)
            torch.testing.assert_close(step.state.grads, whole.state.grads, rtol=1e-3, atol=1e-4)


def test_a_step_takes_a_teacher_where_the_objective_wants_one() -> None:
    with pytest.raises(ValueError, match="ConsistencyDistillation takes a teacher"):
        make(ConsistencyDistillation())
    with pytest.raises(ValueError, match="ConsistencyObjective takes no teacher"):
        make(ConsistencyObjective(), teacher=distilling().teacher)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_a_teacher_computes_in_the_configured_precision(precision: str) -> None:
    net, cfg = make().net, Config(precision=precision)  # type: ignore[arg-type]
    frozen(cfg, net)
    halves = {p.dtype for p in net.parameters()} - {torch.float32}
    assert halves == ({"fp16": {torch.float16}, "bf16": {torch.bfloat16}}.get(precision, set()))


@pytest.mark.slow
def test_memory_has_room_for_the_teacher() -> None:
    cfg = config()
    data = load(cfg.data)
    spec = network_spec(cfg.net, "ECMPrecond", data, 0)
    size = sum(p.numel() for p in build(spec).parameters()) * 4
    alone, both = (predict(c, spec, data, torch.device("cpu"), 8) for c in (cfg, config(objective=TEACHER)))
    assert size <= both.state - alone.state < 2 * size  # storages are rounded up to blocks


@pytest.mark.slow
def test_a_run_distils_its_own_pretraining_and_resumes_bit_for_bit(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    cfg = config(pretrain="digits-diffusion", pretrain_kimg=0.016, objective=TEACHER)
    run(cfg, tmp_path / "whole")
    assert isinstance(load_model(tmp_path / "whole")[0], ECMPrecond)
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        assert not Job(replace(cfg, run_dir=folder), Console(quiet=True)).run()
    run(parse(["--resume", str(folder)]), folder)
    got, want = final_state(folder), final_state(tmp_path / "whole")
    assert all(torch.equal(got[name], want[name]) for name in want)
    trainer = Trainer(replace(cfg, init_from=folder / "pretrain"), tmp_path, load(cfg.data), torch.device("cpu"))
    assert isinstance(trainer.step.objective, ConsistencyDistillation) and trainer.step.teacher is not None
    teacher = load_model(folder / "pretrain")[0].state_dict()
    assert all(torch.equal(value, teacher[name]) for name, value in trainer.step.teacher.state_dict().items())
    assert any(str(folder / "pretrain") in note for note in trainer.notes)


@pytest.mark.slow
def test_a_resume_wants_the_same_teacher(tmp_path: Path) -> None:
    diffusion_only = config(objective=ObjectiveConfig(kind="diffusion"), total_kimg=0.008)
    run(diffusion_only, tmp_path / "one")
    run(replace(diffusion_only, seed=1), tmp_path / "two")
    run(config(objective=TEACHER, init_from=tmp_path / "one", total_kimg=0.008), tmp_path / "run")
    (tmp_path / "one").rename(tmp_path / "moved")
    resume = ["--resume", str(tmp_path / "run")]
    with pytest.raises(UserError, match=r"one: no such file"):
        Job(parse(resume), Console(quiet=True)).run()
    with pytest.raises(UserError, match=r"--init-from .*two: it is not the teacher that the run was started with"):
        Job(parse([*resume, "--init-from", str(tmp_path / "two")]), Console(quiet=True)).run()
    assert Job(parse([*resume, "--init-from", str(tmp_path / "moved")]), Console(quiet=True)).run()


@pytest.mark.slow
def test_a_teacher_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no teacher; give a diffusion model with --init-from"):
        run(config(objective=TEACHER), tmp_path / "none")
    run(config(total_kimg=0.008), tmp_path / "ect")
    with pytest.raises(UserError, match=r"--init-from .*ect is a consistency model"):
        run(config(objective=TEACHER, init_from=tmp_path / "ect"), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    with pytest.raises(UserError, match=r"--objective\.target teacher: expected self with --objective\.kind diffusion"):
        parse(["--objective.kind", "diffusion", "--objective.target", "teacher"])
