"""Preconditioning: a denoiser D_x(x, sigma) around a U-Net F_x (EDM, section 5 and table 1; ECT, section 3)."""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from ect_kernels.preconditioning import coefficients, noise_label
from torch import Tensor, nn

from ect.models.layers import MaskKey
from ect.models.unet import UNet


class EDMPrecond(nn.Module):
    """D_x = c_skip x + c_out F_x(c_in x, ln(sigma) / 4), in fp32, for data of standard deviation sigma_data.

    Call with x [N, C, R, R] and sigma a float, 0-d, [N] or [N, 1, 1, 1]; returns fp32 [N, C, R, R]. At sigma = 0 a sample is
    NaN (ln 0), and only that sample.
    """

    unet_name: ClassVar[str] = "model"
    """The U-Net's name in the network, with which those of all its parameters begin."""
    is_consistency: ClassVar[bool] = False
    """True of a consistency model, whose one evaluation leads to an image, and not to the mean of many."""

    def __init__(self, net: UNet, sigma_data: float = 0.5) -> None:
        super().__init__()
        setattr(self, self.unet_name, net)
        self.sigma_data = sigma_data

    @property
    def model(self) -> UNet:
        """The U-Net."""
        return cast(UNet, self._modules[self.unet_name])

    @property
    def runs_on_ops(self) -> bool | None:
        """The U-Net's `on_ops`: whether it runs on the ops of ect_kernels; None leaves it to the device."""
        return self.model.on_ops

    @property
    def is_edm(self) -> bool:
        """True where D_x is EDM's, as ect_kernels.consistency_loss has it: no subclass's own, not shifted as in eval mode."""
        return type(self) in PRECONDS.values() and self.shift() == 0

    @property
    def img_resolution(self) -> int:
        return self.model.img_resolution

    @property
    def img_channels(self) -> int:
        return self.model.out_channels

    @property
    def label_dim(self) -> int:
        return self.model.label_dim

    def half_weights(self) -> set[str]:
        """Name the parameters that a half-precision copy holds in half: the U-Net's own."""
        return {f"{self.unet_name}.{name}" for name in self.model.half_weights()}

    def shift(self) -> float:
        """Return what is subtracted from sigma in c_skip and in the numerator of c_out: here nothing."""
        return 0.0

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        mask: MaskKey | None = None,
    ) -> Tensor:
        x = x.to(torch.float32)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1, 1, 1, 1)
        if self.label_dim:
            if class_labels is None:  # the unconditional label, as label dropout trains it
                class_labels = x.new_zeros(1, self.label_dim)
            class_labels = class_labels.to(torch.float32).reshape(-1, self.label_dim)
        c_skip, c_out, c_in = coefficients(sigma, self.sigma_data, self.shift())
        c_noise = noise_label(sigma).flatten()
        F_x = self.model(c_in * x, c_noise, class_labels if self.label_dim else None, augment_labels, mask)
        return c_skip * x + c_out * F_x.to(torch.float32)


class ECMPrecond(EDMPrecond):
    """EDM's preconditioning while training; in eval mode shifted so that D_x(x, sigma_min) = x exactly."""

    is_consistency = True

    def __init__(self, net: UNet, sigma_data: float = 0.5, sigma_min: float = 0.003) -> None:
        super().__init__(net, sigma_data)
        self.sigma_min = sigma_min

    def shift(self) -> float:
        return 0.0 if self.training else self.sigma_min


class EDM2Precond(EDMPrecond):
    """EDM's preconditioning of an EDM2 network, whose checkpoints call the U-Net `unet`."""

    unet_name = "unet"


class ECM2Precond(EDM2Precond):
    """The same of a consistency model: ECT does not shift it in eval mode either."""

    is_consistency = True


PRECONDS: dict[str, type[EDMPrecond]] = {
    cls.__name__: cls for cls in (EDMPrecond, ECMPrecond, EDM2Precond, ECM2Precond)
}
"""The classes that a description of a network may name."""
