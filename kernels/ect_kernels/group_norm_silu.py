"""group_norm_silu: GroupNorm of x + v, optional modulation, SiLU, dropout, over channels-last x.

    x_hat = (x + v[n, c] - mean) * rstd       mean, variance over the H W C/G elements of a group
    z = x_hat * gamma[c] + beta[c]
    z = z * (1 + scale[n, c]) + shift[n, c]    where scale and shift are given
    y = dropout(silu(z))                       or dropout(z) with act=False; mask: ect_kernels.philox.dropout

Backward, with du the gradient at the argument of SiLU, A = gamma * (1 + scale), S0 = sum_hw du, S1 = sum_hw du * x_hat:
    dx = rstd * (A * du - mean_g(A * S0) - x_hat * mean_g(A * S1))      (means over the elements of a group)
    dgamma = sum_n (1 + scale) * S1, dbeta = sum_n (1 + scale) * S0
    dscale = gamma * S1 + beta * S0, dshift = S0, dv = sum_hw dx
Only x, mean, rstd and the small vectors are kept for it; the mask is drawn again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ect_kernels import native, philox, tensors
from ect_kernels.dispatch import Backend, Op
from ect_kernels.passes import Pass, backends
from ect_kernels.rows import form, gradients, vector

DRAM = {
    "triton forward": "2s at 16x16 and 8x8, 3s at 32x32",
    "triton backward": "3s at 16x16 and 8x8, 5s at 32x32",
    "cuda forward": "2s where a slab fits in shared memory, else 3s",
    "cuda backward": "3s where a slab fits in shared memory, else 5s",
}
"""Bytes an element by construction, in element sizes s, as if a second read found nothing in L2."""


class Inputs(NamedTuple):
    """Arguments of the op: x channels-last, seed None where nothing is dropped, n0 None where that is 0."""

    x: Tensor
    gamma: Tensor
    beta: Tensor
    v: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    seed: Tensor | None
    n0: Tensor | None
    groups: int
    eps: float
    act: bool
    p: float
    layer: int

    @property
    def wide(self) -> torch.dtype:
        """The dtype of the arithmetic and of mean and rstd."""
        return tensors.wide(self.x)

    @property
    def threshold(self) -> int:
        """Elements whose 16 bits are below it are dropped."""
        return 0 if self.seed is None else philox.dropout_threshold(self.p)

    @property
    def inv_keep(self) -> float:
        return 1.0 if self.seed is None else philox.inv_keep(self.p)

    def vectors(self) -> tuple[Tensor | int | None, ...]:
        """Return gamma, beta, v, scale, shift as the kernels read them, then the distance of two samples' rows in v and scale.

        The vectors are float32 with neighbouring channels. scale and shift have one distance.
        """
        v, scale, shift = map(tensors.fp32_rows, self[3:6])
        if scale is not None and shift is not None and scale.stride(0) != shift.stride(0):
            scale, shift = scale.contiguous(), shift.contiguous()
        strides = (0 if t is None else t.stride(0) for t in (v, scale))
        return *map(tensors.fp32, self[1:3]), v, scale, shift, *strides


class Output(NamedTuple):
    """mean, rstd: [N, G], float32 (float64 for float64)."""

    y: Tensor
    mean: Tensor
    rstd: Tensor


class Saved(NamedTuple):
    """Arguments of the backward pass before the inputs."""

    dy: Tensor
    mean: Tensor
    rstd: Tensor


class Grads(NamedTuple):
    """Gradients of the inputs: x's in its dtype, the others' in that of the arithmetic, the last three empty where absent.

    rows: [2, N, C], of gamma and beta, by sample.
    """

    x: Tensor
    rows: Tensor
    v: Tensor
    scale: Tensor
    shift: Tensor


def empty_output(i: Inputs) -> Output:
    """Return room for the forward's results; gamma says how many channels, of x or of more than x."""
    mean = i.x.new_empty((i.x.shape[0], i.groups), dtype=i.wide)
    return Output(tensors.empty_image(i.x, i.gamma.shape[-1]), mean, torch.empty_like(mean))


def empty_grads(s: Saved, i: Inputs) -> Grads:
    """Return room for the backward's results."""
    n, c = i.x.shape[:2]
    sizes = [(2, n, c), *((0,) if t is None else (n, c) for t in (i.v, i.scale, i.shift))]
    return Grads(tensors.empty_image(i.x, c), *(s.mean.new_empty(size) for size in sizes))


