"""Philox4x32-10: random numbers as a pure function of (seed, counter), in integer PyTorch.

Counter-based draws make noise and dropout masks independent of batch split, rank and order of evaluation: the value of an
element follows from the 64-bit seed and the element's global index alone. Source: Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3" (SC 2011). The functions below read no value on the host, so they may run inside a CUDA graph.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # round multipliers
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # key increments
_LOW = 0xFFFFFFFF

# The second counter word says what a draw is for, so that no two uses share bits. U-Net layers count up from 0; the
# named streams count down from the top.
STREAM_EPS = _LOW  # noise of a training image
STREAM_T = _LOW - 1  # noise level of a training image
STREAM_FLIP = _LOW - 2  # horizontal flips
STREAM_AUGMENT_UNIFORM = _LOW - 3
STREAM_AUGMENT_NORMAL = _LOW - 4
STREAM_LABEL_DROPOUT = _LOW - 5


def philox4x32(
    seed: Tensor | int, c0: Tensor, c1: int, c2: int = 0, c3: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run ten rounds of Philox4x32 for each counter (c0[i], c1, c2, c3)."""
    seed = torch.as_tensor(seed, dtype=torch.int64, device=c0.device)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    x0, x1, x2, x3 = c0, torch.full_like(c0, c1), torch.full_like(c0, c2), torch.full_like(c0, c3)
    for i in range(10):
        if i > 0:
            k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
        product0, product1 = x0 * _M0, x2 * _M1  # the wrapped 64-bit products have the right bits
        x0, x1 = ((product1 >> 32) ^ x1 ^ k0) & _LOW, product1  # x1 and x3 are cut to 32 bits where they are used
        x2, x3 = ((product0 >> 32) ^ x3 ^ k1) & _LOW, product0
    return x0, x1 & _LOW, x2, x3 & _LOW


def uniform(
    seed: Tensor | int, stream: int, n0: Tensor | int | None, batch: int, per_sample: int, device: torch.device
) -> Tensor:
    """Return float32 [batch, per_sample], uniform in (0, 1], of the global samples n0 ... n0 + batch.

    Every sample starts a block of its own: its draws do not depend on its neighbours' number or order.
    """
    blocks = -(-per_sample // 4)
    counters = ((0 if n0 is None else n0) * blocks + torch.arange(batch * blocks, device=device)) & _LOW
    words = torch.stack(philox4x32(seed, counters, stream), dim=-1).view(batch, -1)[:, :per_sample]
    return ((words >> 8).float() + 0.5) * 2.0**-24


def normal(
    seed: Tensor | int, stream: int, n0: Tensor | int | None, batch: int, per_sample: int, device: torch.device
) -> Tensor:
    """Return float32 [batch, per_sample], standard normal by Box-Muller, of the global samples n0 ... n0 + batch."""
    even = per_sample + per_sample % 2
    u = uniform(seed, stream, n0, batch, even, device).view(batch, -1, 2)
    radius, angle = (-2.0 * u[..., 0].log()).sqrt(), (2.0 * math.pi) * u[..., 1]
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).view(batch, -1)[:, :per_sample]


def dropout_threshold(p: float) -> int:
    """Return the number below which an element's 16 bits mean that it is dropped."""
    return round(65536 * p)


def inv_keep(p: float) -> float:
    """Return the exact inverse of the fraction that is kept."""
    return 65536.0 / (65536 - dropout_threshold(p))


def first_sample(op: str, n0: Tensor | int, device: torch.device) -> Tensor | None:
    """Return a global sample number as the ops take it: a 0-d int64 tensor on the device, or None for 0.

    It is a tensor, so that one compiled graph serves all micro-batches. Raises ValueError for a tensor of another kind.
    """
    if isinstance(n0, int):
        return torch.full((), n0, dtype=torch.int64, device=device) if n0 else None
    if n0.dtype != torch.int64 or n0.numel() != 1:
        raise ValueError(f"{op}: n0 is {n0.dtype} {tuple(n0.shape)}, expected an int or a 0-d int64 tensor")
    return n0


def check_dropout(op: str, p: float, seed: Tensor | None) -> None:
    """Raise ValueError where p is no probability that can be drawn, or has no seed to be drawn from."""
    if dropout_threshold(p) not in range(65536):
        raise ValueError(f"{op}: p is {p}, expected 0 <= p < 1")
    if p > 0 and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(f"{op}: p is {p} and needs a seed, a 0-d int64 tensor; found {seed}")


def dropout(x: Tensor, p: float, seed: Tensor | int, layer: int, n0: Tensor | int | None = 0) -> Tensor:
    """Return inverted dropout of x [N, C, H, W] (logical NCHW, any strides) with a mask that is a function of the global index.

    With i the flat NHWC index of the element in the global batch (x[0] is global sample n0): the counter is
    (i // 8 mod 2^32, layer, 0, 0); element k = i mod 8 uses the low (k even) or high (k odd) half of word k // 2 and is kept
    where that 16-bit value is at least round(65536 p). Kept values are scaled by the exact inverse of the kept fraction.
    """
    n, c, h, w = x.shape
    per_sample, threshold = c * h * w, dropout_threshold(p)
    start, count = (0 if n0 is None else n0) * per_sample, n * per_sample
    # One more block than needed: sample n0 may begin in the middle of a block.
    counters = (start // 8 + torch.arange(count // 8 + 2, device=x.device)) & _LOW
    words = torch.stack(philox4x32(seed, counters, layer), dim=-1)
    kept = torch.stack([(words & 0xFFFF) >= threshold, words >= threshold << 16], dim=-1).flatten()
    first = 0 if per_sample % 8 == 0 else start % 8
    index = slice(first, first + count) if isinstance(first, int) else first + torch.arange(count, device=x.device)
    keep = kept[index].view(n, h, w, c).permute(0, 3, 1, 2)
    return torch.where(keep, x * inv_keep(p), torch.zeros((), dtype=x.dtype, device=x.device))
