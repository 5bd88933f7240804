"""Building blocks of the U-Nets, with the parameter names and initialisation of the public EDM checkpoints.

Sources: Karras et al., "Elucidating the design space of diffusion-based generative models" (EDM, 2022); Song et al., 2021
(DDPM++, NCSN++); Dhariwal & Nichol, 2021 (ADM).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from ect_kernels import philox
from torch import Tensor, nn


class MaskKey(NamedTuple):
    """The key of a pass's dropout masks, which are functions of it, layer and element: student and teacher share one."""

    seed: Tensor
    """int64, 0-d: changes every step."""
    n0: Tensor | int
    """Global index of the first sample of this micro-batch; a 0-d int64 tensor lets one compiled graph serve them all."""


class Init(NamedTuple):
    """Initialisation of a layer: uniform with the variance of `mode`, times a factor for weight and bias."""

    mode: str
    weight: float = 1.0
    bias: float = 0.0

    def draw(self, shape: Sequence[int], fan_in: int, fan_out: int) -> Tensor:
        match self.mode:
            case "xavier_uniform":
                return math.sqrt(6 / (fan_in + fan_out)) * (torch.rand(*shape) * 2 - 1)
            case "kaiming_uniform":
                return math.sqrt(3 / fan_in) * (torch.rand(*shape) * 2 - 1)
            case "kaiming_normal":
                return math.sqrt(1 / fan_in) * torch.randn(*shape)
        raise ValueError(f"unknown initialisation {self.mode!r}")

    def weight_(self, shape: Sequence[int], fan_in: int, fan_out: int) -> nn.Parameter:
        return nn.Parameter(self.draw(shape, fan_in, fan_out) * self.weight)

    def bias_(self, features: int, fan_in: int, fan_out: int) -> nn.Parameter:
        return nn.Parameter(self.draw([features], fan_in, fan_out) * self.bias)


def sum_in_fp32(product: Callable[..., Tensor], *factors: Tensor) -> Tensor:
    """Compute a product of tensors of one dtype; those in half precision are summed in fp32 and rounded once.

    Tensor cores do so by themselves. Elsewhere the factors are widened, so that a CPU computes what a GPU would.
    """
    if factors[0].dtype in (torch.float32, torch.float64) or factors[0].device.type != "cpu":
        return product(*factors)
    return product(*(f.float() for f in factors)).to(factors[0].dtype)


