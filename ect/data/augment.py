"""Geometric augmentation whose parameters the network is told, so that its samples need not show them.

Karras et al. 2022 (arXiv 2206.00364), appendix F.2; the transformations are those of StyleGAN2-ADA (Karras et al. 2020,
arXiv 2006.06676, appendix B). Networks that EDM trained expect these nine labels, in this order.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import conv2d, conv_transpose2d, grid_sample, pad

from ect.errors import UserError

# Daubechies' least asymmetric wavelet with 6 vanishing moments. It is orthonormal over even shifts, so upsampling by it
# and then downsampling by its transpose gives the image back.
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
_CENTRE = 5  # the tap nearest to the filter's centroid (5.1): pixel i lies at sample 2i of the upsampled image

_SCALE_STD = 0.2  # of log2 of the scale and of the stretch
_SHIFT_STD = 0.125  # of the shift, in image sizes


class AugmentPipe(torch.nn.Module):
    """Flips, then scale, rotation, stretch and shift, each drawn with probability p; but the x flip is always drawn.

    Labels [n, 9], each 0 where its part was not drawn:
    0, 1  x flip and y flip: 0 or 1, equally likely once drawn
    2     w of the scale by 2^(0.2 w)
    3, 4  cos(a) - 1 and sin(a) of the rotation by a, counter-clockwise as seen
    5, 6  w cos(b) and w sin(b) of the stretch by 2^(0.2 w) along the axis at angle b and by 2^(-0.2 w) across it; half
          of the time b = 0
    7, 8  shift to the right and down, in units of 0.125 image sizes

    The only state is the resampling filter: move it to the images' device by `.to(device)`.
    Raises UserError unless 0 < p <= 1.
    """

    label_dim = 9
    uniforms = 8
    """Random numbers in [0, 1) needed for each image."""
    normals = 4
    """Standard normal random numbers needed for each image."""

    filter: torch.Tensor

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 < p <= 1:
            raise UserError(
                f"--data.augment {p}: expected a probability above 0 and at most 1 (EDM: 0.12), or 0 for none"
            )
        self.p = p
        self.register_buffer("filter", torch.tensor(SYM6), persistent=False)

    def forward(
        self, images: torch.Tensor, uniform: torch.Tensor, normal: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform float32 images [n, C, H, W] by the random numbers uniform [n, 8] and normal [n, 4].

        Returns the images [n, C, H, W] and the labels float32 [n, 9]. A pure function, row by row; no shape and no host
        read depends on the numbers, so a CUDA graph can hold it.
        """
        labels, inverse, shift = self.draw(uniform, normal)
        for column, axis in ((0, 3), (1, 2)):
            images = torch.where(labels[:, column, None, None, None] == 1, images.flip(axis), images)
        # Resampling leaves rounding errors of 1e-5 even by the identity: what does not move is passed on as is.
        still = (labels[:, 2:] == 0).all(1)[:, None, None, None]
        # In this order the result lies in memory as the images do, which is how the convolutions' weights lie.
        return torch.where(still, images, self.warp(images, inverse, shift)), labels

    def draw(self, uniform: torch.Tensor, normal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw labels [n, 9], and the geometry for `warp`: inverse [n, 2, 2], shift [n, 2] in image sizes."""
        u_x, u_y, u_scale, u_rotate, u_angle, u_stretch, u_axis, u_shift = uniform.float().unbind(1)
        w_scale, w_stretch, w_right, w_down = normal.float().unbind(1)
        w_scale = w_scale * (u_scale < self.p)
        a = math.pi * (1 - 2 * u_angle) * (u_rotate < self.p)
        w_stretch = w_stretch * (u_stretch < self.p)
        b = math.pi * (1 - 4 * u_axis) * (u_axis < 0.5)
        shift = torch.stack([w_right, w_down], 1) * (u_shift < self.p)[:, None]

        flips = [(u_x < 0.5).float(), (u_y < self.p / 2).float()]
        axis = [w_stretch * b.cos(), w_stretch * b.sin()]
        labels = torch.stack([*flips, w_scale, a.cos() - 1, a.sin(), *axis, *shift.unbind(1)], 1)
        return labels, _inverse(w_scale * _SCALE_STD, a, w_stretch * _SCALE_STD, b), shift * _SHIFT_STD

    def warp(self, images: torch.Tensor, inverse: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """Resample images [n, C, H, W]: what lies at x goes to inverse^-1 x + shift, measured from the image's centre.

        inverse: [n, 2, 2] over (right, down); shift: [n, 2] in widths and heights. Beyond its edges the image is
        continued by reflection for one size less a pixel (a fixed margin, hence no host read), then by 0. Sampling is
        bilinear at twice the resolution, between sym6 filters.
        """
        height, width = images.shape[2:]
        margin = [width - 1, width - 1, height - 1, height - 1]
        fine = self._upsample(pad(images, margin, mode="reflect"))
        x = _fine_positions(width, images.device) - width * shift[:, 0, None]
        y = _fine_positions(height, images.device) - height * shift[:, 1, None]
        x, y = x[:, None, :], y[:, :, None]
        (xx, xy), (yx, yy) = (row[..., None, None].unbind(1) for row in inverse.unbind(1))
        # Written out, not a matrix product: that might run in TF32, too coarse for coordinates. A point p pixels from
        # the centre is sample 2 p + 3 (size - 1) of the fine image, whose ends are -1 and 1 for grid_sample.
        grid = torch.stack(
            [(4 * (xx * x + xy * y) - 1) / (fine.shape[3] - 1), (4 * (yx * x + yy * y) - 1) / (fine.shape[2] - 1)], -1
        )
        return self._downsample(grid_sample(fine, grid, align_corners=True))

    def _upsample(self, images: torch.Tensor) -> torch.Tensor:
        """Upsample [n, C, H, W] -> [n, C, 2 H, 2 W]."""
        n, channels, height, width = images.shape
        x = images.reshape(n * channels, 1, height, width)
        x = conv_transpose2d(x, self.filter.view(1, 1, 1, -1), stride=(1, 2), padding=(0, _CENTRE))
        x = conv_transpose2d(x, self.filter.view(1, 1, -1, 1), stride=(2, 1), padding=(_CENTRE, 0))
        return x.view(n, channels, 2 * height, 2 * width)

    def _downsample(self, fine: torch.Tensor) -> torch.Tensor:
        """Downsample [n, C, 2 H + 10, 2 W + 10] -> [n, C, H, W]: upsampling transposed, whose taps need the margin of 10."""
        n, channels, height, width = fine.shape
        x = fine.reshape(n * channels, 1, height, width)
        x = conv2d(x, self.filter.view(1, 1, 1, -1), stride=(1, 2))
        x = conv2d(x, self.filter.view(1, 1, -1, 1), stride=(2, 1))
        return x.view(n, channels, *x.shape[2:])


def _inverse(log_scale: torch.Tensor, a: torch.Tensor, log_stretch: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return [n, 2, 2] that undo scaling by 2^log_scale, rotation by a and stretching by 2^log_stretch along angle b."""
    rotate = torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()], 1).view(-1, 2, 2) * (-log_scale).exp2()[:, None, None]
    along = torch.stack([b.cos(), -b.sin()], 1)
    across = log_stretch.exp2()
    # 1/k along the axis and k across: k I + (1/k - k) u u^T.
    projection = along[:, :, None] * along[:, None, :]
    stretch = across[:, None, None] * torch.eye(2, device=b.device) + (1 / across - across)[:, None, None] * projection
    return (rotate[:, :, :, None] * stretch[:, None, :, :]).sum(2)


def _fine_positions(size: int, device: torch.device) -> torch.Tensor:
    """Return where the samples that downsampling to `size` pixels reads lie: [2 size + 10], in pixels from the centre."""
    return (torch.arange(2 * size + len(SYM6) - 2, device=device) - _CENTRE) / 2 - (size - 1) / 2
