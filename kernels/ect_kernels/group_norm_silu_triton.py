"""Launches of group_norm_silu's Triton kernels: those of gn_triton.py without seam and second source."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import triton
from torch import Tensor

from ect_kernels import gn_triton
from ect_kernels.group_norm_silu import Grads, Inputs, Output, Saved

SEAM = (None,) * 5  # a, bias, skip, skip_bias, skip_scale


@dataclass(frozen=True)
class Slab:
    """The channels of one program: `channels` (whole groups), padded to `width`; `rows` spatial positions at a time."""

    channels: int
    width: int
    groups: int
    rows: int
    warps: int


def slab(channels: int, groups: int, hw: int, per_thread: int) -> Slab:
    """Return slabs of about 32 channels (64 B a row in half precision) that begin at multiples of 8 channels where C allows.

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


def cut(channels: int, groups: int, hw: int, backward: bool, light: bool) -> Slab:
    """Return how channels and rows are dealt to programs and threads.

    It was found by compiling for sm_80 and sm_90 at DDPM++'s shapes. Tiles of 8192 elements forward (16 warps) and 4096
    backward (8) stay in registers with two programs on an SM and no spill: 16x16 fits with slabs of 16 channels, one
    32-byte sector a row. In a loop, backward's sums beside Philox or a second tensor allow 8 elements a thread; light:
    with neither 16, which keeps the programs on an SM, and so their claim on L2, at two.
    """
    s = slab(channels, groups, hw, per_thread=16 if light or not backward else 8)
    rows, size, most = triton.next_power_of_2(hw), channels // groups, 4096 if backward else 8192
    if s.width * rows > most >= 16 * rows and channels % 16 == 0 and 16 % size == 0:
        s = Slab(16, 16, 16 // size, rows, 8)
    return replace(s, rows=rows, warps=max(1, s.width * rows // 512)) if s.width * rows <= most else s


def options(c: int, c2: int, groups: int, hw: int, act: bool, backward: bool, light: bool) -> dict[str, Any]:
    """Return constexprs and num_warps of a launch; the kernels' grid is (N cdiv(C + C2, SLAB),)."""
    s = cut(c + c2, groups, hw, backward, light)
    sizes = {"HW": hw, "C": c, "C2": c2, "SIZE": (c + c2) // groups, "SLAB": s.channels, "WIDTH": s.width}
    return {**sizes, "GROUPS": s.groups, "ROWS": s.rows, "ACT": act, "num_warps": s.warps}


def launch(i: Inputs, other: Tensor | None, backward: bool, more: bool = False) -> tuple[tuple[int], dict[str, Any]]:
    """Return grid and keywords of a kernel; more: it reads or writes other tensors of x's size."""
    n, c, h, w = i.x.shape
    c2 = 0 if other is None else other.shape[1]
    light = i.seed is None and not more
    keywords = options(c, c2, i.groups, h * w, i.act, backward, light)
    return (n * triton.cdiv(c + c2, keywords["SLAB"]),), keywords


def fwd(i: Inputs, out: Output, seam: tuple[Any, ...] = SEAM, other: Tensor | None = None) -> None:
    """Fill `out`; with a seam, i.x too."""
    grid, keywords = launch(i, other, backward=False)
    numbers = (i.eps, i.inv_keep, i.threshold, i.layer)
    gn_triton.forward_kernel[grid](*seam, i.x, other, *i.vectors(), i.seed, i.n0, *out, *numbers, **keywords)


def bwd(s: Saved, i: Inputs, grads: Grads) -> None:
    """Fill `grads`."""
    grid, keywords = launch(i, None, backward=True)
    sources = (s.dy, None, None, None, i.x, None, *i.vectors(), i.seed, i.n0, s.mean, s.rstd)
    results = (grads.x, None, grads.rows, None if i.v is None else grads.v, grads.scale, grads.shift)
    gn_triton.backward_kernel[grid](*sources, *results, i.inv_keep, i.threshold, i.layer, **keywords)
