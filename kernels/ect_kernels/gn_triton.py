"""The Triton kernels of group_norm_silu and residual_group_norm_silu: one program for each (sample, slab of groups).

Where a slab's rows fit in registers (16x16 and smaller) they are read once. Else a first loop over chunks of rows gathers sums
and a second reads the same rows again, from L2. The slabs of the programs that run at once fit there: at 32x32 in half
precision 64 KB forward and 128 KB backward, two to four on an SM.

Pointers may be None: what belongs to them is not compiled. The source of the norm is cat(x, other) on channels, C of x and C2
of `other`; a slab may hold channels of both, which are then loaded each under the mask of its channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from ect_kernels.philox_triton import first_sample, keep1, keep8

NOT_SPECIALISED = ["layer", "threshold"]


def named(way: str) -> Callable[[Any], str]:
    """Return a kernel's name in a profile: that of the op which launches it."""

    def name(specialised: Any) -> str:
        residual = specialised.signature["skip_scale"] != "constexpr"
        return f"{'residual_' if residual else ''}group_norm_silu_{way}_kernel"

    return name


@triton.jit
def place(
    C: tl.constexpr, C2: tl.constexpr, SIZE: tl.constexpr, SLAB: tl.constexpr, WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Return a program's sample and first channel; its channels, which of them exist, in which group, in which source.

    Masks are constants where no slab is padded or cut, so that they cost nothing there.
    """
    CT: tl.constexpr = C + C2
    SLABS: tl.constexpr = (CT + SLAB - 1) // SLAB
    n = (tl.program_id(0) // SLABS).to(tl.int64)
    first = tl.program_id(0) % SLABS * SLAB
    lane = tl.arange(0, WIDTH)
    c = first + lane
    ok = tl.full((WIDTH,), 1, tl.int1)
    if SLAB != WIDTH or CT % SLAB != 0:
        ok = (lane < SLAB) & (c < CT)
    member = ((lane // SIZE)[:, None] == tl.arange(0, GROUPS)[None, :]) & ok[:, None]
    in_x, in_other = ok, ok
    if C2 > 0:
        in_x, in_other = ok & (c < C), ok & (c >= C)
    return n, first, c, ok, member, in_x, in_other


@triton.jit
def inside_of(row: tl.tensor, HW: tl.constexpr, ROWS: tl.constexpr) -> tl.tensor:
    """Return which rows exist, bool [ROWS, 1]; a constant where chunks of ROWS divide HW, so that masks cost nothing there."""
    if HW % ROWS == 0:
        return tl.full((ROWS, 1), 1, tl.int1)
    return (row < HW)[:, None]


@triton.jit
def group_sum(v: tl.tensor, member: tl.tensor) -> tl.tensor:
    """Sum v [WIDTH] over the lanes of each group, to [GROUPS]; member: bool [WIDTH, GROUPS]. A NaN stays in its group."""
    return tl.sum(tl.where(member, v[:, None], 0.0), 0)


@triton.jit
def column_sum(v: tl.tensor, ROWS: tl.constexpr, WIDTH: tl.constexpr) -> tl.tensor:
    """Sum v [ROWS, WIDTH] over rows, to [WIDTH], by parts: the interpreter adds row after row, which would round as often."""
    if ROWS >= 64:
        return tl.sum(tl.sum(tl.reshape(v, (ROWS // 16, 16, WIDTH)), 1), 0)
    return tl.sum(v, 0)


@triton.jit
def spread(v: tl.tensor, member: tl.tensor) -> tl.tensor:
    """Give v [GROUPS] to the lanes of each group, [WIDTH]; 0 to lanes of none."""
    return tl.sum(tl.where(member, v[None, :], 0.0), 1)


@triton.jit
def keep_tile(
    key: tl.tensor, layer: tl.tensor, threshold: tl.tensor, position: tl.tensor, row: tl.tensor, first: tl.tensor,
    CT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return which elements (position + row[r]) * CT + first + lane of the flat NHWC batch stay, bool [ROWS, WIDTH]."""
    if CT % 8 == 0 and WIDTH % 8 == 0:
        block = position * (CT // 8) + first // 8
        blocks = block.to(tl.uint32) + (row[:, None] * (CT // 8) + tl.arange(0, WIDTH // 8)[None, :]).to(tl.uint32)
        return keep8(key, blocks, layer, threshold, ROWS, WIDTH)
    index = (position + row[:, None]) * CT + (first + tl.arange(0, WIDTH))[None, :]
    return keep1(key, index, layer, threshold)


@triton.jit
def join_other(
    value: tl.tensor, other: tl.tensor, row: tl.tensor, c: tl.tensor, ok: tl.tensor, C: tl.constexpr, C2: tl.constexpr,
    POLICY: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the fp32 tile of cat(x, other) whose channels of x are in `value`; ok: mask of the tile's shape."""
    if C2 > 0:
        at = row[:, None] * C2 + (c - C)[None, :]
        second = tl.load(other + at, mask=ok, other=0.0, eviction_policy=POLICY).to(tl.float32)
        value = tl.where((c < C)[None, :], value, second)
    return value


@triton.jit
def load_source(
    x: tl.tensor, other: tl.tensor, row: tl.tensor, c: tl.tensor, inside: tl.tensor, in_x: tl.tensor,
    in_other: tl.tensor, C: tl.constexpr, C2: tl.constexpr, POLICY: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Load the fp32 tile of cat(x, other)."""
    at = row[:, None] * C + c[None, :]
    value = tl.load(x + at, mask=in_x[None, :] & inside, other=0.0, eviction_policy=POLICY).to(tl.float32)
    return join_other(value, other, row, c, in_other[None, :] & inside, C, C2, POLICY)


@triton.jit
def modulation(
    gamma: tl.tensor, beta: tl.tensor, scale: tl.tensor, shift: tl.tensor, nc: tl.tensor, c: tl.tensor, ok: tl.tensor
) -> tl.tensor:
    """Return (w, b, gamma, beta, 1 + scale) [WIDTH]: affine and modulation are x_hat * w + b."""
    gamma_c = tl.load(gamma + c, mask=ok, other=0.0)
    beta_c = tl.load(beta + c, mask=ok, other=0.0)
    one = tl.full(gamma_c.shape, 1.0, tl.float32)
    w, b = gamma_c, beta_c
    if scale is not None:
        one += tl.load(scale + nc, mask=ok, other=0.0)
        w = gamma_c * one
        b = beta_c * one + tl.load(shift + nc, mask=ok, other=0.0)
    return w, b, gamma_c, beta_c, one


@triton.jit(do_not_specialize=NOT_SPECIALISED, repr=named("fwd"))
def forward_kernel(
    a: tl.tensor, bias: tl.tensor, skip: tl.tensor, skip_bias: tl.tensor, skip_scale: tl.tensor, x: tl.tensor,
    other: tl.tensor, gamma: tl.tensor, beta: tl.tensor, v: tl.tensor, scale: tl.tensor, shift: tl.tensor,
    v_rows: tl.tensor, rows_apart: tl.tensor, seed: tl.tensor, n0: tl.tensor, y: tl.tensor, mean: tl.tensor,
    rstd: tl.tensor, eps: tl.tensor, inv_keep: tl.tensor, threshold: tl.tensor, layer: tl.tensor, HW: tl.constexpr,
    C: tl.constexpr, C2: tl.constexpr, SIZE: tl.constexpr, SLAB: tl.constexpr, WIDTH: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, ACT: tl.constexpr,
) -> None:  # fmt: skip
    """Compute y from cat(x, other), after writing x = (a + bias + skip_bias + skip) * skip_scale where a is given.

    v_rows, rows_apart: distance of two samples' rows in v, and in scale and shift.
    """
    CT: tl.constexpr = C + C2
    CHUNKS: tl.constexpr = (HW + ROWS - 1) // ROWS
    POLICY: tl.constexpr = "evict_last" if CHUNKS > 1 else ""
    n, first, c, ok, member, in_x, in_other = place(C, C2, SIZE, SLAB, WIDTH, GROUPS)
    rows = tl.arange(0, ROWS)
    x += n * HW * C
    y += n * HW * CT
    if a is not None:
        a += n * HW * C
    if skip is not None:
        skip += n * HW * C
    if C2 > 0:
        other += n * HW * C2
    add = tl.zeros((WIDTH,), tl.float32)
    if bias is not None:
        add += tl.load(bias + c, mask=in_x, other=0.0)
    if skip_bias is not None:
        add += tl.load(skip_bias + c, mask=in_x, other=0.0)

    # Welford for each slot of the tile: two numbers a slot, no reduction inside the loop.
    m = tl.zeros((ROWS, WIDTH), tl.float32)
    m2 = tl.zeros((ROWS, WIDTH), tl.float32)
    for i in range(CHUNKS):
        row = i * ROWS + rows
        inside = inside_of(row, HW, ROWS)
        if a is None:
            f = load_source(x, other, row, c, inside, in_x, in_other, C, C2, POLICY)
        else:
            at = row[:, None] * C + c[None, :]
            ok_x = in_x[None, :] & inside
            f = tl.load(a + at, mask=ok_x, other=0.0, eviction_policy="evict_first").to(tl.float32) + add[None, :]
            if skip is not None:
                f += tl.load(skip + at, mask=ok_x, other=0.0, eviction_policy="evict_first").to(tl.float32)
            rounded = (f * skip_scale).to(x.dtype.element_ty)
            tl.store(x + at, rounded, mask=ok_x)
            f = join_other(rounded.to(tl.float32), other, row, c, in_other[None, :] & inside, C, C2, POLICY)
        d = tl.where(inside, f - m, 0.0)
        m += d * (1.0 / (i + 1))
        if CHUNKS > 1:
            m2 += d * (f - m)
    if v is not None:
        add = tl.load(v + n * v_rows + c, mask=ok, other=0.0)
        m += add[None, :]
    # Two steps: the mean, then moments of what each slot (count rows, mean m, squared deviations m2) differs from it. The first
    # difference corrects the mean: with mean/std = 1000 the rounding of a plain sum would show.
    count = ((HW - rows + (ROWS - 1)) // ROWS).to(tl.float32)[:, None]
    mean_g = group_sum(column_sum(m * count, ROWS, WIDTH) / HW, member) / SIZE
    d = m - spread(mean_g, member)[None, :]
    mean_g += group_sum(column_sum(d * count, ROWS, WIDTH) / HW, member) / SIZE
    rstd_g = 1.0 / tl.sqrt_rn(group_sum(column_sum(m2 + d * d * count, ROWS, WIDTH), member) / (SIZE * HW) + eps)
    g = first // SIZE + tl.arange(0, GROUPS)
    own = (tl.arange(0, GROUPS) < SLAB // SIZE) & (g < CT // SIZE)
    tl.store(mean + n * (CT // SIZE) + g, mean_g, mask=own)
    tl.store(rstd + n * (CT // SIZE) + g, rstd_g, mask=own)
    center = spread(mean_g, member)
    w, b, _, _, _ = modulation(gamma, beta, scale, shift, n * rows_apart + c, c, ok)
    w *= spread(rstd_g, member)
    key = None
    if seed is not None:
        key, start = tl.load(seed), first_sample(n0)

    if a is not None and CHUNKS > 1:
        tl.debug_barrier()  # x is read again below, perhaps by other threads of the program
    for i in range(CHUNKS):
        row = i * ROWS + rows
        inside = inside_of(row, HW, ROWS)
        z = m
        if CHUNKS > 1:
            z = load_source(x, other, row, c, inside, in_x, in_other, C, C2, "evict_first")
            if v is not None:
                z += add[None, :]
        # Centred first: x * w + (b - center * w) would cancel two large numbers where the mean is large.
        z = (z - center[None, :]) * w[None, :] + b[None, :]
        if ACT:
            z = z * tl.sigmoid(z)
        if key is not None:
            keep = keep_tile(key, layer, threshold, (start + n) * HW, row, first, CT, ROWS, WIDTH)
            z = tl.where(keep, z * inv_keep, 0.0)
        at = row[:, None] * CT + c[None, :]
        tl.store(y + at, z.to(y.dtype.element_ty), mask=ok[None, :] & inside, cache_modifier=".cs")


@triton.jit
def normal_and_gradient(
    dy: tl.tensor, x: tl.tensor, other: tl.tensor, add: tl.tensor, center: tl.tensor, rs: tl.tensor, w: tl.tensor,
    b: tl.tensor, key: tl.tensor, layer: tl.tensor, threshold: tl.tensor, inv_keep: tl.tensor, position: tl.tensor,
    row: tl.tensor, first: tl.tensor, c: tl.tensor, ok: tl.tensor, in_x: tl.tensor, in_other: tl.tensor,
    HW: tl.constexpr, C: tl.constexpr, C2: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ACT: tl.constexpr,
    POLICY: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return (x_hat, gradient before the activation), fp32 [ROWS, WIDTH], rebuilt from the source and the mask."""
    inside = inside_of(row, HW, ROWS)
    xh = load_source(x, other, row, c, inside, in_x, in_other, C, C2, POLICY)
    at = row[:, None] * (C + C2) + c[None, :]
    du = tl.load(dy + at, mask=ok[None, :] & inside, other=0.0, eviction_policy=POLICY).to(tl.float32)
    if add is not None:
        xh += add[None, :]
    xh = (xh - center[None, :]) * rs[None, :]
    if key is not None:
        keep = keep_tile(key, layer, threshold, position, row, first, C + C2, ROWS, WIDTH)
        du = tl.where(keep, du * inv_keep, 0.0)
    if ACT:
        z = xh * w[None, :] + b[None, :]
        s = tl.sigmoid(z)
        du *= s * (1.0 + z * (1.0 - s))
    return xh, du


@triton.jit(do_not_specialize=NOT_SPECIALISED, repr=named("bwd"))
def backward_kernel(
    dy: tl.tensor, dx: tl.tensor, djoined: tl.tensor, skip_scale: tl.tensor, x: tl.tensor, other: tl.tensor,
    gamma: tl.tensor, beta: tl.tensor, v: tl.tensor, scale: tl.tensor, shift: tl.tensor, v_rows: tl.tensor,
    rows_apart: tl.tensor, seed: tl.tensor, n0: tl.tensor, mean: tl.tensor, rstd: tl.tensor, da: tl.tensor,
    dother: tl.tensor, partials: tl.tensor, dv: tl.tensor, dscale: tl.tensor, dshift: tl.tensor, inv_keep: tl.tensor,
    threshold: tl.tensor, layer: tl.tensor, HW: tl.constexpr, C: tl.constexpr, C2: tl.constexpr,
    SIZE: tl.constexpr, SLAB: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    ACT: tl.constexpr,
) -> None:  # fmt: skip
    """Compute da = (d[:, :C] + dx) * skip_scale and dother = d[:, C:], where d = norm's gradient of cat(x, other) + djoined.

    dv: da summed over positions, [N, C + C2].

    partials [2 or more, N, C + C2]: gradients of gamma and beta by sample.
    """
    CT: tl.constexpr = C + C2
    CHUNKS: tl.constexpr = (HW + ROWS - 1) // ROWS
    POLICY: tl.constexpr = "evict_last" if CHUNKS > 1 else ""
    n, first, c, ok, member, in_x, in_other = place(C, C2, SIZE, SLAB, WIDTH, GROUPS)
    rows = tl.arange(0, ROWS)
    nc = n * CT + c
    x += n * HW * C
    da += n * HW * C
    dy += n * HW * CT
    if dx is not None:
        dx += n * HW * C
    if djoined is not None:
        djoined += n * HW * CT
    if C2 > 0:
        other += n * HW * C2
        dother += n * HW * C2
    center = tl.load(mean + n * (CT // SIZE) + c // SIZE, mask=ok, other=0.0)
    rs = tl.load(rstd + n * (CT // SIZE) + c // SIZE, mask=ok, other=0.0)
    w, b, gamma_c, beta_c, one = modulation(gamma, beta, scale, shift, n * rows_apart + c, c, ok)
    add = None
    if v is not None:
        add = tl.load(v + n * v_rows + c, mask=ok, other=0.0)
    key = None
    if seed is not None:
        key = tl.load(seed)
    position = (first_sample(n0) + n) * HW

    xh = tl.zeros((ROWS, WIDTH), tl.float32)
    du = tl.zeros((ROWS, WIDTH), tl.float32)
    t0 = tl.zeros((ROWS, WIDTH), tl.float32)
    t1 = tl.zeros((ROWS, WIDTH), tl.float32)
    for i in range(CHUNKS):
        xh, du = normal_and_gradient(
            dy, x, other, add, center, rs, w, b, key, layer, threshold, inv_keep, position, i * ROWS + rows, first, c, ok,
            in_x, in_other, HW, C, C2, ROWS, WIDTH, ACT, POLICY,
        )  # fmt: skip
        t0 += du
        t1 += du * xh
    s0, s1 = column_sum(t0, ROWS, WIDTH), column_sum(t1, ROWS, WIDTH)
    c0 = spread(group_sum(s0 * w, member) / (SIZE * HW), member)
    c1 = spread(group_sum(s1 * w, member) / (SIZE * HW), member)
    plane = (tl.num_programs(0) // ((CT + SLAB - 1) // SLAB)).to(tl.int64) * CT
    tl.store(partials + nc, s1 * one, mask=ok)
    tl.store(partials + plane + nc, s0 * one, mask=ok)
    if scale is not None:
        tl.store(dscale + nc, gamma_c * s1 + beta_c * s0, mask=ok)
        tl.store(dshift + nc, s0, mask=ok)

    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for i in range(CHUNKS):
        row = i * ROWS + rows
        inside = inside_of(row, HW, ROWS)
        ok_x = in_x[None, :] & inside
        if CHUNKS > 1:
            xh, du = normal_and_gradient(
                dy, x, other, add, center, rs, w, b, key, layer, threshold, inv_keep, position, row, first, c, ok,
                in_x, in_other, HW, C, C2, ROWS, WIDTH, ACT, "evict_first",
            )  # fmt: skip
        d = rs[None, :] * (du * w[None, :] - c0[None, :] - xh * c1[None, :])
        if djoined is not None:
            at = row[:, None] * CT + c[None, :]
            ok_all = ok[None, :] & inside
            d += tl.load(djoined + at, mask=ok_all, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if C2 > 0:
            at = row[:, None] * C2 + (c - C)[None, :]
            tl.store(dother + at, d.to(dother.dtype.element_ty), mask=in_other[None, :] & inside, cache_modifier=".cs")
        at = row[:, None] * C + c[None, :]
        if dx is not None:
            d += tl.load(dx + at, mask=ok_x, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if skip_scale is not None:
            d *= skip_scale
        tl.store(da + at, d.to(da.dtype.element_ty), mask=ok_x, cache_modifier=".cs")
        if dv is not None:
            total += tl.where(inside, d, 0.0)
    if dv is not None:
        tl.store(dv + nc, column_sum(total, ROWS, WIDTH), mask=ok)
