"""consistency_loss: the loss of each sample from the two raw network outputs, and its gradient, in one launch.

    D_t = c_skip(t) x_t + c_out(t) F_t,   c_skip(s) = sd^2 / (s^2 + sd^2),   c_out(s) = s sd / sqrt(s^2 + sd^2)
    target = c_skip(r) x_r + c_out(r) F_r   where r > 0, else x_r (F_r is not read)                     sd: sigma_data
    s = ||D_t - target||^2,  q = sqrt(s + c^2) (1 where that is 0),  loss = weight s / (q + c)
    dF = d loss / d F_t = weight c_out(t) (D_t - target) / q

One sample is one sum: whatever is not finite in it stays in it. The gradient at distance 0 is 0, also for c = 0. Where s
overflows, loss and gradient are NaN, as autograd makes them.
Sources: Geng et al., "Consistency models made easy" (ECT, arXiv 2406.14548), section 3; Karras et al., 2022 (EDM), table 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ect_kernels import native
from ect_kernels.dispatch import Backend, Op
from ect_kernels.passes import Pass, backends
from ect_kernels.preconditioning import coefficients
from ect_kernels.registry import register
from ect_kernels.tensors import check_shapes, nhwc, wide

DRAM = {
    "forward": "3s + 8 B a value: F_t, F_r, x_t, x_r read, dF written (samples too large for the chip are read again, from L2)",
    "backward": "2s",
}


class Inputs(NamedTuple):
    """Arguments of the op: images [N, C, H, W], vectors [N]."""

    F_t: Tensor
    F_r: Tensor
    x_t: Tensor
    x_r: Tensor
    t: Tensor
    r: Tensor
    weight: Tensor
    c: float
    sigma_data: float

    @property
    def wide(self) -> torch.dtype:
        """The dtype of the arithmetic and of the loss."""
        return wide(self.F_t)


class Output(NamedTuple):
    """loss: [N], wide. dF: like F_t, channels-last."""

    loss: Tensor
    dF: Tensor


def _output(i: Inputs) -> Output:
    """Return room for the results."""
    dF = torch.empty_like(i.F_t, memory_format=torch.channels_last)
    return Output(i.F_t.new_empty(i.F_t.shape[0], dtype=i.wide), dF)


def distance(difference: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """Return (sqrt(s + c^2) - c, the root) of s = ||difference||^2 for each sample, [N, ...] -> [N] and [N]."""
    s = difference.square().flatten(1).sum(1)
    radicand = s + c * c
    root = torch.where(radicand == 0, torch.ones_like(radicand), radicand).sqrt()
    return s / (root + c), root


def pseudo_huber(difference: Tensor, c: float) -> Tensor:
    """Return sqrt(||difference||^2 + c^2) - c for each sample: [N, ...] -> [N].

    Its gradient is 0 at distance 0, also for c = 0.
    """
    return distance(difference, c)[0]


def by_image(v: Tensor) -> Tensor:
    """Return a vector [N] as [N, 1, 1, 1], to meet images."""
    return v.view(-1, 1, 1, 1)


def denoised(F: Tensor, x: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """Return D = c_skip(sigma) x + c_out(sigma) F, wide, of raw outputs F and noisy images x [N, C, H, W], levels sigma [N]."""
    c_skip, c_out, _ = coefficients(by_image(sigma), sigma_data)
    return c_skip * x + c_out * F.to(wide(F))


def target_of(F_r: Tensor, x_r: Tensor, r: Tensor, sigma_data: float) -> Tensor:
    """Return the target of a pair, wide [N, C, H, W]: D_r where r > 0, else x_r. Arguments as for `consistency_loss`."""
    return torch.where(by_image(r > 0), denoised(F_r, x_r, r, sigma_data), x_r)


def reference_fwd(i: Inputs) -> Output:
    d = denoised(i.F_t, i.x_t, i.t, i.sigma_data) - target_of(i.F_r, i.x_r, i.r, i.sigma_data)
    value, root = distance(d, i.c)
    _, c_out, _ = coefficients(i.t, i.sigma_data)
    slope = i.weight * c_out / root + (value - value)  # value - value: 0, or NaN where the sum overflowed
    out = _output(i)
    out.dF.copy_(by_image(slope) * d)
    return out._replace(loss=i.weight * value)


def _limits(i: Inputs) -> str | None:
    if i.F_t.dtype not in native.DTYPES:
        return f"dtype {i.F_t.dtype}"
    return "samples of 2^28 values or more" if i.F_t.shape[1:].numel() >= 1 << 28 else None


def _prepare(i: Inputs) -> tuple[Inputs]:
    dtypes = (i.F_t.dtype, i.F_t.dtype, i.wide, i.wide)
    F_t, F_r, x_t, x_r = (nhwc(x.to(d)) for x, d in zip(i[:4], dtypes, strict=True))
    t, r, weight = (v.to(i.wide).contiguous() for v in i[4:7])
    return (Inputs(F_t, F_r, x_t, x_r, t, r, weight, i.c, i.sigma_data),)


def _launcher(i: Inputs, out: Output) -> tuple[native.Argument, ...]:
    return *i[:7], *out, i.F_t.shape[0], i.F_t.shape[1:].numel(), native.DTYPES[i.F_t.dtype], i.c, i.sigma_data


FORWARD = Pass("consistency_loss", "fwd", (Inputs,), _output, _prepare, _launcher)
OP = Op("consistency_loss", backends(Backend(reference_fwd), FORWARD, triton=_limits, cuda=_limits, native=_limits))
_forward_op = FORWARD.register(OP)


_backward_op = register(
    "consistency_loss_bwd", "(Tensor dF, Tensor dloss) -> Tensor",
    lambda dF, dloss: torch.mul(dF, dloss.view(-1, 1, 1, 1), out=torch.empty_like(dF)),
    lambda dF, dloss: torch.empty_like(dF),
)  # fmt: skip
"""Multiply dF by the gradient that reaches each sample's loss; the product is formed in fp32 and rounded once."""


