"""DhariwalUNet: the ADM architecture of Dhariwal & Nichol (2021), as EDM reimplements it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ect.models.layers import (
    BlockStyle,
    Conv2d,
    GroupNorm,
    Init,
    Linear,
    MaskKey,
    PositionalEmbedding,
    UNetBlock,
    blocks_of,
    default_mask,
    drop_labels,
)  # fmt: skip
from ect.models.unet import UNet


class DhariwalUNet(UNet):
    """ADM's U-Net: F_x(x, noise_labels), [N, in_channels, R, R] -> [N, out_channels, R, R], R = img_resolution.

    Keyword arguments, parameter names and values are those of the public EDM checkpoints.
    """

    architectures: ClassVar[dict[str, dict[str, Any]]] = {"adm": {}}

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__(img_resolution, in_channels, out_channels, label_dim, augment_dim)
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        init = Init("kaiming_uniform", weight=math.sqrt(1 / 3), bias=math.sqrt(1 / 3))
        init_zero = Init("kaiming_uniform", weight=0.0, bias=0.0)
        style = BlockStyle(
            eps=1e-5, skip_scale=1.0, adaptive_scale=True, resample_proj=False, channels_per_head=64,
            init=init, init_zero=init_zero, init_attn=init,
        )  # fmt: skip
        self.map_noise = PositionalEmbedding(model_channels, endpoint=False)
        self.map_augment = Linear(augment_dim, model_channels, init_zero, bias=False) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels, init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init)
        label_init = Init("kaiming_normal", weight=math.sqrt(label_dim))
        self.map_label = Linear(label_dim, emb_channels, label_init, bias=False) if label_dim else None

        layers = 0

        def block(c_in: int, c_out: int, **options: bool) -> UNetBlock:
            nonlocal layers
            layers += 1
            return UNetBlock(c_in, c_out, emb_channels, style, layer=layers - 1, dropout=dropout, **options)

        widths = [model_channels * mult for mult in channel_mult]
        sizes = [img_resolution >> level for level in range(len(widths))]
        self.enc, self.dec, skips, c = nn.ModuleDict(), nn.ModuleDict(), [], widths[0]
        for level, (size, width) in enumerate(zip(sizes, widths, strict=True)):
            if level == 0:
                self.enc[f"{size}x{size}_conv"] = Conv2d(in_channels, c, 3, init)
            else:
                self.enc[f"{size}x{size}_down"] = block(c, c, down=True)
            skips.append(c)
            for i in range(num_blocks):
                self.enc[f"{size}x{size}_block{i}"] = block(c, width, attention=size in attn_resolutions)
                c = width
                skips.append(c)
        for level, (size, width) in reversed(list(enumerate(zip(sizes, widths, strict=True)))):
            if level == len(widths) - 1:
                self.dec[f"{size}x{size}_in0"] = block(c, c, attention=True)
                self.dec[f"{size}x{size}_in1"] = block(c, c)
            else:
                self.dec[f"{size}x{size}_up"] = block(c, c, up=True)
            for i in range(num_blocks + 1):
                self.dec[f"{size}x{size}_block{i}"] = block(c + skips.pop(), width, attention=size in attn_resolutions)
                c = width
        self.out_norm = GroupNorm(c, eps=1e-5)
        self.out_conv = Conv2d(c, out_channels, 3, init_zero)

    def embed(
        self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None, mask: MaskKey | None
    ) -> Tensor:
        """Return the conditioning vector of noise level, augmentation and class: [N, emb_channels], or [1, emb_channels].

        Raises ValueError where a class-conditional network gets no class labels.
        """
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            if class_labels is None:
                raise ValueError("this network is class-conditional: class_labels [N, label_dim] are required")
            emb = emb + self.map_label(drop_labels(class_labels, self.label_dropout, mask))
        return F.silu(emb)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        mask: MaskKey | None = None,
    ) -> Tensor:
        """Return F_x as UNet.forward says."""
        mask = default_mask(self, mask, x.device)
        emb = self.embed(noise_labels, class_labels, augment_labels, mask)
        first = self.enc[f"{self.img_resolution}x{self.img_resolution}_conv"]
        assert isinstance(first, Conv2d)
        run = self.runner(x, emb, mask, [first, self.out_norm])
        h = run.conv(first, x)
        skips = [run.keep(h)]
        for layer in blocks_of(self.enc):
            h = run.block(layer, h)
            skips.append(run.keep(h))
        for layer in blocks_of(self.dec):
            h = run.block(layer, h, skips.pop() if h.shape[1] != layer.in_channels else None)
        return self.out_conv(run.norm_silu(self.out_norm, h))
