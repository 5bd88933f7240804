"""The floating-point operations of what was traced, two a multiply-add, by torch.utils.flop_counter's formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry, register_flop_formula

import ect.models  # noqa: F401  which registers the ops
from ect.cost.trace import Event, TensorMeta


@register_flop_formula(torch.ops.ect.skip_product)  # registered by the import of ect.models
def _skip_product(a: torch.Size, weight: torch.Size, *shapes: Any, **more: Any) -> int:
    """Count two operations for each pixel and weight."""
    n, _, h, w = a
    return 2 * n * h * w * weight[0] * weight[1]


def flop_formula(func: Any) -> Any:
    """Return torch's formula of an operation that multiplies, None for others; one that writes in place has its twin's."""
    name = func.overloadpacket.__name__
    twin = getattr(torch.ops.aten, name.removesuffix("_"), None) if func.namespace == "aten" else None
    return flop_registry.get(func.overloadpacket) or flop_registry.get(twin)


def flops(event: Event) -> float:
    """Count by torch's formula; 0 for an operation that does not multiply."""
    if (formula := flop_formula(event.op)) is None:
        return 0.0
    args, kwargs, out = tree_map_only(TensorMeta, lambda t: t.shape, (event.args, event.kwargs, event.result))
    return float(formula(*args, **kwargs, out_val=out))
