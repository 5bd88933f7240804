"""Triton kernels of residual_group_norm_silu: one program for each (slab of whole groups, sample), two loops over its rows.

The first loop reads what comes from DRAM and gathers statistics (backward: sums); the second reads the same rows again, from
L2, and writes. So DRAM sees a, skip, x, y forward and dy, dx, x, da backward: 4 element sizes each way (and `other`, dother).
The resident programs' tiles fit in L2: 64 KB forward, 128 KB backward at 32x32 in half precision, two programs on an SM.
A slab may hold channels of x and of `other`: both are loaded, each under the mask of its channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ect_kernels.gn_triton import group_sum, inside_of, keep_tile, lanes_of, slab, spread, sum_over_n
from ect_kernels.philox import dropout_threshold, inv_keep
from ect_kernels.residual_group_norm_silu import Grads, Inputs, Output, Saved, empty_grads, empty_output
from ect_kernels.tensors import empty_image

NOT_SPECIALISED = ["layer", "n0", "threshold"]


@triton.jit
def place(
    C: tl.constexpr, C2: tl.constexpr, SIZE: tl.constexpr, SLAB: tl.constexpr, WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """A program's sample and first channel; its channels, which of them exist, in which group, in which source."""
    CT: tl.constexpr = C + C2
    SLABS: tl.constexpr = (CT + SLAB - 1) // SLAB
    first = tl.program_id(0) % SLABS * SLAB
    lane = tl.arange(0, WIDTH)
    c = first + lane
    ok = lanes_of(c, first, CT, SLAB, WIDTH)
    member = ((lane // SIZE)[:, None] == tl.arange(0, GROUPS)[None, :]) & ok[:, None]
    in_x, in_other = ok, ok
    if C2 > 0:
        in_x, in_other = ok & (c < C), ok & (c >= C)
    return (tl.program_id(0) // SLABS).to(tl.int64), first, c, ok, member, in_x, in_other


@triton.jit
def load_source(
    x: tl.tensor, other: tl.tensor, row: tl.tensor, c: tl.tensor, ok_x: tl.tensor, ok_other: tl.tensor,
    C: tl.constexpr, C2: tl.constexpr, POLICY: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """fp32 tile of cat(x, other); masks are of the tile's shape."""
    value = tl.load(x + row[:, None] * C + c[None, :], mask=ok_x, other=0.0, eviction_policy=POLICY).to(tl.float32)
    if C2 > 0:
        at = row[:, None] * C2 + (c - C)[None, :]
        second = tl.load(other + at, mask=ok_other, other=0.0, eviction_policy=POLICY).to(tl.float32)
        value = tl.where((c < C)[None, :], value, second)
    return value


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def residual_group_norm_silu_fwd_kernel(
    a: tl.tensor, bias: tl.tensor, skip: tl.tensor, skip_bias: tl.tensor, other: tl.tensor, gamma: tl.tensor,
    beta: tl.tensor, seed: tl.tensor, x: tl.tensor, y: tl.tensor, mean: tl.tensor, rstd: tl.tensor,
    skip_scale: tl.tensor, eps: tl.tensor, inv_keep: tl.tensor, threshold: tl.tensor, layer: tl.tensor,
    n0: tl.tensor, HW: tl.constexpr, C: tl.constexpr, C2: tl.constexpr, SIZE: tl.constexpr, SLAB: tl.constexpr,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, ACT: tl.constexpr, DROP: tl.constexpr,
) -> None:  # fmt: skip
    CT: tl.constexpr = C + C2
    CHUNKS: tl.constexpr = (HW + ROWS - 1) // ROWS
    n, first, c, ok, member, in_x, in_other = place(C, C2, SIZE, SLAB, WIDTH, GROUPS)
    rows = tl.arange(0, ROWS)
    a += n * HW * C
    x += n * HW * C
    y += n * HW * CT
    if skip is not None:
        skip += n * HW * C
    if C2 > 0:
        other += n * HW * C2
    add = tl.zeros((WIDTH,), tl.float32)
    if bias is not None:
        add += tl.load(bias + c, mask=in_x, other=0.0).to(tl.float32)
    if skip_bias is not None:
        add += tl.load(skip_bias + c, mask=in_x, other=0.0).to(tl.float32)

    # Welford for each slot of the tile, joined over rows after the loop: two numbers a slot, no reduction inside the loop.
    slot_mean = tl.zeros((ROWS, WIDTH), tl.float32)
    slot_m2 = tl.zeros((ROWS, WIDTH), tl.float32)
    for i in range(CHUNKS):
        row = i * ROWS + rows
        inside = inside_of(row, HW, ROWS)
        ok_x, ok_other = in_x[None, :] & inside, in_other[None, :] & inside
        at = row[:, None] * C + c[None, :]
        f = tl.load(a + at, mask=ok_x, other=0.0, eviction_policy="evict_first").to(tl.float32) + add[None, :]
        if skip is not None:
            f += tl.load(skip + at, mask=ok_x, other=0.0, eviction_policy="evict_first").to(tl.float32)
        rounded = (f * skip_scale).to(x.dtype.element_ty)
        tl.store(x + at, rounded, mask=ok_x)
        f = rounded.to(tl.float32)
        if C2 > 0:
            at = row[:, None] * C2 + (c - C)[None, :]
            second = tl.load(other + at, mask=ok_other, other=0.0, eviction_policy="evict_last").to(tl.float32)
            f = tl.where((c < C)[None, :], f, second)
        step = f - slot_mean
        slot_mean += tl.where(inside, step * (1.0 / (i + 1)), 0.0)
        slot_m2 += tl.where(inside, step * (f - slot_mean), 0.0)

    count = (CHUNKS - ((CHUNKS - 1) * ROWS + rows >= HW).to(tl.int32)).to(tl.float32)[:, None]
    mean_c = tl.sum(slot_mean * count, 0) * (1.0 / HW)
    # Once more about itself: where mean / std is 1000, the rounding of the first sum shows.
    mean_c += tl.sum((slot_mean - mean_c[None, :]) * count, 0) * (1.0 / HW)
    apart = slot_mean - mean_c[None, :]
    m2_c = tl.sum(slot_m2 + count * apart * apart, 0)
    mean_g = group_sum(mean_c, member) * (1.0 / SIZE)
    mean_g += group_sum(mean_c - spread(mean_g, member), member) * (1.0 / SIZE)
    mu = spread(mean_g, member)
    var_g = group_sum(m2_c + HW * (mean_c - mu) * (mean_c - mu), member) * (1.0 / (SIZE * HW))
    rstd_g = 1.0 / tl.sqrt_rn(var_g + eps)
    g = tl.arange(0, GROUPS)
    own = (g < SLAB // SIZE) & (first // SIZE + g < CT // SIZE)
    tl.store(mean + n * (CT // SIZE) + first // SIZE + g, mean_g, mask=own)
    tl.store(rstd + n * (CT // SIZE) + first // SIZE + g, rstd_g, mask=own)
    scale = spread(rstd_g, member) * tl.load(gamma + c, mask=ok, other=0.0).to(tl.float32)
    shift = tl.load(beta + c, mask=ok, other=0.0).to(tl.float32)
    if DROP:
        key = tl.load(seed)

    tl.debug_barrier()  # x is read again below, perhaps by other threads of the program
    for i in range(CHUNKS):
        row = i * ROWS + rows
        inside = inside_of(row, HW, ROWS)
        f = load_source(x, other, row, c, in_x[None, :] & inside, in_other[None, :] & inside, C, C2, "evict_first")
        z = (f - mu[None, :]) * scale[None, :] + shift[None, :]
        if ACT:
            z = z * tl.sigmoid(z)
        if DROP:
            keep = keep_tile(key, layer, threshold, (n0 + n) * HW, row, first, CT, ROWS, WIDTH)
            z = tl.where(keep, z * inv_keep, 0.0)
        at = row[:, None] * CT + c[None, :]
        tl.store(y + at, z.to(y.dtype.element_ty), mask=ok[None, :] & inside, eviction_policy="evict_first")


@triton.jit
def load_dz(
    dy: tl.tensor, xhat: tl.tensor, at: tl.tensor, ok: tl.tensor, w: tl.tensor, b: tl.tensor, seed: tl.tensor,
    layer: tl.tensor, threshold: tl.tensor, inv_keep: tl.tensor, position: tl.tensor, row: tl.tensor,
    first: tl.tensor, CT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ACT: tl.constexpr,
    DROP: tl.constexpr, POLICY: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Gradient of z = gamma * xhat + beta from dy, through dropout and SiLU."""
    dz = tl.load(dy + at, mask=ok, other=0.0, eviction_policy=POLICY).to(tl.float32)
    if DROP:
        keep = keep_tile(seed, layer, threshold, position, row, first, CT, ROWS, WIDTH)
        dz = tl.where(keep, dz * inv_keep, 0.0)
    if ACT:
        z = xhat * w[None, :] + b[None, :]
        s = tl.sigmoid(z)
        dz = dz * (s * (1.0 + z * (1.0 - s)))
    return dz


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def residual_group_norm_silu_bwd_kernel(
    dy: tl.tensor, dx: tl.tensor, x: tl.tensor, other: tl.tensor, gamma: tl.tensor, beta: tl.tensor, seed: tl.tensor,
    mean: tl.tensor, rstd: tl.tensor, da: tl.tensor, dother: tl.tensor, partials: tl.tensor, skip_scale: tl.tensor,
    inv_keep: tl.tensor, threshold: tl.tensor, layer: tl.tensor, n0: tl.tensor, HW: tl.constexpr, C: tl.constexpr,
    C2: tl.constexpr, SIZE: tl.constexpr, SLAB: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, ACT: tl.constexpr, DROP: tl.constexpr,
) -> None:  # fmt: skip
    CT: tl.constexpr = C + C2
    CHUNKS: tl.constexpr = (HW + ROWS - 1) // ROWS
    n, first, c, ok, member, in_x, in_other = place(C, C2, SIZE, SLAB, WIDTH, GROUPS)
    rows = tl.arange(0, ROWS)
    x += n * HW * C
    da += n * HW * C
    dy += n * HW * CT
    if dx is not None:
        dx += n * HW * C
    if C2 > 0:
        other += n * HW * C2
        dother += n * HW * C2
    g = tl.arange(0, GROUPS)
    own = (g < SLAB // SIZE) & (first // SIZE + g < CT // SIZE)
    at_g = n * (CT // SIZE) + first // SIZE + g
    mu = spread(tl.load(mean + at_g, mask=own, other=0.0), member)
    rs = spread(tl.load(rstd + at_g, mask=own, other=0.0), member)
    w = tl.load(gamma + c, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(beta + c, mask=ok, other=0.0).to(tl.float32)
    position = (n0 + n) * HW
    key = position
    if DROP:
        key = tl.load(seed)

    slot_0 = tl.zeros((ROWS, WIDTH), tl.float32)
    slot_1 = tl.zeros((ROWS, WIDTH), tl.float32)
    for i in range(CHUNKS):
        row = i * ROWS + rows
        inside = inside_of(row, HW, ROWS)
        f = load_source(x, other, row, c, in_x[None, :] & inside, in_other[None, :] & inside, C, C2, "evict_last")
        xhat = (f - mu[None, :]) * rs[None, :]
        at = row[:, None] * CT + c[None, :]
        dz = load_dz(
            dy, xhat, at, ok[None, :] & inside, w, b, key, layer, threshold, inv_keep, position, row, first,
            CT, ROWS, WIDTH, ACT, DROP, "evict_last",
        )  # fmt: skip
        slot_0 += dz
        slot_1 += dz * xhat
    sum_0 = tl.sum(slot_0, 0)
    sum_1 = tl.sum(slot_1, 0)
    m0 = spread(group_sum(sum_0 * w, member), member) * (1.0 / (SIZE * HW))
    m1 = spread(group_sum(sum_1 * w, member), member) * (1.0 / (SIZE * HW))
    partials += n * CT + c
    plane = (tl.num_programs(0) // ((CT + SLAB - 1) // SLAB)).to(tl.int64) * CT
    tl.store(partials, sum_1, mask=ok)
    tl.store(partials + plane, sum_0, mask=ok)

    slot_0 = tl.zeros((ROWS, WIDTH), tl.float32)
    for i in range(CHUNKS):
        row = i * ROWS + rows
        inside = inside_of(row, HW, ROWS)
        ok_x, ok_other = in_x[None, :] & inside, in_other[None, :] & inside
        f = load_source(x, other, row, c, ok_x, ok_other, C, C2, "evict_first")
        xhat = (f - mu[None, :]) * rs[None, :]
        at = row[:, None] * CT + c[None, :]
        dz = load_dz(
            dy, xhat, at, ok[None, :] & inside, w, b, key, layer, threshold, inv_keep, position, row, first,
            CT, ROWS, WIDTH, ACT, DROP, "evict_first",
        )  # fmt: skip
        d = rs[None, :] * (dz * w[None, :] - m0[None, :] - xhat * m1[None, :])
        if C2 > 0:
            at = row[:, None] * C2 + (c - C)[None, :]
            tl.store(dother + at, d.to(dother.dtype.element_ty), mask=ok_other, eviction_policy="evict_first")
        at = row[:, None] * C + c[None, :]
        if dx is not None:
            d += tl.load(dx + at, mask=ok_x, other=0.0, eviction_policy="evict_first").to(tl.float32)
        d *= skip_scale
        slot_0 += tl.where(inside, d, 0.0)
        tl.store(da + at, d.to(da.dtype.element_ty), mask=ok_x, eviction_policy="evict_first")
    tl.store(partials + 2 * plane, tl.sum(slot_0, 0), mask=ok)


def constants(c: int, c2: int, groups: int, hw: int, act: bool, drop: bool) -> tuple[dict[str, int], int]:
    """(constexprs, num_warps) of both kernels."""
    s = slab(c + c2, groups, hw)
    shape = {"HW": hw, "C": c, "C2": c2, "SIZE": (c + c2) // groups, "SLAB": s.channels, "WIDTH": s.width}
    return shape | {"GROUPS": s.groups, "ROWS": s.rows, "ACT": act, "DROP": drop}, s.warps


def fwd(i: Inputs) -> Output:
    """Results of reference_fwd."""
    n, c, h, w = i.a.shape
    ct, out = i.gamma.shape[0], empty_output(i)
    shape, warps = constants(c, ct - c, i.groups, h * w, i.act, i.p > 0)
    vectors = (i.gamma, i.beta, i.seed if i.p > 0 else None)
    scalars = (i.skip_scale, i.eps, inv_keep(i.p), dropout_threshold(i.p), i.layer, i.n0)
    residual_group_norm_silu_fwd_kernel[(n * triton.cdiv(ct, shape["SLAB"]),)](
        i.a, i.bias, i.skip, i.skip_bias, i.other, *vectors, *out, *scalars, **shape, num_warps=warps
    )
    return out


def bwd(i: Saved) -> Grads:
    """Results of reference_bwd."""
    n, c, h, w = i.x.shape
    ct, grads = i.gamma.shape[0], empty_grads(i)
    dy = empty_image(i.x, ct).zero_() if i.dy is None else i.dy  # only x was used: too rare for a mode of the kernel
    partials = i.mean.new_empty((3, n, ct))
    shape, warps = constants(c, ct - c, i.groups, h * w, i.act, i.p > 0)
    tensors = (dy, i.dx, i.x, i.other, i.gamma, i.beta, i.seed if i.p > 0 else None, i.mean, i.rstd, grads.da)
    scalars = (i.skip_scale, inv_keep(i.p), dropout_threshold(i.p), i.layer, i.n0)
    residual_group_norm_silu_bwd_kernel[(n * triton.cdiv(ct, shape["SLAB"]),)](
        *tensors, None if i.other is None else grads.dother, partials, *scalars, **shape, num_warps=warps
    )
    return grads._replace(sums=sum_over_n(partials))
