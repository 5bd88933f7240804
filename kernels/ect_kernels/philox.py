"""Philox4x32-10: random numbers as a pure function of (seed, counter); the op `philox`, and what a dropout mask is.

Counter-based draws make noise and dropout masks independent of batch split, rank and order of evaluation: the value of an
element follows from the 64-bit seed and the element's global index alone. Source: Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3" (SC 2011). The functions below read no value on the host, so they may run inside a CUDA graph.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ect_kernels import native
from ect_kernels.dispatch import Backend, Op
from ect_kernels.passes import Pass, backends

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


def _multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * m, for a in [0, 2^32) held in int64 (the wrapped 64-bit product has the right bits)."""
    product = a * m
    return (product >> 32) & _LOW, product & _LOW


def philox4x32(
    seed: Tensor | int, c0: Tensor, c1: int, c2: int = 0, c3: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32 for each counter (c0[i], c1, c2, c3).

    Args: seed: 64-bit key, an int or 0-d int64 tensor. c0: int64 tensor of any shape, values in [0, 2^32). c1..c3: ints.
    Returns: four int64 tensors of c0's shape with values in [0, 2^32).
    """
    seed = torch.as_tensor(seed, dtype=torch.int64, device=c0.device)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    x0, x1, x2, x3 = c0, torch.full_like(c0, c1), torch.full_like(c0, c2), torch.full_like(c0, c3)
    for i in range(10):
        if i > 0:
            k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
        hi0, lo0 = _multiply(x0, _M0)
        hi1, lo1 = _multiply(x2, _M1)
        x0, x1, x2, x3 = hi1 ^ x1 ^ k0, lo1, hi0 ^ x3 ^ k1, lo0
    return x0, x1, x2, x3


class Inputs(NamedTuple):
    """Arguments of the op `philox`: draws for the global samples n0 ... n0 + batch."""

    seed: Tensor
    stream: int
    n0: int
    batch: int
    per_sample: int
    gaussian: bool

    @property
    def calls(self) -> int:
        """Of the generator for one sample."""
        return -(-self.per_sample // 4)


class Output(NamedTuple):
    """float32 [batch, per_sample]."""

    values: Tensor


def _room(i: Inputs) -> Output:
    return Output(i.seed.new_empty((i.batch, i.per_sample), dtype=torch.float32))


def reference_fwd(i: Inputs) -> Output:
    counters = (i.n0 * i.calls + torch.arange(i.batch * i.calls, device=i.seed.device)) & _LOW
    words = torch.stack(philox4x32(i.seed, counters, i.stream), dim=-1)
    u = ((words >> 8).float() + 0.5) * 2.0**-24
    if i.gaussian:
        first, second = u.unflatten(-1, (2, 2)).unbind(-1)
        radius, angle = (-2.0 * first.log()).sqrt(), (2.0 * math.pi) * second
        u = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return Output(u.reshape(i.batch, 4 * i.calls)[:, : i.per_sample].contiguous())


def _launcher(i: Inputs, out: Output) -> tuple[native.Argument, ...]:
    return i.seed, out.values, i.batch, i.per_sample, i.n0, i.stream, i.gaussian


def _limits(i: Inputs) -> str | None:
    return "2^31 calls or more" if i.batch * i.calls >= 2**31 else None


FORWARD = Pass("philox", "fwd", (Inputs,), _room, lambda i: (i,), _launcher)
OP = Op("philox", backends(Backend(reference_fwd), FORWARD, triton=_limits, cuda=_limits))
_forward_op = FORWARD.register(OP)


def _draw(
    gaussian: bool, seed: Tensor | int, stream: int, n0: int, batch: int, per_sample: int, device: torch.device,
    backend: str | None,
) -> Tensor:  # fmt: skip
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device)
    inputs = Inputs(seed, stream, n0, batch, per_sample, gaussian)
    values: Tensor = _forward_op(*inputs, OP.pick(device, (inputs,), backend))
    return values


def uniform(
    seed: Tensor | int, stream: int, n0: int, batch: int, per_sample: int, device: torch.device,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """float32 [batch, per_sample], uniform in (0, 1], of the global samples n0 ... n0 + batch; the same bits on every backend.

    Every sample starts a block of its own: its draws do not depend on its neighbours' number or order.
    """
    return _draw(False, seed, stream, n0, batch, per_sample, device, backend)


def normal(
    seed: Tensor | int, stream: int, n0: int, batch: int, per_sample: int, device: torch.device,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """float32 [batch, per_sample], standard normal by Box-Muller, of the global samples n0 ... n0 + batch."""
    return _draw(True, seed, stream, n0, batch, per_sample, device, backend)


def dropout_threshold(p: float) -> int:
    """Elements whose 16 bits are below it are dropped."""
    return round(65536 * p)


def inv_keep(p: float) -> float:
    """The exact inverse of the fraction that is kept."""
    return 65536.0 / (65536 - dropout_threshold(p))


def check_dropout(op: str, p: float, seed: Tensor | None) -> None:
    """Raises ValueError where p is no probability that can be drawn, or has no seed to be drawn from."""
    if dropout_threshold(p) not in range(65536):
        raise ValueError(f"{op}: p is {p}, expected 0 <= p < 1")
    if p > 0 and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(f"{op}: p is {p} and needs a seed, a 0-d int64 tensor; found {seed}")


def dropout(x: Tensor, p: float, seed: Tensor | int, layer: int, n0: Tensor | int = 0) -> Tensor:
    """Inverted dropout of x [N, C, H, W] (logical NCHW, any strides) with a mask that is a function of the global index.

    With i the flat NHWC index of the element in the global batch (x[0] is global sample n0): the counter is
    (i // 8 mod 2^32, layer, 0, 0); element k = i mod 8 uses the low (k even) or high (k odd) half of word k // 2 and is kept
    where that 16-bit value is at least round(65536 p). Kept values are scaled by the exact inverse of the kept fraction.
    """
    n, c, h, w = x.shape
    per_sample = c * h * w
    start = n0 * per_sample
    # One more block than needed: sample n0 may begin in the middle of a block.
    counters = (start // 8 + torch.arange(n * per_sample // 8 + 2, device=x.device)) & _LOW
    words = torch.stack(philox4x32(seed, counters, layer), dim=-1)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten()
    index = start % 8 + torch.arange(n * per_sample, device=x.device)
    keep = (halves[index] >= dropout_threshold(p)).view(n, h, w, c).permute(0, 3, 1, 2)
    return torch.where(keep, x * inv_keep(p), torch.zeros((), dtype=x.dtype, device=x.device))
