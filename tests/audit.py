"""What a CUDA graph could not hold, or would hold wrongly: found by watching the operations of updates on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from ect_kernels import dispatch
from torch.utils._pytree import tree_map_only

from ect.cost.trace import Event, TensorMeta, trace
from ect.step import TrainStep

Call = tuple[str, Any, Any]
T = TypeVar("T")


class Audit:
    """faults: operations that read a value on the host, bring one to the device, or whose shape depends on values. calls: every
    operation with the shapes of its tensors and its numbers. outside: addresses of the memory it used but did not make.
    """

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.calls: list[Call] = []
        self.outside: set[int] = set()

    def run(self, function: Callable[[], T]) -> T:
        """The function's result; its operations are looked at."""
        results: list[T] = []
        for event in trace(lambda: results.append(function())):
            self._look_at(event)
        return results[0]

    def _look_at(self, event: Event) -> None:
        name, inputs = str(event.op), event.inputs
        masks = [t for t in inputs[1:] if t.dtype in (torch.bool, torch.uint8)]
        if name.startswith("aten.lift_fresh"):
            self.faults.append(f"host data: {name} {tuple(inputs[0].shape)}")
        if torch.Tag.data_dependent_output in event.op.tags:
            self.faults.append(f"host read: {name}")
        by_value = torch.Tag.dynamic_output_shape in event.op.tags and not name.startswith("aten.index.")
        if by_value or (name.startswith(("aten.index.", "aten.index_put", "aten._index_put")) and masks):
            self.faults.append(f"data-dependent shape: {name}")
        devices = {t.device.type for t in [*inputs, *event.outputs]}
        if len(devices) > 1:
            self.faults.append(f"device copy: {name} {sorted(devices)}")
        self.calls.append((name, *tree_map_only(TensorMeta, _plain, (event.args, event.kwargs))))
        self.outside |= {t.storage.address for t in inputs if t.storage.address and not t.storage.made}


def _plain(t: TensorMeta) -> tuple[Any, ...]:
    return tuple(t.shape), t.strides, t.dtype


def watch_references(audit: Audit, patch: Callable[[Any, str, Any], None]) -> None:
    """Let an audit of its own, whose `faults` count, see into the reference implementations that a GPU may fall back to."""
    for op in dispatch.OPS.values():
        known = op.backends["reference"]

        def watched(function: Any) -> Any:
            def run(*args: Any) -> Any:
                return audit.run(lambda: function(*args))

            return function and run

        reference = dispatch.Backend(watched(known.fwd), watched(known.bwd), known.limits)
        patch(op, "backends", {**op.backends, "reference": reference})


def faults(step: TrainStep, updates: int = 3) -> list[str]:
    """What is wrong with some updates of a step, at other images, stages and settings each; [] for a step to capture."""
    found, state = [], step.state
    step.update()  # what is set up once belongs to the warm-up before a capture
    first: tuple[list[Call], set[int], list[int]] | None = None
    for i in range(updates):
        nimg = 5 * i * step.batch
        step.stream.seek(nimg)
        step.key.fill_((step.seed << 32) | (nimg // step.batch))
        step.stage.fill_(i)
        state.lr, state.ema_betas = 1e-3 / (i + 1), [0.9 + 0.01 * i for _ in state.ema_betas]
        audit = Audit()
        audit.run(step.update)
        found += audit.faults
        seen = (audit.calls, audit.outside, [t.untyped_storage().data_ptr() for t in step.tensors()])
        first = first or seen
        if seen[2] != first[2]:
            found.append("state storage: a tensor of step.tensors() moved")
        if seen[1] != first[1]:
            found.append("other memory: an update read or wrote tensors that an earlier one did not have")
        if seen[0] != first[0]:
            pairs = zip(seen[0], first[0], strict=False)
            change = next((f"{a} after {b}" for a, b in pairs if a != b), "another number of operations")
            found.append(f"another update: {change}")
    return found
