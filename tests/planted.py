"""A backend 'planted' of an op, which `auto` prefers on the CPU: the reference with a fault of one's choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ect_kernels import dispatch

NAME = "planted"
Change = Callable[[Any, Any], Any]
"""(results, arguments) -> results; radam_ema's results are its arguments."""


def sound(results: Any, arguments: Any) -> Any:
    return results


def _first(results: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """Change the first tensor of a pass's results, or of the optimizer's arenas, in place."""
    change(results[0])
    return results


def raises(results: Any, arguments: Any) -> Any:
    raise RuntimeError("CUDA error: a planted failure\nand what follows it")


def off_by_2_percent(results: Any, arguments: Any) -> Any:
    def change(t: torch.Tensor) -> None:
        t.copy_(~t if t.dtype == torch.bool else t * 1.02)

    return _first(results, change)


def one_wrong(results: Any, arguments: Any) -> Any:
    """A single value, as a missing wait or a wrong bound would leave it."""
    return _first(results, lambda t: t[(0,) * t.dim()].add_(t.abs().max()))


def one_nan(results: Any, arguments: Any) -> Any:
    return _first(results, lambda t: t[(0,) * t.dim()].fill_(torch.nan))


FAULTS = {f.__name__: f for f in (raises, off_by_2_percent, one_wrong, one_nan)}


def plant(
    patch: pytest.MonkeyPatch, op: str, forward: Change = sound, backward: Change = sound,
    limits: Callable[..., str | None] = lambda *args: None, name: str = NAME,
) -> None:  # fmt: skip
    """Give `op` the backend, with a change of the results of its forward and backward."""
    known = dispatch.OPS[op]
    reference = known.backends["reference"]

    def changed(function: Callable[..., Any] | None, change: Change) -> Callable[..., Any] | None:
        def run(*args: Any) -> Any:
            assert function is not None
            results = function(*args)
            changed = change(args if results is None else results, args)
            return None if results is None else changed

        return None if function is None else run

    planted = dispatch.Backend(changed(reference.fwd, forward), changed(reference.bwd, backward), limits)  # type: ignore[arg-type]
    patch.setattr(known, "backends", {**known.backends, name: planted})
    patch.setitem(dispatch.AUTO, "cpu", (name, "reference"))
    dispatch.forget()
