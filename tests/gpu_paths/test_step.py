"""A whole update on a GPU that is not there: forward, backward and optimizer, down to the launches of the kernels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, suppress

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from ect import precision
from ect.step import TrainStep
from tests.gpu_paths import cases
from tests.gpu_paths.fake_gpu import GPUS, FakeGpu
from tests.gpu_paths.pairwise import Case, cover, name

COVER = cover(cases.AXES, cases.allowed)
FULL = [pytest.param(case, id=f"full: {name(case)}", marks=pytest.mark.full) for case in cases.full()]


@pytest.mark.slow
@pytest.mark.parametrize("case", [*[pytest.param(case, id=name(case)) for case in COVER], *FULL])
def test_an_update_stays_on_the_device(case: Case) -> None:
    with FakeGpu(GPUS[case["gpu"]], archs=cases.archs(case)) as gpu:
        step = cases.step(**case)
        with closing(step.stream):
            precision.apply(precision.PRECISIONS[case["precision"]])
            step.stream.seek(0)
            before = [t.untyped_storage()._cdata for t in step.tensors()]
            with gpu.watch() as events:
                step.update()
            assert events == []
            assert [t.untyped_storage()._cdata for t in step.tensors()] == before
            assert all(t.device.type == "cuda" for t in step.tensors())
            backward = [op for op in gpu.calls if op.startswith("aten.convolution_backward")]
            assert len(backward) > 10
            if gpu.gpu.arch >= 80 and gpu.archs:
                norms = (
                    {"group_norm_silu_fwd", "residual_group_norm_silu_bwd"} if case["arch"] != "edm2-narrow" else set()
                )
                assert norms | {"radam_ema_fwd"} <= set(gpu.launches)
            else:
                assert not gpu.launches


@pytest.mark.slow
def test_kernels_run_on_the_device_of_their_tensors() -> None:
    with FakeGpu(GPUS["A100"], devices=2, archs=cases.BUILT) as gpu:
        step = cases.step(device="cuda:1", small=True)
        with closing(step.stream):
            step(0, 0)
        assert gpu.launched_on == {1} and gpu.current == [0]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["ddpmpp", "edm2-narrow"])
def test_a_capture_holds_one_update_and_a_call_copies_only_the_images(arch: str) -> None:
    with FakeGpu(GPUS["H100"], archs=cases.BUILT) as gpu:
        step = cases.step(small=True, arch=arch)
        step.wants_graph = True
        with closing(step.stream):
            step(0, 0)
            assert len(step.graphs) == 1
            with gpu.watch() as events:
                step(step.batch, 0)
            assert {event.kind for event in events} <= {"host work", "host copy"}, events
            assert not any(op.startswith("ect.") for op in gpu.calls)


PLANTS: dict[str, tuple[str, Callable[[TrainStep], object]]] = {
    "item": ("host read", lambda step: step.mean_loss.item()),
    "bool": ("host read", lambda step: bool(step.mean_loss > 0)),
    "nonzero": ("data-dependent shape", lambda step: step.state.grads.nonzero()),
    "mask": ("data-dependent shape", lambda step: step.state.grads[step.state.grads > 0]),
    "tensor": ("host data", lambda step: torch.tensor(3.0, device="cuda")),
    "cpu": ("host copy", lambda step: step.mean_loss.cpu()),
    "cuda": ("host copy", lambda step: torch.ones(3).cuda()),
    "ones": ("host work", lambda step: torch.ones(3)),
    "mixed": ("mixed devices", lambda step: step.mean_loss + torch.ones(())),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_the_watch_finds_a_planted_fault(plant: str) -> None:
    kind, fault = PLANTS[plant]
    with FakeGpu(GPUS["A100"]) as gpu:
        step = cases.step(small=True)
        with closing(step.stream), gpu.watch() as events, suppress(DynamicOutputShapeException):
            fault(step)
        assert kind in {event.kind for event in events}, events
