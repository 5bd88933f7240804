# mypy: disallow-untyped-defs=False
"""consistency_loss in Triton: one program a sample.

Its differences stay in registers between the sum and the gradient where the sample fits into one block; larger samples are
read twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ect_kernels.consistency_loss import Inputs, Output

RESIDENT = 8192  # most values of a sample that stay in registers


@triton.jit
def _difference(F_t, F_r, x_t, x_r, at, mask, skip_t, out_t, skip_r, out_r, r):
    """Return D_t - target of the elements `at`, fp32."""
    F = tl.load(F_t + at, mask=mask, other=0.0).to(tl.float32)
    D_t = skip_t * tl.load(x_t + at, mask=mask, other=0.0) + out_t * F
    target = tl.load(x_r + at, mask=mask, other=0.0)
    if r > 0:
        target = skip_r * target + out_r * tl.load(F_r + at, mask=mask, other=0.0).to(tl.float32)
    return D_t - target


@triton.jit
def consistency_loss_fwd_kernel(
    F_t, F_r, x_t, x_r, t, r, weight, loss, dF, c, sd, sd2, M, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    base = n * M
    i = tl.arange(0, BLOCK)
    sigma_t, sigma_r = tl.load(t + n), tl.load(r + n)
    total_t, total_r = sigma_t * sigma_t + sd2, sigma_r * sigma_r + sd2
    skip_t, out_t = sd2 / total_t, sigma_t * sd / tl.sqrt_rn(total_t)
    skip_r, out_r = sd2 / total_r, sigma_r * sd / tl.sqrt_rn(total_r)
    d = tl.zeros((BLOCK,), tl.float32)
    if WHOLE:
        d = _difference(F_t, F_r, x_t, x_r, base + i, i < M, skip_t, out_t, skip_r, out_r, sigma_r)
        s = tl.sum(d * d, 0)
    else:
        squares = tl.zeros((BLOCK,), tl.float32)
        for k in range(0, M, BLOCK):
            e = _difference(F_t, F_r, x_t, x_r, base + k + i, k + i < M, skip_t, out_t, skip_r, out_r, sigma_r)
            squares += e * e
        s = tl.sum(squares, 0)
    radicand = s + c * c
    root = tl.sqrt_rn(tl.where(radicand == 0, 1.0, radicand))
    w = tl.load(weight + n)
    tl.store(loss + n, w * (s / (root + c)))
    slope = w * out_t / root + (s - s)  # s - s: 0, or NaN where s overflowed
    if WHOLE:
        tl.store(dF + base + i, (slope * d).to(dF.dtype.element_ty), mask=i < M)
    else:
        for k in range(0, M, BLOCK):
            e = _difference(F_t, F_r, x_t, x_r, base + k + i, k + i < M, skip_t, out_t, skip_r, out_r, sigma_r)
            tl.store(dF + base + k + i, (slope * e).to(dF.dtype.element_ty), mask=k + i < M)


def options(m: int) -> tuple[int, bool, int]:
    """Return BLOCK, WHOLE and warps for samples of m values."""
    block = triton.next_power_of_2(m)
    if block > RESIDENT:
        return 2048, False, 8
    return max(block, 32), True, min(max(block // 512, 1), 16)


def fwd(i: Inputs, out: Output) -> None:
    m = i.F_t.shape[1:].numel()
    block, whole, warps = options(m)
    sd = float(i.sigma_data)
    consistency_loss_fwd_kernel[(i.F_t.shape[0],)](
        *i[:7], *out, float(i.c), sd, sd * sd, m, block, whole, num_warps=warps
    )
