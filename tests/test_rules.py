"""Another optimizer is one class with a `step`: here one written outside of the package, which trains, saves and resumes."""

from __future__ import annotations

import copy
import typing
from typing import Any

import pytest
import torch

from ect.config import OptimConfig
from ect.data import ImageStream, load
from ect.models import EDMPrecond, SongUNet
from ect.objective import DiffusionObjective
from ect.optim import RULES, Arenas, FlatState, Rule
from ect.step import TrainStep
from tests.tiny import config


class Momentum(Rule):
    """Stochastic gradient descent with momentum, as torch.optim.SGD has it."""

    moments = ("velocity",)

    def step(self, arenas: Arenas[Any]) -> None:
        velocity = arenas.moments["velocity"]
        velocity.mul_(self.betas[0]).add_(arenas.grads)
        arenas.params.sub_(velocity * self.device_lr)
        arenas.follow(self.device_ema_betas)
        self.steps += 1


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.SiLU(), torch.nn.Linear(7, 3))


def loss(net: torch.nn.Module, i: int) -> torch.Tensor:
    return (net(torch.randn(4, 5, generator=torch.Generator().manual_seed(i))) ** 2).sum()


def steps(state: FlatState, numbers: range) -> None:
    for i in numbers:
        state.lr = 0.1 / (i + 1)
        state.load_grads(torch.autograd.grad(loss(state.compute, i), state.inputs))
        state.step()


def test_it_equals_torch_and_survives_a_resume() -> None:
    ours, theirs = network(), network()
    average = copy.deepcopy(theirs)
    state = FlatState(ours, Momentum, betas=(0.9, 0.0), ema_betas=[0.8])
    steps(state, range(6))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for i in range(6):
        optimizer.param_groups[0]["lr"] = 0.1 / (i + 1)
        optimizer.zero_grad()
        loss(theirs, i).backward()
        optimizer.step()
        for a, p in zip(average.parameters(), theirs.parameters(), strict=True):
            a.data.lerp_(p.data, 1 - 0.8)
    for got, want in [(ours.state_dict(), theirs), (state.ema_state_dict(0), average)]:
        for name, value in want.state_dict().items():
            torch.testing.assert_close(got[name], value)
    saved = state.state_tensors()
    assert saved["velocity.0.weight"].shape == (7, 5) and int(saved["steps"]) == 6
    resumed = FlatState(network(), Momentum, betas=(0.9, 0.0), ema_betas=[0.8])
    resumed.load_state_tensors(saved)
    for each in (state, resumed):
        steps(each, range(6, 8))
    assert torch.equal(state.params, resumed.params) and torch.equal(state.emas[0], resumed.emas[0])


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_its_half_precision_copy_follows(half: torch.dtype) -> None:
    state = FlatState(network(), Momentum, half=half, core={"0.weight"})
    state.load_grads([torch.ones_like(p) for p in state.inputs])
    state.step()
    assert state.shadow is not None and torch.equal(state.shadow, state.params.to(half))


@pytest.mark.slow
def test_it_trains_a_denoiser_on_the_digits() -> None:
    torch.manual_seed(0)
    kwargs = {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": [1]}
    net = EDMPrecond(SongUNet(**kwargs, num_blocks=1, attn_resolutions=[], dropout=0.0)).train()
    state = FlatState(net, Momentum, lr=1e-3, betas=(0.9, 0.0))
    stream = ImageStream(load(config().data), 0, torch.device("cpu"), 64)
    step = TrainStep(DiffusionObjective(), state, stream, seed=0, batch=64)
    losses = [float(step(64 * i, 0)) for i in range(40)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_a_rule_that_knows_no_loss_scale_says_so() -> None:
    with pytest.raises(ValueError, match=r"loss_scale is 8\.0; the rule Momentum knows none"):
        FlatState(network(), Momentum, loss_scale=8.0)


def test_the_option_knows_every_rule() -> None:
    assert set(typing.get_args(typing.get_type_hints(OptimConfig)["optimizer"])) == RULES.keys()
