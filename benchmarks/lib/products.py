"""The convolutions and matrix products of a step by themselves: a floor that can be measured on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lib.work import flop_formula


class Products(TorchDispatchMode):
    """The products of one `step`, to be repeated by a call, and nothing else.

    They are its convolutions and matrix products, forward and backward, on the same shapes, channels-last, with random
    data.
    """

    def __init__(self, step: Callable[[], Any]) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []
        self._operands: dict[tuple[Any, ...], Tensor] = {}
        with self:
            step()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if flop_formula(func) is not None:
            self.calls.append((func, *tree_map(self._operand, (args, kwargs or {}))))
        return func(*args, **(kwargs or {}))

    def _operand(self, value: Any) -> Any:
        """Return random numbers in place of a tensor, the same ones for the same shape."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        key = (value.shape, value.dtype, () if value.dim() == 4 else value.stride())
        if key not in self._operands:
            made = torch.empty_like(
                value, memory_format=torch.channels_last if value.dim() == 4 else torch.preserve_format
            )
            self._operands[key] = made.normal_()
        return self._operands[key]

    def __call__(self) -> None:
        with torch.no_grad():
            for func, args, kwargs in self.calls:
                func(*args, **kwargs)