def _rows(t: Tensor, i: Inputs) -> Tensor:
    """Return an image as wide rows [N, H W, G, C / G]."""
    n, c, h, w = t.shape
    return t.permute(0, 2, 3, 1).reshape(n, h * w, i.groups, c // i.groups).to(i.wide)


def _image(rows: Tensor, i: Inputs) -> Tensor:
    """Return rows as a channels-last image [N, C, H, W]."""
    n, c, h, w = i.x.shape
    return rows.reshape(n, h, w, c).permute(0, 3, 1, 2)


def _dropout(rows: Tensor, i: Inputs) -> Tensor:
    return rows if i.seed is None else _rows(philox.dropout(_image(rows, i), i.p, i.seed, i.layer, i.n0), i)


def _shifted(i: Inputs) -> Tensor:
    """Return x + v."""
    rows = _rows(i.x, i)
    return rows if i.v is None else rows + _wide(i.v, i)


def _wide(vector: Tensor, i: Inputs) -> Tensor:
    """Return a vector by (sample and) channel as wide [N or 1, 1, G, C / G]."""
    return vector.to(i.wide).view(-1, 1, i.groups, i.x.shape[1] // i.groups)


def _modulated(z: Tensor, i: Inputs) -> Tensor:
    return z if i.scale is None or i.shift is None else z * (1 + _wide(i.scale, i)) + _wide(i.shift, i)


def reference_fwd(i: Inputs) -> Output:
    rows = _shifted(i)
    mean = rows.mean((1, 3), keepdim=True)
    centred = rows - mean
    rstd = (centred.square().mean((1, 3), keepdim=True) + i.eps).rsqrt()
    z = _modulated(centred * rstd * _wide(i.gamma, i) + _wide(i.beta, i), i)
    y = _dropout(F.silu(z) if i.act else z, i)
    return Output(_image(y, i).to(i.x.dtype), mean[:, 0, :, 0], rstd[:, 0, :, 0])


def reference_bwd(s: Saved, i: Inputs) -> Grads:
    (n, c), rs = i.x.shape[:2], s.rstd[:, None, :, None]
    xh = (_shifted(i) - s.mean[:, None, :, None]) * rs
    z = xh * _wide(i.gamma, i) + _wide(i.beta, i)
    du = _dropout(_rows(s.dy, i), i)
    if i.act:
        u = _modulated(z, i)
        sigmoid = u.sigmoid()
        du = du * (sigmoid * (1 + u * (1 - sigmoid)))
    dz = du if i.scale is None else du * (1 + _wide(i.scale, i))
    dxh = dz * _wide(i.gamma, i)
    dx = rs * (dxh - dxh.mean((1, 3), keepdim=True) - xh * (dxh * xh).mean((1, 3), keepdim=True))
    return Grads(
        _image(dx, i).to(i.x.dtype),
        torch.stack([dz * xh, dz]).sum(2).view(2, n, c),
        s.mean.new_empty(0) if i.v is None else dx.sum(1).view(n, c),
        s.mean.new_empty(0) if i.scale is None else (du * z).sum(1).view(n, c),
        s.mean.new_empty(0) if i.shift is None else du.sum(1).view(n, c),
    )


def limits(i: Inputs, most: int) -> str | None:
    """Return why kernels that take at most `most` channels a group cannot run, or None."""
    c, (h, w) = i.gamma.shape[-1], i.x.shape[2:]
    if i.x.dtype not in native.DTYPES:
        return f"dtype {i.x.dtype} (only float32, float16, bfloat16)"
    if h * w * c >= 2**31 or c > 2**22:
        return f"samples of {c} channels at {h}x{w} (only fewer than 2^31 elements, up to 2^22 channels)"
    if c // i.groups > most:
        return f"{c // i.groups} channels a group (only up to {most})"
    return None


def numbers(i: Inputs) -> tuple[int, ...]:
    """Return the arguments of the C launchers after the sizes."""
    return i.groups, native.DTYPES[i.x.dtype], int(i.act), i.threshold, i.layer


def _launcher_fwd(i: Inputs, out: Output) -> tuple[native.Argument, ...]:
    n, c, h, w = i.x.shape
    *vectors, v_stride, stride = i.vectors()
    return i.x, *vectors, i.seed, i.n0, *out, n, h * w, c, *numbers(i), v_stride, stride, i.eps, i.inv_keep


def _launcher_bwd(s: Saved, i: Inputs, grads: Grads) -> tuple[native.Argument, ...]:
    n, c, h, w = i.x.shape
    results = (grads.x, *grads[2:], grads.rows)
    *vectors, v_stride, stride = i.vectors()
    numbers_ = (n, h * w, c, *numbers(i), v_stride, stride)
    return s.dy, i.x, *vectors, i.seed, i.n0, s.mean, s.rstd, *results, *numbers_, i.inv_keep


APEX_CHANNELS = frozenset(
    {128, 256, 320, 384, 448, 512, 640, 768, 896, 960, 1024, 1280, 1344, 1536, 1792, 1920, 2048, 2240, 2560, 2688,
     3072, 3136, 3584, 4096}
)  # fmt: skip


def apex_limits(*args: Any) -> str | None:
    """Return why NVIDIA apex's channels-last GroupNorm cannot run, or None.

    It offers less than this op. It is no drop-in, but a baseline where it can run.
    """
    i: Inputs = args[-1]
    if i.v is not None or i.scale is not None or i.seed is not None:
        return "v, scale, shift or dropout"
    if i.x.dtype not in native.DTYPES or i.gamma.dtype not in native.DTYPES or i.beta.dtype != i.gamma.dtype:
        return f"dtypes {i.x.dtype}, {i.gamma.dtype}, {i.beta.dtype}"
    if i.x.shape[1] not in APEX_CHANNELS or i.groups not in (16, 32):
        return f"{i.x.shape[1]} channels in {i.groups} groups"
    return None


def _apex_options(i: Inputs) -> tuple[float, str, int]:
    """Return eps, activation, and 1 or 2 passes over the data (its one-pass kernel ends at 32x32)."""
    return i.eps, "silu" if i.act else "", 1 if i.x.shape[2] * i.x.shape[3] <= 1024 else 2


def apex_fwd(i: Inputs) -> Output:
    """Run apex's forward; its 2 N G sums travel in the places of mean and rstd, for apex_bwd alone to read."""
    from apex.contrib.group_norm import group_norm  # type: ignore[import-not-found]

    y, sums = group_norm.group_norm_nhwc_fprop(i.x, i.groups, i.gamma, i.beta, *_apex_options(i))
    first, second = sums.view(2, i.x.shape[0], i.groups).clone().unbind()
    return Output(y, first, second.clone())


def apex_bwd(s: Saved, i: Inputs) -> Grads:
    from apex.contrib.group_norm import group_norm

    sums = torch.stack([s.mean, s.rstd]).flatten()
    dx, dgamma, dbeta = group_norm.group_norm_nhwc_bprop(s.dy, sums, i.x, i.groups, i.gamma, i.beta, *_apex_options(i))
    rows = s.mean.new_zeros(2, *i.x.shape[:2])
    rows[:, :1] = torch.stack([dgamma, dbeta])[:, None]  # which are sums already
    return Grads(dx, rows, *(dx.new_empty(0) for _ in range(3)))


def _prepare_fwd(i: Inputs) -> tuple[Inputs]:
    return (Inputs(tensors.nhwc(i.x), vector(i.gamma), vector(i.beta), *i[3:]),)


def _prepare_bwd(s: Saved, i: Inputs) -> tuple[Any, ...]:
    return s._replace(dy=tensors.nhwc(s.dy.to(i.x.dtype))), *_prepare_fwd(i)


FORWARD = Pass("group_norm_silu", "fwd", (Inputs,), empty_output, _prepare_fwd, _launcher_fwd)
BACKWARD = Pass("group_norm_silu", "bwd", (Saved, Inputs), empty_grads, _prepare_bwd, _launcher_bwd)
OP = Op(
    "group_norm_silu",
    backends(
        Backend(reference_fwd, reference_bwd),
        FORWARD,
        BACKWARD,
        native=lambda *args: limits(args[-1], 4096),
        triton=lambda *args: limits(args[-1], 1024),
        cuda=lambda *args: limits(args[-1], 4096),
    )
    | {"apex": Backend(apex_fwd, apex_bwd, apex_limits)},
)
_forward_op, _backward_op = FORWARD.register(OP), BACKWARD.register(OP)


class _Norm(torch.autograd.Function):
    """The op with a gradient for its first six arguments."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        y, mean, rstd = _forward_op(*args)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mean, rstd, *args[:8])
        ctx.rest = args[8:]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 14
        mean, rstd, *saved = ctx.saved_tensors
        dx, rows, *others = _backward_op(dy, mean, rstd, *saved, *ctx.rest)
        others = [None if t is None else g.to(t.dtype) for g, t in zip(others, saved[3:6], strict=True)]
        return dx, *gradients(rows, [form(t) for t in saved[1:3]]), *others, *[None] * 8


def group_norm_silu(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    groups: int,
    eps: float,
    v: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: bool = True,
    p: float = 0.0,
    seed: Tensor | None = None,
    layer: int = 0,
    n0: Tensor | int = 0,
    backend: str | None = None,
) -> Tensor:
    """Return dropout(silu(GroupNorm(x + v) * (1 + scale) + shift)), channels-last, in x's dtype; see the formulas above."""
    _check(x, gamma, beta, groups, v, scale, shift, p, seed)
    seed = seed if philox.dropout_threshold(p) > 0 else None
    first = None if seed is None else philox.first_sample("group_norm_silu", n0, x.device)
    inputs = Inputs(x, gamma, beta, v, scale, shift, seed, first, groups, eps, act, p, layer)
    y: Tensor
    if torch.is_grad_enabled():
        y = _Norm.apply(*inputs, backend or "")
    else:
        y, *_ = _forward_op(*inputs, backend or "")
    return y


def _check(
    x: Tensor, gamma: Tensor, beta: Tensor, groups: int, v: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    p: float, seed: Tensor | None,
) -> None:  # fmt: skip
    if x.dim() != 4 or groups < 1 or x.shape[1] % groups != 0:
        raise ValueError(
            f"group_norm_silu: x is {tuple(x.shape)}, expected [N, C, H, W] with {groups} groups dividing C"
        )
    n, c = x.shape[:2]
    tensors.check_shapes(
        "group_norm_silu", ("gamma", gamma, (c,), (n, c)), ("beta", beta, (c,), (n, c)), ("v", v, (n, c)),
        ("scale", scale, (n, c)), ("shift", shift, (n, c)),
    )  # fmt: skip
    if (scale is None) != (shift is None):
        raise ValueError("group_norm_silu: scale and shift go together; give zeros for the missing one")
    philox.check_dropout("group_norm_silu", p, seed)
