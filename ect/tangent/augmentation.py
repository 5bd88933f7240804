"""The augmentations whose strengths the features learn to tell: geometry, colour, blur, mixup and noise.

Source: Align Your Tangent (arXiv 2510.00658), with 7 geometric and 5 colour transformations, and these three. Geometry is that
of EDM's pipe (ect.data.augment), colour that of StyleGAN2-ADA (Karras et al. 2020, arXiv 2006.06676, appendix B).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from ect_kernels.consistency_loss import by_image
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from ect.data.augment import AugmentPipe

P = 0.15
"""The probability of each transformation, as published."""
_SHADES, _COLOURS = 5, 4  # labels beside those of the geometry, of all images and of RGB ones


def label_dim(channels: int) -> int:
    """Return how many labels images of so many channels get: 14 for grey ones, 18 for RGB."""
    return AugmentPipe.label_dim + _SHADES + (_COLOURS if channels == 3 else 0)


class Augmentation(nn.Module):
    """Each transformation with probability p, of a strength that is drawn for each image; grey images have none of colour.

    Labels, each 0 where its part was not drawn:
    0 ... 8  geometry, as AugmentPipe labels it; but an x flip is as likely as a y flip, p / 2
    9, 10    w of the brightness + 0.2 w, and of the contrast 2^(0.5 w)
    11       blur: the share of the mean of 3x3 pixels, 0 to 1
    12       mixup: the share of another image of the batch, 0 to 0.5
    13       noise: its standard deviation, in units of 0.5, 0 to 1
    14       luma flip: 0 or 1, equally likely once drawn; the grey part of each pixel is negated
    15, 16   cos(a) - 1 and sin(a) of the turn of the hue by a
    17       w of the saturation 2^w
    """

    def __init__(self) -> None:
        super().__init__()
        self.geometry = AugmentPipe(P)

    def forward(self, x: Tensor, p: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return float32 images [n, C, H, W] in [-1, 1], transformed, and their labels [n, label_dim(C)].

        generator: of the images' device; all draws are from it.
        """
        n = len(x)
        rows: dict[str, Any] = {"generator": generator, "device": x.device}

        def drawn(strength: Tensor) -> Tensor:
            return torch.where(torch.rand(n, **rows) < p, strength, 0)

        uniform, normal = torch.rand(n, AugmentPipe.uniforms, **rows), torch.randn(n, AugmentPipe.normals, **rows)
        uniform[:, 0] /= p  # by itself the pipe mirrors half of all images
        self.geometry.p = p
        x, labels = self.geometry(x, uniform, normal)
        more: list[Tensor] = []
        if x.shape[1] == 3:
            flip, turn = drawn((torch.rand(n, **rows) < 0.5).float()), drawn(torch.rand(n, **rows)) * 2 * math.pi
            saturation = drawn(torch.randn(n, **rows))
            x, more = colour(x, flip, turn, saturation), [flip, turn.cos() - 1, turn.sin(), saturation]
        brightness, contrast = drawn(torch.randn(n, **rows)), drawn(torch.randn(n, **rows))
        blur, mixup, noise = (drawn(torch.rand(n, **rows)) for _ in range(3))
        mixup = 0.5 * mixup
        x = x * by_image((0.5 * contrast).exp2()) + by_image(0.2 * brightness)
        x = torch.lerp(x, avg_pool2d(x, 3, 1, 1, count_include_pad=False), by_image(blur))
        x = torch.lerp(x, x.flip(0), by_image(mixup))
        x = x + by_image(0.5 * noise) * torch.randn(x.shape, **rows)
        return x, torch.cat([labels, torch.stack([brightness, contrast, blur, mixup, noise, *more], 1)], 1)


def colour(x: Tensor, flip: Tensor, turn: Tensor, saturation: Tensor) -> Tensor:
    """Return RGB images [n, 3, H, W] of which each pixel, a grey part plus the rest, is changed by the image's three numbers.

    flip: 1 negates the grey part, 0 keeps it. turn: the angle by which the rest is turned about the grey axis. saturation:
    log2 of the factor that stretches the rest. All [n].
    """
    grey = x.mean(1, keepdim=True)
    rest = x - grey
    across = (rest.roll(1, 1) - rest.roll(-1, 1)) / math.sqrt(3)  # the cross product of the axis and the rest
    rest = by_image(turn.cos()) * rest + by_image(turn.sin()) * across
    return by_image(1 - 2 * flip) * grey + by_image(saturation.exp2()) * rest
