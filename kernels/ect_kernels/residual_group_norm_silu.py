"""The seam between two U-Net blocks in one pass: end of the residual branch, then the next block's GroupNorm, SiLU and dropout.

    x = (a + bias[c] + skip_bias[c] + skip) * skip_scale              rounded to a's dtype and written
    y = dropout(silu(GroupNorm(cat(x, other)) * gamma + beta))        cat on channels; `other` may be absent

With `other` the concatenated tensor of a decoder block is never written. The statistics are those of the rounded x, so that
backward, which recomputes everything from x, other, mean and rstd, sees the numbers that forward saw. With d the gradient of
x and other through the norm, one tensor serves a and skip, and its sum over n, h, w serves both biases:

    dz = gradient of silu's argument,  d = rstd * (gamma * dz - mean_g(gamma * dz) - x_hat * mean_g(gamma * dz * x_hat))
    da = dskip = skip_scale * (dx + d[:, :C]),  dother = d[:, C:],  dbias = dskip_bias = sum_{n,h,w} da
    dgamma = sum_{n,h,w} dz * x_hat,  dbeta = sum_{n,h,w} dz
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ect_kernels import group_norm_silu as norm
from ect_kernels import native, philox
from ect_kernels.dispatch import Backend, Op
from ect_kernels.passes import Pass, backends
from ect_kernels.tensors import check_shapes, empty_image, fp32, nhwc

NAME = "residual_group_norm_silu"
Maybe = Tensor | None

DRAM = {
    "triton forward": "4s (+2s of other) where a slab fits in registers (8x8, 16x16) or is found in L2, else 5s (+3s)",
    "triton backward": "4s (+3s of other) where a slab fits in registers (8x8, 16x16) or is found in L2, else 6s (+5s)",
    "cuda forward": "4s (+2s of other) where a slab fits in shared memory, else 5s (+3s)",
    "cuda backward": "4s (+3s of other) where a slab fits in shared memory, else 6s (+5s)",
}
"""Bytes an element by construction, in element sizes s: a, skip, x, y forward, dy, dx, x, da backward; of other, it itself,
y or dy, and dother."""


Norm = norm.Inputs
"""Arguments of the norm, x being `a` forward and this op's x backward; gamma and beta have the channels of cat(x, other)."""


class Seam(NamedTuple):
    """The op's other arguments."""

    bias: Maybe
    skip: Maybe
    skip_bias: Maybe
    skip_scale: float
    other: Maybe


class Output(NamedTuple):
    """x, y in a's dtype; mean, rstd [N, groups] in fp32 (fp64 for fp64)."""

    x: Tensor
    y: Tensor
    mean: Tensor
    rstd: Tensor


class Saved(NamedTuple):
    """What the backward takes before the norm's arguments; dx or dy may be None."""

    dx: Maybe
    dy: Maybe
    mean: Tensor
    rstd: Tensor
    skip_scale: float
    other: Maybe


class Grads(NamedTuple):
    """da and dother (empty without other) in x's dtype; sums [3, C + C2] in fp32 (fp64 for fp64): dgamma, dbeta, and dbias in
    the first C places of the third row."""

    da: Tensor
    dother: Tensor
    sums: Tensor


def _room_fwd(s: Seam, i: Norm) -> Output:
    return Output(empty_image(i.x, i.x.shape[1]), *norm.empty_output(i))


def _room_bwd(s: Saved, i: Norm) -> Grads:
    dother = i.x.new_empty(0) if s.other is None else empty_image(i.x, s.other.shape[1])
    return Grads(empty_image(i.x, i.x.shape[1]), dother, s.mean.new_empty((3, i.gamma.shape[0])))


def _joined(i: Norm, other: Maybe) -> Norm:
    """The norm of cat(x, other), in the dtype of the arithmetic."""
    return i._replace(x=(i.x if other is None else torch.cat([i.x, other], dim=1)).to(i.wide))


def reference_fwd(s: Seam, i: Norm) -> Output:
    total = i.x.to(i.wide)
    for vector in (s.bias, s.skip_bias):
        total = total if vector is None else total + vector.to(total.dtype)[:, None, None]
    total = total if s.skip is None else total + s.skip.to(total.dtype)
    out = _room_fwd(s, i)
    out.x.copy_(total * s.skip_scale)
    y, mean, rstd = norm.reference_fwd(_joined(i._replace(x=out.x), s.other))
    out.y.copy_(y)
    return out._replace(mean=mean, rstd=rstd)


def reference_bwd(s: Saved, i: Norm) -> Grads:
    assert s.dy is not None  # _prepare_bwd saw to it
    c = i.x.shape[1]
    d, dgamma, dbeta, *_ = norm.reference_bwd(norm.Saved(s.dy, s.mean, s.rstd), _joined(i, s.other))
    da = s.skip_scale * (d[:, :c] if s.dx is None else d[:, :c] + s.dx.to(d.dtype))
    grads = _room_bwd(s, i)
    grads.da.copy_(da)
    if s.other is not None:
        grads.dother.copy_(d[:, c:])
    dbias = F.pad(da.sum((0, 2, 3)), (0, d.shape[1] - c))
    return grads._replace(sums=torch.stack([dgamma, dbeta, dbias]))


def _prepare_fwd(s: Seam, i: Norm) -> tuple[Seam, Norm]:
    return s._replace(skip=nhwc(s.skip), other=nhwc(s.other)), i._replace(x=nhwc(i.x))


