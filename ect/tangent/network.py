"""The features phi: a small VGG-like network that tells the strengths of the augmentations of an image."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ect.tangent.augmentation import label_dim

WIDTHS = (32, 64, 128, 128)
"""Channels of the levels, each of which halves the image."""
COARSEST = 2  # pixels: no image of this side is halved
ROUNDING = 1e-5
"""The distance of two maps of a channel below which it counts little: fp32 rounding is not to weigh as a whole channel does."""
_M = TypeVar("_M", bound=nn.Module)


class Features(nn.Module):
    """Levels of two 3x3 convolutions with ReLU and a pool, then the mean over positions, and a linear layer for the labels.

    Args: side, channels: of its images, in [-1, 1]. norms: batch norm behind each convolution, for training; `folded` has none.
    Source: Align Your Tangent (arXiv 2510.00658), whose network is VGG16 with batch norm; this one is an order smaller.
    """

    def __init__(self, side: int, channels: int, norms: bool = False) -> None:
        super().__init__()
        self.side, self.channels = side, channels
        levels, width = [], channels
        for wide in WIDTHS:
            if side > COARSEST:
                levels.append(nn.Sequential(*_conv(width, wide, norms), *_conv(wide, wide, norms), nn.MaxPool2d(2)))
                side, width = side // 2, wide
        self.levels = nn.ModuleList(levels)
        self.labels = nn.Linear(width, label_dim(channels))

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return the pooled maps of images [N, C, H, W], one a level, and last the labels as [N, L, 1, 1]."""
        found = []
        for level in self.levels:
            x = level(x)
            found.append(x)
        return [*found, self.labels(x.mean((2, 3)))[..., None, None]]

    def forward(self, x: Tensor) -> Tensor:
        """Return the labels [N, L] that the augmentation of images [N, C, H, W] seems to have."""
        return self.maps(x)[-1].flatten(1)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Return d(a, b) [N]: over all maps and channels the sum of the L2 norm over positions of their difference.

        a, b: images [N, C, H, W]; b gets no gradient. The gradient in a is finite, and 0 where a is b.
        """
        with torch.no_grad():
            there = self.maps(b)
        squares = [(of_a - of_b).square().sum((2, 3)) for of_a, of_b in zip(self.maps(a), there, strict=True)]
        return (torch.cat(squares, 1) + ROUNDING**2).sqrt().sum(1)

    def folded(self) -> Features:
        """Return the same function in eval mode, frozen, with each norm made part of its convolution."""
        trained = self.eval()
        with torch.device("meta"):
            plain = Features(self.side, self.channels)
        layers = _all(trained, nn.Conv2d), _all(trained, nn.BatchNorm2d), _all(plain, nn.Conv2d)
        for conv, norm, into in zip(*layers, strict=True):
            into.load_state_dict(fuse_conv_bn_eval(conv, norm).state_dict(), assign=True)
        plain.labels.load_state_dict(trained.labels.state_dict(), assign=True)
        return plain.eval().requires_grad_(False)


def _conv(width: int, wide: int, norms: bool) -> list[nn.Module]:
    return [nn.Conv2d(width, wide, 3, padding=1), *([nn.BatchNorm2d(wide)] if norms else []), nn.ReLU()]


def _all(net: nn.Module, kind: type[_M]) -> list[_M]:
    return [module for module in net.modules() if isinstance(module, kind)]
