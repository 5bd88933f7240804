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
from ect_kernels.rows import by_sample, split_columns
from ect_kernels.skip_product import pixels, skip_product
from torch import Tensor, nn

from ect.models.layers import Conv2d, GroupNorm, MaskKey, UNetBlock, sum_in_fp32


def wanted(choice: bool | None, x: Tensor) -> bool:
    """Whether a network runs on the ops: its own choice, else on a GPU or where a backend was asked for by name."""
    if choice is not None:
        return choice
    return x.is_cuda or dispatch.requested("group_norm_silu") is not None


class Pending(NamedTuple):
    """x = (a + bias + skip_bias + skip) * scale, not yet computed. Biases are [C] or rows [N, C]; absent parts are None.

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
            x = x if part is None else x + part[..., None, None]
        x = x if self.skip is None else x + self.skip
        return x if self.scale == 1.0 else x * self.scale


def norm_silu(
    norm: GroupNorm, x: Pending, dtype: torch.dtype, other: Tensor | None = None, act: bool = True,
    affine: Sequence[Tensor] | None = None, dx: bool = True, djoined: bool = True,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(x, act(norm(cat(x, other))), cat(x, other) or its stand-in) in `dtype`: the pending sum is computed on the way.

    affine: the norm's parameters, as rows. dx, djoined: whether the first and the last result will have a gradient."""
    gamma, beta = affine or (norm.weight, norm.bias)
    if x.skip is None and x.bias is None and other is None and x.scale == 1.0 and x.a.dtype == dtype:
        return x.a, group_norm_silu(x.a, gamma, beta, norm.groups, norm.eps, act=act), x.a
    return residual_group_norm_silu(
        x.a, gamma, beta, norm.groups, norm.eps,
        bias=x.bias, skip=x.skip, skip_bias=x.skip_bias, skip_scale=x.scale, other=other, act=act,
        dtype=dtype, joined=True, summed=x.summed, dx=dx, djoined=djoined,
    )  # fmt: skip


def image(rows: Tensor, like: Tensor) -> Tensor:
    """The image of these pixels, in the size of another."""
    n, _, h, w = like.shape
    return rows.view(n, h, w, -1).permute(0, 3, 1, 2)


def add_skip(layer: UNetBlock, h: Tensor, joined: Tensor, x: Tensor, other: Tensor, rows: dict[str, Tensor]) -> Pending:
    """The sum of a block's residual branch h, without its bias, and its skip convolution of cat(x, other), in one launch.

    joined: the stand-in that takes the gradient of cat(x, other)."""
    assert layer.skip is not None
    biases, scale = (layer.conv1.bias, layer.skip.bias), layer.style.skip_scale
    total = _AddSkip.apply(h, layer.skip.weight, joined, x.detach(), other.detach(), *biases, scale)
    return Pending(total, rows["conv1.bias"], None, rows["skip.bias"], scale, summed=True)


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


Rows = dict[str, Tensor]
"""Parameters of a layer by name, as rows for the norm ops."""


def spread(layers: Sequence[nn.Module], n: int) -> list[Rows]:
    """The vectors of each layer that norm ops take: parameters of norms, and biases of convolutions before them. One sum over
    the n samples gives the gradients of all."""
    names = [[name for name, _ in layer.named_parameters() if _to_a_norm(layer, name)] for layer in layers]
    pairs = [(layer, name) for layer, group in zip(layers, names, strict=True) for name in group]
    rows = iter(by_sample([layer.get_parameter(name) for layer, name in pairs], n))
    return [{name: next(rows) for name in group} for group in names]


def _to_a_norm(layer: nn.Module, name: str) -> bool:
    if isinstance(layer, UNetBlock):
        convolutions = ["conv1.bias", "skip.bias", "proj.bias"] + ["conv0.bias"] * layer.style.adaptive_scale
        return name.startswith("norm") or name in convolutions
    return isinstance(layer, GroupNorm) or name == "bias"


