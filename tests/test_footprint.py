"""The cost of an update, counted without a device; and the bars that the step on DDPM++ keeps."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ect.assembly import flat_state, network_spec, train_step
from ect.config import Config, DataConfig
from ect.cost import categories
from ect.cost.footprint import Footprint, foreach_kernels
from ect.cost.trace import BLOCK, Event, trace
from ect.data import Dataset, ImageStream, load
from ect.models import build
from ect.presets import PRESETS
from ect.step import TrainStep
from tests.tiny import NET

CIFAR10 = Dataset("cifar10", torch.empty(50_000, 32, 32, 3, dtype=torch.uint8, device="meta"), None)
KB = 1024


def meta(*shape: int, **options: Any) -> Tensor:
    return torch.empty(*shape, device="meta", **options)


def make(cfg: Config, dataset: Dataset, device: str = "meta", on_ops: bool = True) -> TrainStep:
    with torch.device(device):
        net = build(network_spec(cfg.net, "ECMPrecond", dataset, 0)).train()
    net.model.on_ops = on_ops
    return train_step(cfg, flat_state(cfg, net), ImageStream(dataset, 0, device, cfg.batch))


def record(function: Callable[[], object]) -> Footprint:
    return Footprint.of(trace(function))


def test_bytes_of_a_product_and_of_work_in_place() -> None:
    a, w = meta(256, 64), meta(64, 32)
    cost = record(lambda: (a @ w).t().relu_())
    assert cost.ops == 2
    assert cost.by_op["gemm/attention: mm"].bytes == 4 * (256 * 64 + 64 * 32 + 256 * 32)
    assert cost.by_op["other: relu_"].bytes == 2 * 4 * 256 * 32


def test_what_an_operation_overwrites_repeats_or_picks_is_counted_as_such() -> None:
    a, b, rows = meta(1000, 100), meta(100), meta(5, dtype=torch.int64)
    assert record(lambda: a.zero_()).traffic["other"] == 400_000
    assert record(lambda: a.copy_(b.expand(1000, 100))).traffic["other"] == 400_400
    assert record(lambda: a[rows]).traffic["other"] == 2 * 5 * 400 + 5 * 8
    assert record(lambda: (a[1:].t(), torch.empty_like(a), a.detach())).ops == 0


def test_a_convolution_is_one_operation_each_way() -> None:
    x, w = meta(2, 8, 4, 4, requires_grad=True), meta(16, 8, 3, 3, requires_grad=True)
    bias = meta(16, requires_grad=True)

    def run() -> None:
        y = torch.nn.functional.conv2d(x, w, bias, padding=1)
        torch.autograd.grad(y, (x, w, bias), meta(*y.shape))

    line = record(run).by_category["conv"]
    inner, outer, weights, vector = 2 * 8 * 16, 2 * 16 * 16, 16 * 8 * 9, 16
    forward = inner + weights + vector + outer
    assert (line.ops, line.launches, line.kernels) == (2, 2, 2 + 3)
    assert line.bytes == 4 * (forward + outer + inner + weights + inner + weights + vector)


CHUNK, HALF = 65536, torch.float16


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([1] * 64, 1), ([1] * 65, 2), ([0, 1, 0], 1), ([0], 0), ([CHUNK * 320], 1), ([CHUNK * 320 + 1], 2),
        ([CHUNK * 320 + 1] + [1] * 63, 2), ([CHUNK * 320 + 1] + [1] * 64, 3), ([CHUNK * 100] * 10, 4),
    ],
)  # fmt: skip
def test_launches_of_a_list_follow_the_limits_on_tensors_and_blocks(sizes: list[int], expected: int) -> None:
    given = [meta(size) for size in sizes]
    assert foreach_kernels("_foreach_add_", given, given) == expected
    assert foreach_kernels("_foreach_add_", given, given, tensors=448, blocks=2240) <= expected


def test_lists_that_are_not_alike_cost_a_launch_a_tensor() -> None:
    fp32, half = [meta(8, 4) for _ in range(10)], [meta(8, 4, dtype=HALF) for _ in range(10)]
    across, apart = [meta(4, 8).t() for _ in range(10)], [meta(8, 8)[:, :4] for _ in range(10)]
    one_element_wide = [t.view(8, 4, 1, 1).contiguous(memory_format=torch.channels_last) for t in fp32]
    for name, lists, fast in [
        ("_foreach_copy_", (fp32, half), True),
        ("_foreach_add_", (fp32, half), False),
        ("_foreach_copy_", (fp32, half[:5] + fp32[:5]), False),
        ("_foreach_copy_", (fp32, across), False),
        ("_foreach_copy_", (across, across), True),
        ("_foreach_copy_", (apart, apart), False),
        ("_foreach_add_", ([t.view(8, 4, 1, 1) for t in fp32], one_element_wide), True),
    ]:
        assert foreach_kernels(name, *lists) == (1 if fast else 10), (name, fast)


@pytest.mark.parametrize("add", [False, True])
def test_gradients_of_ddpmpp_are_loaded_in_two_calls_and_few_launches(add: bool) -> None:
    """One list of all, as its gradients come, would be a launch a tensor."""
    cfg = replace(PRESETS["cifar10-1h"], precision="fp16", channels_last=True)
    state = make(cfg, CIFAR10).state
    grads = [torch.empty_like(p) for p in state.inputs]
    views = state.views(state.grads)
    assert (
        foreach_kernels("_foreach_copy_", views, grads) == foreach_kernels("_foreach_add_", views, grads) == len(grads)
    )
    cost = record(lambda: state.load_grads(grads, add))
    assert cost.by_op.keys() <= {"optimizer: _foreach_add_", "optimizer: _foreach_copy_"}
    assert cost.ops == 2 + add  # fp16 is widened before it is added to fp32
    assert cost.launches <= 12 + 4 * add


def test_peak_memory_counts_what_is_alive_and_saved_for_backward() -> None:
    x = meta(KB)

    def chain(grad: bool) -> Footprint:
        def run() -> None:
            y = x.clone().requires_grad_(grad)
            z = y
            for _ in range(10):
                z = z.sin()  # saves its argument
            if grad:
                torch.autograd.grad(z.sum(), y)

        return record(run)

    assert chain(False).state_bytes == 4 * KB
    assert chain(False).peak_bytes == 4 * KB * (1 + 3)  # x; its copy, argument and result
    assert chain(True).peak_bytes >= 4 * KB * (1 + 12)


def test_memory_is_counted_in_the_allocators_blocks() -> None:
    assert record(lambda: [meta(1), meta(129)]).peak_bytes == 3 * BLOCK
    kept: list[Tensor] = []
    cost = record(lambda: kept.extend(torch.zeros(n, device="meta") for n in (1, 128, 129)))
    assert cost.peak_bytes == 4 * BLOCK


@pytest.mark.slow
@pytest.mark.parametrize("on_ops", [False, True])
def test_the_meta_device_sees_what_the_cpu_does(on_ops: bool) -> None:
    """Same operations, bytes and peak on tensors with data: nothing is counted that does not run, and nothing is missed."""
    data = load(DataConfig(labels=True))
    cfg = Config(precision="fp32", batch=8, net=replace(NET, channel_mult=(1, 2), attn_resolutions=(4,)))
    steps = [make(cfg, data, device, on_ops) for device in ("cpu", "meta")]
    steps[0].stream.seek(0)
    real, predicted = (Footprint.of(trace(step.update, "cpu")) for step in steps)
    assert predicted.ops > 200
    costs = [{name: (line.ops, line.bytes) for name, line in cost.by_op.items()} for cost in (predicted, real)]
    assert costs[0] == costs[1]
    assert predicted.peak_bytes - predicted.state_bytes == real.peak_bytes - real.state_bytes
    assert predicted.state_bytes == real.state_bytes


@pytest.mark.slow
def test_values_cannot_leave_an_update_unseen() -> None:
    """tolist() and numpy() pass by every dispatch mode on the CPU; on the meta device there is nothing to read."""
    step = make(Config(batch=8, net=NET), load(DataConfig()))
    for read in (Tensor.tolist, Tensor.numpy, Tensor.item):
        with pytest.raises((NotImplementedError, RuntimeError, TypeError)):
            record(lambda read=read: (step.update(), read(step.mean_loss)))


@pytest.fixture(scope="module")
def events() -> list[Event]:
    """An update of the 1-hour recipe as a GPU runs it without torch.compile: fp16, channels-last, on the ops, 128 images."""
    return trace(make(replace(PRESETS["cifar10-1h"], precision="fp16", channels_last=True), CIFAR10).update)


@pytest.fixture(scope="module")
def ddpmpp(events: list[Event]) -> Footprint:
    return Footprint.of(events)


@pytest.mark.slow
def test_ddpmpp_takes_at_most_700_operations(ddpmpp: Footprint, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\nDDPM++, 128 images, fp16: {ddpmpp.ops} operations, about {ddpmpp.kernels} kernels\n{ddpmpp.table()}")
    assert ddpmpp.ops <= 700


def test_ddpmpp_moves_few_bytes_beside_its_convolutions(ddpmpp: Footprint, capsys: pytest.CaptureFixture[str]) -> None:
    traffic = ddpmpp.traffic
    blocks = sum(traffic[name] for name in ("norm", "activation", "dropout", "residual", "concat"))
    convolutions = traffic["conv"] + traffic["conv 1x1 as gemm"]
    rest = sum(traffic.values()) - convolutions
    with capsys.disabled():
        print(f"\nnorm to concat {blocks / 1e9:.2f} GB, all but convolutions {rest / 1e9:.2f} GB")
    assert blocks <= 22e9, ddpmpp.table("op")
    assert rest <= 28e9, ddpmpp.table("op")


def test_tables_name_every_byte(ddpmpp: Footprint) -> None:
    for by in ("category", "op", "site"):
        lines = ddpmpp.table(by).splitlines()
        assert f"{sum(ddpmpp.traffic.values()) / 1e9:.3f}" in lines[-1]
        assert abs(sum(float(line.split()[-1]) for line in lines[1:-1]) - float(lines[-1].split()[-1])) < 0.2
    assert "radam_ema" in ddpmpp.table("op") and "ect.models." in ddpmpp.table("site", 5)


@pytest.fixture(scope="module")
def others() -> list[Event]:
    """Updates with attention, dropout, labels and augmentation, of both networks, on a GPU's ops and plain on a CPU."""
    data = load(DataConfig(labels=True))
    net = replace(NET, channel_mult=(1, 2), attn_resolutions=(4,), dropout=0.1)
    found = []
    for on_ops, arch in itertools.product((True, False), ("ddpmpp", "adm")):
        cfg = Config(batch=8, data=DataConfig(labels=True, augment=0.5), net=replace(net, arch=arch))  # type: ignore[arg-type]
        found += trace(make(cfg, data, on_ops=on_ops).update, "cuda" if on_ops else "cpu")
    return found


@pytest.mark.slow
def test_the_table_of_categories_has_every_place_that_calls_and_nothing_else(
    events: list[Event], others: list[Event]
) -> None:
    """A renamed module, function or operation leaves a row that nothing falls under; a new module of a step has to say what its
    operations are for. What has no site, autograd makes up."""
    updates = [*events, *others]
    rows = [categories.rows(event) for event in updates]
    assert {row for found in rows for row in found} - {""} == categories.TABLE.keys()
    assert all(function or module for (function, module, _), event in zip(rows, updates, strict=True) if event.site)
