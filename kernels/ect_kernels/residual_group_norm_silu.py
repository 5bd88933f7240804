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
from ect_kernels.tensors import check_shapes, empty_image, fp32, nhwc, register, wide

NAME = "residual_group_norm_silu"
Maybe = Tensor | None

DRAM = {
    "triton forward": "4s (+2s of other) where the second read finds x and other in L2, else 5s (+3s)",
    "triton backward": "4s (+3s of other) where it finds dy, x and other in L2, else 6s (+5s)",
    "cuda forward": "4s (+2s of other) where a slab fits in shared memory, else 5s (+3s)",
    "cuda backward": "4s (+3s of other) where a slab fits in shared memory, else 6s (+5s)",
}
"""Bytes an element by construction, in element sizes s: a, skip, x, y forward, dy, dx, x, da backward; of other, it itself,
y or dy, and dother."""


class Inputs(NamedTuple):
    """Arguments of the op."""

    a: Tensor
    gamma: Tensor
    beta: Tensor
    groups: int
    eps: float
    bias: Maybe
    skip: Maybe
    skip_bias: Maybe
    skip_scale: float
    other: Maybe
    act: bool
    p: float
    seed: Maybe
    layer: int
    n0: int


class Output(NamedTuple):
    """x, y in a's dtype; mean, rstd [N, groups] in fp32 (fp64 for fp64)."""

    x: Tensor
    y: Tensor
    mean: Tensor
    rstd: Tensor


class Saved(NamedTuple):
    """Arguments of the backward; dx or dy may be None."""

    dx: Maybe
    dy: Maybe
    x: Tensor
    other: Maybe
    gamma: Tensor
    beta: Tensor
    mean: Tensor
    rstd: Tensor
    groups: int
    skip_scale: float
    act: bool
    p: float
    seed: Maybe
    layer: int
    n0: int


class Grads(NamedTuple):
    """da and dother (empty without other) in x's dtype; sums [3, C + C2] in fp32 (fp64 for fp64): dgamma, dbeta, and dbias in
    the first C places of the third row."""

    da: Tensor
    dother: Tensor
    sums: Tensor


def empty_output(i: Inputs) -> Output:
    """Room for the forward's results."""
    mean = i.a.new_empty((i.a.shape[0], i.groups), dtype=wide(i.a))
    return Output(empty_image(i.a, i.a.shape[1]), empty_image(i.a, i.gamma.shape[0]), mean, torch.empty_like(mean))


def empty_grads(i: Saved) -> Grads:
    """Room for the backward's."""
    dother = i.x.new_empty(0) if i.other is None else empty_image(i.x, i.other.shape[1])
    return Grads(empty_image(i.x, i.x.shape[1]), dother, i.mean.new_empty((3, i.gamma.shape[0])))


def _norm(x: Tensor, i: Inputs | Saved, eps: float = 0.0) -> norm.Inputs:
    """The norm of cat(x, other), in the dtype of the arithmetic."""
    source = (x if i.other is None else torch.cat([x, i.other], dim=1)).to(wide(x))
    seed = i.seed if i.p > 0 else None
    return norm.Inputs(source, i.gamma, i.beta, None, None, None, seed, i.groups, eps, i.act, i.p, i.layer, i.n0)


def reference_fwd(i: Inputs) -> Output:
    total = i.a.to(wide(i.a))
    for vector in (i.bias, i.skip_bias):
        total = total if vector is None else total + vector.to(total.dtype)[:, None, None]
    total = total if i.skip is None else total + i.skip.to(total.dtype)
    out = empty_output(i)
    out.x.copy_(total * i.skip_scale)
    y, mean, rstd = norm.reference_fwd(_norm(out.x, i, i.eps))
    out.y.copy_(y)
    return out._replace(mean=mean, rstd=rstd)


def reference_bwd(i: Saved) -> Grads:
    source, c = _norm(i.x, i), i.x.shape[1]
    dy = torch.zeros_like(source.x) if i.dy is None else i.dy
    d, dgamma, dbeta, *_ = norm.reference_bwd(dy, source, i.mean, i.rstd)
    da = i.skip_scale * (d[:, :c] if i.dx is None else d[:, :c] + i.dx.to(d.dtype))
    grads = empty_grads(i)
    grads.da.copy_(da)
    if i.other is not None:
        grads.dother.copy_(d[:, c:])
    dbias = F.pad(da.sum((0, 2, 3)), (0, source.x.shape[1] - c))
    return grads._replace(sums=torch.stack([dgamma, dbeta, dbias]))


def _native(backend: str) -> Backend:
    """csrc/residual_group_norm_silu.cu, on the GPU ('cuda') or through the emulator ('emulated')."""

    def sizes(x: Tensor, i: Inputs | Saved) -> tuple[int, ...]:
        (n, c, h, w), dtype = x.shape, native.DTYPES[x.dtype]
        numbers = (i.groups, dtype, int(i.act), philox.dropout_threshold(i.p), i.layer, i.n0)
        return n, h * w, c, i.gamma.shape[0] - c, *numbers

    def fwd(i: Inputs) -> Output:
        out = empty_output(i)
        vectors = (fp32(i.gamma), fp32(i.beta), i.seed if i.p > 0 else None)
        inputs = (i.a, fp32(i.bias), i.skip, fp32(i.skip_bias), i.other, *vectors)
        numbers = (*sizes(i.a, i), float(i.skip_scale), float(i.eps), philox.inv_keep(i.p))
        native.launch(backend, f"{NAME}_fwd", *inputs, *out, *numbers)
        return out

    def bwd(i: Saved) -> Grads:
        grads = empty_grads(i)
        dy = empty_image(i.x, i.gamma.shape[0]).zero_() if i.dy is None else i.dy
        sums, partials = grads.sums.zero_(), i.mean.new_empty((3, i.x.shape[0], i.gamma.shape[0]))
        inputs = (dy, i.dx, i.x, i.other, fp32(i.gamma), fp32(i.beta), i.seed if i.p > 0 else None, i.mean, i.rstd)
        results = (grads.da, None if i.other is None else grads.dother, *sums.unbind(), partials)
        numbers = (*sizes(i.x, i), float(i.skip_scale), philox.inv_keep(i.p))
        native.launch(backend, f"{NAME}_bwd", *inputs, *results, *numbers)
        return grads

    return Backend(fwd, bwd, native_limits)


