"""The weights of the consistency loss: functions of the two noise levels, and one that looks at the target."""

from __future__ import annotations

from collections.abc import Callable

import torch
from ect_kernels.consistency_loss import pseudo_huber
from torch import Tensor

Weighting = Callable[[Tensor, Tensor, float], Tensor]

WEIGHTINGS: dict[str, Weighting] = {
    "inverse_gap": lambda t, r, sigma_data: 1 / (t - r),
    "inverse_c_out_sq": lambda t, r, sigma_data: 1 / t**2 + 1 / sigma_data**2,
    "inverse_t": lambda t, r, sigma_data: 1 / t,
    "inverse_t_sq": lambda t, r, sigma_data: 1 / t**2,
    "uniform": lambda t, r, sigma_data: torch.ones_like(t),
}
"""Weights [N] of pairs at levels t > r >= 0 [N], for data of standard deviation sigma_data."""
ADAPTIVE = "adaptive"
"""The name of `adaptive_weight`, which WEIGHTINGS cannot hold: it takes images."""


def adaptive_weight(target: Tensor, y: Tensor, c: float, floor: float) -> Tensor:
    """Return 1 / max(H, floor) [N], H = sqrt(||target - y||^2 + c^2) - c: how far the target D_r is from the clean image y.

    target, y: [N, C, H, W], both without gradient. floor > 0 bounds the weight where they agree: a row with r = 0 has y itself
    for its target, so that its weight is 1 / floor. Source: ADCM (arXiv 2510.17266), which has no floor, and no such rows.
    """
    return 1 / pseudo_huber(target - y, c).clamp(min=floor)
