"""The first bad tensor by its name: whatever goes bad, wherever, on either runner, in any micro-batch, in any update."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ect.assembly import frozen, network_spec
from ect.config import Config
from ect.models import build
from ect.objectives.distillation import ConsistencyDistillation
from ect.objectives.posterior import PosteriorMean, PosteriorTarget
from ect.ranks.distributed import World
from ect.ranks.first_bad import agreed, all_finite, first_bad
from ect.step import TrainStep
from tests.test_step import DATA, make
from tests.tiny import NET

VALUES = [math.nan, math.inf, -math.inf]
OPS = [False, True]


def ready(on_ops: bool = False, **options: Any) -> TrainStep:
    """A step that has done one update, of the images 0 to 12."""
    step = make(**options)
    step.net.model.on_ops = on_ops
    step(0, 0)
    return step


def spoil_output(module: nn.Module, value: float) -> None:
    def change(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[(0,) * output.dim()] = value
        return output

    module.register_forward_hook(change)


@pytest.mark.parametrize("on_ops", OPS)
def test_where_all_is_finite_nothing_is_named_and_nothing_stays(on_ops: bool) -> None:
    step = ready(on_ops)
    before = {name: tensor.clone() for name, tensor in step.state.saved_arenas().items()}
    assert first_bad(step, 0) is None
    assert all(torch.equal(before[name], tensor) for name, tensor in step.state.saved_arenas().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in step.net.modules())


@pytest.mark.parametrize("value", VALUES)
def test_each_tensor_of_the_state_is_named(value: float) -> None:
    """All arenas, each average among them; the loss scale; buffers. Of two, the first."""
    step = make(precision="fp16")
    step.state.emas.append(step.state.params.clone())
    assert {"params", "exp_avg", "exp_avg_sq", "ema0", "ema1"} <= step.state.saved_arenas().keys()
    assert step.state.loss_scale is not None
    step.net.register_buffer("taps", torch.ones(3))
    step.state.net.register_buffer("taps", torch.ones(3))
    last = [name for name, _ in step.state.net.named_parameters()][-1]
    places = {f"{arena}.{last}": step.state.saved_views()[f"{arena}.{last}"] for arena in step.state.saved_arenas()}
    places |= {"loss_scale": step.state.loss_scale, "the buffer taps": step.state.net.get_buffer("taps")}
    for name, tensor in reversed(places.items()):
        tensor.view(-1)[-1] = value
        assert first_bad(step, 0) == name


@pytest.mark.slow
def test_each_layer_whose_output_goes_bad_is_named() -> None:
    for name, module in ready().net.named_modules():
        if list(module.parameters(recurse=False)):
            step = ready()
            spoil_output(step.net.get_submodule(name), math.nan)
            assert first_bad(step, 0) == f"the output of {name}"


@pytest.mark.parametrize("layer", ["enc.8x8_conv", "enc.8x8_block0.conv0", "dec.8x8_block0.conv1"])
def test_on_the_ops_a_convolution_is_named(layer: str) -> None:
    """They take what norms and embeddings hold, and call no such layer."""
    step = ready(on_ops=True)
    spoil_output(step.net.get_submodule(f"model.{layer}"), math.inf)
    assert first_bad(step, 0) == f"the output of model.{layer}"


@pytest.mark.parametrize("on_ops", OPS)
def test_a_layer_that_overflows_is_named_before_those_that_it_spoils(on_ops: bool) -> None:
    step = ready(on_ops)
    with torch.no_grad():
        step.net.get_parameter("model.enc.8x8_conv.weight").fill_(3e38)
    assert first_bad(step, 0) == "the output of model.enc.8x8_conv"


@pytest.mark.parametrize("value", VALUES[:2])
@pytest.mark.parametrize("on_ops", OPS)
@pytest.mark.parametrize("micro_batch", [12, 6])
def test_data_that_are_bad_are_named_in_the_update_that_met_them(on_ops: bool, value: float, micro_batch: int) -> None:
    assert DATA.labels is not None
    labels = DATA.labels.clone()
    step = ready(on_ops, dataset=replace(DATA, labels=labels), micro_batch=micro_batch)
    bad = step.stream.order.indices(12, 12)[-1]  # met by the second update, in its last micro-batch
    assert step.stream.labels is not None
    step.stream.labels[bad] = value
    assert first_bad(step, 0) is None and first_bad(step, 24) is None
    assert first_bad(step, 12) in (f"class_labels, an input of {which}" for which in ("the network", "model"))


@pytest.mark.parametrize("value", VALUES)
def test_bad_gradients_are_named_in_the_order_of_the_layers(value: float) -> None:
    step = ready()
    names = [name for name, _ in step.state.net.named_parameters()]
    for i in (len(names) - 1, len(names) // 2):
        step.state.inputs[i].register_hook(lambda grad: torch.full_like(grad, value))
        assert first_bad(step, 0) == f"the gradient of {names[i]}"


@pytest.mark.parametrize("value", VALUES)
def test_a_bad_loss_is_named_with_what_it_spoils(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    step, loss = ready(), TrainStep.loss
    first = next(name for name, _ in step.state.net.named_parameters())
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "loss", lambda self, i: loss(self, i) + value)  # the gradients do not know of it
        assert first_bad(step, 0) == "the loss"
    monkeypatch.setattr(TrainStep, "loss", lambda self, i: loss(self, i) * value)
    assert first_bad(step, 0) == f"the gradient of {first}, after a loss that is not finite"


@pytest.mark.parametrize("part", ["weight", "output"])
def test_a_teacher_that_goes_bad_is_named(part: str) -> None:
    spec = network_spec(NET, "EDMPrecond", DATA, 0)
    teacher = frozen(Config(precision="fp32"), build({**spec, "kwargs": {**spec["kwargs"], "label_dim": 0}}))
    step = ready(objective=ConsistencyDistillation(), teacher=teacher)
    assert first_bad(step, 0) is None
    name = next(name for name, _ in teacher.named_parameters() if name.endswith("conv1.weight"))
    if part == "weight":
        teacher.get_parameter(name).view(-1)[0] = math.nan
        assert first_bad(step, 0) == f"the teacher's {name}"
    else:
        layer = name.removesuffix(".weight")
        spoil_output(teacher.get_submodule(layer), math.nan)
        assert first_bad(step, 0) == f"the output of the teacher: {layer}"


def test_a_teacher_without_layers_hides_nothing() -> None:
    """The posterior mean over the images is no network; what goes bad beside it is named all the same."""
    objective = PosteriorTarget()
    images = make().stream.images
    step = ready(objective=objective, teacher=PosteriorMean(images))
    assert first_bad(step, 0) is None
    layer = "model.enc.8x8_conv"
    spoil_output(step.net.get_submodule(layer), math.nan)
    assert first_bad(step, 0) == f"the output of {layer}"


def test_a_search_that_finds_no_room_tells_what_it_has_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    step = ready()
    monkeypatch.setattr(step.state, "load_grads", full)
    assert first_bad(step, 0) is None
    spoil_output(step.net.model, math.nan)
    assert first_bad(step, 0) == "the output of model"


@pytest.mark.parametrize(
    ("names", "told"),
    [([None, None], None), ([None, "the loss"], "the loss"), (["a", "b"], "a"), (["x" * 999, None], "x" * 200)],
)
def test_ranks_tell_each_other_the_name(names: list[str | None], told: str | None) -> None:
    sent: list[Tensor] = []
    note: Callable[[Tensor], list[Tensor]] = lambda part: sent.append(part) or [part]  # noqa: E731
    for name in names:
        agreed(name, SimpleNamespace(gather=note))  # type: ignore[arg-type]
    assert agreed(names[0], SimpleNamespace(gather=lambda part: sent)) == told  # type: ignore[arg-type]
    assert agreed(names[0], World()) == (None if names[0] is None else names[0][:200])


def test_every_value_of_every_tensor_is_looked_at() -> None:
    assert not all_finite([torch.zeros(3), torch.tensor([1.0, -math.inf])]) and all_finite([torch.empty(0)])
    assert all_finite([torch.tensor([3e38, -3e38]), torch.tensor(1e300, dtype=torch.float64)]) and all_finite([])
