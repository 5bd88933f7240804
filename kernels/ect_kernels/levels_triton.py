"""levels in Triton: a lane to a sample."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ect_kernels.levels import Inputs, Output

BLOCK, WARPS = 128, 4


@triton.jit
def levels_fwd_kernel(
    normal: tl.tensor, stage: tl.tensor, t_out: tl.tensor, r_out: tl.tensor, label_t: tl.tensor, label_r: tl.tensor,
    N: tl.tensor, P_mean: tl.tensor, P_std: tl.tensor, log2_q: tl.tensor, k: tl.tensor, b: tl.tensor, B: tl.constexpr,
) -> None:  # fmt: skip
    """B samples."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    ok = i < N
    t = tl.exp(P_mean + P_std * tl.load(normal + i, mask=ok, other=0.0))
    decay = tl.exp2(-(tl.load(stage) + 1).to(tl.float32) * log2_q)
    r = tl.maximum(t * (1.0 - decay * (1.0 + k * tl.sigmoid(-b * t))), 0.0)
    tl.store(t_out + i, t, mask=ok)
    tl.store(r_out + i, r, mask=ok)
    tl.store(label_t + i, tl.log(t) * 0.25, mask=ok)
    tl.store(label_r + i, tl.log(tl.where(r > 0, r, 1.0)) * 0.25, mask=ok)


def fwd(i: Inputs, out: Output) -> None:
    """Fill `out`."""
    n = i.normal.numel()
    numbers = (n, i.P_mean, i.P_std, math.log2(i.q), i.k, i.b, BLOCK)
    levels_fwd_kernel[(triton.cdiv(n, BLOCK),)](i.normal, i.stage, *out, *numbers, num_warps=WARPS)
