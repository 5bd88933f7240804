"""Min-SNR weighting: Hang et al., 2023, "Efficient diffusion training via min-SNR weighting strategy"."""

from dataclasses import dataclass

from ect_kernels.levels import noise_level
from torch import Tensor

from ect.config import ObjectiveConfig
from ect.objective import Denoiser, Objective, register


@register("min_snr")
@dataclass(frozen=True)
class MinSNR(Objective):
    """min(1 / sigma^2, gamma) |D(y + sigma eps, sigma) - y|^2, with ln sigma ~ N(P_mean, P_std^2)."""

    gamma: float = 5.0
    P_mean: float = -1.2
    P_std: float = 1.2

    @classmethod
    def configured(cls, cfg: ObjectiveConfig, sigma_data: float) -> "MinSNR":
        return cls(P_mean=cfg.P_mean, P_std=cfg.P_std)

    def train_loss(self, denoiser: Denoiser, y: Tensor, normal: Tensor, eps: Tensor, stage: Tensor | int) -> Tensor:
        """Return the loss [N] of images y [N, C, H, W]; normal [N] and eps, like y, are standard normal."""
        sigma = noise_level(normal, self.P_mean, self.P_std)
        error = denoiser(y + sigma.view(-1, 1, 1, 1) * eps, sigma) - y
        return (1 / sigma**2).clamp(max=self.gamma) * error.square().flatten(1).sum(1)