class Linear(nn.Module):
    """y = x W^T + b."""

    def __init__(self, in_features: int, out_features: int, init: Init, bias: bool = True) -> None:
        super().__init__()
        self.in_features = in_features
        self.weight = init.weight_([out_features, in_features], in_features, out_features)
        self.bias = init.bias_(out_features, in_features, out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Conv2d(nn.Module):
    """Convolution of odd size (0: none) with an optional 2x up- or downsampling by a separable filter before it.

    With filter_last and down, the filter and stride follow the convolution instead (the order NCSN++'s residual branch has).
    """

    resample_filter: Tensor | None

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, init: Init = Init("xavier_uniform"), *,
        up: bool = False, down: bool = False, resample_filter: Sequence[int] = (1, 1), filter_last: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_channels, self.out_channels, self.kernel = in_channels, out_channels, kernel
        self.up, self.down, self.filter_last = up, down, filter_last
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if kernel:
            fan_in, fan_out = in_channels * kernel**2, out_channels * kernel**2
            self.weight = init.weight_([out_channels, in_channels, kernel, kernel], fan_in, fan_out)
            self.bias = init.bias_(out_channels, fan_in, fan_out)
        taps = torch.as_tensor(resample_filter, dtype=torch.float32)
        self.box = len(resample_filter) == 2 and resample_filter[0] == resample_filter[1]
        taps = torch.outer(taps, taps)[None, None] / taps.sum() ** 2
        self.register_buffer("resample_filter", taps if up or down else None)

    def forward(self, x: Tensor, bias: bool = True) -> Tensor:
        """Convolve x [N, in_channels, H, W] to [N, out_channels, H', W']; bias=False leaves the bias to the caller."""
        if self.resample_filter is None:
            return self.convolve(x, bias)
        pad = (self.resample_filter.shape[-1] - 1) // 2
        if self.filter_last and self.down:
            x = self.convolve(x, bias, pad)  # the bias passes the filter unchanged: its taps sum to 1
            return self.resample(x, 0)
        return self.convolve(self.resample(x, pad), bias)

    def resample(self, x: Tensor, padding: int) -> Tensor:
        """Filter every channel of x [N, C, H, W], and halve the resolution, or double it."""
        assert self.resample_filter is not None
        if not self.box:
            return resample(x, self.resample_filter[0, 0].sum(0), self.up, padding)
        return doubled(x) if self.up else halved(x)

    def convolve(self, x: Tensor, bias: bool, extra_pad: int = 0) -> Tensor:
        """Apply the convolution alone, or return x itself where there is none.

        extra_pad: zeros on each side, beside those that keep the size.
        """
        if self.weight is None:
            return x
        padding = self.kernel // 2 + extra_pad
        if not bias or self.bias is None:
            return sum_in_fp32(lambda x, w: F.conv2d(x, w, padding=padding), x, self.weight)
        return sum_in_fp32(lambda x, w, b: F.conv2d(x, w, b, padding=padding), x, self.weight, self.bias.to(x.dtype))


class _Repeat(torch.autograd.Function):
    """Repetition of each pixel, [N, C, H, W] -> [N, C, 2H, 2W].

    The gradient is the sum of each four; torch.compile's own would scatter them into zeros, one by one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return F.avg_pool2d(dy, 2, divisor_override=1)


def doubled(x: Tensor) -> Tensor:
    """Return x [N, C, H, W] with each pixel repeated: [N, C, 2H, 2W]."""
    return sum_in_fp32(_Repeat.apply, x)


def halved(x: Tensor) -> Tensor:
    """Return the mean of each four pixels of x [N, C, H, W]: [N, C, H / 2, W / 2]."""
    return sum_in_fp32(lambda x: F.avg_pool2d(x, 2), x)


def resample(x: Tensor, taps: Tensor, up: bool = False, padding: int = 0) -> Tensor:
    """Filter every channel of x [N, C, H, W] by taps [k] along H and W, and halve the resolution, or with `up` double it.

    These are two matrix products in whichever memory order x has: a convolution of as many groups as channels would leave
    tensor cores unused, and most of a GPU.
    """
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    x = x.permute(0, 2, 3, 1) if channels_last else x
    for dim in (1, 2) if channels_last else (2, 3):
        before, size, after = x.shape[:dim], x.shape[dim], x.shape[dim + 1 :]
        if up:
            matrix = 2 * resampling(taps, 2 * size - 2 * padding + len(taps) - 2, padding).t()
        else:
            matrix = resampling(taps, size, padding)
        matrix = matrix.to(x.dtype)
        if after:
            matrices, rows = matrix.expand(before.numel(), -1, -1), x.reshape(before.numel(), size, after.numel())
            x = sum_in_fp32(torch.bmm, matrices, rows)
        else:
            x = sum_in_fp32(torch.mm, x.reshape(-1, size), matrix.t())
        x = x.view(*before, -1, *after)
    return x.permute(0, 3, 1, 2) if channels_last else x


def resampling(taps: Tensor, size: int, padding: int) -> Tensor:
    """Return a filter at stride 2 as the matrix [size / 2, size] that it multiplies `size` elements by.

    padding: zeros on either side of the elements.
    """
    padded = size + 2 * padding
    rows = (padded - len(taps)) // 2 + 1
    # A row is the one before, two places to the right: so lies a repeated sequence that is two longer than a row.
    sequence = F.pad(taps, (0, padded + 2 - len(taps))).repeat(rows)
    return sequence[: rows * padded].view(rows, padded)[:, padding : padding + size]


class GroupNorm(nn.Module):
    """Group normalisation over groups of at least four channels, at most 32 groups. Raises ValueError for other widths."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = max(min(32, channels // 4), 1), eps
        if channels % self.groups:
            raise ValueError(f"{channels} channels do not divide into {self.groups} groups of a norm")
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.groups, self.weight, self.bias, self.eps)


class BlockStyle(NamedTuple):
    """The choices inside a residual block in which DDPM++ and NCSN++ differ from ADM."""

    eps: float
    skip_scale: float
    adaptive_scale: bool
    """Noise embedding: scale and shift after the second norm (ADM), or an addition before it."""
    resample_proj: bool
    """1x1 convolution on the skip of an up- or downsampling block even when the width stays."""
    channels_per_head: int | None
    """None: one attention head."""
    init: Init
    init_zero: Init
    init_attn: Init
    resample_filter: tuple[int, ...] = (1, 1)


