"""The public code's operations, as benchmarks/step_time.py times them, compute what this project's step computes."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from ect_kernels import philox
from lib import public_net, public_step, waterfall
from torch import Tensor, nn

from ect.assembly import train_step
from ect.config import DataConfig, NetConfig
from ect.config.emas import beta_of
from ect.data import load
from ect.models import build
from ect.models.layers import blocks_of
from ect.objective import ConsistencyObjective, Mapping
from ect.objectives.distillation import ConsistencyDistillation
from ect.optim import FlatState
from ect.presets import PRESETS

CPU = torch.device("cpu")
BATCH = 6


def case(**net: Any) -> waterfall.Case:
    """Every kind of block: attention, both ways of resizing, dropout."""
    small: dict[str, Any] = {"model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}
    cfg = replace(PRESETS["digits"], batch=BATCH, net=NetConfig(**small | {"dropout": 0.2} | net))
    return waterfall.Case("digits", cfg, load(DataConfig()))


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


@pytest.fixture
def philox_masks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Feed the public network the masks of this project: those of one key, block by block."""
    given: dict[str, Any] = {"key": torch.zeros((), dtype=torch.int64), "blocks": 1, "calls": 0}

    def dropout(h: Tensor, p: float, training: bool) -> Tensor:
        assert training
        layer = given["calls"] % given["blocks"]
        given["calls"] += 1
        return philox.dropout(h, p, given["key"], layer, 0)

    monkeypatch.setattr(public_net.F, "dropout", dropout)
    return given


@pytest.mark.slow
def test_loss_gradients_and_update_are_this_projects(philox_masks: dict[str, Any]) -> None:
    """On the same images, draws and masks, across stages, and across the step at which RAdam begins to rectify."""
    now, cfg = case(), case().cfg
    net = now.network(CPU)
    start = copy.deepcopy(net)
    state = FlatState(net, "radam", cfg.optim.lr, cfg.optim.betas, ema_betas=[beta_of(cfg.optim.emas[0])])
    state.compute.model.on_ops = False
    ours = train_step(replace(cfg, compile=False, graph=False), state, waterfall._stream(now, CPU))
    theirs = waterfall._public(now, CPU)
    philox_masks["blocks"], objective = len(blocks_of(net)), now.objective()
    known = dict(theirs.net.named_parameters())
    for step, stage in enumerate((0, 0, 1, 1, 2, 3, 7)):
        loss = float(ours(step * BATCH, stage))
        philox_masks["key"] = ours.key
        images, _ = ours.stream.batch(0, BATCH)
        y, _ = ours.prepare(images, 0)
        normal, eps = (ours.draw(objective.draws[name], y, 0) for name in ("normal", "eps"))
        assert float(theirs.update(y, normal, eps, stage)) == pytest.approx(loss, rel=1e-5)
        for (name, _), grad in zip(net.named_parameters(), state.views(state.grads), strict=True):
            found = known[name].grad
            assert found is not None
            # At stage 7, |D_t - D_r| is near rounding: nothing else in the step is.
            assert float((found - grad).norm()) <= (1e-4 if stage < 7 else 5e-3) * float(grad.norm()) + 1e-9, name
    assert philox_masks["calls"] == (7 + 5) * philox_masks["blocks"]  # at stage 0 every r is 0: no teacher
    averages, names = dict(zip(known, theirs.ema, strict=True)), [name for name, _ in net.named_parameters()]
    for found, want in ((known, net.parameters()), (averages, state.views(state.emas[0]))):
        end, first = flat(want), flat(start.parameters())
        assert float((flat(found[name] for name in names) - end).norm()) < 3e-3 * float((end - first).norm())


def test_the_networks_agree_and_share_no_layer() -> None:
    now = case(num_blocks=2, dropout=0.0)
    net, theirs = now.network(CPU), waterfall._public(now, CPU).net
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.01, 0.5, 40.0])
    torch.testing.assert_close(theirs(x, t), net(x, t), rtol=1e-5, atol=1e-5)
    assert all(type(layer).__module__.startswith(("lib", "torch")) for layer in theirs.modules())
    kinds = (nn.Conv2d, nn.Linear, nn.GroupNorm)
    assert any(isinstance(layer, kinds) for layer in theirs.modules())


def test_the_names_of_the_network_of_cifar10_are_the_checkpoints() -> None:
    """On the meta device: 55,732,739 parameters, as published."""
    spec = waterfall.case("ddpmpp", CPU).spec()
    with torch.device("meta"):
        net = public_net.denoiser(spec["kwargs"], spec["sigma_data"], build(spec).state_dict())
    assert sum(p.numel() for p in net.parameters()) == 55_732_739


def test_dropout_is_torchs_and_the_teacher_repeats_it(monkeypatch: pytest.MonkeyPatch) -> None:
    step = waterfall._public(case(), CPU)
    y, normal, eps = torch.randn(BATCH, 1, 8, 8), torch.randn(BATCH), torch.randn(BATCH, 1, 8, 8)
    with torch.no_grad():
        assert not torch.equal(step.net(y, torch.ones(BATCH)), step.net(y, torch.ones(BATCH)))
    answers: list[Tensor] = []
    step.net.register_forward_hook(lambda module, args, out: answers.append(out))
    states: list[Tensor] = []
    step.net.register_forward_pre_hook(lambda module, args: states.append(torch.get_rng_state()))
    step.loss(y, normal, eps, 7)
    assert len(answers) == 2 and answers[0].requires_grad and not answers[1].requires_grad
    assert torch.equal(*states)


def test_the_teacher_is_left_out_where_every_r_is_0() -> None:
    step, calls = waterfall._public(case(), CPU), []
    step.net.register_forward_hook(lambda module, args, out: calls.append(args[1]))
    y = torch.randn(BATCH, 1, 8, 8)
    step.loss(y, torch.full((BATCH,), -1.0), torch.zeros_like(y), 0)
    assert len(calls) == 1
    loss = step.loss(y, torch.tensor([-1.0] * (BATCH - 1) + [3.0]), torch.zeros_like(y), 0)
    assert len(calls) == 3 and calls[2].count_nonzero() == 1  # D at r = 0 is nan, and is not used
    assert torch.isfinite(loss).all()


def test_what_it_cannot_do_is_refused() -> None:
    now = case()
    for wrong in (
        ConsistencyObjective(weighting="uniform"),
        ConsistencyObjective(mapping=Mapping("const")),
        ConsistencyObjective(mapping=Mapping(min_gap=0.1)),
        ConsistencyDistillation(),
    ):
        with pytest.raises(ValueError, match="alone"):
            public_step.PublicStep(
                waterfall._public(now, CPU).net, wrong, now.dataset.images, batch=2, lr=0.1, betas=(0.9, 0.9),
                ema_beta=0.9,
            )  # fmt: skip
    kwargs = now.spec()["kwargs"]
    for change in ({"label_dim": 10}, {"augment_dim": 9}, {"encoder_type": "residual"}):
        with pytest.raises(ValueError, match="unconditional"):
            public_net.denoiser({**kwargs, **change}, 0.5, {})


def test_on_a_gpu_the_generator_is_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    step, kept = object.__new__(public_step.PublicStep), []
    step.device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.tensor([device.index]))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: kept.append((int(state), device)))
    before = torch.get_rng_state()
    step.set_generator(step.generator())
    assert kept == [(1, step.device)] and torch.equal(before, torch.get_rng_state())
