"""radam_ema: one optimizer step over flat arenas: finite check, clip, RAdam or Adam, weight averages, half-precision copy.

With g the gradients over the loss scale S (1 where state_f64[LOSS_SCALE] is 0), t the step's number:
    nan -> 0, +-inf -> +-1e5 in `grads`, in place; all of them are counted
    grads *= min(1, clip / (|g| + 1e-6)), in place, so g too                       |.|: norm over the whole arena
    m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2
    Adam:  p -= lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    RAdam: p -= lr / (1 - beta1^t) (m where rho_t <= 5, else r_t sqrt(1 - beta2^t) m / (sqrt(v) + eps))
    ema_i = ema_beta_i ema_i + (1 - ema_beta_i) p,   shadow = p in half precision
With a loss scale, a non-finite gradient skips the step: parameters, moments, averages, shadow and t stay as they are, S
halves; S doubles after `growth_interval` good steps in a row. Every scalar that changes lives in `state_f64` and
`state_i64`, on the device, and is computed in fp64: nothing is read on the host, so the op can be captured in a CUDA graph.

Sources: Liu et al., "On the variance of the adaptive learning rate and beyond" (RAdam, 2020); Kingma & Ba, 2015 (Adam);
Micikevicius et al., "Mixed precision training" (2018).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ect_kernels import cpu, native
from ect_kernels.dispatch import Backend, Op
from ect_kernels.registry import register


class F64(IntEnum):
    """Indices into `state_f64`. Written by the op: LOSS_SCALE and GRAD_NORM; the others are settings."""

    LR = 0
    BETA1 = 1
    BETA2 = 2
    EPS = 3
    CLIP = 4  # largest global gradient norm, inf for no bound
    LOSS_SCALE = 5  # the gradients are this many times too large; 0: no loss scale, no step is skipped
    EMA_BETA0 = 6
    EMA_BETA1 = 7
    EMA_BETA2 = 8
    EMA_BETA3 = 9
    GRAD_NORM = 10  # of g before the clip; inf where the step was skipped


class I64(IntEnum):
    """Indices into `state_i64`. Written by the op: all but GROWTH_INTERVAL and OPTIMIZER."""

    STEPS = 0  # t: updates done, without skipped ones
    NONFINITE = 1  # non-finite gradient values met, in all
    GOOD_STEPS = 2  # since the loss scale last changed
    SKIPPED = 3  # steps skipped, in all
    GROWTH_INTERVAL = 4
    OPTIMIZER = 5  # index into OPTIMIZERS


DRAM = {
    "check": "4 B a parameter: the gradients (4 B more where one is not finite)",
    "update": "28 B a parameter, 8 B more an average, 2 B for the shadow: params, grads, exp_avg, exp_avg_sq read, all but "
    "grads written (4 B more where the clip bites)",
}

ARGUMENTS = ("params", "grads", "exp_avg", "exp_avg_sq", "emas", "shadow", "state_f64", "state_i64")
OPTIMIZERS = ("radam", "adam")
BOUND = 1e5  # stands in for an infinite gradient
SCALE_RANGE = (2.0**-32, 2.0**32)  # of the loss scale
CHUNK = 16384  # gradients a block of the finite check reads: fixed, so that sums do not depend on the device
CACHED = 1 << 16  # parameters that the reference takes at a time on a CPU
COEFFICIENTS = 16  # fp32 scalars the update kernel reads
MAX_EMAS = 4


def new_state(
    optimizer: str, lr: float, betas: tuple[float, float], eps: float, clip: float | None = None,
    ema_betas: Sequence[float] = (), loss_scale: float | None = None, growth_interval: int = 2000,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (state_f64, state_i64) of an optimizer that has done no step."""
    floats, ints = [0.0] * len(F64), [0] * len(I64)
    floats[: F64.EMA_BETA0] = [lr, *betas, eps, math.inf if clip is None else clip, loss_scale or 0.0]
    floats[F64.EMA_BETA0 : F64.EMA_BETA0 + len(ema_betas)] = ema_betas
    ints[I64.GROWTH_INTERVAL], ints[I64.OPTIMIZER] = growth_interval, OPTIMIZERS.index(optimizer)
    return torch.tensor(floats, dtype=torch.float64, device=device), torch.tensor(ints, device=device)