class _Loss(torch.autograd.Function):
    """The op with a gradient for its first argument."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        loss, dF = _forward_op(*args)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dF)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None) -> tuple[Tensor | None, ...]:
        return None if dloss is None else _backward_op(*ctx.saved_tensors, dloss), *[None] * 9


def consistency_loss(
    F_t: Tensor, F_r: Tensor, x_t: Tensor, x_r: Tensor, t: Tensor, r: Tensor, weight: Tensor, c: float, sigma_data: float,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Return weight (sqrt(||D_t - target||^2 + c^2) - c), float32 [N]; see the module's formulas. Only F_t gets a gradient.

    Args: F_t, F_r: student's and teacher's raw network outputs [N, C, H, W], fp16, bf16 or fp32. x_t, x_r: their noisy
    images, fp32 (all made channels-last if they are not). t, r, weight: fp32 [N]; t > r >= 0. c: >= 0, 0 is the plain
    distance. Raises ValueError, dispatch.BackendError.
    """
    shape = tuple(F_t.shape)
    if F_t.dim() != 4:
        raise ValueError(f"consistency_loss: F_t is {shape}, expected [N, C, H, W]")
    vectors = ("t", t, shape[:1]), ("r", r, shape[:1]), ("weight", weight, shape[:1])
    check_shapes("consistency_loss", ("F_r", F_r, shape), ("x_t", x_t, shape), ("x_r", x_r, shape), *vectors)
    if not c >= 0:
        raise ValueError(f"consistency_loss: c is {c}, expected 0 or more")
    inputs = Inputs(F_t, F_r, x_t, x_r, t, r, weight, c, sigma_data)
    loss: Tensor = _Loss.apply(*inputs, backend or "")
    return loss