def _prepare_bwd(s: Saved, i: Norm) -> tuple[Saved, Norm]:
    dx = None if s.dx is None else nhwc(s.dx.to(i.x.dtype))
    # Where only x was used: too rare for a mode of the kernels.
    dy = empty_image(i.x, i.gamma.shape[0]).zero_() if s.dy is None else nhwc(s.dy.to(i.x.dtype))
    return s._replace(dx=dx, dy=dy, other=nhwc(s.other)), i._replace(x=nhwc(i.x))


def _sizes(i: Norm) -> tuple[int, ...]:
    n, c, h, w = i.x.shape
    return n, h * w, c, i.gamma.shape[0] - c, *norm.numbers(i)


def _launcher_fwd(s: Seam, i: Norm, out: Output) -> tuple[native.Argument, ...]:
    sources = (i.x, fp32(s.bias), s.skip, fp32(s.skip_bias), s.other, *i.vectors()[:2], i.seed)
    return *sources, *out, *_sizes(i), s.skip_scale, i.eps, i.inv_keep


def _launcher_bwd(s: Saved, i: Norm, grads: Grads) -> tuple[native.Argument, ...]:
    sources = (s.dy, s.dx, i.x, s.other, *i.vectors()[:2], i.seed, s.mean, s.rstd)
    partials = s.mean.new_empty((3, i.x.shape[0], i.gamma.shape[0]))
    results = (grads.da, grads.dother, *grads.sums.zero_().unbind(), partials)
    return *sources, *results, *_sizes(i), s.skip_scale, i.inv_keep


def triton_limits(s: Seam, i: Norm) -> str | None:
    """A slab has whole groups and whole blocks of random bits."""
    size = i.gamma.shape[0] // i.groups
    return norm.limits(i, 4096 * size // math.lcm(size, 8))


FORWARD = Pass(NAME, "fwd", (Seam, Norm), _room_fwd, _prepare_fwd, _launcher_fwd)
BACKWARD = Pass(NAME, "bwd", (Saved, Norm), _room_bwd, _prepare_bwd, _launcher_bwd)
OP = Op(
    NAME,
    backends(
        Backend(reference_fwd, reference_bwd),
        FORWARD,
        BACKWARD,
        triton=triton_limits,
        cuda=lambda s, i: norm.limits(i, 4096),
    ),
)
forward_op, backward_op = FORWARD.register(OP), BACKWARD.register(OP)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    bias, skip, skip_bias, skip_scale, other, _, gamma, beta, _, _, _, seed, *rest = inputs
    x, _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(mean, rstd, other, x, gamma, beta, seed)
    ctx.given = [None if t is None else t.dtype for t in (bias, skip, skip_bias)]
    ctx.skip_scale, ctx.rest = skip_scale, rest


def _autograd(ctx: Any, dx: Maybe, dy: Maybe, *_: Maybe) -> tuple[Maybe, ...]:
    if dx is None and dy is None:
        return (None,) * 19
    mean, rstd, other, x, gamma, beta, seed = ctx.saved_tensors
    vectors = (gamma, beta, None, None, None, seed)
    da, dother, sums = backward_op(dx, dy, mean, rstd, ctx.skip_scale, other, x, *vectors, *ctx.rest)
    dgamma, dbeta, dbias = sums.unbind()
    bias, skip, skip_bias = ctx.given
    dbias, dskip_bias = (None if dtype is None else dbias[: x.shape[1]].to(dtype) for dtype in (bias, skip_bias))
    seam = (dbias, None if skip is None else da, dskip_bias, None, None if other is None else dother)
    return *seam, da, dgamma.to(gamma.dtype), dbeta.to(beta.dtype), *[None] * 11


forward_op.register_autograd(_autograd, setup_context=_setup_context)


def residual_group_norm_silu(
    a: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float, bias: Maybe = None, skip: Maybe = None,
    skip_bias: Maybe = None, skip_scale: float = 1.0, other: Maybe = None, act: bool = True, p: float = 0.0,
    seed: Maybe = None, layer: int = 0, n0: int = 0, backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x, y) of this module's formula, channels-last, in a's dtype.

    Args: a, skip: [N, C, H, W] of one dtype. other: [N, C2, H, W] of that dtype. gamma, beta: [C + C2] and bias, skip_bias:
    [C] of any float dtype. act: SiLU, or none. p, seed (0-d int64 tensor on the device), layer, n0: as philox.dropout.
    Raises: ValueError for arguments that do not fit together, BackendError for a named backend that cannot run.
    """
    n, c, h, w = a.shape
    c2 = 0 if other is None else other.shape[1]
    check_shapes(
        NAME, ("gamma", gamma, (c + c2,)), ("beta", beta, (c + c2,)), ("bias", bias, (c,)), ("skip_bias", skip_bias, (c,)),
        ("skip", skip, (n, c, h, w)), ("other", other, (n, c2, h, w)),
    )  # fmt: skip
    for name, tensor in (("skip", skip), ("other", other)):
        if tensor is not None and tensor.dtype != a.dtype:
            raise ValueError(f"{NAME}: {name} is {tensor.dtype} but a is {a.dtype}; cast one of them")
    if groups < 1 or (c + c2) % groups:
        raise ValueError(f"{NAME}: {c + c2} channels do not divide into {groups} groups")
    philox.check_dropout(NAME, p, seed)
    seed = seed if philox.dropout_threshold(p) > 0 else None
    i = Norm(a, gamma, beta, None, None, None, seed, groups, eps, act, p, layer, n0)
    s = Seam(bias, skip, skip_bias, skip_scale, other)
    x, y, _, _ = forward_op(*s, *i, OP.pick(a.device, (s, i), backend))
    return x, y
