"""The U-Nets' forward pass on the fused ops: the same function as the plain forward, with fewer passes over memory.

Between layers the activation is `Pending`: the sum that a block ends with is not computed by itself, but by the next
norm, which reads its parts once and writes sum and normalised activation together (residual_group_norm_silu). The
decoder's concatenations are never made: the norm reads both sources, and so does the 1x1 skip convolution of a
concatenation, a product that has the block's sum as its epilogue (skip_product). Its gradient is one product, which the
norm's backward adds to its own, so that autograd never sums images (`joined`). Convolution biases ride along: conv0's
with the embedding, the others with the sum.

Where the blocks' convolution weights are in half precision, so is everything between the first convolution and the last
norm; those two, and what is a vector (embedding, biases, norm parameters), stay fp32 (ect.precision).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from ect_kernels import dispatch
from ect_kernels.group_norm_silu import group_norm_silu
from ect_kernels.residual_group_norm_silu import residual_group_norm_silu
from ect_kernels.skip_product import pixels, skip_product
from torch import Tensor, nn

from ect.models.layers import GroupNorm, MaskKey, UNetBlock, sum_in_fp32


def wanted(choice: bool | None, x: Tensor) -> bool:
    """Whether a network runs on the ops: its own choice, else on a GPU or where a backend was asked for by name."""
    if choice is not None:
        return choice
    return x.is_cuda or dispatch.requested("group_norm_silu") is not None


class Pending(NamedTuple):
    """x = (a + bias + skip_bias + skip) * scale, not yet computed. Biases are [C]; absent parts are None.

    summed: it is computed, and is `a`, whose gradient is still that of one term of the sum.
    """

    a: Tensor
    bias: Tensor | None = None
    skip: Tensor | None = None
    skip_bias: Tensor | None = None
    scale: float = 1.0
    summed: bool = False

    def to(self, dtype: torch.dtype) -> Pending:
        """The same sum with its images in another dtype."""
        return self._replace(a=self.a.to(dtype), skip=None if self.skip is None else self.skip.to(dtype))

    def value(self) -> Tensor:
        """x [N, C, H, W], by plain operations."""
        assert not self.summed, "only a norm gives the gradient that this sum takes"
        x = self.a
        for part in (self.bias, self.skip_bias):
            x = x if part is None else x + part.view(1, -1, 1, 1)
        x = x if self.skip is None else x + self.skip
        return x if self.scale == 1.0 else x * self.scale


def norm_silu(
    norm: GroupNorm, x: Pending, dtype: torch.dtype, other: Tensor | None = None, act: bool = True
) -> tuple[Tensor, ...]:
    """(x, act(norm(cat(x, other))), cat(x, other) or its stand-in) in `dtype`: the pending sum is computed on the way."""
    if x.skip is None and x.bias is None and other is None and x.scale == 1.0 and x.a.dtype == dtype:
        return x.a, group_norm_silu(x.a, norm.weight, norm.bias, norm.groups, norm.eps, act=act), x.a
    return residual_group_norm_silu(
        x.a, norm.weight, norm.bias, norm.groups, norm.eps,
        bias=x.bias, skip=x.skip, skip_bias=x.skip_bias, skip_scale=x.scale, other=other, act=act,
        dtype=dtype, joined=True, summed=x.summed,
    )  # fmt: skip


def image(rows: Tensor, like: Tensor) -> Tensor:
    """The image of these pixels, in the size of another."""
    n, _, h, w = like.shape
    return rows.view(n, h, w, -1).permute(0, 3, 1, 2)


def add_skip(layer: UNetBlock, h: Tensor, joined: Tensor, x: Tensor, other: Tensor) -> Pending:
    """The sum of a block's residual branch h, without its bias, and its skip convolution of cat(x, other), in one launch.

    joined: the stand-in that takes the gradient of cat(x, other)."""
    assert layer.skip is not None
    biases, scale = (layer.conv1.bias, layer.skip.bias), layer.style.skip_scale
    total = _AddSkip.apply(h, layer.skip.weight, joined, x, other, *biases, scale)
    return Pending(total, biases[0], None, biases[1], scale, summed=True)


class _AddSkip(torch.autograd.Function):
    """add_skip, whose backward is one product for both sources. It takes the gradient of the unscaled sum: the norm that reads
    a Pending gives that, and those of the biases."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, joined: Tensor, x: Tensor, other: Tensor, bias: Tensor | None,
        skip_bias: Tensor | None, scale: float,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(weight, x, other)
        return skip_product(h, weight.flatten(1), x, other, bias, skip_bias, scale)

    @staticmethod
    def backward(ctx: Any, da: Tensor) -> tuple[Tensor | None, ...]:
        weight, x, other = ctx.saved_tensors
        rows, dweight = pixels(da), weight.new_empty(weight.shape)
        for source, part in zip((x, other), dweight.flatten(1).split([x.shape[1], other.shape[1]], 1), strict=True):
            product_(part, rows.t(), pixels(source))
        djoined = image(sum_in_fp32(torch.mm, rows, weight.flatten(1)), da)
        return da, dweight, djoined, None, None, None, None, None