class Prepared(NamedTuple):
    """What a block takes beside images: see conditioning(), ordered_qkv() and spread()."""

    condition: tuple[Tensor, ...]
    qkv: Ordered | None
    rows: Rows

    def norm(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight and bias."""
        return self.rows[f"{name}.weight"], self.rows[f"{name}.bias"]


def prepare(blocks: Sequence[UNetBlock], emb: Tensor, rows: Sequence[Rows] | None = None) -> list[Prepared]:
    """For blocks with these noise embeddings [N, emb_channels]; rows: of each block, where there are more samples or layers."""
    qkv, rows = ordered_qkv(blocks), rows or spread(blocks, len(emb))
    together = zip(conditioning(blocks, emb), blocks, rows, strict=True)
    return [Prepared(condition, qkv.get(block.layer), own) for condition, block, own in together]


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
    columns = split_columns(rows, [block.out_channels for block in blocks for _ in range(parts)])
    return [columns[i : i + parts] for i in range(0, len(columns), parts)]


def block(
    layer: UNetBlock, x: Pending, prepared: Prepared, mask: MaskKey | None, other: Tensor | None, kept: bool = True
) -> tuple[Tensor, Pending]:
    """One residual block on cat(x, other): (x itself, now computed; the block's own pending output).

    kept: whether x itself will be used for more than its values."""
    scale, rows = layer.style.skip_scale, prepared.rows
    concatenated = layer.skip is None and other is not None
    x_, h, joined = norm_silu(
        layer.norm0,
        x,
        layer.dtype,
        other,
        affine=prepared.norm("norm0"),
        dx=kept or concatenated,
        djoined=not concatenated,
    )
    h = layer.conv0(h, bias=False)
    n, c = h.shape[:2]
    if layer.style.adaptive_scale:
        vectors: tuple[Tensor | None, ...] = (rows["conv0.bias"], *prepared.condition)
    else:
        vectors = (*prepared.condition, None, None)
    v, scales, shifts = (None if part is None else part.expand(n, c) for part in vectors)
    p, seed, n0 = (layer.dropout, mask.seed, mask.n0) if mask is not None else (0.0, None, 0)
    norm = layer.norm1
    h = group_norm_silu(
        h, *prepared.norm("norm1"), norm.groups, norm.eps,
        v=v, scale=scales, shift=shifts, p=p, seed=seed, layer=layer.layer, n0=n0,
    )  # fmt: skip
    h = layer.conv1(h, bias=False)
    if concatenated:
        assert other is not None
        out = Pending(h, rows["conv1.bias"], torch.cat([x_, other], dim=1), None, scale)  # `joined` has no data
    elif layer.skip is None:
        out = Pending(h, rows["conv1.bias"], joined, None, scale)
    elif other is None:
        out = Pending(h, rows["conv1.bias"], layer.skip(joined, bias=False), rows.get("skip.bias"), scale)
    else:
        out = add_skip(layer, h, joined, x_, other, rows)
    if layer.num_heads:
        _, h, joined = norm_silu(layer.norm2, out, layer.dtype, act=False, affine=prepared.norm("norm2"), dx=False)
        assert prepared.qkv is not None
        out = Pending(layer.proj(attention(layer, h, prepared.qkv), bias=False), rows["proj.bias"], joined, None, scale)
    return x_, out


def unet_blocks(net: nn.Module) -> list[UNetBlock]:
    """Blocks in the order of their numbers."""
    return [layer for layer in net.modules() if isinstance(layer, UNetBlock)]


def prepare_all(
    net: nn.Module, first: Conv2d, norms: Sequence[GroupNorm], emb: Tensor, n: int
) -> tuple[list[Prepared], Tensor, list[tuple[Tensor, Tensor]]]:
    """For n samples: prepare() of the blocks; as rows, the bias of the first convolution and the parameters of these norms."""
    blocks = unet_blocks(net)
    rows = spread([*blocks, first, *norms], n)
    prepared = prepare(blocks, emb, rows[: len(blocks)])
    return prepared, rows[len(blocks)]["bias"], [(r["weight"], r["bias"]) for r in rows[len(blocks) + 1 :]]


def song_unet(net, x: Tensor, emb: Tensor, mask: MaskKey | None) -> Tensor:  # type: ignore[no-untyped-def]
    """SongUNet.forward after the embedding."""
    convolution, norms = next(iter(net.enc.values())), [m for m in net.dec.values() if isinstance(m, GroupNorm)]
    prepared, first_bias, affines = prepare_all(net, convolution, norms, emb, len(x))
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
            pending = Pending(layer(x, bias=False), first_bias)
    assert pending is not None
    out: Tensor | None = None
    first, normed = True, x
    for name, layer in net.dec.items():
        if name.endswith("aux_up"):
            out = layer(out)
        elif name.endswith("aux_norm"):
            affine = affines.pop(0)
            value, normed, _ = norm_silu(layer, pending, x.dtype, affine=affine, dx=bool(affines), djoined=False)
            pending = Pending(value)
        elif name.endswith("aux_conv"):
            more = layer(normed)
            out = more if out is None else out + more
        else:
            other = None
            if pending.a.shape[1] != layer.in_channels:
                other = skips.pop()
            value, pending = block(layer, pending, prepared[layer.layer], mask, other, kept=first)
            if first:  # the decoder's first block computes the encoder's last output
                skips.append(value)
                first = False
    assert out is not None
    return out


def adm_unet(net, x: Tensor, emb: Tensor, mask: MaskKey | None) -> Tensor:  # type: ignore[no-untyped-def]
    """DhariwalUNet.forward after the embedding."""
    convolution = next(iter(net.enc.values()))
    prepared, first_bias, affines = prepare_all(net, convolution, [net.out_norm], emb, len(x))
    skips: list[Tensor] = []
    pending = Pending(x)
    for layer in net.enc.values():
        if isinstance(layer, UNetBlock):
            value, pending = block(layer, pending, prepared[layer.layer], mask, None)
            skips.append(value)
        else:
            pending = Pending(layer(x, bias=False), first_bias)
    for i, layer in enumerate(net.dec.values()):
        other = skips.pop() if pending.a.shape[1] != layer.in_channels else None
        value, pending = block(layer, pending, prepared[layer.layer], mask, other, kept=i == 0)
        if i == 0:
            skips.append(value)
    _, normed, _ = norm_silu(net.out_norm, pending, x.dtype, affine=affines[0], dx=False, djoined=False)
    return net.out_conv(normed)
