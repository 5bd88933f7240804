"""A sampler that goes back to one noise level again and again."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ect.config import SIGMA_MAX
from ect.sampler import Denoiser


@dataclass(frozen=True)
class Restarts:
    """One step from sigma_max to an image, then `times` times: add noise at `level`, denoise. Fields go into results.json."""

    level: float
    times: int

    @property
    def name(self) -> str:
        return f"restarts, {self.times} times"

    @property
    def nfe(self) -> int:
        return 1 + self.times

    @property
    def noises(self) -> int:
        return self.times

    def __call__(self, denoiser: Denoiser, latents: Tensor, noises: Sequence[Tensor] | Tensor | None = None) -> Tensor:
        """Return images float64 [N, C, H, W] of unit normal latents [N, C, H, W] and noises[i], likewise."""
        if noises is None:
            noises = torch.randn(self.times, *latents.shape, device=latents.device)
        x = denoiser(SIGMA_MAX * latents, latents.new_full([len(latents)], SIGMA_MAX))
        for noise in noises:
            x = denoiser(x + self.level * noise, latents.new_full([len(latents)], self.level))
        return x.double()
