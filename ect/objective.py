"""What is learnt: noise levels, the mapping t -> r, weightings, and the consistency and diffusion objectives.

Everything here takes a denoiser, a callable (x [N, C, H, W], sigma [N]) -> D_x, not a network. Sources: Geng et al.,
"Consistency models made easy" (ECT, arXiv 2406.14548), sections 3 and 4; Karras et al., 2022 (EDM) for the diffusion loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
Weighting = Callable[[Tensor, Tensor, float], Tensor]

WEIGHTINGS: dict[str, Weighting] = {
    "inverse_gap": lambda t, r, sigma_data: 1 / (t - r),
    "inverse_c_out_sq": lambda t, r, sigma_data: 1 / t**2 + 1 / sigma_data**2,
    "inverse_t": lambda t, r, sigma_data: 1 / t,
    "inverse_t_sq": lambda t, r, sigma_data: 1 / t**2,
    "uniform": lambda t, r, sigma_data: torch.ones_like(t),
}


@dataclass(frozen=True)
class Mapping:
    """The smaller noise level r of a training pair (ECT, section 3.2): r = t (1 - n(t) / q^(stage + 1)), at least 0.

    kind 'sigmoid': n(t) = 1 + k sigmoid(-b t); kind 'const': n(t) = 1. The gap shrinks by q each stage.
    """

    kind: Literal["sigmoid", "const"] = "sigmoid"
    q: float = 2.0
    k: float = 8.0
    b: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("sigmoid", "const"):
            raise ValueError(f"mapping kind is {self.kind!r}; known: 'sigmoid', 'const'")
        if not self.q > 1:
            raise ValueError(f"mapping q is {self.q}; it divides the gap at each stage and must be greater than 1")

    def __call__(self, t: Tensor, stage: Tensor | int) -> Tensor:
        """t [N] > 0 and a stage (int or 0-d tensor, >= 0) -> r [N] with 0 <= r <= t, in t's dtype.

        r = t only where the gap q^-(stage + 1) is below the dtype's rounding (fp32: 2^-24)."""
        power = torch.as_tensor(stage, dtype=torch.float64, device=t.device) + 1
        decay = (self.q**-power).to(t.dtype)
        n = 1 + self.k * torch.sigmoid(-self.b * t) if self.kind == "sigmoid" else torch.ones_like(t)
        return (t * (1 - decay * n)).clamp(min=0)


def pseudo_huber(difference: Tensor, c: float) -> Tensor:
    """sqrt(||difference||^2 + c^2) - c per sample: [N, ...] -> [N]. Its gradient is 0 at distance 0, also for c = 0.

    Written as s / (sqrt(s + c^2) + c), which does not cancel for large c; the root never sees 0, whose slope is infinite.
    """
    s = difference.square().flatten(1).sum(1)
    radicand = s + c * c
    root = torch.where(radicand > 0, radicand, torch.ones_like(radicand)).sqrt()
    return s / (root + c)


@dataclass(frozen=True)
class ConsistencyObjective:
    """ECT: D(x_t, t) shall equal the stop-gradient D(x_r, r) of the same weights, noise and dropout mask.

    loss = w(t, r) (sqrt(||D_t - D_r||^2 + c^2) - c). Noise levels follow ln t ~ N(P_mean, P_std^2).
    """

    mapping: Mapping = Mapping()
    c: float = 0.0
    weighting: str = "inverse_gap"
    sigma_data: float = 0.5
    P_mean: float = -1.1
    P_std: float = 2.0

    def __post_init__(self) -> None:
        if not self.c >= 0:
            raise ValueError(f"pseudo-Huber c is {self.c}; it must be 0 (plain L2) or greater")
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting is {self.weighting!r}; known: {', '.join(WEIGHTINGS)}")

    def loss(
        self, denoiser: Denoiser, y: Tensor, t: Tensor, r: Tensor, eps: Tensor, *, share_rng: bool = True
    ) -> Tensor:
        """Per-sample loss [N] of clean images y [N, C, H, W] in [-1, 1], levels t > r >= 0 [N] and unit noise eps like y.

        Rows with r = 0 take y as their target (the teacher's answer there, D at sigma = 1, is discarded). share_rng makes
        both draw the same from torch's global generators; a denoiser that holds its dropout key itself does not need it.
        """
        teacher_r = torch.where(r > 0, r, torch.ones_like(r))
        x_r = y + r.view(-1, 1, 1, 1) * eps
        # The teacher goes first: what its pass may keep for a backward is gone before the student's begins.
        generators = torch.random.fork_rng([y.device] if y.device.type == "cuda" else [], enabled=share_rng)
        with torch.no_grad(), generators:
            D_r = denoiser(x_r, teacher_r)
            target = torch.where((r > 0).view(-1, 1, 1, 1), D_r, y.to(D_r.dtype))
        D_t = denoiser(y + t.view(-1, 1, 1, 1) * eps, t)
        return WEIGHTINGS[self.weighting](t, r, self.sigma_data) * pseudo_huber(D_t - target, self.c)

    def train_loss(self, denoiser: Denoiser, y: Tensor, normal: Tensor, eps: Tensor, stage: Tensor | int) -> Tensor:
        """Per-sample loss [N] with t = exp(P_mean + P_std normal), r by the mapping; the denoiser fixes its own mask."""
        t = (self.P_mean + self.P_std * normal).exp()
        return self.loss(denoiser, y, t, self.mapping(t, stage), eps, share_rng=False)


@dataclass(frozen=True)
class DiffusionObjective:
    """EDM's denoising loss, (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 |D(y + sigma eps, sigma) - y|^2."""

    sigma_data: float = 0.5
    P_mean: float = -1.2
    P_std: float = 1.2

    def loss(self, denoiser: Denoiser, y: Tensor, sigma: Tensor | float, eps: Tensor) -> Tensor:
        """Elementwise weighted squared error [N, C, H, W] of clean images y; sigma is a float, 0-d, [N] or [N, 1, 1, 1]."""
        sigma = torch.as_tensor(sigma, dtype=y.dtype, device=y.device).reshape(-1).expand(y.shape[0])
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        D = denoiser(y + sigma.view(-1, 1, 1, 1) * eps, sigma)
        return weight.view(-1, 1, 1, 1) * (D - y) ** 2

    def train_loss(self, denoiser: Denoiser, y: Tensor, normal: Tensor, eps: Tensor, stage: Tensor | int) -> Tensor:
        """Per-sample loss [N], summed over pixels, with sigma = exp(P_mean + P_std normal). The stage plays no role."""
        return self.loss(denoiser, y, (self.P_mean + self.P_std * normal).exp(), eps).flatten(1).sum(1)


Objective = ConsistencyObjective | DiffusionObjective
