"""Consistency distillation: x_t is paired with where a frozen diffusion model's ODE leads from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ect_kernels.levels import noise_level
from torch import Tensor

from ect.objective import ConsistencyObjective, Denoiser


def euler_step(denoiser: Denoiser, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Return x + (r - t) (x - D(x, t)) / t: one Euler step of the probability-flow ODE from levels t [N] > 0 to r [N].

    x is [N, C, H, W]. The step is written as a mean of x and D(x, t), so that one to r = 0 is D(x, t) itself. Source:
    Karras et al., 2022 (EDM), equation 4 with sigma(t) = t.
    """
    share = (r / t).view(-1, 1, 1, 1)
    return share * x + (1 - share) * denoiser(x, t)


@dataclass(frozen=True)
class ConsistencyDistillation(ConsistencyObjective):
    """D(x_t, t) shall equal the stop-gradient D(x_r, r) of the same weights, with x_r one Euler step of the teacher from x_t.

    x_r = x_t + (r - t) (x_t - D_phi(x_t, t)) / t, D_phi the frozen teacher. Where r = 0 the target is x_r itself, which is then
    D_phi(x_t, t): a consistency function is the identity at level 0. All else, mapping, weighting and distance, is ECT's. Both
    share one minimiser as t - r goes to 0; at a finite gap a teacher's step has its own error, but less variance than noise.
    Source: Song et al., 2023, "Consistency models", algorithm 2, with the Euler solver.

    There is no fast form: the op `perturb` makes x_r from the image and the noise, and launches saved are small beside a third
    pass through a network. The networks run on the ops all the same.
    """

    wants_teacher = True

    def train_loss(
        self, denoiser: Denoiser, y: Tensor, normal: Tensor, eps: Tensor, stage: Tensor | int,
        teacher: Denoiser | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the loss [N] of clean images y [N, C, H, W] in [-1, 1], with t and r as ECT has them.

        teacher: the frozen network, a denoiser like the other. Raises ValueError without one.
        """
        if teacher is None:
            raise ValueError("consistency distillation needs a teacher, a denoiser")
        t = noise_level(normal, self.P_mean, self.P_std)
        r = self.mapping(t, stage)
        x_t = y + t.view(-1, 1, 1, 1) * eps
        with torch.no_grad():
            x_r = euler_step(teacher, x_t, t, r)
        return self.compare(denoiser, x_t, x_r, t, r, y)
