"""FlatState against torch.optim, the golden trajectory, and its rules for bad gradients."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from ect_kernels.radam_ema import F64

from ect.models import ECMPrecond, SongUNet
from ect.objective import ConsistencyObjective, Mapping
from ect.optim import Arenas, FlatState
from tests.golden_data import MANIFEST, load, part


def mlp() -> torch.nn.Module:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.SiLU(), torch.nn.Linear(7, 3))
    net.register_buffer("constant", torch.ones(2))
    return net


def loss(net: torch.nn.Module, i: int) -> torch.Tensor:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(i))
    return (net(x) ** 2).sum()


def backward(state: FlatState, i: int) -> None:
    state.load_grads(torch.autograd.grad(loss(state.compute, i), state.inputs))


@pytest.mark.parametrize("name", ["radam", "adam"])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.99)])
def test_equals_torch_over_30_steps(name: str, betas: tuple[float, float]) -> None:
    ours, theirs = mlp(), mlp()
    ema = copy.deepcopy(theirs)
    state = FlatState(ours, name, lr=1e-2, betas=betas, eps=1e-6, ema_betas=[0.9, 0.5])
    optimizer = {"radam": torch.optim.RAdam, "adam": torch.optim.Adam}[name](
        theirs.parameters(), lr=1e-2, betas=betas, eps=1e-6
    )
    for i in range(30):  # crosses the step at which RAdam starts to rectify
        optimizer.zero_grad()
        backward(state, i)
        loss(theirs, i).backward()
        state.step()
        optimizer.step()
        for average, p in zip(ema.parameters(), theirs.parameters(), strict=True):
            average.data.lerp_(p.data, 0.1)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    got = state.ema_state_dict(0)
    assert list(got) == list(ours.state_dict())
    for key, want in ema.state_dict().items():
        torch.testing.assert_close(got[key], want, rtol=1e-5, atol=1e-7)
    assert not torch.equal(got["0.weight"], state.ema_state_dict(1)["0.weight"])


@pytest.mark.slow
def test_golden_trajectory() -> None:
    case, g = MANIFEST["trajectory"], load("trajectory")
    net = ECMPrecond(SongUNet(**case["kwargs"])).train()
    init = part(g, "init.")
    net.load_state_dict(init)
    state = FlatState(net, "radam", case["lr"], tuple(case["betas"]), case["eps"], ema_betas=[case["ema_beta"]])
    objective = ConsistencyObjective(Mapping(q=case["q"]), c=case["c"])
    for step in range(case["steps"]):
        t = (objective.P_mean + objective.P_std * g["n"][step]).exp()
        r = objective.mapping(t, step // 3)
        loss = objective.loss(net, g["images"][step], t, r, g["eps"][step])
        assert (loss.detach() - g["losses"][step]).norm() / g["losses"][step].norm() <= 1e-3
        state.load_grads(torch.autograd.grad(loss.mean(), state.inputs))
        state.step()
    for got, want in [(net.state_dict(), part(g, "final.")), (state.ema_state_dict(0), part(g, "ema."))]:
        assert set(got) == set(want)
        moved = [(got[k] - init[k], want[k] - init[k]) for k in want]
        error = math.sqrt(sum(float((a - b).square().sum()) for a, b in moved))
        assert error / math.sqrt(sum(float(b.square().sum()) for _, b in moved)) <= 1e-2


@pytest.mark.parametrize("channels_last", [False, True])
def test_parameters_and_gradients_are_aligned_views(channels_last: bool) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.Flatten(), torch.nn.Linear(20, 3))
    before = [p.detach().clone() for p in net.parameters()]
    x = torch.randn(2, 3, 4, 4)
    want = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    state = FlatState(net, channels_last=channels_last)
    for p, old in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, old)
        assert p.data_ptr() % 16 == 0
        assert p.untyped_storage().data_ptr() == state.params.untyped_storage().data_ptr()
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last) is channels_last
    for times in (1, 2):  # loaded, then added
        state.load_grads(torch.autograd.grad(net(x).square().sum(), state.inputs), add=times == 2)
        for grad, view in zip(want, state.views(state.grads), strict=True):
            torch.testing.assert_close(times * grad, view)
    assert all(tensor.is_contiguous() for tensor in state.state_tensors().values())


def test_gradients_of_any_dtype_and_memory_order_are_loaded_and_added() -> None:
    net = torch.nn.Sequential(*(torch.nn.Conv2d(4, 6, 3) for _ in range(4)))
    state = FlatState(net, half=torch.float16, core={"0.weight", "1.weight"}, channels_last=True)
    grads = [torch.randn(p.shape).to(p.dtype) for p in state.inputs]
    grads = [g.contiguous(memory_format=torch.channels_last) if i in (0, 4) else g for i, g in enumerate(grads)]
    for times in (1, 2):
        state.load_grads(grads, add=times == 2)
        for grad, view in zip(grads, state.views(state.grads), strict=True):
            assert torch.equal(times * grad.float(), view)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_the_twin_computes_with_the_shadow_and_follows_every_step(half: torch.dtype) -> None:
    net = mlp()
    state = FlatState(net, "adam", lr=1e-2, half=half, core={"0.weight"})
    twin = state.compute
    assert twin is not net and twin[0].weight.dtype == half and twin[2].weight is net[2].weight
    assert twin.constant is net.constant
    for _ in range(2):
        assert torch.equal(twin[0].weight, net[0].weight.to(half)) and torch.equal(twin[0].bias, net[0].bias)
        before = net[0].weight.clone()
        grads = [torch.ones_like(p) for p in state.inputs]
        assert grads[0].dtype == half
        state.load_grads(grads)
        state.step()
        assert not torch.equal(net[0].weight, before)
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in net.named_parameters()]


def test_nonfinite_gradients_are_cleaned_and_counted() -> None:
    net = mlp()
    state = FlatState(net, "adam", lr=1e-3, ema_betas=[0.9])
    backward(state, 0)
    state.grads[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    state.step()
    assert int(state.nonfinite) == 3
    assert state.params.isfinite().all() and state.emas[0].isfinite().all()
    assert state.grads[:3].tolist() == [0.0, 1e5, -1e5]


def test_clip_bounds_the_global_norm() -> None:
    state = FlatState(mlp(), clip=0.5)
    backward(state, 0)
    unclipped = state.grads.clone()
    state.step()
    assert float(state.grad_norm) == pytest.approx(float(unclipped.norm())) and state.grad_norm > 0.5
    torch.testing.assert_close(state.grads, unclipped * 0.5 / unclipped.norm(), rtol=1e-4, atol=1e-7)
    state.rule.clip = 1e9
    backward(state, 0)
    before = state.grads.clone()
    state.step()
    assert torch.equal(state.grads, before)


def test_state_survives_a_round_trip() -> None:
    first, second = (FlatState(mlp(), lr=1e-2, ema_betas=[0.9]) for _ in range(2))
    for i in range(8):
        backward(first, i)
        first.step()
    second.load_state_tensors(first.state_tensors())
    for state in (first, second):
        backward(state, 9)
        state.step()
    assert torch.equal(first.params, second.params) and torch.equal(first.emas[0], second.emas[0])
    incomplete = first.state_tensors()
    incomplete.pop("exp_avg.0.weight")
    with pytest.raises(KeyError, match=r"exp_avg\.0\.weight"):
        second.load_state_tensors(incomplete)


def test_only_a_loss_scales_own_counters_may_be_missing() -> None:
    plain = FlatState(mlp(), lr=1e-2)
    scaled = FlatState(mlp(), lr=1e-2, loss_scale=256.0)
    backward(plain, 0)
    plain.step()
    scaled.skipped.fill_(7)
    scaled.load_state_tensors(plain.state_tensors())
    assert (int(scaled.steps), int(scaled.skipped), float(scaled.loss_scale)) == (1, 7, 256.0)
    whole, before = scaled.state_tensors(), scaled.params.clone()
    for name in ("steps", "nonfinite", "skipped", "loss_scale", "good_steps"):
        damaged = {key: tensor for key, tensor in whole.items() if key != name}
        damaged["params.0.weight"] = damaged["params.0.weight"] + 1
        with pytest.raises(KeyError, match=f"^'{name}'$"):
            scaled.load_state_tensors(damaged)
        assert torch.equal(scaled.params, before)
    plain.load_state_tensors(whole)  # which needs none of them


def test_settings_reach_the_device_scalars_when_assigned() -> None:
    nets = [mlp(), mlp()]
    a = FlatState(nets[0], "adam", lr=1e-2, eps=1e-3, ema_betas=[0.9, 0.5], clip=2.0)
    b = FlatState(nets[1], "adam", lr=1.0, ema_betas=[0.1, 0.2])
    b.lr, b.rule.eps, b.rule.clip, b.ema_betas = 1e-2, 1e-3, 2.0, [0.9, 0.5]
    assert torch.equal(a.rule.state_f64, b.rule.state_f64)
    assert (b.lr, b.rule.eps, b.rule.clip, b.ema_betas) == (1e-2, 1e-3, 2.0, (0.9, 0.5))
    b.clip, b.eps = 3.0, 1e-4  # of the state: its rule's
    assert [b.rule.clip, b.rule.eps] == b.rule.state_f64[[F64.CLIP, F64.EPS]].tolist() == [3.0, 1e-4]
    b.rule.clip, b.ema_betas = None, [0.0, 1.0]
    assert b.rule.clip is b.clip is None and math.isinf(b.rule.state_f64[F64.CLIP])
    start = b.params.clone()
    backward(b, 0)
    b.step()
    assert torch.equal(b.emas[0], b.params) and torch.equal(b.emas[1], start) and not torch.equal(b.params, start)
    with pytest.raises(ValueError, match="2 weight averages"):
        b.ema_betas = [0.5]


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_loss_scale_skips_overflow_and_survives_a_round_trip(half: torch.dtype) -> None:
    want = FlatState(mlp(), lr=1e-2, ema_betas=[0.9])
    state, resumed = (
        FlatState(mlp(), lr=1e-2, ema_betas=[0.9], loss_scale=256.0, growth_interval=3, half=half) for _ in range(2)
    )

    def step(state: FlatState, i: int, overflow: bool = False) -> None:
        backward(state, i)
        if state.loss_scale is not None:
            state.grads.mul_(state.loss_scale)
        if overflow:
            state.grads[1] = math.inf
        state.step()

    for i in range(8):
        step(want, i)
        if i == 4:
            step(state, i, overflow=True)
            assert math.isinf(float(state.grad_norm))
        step(state, i)
    assert torch.equal(state.params, want.params) and torch.equal(state.emas[0], want.emas[0])
    assert torch.equal(state.shadow, state.params.to(half))
    assert (int(state.steps), int(state.skipped), int(state.nonfinite)) == (8, 1, 1)
    assert float(state.loss_scale) == 512.0  # doubled after three, halved, doubled after three more
    assert float(state.grad_norm) == pytest.approx(float(want.grad_norm))
    resumed.load_state_tensors(state.state_tensors())
    assert torch.equal(resumed.shadow, state.shadow)
    for i in range(8, 12):
        step(state, i)
        step(resumed, i)
    for name, tensor in state.state_tensors().items():
        assert torch.equal(tensor, resumed.state_tensors()[name]), name
    assert float(state.loss_scale) == 1024.0


@pytest.mark.parametrize(
    ("name", "value"),
    [("optimizer", "sgd"), ("lr", -1.0), ("betas", (1.0, 0.9)), ("eps", -1), ("ema_betas", [2.0]), ("clip", 0.0),
     ("ema_betas", [0.9] * 5), ("loss_scale", 0.0), ("loss_scale", math.inf), ("growth_interval", 0),
     ("half", torch.float32)],
)  # fmt: skip
def test_impossible_values_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        FlatState(mlp(), **{name: value})


def test_weights_keep_their_layout_where_no_other_is_asked_for() -> None:
    net = torch.nn.Conv2d(3, 4, 3)
    before = net.weight.detach().clone()
    Arenas(net)
    assert net.weight.is_contiguous() and torch.equal(net.weight, before)


def test_gradients_are_set_to_zero() -> None:
    state = FlatState(mlp())
    backward(state, 0)
    assert state.grads.any()
    state.zero_grad()
    assert not state.grads.any()
