"""A formula stands once, for ops and objective; the fast form never stands in for an objective that it does not know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from ect_kernels import consistency_loss, levels, philox, preconditioning
from torch import Tensor

from ect.models import ECMPrecond
from ect.objective import WEIGHTINGS, ConsistencyObjective, Denoiser, DiffusionObjective, Draw, Mapping, Objective
from ect.step import TrainStep
from tests.test_step import make, put

STAGE = 3


def losses(objective: Objective, change: Callable[[TrainStep], object] = lambda step: None) -> tuple[Tensor, Tensor]:
    """The loss of each sample by plain operations, and with a network that runs on the ops."""
    found = []
    for on_ops in (False, True):
        step = make(objective)
        step.net.model.on_ops = on_ops
        change(step)
        put(step, 0, STAGE)
        found.append(step.loss(0).detach())
    return found[0], found[1]


def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by a name at each call of an op that the fast form alone uses."""
    called: list[str] = []
    original = levels.levels

    def spy(*args: Any) -> levels.Output:
        called.append("levels")
        return original(*args)

    monkeypatch.setattr("ect.objective.levels", spy)
    return called


MUTANTS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "noise level": (levels.noise_level, lambda normal, P_mean, P_std: (P_mean + 2 * P_std * normal).exp()),
    "gap": (levels.gap, lambda t, k, b: 2 + k / (1 + b * t)),
    "lower level": (levels.lower_level, lambda t, stage, q, k, b: 0.25 * t),
    "pseudo-Huber": (
        consistency_loss.distance,
        lambda difference, c: (3 * difference.square().flatten(1).sum(1), difference.flatten(1).sum(1)),
    ),
    "preconditioning": (
        preconditioning.coefficients,
        lambda sigma, sigma_data, shift=0.0: (1 / (2 + sigma), sigma_data * sigma / (3 + sigma), 1 / (4 + sigma)),
    ),
    "noise label": (preconditioning.noise_label, lambda sigma: sigma / (1 + sigma)),
}


@pytest.mark.slow
@pytest.mark.usefixtures("pytorch_ops")
@pytest.mark.parametrize("formula", [*MUTANTS, "weighting"])
def test_a_change_of_a_formula_changes_both_paths(formula: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, called = ConsistencyObjective(c=0.06), spied(monkeypatch)
    before, _ = losses(objective)
    if formula == "weighting":
        monkeypatch.setitem(WEIGHTINGS, "inverse_gap", lambda t, r, sigma_data: 5 / t)
    else:
        function, mutant = MUTANTS[formula]
        monkeypatch.setattr(function, "__code__", mutant.__code__)  # whoever has imported the function calls the mutant
    plain, fast = losses(objective)
    assert len(called) == 2  # the second step of each pair takes the fast form
    assert (plain != before).sum() > len(plain) / 2
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-6)


class Tenfold(ConsistencyObjective):
    """A contributor's loss, ten times the other."""

    def train_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        return 10 * super().train_loss(*args, **kwargs)


class Halved(Mapping):
    """A contributor's mapping."""

    def __call__(self, t: Tensor, stage: Tensor | int) -> Tensor:
        return t / 2


def test_a_subclass_of_the_objective_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    called = spied(monkeypatch)
    (plain, on_ops), (_, ten_times) = losses(ConsistencyObjective()), losses(Tenfold())
    assert len(called) == 1
    torch.testing.assert_close(on_ops, plain, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ten_times, 10 * plain, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mapping", [Halved(), lambda t, stage: t / 2], ids=["subclass", "function"])
def test_another_mapping_is_not_replaced(mapping: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called = spied(monkeypatch)
    plain, on_ops = losses(ConsistencyObjective(mapping=mapping))
    assert not called
    torch.testing.assert_close(on_ops, plain, rtol=1e-4, atol=1e-6)
    known, _ = losses(ConsistencyObjective(mapping=Mapping("const")))
    assert not torch.allclose(plain, known, rtol=0.01)


def test_a_kind_of_mapping_without_a_formula_is_refused_on_both_paths() -> None:
    mapping = Mapping()
    object.__setattr__(mapping, "kind", "cosine")  # as if the list of kinds had grown, and nothing else
    for on_ops in (False, True):
        step = make(ConsistencyObjective(mapping=mapping))
        step.net.model.on_ops = on_ops
        with pytest.raises(KeyError, match="cosine"):
            step(0, STAGE)


@pytest.mark.slow
def test_a_preconditioning_of_its_own_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(ECMPrecond):
        def forward(self, *args: Any) -> Tensor:
            return 2 * super().forward(*args)

    called = spied(monkeypatch)
    plain, on_ops = losses(ConsistencyObjective(), lambda step: setattr(step.net, "__class__", Doubled))
    assert not called
    torch.testing.assert_close(on_ops, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_shifted_preconditioning_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    called = spied(monkeypatch)
    plain, on_ops = losses(ConsistencyObjective(), lambda step: step.net.eval())
    assert not called
    torch.testing.assert_close(on_ops, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_network_says_for_which_data_it_is_preconditioned() -> None:
    plain, fast = losses(ConsistencyObjective(), lambda step: setattr(step.net, "sigma_data", 0.7))
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-6)


@dataclass(frozen=True)
class TwoTimes(Objective):
    """An objective from outside: two noise levels of its own, no stages, no fast form."""

    draws = {"normals": Draw(philox.STREAM_T, 2), "eps": Draw(philox.STREAM_EPS, None)}  # noqa: RUF012

    def train_loss(self, denoiser: Denoiser, y: Tensor, normals: Tensor, eps: Tensor, stage: Tensor) -> Tensor:
        t, s = normals.exp().unbind(1)
        D_t, D_s = (denoiser(y + level.view(-1, 1, 1, 1) * eps, level) for level in (t, s))
        return (D_t - D_s).square().flatten(1).sum(1)


@pytest.mark.slow
@pytest.mark.parametrize("on_ops", [False, True])
def test_an_objective_is_given_what_it_declares(on_ops: bool) -> None:
    whole, parts = make(TwoTimes()), make(TwoTimes(), micro_batch=4)
    for step in (whole, parts):
        step.net.model.on_ops = on_ops
    assert float(parts(0, 0)) == pytest.approx(float(whole(0, 0)), rel=1e-5)
    numbers = whole.draw(TwoTimes.draws["normals"], torch.zeros(12, 1, 8, 8), 0)
    assert numbers.shape == (12, 2) and not torch.equal(numbers[:, 0], numbers[:, 1])


def test_what_the_objectives_declare() -> None:
    assert (ConsistencyObjective.precond, ConsistencyObjective.staged) == ("ECMPrecond", True)
    assert (DiffusionObjective.precond, DiffusionObjective.staged) == ("EDMPrecond", False)
    assert [s.nfe for s in ConsistencyObjective.samplers((5.0, 0.8), (18,))] == [1, 2, 3]
    assert [s.nfe for s in DiffusionObjective.samplers((5.0, 0.8), (18, 2))] == [35, 3]
    with pytest.raises(NotImplementedError, match="Objective has no train_loss"):
        Objective().train_loss(lambda x, sigma: x, torch.zeros(1, 1, 8, 8))