def reference(
    params: Tensor, grads: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, emas: list[Tensor], shadow: Tensor | None,
    state_f64: Tensor, state_i64: Tensor,
) -> None:  # fmt: skip
    """Compute the step in flat PyTorch operations, on a CPU in parts that its caches hold; arenas fp32 or fp64."""
    size = CACHED if params.device.type == "cpu" else max(params.numel(), 1)
    bad = torch.stack([_clean(part) for part in grads.split(size)]).sum()
    exact = _coefficients(state_f64, state_i64, bad, grads.norm())
    coefficients = torch.stack(exact).to(params.dtype).unbind()
    for p, g, m, v, *averages in zip(
        *(a.split(size) for a in (params, grads, exp_avg, exp_avg_sq, *emas)), strict=True
    ):
        _update(p, g, m, v, averages, coefficients)
    if shadow is not None:
        shadow.copy_(params)


def _clean(grads: Tensor) -> Tensor:
    """Replace what is not finite, and return how many there were."""
    # x - x is 0 for finite x, else nan. Eight sums, each exact in fp32 to 2^24, are faster than any count of true values.
    bad = (grads - grads).nan_to_num_(nan=1.0).view(-1, 8).sum(0).long().sum()
    grads.nan_to_num_(nan=0.0, posinf=BOUND, neginf=-BOUND)
    return bad


def _update(
    params: Tensor, grads: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, emas: list[Tensor],
    coefficients: tuple[Tensor, ...],
) -> None:  # fmt: skip
    shrink, unscale, ceiling, floor, size, keep2, weight1, weight2, *weights = coefficients
    grads.mul_(shrink)
    work = grads * unscale
    exp_avg.lerp_(work, weight1)
    exp_avg_sq.mul_(keep2).add_(work.square_().mul_(weight2))
    torch.minimum(torch.sqrt(exp_avg_sq, out=work), ceiling, out=work).add_(floor)
    params.addcmul_(torch.div(exp_avg, work, out=work), -size)
    for ema, weight in zip(emas, weights, strict=False):
        ema.lerp_(params, weight)


def _coefficients(state_f64: Tensor, state_i64: Tensor, bad: Tensor, norm: Tensor) -> list[Tensor]:
    """Move the state on by one step and give the update's fp64 scalars; a skipped step's leave everything as it is."""
    lr, beta1, beta2, eps, clip, scale = state_f64[: F64.EMA_BETA0].clone().unbind()
    steps, nonfinite, good, skipped, interval, optimizer = state_i64.unbind()
    scaled = scale > 0
    skip = scaled & (bad > 0)
    go = ~skip
    unscale = torch.where(scaled, 1 / scale, 1.0)
    norm = norm * unscale
    shrink = (clip / (norm + 1e-6)).nan_to_num_(nan=1.0).clamp_(max=1.0)  # nan: no clip and an infinite norm
    shrink = torch.where(skip, 1.0, shrink)

    t = steps + 1
    power2, size = beta2**t, lr / (1 - beta1**t)
    root = (1 - power2).sqrt()
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * power2 / (1 - power2)
    rectification = ((rho - 4) * (rho - 2) * rho_inf) / ((rho_inf - 4) * (rho_inf - 2) * rho)
    adam = optimizer == OPTIMIZERS.index("adam")
    adaptive = (adam | (rho > 5)) & go
    # The denominator is min(sqrt(v), ceiling) + floor: 1 for a plain momentum step, whatever v. Adam's is taken times root.
    size = torch.where(adaptive, torch.where(adam, root, rectification.sqrt() * root), 1.0) * size
    ceiling = torch.where(adaptive, math.inf, 0.0)
    floor = torch.where(adaptive, torch.where(adam, root, 1.0) * eps, 1.0)
    weights = ((1 - state_f64) * go).unbind()  # of all settings, those of no beta unused

    state_f64[F64.GRAD_NORM] = torch.where(skip, math.inf, norm)
    steps += go
    nonfinite += bad
    skipped += skip
    good.add_(scaled).mul_(go)
    grow = (good >= interval) & scaled & go
    good.mul_(~grow)
    moved = (scale * (1 + grow.double()) * (1 - 0.5 * skip.double())).clamp_(*SCALE_RANGE)
    state_f64[F64.LOSS_SCALE] = moved * scaled
    emas = weights[F64.EMA_BETA0 : F64.EMA_BETA0 + MAX_EMAS]
    betas = weights[F64.BETA1], weights[F64.BETA2]
    return [shrink, unscale * go, ceiling, floor, size * go, 1 - betas[1], *betas, *emas]


