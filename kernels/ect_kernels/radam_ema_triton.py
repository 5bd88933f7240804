"""radam_ema in Triton: check, scalars, update as in csrc/radam_ema.cu, where the three launches are explained.

`weights` are the params: Triton's launch code has a variable of that name.
"""
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ect_kernels.radam_ema import BOUND, CHUNK, COEFFICIENTS, F64, I64, MAX_EMAS, OPTIMIZERS, SCALE_RANGE

BLOCK, WARPS = 1024, 4
CHECK_BLOCK = 2048
PARTIALS_BLOCK = 512

# Module constants as Triton can read them.
_BOUND = tl.constexpr(BOUND)
_SCALE_MIN, _SCALE_MAX = tl.constexpr(SCALE_RANGE[0]), tl.constexpr(SCALE_RANGE[1])
_ADAM = tl.constexpr(OPTIMIZERS.index("adam"))
_LR, _BETA1, _BETA2 = tl.constexpr(int(F64.LR)), tl.constexpr(int(F64.BETA1)), tl.constexpr(int(F64.BETA2))
_EPS, _CLIP, _SCALE = tl.constexpr(int(F64.EPS)), tl.constexpr(int(F64.CLIP)), tl.constexpr(int(F64.LOSS_SCALE))
_EMA_BETA0, _NORM = tl.constexpr(int(F64.EMA_BETA0)), tl.constexpr(int(F64.GRAD_NORM))
_STEPS, _NONFINITE = tl.constexpr(int(I64.STEPS)), tl.constexpr(int(I64.NONFINITE))
_GOOD, _SKIPPED = tl.constexpr(int(I64.GOOD_STEPS)), tl.constexpr(int(I64.SKIPPED))
_INTERVAL, _OPTIMIZER = tl.constexpr(int(I64.GROWTH_INTERVAL)), tl.constexpr(int(I64.OPTIMIZER))
# Slots of the fp32 coefficients between the last two kernels.
_C_GO, _C_SHRINK, _C_UNSCALE, _C_BETA2 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_C_WEIGHT1, _C_WEIGHT2, _C_SLOPE, _C_FLOOR = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
_C_SIZE, _C_EMA0 = tl.constexpr(8), tl.constexpr(9)


