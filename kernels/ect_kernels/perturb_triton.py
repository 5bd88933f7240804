# mypy: disable-error-code="no-untyped-def,var-annotated"
"""perturb in Triton: a lane takes four neighbouring pixels with all their channels.

Their noise is one Philox call a channel, because eps counts in NCHW order; their values lie together in the NHWC images, so
that they are written as C vectors of four. Sizes that this does not fit take one call a value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ect_kernels import philox
from ect_kernels.perturb import Inputs, Output
from ect_kernels.philox_triton import box_muller, first_sample

GROUPS, WARPS = 64, 2  # groups of four pixels to a program
BLOCK = 256  # values to a program of the generic kernel
MAX_CHANNELS = 8  # above it the code of a lane grows too long
_STREAM = tl.constexpr(philox.STREAM_EPS)


@triton.jit
def _write(images, t, r, flip, in_t, in_r, x_t, x_r, z, n, base, at, mask, sd2, W, C: tl.constexpr):
    """Write all outputs of the elements `at` of sample n, whose noise is z."""
    source = at
    if flip is not None:  # noqa: SIM102  Triton before 3.3 evaluates both sides of an `and`
        if tl.load(flip + n) != 0:
            source = at + (W - 1 - 2 * (at // C % W)) * C
    y = tl.div_rn(tl.load(images + base + source, mask=mask, other=0).to(tl.float32), 127.5) - 1.0
    sigma_t, sigma_r = tl.load(t + n), tl.load(r + n)
    positive = tl.where(sigma_r > 0, sigma_r, 1.0)
    noisy_t, noisy_r = y + sigma_t * z, y + sigma_r * z
    c_in_t = 1.0 / tl.sqrt_rn(sigma_t * sigma_t + sd2)
    c_in_r = 1.0 / tl.sqrt_rn(positive * positive + sd2)
    tl.store(x_t + base + at, noisy_t, mask=mask)
    tl.store(x_r + base + at, noisy_r, mask=mask)
    tl.store(in_t + base + at, (noisy_t * c_in_t).to(in_t.dtype.element_ty), mask=mask)
    tl.store(in_r + base + at, (noisy_r * c_in_r).to(in_r.dtype.element_ty), mask=mask)


@triton.jit
def _normal(key, block, blocks, m: tl.constexpr, C: tl.constexpr):
    """Draw the m-th noise value in memory order: of pixel m // C and channel m % C, whose counters start at C's `blocks`.

    The four pixels of a channel share a Philox call. It is written once for each (Triton before 3.3 has no tuples to
    keep its values in) and compiled once.
    """
    w0, w1, w2, w3 = tl.philox(key, (block + m % C * blocks).to(tl.uint32), _STREAM, 0, 0)
    if m // C < 2:
        even, odd = box_muller(w0, w1)
    else:
        even, odd = box_muller(w2, w3)
    return odd if m // C % 2 == 1 else even


@triton.jit
def perturb_fwd_kernel(
    images, t, r, seed, flip, eps, n0, in_t, in_r, x_t, x_r, sd2, W, HW, chunks, C: tl.constexpr, B: tl.constexpr
):
    """Compute images whose HW is a multiple of 4."""
    pid = tl.program_id(0)
    n = (pid // chunks).to(tl.int64)
    group = pid % chunks * B + tl.arange(0, B)
    mask = tl.expand_dims(group < HW // 4, 1)
    base = n * HW * C
    if eps is None:
        key = tl.load(seed)
        block = (n + first_sample(n0)) * (HW // 4 * C) + group
    for i in tl.static_range(C):  # the i-th vector of the 4 C values in memory order
        at = tl.expand_dims(group * (4 * C), 1) + (4 * i + tl.expand_dims(tl.arange(0, 4), 0))
        if eps is None:
            a, b = _normal(key, block, HW // 4, 4 * i, C), _normal(key, block, HW // 4, 4 * i + 1, C)
            c, d = _normal(key, block, HW // 4, 4 * i + 2, C), _normal(key, block, HW // 4, 4 * i + 3, C)
            z = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (B, 4))
        else:
            z = tl.load(eps + base + at, mask=mask, other=0.0)
        _write(images, t, r, flip, in_t, in_r, x_t, x_r, z, n, base, at, mask, sd2, W, C)


@triton.jit
def perturb_generic_fwd_kernel(
    images, t, r, seed, flip, eps, n0, in_t, in_r, x_t, x_r, sd2, W, HW, chunks, C, B: tl.constexpr
):
    """Compute images of any size."""
    pid = tl.program_id(0)
    n = (pid // chunks).to(tl.int64)
    at = pid % chunks * B + tl.arange(0, B)
    mask = at < HW * C
    base = n * HW * C
    if eps is None:
        j = at % C * HW + at // C
        block = (n + first_sample(n0)) * ((HW * C + 3) // 4) + j // 4
        w0, w1, w2, w3 = tl.philox(tl.load(seed), block.to(tl.uint32), _STREAM, 0, 0)
        late = j % 4 >= 2
        even, odd = box_muller(tl.where(late, w2, w0), tl.where(late, w3, w1))
        z = tl.where(j % 2 == 1, odd, even)
    else:
        z = tl.load(eps + base + at, mask=mask, other=0.0)
    _write(images, t, r, flip, in_t, in_r, x_t, x_r, z, n, base, at, mask, sd2, W, C)


def fwd(i: Inputs, out: Output) -> None:
    n, c, h, w = i.shape
    flip = None if i.flip is None else i.flip.view(torch.uint8)
    grouped = h * w % 4 == 0 and c <= MAX_CHANNELS
    chunks = triton.cdiv(h * w // 4, GROUPS) if grouped else triton.cdiv(h * w * c, BLOCK)
    kernel, size = (perturb_fwd_kernel, GROUPS) if grouped else (perturb_generic_fwd_kernel, BLOCK)
    tensors = (i.images, i.t, i.r, i.seed, flip, i.eps, i.n0, *out)
    kernel[(n * chunks,)](*tensors, float(i.sigma_data) ** 2, w, h * w, chunks, c, size, num_warps=WARPS)
