# mypy: disable-error-code="no-untyped-def"
"""skip_product in Triton: a tile of the output to a program, both products on tensor cores, the sum as epilogue."""

from __future__ import annotations

import triton
import triton.language as tl

from ect_kernels.skip_product import Inputs, Output
from ect_kernels.tensors import fp32

ROWS, COLUMNS, DEPTH = 64, 128, 32  # of a tile; channels of a source at a time
WARPS, STAGES = 4, 4


@triton.jit
def _product(
    total,
    source,
    weight,
    row,
    col,
    M,
    CO,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    ALL: tl.constexpr,
    BK: tl.constexpr,
):
    """Return total + source[row] weight[col, FIRST:][:WIDTH]^T."""
    for k in range(0, WIDTH, BK):
        at = k + tl.arange(0, BK)
        left = source + row[:, None] * WIDTH + at[None, :]
        right = weight + col[None, :] * ALL + (FIRST + at)[:, None]
        ok_left, ok_right = (row < M)[:, None], (col < CO)[None, :]
        if WIDTH % BK != 0:
            ok_left, ok_right = ok_left & (at < WIDTH)[None, :], ok_right & (at < WIDTH)[:, None]
        total = tl.dot(tl.load(left, mask=ok_left, other=0.0), tl.load(right, mask=ok_right, other=0.0), total)
    return total


@triton.jit
def skip_product_fwd_kernel(
    a, weight, x, other, bias, skip_bias, out, M, scale, CO: tl.constexpr, C: tl.constexpr, C2: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute M pixels; the tiles of the same pixels follow one another, so that they share the sources in L2."""
    TILES: tl.constexpr = (CO + BN - 1) // BN
    pid = tl.program_id(0)
    row = (pid // TILES).to(tl.int64) * BM + tl.arange(0, BM)
    col = pid % TILES * BN + tl.arange(0, BN)
    total = _product(tl.zeros((BM, BN), tl.float32), x, weight, row, col, M, CO, C, 0, C + C2, BK)
    total = _product(total, other, weight, row, col, M, CO, C2, C, C + C2, BK)
    if bias is not None:
        total += tl.load(bias + col, mask=col < CO, other=0.0)[None, :]
    if skip_bias is not None:
        total += tl.load(skip_bias + col, mask=col < CO, other=0.0)[None, :]
    at, mask = row[:, None] * CO + col[None, :], (row < M)[:, None] & (col < CO)[None, :]
    total = (total + tl.load(a + at, mask=mask, other=0.0).to(tl.float32)) * scale
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


def columns(channels: int) -> int:
    """Return the number of columns of a tile."""
    return min(COLUMNS, max(16, triton.next_power_of_2(channels)))


def rows(columns: int) -> int:
    """Return the number of rows of a tile: twice as many where it is narrow.

    With 64 rows for 32 columns a register spills on sm_80.
    """
    return 2 * ROWS if columns <= 32 else ROWS


def fwd(i: Inputs, out: Output) -> None:
    """Fill `out`."""
    n, o, h, w = i.a.shape
    width = columns(o)
    grid = (triton.cdiv(n * h * w, rows(width)) * triton.cdiv(o, width),)
    tensors = (i.a, i.weight, i.x, i.other, fp32(i.bias), fp32(i.skip_bias), out.out)
    sizes = (n * h * w, i.scale, o, i.x.shape[1], i.other.shape[1], rows(width), width, DEPTH)
    skip_product_fwd_kernel[grid](*tensors, *sizes, num_warps=WARPS, num_stages=STAGES)
