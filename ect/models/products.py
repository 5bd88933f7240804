"""The products of the fused pass whose gradients autograd would make with copies or sums of images.

They are a block's sum with its 1x1 skip convolution of two sources, and attention's q, k and v.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from ect_kernels.skip_product import pixels, skip_product
from torch import Tensor

from ect.models.layers import UNetBlock, sum_in_fp32


def to_image(rows: Tensor, like: Tensor) -> Tensor:
    """Return a view of pixels [N H W, C] as an image [N, C, H, W] of the size that `like` has."""
    n, _, h, w = like.shape
    return rows.view(n, h, w, -1).permute(0, 3, 1, 2)


def required(parameter: Tensor | None) -> Tensor:
    """Return a parameter that only other layers may lack."""
    assert parameter is not None
    return parameter


def add_skip(layer: UNetBlock, h: Tensor, joined: Tensor, x: Tensor, other: Tensor) -> Tensor:
    """Add a block's residual branch h, which lacks its bias, and its skip convolution of cat(x, other), in one launch.

    joined: the stand-in that takes the gradient of cat(x, other). The result has biases and scale in it, but takes the gradient
    of the unscaled sum, as the norm that reads a `summed` Pending gives it, with those of the biases.
    """
    assert layer.skip is not None
    biases, scale = (layer.conv1.bias, layer.skip.bias), layer.style.skip_scale
    total: Tensor = _AddSkip.apply(h, layer.skip.weight, joined, x.detach(), other.detach(), *biases, scale)
    return total


class _AddSkip(torch.autograd.Function):
    """The autograd form of add_skip, whose backward is one product for both sources."""

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
        djoined = to_image(sum_in_fp32(torch.mm, rows, weight.flatten(1)), da)
        return da, dweight, djoined, None, None, None, None, None


def product_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Write the product a b, or a batch of products, to the memory of `out`; halves are summed in fp32."""
    if out.dtype in (torch.float32, torch.float64) or out.device.type != "cpu":
        (out.addmm_ if out.dim() == 2 else out.baddbmm_)(a, b, beta=0)
    else:
        out.copy_(a.float() @ b.float())


class QKV(NamedTuple):
    """Weight [3C, C] and bias [3C] of a qkv convolution, first all of q, then k, then v; the checkpoints interleave them."""

    weight: Tensor
    bias: Tensor


@torch.no_grad()
def ordered_qkv(blocks: Sequence[UNetBlock]) -> dict[UNetBlock, QKV]:
    """Return {block: its QKV} of the blocks with attention, put in order by one copy for all blocks of a width."""
    ordered: dict[UNetBlock, QKV] = {}
    for c in {block.out_channels for block in blocks if block.num_heads}:
        group = [block for block in blocks if block.num_heads and block.out_channels == c]
        weights = torch.cat([required(block.qkv.weight).view(c, 3, c).transpose(0, 1) for block in group])
        biases = torch.cat([required(block.qkv.bias).view(c, 3).t() for block in group]).to(weights.dtype)
        pairs = zip(weights.reshape(-1, 3 * c, c), biases.reshape(-1, 3 * c), strict=True)
        ordered |= {block: QKV(*pair) for block, pair in zip(group, pairs, strict=True)}
    return ordered


class _ProjectQKV(torch.autograd.Function):
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
        dx = to_image(sum_in_fp32(torch.mm, rows.view(-1, 3 * c), ordered), x)
        # Written in the checkpoints' order; as_strided, because torch.compile copes with no transposed view here.
        dweight = rows.new_empty(ctx.shape)
        parts = dweight.as_strided((3, c, c), (c, 3 * c, 1))
        product_(parts, rows.permute(1, 2, 0), pixels(x).expand(3, -1, -1))
        dbias = rows.transpose(1, 2).sum(0, dtype=ctx.bias).flatten()
        return dx, dweight, dbias, None, None, None


def attention(layer: UNetBlock, x: Tensor, qkv: QKV) -> Tensor:
    """Attend over the pixels of x: [N, C, H, W] -> [N, C, H, W], before the projection. No copy of q, k or v is made."""
    parts = _ProjectQKV.apply(x, layer.qkv.weight, layer.qkv.bias, *qkv, layer.num_heads)
    out = sum_in_fp32(F.scaled_dot_product_attention, *(part.transpose(1, 2) for part in parts))
    return to_image(out.transpose(1, 2).reshape(-1, x.shape[1]), x)
