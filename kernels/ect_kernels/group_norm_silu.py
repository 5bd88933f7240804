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

DRAM = {
    "triton forward": "2s at 16x16 and 8x8, 3s at 32x32",
    "triton backward": "3s at 16x16 and 8x8, 5s at 32x32",
    "cuda forward": "2s where a slab fits in shared memory, else 3s",
    "cuda backward": "3s where a slab fits in shared memory, else 5s",
}
"""Bytes an element by construction, in element sizes s, as if a second read found nothing in L2."""


class Inputs(NamedTuple):
    """Arguments of the op: x channels-last, seed None where nothing is dropped."""

    x: Tensor
    gamma: Tensor
    beta: Tensor
    v: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    seed: Tensor | None
    groups: int
    eps: float
    act: bool
    p: float
    layer: int
    n0: int

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

    def vectors(self) -> tuple[Tensor | None, ...]:
        """gamma, beta, v, scale, shift as the kernels read them: contiguous float32."""
        return tuple(map(tensors.fp32, self[1:6]))


class Output(NamedTuple):
    """mean, rstd: [N, G], float32 (float64 for float64)."""

    y: Tensor
    mean: Tensor
    rstd: Tensor


class Grads(NamedTuple):
    """Gradients of the inputs; the vectors' in any float dtype, the last three None where their input is."""

    x: Tensor
    gamma: Tensor
    beta: Tensor
    v: Tensor | None
    scale: Tensor | None
    shift: Tensor | None


def _output(i: Inputs) -> Output:
    """Room for the forward's results."""
    mean = i.x.new_empty((i.x.shape[0], i.groups), dtype=i.wide)
    return Output(torch.empty_like(i.x, memory_format=torch.channels_last), mean, torch.empty_like(mean))


def _grads(i: Inputs) -> Grads:
    """Room for the backward's."""
    n, c = i.x.shape[:2]
    sizes = [(c,), (c,), *(None if t is None else (n, c) for t in (i.v, i.scale, i.shift))]
    vectors = [None if size is None else i.x.new_empty(size, dtype=torch.float32) for size in sizes]
    return Grads(torch.empty_like(i.x, memory_format=torch.channels_last), *vectors)  # type: ignore[arg-type]


