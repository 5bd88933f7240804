"""The seam between two U-Net blocks in one pass: end of the residual branch, then the next block's GroupNorm, SiLU and dropout.

    x = (a + bias[c] + skip_bias[c] + skip) * skip_scale              rounded to `dtype` and written
    y = dropout(silu(GroupNorm(cat(x, other)) * gamma + beta))        cat on channels; `other` may be absent

With `other` the concatenated tensor of a decoder block is never written. The statistics are those of the rounded x, so that
backward, which recomputes everything from x, other, mean and rstd, sees the numbers that forward saw. With d the gradient of
x and other through the norm, dx that of x elsewhere and djoined that of cat(x, other) elsewhere, one tensor serves a and
skip, and its sum over n, h, w serves both biases:

    dz = gradient of silu's argument,  d = rstd * (gamma * dz - mean_g(gamma * dz) - x_hat * mean_g(gamma * dz * x_hat))
    e = d + djoined,  da = dskip = skip_scale * (dx + e[:, :C]),  dother = e[:, C:],  dbias = dskip_bias = sum_{n,h,w} da
    dgamma = sum_{n,h,w} dz * x_hat,  dbeta = sum_{n,h,w} dz

Where x is a itself it is not written again. Where a is that sum already (`summed`), forward has nothing to add; backward is
the same, so da is then the gradient of what a was summed from.
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
from ect_kernels.rows import form, gradients, vector
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
y or dy, and dother. Where djoined is given it is one s more of each; where x is a itself, forward is 2s less."""


Norm = norm.Inputs
"""Arguments of the norm, x being `a` forward and this op's x backward; gamma and beta have the channels of cat(x, other)."""


class Seam(NamedTuple):
    """The op's other arguments."""

    bias: Maybe
    skip: Maybe
    skip_bias: Maybe
    skip_scale: float
    other: Maybe
    dtype: torch.dtype


def _nothing_to_sum(s: Seam, i: Norm) -> bool:
    """Return whether x is a itself."""
    return s.bias is s.skip is s.skip_bias is None and s.skip_scale == 1.0 and s.dtype == i.x.dtype


class Output(NamedTuple):
    """x (empty where it is a itself), y in `dtype`; mean, rstd [N, groups] in fp32 (fp64 for fp64)."""

    x: Tensor
    y: Tensor
    mean: Tensor
    rstd: Tensor


class Saved(NamedTuple):
    """Arguments of the backward pass before the norm's; dx, dy and djoined may be None."""

    dx: Maybe
    djoined: Maybe
    dy: Maybe
    mean: Tensor
    rstd: Tensor
    skip_scale: float
    other: Maybe
    dtype: torch.dtype


class Grads(NamedTuple):
    """Results of the backward pass.

    da: in `dtype`, a's. dother: in x's, empty without other. rows: [3, N, C + C2] in fp32 (fp64 for fp64), by sample:
    dgamma, dbeta, and dbias in the first C places of the third.
    """

    da: Tensor
    dother: Tensor
    rows: Tensor


def _room_fwd(s: Seam, i: Norm) -> Output:
    mean = i.x.new_empty((i.x.shape[0], i.groups), dtype=i.wide)
    x = i.x.new_empty(0) if _nothing_to_sum(s, i) else empty_image(i.x, i.x.shape[1], s.dtype)
    return Output(x, empty_image(i.x, i.gamma.shape[0], s.dtype), mean, torch.empty_like(mean))


def _room_bwd(s: Saved, i: Norm) -> Grads:
    dother = i.x.new_empty(0) if s.other is None else empty_image(i.x, s.other.shape[1])
    rows = s.mean.new_empty((3, i.x.shape[0], i.gamma.shape[0]))
    return Grads(empty_image(i.x, i.x.shape[1], s.dtype), dother, rows)


def _joined(i: Norm, other: Maybe) -> Norm:
    """Return the norm of cat(x, other), in the dtype of the arithmetic."""
    return i._replace(x=(i.x if other is None else torch.cat([i.x, other], dim=1)).to(i.wide))


def reference_fwd(s: Seam, i: Norm) -> Output:
    out, x, total = _room_fwd(s, i), i.x, i.x.to(i.wide)
    for bias in (s.bias, s.skip_bias):
        total = total if bias is None else total + bias.to(total.dtype)[:, None, None]
    total = total if s.skip is None else total + s.skip.to(total.dtype)
    if not _nothing_to_sum(s, i):
        x = out.x.copy_(total * s.skip_scale)
    y, mean, rstd = norm.reference_fwd(_joined(i._replace(x=x), s.other))
    out.y.copy_(y)
    return out._replace(mean=mean, rstd=rstd)


