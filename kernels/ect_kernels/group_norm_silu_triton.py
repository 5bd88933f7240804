"""Triton kernels of group_norm_silu: one program for each (sample, slab of whole groups).

Where a slab's rows fit in registers (16x16 and smaller) they are read once: 2 element sizes of DRAM forward, 3 backward.
Else a first loop over chunks of rows gathers sums and a second reads the same rows again, from L2. The slabs of the programs
that run at once fit there: at 32x32 in half precision 64 KB forward, four on an SM, and 128 KB backward, two on an SM.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ect_kernels.gn_triton import Slab, group_sum, inside_of, keep_tile, lanes_of, slab, spread, sum_over_n
from ect_kernels.group_norm_silu import Grads, Inputs, Output


@triton.jit
def modulation(
    gamma: tl.tensor, beta: tl.tensor, scale: tl.tensor, shift: tl.tensor, nc: tl.tensor, c: tl.tensor, real: tl.tensor
) -> tl.tensor:
    """(a, b, gamma, beta, 1 + scale) [WIDTH]: affine and modulation are x_hat * a + b."""
    w = tl.load(gamma + c, mask=real, other=0.0)
    bias = tl.load(beta + c, mask=real, other=0.0)
    one = tl.full(w.shape, 1.0, tl.float32)
    a, b = w, bias
    if scale is not None:
        one += tl.load(scale + nc, mask=real, other=0.0)
        a = w * one
        b = bias * one + tl.load(shift + nc, mask=real, other=0.0)
    return a, b, w, bias, one


@triton.jit(do_not_specialize=["layer", "n0", "threshold"])
def group_norm_silu_fwd_kernel(
    x: tl.tensor, gamma: tl.tensor, beta: tl.tensor, v: tl.tensor, scale: tl.tensor, shift: tl.tensor,
    seed: tl.tensor, y: tl.tensor, mean: tl.tensor, rstd: tl.tensor, eps: tl.tensor, inv_keep: tl.tensor,
    threshold: tl.tensor, layer: tl.tensor, n0: tl.tensor, HW: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr,
    SLAB: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, ACT: tl.constexpr,
) -> None:  # fmt: skip
    CHUNKS: tl.constexpr = (HW + ROWS - 1) // ROWS
    SLABS: tl.constexpr = (C + SLAB - 1) // SLAB
    n = (tl.program_id(0) // SLABS).to(tl.int64)
    first = tl.program_id(0) % SLABS * SLAB
    lane = tl.arange(0, WIDTH)
    c = first + lane
    real = lanes_of(c, first, C, SLAB, WIDTH)
    member = ((lane // SIZE)[:, None] == tl.arange(0, GROUPS)[None, :]) & real[:, None]
    row = tl.arange(0, ROWS)
    at = row[:, None] * C + c[None, :]
    x += n * (HW * C)
    y += n * (HW * C)
    if CHUNKS == 1:
        m = tl.load(x + at, mask=inside_of(row, HW, ROWS) & real[None, :], other=0.0).to(tl.float32)
        m2 = tl.zeros((ROWS, WIDTH), tl.float32)
    else:
        m = tl.zeros((ROWS, WIDTH), tl.float32)
        m2 = tl.zeros((ROWS, WIDTH), tl.float32)
        for i in range(CHUNKS):
            here = inside_of(i * ROWS + row, HW, ROWS)
            f = tl.load(x + i * (ROWS * C) + at, mask=here & real[None, :], other=0.0, eviction_policy="evict_last").to(
                tl.float32
            )
            d = tl.where(here, f - m, 0.0)
            m += d * (1.0 / (i + 1))
            m2 += d * (f - m)
    # Two steps: the mean, then moments of what each lane's own rows (count of them, mean m, squared deviations m2) differ from
    # it. The first difference corrects the mean: with mean/std = 1000 the rounding of a plain sum would show.
    count = ((HW - row + (ROWS - 1)) // ROWS).to(tl.float32)[:, None]
    if v is not None:
        add = tl.load(v + n * C + c, mask=real, other=0.0)
        m += add[None, :]
    mean_g = group_sum(tl.sum(m * count, 0) / HW, member) / SIZE
    d = m - spread(mean_g, member)[None, :]
    mean_g += group_sum(tl.sum(d * count, 0) / HW, member) / SIZE
    rstd_g = 1.0 / tl.sqrt_rn(group_sum(tl.sum(m2 + d * d * count, 0), member) / (SIZE * HW) + eps)
    center = spread(mean_g, member)
    key = None
    if seed is not None:
        key = tl.load(seed)
    a, b, _, _, _ = modulation(gamma, beta, scale, shift, n * C + c, c, real)
    a *= spread(rstd_g, member)
    for i in range(CHUNKS):
        inside = inside_of(i * ROWS + row, HW, ROWS) & real[None, :]
        if CHUNKS == 1:
            z = m
        else:
            z = tl.load(x + i * (ROWS * C) + at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
            if v is not None:
                z += add[None, :]
        # Centred first: x * a + (b - center * a) would cancel two large numbers where the mean is large.
        z = (z - center[None, :]) * a[None, :] + b[None, :]
        if ACT:
            z = z * tl.sigmoid(z)
        if key is not None:
            keep = keep_tile(key, layer, threshold, (n0 + n) * HW, i * ROWS + row, first, C, ROWS, WIDTH)
            z = tl.where(keep, z * inv_keep, 0.0)
        tl.store(y + i * (ROWS * C) + at, z.to(y.dtype.element_ty), mask=inside, cache_modifier=".cs")
    g = first // SIZE + tl.arange(0, GROUPS)
    owned = (tl.arange(0, GROUPS) < SLAB // SIZE) & (g < C // SIZE)
    tl.store(mean + n * (C // SIZE) + g, mean_g, mask=owned)
    tl.store(rstd + n * (C // SIZE) + g, rstd_g, mask=owned)


@triton.jit
def normal_and_gradient(
    dy: tl.tensor, x: tl.tensor, key: tl.tensor, add: tl.tensor, center: tl.tensor, rs: tl.tensor, a: tl.tensor,
    b: tl.tensor, layer: tl.tensor, threshold: tl.tensor, inv_keep: tl.tensor, position: tl.tensor, row: tl.tensor,
    first: tl.tensor, at: tl.tensor, inside: tl.tensor, C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    ACT: tl.constexpr, POLICY: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(x_hat, gradient before the activation), fp32 [ROWS, WIDTH], rebuilt from x and the mask."""
    xh = tl.load(x + at, mask=inside, other=0.0, eviction_policy=POLICY).to(tl.float32)
    du = tl.load(dy + at, mask=inside, other=0.0, eviction_policy=POLICY).to(tl.float32)
    if add is not None:
        xh += add[None, :]
    xh = tl.where(inside, (xh - center[None, :]) * rs[None, :], 0.0)
    if key is not None:
        keep = keep_tile(key, layer, threshold, position, row, first, C, ROWS, WIDTH)
        du = tl.where(keep, du * inv_keep, 0.0)
    if ACT:
        z = xh * a[None, :] + b[None, :]
        s = tl.sigmoid(z)
        du *= s * (1.0 + z * (1.0 - s))
    return xh, du


