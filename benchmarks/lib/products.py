"""The convolutions and matrix products of a step by themselves: a floor that can be measured on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ect.cost.flops import flop_formula
from ect.cost.trace import TensorMeta, trace


class Products:
    """The products of one `step`, to be repeated by a call, and nothing else.

    They are its convolutions and matrix products, forward and backward, on the same shapes, channels-last, with random
    data.
    """

    def __init__(self, step: Callable[[], Any]) -> None:
        self._operands: dict[tuple[Any, ...], Tensor] = {}
        self.calls = [
            (event.op, *tree_map_only(TensorMeta, self._operand, (event.args, event.kwargs)))
            for event in trace(step)
            if flop_formula(event.op) is not None
        ]

    def _operand(self, t: TensorMeta) -> Tensor:
        """Return random numbers in place of a tensor, the same ones for the same shape; zeros in place of integers."""
        key = (t.shape, t.dtype, () if len(t.shape) == 4 else t.strides)
        if key not in self._operands:
            like = torch.empty_strided(t.shape, t.strides, dtype=t.dtype, device="meta")
            order = torch.channels_last if len(t.shape) == 4 else torch.preserve_format
            made = torch.zeros_like(like, device=t.device, memory_format=order)
            self._operands[key] = made.normal_() if t.dtype.is_floating_point else made
        return self._operands[key]

    def __call__(self) -> None:
        with torch.no_grad():
            for func, args, kwargs in self.calls:
                func(*args, **kwargs)