def native_limits(i: Inputs) -> str | None:
    if i.a.dtype not in native.DTYPES:
        return f"dtype {i.a.dtype}"
    channels, h, w = i.gamma.shape[0], i.a.shape[2], i.a.shape[3]
    if channels // i.groups > 4096 or h * w > (2**31 - 1) // channels:
        return f"{channels} channels in {i.groups} groups at {h}x{w}"
    return None


def triton_limits(i: Inputs) -> str | None:
    channels = i.gamma.shape[0]
    if (
        channels % 8 == 0 and math.lcm(channels // i.groups, 8) > 4096
    ):  # whole groups, whole blocks of random bits: a slab
        return f"{channels} channels in {i.groups} groups"
    return native_limits(i)


def _triton(name: str) -> Any:
    """Function `name` of the Triton module, imported at its first call: triton may be absent."""

    def call(i: Inputs | Saved) -> Any:
        from ect_kernels import residual_group_norm_silu_triton as kernels

        return getattr(kernels, name)(i)

    return call


OP = Op(
    NAME,
    {
        "reference": Backend(reference_fwd, reference_bwd),
        "triton": Backend(_triton("fwd"), _triton("bwd"), triton_limits),
        "cuda": _native("cuda"),
        "emulated": _native("emulated"),
    },
)


def _forward(*args: Any) -> tuple[Tensor, ...]:
    i, backend = Inputs(*args[:-1]), args[-1]
    function = OP.backends[backend if i.a.numel() else "reference"].fwd
    return tuple(function(i._replace(a=nhwc(i.a), skip=nhwc(i.skip), other=nhwc(i.other))))


def _backward(*args: Any) -> tuple[Tensor, ...]:
    i, backend = Saved(*args[:-1]), args[-1]
    dx, dy = (None if v is None else nhwc(v.to(i.x.dtype)) for v in (i.dx, i.dy))
    function = OP.backends[backend if i.x.numel() else "reference"].bwd
    assert function is not None
    return tuple(function(i._replace(dx=dx, dy=dy, x=nhwc(i.x), other=nhwc(i.other))))


forward_op = register(
    NAME,
    """(Tensor a, Tensor gamma, Tensor beta, SymInt groups, float eps, Tensor? bias, Tensor? skip, Tensor? skip_bias,
    float skip_scale, Tensor? other, bool act, float p, Tensor? seed, SymInt layer, SymInt n0, str backend)
    -> (Tensor, Tensor, Tensor, Tensor)""",
    _forward,
    lambda *args: tuple(empty_output(Inputs(*args[:-1]))),
)
backward_op = register(
    f"{NAME}_bwd",
    """(Tensor? dx, Tensor? dy, Tensor x, Tensor? other, Tensor gamma, Tensor beta, Tensor mean, Tensor rstd, SymInt groups,
    float skip_scale, bool act, float p, Tensor? seed, SymInt layer, SymInt n0, str backend) -> (Tensor, Tensor, Tensor)""",
    _backward,
    lambda *args: tuple(empty_grads(Saved(*args[:-1]))),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, gamma, beta, groups, _, bias, skip, skip_bias, skip_scale, other, act, p, seed, layer, n0, backend = inputs
    x, _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, other, gamma, beta, mean, rstd, seed)
    ctx.dtypes = [None if v is None else v.dtype for v in (bias, skip_bias)]
    ctx.has_skip = skip is not None
    ctx.args = (groups, skip_scale, act, p), (layer, n0, backend)


def _autograd(ctx: Any, dx: Maybe, dy: Maybe, *_: Maybe) -> tuple[Maybe, ...]:
    if dx is None and dy is None:
        return (None,) * 16
    x, other, gamma, beta, mean, rstd, seed = ctx.saved_tensors
    da, dother, sums = backward_op(dx, dy, x, other, gamma, beta, mean, rstd, *ctx.args[0], seed, *ctx.args[1])
    dgamma, dbeta, dbias = sums.unbind()
    dbias, dskip_bias = (None if dtype is None else dbias[: x.shape[1]].to(dtype) for dtype in ctx.dtypes)
    dskip, dother = da if ctx.has_skip else None, None if other is None else dother
    grads = (da, dgamma.to(gamma.dtype), dbeta.to(beta.dtype), None, None, dbias, dskip, dskip_bias, None, dother)
    return (*grads, None, None, None, None, None, None)


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
    inputs = Inputs(a, gamma, beta, groups, eps, bias, skip, skip_bias, skip_scale, other, act, p, seed, layer, n0)
    x, y, _, _ = forward_op(*inputs, OP.pick(a.device, (inputs,), backend))
    return x, y
