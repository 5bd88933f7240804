"""The U-Nets' forward pass on the fused ops: the same function as the plain forward, with fewer passes over memory.

Between layers the activation is `Pending`: the sum that a block ends with is not computed by itself, but by the next
norm, which reads its parts once and writes sum and normalised activation together (residual_group_norm_silu). The
decoder's concatenations are never made: the norm reads both sources, and a 1x1 skip convolution of a concatenation is
the sum of two matrix products. Convolution biases ride along: conv0's with the embedding, the others with the sum.

Where the blocks' convolution weights are in half precision, so is everything between the first convolution and the last
norm; those two, and what is a vector (embedding, biases, norm parameters), stay fp32 (ect.precision).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from ect_kernels import dispatch
from ect_kernels.group_norm_silu import group_norm_silu
from ect_kernels.residual_group_norm_silu import residual_group_norm_silu
from torch import Tensor

from ect.models.layers import Conv2d, GroupNorm, MaskKey, UNetBlock, sum_in_fp32


def wanted(choice: bool | None, x: Tensor) -> bool:
    """Whether a network runs on the ops: its own choice, else on a GPU or where a backend was asked for by name."""
    if choice is not None:
        return choice
    return x.is_cuda or dispatch.requested("group_norm_silu") is not None


class Pending(NamedTuple):
    """x = (a + bias + skip_bias + skip) * scale, not yet computed. Biases are [C]; absent parts are None."""

    a: Tensor
    bias: Tensor | None = None
    skip: Tensor | None = None
    skip_bias: Tensor | None = None
    scale: float = 1.0

    def to(self, dtype: torch.dtype) -> Pending:
        """The same sum with its images in another dtype."""
        return self._replace(a=self.a.to(dtype), skip=None if self.skip is None else self.skip.to(dtype))

    def value(self) -> Tensor:
        """x [N, C, H, W], by plain operations."""
        x = self.a
        for part in (self.bias, self.skip_bias):
            x = x if part is None else x + part.view(1, -1, 1, 1)
        x = x if self.skip is None else x + self.skip
        return x if self.scale == 1.0 else x * self.scale


def norm_silu(norm: GroupNorm, x: Pending, other: Tensor | None = None, act: bool = True) -> tuple[Tensor, Tensor]:
    """(x, act(norm(cat(x, other)))): the pending sum is computed on the way."""
    if x.skip is None and x.bias is None and other is None and x.scale == 1.0:
        return x.a, group_norm_silu(x.a, norm.weight, norm.bias, norm.groups, norm.eps, act=act)
    return residual_group_norm_silu(
        x.a, norm.weight, norm.bias, norm.groups, norm.eps,
        bias=x.bias, skip=x.skip, skip_bias=x.skip_bias, skip_scale=x.scale, other=other, act=act,
    )  # fmt: skip


def skip_sum(conv: Conv2d, x: Tensor, other: Tensor | None) -> Tensor:
    """The skip path without its bias; for a concatenation, two matrix products that accumulate into one output."""
    if other is None:
        return conv(x, bias=False)
    assert conv.weight is not None and conv.resample_filter is None and conv.kernel == 1
    n, c, h, w = x.shape
    weight = conv.weight.flatten(1)
    rows = sum_in_fp32(torch.mm, x.permute(0, 2, 3, 1).reshape(-1, c), weight[:, :c].t())
    others = other.permute(0, 2, 3, 1).reshape(-1, other.shape[1])
    rows = sum_in_fp32(torch.addmm, rows, others, weight[:, c:].t())
    return rows.view(n, h, w, -1).permute(0, 3, 1, 2)


def attention(layer: UNetBlock, x: Tensor) -> Tensor:
    """Self-attention over pixels, [N, C, H, W] -> [N, C, H, W] before the projection, without a copy of q, k or v.

    The checkpoints' qkv convolution interleaves the three; its small weight is put in order instead of its output.
    """
    n, c, h, w = x.shape
    qkv, size = layer.qkv, c // layer.num_heads
    assert qkv.weight is not None and qkv.bias is not None
    weight = qkv.weight.view(layer.num_heads, size, 3, c).permute(2, 0, 1, 3).reshape(3 * c, c)
    bias = qkv.bias.view(layer.num_heads, size, 3).permute(2, 0, 1).flatten().to(weight.dtype)
    rows = sum_in_fp32(torch.addmm, bias, x.permute(0, 2, 3, 1).reshape(-1, c), weight.t())
    q, k, v = rows.view(n, h * w, 3, layer.num_heads, size).permute(2, 0, 3, 1, 4).unbind()
    out = sum_in_fp32(F.scaled_dot_product_attention, q, k, v)
    return out.transpose(1, 2).reshape(n, h, w, c).permute(0, 3, 1, 2)


def block(
    layer: UNetBlock, x: Pending, emb: Tensor, mask: MaskKey | None, other: Tensor | None
) -> tuple[Tensor, Pending]:
    """One residual block on cat(x, other): (x itself, now computed; the block's own pending output)."""
    scale = layer.style.skip_scale
    x_, h = norm_silu(layer.norm0, x.to(layer.dtype), other)
    h = layer.conv0(h, bias=False)
    n, c = h.shape[:2]
    assert layer.conv0.bias is not None
    embedding = layer.affine(emb)
    if layer.style.adaptive_scale:
        scales, shifts = (part.expand(n, c) for part in embedding.chunk(2, dim=1))
        v = layer.conv0.bias.expand(n, c)
    else:
        scales, shifts, v = None, None, (embedding + layer.conv0.bias).expand(n, c)
    p, seed, n0 = (layer.dropout, mask.seed, mask.n0) if mask is not None else (0.0, None, 0)
    norm = layer.norm1
    h = group_norm_silu(
        h, norm.weight, norm.bias, norm.groups, norm.eps,
        v=v, scale=scales, shift=shifts, p=p, seed=seed, layer=layer.layer, n0=n0,
    )  # fmt: skip
    skip, skip_bias = x_, None
    if layer.skip is not None:
        skip, skip_bias = skip_sum(layer.skip, x_, other), layer.skip.bias
    out = Pending(layer.conv1(h, bias=False), layer.conv1.bias, skip, skip_bias, scale)
    if layer.num_heads:
        y, h = norm_silu(layer.norm2, out, act=False)
        out = Pending(layer.proj(attention(layer, h), bias=False), layer.proj.bias, y, None, scale)
    return x_, out


def song_unet(net, x: Tensor, emb: Tensor, mask: MaskKey | None) -> Tensor:  # type: ignore[no-untyped-def]
    """SongUNet.forward after the embedding."""
    skips: list[Tensor] = []
    aux = x
    pending: Pending | None = None  # output of the last encoder layer, appended to skips once it is computed
    for name, layer in net.enc.items():
        if name.endswith("aux_down"):
            aux = layer(aux)
        elif name.endswith(("aux_skip", "aux_residual")):
            assert pending is not None
            value = pending.to(aux.dtype).value() + layer(aux)
            if name.endswith("aux_residual"):
                value = aux = value / math.sqrt(2)
            pending = Pending(value)
        elif isinstance(layer, UNetBlock):
            assert pending is not None
            value, pending = block(layer, pending, emb, mask, None)
            skips.append(value)
        else:
            pending = Pending(layer(x, bias=False), layer.bias)
    assert pending is not None
    out: Tensor | None = None
    first, normed = True, x
    for name, layer in net.dec.items():
        if name.endswith("aux_up"):
            out = layer(out)
        elif name.endswith("aux_norm"):
            value, normed = norm_silu(layer, pending.to(x.dtype))
            pending = Pending(value)
        elif name.endswith("aux_conv"):
            image = layer(normed)
            out = image if out is None else out + image
        else:
            other = None
            if pending.a.shape[1] != layer.in_channels:
                other = skips.pop()
            value, pending = block(layer, pending, emb, mask, other)
            if first:  # the decoder's first block computes the encoder's last output
                skips.append(value)
                first = False
    assert out is not None
    return out


def adm_unet(net, x: Tensor, emb: Tensor, mask: MaskKey | None) -> Tensor:  # type: ignore[no-untyped-def]
    """DhariwalUNet.forward after the embedding."""
    skips: list[Tensor] = []
    pending = Pending(x)
    for layer in net.enc.values():
        if isinstance(layer, UNetBlock):
            value, pending = block(layer, pending, emb, mask, None)
            skips.append(value)
        else:
            pending = Pending(layer(x, bias=False), layer.bias)
    for i, layer in enumerate(net.dec.values()):
        other = skips.pop() if pending.a.shape[1] != layer.in_channels else None
        value, pending = block(layer, pending, emb, mask, other)
        if i == 0:
            skips.append(value)
    _, normed = norm_silu(net.out_norm, pending.to(x.dtype))
    return net.out_conv(normed)