class UNetBlock(nn.Module):
    """Norm, SiLU, convolution, noise embedding, norm, SiLU, dropout, convolution, skip; then optional self-attention.

    `layer` is the block's number in its network: the dropout mask is a function of it.
    """

    def __init__(
        self, in_channels: int, out_channels: int, emb_channels: int, style: BlockStyle, *,
        layer: int, dropout: float, attention: bool = False, up: bool = False, down: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_channels, self.out_channels, self.style = in_channels, out_channels, style
        self.layer, self.dropout = layer, dropout
        per_head = style.channels_per_head or out_channels
        self.num_heads = out_channels // per_head if attention else 0
        if self.num_heads and out_channels % self.num_heads:
            raise ValueError(f"{out_channels} channels do not divide into {self.num_heads} heads of attention")
        taps = style.resample_filter
        self.norm0 = GroupNorm(in_channels, style.eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, style.init, up=up, down=down, resample_filter=taps)
        self.affine = Linear(emb_channels, out_channels * (2 if style.adaptive_scale else 1), style.init)
        self.norm1 = GroupNorm(out_channels, style.eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3, style.init_zero)
        self.skip = None
        if out_channels != in_channels or up or down:
            kernel = 1 if style.resample_proj or out_channels != in_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel, style.init, up=up, down=down, resample_filter=taps)
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, style.eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, 1, style.init_attn)
            self.proj = Conv2d(out_channels, out_channels, 1, style.init_zero)

    def forward(self, x: Tensor, emb: Tensor, mask: MaskKey | None) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        embedding = self.affine(emb)[:, :, None, None]
        if self.style.adaptive_scale:
            scale, shift = embedding.chunk(2, dim=1)
            h = F.silu(self.norm1(h) * (1 + scale) + shift)
        else:
            h = F.silu(self.norm1(h + embedding))
        if mask is not None and self.dropout > 0:
            h = philox.dropout(h, self.dropout, mask.seed, self.layer, mask.n0)
        x = (self.conv1(h) + (x if self.skip is None else self.skip(x))) * self.style.skip_scale
        if self.num_heads:
            x = (self.proj(self.attend(self.qkv(self.norm2(x)))) + x) * self.style.skip_scale
        return x

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations between the convolutions."""
        assert self.conv1.weight is not None
        return self.conv1.weight.dtype

    def attend(self, qkv: Tensor) -> Tensor:
        """Attend over the pixels: qkv [N, 3C, H, W] -> [N, C, H, W]. Channels are head-major, then c * 3 + {q, k, v}."""
        n, c3, h, w = qkv.shape
        packed = qkv.reshape(n, self.num_heads, c3 // 3 // self.num_heads, 3, h * w).transpose(2, 4)
        q, k, v = packed.unbind(dim=3)  # each [N, heads, H*W, C/heads]
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(2, 3).reshape(n, c3 // 3, h, w)


def blocks_of(net: nn.Module) -> list[UNetBlock]:
    """Return the residual blocks of a network, or of a part of it, in the order in which they were made."""
    if isinstance(net, UNetBlock):
        return [net]
    return [block for part in net.children() for block in blocks_of(part)]


def sinusoids(x: Tensor, frequencies: Tensor, sines_first: bool) -> Tensor:
    """Return cosines and sines [N, 2F] of x [N] times frequencies [F]: the cosines first, unless sines_first."""
    angles = torch.outer(x, frequencies)
    pair = (angles.sin(), angles.cos()) if sines_first else (angles.cos(), angles.sin())
    return torch.cat(pair, dim=1)


class PositionalEmbedding(nn.Module):
    """Sinusoids of the noise label, [N] -> [N, channels]: frequencies 10000^(-i/(C/2 - endpoint))."""

    frequencies: Tensor

    def __init__(self, channels: int, endpoint: bool, sines_first: bool = False) -> None:
        super().__init__()
        self.sines_first = sines_first
        half = channels // 2
        exponent = torch.arange(half, dtype=torch.float32) / (half - int(endpoint))
        self.register_buffer("frequencies", (1 / 10000) ** exponent, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return sinusoids(x, self.frequencies, self.sines_first)


class FourierEmbedding(nn.Module):
    """Random Fourier features of the noise label, [N] -> [N, channels]; the frequencies are a buffer."""

    freqs: Tensor

    def __init__(self, channels: int, scale: float = 16.0, sines_first: bool = False) -> None:
        super().__init__()
        self.sines_first = sines_first
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, x: Tensor) -> Tensor:
        return sinusoids(x, (2 * math.pi) * self.freqs, self.sines_first)


def drop_labels(class_labels: Tensor, p: float, mask: MaskKey | None) -> Tensor:
    """Set each whole row of labels [N, label_dim] to 0 with probability p, for classifier-free guidance; mask None: none."""
    if mask is None or p == 0:
        return class_labels
    n = class_labels.shape[0]
    u = philox.uniform(mask.seed, philox.STREAM_LABEL_DROPOUT, mask.n0, n, 1, class_labels.device)
    return class_labels * (u >= p).to(class_labels.dtype)


def default_mask(module: nn.Module, mask: MaskKey | None, device: torch.device) -> MaskKey | None:
    """Return the mask key of a forward pass: none in eval mode, the caller's, or one drawn from torch's global generator."""
    if not module.training:
        return None
    if mask is None:
        return MaskKey(torch.randint(2**63 - 1, (), device=device), 0)
    return mask