def reference_bwd(s: Saved, i: Norm) -> Grads:
    assert s.dy is not None  # _prepare_bwd saw to it
    c = i.x.shape[1]
    d, rows, *_ = norm.reference_bwd(norm.Saved(s.dy, s.mean, s.rstd), _joined(i, s.other))
    d = d if s.djoined is None else d + s.djoined.to(d.dtype)
    da = s.skip_scale * (d[:, :c] if s.dx is None else d[:, :c] + s.dx.to(d.dtype))
    grads = _room_bwd(s, i)
    grads.da.copy_(da)
    if s.other is not None:
        grads.dother.copy_(d[:, c:])
    dbias = F.pad(da.sum((2, 3)), (0, d.shape[1] - c))
    return grads._replace(rows=torch.cat([rows, dbias[None]]))


def _prepare_fwd(s: Seam, i: Norm) -> tuple[Seam, Norm]:
    return s._replace(skip=nhwc(s.skip), other=nhwc(s.other)), i._replace(x=nhwc(i.x))


def _prepare_bwd(s: Saved, i: Norm) -> tuple[Saved, Norm]:
    dx, djoined, dy = (None if d is None else nhwc(d.to(i.x.dtype)) for d in s[:3])
    if dy is None:  # only x was used: too rare for a mode of the kernels
        dy = empty_image(i.x, i.gamma.shape[0]).zero_()
    return s._replace(dx=dx, djoined=djoined, dy=dy, other=nhwc(s.other)), i._replace(x=nhwc(i.x))


def _sizes(s: Seam | Saved, i: Norm) -> tuple[int, ...]:
    """Return the numbers of a launch; x's dtype comes before the groups, a's behind them, in both directions."""
    n, c, h, w = i.x.shape
    (groups, of_i, *rest), of_s = norm.numbers(i), native.DTYPES[s.dtype]
    x, a = (of_s, of_i) if isinstance(s, Seam) else (of_i, of_s)
    return n, h * w, c, i.gamma.shape[0] - c, x, groups, a, *rest


def _launcher_fwd(s: Seam, i: Norm, out: Output) -> tuple[native.Argument, ...]:
    a, x = (None, i.x) if _nothing_to_sum(s, i) else (i.x, out.x)
    sources = (a, fp32(s.bias), s.skip, fp32(s.skip_bias), s.other, *i.vectors()[:2], i.seed, i.n0)
    return *sources, x, *out[1:], *_sizes(s, i), s.skip_scale, i.eps, i.inv_keep


def _launcher_bwd(s: Saved, i: Norm, grads: Grads) -> tuple[native.Argument, ...]:
    sources = (s.dy, s.dx, s.djoined, i.x, s.other, *i.vectors()[:2], i.seed, i.n0, s.mean, s.rstd)
    return *sources, *grads, *_sizes(s, i), s.skip_scale, i.inv_keep


def triton_limits(s: Seam | Saved, i: Norm) -> str | None:
    """Return why the Triton kernels cannot run, or None: a slab has whole groups and whole blocks of random bits."""
    size = i.gamma.shape[0] // i.groups
    return cuda_limits(s, i, 4096 * size // math.lcm(size, 8))


def cuda_limits(s: Seam | Saved, i: Norm, most: int = 4096) -> str | None:
    if i.x.dtype != s.dtype and {i.x.dtype, s.dtype} not in (
        {torch.float32, half} for half in (torch.float16, torch.bfloat16)
    ):
        return f"a of {i.x.dtype} with x of {s.dtype}"
    return norm.limits(i, most)


FORWARD = Pass(NAME, "fwd", (Seam, Norm), _room_fwd, _prepare_fwd, _launcher_fwd)
BACKWARD = Pass(NAME, "bwd", (Saved, Norm), _room_bwd, _prepare_bwd, _launcher_bwd)
OP = Op(
    NAME,
    backends(
        Backend(reference_fwd, reference_bwd),
        FORWARD,
        BACKWARD,
        native=cuda_limits,
        triton=triton_limits,
        cuda=cuda_limits,
    ),
)
forward_op, backward_op = FORWARD.register(OP), BACKWARD.register(OP)


def _results(backend: str, summed: bool, s: Seam, i: Norm) -> tuple[Tensor, ...]:
    """Return (x, y, joined, mean, rstd); of rows, gamma and beta are one."""
    left = Seam(None, None, None, 1.0, s.other, s.dtype)
    if not summed:
        left = Seam(vector(s.bias), s.skip, vector(s.skip_bias), *s[3:])
    x, y, mean, rstd = forward_op(*left, *i, backend)
    x = i.x.view_as(i.x) if _nothing_to_sum(left, i) else x
    joined = x.detach() if s.other is None else x.new_empty(1).expand(y.shape)
    return x, y, joined, mean, rstd


class _Seam(torch.autograd.Function):
    """(x, y, joined) with a gradient for each; no registered op could return x twice.

    dx, djoined: whether x and joined get a gradient. Stated beforehand, because torch.compile fills an image with zeros for
    each gradient that does not come, and the kernel would read it.
    """

    @staticmethod
    def forward(
        ctx: Any, backend: str, summed: bool, dx: bool, djoined: bool, *args: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        s, i = Seam(*args[: len(Seam._fields)]), Norm(*args[len(Seam._fields) :])
        gamma, beta = vector(i.gamma), vector(i.beta)
        x, y, joined, mean, rstd = _results(backend, summed, s, i._replace(gamma=gamma, beta=beta))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t, given in ((x, dx), (joined, djoined)) if not given))
        ctx.save_for_backward(mean, rstd, s.other, x, gamma, beta, i.seed, i.n0)
        ctx.forms = [form(t) for t in (i.gamma, i.beta, s.bias, s.skip_bias)]
        ctx.has_skip, ctx.dx, ctx.djoined = s.skip is not None, dx, djoined
        ctx.skip_scale, ctx.dtype, ctx.rest = s.skip_scale, i.x.dtype, (*i[8:], backend)
        return x, y, joined

    @staticmethod
    def backward(ctx: Any, dx: Maybe, dy: Maybe, djoined: Maybe) -> tuple[Maybe, ...]:
        mean, rstd, other, x, gamma, beta, seed, n0 = ctx.saved_tensors
        vectors = (gamma, beta, None, None, None, seed, n0)
        saved = (mean, rstd, ctx.skip_scale, other, ctx.dtype, x)
        dx, djoined = dx if ctx.dx else None, djoined if ctx.djoined else None
        da, dother, rows = backward_op(dx, djoined, dy, *saved, *vectors, *ctx.rest)
        dgamma, dbeta, dbias, dskip_bias = gradients(rows, ctx.forms)
        seam = (dbias, da if ctx.has_skip else None, dskip_bias, None, None if other is None else dother, None)
        return *[None] * 4, *seam, da, dgamma, dbeta, *[None] * 10