def _rows(t: Tensor, i: Inputs) -> Tensor:
    """[N, H W, G, C / G] of an image, wide."""
    n, c, h, w = t.shape
    return t.permute(0, 2, 3, 1).reshape(n, h * w, i.groups, c // i.groups).to(i.wide)


def _image(rows: Tensor, i: Inputs) -> Tensor:
    """Channels-last [N, C, H, W] of it."""
    n, c, h, w = i.x.shape
    return rows.reshape(n, h, w, c).permute(0, 3, 1, 2)


def _dropout(rows: Tensor, i: Inputs) -> Tensor:
    return rows if i.seed is None else _rows(philox.dropout(_image(rows, i), i.p, i.seed, i.layer, i.n0), i)


def _shifted(i: Inputs) -> Tensor:
    """x + v."""
    rows = _rows(i.x, i)
    return rows if i.v is None else rows + _wide(i.v, i)


def _wide(vector: Tensor, i: Inputs) -> Tensor:
    """[N or 1, 1, G, C / G] of a vector by (sample and) channel."""
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


def reference_bwd(dy: Tensor, i: Inputs, mean: Tensor, rstd: Tensor) -> Grads:
    (n, c), rs = i.x.shape[:2], rstd[:, None, :, None]
    xh = (_shifted(i) - mean[:, None, :, None]) * rs
    z = xh * _wide(i.gamma, i) + _wide(i.beta, i)
    du = _dropout(_rows(dy, i), i)
    if i.act:
        u = _modulated(z, i)
        s = u.sigmoid()
        du = du * (s * (1 + u * (1 - s)))
    dz = du if i.scale is None else du * (1 + _wide(i.scale, i))
    dxh = dz * _wide(i.gamma, i)
    dx = rs * (dxh - dxh.mean((1, 3), keepdim=True) - xh * (dxh * xh).mean((1, 3), keepdim=True))
    return Grads(
        _image(dx, i).to(i.x.dtype),
        (dz * xh).sum((0, 1)).view(c),
        dz.sum((0, 1)).view(c),
        None if i.v is None else dx.sum(1).view(n, c),
        None if i.scale is None else (du * z).sum(1).view(n, c),
        None if i.shift is None else du.sum(1).view(n, c),
    )


def limits(i: Inputs, most: int) -> str | None:
    """Why kernels that take at most `most` channels a group cannot run, or None."""
    _, c, h, w = i.x.shape
    if i.x.dtype not in native.DTYPES:
        return f"dtype {i.x.dtype} (only float32, float16, bfloat16)"
    if h * w * c >= 2**31 or c > 2**22:
        return f"samples of {c} channels at {h}x{w} (only fewer than 2^31 elements, up to 2^22 channels)"
    if c // i.groups > most:
        return f"{c // i.groups} channels a group (only up to {most})"
    return None


def triton_fwd(i: Inputs) -> Output:
    from ect_kernels import group_norm_silu_triton

    out = _output(i)
    group_norm_silu_triton.forward(i, out)
    return out


def triton_bwd(dy: Tensor, i: Inputs, mean: Tensor, rstd: Tensor) -> Grads:
    from ect_kernels import group_norm_silu_triton

    grads = _grads(i)
    group_norm_silu_triton.backward(dy, i, mean, rstd, grads)
    return grads


def _native(backend: str) -> Backend:
    """csrc/group_norm_silu.cu, on the GPU ('cuda') or through the emulator ('emulated')."""

    def numbers(i: Inputs) -> tuple[int, ...]:
        n, c, h, w = i.x.shape
        return n, h * w, c, i.groups, native.DTYPES[i.x.dtype], int(i.act), i.threshold, i.layer, i.n0

    def fwd(i: Inputs) -> Output:
        out = _output(i)
        inputs = (i.x, *i.vectors(), i.seed, *out)
        native.launch(backend, "group_norm_silu_fwd", *inputs, *numbers(i), float(i.eps), i.inv_keep)
        return out

    def bwd(dy: Tensor, i: Inputs, mean: Tensor, rstd: Tensor) -> Grads:
        grads = _grads(i)
        partials = mean.new_empty(2, *i.x.shape[:2])
        inputs = (dy, i.x, *i.vectors(), i.seed, mean, rstd, *grads, partials)
        native.launch(backend, "group_norm_silu_bwd", *inputs, *numbers(i), i.inv_keep)
        return grads

    return Backend(fwd, bwd, lambda i: limits(i, 4096))


APEX_CHANNELS = frozenset(
    {128, 256, 320, 384, 448, 512, 640, 768, 896, 960, 1024, 1280, 1344, 1536, 1792, 1920, 2048, 2240, 2560, 2688,
     3072, 3136, 3584, 4096}
)  # fmt: skip


def apex_limits(i: Inputs) -> str | None:
    """What NVIDIA apex's channels-last GroupNorm does not offer; it is no drop-in, but a baseline where it can run."""
    if i.v is not None or i.scale is not None or i.seed is not None:
        return "v, scale, shift or dropout"
    if i.x.dtype not in native.DTYPES or i.gamma.dtype not in native.DTYPES or i.beta.dtype != i.gamma.dtype:
        return f"dtypes {i.x.dtype}, {i.gamma.dtype}, {i.beta.dtype}"
    if i.x.shape[1] not in APEX_CHANNELS or i.groups not in (16, 32):
        return f"{i.x.shape[1]} channels in {i.groups} groups"
    return None


def _apex_options(i: Inputs) -> tuple[float, str, int]:
    """eps, activation, and 1 or 2 passes over the data (its one-pass kernel ends at 32x32)."""
    return i.eps, "silu" if i.act else "", 1 if i.x.shape[2] * i.x.shape[3] <= 1024 else 2


def apex_fwd(i: Inputs) -> Output:
    """apex saves 2 N G sums of its own making: they travel in the places of mean and rstd, read by apex_bwd alone."""
    from apex.contrib.group_norm import group_norm  # type: ignore[import-not-found]

    y, sums = group_norm.group_norm_nhwc_fprop(i.x, i.groups, i.gamma, i.beta, *_apex_options(i))
    first, second = sums.view(2, i.x.shape[0], i.groups).clone().unbind()
    return Output(y, first, second.clone())


def apex_bwd(dy: Tensor, i: Inputs, mean: Tensor, rstd: Tensor) -> Grads:
    from apex.contrib.group_norm import group_norm

    sums = torch.stack([mean, rstd]).flatten()
    dx, dgamma, dbeta = group_norm.group_norm_nhwc_bprop(dy, sums, i.x, i.groups, i.gamma, i.beta, *_apex_options(i))
    return Grads(dx, dgamma, dbeta, None, None, None)


OP = Op(
    "group_norm_silu",
    {
        "reference": Backend(reference_fwd, reference_bwd),
        "triton": Backend(triton_fwd, triton_bwd, lambda i: limits(i, 1024)),
        "cuda": _native("cuda"),
        "emulated": _native("emulated"),
        "apex": Backend(apex_fwd, apex_bwd, apex_limits),
    },
)

_ARGUMENTS = """Tensor x, Tensor gamma, Tensor beta, Tensor? v, Tensor? scale, Tensor? shift, Tensor? seed,
    int groups, float eps, bool act, float p, int layer, int n0, str backend"""


def _inputs(*args: Any) -> Inputs:
    i = Inputs(*args)
    return i._replace(x=tensors.nhwc(i.x))


def _forward(*args: Any) -> tuple[Tensor, ...]:
    i, backend = _inputs(*args[:-1]), args[-1]
    if i.x.numel() == 0:
        out = _output(i)
        return out.y, out.mean.zero_(), out.rstd.zero_()
    return tuple(OP.backends[backend].fwd(i))


def _backward(dy: Tensor, mean: Tensor, rstd: Tensor, *args: Any) -> tuple[Tensor, ...]:
    i, backend = _inputs(*args[:-1]), args[-1]
    dy = tensors.nhwc(dy.to(i.x.dtype))
    if i.x.numel() == 0:
        grads = Grads(*(None if t is None else t.zero_() for t in _grads(i)))  # type: ignore[arg-type]
    else:
        grads = OP.backends[backend].bwd(dy, i, mean, rstd)  # type: ignore[misc]
    return _like_inputs(grads, i)


def _backward_fake(dy: Tensor, mean: Tensor, rstd: Tensor, *args: Any) -> tuple[Tensor, ...]:
    i = Inputs(*args[:-1])
    return _like_inputs(_grads(i), i)


def _like_inputs(grads: Grads, i: Inputs) -> tuple[Tensor, ...]:
    """In the inputs' dtypes; an empty tensor for None, which a registered op cannot return."""
    given = (i.x, i.gamma, i.beta, i.v, i.scale, i.shift)
    return tuple(
        i.x.new_empty(0) if g is None or t is None else g.to(t.dtype) for g, t in zip(grads, given, strict=True)
    )


_forward_op = tensors.register(
    "group_norm_silu",
    f"({_ARGUMENTS}) -> (Tensor y, Tensor mean, Tensor rstd)",
    _forward,
    lambda *args: tuple(_output(Inputs(*args[:-1]))),
)
_backward_op = tensors.register(
    "group_norm_silu_bwd",
    f"(Tensor dy, Tensor mean, Tensor rstd, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(*inputs[:7], mean, rstd)
    ctx.rest = inputs[7:]  # type: ignore[attr-defined]


def _autograd(ctx: torch.autograd.function.FunctionCtx, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, mean, rstd = ctx.saved_tensors  # type: ignore[attr-defined]
    grads = _backward_op(dy, mean, rstd, *tensors, *ctx.rest)  # type: ignore[attr-defined]
    given = [None if t is None else g for g, t in zip(grads, tensors[:6], strict=True)]
    return (*given, *(None for _ in range(8)))


_forward_op.register_autograd(_autograd, setup_context=_setup_context)


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
    n0: int = 0,
    backend: str | None = None,
) -> Tensor:
    """dropout(silu(GroupNorm(x + v) * (1 + scale) + shift)), channels-last, in x's dtype; see the module's formulas.

    Args: x: [N, C, H, W] (made channels-last if it is not). gamma, beta: [C]. v, scale, shift: [N, C], the last two together.
    act: SiLU. p: probability of dropping, with seed (0-d int64 tensor on x's device), layer and n0 (global number of x[0]) as
    what the mask is a function of. Gradients: x, gamma, beta, v, scale, shift. Raises ValueError, dispatch.BackendError.
    """
    _check(x, gamma, beta, groups, v, scale, shift, p, seed)
    seed = seed if philox.dropout_threshold(p) > 0 else None
    inputs = Inputs(x, gamma, beta, v, scale, shift, seed, groups, eps, act, p, layer, n0)
    y: Tensor = _forward_op(*inputs, OP.pick(x.device, (inputs,), backend))[0]
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
        "group_norm_silu", ("gamma", gamma, (c,)), ("beta", beta, (c,)), ("v", v, (n, c)), ("scale", scale, (n, c)),
        ("shift", shift, (n, c)),
    )  # fmt: skip
    if (scale is None) != (shift is None):
        raise ValueError("group_norm_silu: scale and shift go together; give zeros for the missing one")
    philox.check_dropout("group_norm_silu", p, seed)
