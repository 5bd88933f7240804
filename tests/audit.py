"""What a CUDA graph could not hold, or would hold wrongly: found by watching the operations of updates on the CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from ect_kernels import dispatch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ect.step import TrainStep

Call = tuple[str, Any, Any]


class Audit(TorchDispatchMode):
    """faults: operations that read a value on the host, bring one to the device, or whose shape depends on values. calls: every
    operation with the shapes of its tensors and its numbers. outside: addresses of the memory it used but did not make.
    """

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.calls: list[Call] = []
        self.outside: set[int] = set()
        self._made: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in _leaves((args, kwargs)) if isinstance(t, Tensor)]
        name, masks = str(func), [t for t in inputs[1:] if t.dtype in (torch.bool, torch.uint8)]
        if name.startswith("aten.lift_fresh"):
            self.faults.append(f"host data: {name} {tuple(inputs[0].shape)}")
        if torch.Tag.data_dependent_output in func.tags:
            self.faults.append(f"host read: {name}")
        by_value = torch.Tag.dynamic_output_shape in func.tags and not name.startswith("aten.index.")
        if by_value or (name.startswith(("aten.index.", "aten.index_put", "aten._index_put")) and masks):
            self.faults.append(f"data-dependent shape: {name}")
        self.calls.append((name, _plain(args), _plain(kwargs)))
        for storage in (t.untyped_storage() for t in inputs):
            if storage.data_ptr() and self._made.get(storage._cdata, lambda: None)() is None:
                self.outside.add(storage.data_ptr())
        out = func(*args, **kwargs)
        outputs = [t for t in _leaves(out) if isinstance(t, Tensor)]
        devices = {t.device.type for t in [*inputs, *outputs]}
        if len(devices) > 1:
            self.faults.append(f"device copy: {name} {sorted(devices)}")
        given = {t.untyped_storage()._cdata for t in inputs}
        for storage in (t.untyped_storage() for t in outputs):
            if storage._cdata not in given:
                self._made[storage._cdata] = weakref.ref(storage)
        return out


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value


def _plain(value: Any) -> Any:
    """Shapes, strides and dtypes in place of tensors; other values as they are."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return (tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else value


def watch_references(audit: Audit, patch: Callable[[Any, str, Any], None]) -> None:
    """Let an audit of its own, whose `faults` count, see into the reference implementations that a GPU may fall back to."""
    for op in dispatch.OPS.values():
        known = op.backends["reference"]

        def watched(function: Any) -> Any:
            def run(*args: Any) -> Any:
                with audit:
                    return function(*args)

            return function and run

        reference = dispatch.Backend(watched(known.fwd), watched(known.bwd), known.limits)
        patch(op, "backends", {**op.backends, "reference": reference})


def faults(step: TrainStep, updates: int = 3) -> list[str]:
    """What is wrong with some updates of a step, at other images, stages and settings each; [] for a step to capture."""
    audit, found, state = Audit(), [], step.state
    step.update()  # what is set up once belongs to the warm-up before a capture
    first: tuple[list[Call], set[int], list[int]] | None = None
    for i in range(updates):
        nimg = 5 * i * step.batch
        step.stream.seek(nimg)
        step.key.fill_((step.seed << 32) | (nimg // step.batch))
        step.stage.fill_(i)
        state.lr, state.ema_betas = 1e-3 / (i + 1), [0.9 + 0.01 * i for _ in state.ema_betas]
        audit.calls, audit.outside, audit._made = [], set(), {}
        with audit:
            step.update()
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
    return [*audit.faults, *found]
