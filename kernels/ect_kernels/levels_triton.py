# mypy: disable-error-code="no-untyped-def"
"""levels in Triton: a lane to a sample."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ect_kernels import philox
from ect_kernels.levels import Inputs, Output
from ect_kernels.philox_triton import box_muller, first_sample

BLOCK, WARPS = 128, 4
_T, _FLIP = tl.constexpr(philox.STREAM_T), tl.constexpr(philox.STREAM_FLIP)


@triton.jit
def levels_fwd_kernel(
    seed, stage, n0, t_out, r_out, label_t, label_r, flip, N, mean, std, log2_q, k, b, B: tl.constexpr
):
    """Draw the levels of B samples."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    ok = i < N
    key, counter = tl.load(seed), (first_sample(n0) + i).to(tl.uint32)
    w0, w1, _, _ = tl.philox(key, counter, _T, 0, 0)
    z, _ = box_muller(w0, w1)
    t = tl.exp(mean + std * z)
    decay = tl.exp2(-(tl.load(stage) + 1).to(tl.float32) * log2_q)
    r = tl.maximum(t * (1.0 - decay * (1.0 + k * tl.sigmoid(-b * t))), 0.0)
    tl.store(t_out + i, t, mask=ok)
    tl.store(r_out + i, r, mask=ok)
    tl.store(label_t + i, tl.log(t) * 0.25, mask=ok)
    tl.store(label_r + i, tl.log(tl.where(r > 0, r, 1.0)) * 0.25, mask=ok)
    f0, _, _, _ = tl.philox(key, counter, _FLIP, 0, 0)
    tl.store(flip + i, (f0 >> 31 == 0).to(tl.uint8), mask=ok)  # uniform < 1/2: the highest bit is 0


def fwd(i: Inputs, out: Output) -> None:
    results = (*out[:4], out.flip.view(torch.uint8))
    numbers = (i.batch, i.P_mean, i.P_std, math.log2(i.q), i.k, i.b, BLOCK)
    levels_fwd_kernel[(triton.cdiv(i.batch, BLOCK),)](i.seed, i.stage, i.n0, *results, *numbers, num_warps=WARPS)