@triton.jit(do_not_specialize=["layer", "n0", "threshold", "N"])
def group_norm_silu_bwd_kernel(
    dy: tl.tensor, x: tl.tensor, gamma: tl.tensor, beta: tl.tensor, v: tl.tensor, scale: tl.tensor, shift: tl.tensor,
    seed: tl.tensor, mean: tl.tensor, rstd: tl.tensor, dx: tl.tensor, partials: tl.tensor, dv: tl.tensor,
    dscale: tl.tensor, dshift: tl.tensor, inv_keep: tl.tensor, threshold: tl.tensor, layer: tl.tensor, n0: tl.tensor,
    N: tl.tensor, HW: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr, SLAB: tl.constexpr, WIDTH: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, ACT: tl.constexpr,
) -> None:  # fmt: skip
    CHUNKS: tl.constexpr = (HW + ROWS - 1) // ROWS
    SLABS: tl.constexpr = (C + SLAB - 1) // SLAB
    n = (tl.program_id(0) // SLABS).to(tl.int64)
    first = tl.program_id(0) % SLABS * SLAB
    lane = tl.arange(0, WIDTH)
    c = first + lane
    real = lanes_of(c, first, C, SLAB, WIDTH)
    member = ((lane // SIZE)[:, None] == tl.arange(0, GROUPS)[None, :]) & real[:, None]
    row = tl.arange(0, ROWS)
    at = row[:, None] * C + c[None, :]
    x += n * (HW * C)
    dy += n * (HW * C)
    dx += n * (HW * C)
    center = tl.load(mean + n * (C // SIZE) + c // SIZE, mask=real, other=0.0)
    rs = tl.load(rstd + n * (C // SIZE) + c // SIZE, mask=real, other=0.0)
    add = None
    if v is not None:
        add = tl.load(v + n * C + c, mask=real, other=0.0).to(tl.float32)
    key = None
    if seed is not None:
        key = tl.load(seed)
    a, b, w, bias, one = modulation(gamma, beta, scale, shift, n * C + c, c, real)
    position = (n0 + n) * HW
    if CHUNKS == 1:
        inside = inside_of(row, HW, ROWS) & real[None, :]
        xh, du = normal_and_gradient(
            dy, x, key, add, center, rs, a, b, layer, threshold, inv_keep, position, row, first, at, inside,
            C, ROWS, WIDTH, ACT, "",
        )  # fmt: skip
        s0, s1, s2 = tl.sum(du, 0), tl.sum(du * xh, 0), tl.sum(xh, 0)
    else:
        t0 = tl.zeros((ROWS, WIDTH), tl.float32)
        t1 = tl.zeros((ROWS, WIDTH), tl.float32)
        t2 = tl.zeros((ROWS, WIDTH), tl.float32)
        for i in range(CHUNKS):
            here = i * ROWS + row
            o, g = normal_and_gradient(
                dy, x, key, add, center, rs, a, b, layer, threshold, inv_keep, position, here, first,
                at + i * (ROWS * C), inside_of(here, HW, ROWS) & real[None, :], C, ROWS, WIDTH, ACT, "evict_last",
            )  # fmt: skip
            t0 += g
            t1 += g * o
            if v is not None:
                t2 += o
        s0, s1, s2 = tl.sum(t0, 0), tl.sum(t1, 0), tl.sum(t2, 0)
    c0 = spread(group_sum(s0 * a, member) / (SIZE * HW), member)
    c1 = spread(group_sum(s1 * a, member) / (SIZE * HW), member)
    nc = n * C + c
    tl.store(partials + nc, s1 * one, mask=real)
    tl.store(partials + N.to(tl.int64) * C + nc, s0 * one, mask=real)
    if v is not None:  # The sum of dx over positions, without another pass.
        tl.store(dv + nc, rs * (a * s0 - HW * c0 - c1 * s2), mask=real)
    if scale is not None:
        tl.store(dscale + nc, w * s1 + bias * s0, mask=real)
        tl.store(dshift + nc, s0, mask=real)
    for i in range(CHUNKS):
        here = i * ROWS + row
        into = at + i * (ROWS * C)
        inside = inside_of(here, HW, ROWS) & real[None, :]
        if CHUNKS == 1:
            o = xh
            g = du
        else:
            o, g = normal_and_gradient(
                dy, x, key, add, center, rs, a, b, layer, threshold, inv_keep, position, here, first, into, inside,
                C, ROWS, WIDTH, ACT, "evict_first",
            )  # fmt: skip
        d = rs[None, :] * (g * a[None, :] - c0[None, :] - o * c1[None, :])
        tl.store(dx + into, d.to(dx.dtype.element_ty), mask=inside, cache_modifier=".cs")


def cut(c: int, groups: int, hw: int, backward: bool, drop: bool) -> Slab:
    """How channels and rows are dealt to programs and threads; found by compiling for sm_80 and sm_90 at DDPM++'s shapes.

    Tiles of 8192 elements forward (16 warps) and 4096 backward (8) stay in registers with two programs on an SM and no spill:
    16x16 fits with slabs of 16 channels, one 32-byte sector a row. In a loop, backward's sums beside Philox allow 8 elements a
    thread; without dropout 16, which keeps the programs on an SM, and so their claim on L2, at two.
    """
    s = slab(c, groups, hw, per_thread=8 if backward and drop else 16)
    rows, size, most = triton.next_power_of_2(hw), c // groups, 4096 if backward else 8192
    if s.width * rows > most >= 16 * rows and c % 16 == 0 and 16 % size == 0:
        s = Slab(16, 16, 16 // size, rows, 8)
    return replace(s, rows=rows, warps=max(1, s.width * rows // 512)) if s.width * rows <= most else s


def options(c: int, groups: int, hw: int, act: bool, backward: bool, drop: bool) -> dict[str, Any]:
    """Constexprs and num_warps of a launch."""
    s = cut(c, groups, hw, backward, drop)
    sizes = dict(HW=hw, C=c, SIZE=c // groups, SLAB=s.channels, WIDTH=s.width, GROUPS=s.groups, ROWS=s.rows, ACT=act)
    return dict(**sizes, num_warps=s.warps)


def _launch(i: Inputs, backward: bool) -> tuple[int, dict[str, Any]]:
    """Number of programs, keywords of the kernel."""
    n, c, h, w = i.x.shape
    keywords = options(c, i.groups, h * w, i.act, backward, i.seed is not None)
    return n * triton.cdiv(c, keywords["SLAB"]), keywords


def forward(i: Inputs, out: Output) -> None:
    """Fill `out`."""
    programs, options = _launch(i, backward=False)
    numbers = (i.eps, i.inv_keep, i.threshold, i.layer, i.n0)
    group_norm_silu_fwd_kernel[(programs,)](i.x, *i.vectors(), i.seed, *out, *numbers, **options)


def backward(dy: Tensor, i: Inputs, mean: Tensor, rstd: Tensor, grads: Grads) -> None:
    """Fill `grads`."""
    programs, options = _launch(i, backward=True)
    partials = mean.new_empty(2, *i.x.shape[:2])
    numbers = (i.inv_keep, i.threshold, i.layer, i.n0, i.x.shape[0])
    group_norm_silu_bwd_kernel[(programs,)](
        dy, i.x, *i.vectors(), i.seed, mean, rstd, grads.x, partials, *grads[3:], *numbers, **options
    )
    for grad, total in zip((grads.gamma, grads.beta), sum_over_n(partials), strict=True):
        grad.copy_(total)
