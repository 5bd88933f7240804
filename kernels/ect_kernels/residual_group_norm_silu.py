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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ect_kernels import native, philox
from ect_kernels.dispatch import Backend, Op

NAME = "residual_group_norm_silu"
Maybe = Tensor | None
Result = tuple[Tensor, Tensor, Tensor, Tensor]
Grads = tuple[Tensor, Tensor, Tensor]


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty_image(like: Tensor, channels: int) -> Tensor:
    """Channels-last [N, channels, H, W], its strides the same for fakes also where H = W = 1 would make them ambiguous."""
    n, _, h, w = like.shape
    return like.new_empty((n, h, w, channels)).permute(0, 3, 1, 2)


def _image(wide: Tensor, like: Tensor) -> Tensor:
    return empty_image(like, wide.shape[1]).copy_(wide)


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.to(_wide(x))[:, None, None]


def _normal(x: Tensor, other: Maybe) -> Tensor:
    """What is normalised, in the dtype of the arithmetic."""
    return (x if other is None else torch.cat([x, other], dim=1)).to(_wide(x))


def _group_means(v: Tensor, groups: int) -> Tensor:
    """[N, G, 1] of [N, C, H, W]."""
    n, c, h, w = v.shape
    return v.reshape(n, groups, c // groups * h * w).mean(2, keepdim=True)


def _spread(v: Tensor, source: Tensor) -> Tensor:
    """[N, G] or [N, G, 1] for each channel of source, [N, C, 1, 1]."""
    return v.flatten(1).repeat_interleave(source.shape[1] // v.shape[1], dim=1)[:, :, None, None]


def reference_fwd(
    a: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float, bias: Maybe, skip: Maybe, skip_bias: Maybe,
    skip_scale: float, other: Maybe, act: bool, p: float, seed: Maybe, layer: int, n0: int,
) -> Result:  # fmt: skip
    """x, y in a's dtype; mean, rstd [N, groups] in fp32 (fp64 for fp64)."""
    total = a.to(_wide(a))
    for vector in (bias, skip_bias):
        total = total if vector is None else total + _per_channel(vector, a)
    total = total if skip is None else total + skip.to(total.dtype)
    x = (total * skip_scale).to(a.dtype)
    source = _normal(x, other)
    mean = _group_means(source, groups)
    centred = source - _spread(mean, source)
    rstd = (_group_means(centred.square(), groups) + eps).rsqrt()
    y = centred * _spread(rstd, source) * _per_channel(gamma, a) + _per_channel(beta, a)
    y = F.silu(y) if act else y
    y = philox.dropout(y, p, seed, layer, n0) if p > 0 and seed is not None else y
    return _image(x, a), _image(y, a), mean[:, :, 0].contiguous(), rstd[:, :, 0].contiguous()


def reference_bwd(
    dx: Maybe, dy: Maybe, x: Tensor, other: Maybe, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor,
    groups: int, skip_scale: float, act: bool, p: float, seed: Maybe, layer: int, n0: int,
) -> Grads:  # fmt: skip
    """da and dother (empty without other) in x's dtype; sums [3, C + C2] in fp32 (fp64 for fp64): dgamma, dbeta, and dbias in
    the first C places of the third row."""
    source, c = _normal(x, other), x.shape[1]
    xhat = (source - _spread(mean, source)) * _spread(rstd, source)
    w = _per_channel(gamma, x)
    dz = torch.zeros_like(source) if dy is None else dy.to(source.dtype)
    dz = philox.dropout(dz, p, seed, layer, n0) if p > 0 and seed is not None else dz
    if act:
        z = xhat * w + _per_channel(beta, x)
        s = z.sigmoid()
        dz = dz * (s * (1 + z * (1 - s)))
    m0, m1 = (_spread(_group_means(v, groups), source) for v in (dz * w, dz * w * xhat))
    d = (dz * w - m0 - xhat * m1) * _spread(rstd, source)
    da = skip_scale * (d[:, :c] if dx is None else d[:, :c] + dx.to(d.dtype))
    dbias = F.pad(da.sum((0, 2, 3)), (0, source.shape[1] - c))
    sums = torch.stack([(dz * xhat).sum((0, 2, 3)), dz.sum((0, 2, 3)), dbias])
    return _image(da, x), x.new_empty(0) if other is None else _image(d[:, c:], x), sums


def dropout_numbers(p: float) -> tuple[int, float]:
    """The 16-bit threshold of philox.dropout and the inverse of the kept fraction."""
    threshold = round(65536 * p)
    return threshold, 65536.0 / (65536 - threshold)


def _fp32(v: Maybe) -> Maybe:
    return None if v is None else v.to(torch.float32).contiguous()


def _native(backend: str) -> Backend:
    """csrc/residual_group_norm_silu.cu, on the GPU ('cuda') or through the emulator ('emulated')."""

    def sizes(x: Tensor, gamma: Tensor, groups: int, act: bool, p: float, layer: int, n0: int) -> tuple[int, ...]:
        n, c, h, w = x.shape
        dtype = native.DTYPES[x.dtype]
        return n, h * w, c, gamma.shape[0] - c, groups, dtype, int(act), dropout_numbers(p)[0], layer, n0

    def fwd(
        a: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float, bias: Maybe, skip: Maybe, skip_bias: Maybe,
        skip_scale: float, other: Maybe, act: bool, p: float, seed: Maybe, layer: int, n0: int,
    ) -> Result:  # fmt: skip
        x, y = empty_image(a, a.shape[1]), empty_image(a, gamma.shape[0])
        mean, rstd = (a.new_empty((a.shape[0], groups), dtype=torch.float32) for _ in range(2))
        inputs = (a, _fp32(bias), skip, _fp32(skip_bias), other, _fp32(gamma), _fp32(beta), seed if p > 0 else None)
        numbers = (*sizes(a, gamma, groups, act, p, layer, n0), float(skip_scale), float(eps), dropout_numbers(p)[1])
        native.launch(backend, f"{NAME}_fwd", *inputs, x, y, mean, rstd, *numbers)
        return x, y, mean, rstd

    def bwd(
        dx: Maybe, dy: Maybe, x: Tensor, other: Maybe, gamma: Tensor, beta: Tensor, mean: Tensor, rstd: Tensor,
        groups: int, skip_scale: float, act: bool, p: float, seed: Maybe, layer: int, n0: int,
    ) -> Grads:  # fmt: skip
        dy = empty_image(x, gamma.shape[0]).zero_() if dy is None else dy
        da, dother = empty_image(x, x.shape[1]), None if other is None else empty_image(x, other.shape[1])
        sums, partials = mean.new_zeros((3, gamma.shape[0])), mean.new_empty((3, x.shape[0], gamma.shape[0]))
        inputs = (dy, dx, x, other, _fp32(gamma), _fp32(beta), seed if p > 0 else None, mean, rstd)
        numbers = (*sizes(x, gamma, groups, act, p, layer, n0), float(skip_scale), dropout_numbers(p)[1])
        native.launch(backend, f"{NAME}_bwd", *inputs, da, dother, *sums.unbind(), partials, *numbers)
        return da, x.new_empty(0) if dother is None else dother, sums

    return Backend(fwd, bwd, native_limits)


def native_limits(a: Tensor, gamma: Tensor, beta: Tensor, groups: int, *_: Any) -> str | None:
    if a.dtype not in native.DTYPES:
        return f"dtype {a.dtype}"
    channels, h, w = gamma.shape[0], a.shape[2], a.shape[3]
    if channels // groups > 4096 or h * w > (2**31 - 1) // channels:
        return f"{channels} channels in {groups} groups at {h}x{w}"
    return None


def triton_limits(a: Tensor, gamma: Tensor, beta: Tensor, groups: int, *_: Any) -> str | None:
    size = gamma.shape[0] // groups
    if gamma.shape[0] % 8 == 0 and math.lcm(size, 8) > 4096:  # whole groups and whole blocks of random bits: a slab
        return f"{gamma.shape[0]} channels in {groups} groups"
    return native_limits(a, gamma, beta, groups)


def _triton(name: str) -> Any:
    """Function `name` of the Triton module, imported at its first call: triton may be absent."""

    def call(*args: Any) -> Any:
        from ect_kernels import residual_group_norm_silu_triton as kernels

        return getattr(kernels, name)(*args)

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


def _nhwc(x: Maybe) -> Maybe:
    return None if x is None else x.contiguous(memory_format=torch.channels_last)


@torch.library.custom_op(f"ect::{NAME}", mutates_args=())
def forward_op(
    a: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float, bias: Tensor | None, skip: Tensor | None,
    skip_bias: Tensor | None, skip_scale: float, other: Tensor | None, act: bool, p: float, seed: Tensor | None,
    layer: int, n0: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(x, y, mean, rstd) on the named backend; inputs of any strides."""
    sources = _nhwc(skip), skip_bias, skip_scale, _nhwc(other)
    function = OP.backends[backend if a.numel() else "reference"].fwd
    result: Result = function(_nhwc(a), gamma, beta, groups, eps, bias, *sources, act, p, seed, layer, n0)
    return result


@forward_op.register_fake
def _(a: Tensor, gamma: Tensor, beta: Tensor, groups: int, *_: Any) -> Result:
    stats = a.new_empty((a.shape[0], groups), dtype=_wide(a))
    return empty_image(a, a.shape[1]), empty_image(a, gamma.shape[0]), stats, torch.empty_like(stats)


@torch.library.custom_op(f"ect::{NAME}_bwd", mutates_args=())
def backward_op(
    dx: Tensor | None, dy: Tensor | None, x: Tensor, other: Tensor | None, gamma: Tensor, beta: Tensor, mean: Tensor,
    rstd: Tensor, groups: int, skip_scale: float, act: bool, p: float, seed: Tensor | None, layer: int, n0: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(da, dother, sums) as reference_bwd; dx or dy may be absent."""
    dx, dy = (None if v is None else _nhwc(v.to(x.dtype)) for v in (dx, dy))
    function = OP.backends[backend if x.numel() else "reference"].bwd
    assert function is not None
    inputs = dx, dy, _nhwc(x), _nhwc(other), gamma, beta, mean, rstd
    result: Grads = function(*inputs, groups, skip_scale, act, p, seed, layer, n0)
    return result


@backward_op.register_fake
def _(dx: Maybe, dy: Maybe, x: Tensor, other: Maybe, gamma: Tensor, beta: Tensor, mean: Tensor, *_: Any) -> Grads:
    dother = x.new_empty(0) if other is None else empty_image(x, other.shape[1])
    return empty_image(x, x.shape[1]), dother, mean.new_empty((3, gamma.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
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
    for name, tensor, shape in (
        ("gamma", gamma, (c + c2,)), ("beta", beta, (c + c2,)), ("bias", bias, (c,)), ("skip_bias", skip_bias, (c,)),
        ("skip", skip, (n, c, h, w)), ("other", other, (n, c2, h, w)),
    ):  # fmt: skip
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{NAME}: {name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor is not None and len(shape) == 4 and tensor.dtype != a.dtype:
            raise ValueError(f"{NAME}: {name} is {tensor.dtype} but a is {a.dtype}; cast one of them")
    if groups < 1 or (c + c2) % groups:
        raise ValueError(f"{NAME}: {c + c2} channels do not divide into {groups} groups")
    if not 0 <= round(65536 * p) < 65536 or (p > 0 and seed is None):
        raise ValueError(f"{NAME}: dropout needs 0 <= p < 1 and a seed tensor; p is {p}, seed {seed}")
    args = (a, gamma, beta, groups, eps, bias, skip, skip_bias, skip_scale, other, act, p, seed, layer, n0)
    x, y, _, _ = forward_op(*args, OP.pick(a.device, args, backend))
    return x, y
