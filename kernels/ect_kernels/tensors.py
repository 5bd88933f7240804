"""Layouts and dtypes of the ops' tensors."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

Some = TypeVar("Some", Tensor, Tensor | None)


def wide(x: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic on x: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def fp32(v: Tensor | None) -> Tensor | None:
    """Return a vector as the kernels read it: contiguous float32."""
    if v is None or (
        v.dtype == torch.float32 and v.is_contiguous()
    ):  # nothing to do costs nothing: it is for each call of an op
        return v
    return v.to(torch.float32).contiguous()


def fp32_rows(v: Tensor | None) -> Tensor | None:
    """Return rows [N, C] as the kernels read them: float32 with neighbouring channels.

    They may be those of a larger tensor.
    """
    if v is not None and v.dtype != torch.float32:
        v = v.to(torch.float32)
    return v if v is None or v.stride(1) == 1 else v.contiguous()


def nhwc(x: Some) -> Some:
    """Return x channels-last: itself, or a copy."""
    return None if x is None else x.contiguous(memory_format=torch.channels_last)


def empty_image(like: Tensor, channels: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialised channels-last [N, channels, H, W].

    Its strides are the same for fakes also where H = W = 1 would make them ambiguous.
    """
    n, _, h, w = like.shape
    strides = (h * w * channels, 1, w * channels, channels)
    return torch.empty_strided((n, channels, h, w), strides, dtype=dtype or like.dtype, device=like.device)


def check_shapes(op: str, *named: tuple[Any, ...]) -> None:
    """Raise ValueError for the first of (name, tensor or None, expected shapes ...) that has none of them."""
    for name, tensor, *shapes in named:
        if tensor is not None and tuple(tensor.shape) not in shapes:
            raise ValueError(f"{op}: {name} is {tuple(tensor.shape)}, expected {' or '.join(map(str, shapes))}")