def residual_group_norm_silu(
    a: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float, bias: Maybe = None, skip: Maybe = None,
    skip_bias: Maybe = None, skip_scale: float = 1.0, other: Maybe = None, act: bool = True, p: float = 0.0,
    seed: Maybe = None, layer: int = 0, n0: Tensor | int = 0, dtype: torch.dtype | None = None, joined: bool = False,
    summed: bool = False, dx: bool = True, djoined: bool = True, backend: str | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return (x, y) of this module's formula, channels-last, in `dtype` (None: a's).

    joined: also return cat(x, other), for a gradient of its own that costs no addition: without other it is x once more, else
    a stand-in without data.

    dx, djoined: whether x, and what `joined` adds, will have a gradient; without one they are constants.

    summed: a is the sum already, with biases and scale, which then say only what its gradient is: that of the terms.

    Args: a, skip: [N, C, H, W] of one dtype. other: [N, C2, H, W] of x's dtype. gamma, beta: [C + C2] and bias, skip_bias: [C]
    of any float dtype, or rows of rows.by_sample. act: SiLU, or none. p, seed (0-d int64 tensor on the device), layer, n0: as
    philox.dropout. Raises: ValueError for arguments that do not fit together, BackendError for a named backend that cannot run.
    """
    n, c, h, w = a.shape
    c2 = 0 if other is None else other.shape[1]
    check_shapes(
        NAME, ("gamma", gamma, (c + c2,), (n, c + c2)), ("beta", beta, (c + c2,), (n, c + c2)), ("bias", bias, (c,), (n, c)),
        ("skip_bias", skip_bias, (c,), (n, c)), ("skip", skip, (n, c, h, w)), ("other", other, (n, c2, h, w)),
    )  # fmt: skip
    dtype = dtype or a.dtype
    for name, tensor, source, wanted in (("skip", skip, "a", a.dtype), ("other", other, "x", dtype)):
        if tensor is not None and tensor.dtype != wanted:
            raise ValueError(f"{NAME}: {name} is {tensor.dtype} but {source} is {wanted}; cast one of them")
    if summed and skip is not None:
        raise ValueError(f"{NAME}: skip is given, but `summed` says that a contains it; leave out one of them")
    if groups < 1 or (c + c2) % groups:
        raise ValueError(f"{NAME}: {c + c2} channels do not divide into {groups} groups")
    philox.check_dropout(NAME, p, seed)
    seed = seed if philox.dropout_threshold(p) > 0 else None
    first = None if seed is None else philox.first_sample(NAME, n0, a.device)
    i = Norm(a, gamma, beta, None, None, None, seed, first, groups, eps, act, p, layer)
    s = Seam(bias, skip, skip_bias, skip_scale, other, dtype)
    outputs: tuple[Tensor, ...]
    if torch.is_grad_enabled():
        outputs = _Seam.apply(backend or "", summed, dx, djoined and joined, *s, *i)
    else:
        outputs = _results(backend or "", summed, s, i._replace(gamma=vector(gamma), beta=vector(beta)))
    return outputs[:3] if joined else outputs[:2]