def product_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a b in its memory, summed in fp32; also of batches."""
    if out.dtype in (torch.float32, torch.float64) or out.device.type != "cpu":
        (out.addmm_ if out.dim() == 2 else out.baddbmm_)(a, b, beta=0)
    else:
        out.copy_(a.float() @ b.float())


def given(parameter: Tensor | None) -> Tensor:
    """A parameter that is there."""
    assert parameter is not None
    return parameter


class Ordered(NamedTuple):
    """Weight [3C, C] and bias [3C] of a qkv convolution, first all of q, then k, then v; the checkpoints interleave them."""

    weight: Tensor
    bias: Tensor


@torch.no_grad()
def ordered_qkv(blocks: Sequence[UNetBlock]) -> dict[int, Ordered]:
    """By block number; one copy for all blocks of a width."""
    ordered: dict[int, Ordered] = {}
    for c in {block.out_channels for block in blocks if block.num_heads}:
        group = [block for block in blocks if block.num_heads and block.out_channels == c]
        weights = torch.cat([given(block.qkv.weight).view(c, 3, c).transpose(0, 1) for block in group])
        biases = torch.cat([given(block.qkv.bias).view(c, 3).t() for block in group]).to(weights.dtype)
        pairs = zip(weights.reshape(-1, 3 * c, c), biases.reshape(-1, 3 * c), strict=True)
        ordered |= {block.layer: Ordered(*pair) for block, pair in zip(group, pairs, strict=True)}
    return ordered


class _QKV(torch.autograd.Function):
    """q, k, v [N, H W, heads, C / heads] of x [N, C, H, W], by the ordered weights; gradients in the checkpoints' order."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, ordered: Tensor, ordered_bias: Tensor, heads: int
    ) -> tuple[Tensor, ...]:
        n, c, h, w = x.shape
        ctx.save_for_backward(x, ordered)
        ctx.shape, ctx.bias = weight.shape, bias.dtype
        rows = sum_in_fp32(torch.addmm, ordered_bias, pixels(x), ordered.t())
        return rows.view(n, h * w, 3, heads, c // heads).unbind(2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, ordered = ctx.saved_tensors
        c = x.shape[1]
        rows = torch.stack(grads, 2).view(-1, 3, c)
        dx = image(sum_in_fp32(torch.mm, rows.view(-1, 3 * c), ordered), x)
        # Written in the checkpoints' order; as_strided, because torch.compile copes with no transposed view here.
        dweight = rows.new_empty(ctx.shape)
        parts = dweight.as_strided((3, c, c), (c, 3 * c, 1))
        product_(parts, rows.permute(1, 2, 0), pixels(x).expand(3, -1, -1))
        dbias = rows.transpose(1, 2).sum(0, dtype=ctx.bias).flatten()
        return dx, dweight, dbias, None, None, None


def attention(layer: UNetBlock, x: Tensor, qkv: Ordered) -> Tensor:
    """Self-attention over pixels, [N, C, H, W] -> [N, C, H, W] before the projection, without a copy of q, k or v."""
    parts = _QKV.apply(x, layer.qkv.weight, layer.qkv.bias, *qkv, layer.num_heads)
    out = sum_in_fp32(F.scaled_dot_product_attention, *(part.transpose(1, 2) for part in parts))
    return image(out.transpose(1, 2).reshape(-1, x.shape[1]), x)


class Prepared(NamedTuple):
    """What a block takes beside images: see conditioning() and ordered_qkv()."""

    condition: tuple[Tensor, ...]
    qkv: Ordered | None


def prepare(blocks: Sequence[UNetBlock], emb: Tensor) -> list[Prepared]:
    """For blocks with these noise embeddings [N, emb_channels]."""
    qkv = ordered_qkv(blocks)
    return [Prepared(c, qkv.get(block.layer)) for c, block in zip(conditioning(blocks, emb), blocks, strict=True)]


def conditioning(blocks: Sequence[UNetBlock], emb: Tensor) -> list[tuple[Tensor, ...]]:
    """What each block's second norm takes from the embedding, by one product for all: (scale, shift), or (v,), to which the
    bias of conv0 is added. Each [N, C], or [1, C] where emb has one row."""
    adaptive = blocks[0].style.adaptive_scale
    biases = [given(block.affine.bias) for block in blocks]
    if not adaptive:
        biases += [given(block.conv0.bias) for block in blocks]
    bias = torch.cat(biases)
    bias = bias if adaptive else bias.view(2, -1).sum(0)
    rows = torch.addmm(bias, emb, torch.cat([block.affine.weight for block in blocks]).t())
    parts = 2 if adaptive else 1
    columns = rows.split([block.out_channels for block in blocks for _ in range(parts)], dim=1)
    return [columns[i : i + parts] for i in range(0, len(columns), parts)]


def block(
    layer: UNetBlock, x: Pending, prepared: Prepared, mask: MaskKey | None, other: Tensor | None
) -> tuple[Tensor, Pending]:
    """One residual block on cat(x, other): (x itself, now computed; the block's own pending output)."""
    scale = layer.style.skip_scale
    x_, h, joined = norm_silu(layer.norm0, x, layer.dtype, other)
    h = layer.conv0(h, bias=False)
    n, c = h.shape[:2]
    if layer.style.adaptive_scale:
        vectors: tuple[Tensor | None, ...] = (layer.conv0.bias, *prepared.condition)
    else:
        vectors = (*prepared.condition, None, None)
    v, scales, shifts = (None if part is None else part.expand(n, c) for part in vectors)
    p, seed, n0 = (layer.dropout, mask.seed, mask.n0) if mask is not None else (0.0, None, 0)
    norm = layer.norm1
    h = group_norm_silu(
        h, norm.weight, norm.bias, norm.groups, norm.eps,
        v=v, scale=scales, shift=shifts, p=p, seed=seed, layer=layer.layer, n0=n0,
    )  # fmt: skip
    h = layer.conv1(h, bias=False)
    if layer.skip is None:
        skip = joined if other is None else torch.cat([x_, other], dim=1)  # of two sources, `joined` has no data
        out = Pending(h, layer.conv1.bias, skip, None, scale)
    elif other is None:
        out = Pending(h, layer.conv1.bias, layer.skip(joined, bias=False), layer.skip.bias, scale)
    else:
        out = add_skip(layer, h, joined, x_, other)
    if layer.num_heads:
        _, h, joined = norm_silu(layer.norm2, out, layer.dtype, act=False)
        assert prepared.qkv is not None
        out = Pending(layer.proj(attention(layer, h, prepared.qkv), bias=False), layer.proj.bias, joined, None, scale)
    return x_, out


def unet_blocks(net: nn.Module) -> list[UNetBlock]:
    """Blocks in the order of their numbers."""
    return [layer for layer in net.modules() if isinstance(layer, UNetBlock)]


def song_unet(net, x: Tensor, emb: Tensor, mask: MaskKey | None) -> Tensor:  # type: ignore[no-untyped-def]
    """SongUNet.forward after the embedding."""
    prepared = prepare(unet_blocks(net), emb)
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
            value, pending = block(layer, pending, prepared[layer.layer], mask, None)
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
            value, normed, _ = norm_silu(layer, pending, x.dtype)
            pending = Pending(value)
        elif name.endswith("aux_conv"):
            more = layer(normed)
            out = more if out is None else out + more
        else:
            other = None
            if pending.a.shape[1] != layer.in_channels:
                other = skips.pop()
            value, pending = block(layer, pending, prepared[layer.layer], mask, other)
            if first:  # the decoder's first block computes the encoder's last output
                skips.append(value)
                first = False
    assert out is not None
    return out


def adm_unet(net, x: Tensor, emb: Tensor, mask: MaskKey | None) -> Tensor:  # type: ignore[no-untyped-def]
    """DhariwalUNet.forward after the embedding."""
    prepared = prepare(unet_blocks(net), emb)
    skips: list[Tensor] = []
    pending = Pending(x)
    for layer in net.enc.values():
        if isinstance(layer, UNetBlock):
            value, pending = block(layer, pending, prepared[layer.layer], mask, None)
            skips.append(value)
        else:
            pending = Pending(layer(x, bias=False), layer.bias)
    for i, layer in enumerate(net.dec.values()):
        other = skips.pop() if pending.a.shape[1] != layer.in_channels else None
        value, pending = block(layer, pending, prepared[layer.layer], mask, other)
        if i == 0:
            skips.append(value)
    _, normed, _ = norm_silu(net.out_norm, pending, x.dtype)
    return net.out_conv(normed)
