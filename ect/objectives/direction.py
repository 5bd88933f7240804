"""The direction in which a consistency loss draws D_t: along a gradient of a distance of features, not along D_t - D_r."""

from __future__ import annotations

from collections.abc import Callable

import torch
from ect_kernels.consistency_loss import by_image, pseudo_huber
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]
"""A distance [N] between images [N, C, H, W], of each to its partner, which can be differentiated in the first."""


def direction(distance: Distance, D_t: Tensor, target: Tensor) -> Tensor:
    """Return g [N, C, H, W]: the gradient of distance(D_t, target) with respect to D_t, of unit L2 norm for each sample.

    It is 0 where the gradient is, as where D_t is the target. Neither D_t nor the target gets a gradient through it.
    Source: Align Your Tangent (arXiv 2510.00658).
    """
    with torch.enable_grad():
        x = D_t.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(distance(x, target.detach()).sum(), x)
    norm = gradient.flatten(1).norm(dim=1)
    return gradient / by_image(torch.where(norm == 0, 1, norm))


def along(distance: Distance, D_t: Tensor, target: Tensor, c: float) -> Tensor:
    """Return [N] whose value is the pseudo-Huber distance of D_t from the target, and whose gradient in D_t is `direction`.

    The published loss, ||D_t - sg(D_t - g)||^2 / 2, has the gradient g as well, but its value is 1/2 whatever D_t is. That of
    ECT's plain loss (c = 0) is the unit vector (D_t - D_r) / ||D_t - D_r||, which g replaces. Source: Align Your Tangent
    (arXiv 2510.00658).
    """
    slope = (D_t * direction(distance, D_t, target)).flatten(1).sum(1)
    return pseudo_huber(D_t.detach() - target, c) + (slope - slope.detach())
