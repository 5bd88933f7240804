"""Launches of residual_group_norm_silu's Triton kernels: those of gn_triton.py without v and modulation."""

from __future__ import annotations

from ect_kernels import gn_triton, group_norm_silu, group_norm_silu_triton
from ect_kernels.residual_group_norm_silu import Grads, Norm, Output, Saved, Seam
from ect_kernels.tensors import fp32


def fwd(s: Seam, i: Norm, out: Output) -> None:
    """Fill `out`."""
    given = out.x.numel() > 0  # there is something to sum
    a, x = (i.x, out.x) if given else (None, i.x)
    seam = (a, fp32(s.bias), s.skip, fp32(s.skip_bias), s.skip_scale)
    group_norm_silu_triton.fwd(i._replace(x=x), group_norm_silu.Output(*out[1:]), seam, s.other)


def bwd(s: Saved, i: Norm, grads: Grads) -> None:
    """Fill `grads`."""
    grid, keywords = group_norm_silu_triton.launch(i, s.other, backward=True, more=True)
    sources = (s.dy, s.dx, s.djoined, s.skip_scale, i.x, s.other, *i.vectors(), i.seed, i.n0, s.mean, s.rstd)
    results = (grads.da, grads.dother, grads.rows, grads.rows[2], None, None)
    gn_triton.backward_kernel[grid](*sources, *results, i.inv_keep, i.threshold, i.layer, **keywords)