@triton.jit
def radam_ema_check_kernel(grads, partials, blocks, n8, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    first = grads + pid * CHUNK
    left8 = n8 - pid * (CHUNK // 8)  # in eights, so that the compiler sees that a mask covers whole vectors
    squares = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for k in range(0, CHUNK, BLOCK):
        i = k + tl.arange(0, BLOCK)
        g = tl.load(first + i, mask=i // 8 < left8, other=0.0)
        finite = tl.abs(g) < float("inf")
        g = tl.where(finite, g, tl.where(g > 0, _BOUND, tl.where(g < 0, -_BOUND, 0.0)))
        squares += g * g
        count += tl.where(finite, 0, 1)
    bad = tl.sum(count, 0)
    if bad > 0:  # rare
        for k in range(0, CHUNK, BLOCK):
            i = k + tl.arange(0, BLOCK)
            g = tl.load(first + i, mask=i // 8 < left8, other=0.0)
            stand_in = tl.where(g > 0, _BOUND, tl.where(g < 0, -_BOUND, 0.0))
            tl.store(first + i, tl.where(tl.abs(g) < float("inf"), g, stand_in), mask=i // 8 < left8)
    tl.store(partials + pid, tl.sum(squares, 0).to(tl.float64))
    tl.store(partials + blocks + pid, bad.to(tl.float64))


@triton.jit
def _power(base, n):
    """Return base^n in fp64 by repeated squaring, for n >= 1."""
    result = base * 0.0 + 1.0
    while n > 0:
        result = tl.where(n % 2 == 1, result * base, result)
        base = base * base
        n = n // 2
    return result


@triton.jit
def radam_ema_scalars_kernel(partials, blocks, f, s, c, BLOCK: tl.constexpr, MAX_EMAS: tl.constexpr):
    squares = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.float64)
    for k in range(0, blocks, BLOCK):
        i = k + tl.arange(0, BLOCK)
        squares += tl.load(partials + i, mask=i < blocks, other=0.0)
        count += tl.load(partials + blocks + i, mask=i < blocks, other=0.0)
    total, bad = tl.sum(squares, 0), tl.sum(count, 0).to(tl.int64)
    scale, clip = tl.load(f + _SCALE), tl.load(f + _CLIP)
    beta1, beta2 = tl.load(f + _BETA1), tl.load(f + _BETA2)
    t, good = tl.load(s + _STEPS) + 1, tl.load(s + _GOOD)
    nonfinite, skipped = tl.load(s + _NONFINITE), tl.load(s + _SKIPPED)
    for k in tl.static_range(MAX_EMAS):
        tl.store(c + _C_EMA0 + k, (1 - tl.load(f + _EMA_BETA0 + k)).to(tl.float32))

    scaled = scale > 0
    skip = scaled & (bad > 0)
    unscale = tl.where(scaled, 1 / tl.where(scaled, scale, 1.0), 1.0)
    norm = tl.sqrt(total) * unscale
    ratio = clip / (norm + 1e-6)
    power2 = _power(beta2, t)
    correction2 = 1 - power2
    root = tl.sqrt(correction2)
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * power2 / correction2
    adam = tl.load(s + _OPTIMIZER) == _ADAM
    rectify = (rho > 5) & (adam == 0)
    safe = tl.where(rectify, rho, 6.0)
    safe_inf = tl.where(rectify, rho_inf, 6.0)
    rectification = tl.sqrt((safe - 4) * (safe - 2) * safe_inf / ((safe_inf - 4) * (safe_inf - 2) * safe))
    size = tl.load(f + _LR) / (1 - _power(beta1, t)) * tl.where(rectify, rectification * root, 1.0)
    tl.store(c + _C_GO, tl.where(skip, 0.0, 1.0))
    tl.store(c + _C_SHRINK, tl.where(ratio < 1, ratio, 1.0).to(tl.float32))
    tl.store(c + _C_UNSCALE, unscale.to(tl.float32))
    tl.store(c + _C_BETA2, beta2.to(tl.float32))
    tl.store(c + _C_WEIGHT1, (1 - beta1).to(tl.float32))
    tl.store(c + _C_WEIGHT2, (1 - beta2).to(tl.float32))
    tl.store(c + _C_SLOPE, tl.where(adam, 1 / root, tl.where(rectify, 1.0, 0.0)).to(tl.float32))
    tl.store(c + _C_FLOOR, tl.load(f + _EPS).to(tl.float32))
    tl.store(c + _C_SIZE, size.to(tl.float32))

    good = tl.where(scaled & (skip == 0), good + 1, 0)
    grow = scaled & (skip == 0) & (good >= tl.load(s + _INTERVAL))
    moved = scale * tl.where(skip, 0.5, tl.where(grow, 2.0, 1.0))
    moved = tl.minimum(tl.maximum(moved, _SCALE_MIN), _SCALE_MAX)
    tl.debug_barrier()  # every warp reads the state before any writes it
    tl.store(f + _NORM, tl.where(skip, float("inf"), norm))
    tl.store(f + _SCALE, tl.where(scaled, moved, scale))
    tl.store(s + _STEPS, tl.where(skip, t - 1, t))
    tl.store(s + _NONFINITE, nonfinite + bad)
    tl.store(s + _GOOD, tl.where(grow, 0, good))
    tl.store(s + _SKIPPED, skipped + tl.where(skip, 1, 0))


@triton.jit
def _lerp(a, b, w):
    """Compute torch.lerp, exact at both ends."""
    return tl.where(w < 0.5, a + w * (b - a), b - (b - a) * (1 - w))


@triton.jit
def radam_ema_update_kernel(
    weights, grads, exp_avg, exp_avg_sq, ema0, ema1, ema2, ema3, shadow, c, n8, BLOCK: tl.constexpr
):
    base = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    mask = i // 8 < n8 - base // 8
    if tl.load(c + _C_GO) > 0:
        p = tl.load(weights + base + i, mask=mask)
        g = tl.load(grads + base + i, mask=mask)
        m = tl.load(exp_avg + base + i, mask=mask)
        v = tl.load(exp_avg_sq + base + i, mask=mask)
        shrink, slope = tl.load(c + _C_SHRINK), tl.load(c + _C_SLOPE)
        g = g * shrink
        if shrink != 1.0:
            tl.store(grads + base + i, g, mask=mask)
        g = g * tl.load(c + _C_UNSCALE)
        m = _lerp(m, g, tl.load(c + _C_WEIGHT1))
        v = tl.load(c + _C_BETA2) * v + tl.load(c + _C_WEIGHT2) * g * g
        denominator = tl.where(slope == 0, 1.0, tl.sqrt_rn(v) * slope + tl.load(c + _C_FLOOR))
        p = p - tl.load(c + _C_SIZE) * tl.div_rn(m, denominator)
        tl.store(weights + base + i, p, mask=mask)
        tl.store(exp_avg + base + i, m, mask=mask)
        tl.store(exp_avg_sq + base + i, v, mask=mask)
        if ema0 is not None:
            e0 = tl.load(ema0 + base + i, mask=mask)
            tl.store(ema0 + base + i, _lerp(e0, p, tl.load(c + _C_EMA0)), mask=mask)
        if ema1 is not None:
            e1 = tl.load(ema1 + base + i, mask=mask)
            tl.store(ema1 + base + i, _lerp(e1, p, tl.load(c + _C_EMA0 + 1)), mask=mask)
        if ema2 is not None:
            e2 = tl.load(ema2 + base + i, mask=mask)
            tl.store(ema2 + base + i, _lerp(e2, p, tl.load(c + _C_EMA0 + 2)), mask=mask)
        if ema3 is not None:
            e3 = tl.load(ema3 + base + i, mask=mask)
            tl.store(ema3 + base + i, _lerp(e3, p, tl.load(c + _C_EMA0 + 3)), mask=mask)
        if shadow is not None:
            tl.store(shadow + base + i, p.to(shadow.dtype.element_ty), mask=mask)


def step(
    params: Tensor, grads: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, emas: list[Tensor], shadow: Tensor | None,
    state_f64: Tensor, state_i64: Tensor,
) -> None:  # fmt: skip
    """Launch the step's three kernels; arguments as of ect_kernels.radam_ema.reference, fp32."""
    n = params.numel()
    blocks = triton.cdiv(n, CHUNK)
    partials = params.new_empty(2 * blocks, dtype=torch.float64)
    c = params.new_empty(COEFFICIENTS)
    averages = [*emas, *[None] * (MAX_EMAS - len(emas))]
    if n > 0:
        radam_ema_check_kernel[(blocks,)](grads, partials, blocks, n // 8, CHECK_BLOCK, CHUNK, num_warps=WARPS)
    radam_ema_scalars_kernel[(1,)](partials, blocks, state_f64, state_i64, c, PARTIALS_BLOCK, MAX_EMAS, num_warps=WARPS)
    if n > 0:
        grid = (triton.cdiv(n, BLOCK),)
        radam_ema_update_kernel[grid](
            params, grads, exp_avg, exp_avg_sq, *averages, shadow, c, n // 8, BLOCK, num_warps=WARPS
        )
