"""EDM2UNet: the magnitude-preserving U-Net of EDM2, configuration G, with the dropout that ECT gives it.

Source: Karras et al., 2024, "Analyzing and improving the training dynamics of diffusion models" (arXiv 2312.02696).
Every layer keeps the magnitude of what it is given, so there are no norms with parameters and no biases. A weight counts by
its direction alone, and training keeps its length at 1: `begin_step`. Factors of SiLU and sums ride on the weights of the
convolution beside them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from ect_kernels import philox
from torch import Tensor, nn

from ect.models.layers import MaskKey, default_mask, doubled, drop_labels, halved, sum_in_fp32
from ect.models.unet import UNet

SILU = 0.596
"""The magnitude of SiLU of standard normal numbers."""
DROPOUT_RESOLUTION = 16
"""ECT drops activations at this resolution and below (ect's recipes for ImageNet)."""
_SIZES = {"xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}
_PUBLIC = {"channel_mult": [1, 2, 3, 4], "num_blocks": 3, "attn_resolutions": [16, 8]}


class EDM2UNet(UNet):
    """EDM2's U-Net: F_x(x, noise_labels), [N, in_channels, R, R] -> [N, out_channels, R, R], R = img_resolution.

    Keyword arguments, parameter names and values are those of the public EDM2 checkpoints, whose `img_channels` stands for
    in_channels and out_channels. channel_mult_noise, channel_mult_emb: 0 for the first and the largest of channel_mult. The
    balances are the weight t of the second part in a sum ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2). bandwidth: standard
    deviation of the frequencies that a new network draws, in periods of ln(sigma) / 4; a checkpoint has its own.

    A pass in train mode first sets all weights to unit magnitude, in place; where `begin_step` is called before the passes of
    each update, that alone does it. Raises ValueError with augment_dim: this network has no such labels.
    """

    architectures: ClassVar[dict[str, dict[str, Any]]] = {
        "edm2": {},
        # For fewer than 64 channels and short runs: noise levels that are rarely seen get the embedding of those beside them.
        "edm2-narrow": {"channels_per_head": 16, "bandwidth": 0.25},
        **{f"edm2-{name}": {"model_channels": width, **_PUBLIC} for name, width in _SIZES.items()},
    }
    preconds: ClassVar[dict[str, str]] = {"EDMPrecond": "EDM2Precond", "ECMPrecond": "ECM2Precond"}
    takes_augment_labels: ClassVar[bool] = False

    def __init__(
        self,
        img_resolution: int,
        in_channels: int = 0,
        out_channels: int = 0,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int = 0,
        channel_mult_emb: int = 0,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        channels_per_head: int = 64,
        dropout: float = 0.0,
        label_dropout: float = 0.0,
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float = 256.0,
        bandwidth: float = 1.0,
        img_channels: int = 0,
    ) -> None:
        super().__init__(
            img_resolution, in_channels or img_channels, out_channels or img_channels, label_dim, augment_dim
        )
        if not self.in_channels or not self.out_channels:
            raise ValueError("neither img_channels nor in_channels and out_channels are given")
        if augment_dim:
            raise ValueError(f"augment_dim is {augment_dim}; EDM2 has no such labels: train it with --data.augment 0")
        self.label_dropout, self.label_balance, self.concat_balance = label_dropout, label_balance, concat_balance
        self.by_step = False
        widths = [model_channels * mult for mult in channel_mult]
        emb_channels = model_channels * (channel_mult_emb or max(channel_mult))
        noise_channels = model_channels * (channel_mult_noise or channel_mult[0])
        self.emb_fourier = MPFourier(noise_channels, bandwidth)
        self.emb_noise = MPConv(noise_channels, emb_channels)
        self.emb_label = MPConv(label_dim, emb_channels) if label_dim else None

        layers = 0

        def block(c_in: int, c_out: int, size: int, **options: Any) -> EDM2Block:
            nonlocal layers
            layers += 1
            return EDM2Block(
                c_in, c_out, emb_channels, channels_per_head=channels_per_head, layer=layers - 1,
                dropout=dropout if size <= DROPOUT_RESOLUTION else 0.0, res_balance=res_balance,
                attn_balance=attn_balance, clip=clip_act, **options,
            )  # fmt: skip

        sizes = [img_resolution >> level for level in range(len(widths))]
        self.enc, self.dec, skips, c = nn.ModuleDict(), nn.ModuleDict(), [], widths[0]
        for level, (size, width) in enumerate(zip(sizes, widths, strict=True)):
            if level == 0:
                self.enc[f"{size}x{size}_conv"] = MPConv(self.in_channels + 1, c, 3)
            else:
                self.enc[f"{size}x{size}_down"] = block(c, c, size, encodes=True, down=True)
            skips.append(c)
            for i in range(num_blocks):
                self.enc[f"{size}x{size}_block{i}"] = block(
                    c, width, size, encodes=True, attention=size in attn_resolutions
                )
                c = width
                skips.append(c)
        for level, (size, width) in reversed(list(enumerate(zip(sizes, widths, strict=True)))):
            if level == len(widths) - 1:
                self.dec[f"{size}x{size}_in0"] = block(c, c, size, attention=True)
                self.dec[f"{size}x{size}_in1"] = block(c, c, size)
            else:
                self.dec[f"{size}x{size}_up"] = block(c, c, size, up=True)
            for i in range(num_blocks + 1):
                c_in, attention = c + skips.pop(), size in attn_resolutions
                self.dec[f"{size}x{size}_block{i}"] = block(c_in, width, size, attention=attention)
                c = width
        self.out_conv = MPConv(c, self.out_channels, 3)
        self.out_gain = nn.Parameter(torch.zeros([]))

    @torch.no_grad()
    def begin_step(self) -> None:
        """Set all weights to unit magnitude, in place, and leave that to the caller from now on: passes no longer do it.

        Student and teacher of an update then see the same weights, and averages those that the optimizer made of them.
        """
        self.by_step = True
        self.normalize_weights()

    @torch.no_grad()
    def normalize_weights(self) -> None:
        """Set the weights of each output to unit magnitude, in place."""
        for layer in self.modules():
            if isinstance(layer, MPConv):
                layer.weight.copy_(normalize(layer.weight))

    def half_weights(self) -> set[str]:
        """Name no parameters: weights are normalised in fp32, and rounded to half where a convolution takes them."""
        return set()

    def embed(self, noise_labels: Tensor, class_labels: Tensor | None, mask: MaskKey | None) -> Tensor:
        """Return the conditioning vector of noise level and class: [N, emb_channels], or [1, emb_channels], never in half.

        Raises ValueError where a class-conditional network gets no class labels.
        """
        emb = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None:
            if class_labels is None:
                raise ValueError("this network is class-conditional: class_labels [N, label_dim] are required")
            labels = drop_labels(class_labels, self.label_dropout, mask)
            a, b = balanced(self.label_balance)
            emb = a * emb + b * self.emb_label(labels * math.sqrt(self.label_dim))
        return F.silu(emb) / SILU

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        mask: MaskKey | None = None,
    ) -> Tensor:
        """Return F_x as UNet.forward says.

        In half are the convolutions and attention of the blocks; the sums that they add to are not, for their rounding would be
        most of the noise on the signal (docs/precision.md).
        """
        if self.training and not self.by_step:
            self.normalize_weights()
        mask = default_mask(self, mask, x.device)
        emb = self.embed(noise_labels, class_labels, mask)
        half, skips = self.half_dtype or x.dtype, []
        h = F.pad(x, (0, 0, 0, 0, 0, 1), value=1.0)  # a channel of ones, in place of biases
        for layer in self.enc.values():
            h = layer(h, emb, mask, half) if isinstance(layer, EDM2Block) else layer(h)
            skips.append(h)
        for layer in self.dec.values():
            assert isinstance(layer, EDM2Block)
            if h.shape[1] != layer.in_channels:
                h = joined(h, skips.pop(), self.concat_balance, half)  # which convolutions alone read
            h = layer(h, emb, mask, half)
        return self.out_conv(h, self.out_gain)


class EDM2Block(nn.Module):
    """Resampling, SiLU, convolution, embedding, SiLU, dropout, convolution, sum with the skip; then optional self-attention.

    encodes: the 1x1 skip convolution comes first, and the pixels are then normalised; else it is the skip's alone. `layer` is
    the block's number in its network: the dropout mask is a function of it.
    """

    def __init__(
        self, in_channels: int, out_channels: int, emb_channels: int, *, channels_per_head: int, layer: int, dropout: float,
        res_balance: float, attn_balance: float, clip: float, encodes: bool = False, attention: bool = False,
        up: bool = False, down: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.encodes, self.up, self.down = encodes, up, down
        self.layer, self.dropout, self.clip = layer, dropout, clip
        self.res_balance, self.attn_balance = res_balance, attn_balance
        self.num_heads = out_channels // channels_per_head if attention else 0
        if self.num_heads and out_channels % self.num_heads:
            raise ValueError(f"{out_channels} channels do not divide into {self.num_heads} heads of attention")
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out_channels if encodes else in_channels, out_channels, 3)
        self.emb_linear = MPConv(emb_channels, out_channels)
        self.conv_res1 = MPConv(out_channels, out_channels, 3)
        self.conv_skip = MPConv(in_channels, out_channels, 1) if in_channels != out_channels else None
        if self.num_heads:
            self.attn_qkv = MPConv(out_channels, out_channels * 3, 1)
            self.attn_proj = MPConv(out_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor, mask: MaskKey | None, half: torch.dtype) -> Tensor:
        """Return the block of x [N, in_channels, H, W], in the dtype of emb; half: of what convolutions read and write."""
        wide = emb.dtype
        x = halved(x) if self.down else doubled(x) if self.up else x
        if self.conv_skip is not None and self.encodes:
            x = self.conv_skip(x.to(half)).to(wide)
        x = normalize(x, dim=[1]) if self.encodes else x
        scale = self.emb_linear(emb, self.emb_gain) + 1
        h = self.conv_res0(F.silu(x).to(half), 1 / SILU)
        h = F.silu(h * scale[:, :, None, None]).to(half)  # the scale is wide, and so is their product
        if mask is not None and self.dropout > 0:
            h = philox.dropout(h, self.dropout, mask.seed, self.layer, mask.n0)
        if self.conv_skip is not None and not self.encodes:
            x = self.conv_skip(x.to(half)).to(wide)
        a, b = balanced(self.res_balance)
        x = torch.add(self.conv_res1(h, b / SILU), x, alpha=a)
        if self.num_heads:
            a, b = balanced(self.attn_balance)
            x = torch.add(self.attn_proj(self.attend(x.to(half)), b), x, alpha=a)
        return x.clamp(-self.clip, self.clip)

    def attend(self, x: Tensor) -> Tensor:
        """Attend over the pixels of x, [N, C, H, W] -> [N, C, H, W], with q, k and v of unit magnitude."""
        n, c, height, width = x.shape
        rows = self.attn_qkv(x, heads=self.num_heads).permute(0, 2, 3, 1)
        rows = rows.reshape(n, height * width, 3, self.num_heads, c // self.num_heads)
        q, k, v = (part.transpose(1, 2) for part in normalize(rows, dim=[4]).unbind(2))
        out = sum_in_fp32(F.scaled_dot_product_attention, q, k, v)
        return out.transpose(1, 2).reshape(n, height, width, c).permute(0, 3, 1, 2)


class MPConv(nn.Module):
    """A convolution of odd size, or a product of vectors (kernel 0), by weights of unit magnitude; no bias."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *[kernel] * (2 if kernel else 0)))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0, heads: int | None = None) -> Tensor:
        """Return the product with x, times `gain`, in x's dtype.

        heads: of a convolution for q, k and v, whose outputs the checkpoints have head by head, each as c * 3 + {q, k, v}: here
        first all of q come out, head by head, then k and v.
        """
        w = self.weight * (gain / math.sqrt(self.weight[0].numel()) / magnitude(self.weight))
        w = w.to(x.dtype)
        if w.dim() == 2:
            return F.linear(x, w)
        if heads is not None:
            w = w.view(heads, -1, 3, w.shape[1]).permute(2, 0, 1, 3).reshape(w.shape)
        return sum_in_fp32(lambda x, w: F.conv2d(x, w, padding=w.shape[-1] // 2), x, w)


class MPFourier(nn.Module):
    """Random Fourier features of the noise label, [N] -> [N, channels], in its dtype; frequencies and phases are buffers."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int, bandwidth: float) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * bandwidth * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.outer(x, self.freqs) + self.phases).cos() * math.sqrt(2)


def magnitude(x: Tensor, dim: Sequence[int] | None = None) -> Tensor:
    """Return 1e-4 plus the root mean square of x over dimensions `dim` (None: all but the first), kept as 1; not in half."""
    dim = list(range(1, x.dim())) if dim is None else list(dim)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide)
    return 1e-4 + norm * math.sqrt(norm.numel() / x.numel())


def normalize(x: Tensor, dim: Sequence[int] | None = None) -> Tensor:
    """Return x divided by its magnitude over dimensions `dim` (None: all but the first), in its dtype."""
    return (x / magnitude(x, dim)).to(x.dtype)


def balanced(t: float) -> tuple[float, float]:
    """Return the weights of a and b in their sum of unit magnitude: 1 - t and t, divided by the root of their squares' sum."""
    size = math.hypot(1 - t, t)
    return (1 - t) / size, t / size


def joined(x: Tensor, skip: Tensor, t: float, dtype: torch.dtype) -> Tensor:
    """Return x and skip side by side on channels, weighted so that each adds (1 - t) and t to the magnitude of what follows."""
    n, m = x.shape[1], skip.shape[1]
    size = math.sqrt((n + m) / ((1 - t) ** 2 + t**2))
    parts = x * (size * (1 - t) / math.sqrt(n)), skip * (size * t / math.sqrt(m))
    return torch.cat([part.to(dtype) for part in parts], dim=1)