def _launch(
    backend: str,
    params: Tensor, grads: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, emas: list[Tensor], shadow: Tensor | None,
    state_f64: Tensor, state_i64: Tensor,
) -> None:  # fmt: skip
    n = params.numel()
    blocks = -(-n // CHUNK)
    partials = params.new_empty(2, blocks, dtype=torch.float64)
    coefficients = params.new_empty(COEFFICIENTS)
    averages = [*emas, *[None] * (MAX_EMAS - len(emas))]
    half = 0 if shadow is None else native.DTYPES[shadow.dtype]
    arguments = (
        params, grads, exp_avg, exp_avg_sq, *averages, shadow, half, state_f64, state_i64, partials, blocks, coefficients, n,
    )  # fmt: skip
    if backend == "native":
        cpu.launch("radam_ema_fwd", *arguments)
    else:
        native.launch(backend, "radam_ema_fwd", *arguments)


def _triton(params: Tensor, *more: Any) -> None:
    from ect_kernels.radam_ema_triton import step

    with native.current(params.device):
        step(params, *more)


def _limits(params: Tensor, *_: Tensor | list[Tensor] | None) -> str | None:
    return None if params.dtype == torch.float32 else f"{params.dtype} arenas"


OP = Op("radam_ema", {
    "reference": Backend(reference),
    "triton": Backend(_triton, limits=_limits),
    **{name: Backend(partial(_launch, name), limits=_limits) for name in ("native", "cuda", "emulated")},
})  # fmt: skip


def _run(*args: Any) -> None:
    device = native.one_device("radam_ema", ARGUMENTS, args)
    OP.backends[OP.pick(device, args[:-1], args[-1])].fwd(*args[:-1])


def _fake(*args: Any) -> None:
    native.one_device("radam_ema", ARGUMENTS, args)


_op = register(
    "radam_ema",
    "(Tensor(a!) params, Tensor(b!) grads, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, Tensor(e!)[] emas, "
    "Tensor(f!)? shadow, Tensor(g!) state_f64, Tensor(h!) state_i64, str backend) -> ()",
    _run,
    _fake,
)


def radam_ema(
    params: Tensor, grads: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, emas: Sequence[Tensor], shadow: Tensor | None,
    state_f64: Tensor, state_i64: Tensor, backend: str | None = None,
) -> None:  # fmt: skip
    """Do one step, in place; the formulas are above."""
    emas, n = list(emas), params.numel()
    for name, arena in [
        ("params", params), ("grads", grads), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq),
        *((f"emas[{i}]", ema) for i, ema in enumerate(emas)), ("shadow", shadow),
    ]:  # fmt: skip
        if arena is None:
            continue
        fits = arena.dtype == params.dtype if name != "shadow" else arena.dtype in (torch.float16, torch.bfloat16)
        if arena.shape != (n,) or n % 8 or not arena.is_contiguous() or not fits:
            found = f"{arena.dtype} {tuple(arena.shape)}"
            raise ValueError(f"{name} is {found}; expected a flat {params.dtype} arena like params, length 8 k ({n})")
    if len(emas) > MAX_EMAS:
        raise ValueError(f"{len(emas)} EMAs; at most {MAX_EMAS}")
    if state_f64.shape != (len(F64),) or state_i64.shape != (len(I64),):
        raise ValueError("state_f64 or state_i64 was not made by new_state()")
    _op(params, grads, exp_avg, exp_avg_sq, emas, shadow, state_f64, state_i64, backend or "")
