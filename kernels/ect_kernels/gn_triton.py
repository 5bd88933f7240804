"""What the GroupNorm kernels share in Triton: slabs of channels, sums over groups, the dropout mask of a tile, sums over n."""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ect_kernels.philox_triton import keep1, keep8


@dataclass(frozen=True)
class Slab:
    """The channels of one program: `channels` (whole groups), padded to `width`; `rows` spatial positions at a time."""

    channels: int
    width: int
    groups: int
    rows: int
    warps: int


def slab(channels: int, groups: int, hw: int, per_thread: int = 8) -> Slab:
    """Slabs of about 32 channels (64 B a row in half precision) that begin at multiples of 8 channels where C allows.

    Where C / G is no power of two (12 of C = 384) lanes are padded: as few as possible, 48 of 64 rather than 24 of 32 because
    48 channels are whole 32-byte sectors.
    """
    size = channels // groups
    unit = math.lcm(size, 8) if channels % 8 == 0 else size
    candidates = [unit * k for k in range(1, max(1, 64 // unit) + 1) if unit * k <= channels]
    best = max(candidates, key=lambda s: (s / triton.next_power_of_2(s), s % 16 == 0, -abs(s - 32)))
    width = triton.next_power_of_2(best)
    rows = min(triton.next_power_of_2(hw), max(1, 256 * per_thread // width))
    warps = min(8, max(1, rows * width // (32 * per_thread)))
    return Slab(best, width, triton.next_power_of_2(best // size), rows, triton.next_power_of_2(warps))


@triton.jit
def inside_of(row: tl.tensor, HW: tl.constexpr, ROWS: tl.constexpr) -> tl.tensor:
    """Which rows exist, bool [ROWS, 1]; a constant where chunks of ROWS divide HW, so that masks cost nothing there."""
    if HW % ROWS == 0:
        return tl.full((ROWS, 1), 1, tl.int1)
    return (row < HW)[:, None]


@triton.jit
def lanes_of(c: tl.tensor, first: tl.tensor, C: tl.constexpr, SLAB: tl.constexpr, WIDTH: tl.constexpr) -> tl.tensor:
    """Which lanes hold a channel of this slab, bool [WIDTH]; a constant where no slab is padded or cut."""
    if SLAB == WIDTH and C % SLAB == 0:
        return tl.full((WIDTH,), 1, tl.int1)
    return (c - first < SLAB) & (c < C)


@triton.jit
def group_sum(v: tl.tensor, member: tl.tensor) -> tl.tensor:
    """Sums [GROUPS] of v [WIDTH] over the lanes of each group; member: bool [WIDTH, GROUPS]. A NaN stays in its group."""
    return tl.sum(tl.where(member, v[:, None], 0.0), 0)


@triton.jit
def spread(v: tl.tensor, member: tl.tensor) -> tl.tensor:
    """v [GROUPS] at the lanes of each group, [WIDTH]; 0 at lanes of none."""
    return tl.sum(tl.where(member, v[None, :], 0.0), 1)


@triton.jit
def keep_tile(
    seed: tl.tensor,
    layer: tl.tensor,
    threshold: tl.tensor,
    first: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """Dropout: which elements (first + row[r]) * C + column + lane of the flat NHWC batch stay, bool [ROWS, WIDTH].

    first: spatial positions before this sample, int64. column: the slab's first channel, a multiple of 8 where C is.
    """
    if C % 8 == 0 and WIDTH % 8 == 0:
        block = first * (C // 8) + column // 8
        blocks = block.to(tl.uint32) + (row[:, None] * (C // 8) + tl.arange(0, WIDTH // 8)[None, :]).to(tl.uint32)
        return keep8(seed, blocks, layer, threshold, ROWS, WIDTH)
    index = (first + row[:, None]) * C + (column + tl.arange(0, WIDTH))[None, :]
    return keep1(seed, index, layer, threshold)


@triton.jit
def sum_over_n_kernel(
    partials: tl.tensor, out: tl.tensor, N: tl.tensor, COLUMNS: tl.tensor, ROWS: tl.constexpr, WIDTH: tl.constexpr
) -> None:
    """out[k, c] = sum over n of partials[k, n, c] in one fixed order. Grid (cdiv(COLUMNS, WIDTH), K)."""
    k = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    r = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for i in range(0, N, ROWS):
        offset = (k * N + i + r)[:, None] * COLUMNS + c[None, :]
        total += tl.load(partials + offset, mask=(i + r < N)[:, None] & (c < COLUMNS)[None, :], other=0.0)
    tl.store(out + k * COLUMNS + c, tl.sum(total, 0), mask=c < COLUMNS)


def sum_over_n(partials: Tensor) -> Tensor:
    """fp32 [K, C] of partials [K, N, C]."""
    k, n, c = partials.shape
    out = partials.new_empty((k, c))
    sum_over_n_kernel[(triton.cdiv(c, 32), k)](partials, out, n, c, ROWS=32, WIDTH=32, num_warps=4)
    return out
