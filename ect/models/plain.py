"""The forward pass in PyTorch's own operations, layer by layer: what `ect.models.fused` is held equal to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ect.models.layers import Conv2d, GroupNorm, MaskKey, UNetBlock


class Plain:
    """A `Runner` whose activations are tensors (ect.models.unet has the meaning of its methods).

    emb: the blocks' conditioning vector. mask: the key of dropout, or None for none.
    """

    def __init__(self, emb: Tensor, mask: MaskKey | None) -> None:
        self.emb, self.mask = emb, mask

    def conv(self, layer: Conv2d, x: Tensor) -> Tensor:
        return layer(x)

    def block(self, layer: UNetBlock, x: Tensor, skip: Tensor | None = None) -> Tensor:
        return layer(x if skip is None else torch.cat([x, skip], dim=1), self.emb, self.mask)

    def norm_silu(self, norm: GroupNorm, x: Tensor) -> Tensor:
        return F.silu(norm(x))

    def keep(self, x: Tensor) -> Tensor:
        return x

    def value(self, x: Tensor) -> Tensor:
        return x

    def wrap(self, x: Tensor) -> Tensor:
        return x
