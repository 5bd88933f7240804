"""DDPM++ and its denoiser in torch's own modules, written from the formulas alone: the network of the `public` row.

It shares no line with ect.models, and has the parameter names of the public checkpoints, so that one state dict fits both.
Sources: Song et al., 2021 (DDPM++); Karras et al., 2022 (EDM), table 1, with its factors for the sums of residual blocks. Where
the formulas leave a choice, the faster one is taken: biases are added inside the convolutions, and resampling by the filter
[1, 1] is pooling or repetition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALE = math.sqrt(0.5)


def norm(channels: int) -> nn.GroupNorm:
    """Return a group norm of min(32, C / 4) groups."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class Block(nn.Module):
    """A residual block, x [N, c_in, H, W] -> [N, c_out, H', W']; size: 'up' or 'down' before its first convolution."""

    def __init__(
        self, c_in: int, c_out: int, c_emb: int, dropout: float, *, size: str = "", attention: bool = False
    ) -> None:
        super().__init__()
        self.dropout, self.size, self.attention = dropout, size, attention
        self.norm0, self.conv0 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.affine = nn.Linear(c_emb, c_out)
        self.norm1, self.conv1 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if size or c_in != c_out else None
        if attention:
            self.norm2, self.qkv, self.proj = norm(c_out), nn.Conv2d(c_out, 3 * c_out, 1), nn.Conv2d(c_out, c_out, 1)

    def resize(self, x: Tensor) -> Tensor:
        match self.size:
            case "up":
                return F.interpolate(x, scale_factor=2.0, mode="nearest")
            case "down":
                return F.avg_pool2d(x, 2)
        return x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(self.resize(F.silu(self.norm0(x)))) + self.affine(emb)[:, :, None, None]
        h = F.dropout(F.silu(self.norm1(h)), self.dropout, training=self.training)
        x = (self.conv1(h) + (x if self.skip is None else self.skip(self.resize(x)))) * SCALE
        return (self.proj(self.attend(self.qkv(self.norm2(x)))) + x) * SCALE if self.attention else x

    def attend(self, qkv: Tensor) -> Tensor:
        """Attend with one head over the pixels, [N, 3C, H, W] -> [N, C, H, W]: two products and a softmax between them."""
        n, _, height, width = qkv.shape
        q, k, v = qkv.reshape(n, -1, 3, height * width).unbind(2)  # channels are packed c * 3 + {q, k, v}
        weight = torch.bmm(q.transpose(1, 2), k / math.sqrt(k.shape[1])).softmax(dim=2)
        return torch.bmm(v, weight.transpose(1, 2)).view(n, -1, height, width)


class DDPMpp(nn.Module):
    """F_x(x, noise label), [N, C, R, R] and [N] -> [N, C, R, R], unconditional."""

    frequencies: Tensor

    def __init__(
        self, img_resolution: int, channels: int, model_channels: int, channel_mult: Sequence[int], num_blocks: int,
        attn_resolutions: Sequence[int], dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        c_emb, half = 4 * model_channels, model_channels // 2
        self.register_buffer("frequencies", (1 / 10000) ** (torch.arange(half) / (half - 1)), persistent=False)
        self.map_layer0, self.map_layer1 = nn.Linear(model_channels, c_emb), nn.Linear(c_emb, c_emb)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        c, kept = model_channels, [model_channels]
        sizes = [img_resolution >> level for level in range(len(channel_mult))]
        for level, size in enumerate(sizes):
            if level == 0:
                self.enc[f"{size}x{size}_conv"] = nn.Conv2d(channels, c, 3, padding=1)
            else:
                self.enc[f"{size}x{size}_down"] = Block(c, c, c_emb, dropout, size="down")
                kept.append(c)
            for i in range(num_blocks):
                width, attention = model_channels * channel_mult[level], size in attn_resolutions
                self.enc[f"{size}x{size}_block{i}"] = Block(c, width, c_emb, dropout, attention=attention)
                c = width
                kept.append(c)
        for level, size in reversed(list(enumerate(sizes))):
            if level == len(sizes) - 1:
                self.dec[f"{size}x{size}_in0"] = Block(c, c, c_emb, dropout, attention=True)
                self.dec[f"{size}x{size}_in1"] = Block(c, c, c_emb, dropout)
            else:
                self.dec[f"{size}x{size}_up"] = Block(c, c, c_emb, dropout, size="up")
            for i in range(num_blocks + 1):
                width, attention = model_channels * channel_mult[level], i == num_blocks and size in attn_resolutions
                block = Block(c + kept.pop(), width, c_emb, dropout, attention=attention)
                self.dec[f"{size}x{size}_block{i}"], c = block, width
        self.dec[f"{img_resolution}x{img_resolution}_aux_norm"] = norm(c)
        self.dec[f"{img_resolution}x{img_resolution}_aux_conv"] = nn.Conv2d(c, channels, 3, padding=1)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        angles = torch.outer(label, self.frequencies)
        emb = torch.cat([angles.sin(), angles.cos()], dim=1)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        first, *encoder = self.enc.values()
        *decoder, last_norm, last = self.dec.values()
        kept = [first(x)]
        for block in encoder:
            kept.append(block(kept[-1], emb))
        h = kept[-1]
        for block in decoder:
            assert isinstance(block, Block)
            joins = h.shape[1] != block.norm0.num_channels
            h = block(torch.cat([h, kept.pop()], dim=1) if joins else h, emb)
        out: Tensor = last(F.silu(last_norm(h)))
        return out


class Denoiser(nn.Module):
    """D(x, t) = c_skip x + c_out F(c_in x, ln(t) / 4), with the coefficients that it has in training."""

    def __init__(self, model: DDPMpp, sigma_data: float) -> None:
        super().__init__()
        self.model, self.sigma_data = model, sigma_data

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        level, data = t.view(-1, 1, 1, 1), self.sigma_data
        total = level**2 + data**2
        F_x = self.model(x / total.sqrt(), t.log() / 4)
        out: Tensor = data**2 / total * x + level * data / total.sqrt() * F_x
        return out


def denoiser(kwargs: dict[str, Any], sigma_data: float, state: dict[str, Tensor]) -> Denoiser:
    """Make the denoiser that ect.models builds from the same keyword arguments, with the weights of its state dict.

    Raises ValueError where the architecture is another than unconditional DDPM++.
    """
    same = ("img_resolution", "model_channels", "channel_mult", "num_blocks", "attn_resolutions", "dropout")
    if kwargs["label_dim"] or kwargs["augment_dim"] or kwargs.get("encoder_type", "standard") != "standard":
        raise ValueError("the public step knows the unconditional DDPM++ alone")
    net = Denoiser(DDPMpp(channels=kwargs["in_channels"], **{name: kwargs[name] for name in same}), sigma_data)
    net.load_state_dict({name: value for name, value in state.items() if not name.endswith("resample_filter")})
    return net
