"""Options of the objective: in parts, on several ranks and on the ops each computes what one step in plain PyTorch does."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from ect.assembly import build_objective
from ect.config import ObjectiveConfig
from ect.errors import UserError
from ect.objective import ConsistencyObjective, Mapping
from ect.objectives.distillation import ConsistencyDistillation
from ect.objectives.weights import adaptive_weight
from ect.options import parse
from ect.ranks.distributed import World
from ect.show.idle import idle_options
from ect.step import TrainStep
from tests.test_fast_form import spied
from tests.test_step import DATA, make, put

STAGE, BATCH = 3, 12
OPTIONS: dict[str, dict[str, Any]] = {
    "adaptive": {"weighting": "adaptive", "c": 0.03, "weight_floor": 0.5},
    "min_gap": {"q": 4.0, "min_gap": 0.6},  # at stage 3 the gap would be from .004 to .02
}
HARD: dict[str, Any] = {"xflip": True, "dataset": DATA, "net": {"label_dropout": 0.3, "dropout": 0.2}}


def of(name: str, on_ops: bool = False, **how: Any) -> TrainStep:
    """A step with that option, ready for its first images."""
    made = make(build_objective(ObjectiveConfig(**OPTIONS[name]), 0.5), **HARD, **how)
    made.net.model.on_ops = on_ops
    put(made, 0, STAGE)
    return made


def gradients(made: TrainStep) -> Tensor:
    made.gradients()
    return made.state.grads


def assert_near(got: Tensor, want: Tensor) -> None:
    assert float((got - want).norm()) < 1e-4 * float(want.norm())


@pytest.mark.parametrize("name", OPTIONS)
def test_parts_and_ranks_make_the_whole(name: str) -> None:
    want = gradients(of(name))
    assert_near(gradients(of(name, micro_batch=4)), want)
    ranks = [of(name, micro_batch=3, world=World(rank, 2)) for rank in range(2)]
    assert_near(sum(map(gradients, ranks)), want)  # type: ignore[arg-type]
    assert float(sum(rank.mean_loss for rank in ranks)) / 2 == pytest.approx(float(of(name)(0, STAGE)), rel=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_ops_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called, want, ops = spied(monkeypatch), of(name), of(name, on_ops=True)
    seen = told(want), told(ops)
    plain = want.loss(0).detach()
    assert not called
    torch.testing.assert_close(ops.loss(0).detach(), plain, rtol=1e-4, atol=1e-6)
    assert called == ["levels"]
    assert len(seen[0]) == 4
    for by_plain, by_ops in zip(*seen, strict=True):
        torch.testing.assert_close(by_ops, by_plain)
    assert_near(gradients(of(name, on_ops=True)), gradients(want))
    assert not torch.allclose(plain, of_default().loss(0).detach(), rtol=0.01)


def told(made: TrainStep) -> list[Tensor]:
    """Grows by what the U-Net is given: images and labels of the noise level, of both passes."""
    seen: list[Tensor] = []
    forward = made.net.model.forward
    made.net.model.forward = lambda x, level, *more: seen.extend([x, level]) or forward(x, level, *more)  # type: ignore[func-returns-value]
    return seen


def of_default() -> TrainStep:
    made = make(ConsistencyObjective(), **HARD)
    put(made, 0, STAGE)
    return made


def pairs(n: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clean images, two levels of which every third r is 0, and noise, in fp64."""
    g = torch.Generator().manual_seed(0)
    y, eps = (torch.randn(n, 1, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.rand(n, generator=g, dtype=torch.float64) + 0.2
    return y, t, torch.where(torch.arange(n) % 3 == 0, 0.0, 0.7 * t), eps


def test_the_adaptive_weight_by_hand() -> None:
    y = torch.zeros(4, 1, 2, 2, dtype=torch.float64)
    target = y.clone()
    target[1, 0, 0, 0], target[2], target[3] = 0.04, 2.0, 3.0
    got = adaptive_weight(target, y, 0.03, 0.05)
    want = [20, 20, 1 / ((16 + 0.03**2) ** 0.5 - 0.03), 1 / ((36 + 0.03**2) ** 0.5 - 0.03)]
    assert got.tolist() == pytest.approx(want)  # the second's distance of .05 - .03 is below the floor
    assert adaptive_weight(target, y, 0.0, 0.01).tolist() == pytest.approx([100, 25, 0.25, 1 / 6])


@pytest.mark.parametrize("c", [0.0, 0.03])
def test_the_adaptive_weight_weighs_the_loss_and_has_no_gradient(c: float) -> None:
    y, t, r, eps = pairs()
    w = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return w * x / (1 + sigma.view(-1, 1, 1, 1))

    plain = ConsistencyObjective(c=c, weighting="uniform").loss(denoiser, y, t, r, eps)
    got = ConsistencyObjective(c=c, weighting="adaptive", floor=1.0).loss(denoiser, y, t, r, eps)
    D_r = (0.4 * (y + r.view(-1, 1, 1, 1) * eps) / (1 + r.view(-1, 1, 1, 1))).detach()
    distance = ((D_r - y).square().sum((1, 2, 3)) + c * c).sqrt() - c
    weight = torch.where(r > 0, 1 / distance.clamp(min=1), 1.0)
    assert int((weight < 1).sum()) > 0 and (weight[::3] == 1).all()
    torch.testing.assert_close(got, weight * plain)
    (of_got,) = torch.autograd.grad(got.sum(), w, retain_graph=True)
    (of_plain,) = torch.autograd.grad((weight * plain).sum(), w)
    torch.testing.assert_close(of_got, of_plain)


def test_the_adaptive_weight_of_a_distilled_pair_is_by_the_clean_image() -> None:
    y, _, _, eps = pairs()
    normal = torch.linspace(-1, 1, len(y), dtype=torch.float64)
    losses = {
        weighting: ConsistencyDistillation(Mapping(q=256.0), weighting=weighting, floor=0.01).train_loss(
            lambda x, sigma: 0.3 * x, y, normal, eps, 0, lambda x, sigma: 0.5 * x
        )
        for weighting in ("uniform", "adaptive")
    }
    t = (-1.1 + 2 * normal).exp()
    share = (ConsistencyObjective(Mapping(q=256.0)).mapping(t, 0) / t).view(-1, 1, 1, 1)
    x_t = y + t.view(-1, 1, 1, 1) * eps
    D_r = 0.3 * (share * x_t + (1 - share) * 0.5 * x_t)
    want = losses["uniform"] / (D_r - y).flatten(1).norm(dim=1)
    torch.testing.assert_close(losses["adaptive"], want)


def test_the_gap_stops_closing_at_the_least_one() -> None:
    t = torch.tensor([1e-4, 0.1, 1.0, 10.0, 80.0])
    least = Mapping(min_gap=0.004)
    for stage in range(12):
        gap, open_ended = 1 - least(t, stage) / t, 1 - Mapping()(t, stage) / t
        torch.testing.assert_close(gap, open_ended.clamp(min=0.004), rtol=1e-4, atol=0)
        assert (least(t, stage) >= 0).all()
    assert torch.equal(Mapping(min_gap=0.6)(t, 0) / t, torch.minimum(Mapping()(t, 0) / t, torch.tensor(0.4)))
    tight = Mapping("const", q=2.0**20, min_gap=0.001)(t, 400)  # q^-401 is 0 in every dtype
    torch.testing.assert_close(1 - tight / t, torch.full_like(t, 0.001), rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="min_gap is 1"):
        Mapping(min_gap=1.0)


def test_a_least_gap_lets_stages_go_on() -> None:
    assert parse(["--objective.n-stages", "24", "--objective.min-gap", ".001"]).objective.n_stages == 24
    with pytest.raises(UserError, match="n-stages 24"):
        parse(["--objective.n-stages", "24"])


def test_the_adaptive_weight_wants_images_and_a_floor() -> None:
    y, t, r, eps = pairs()
    x_t, x_r = (y + sigma.view(-1, 1, 1, 1) * eps for sigma in (t, r))
    with pytest.raises(ValueError, match="wants the clean images"):
        ConsistencyObjective(weighting="adaptive").compare(lambda x, sigma: x, x_t, x_r, t, r)
    with pytest.raises(ValueError, match="floor is 0"):
        ConsistencyObjective(floor=0.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--objective.kind diffusion --objective.weighting adaptive", "weighting adaptive: expected another with"),
        ("--objective.kind diffusion --log.levels", r"log\.levels: expected --log\.no-levels with"),
        ("--objective.kind diffusion --objective.min-gap .1", "min-gap 0.1: expected 0 with"),
        ("--objective.min-gap 1e-6", r"min-gap 1e-06: expected 0, or at least 2\^-16"),
        ("--objective.min-gap 1", "min-gap 1.0: expected from 0 to below 1"),
        ("--objective.weight-floor 0.1", r"weight-floor 0\.1: expected 0\.05, its default, without"),
        ("--objective.weighting adaptive --objective.weight-floor 0", "weight-floor 0.0: expected greater than 0"),
    ],
)
def test_an_option_that_does_nothing_is_refused(words: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(words.split())


def test_options_reach_the_objective() -> None:
    cfg = parse(["--objective.weighting", "adaptive", "--objective.weight-floor", "2", "--objective.min-gap", ".01"])
    made: Any = build_objective(cfg.objective, 0.5)
    assert (made.weighting, made.floor, made.mapping.min_gap) == ("adaptive", 2.0, 0.01)


def test_a_least_gap_that_no_stage_comes_to_is_named() -> None:
    cfg = parse(["--objective.min-gap", ".01"])
    said = r"--objective\.min-gap 0\.01: no stage comes so close; the gap of the last one is 0\.0156"
    assert any(re.fullmatch(said, line) for line in idle_options(cfg, DATA))
    assert not [line for line in idle_options(parse(["--objective.min-gap", ".02"]), DATA) if "min-gap" in line]
    assert not [line for line in idle_options(parse([]), DATA) if "min-gap" in line]
