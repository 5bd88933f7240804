"""The forward pass on the fused ops: the same function as `ect.models.plain`, with fewer passes over memory.

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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from ect_kernels import dispatch
from ect_kernels import group_norm_silu as norm
from ect_kernels import residual_group_norm_silu as seam
from ect_kernels.group_norm_silu import group_norm_silu
from ect_kernels.residual_group_norm_silu import residual_group_norm_silu
from ect_kernels.rows import by_sample, split_columns
from torch import Tensor, nn

from ect.models.layers import Conv2d, GroupNorm, MaskKey, UNetBlock
from ect.models.products import QKV, add_skip, attention, ordered_qkv, required

_NORMS = norm.OP, seam.OP


def wanted(choice: bool | None, x: Tensor) -> bool:
    """Say whether a network whose `UNet.on_ops` is `choice` runs on the ops of ect_kernels, on the device of x.

    Left open (None), it does where the norms have a compiled form: on a GPU, and on a CPU where C++ was built. It also does
    wherever a backend of any op was asked for by name. On a CPU torch.compile fuses PyTorch's own operations into less than
    calls of our ops cost it, so it gets these.
    """
    if choice is not None:
        return choice
    in_cpp = all("native" in op.candidates(x.device) for op in _NORMS) and not torch.compiler.is_compiling()
    return x.is_cuda or bool(dispatch.named()) or in_cpp


@dataclass(eq=False)
class Pending:
    """An activation between two layers: the sum (a + bias + skip_bias + skip) * scale until a norm computes it, then `a`.

    Biases are [C] or rows [N, C]; absent parts are None. summed: `a` has the other parts in it, but its gradient is still that
    of one term of the sum. kept: it is read again after the next norm, so its gradient does not come through that norm alone.
    spent: it was read by a norm and not kept.
    """

    a: Tensor
    bias: Tensor | None = None
    skip: Tensor | None = None
    skip_bias: Tensor | None = None
    scale: float = 1.0
    summed: bool = False
    kept: bool = False
    spent: bool = False

    @property
    def shape(self) -> torch.Size:
        return self.a.shape

    def settle(self, x: Tensor) -> None:
        """Replace the parts by x, which is their sum, computed: whoever holds this, as a skip connection does, now holds x."""
        self.a, self.bias, self.skip, self.skip_bias, self.scale, self.summed = x, None, None, None, 1.0, False
        self.spent, self.kept = not self.kept, False

    def check_unspent(self) -> None:
        """Raise RuntimeError where a second reader would lose its gradient, for want of a call of keep()."""
        if self.spent:
            raise RuntimeError("an activation is read a second time: call keep() on it before the first reader")

    def value(self, dtype: torch.dtype | None = None) -> Tensor:
        """Compute the sum [N, C, H, W] by plain operations, in `dtype` (None: that of its images)."""
        self.check_unspent()
        a = x = self.a if dtype is None else self.a.to(dtype)
        for part in (self.bias, self.skip_bias):
            x = x if part is None else x + part[..., None, None]
        x = x if self.skip is None else x + self.skip.to(x.dtype)
        x = x if self.scale == 1.0 else x * self.scale
        x = a.detach() + (x - x.detach()) if self.summed else x  # then `a` has the value, and x the gradient
        return x.to(a.dtype)


Rows = dict[str, Tensor]
"""Parameters of a layer by name, as rows [N, C] for the norm ops."""


class BlockInputs(NamedTuple):
    """The inputs of a block beside images: see conditioning(), ordered_qkv() and rows_of()."""

    condition: tuple[Tensor, ...]
    qkv: QKV | None
    rows: Rows

    def norm(self, name: str) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the norm of this name, as rows [N, C]."""
        return self.rows[f"{name}.weight"], self.rows[f"{name}.bias"]


class Fused:
    """A `Runner` whose activations are `Pending` (ect.models.unet has the meaning of its methods).

    blocks, layers: all that the pass will run, by block() and by conv() or norm_silu(). x: the network's input. emb: the
    blocks' conditioning vector, [N, emb_channels] or [1, emb_channels]. mask: the key of dropout, or None for none.
    """

    def __init__(
        self, blocks: Sequence[UNetBlock], layers: Sequence[Conv2d | GroupNorm], x: Tensor, emb: Tensor,
        mask: MaskKey | None,
    ) -> None:  # fmt: skip
        rows, qkv = rows_of([*blocks, *layers], len(x)), ordered_qkv(blocks)
        self.dtype, self.mask = x.dtype, mask
        self.blocks = {
            block: BlockInputs(condition, qkv.get(block), own)
            for block, condition, own in zip(blocks, conditioning(blocks, emb), rows, strict=False)
        }
        self.rows = dict(zip(layers, rows[len(blocks) :], strict=True))

    def conv(self, layer: Conv2d, x: Tensor) -> Pending:
        return Pending(layer(x, bias=False), self.rows[layer]["bias"])

    def norm_silu(self, norm: GroupNorm, x: Pending) -> Tensor:
        affine = self.rows[norm]["weight"], self.rows[norm]["bias"]
        value, normed, _ = read(x, norm, affine, self.dtype, dx=x.kept, djoined=False)
        x.settle(value)
        return normed

    def keep(self, x: Pending) -> Pending:
        x.kept = True
        return x

    def value(self, x: Pending) -> Tensor:
        return x.value(self.dtype)

    def wrap(self, x: Tensor) -> Pending:
        return Pending(x)

    def block(self, layer: UNetBlock, x: Pending, skip: Pending | None = None) -> Pending:
        inputs, scale = self.blocks[layer], layer.style.skip_scale
        rows, other = inputs.rows, None if skip is None else skip.value()
        concatenated = layer.skip is None and other is not None
        dx = x.kept or concatenated
        value, h, joined = read(
            x, layer.norm0, inputs.norm("norm0"), layer.dtype, other, dx=dx, djoined=not concatenated
        )
        x.settle(value)
        h = self.norm1(layer, layer.conv0(h, bias=False), inputs)
        h = layer.conv1(h, bias=False)
        if layer.skip is None and other is not None:
            out = Pending(h, rows["conv1.bias"], torch.cat([value, other], dim=1), None, scale)  # `joined` has no data
        elif layer.skip is None:
            out = Pending(h, rows["conv1.bias"], joined, None, scale)
        elif other is None:
            out = Pending(h, rows["conv1.bias"], layer.skip(joined, bias=False), rows.get("skip.bias"), scale)
        else:
            total = add_skip(layer, h, joined, value, other)
            out = Pending(total, rows["conv1.bias"], None, rows["skip.bias"], scale, summed=True)
        if layer.num_heads:
            assert inputs.qkv is not None
            _, h, joined = read(out, layer.norm2, inputs.norm("norm2"), layer.dtype, act=False, dx=False)
            h = layer.proj(attention(layer, h, inputs.qkv), bias=False)
            out = Pending(h, rows["proj.bias"], joined, None, scale)
        return out

    def norm1(self, layer: UNetBlock, h: Tensor, inputs: BlockInputs) -> Tensor:
        """Apply a block's second norm, with the embedding, SiLU and dropout, to h, which lacks the bias of conv0."""
        if layer.style.adaptive_scale:
            vectors: tuple[Tensor | None, ...] = (inputs.rows["conv0.bias"], *inputs.condition)
        else:
            vectors = (*inputs.condition, None, None)
        v, scale, shift = (None if part is None else part.expand(h.shape[:2]) for part in vectors)
        p, seed, n0 = (layer.dropout, self.mask.seed, self.mask.n0) if self.mask is not None else (0.0, None, 0)
        return group_norm_silu(
            h, *inputs.norm("norm1"), layer.norm1.groups, layer.norm1.eps,
            v=v, scale=scale, shift=shift, p=p, seed=seed, layer=layer.layer, n0=n0,
        )  # fmt: skip


def read(
    x: Pending, norm: GroupNorm, affine: tuple[Tensor, Tensor], dtype: torch.dtype, other: Tensor | None = None,
    act: bool = True, dx: bool = True, djoined: bool = True,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Compute a pending sum x on the way to a norm: (x, act(norm(cat(x, other))), cat(x, other) or its stand-in) in `dtype`.

    affine: the norm's weight and bias, as rows. act: SiLU, or none. dx, djoined: whether the first and the last result will
    have a gradient.
    """
    x.check_unspent()
    if x.skip is None and x.bias is None and other is None and x.scale == 1.0 and x.a.dtype == dtype:
        return x.a, group_norm_silu(x.a, *affine, norm.groups, norm.eps, act=act), x.a
    return residual_group_norm_silu(
        x.a, *affine, norm.groups, norm.eps,
        bias=x.bias, skip=x.skip, skip_bias=x.skip_bias, skip_scale=x.scale, other=other, act=act,
        dtype=dtype, joined=True, summed=x.summed, dx=dx, djoined=djoined,
    )  # fmt: skip


def rows_of(layers: Sequence[nn.Module], n: int) -> list[Rows]:
    """Return, for each layer, the vectors that norm ops take as rows [n, C]: norms' parameters, biases of convolutions before.

    One sum over the samples gives the gradients of all.
    """
    groups = [_to_norms(layer) for layer in layers]
    rows = iter(by_sample([vector for group in groups for vector in group.values()], n))
    return [dict(zip(group, rows, strict=False)) for group in groups]


def _to_norms(layer: nn.Module) -> Rows:
    """Return the vectors of a layer that norm ops take, by name."""
    if isinstance(layer, GroupNorm):
        return {"weight": layer.weight, "bias": layer.bias}
    if not isinstance(layer, UNetBlock):
        assert isinstance(layer, Conv2d)
        return {} if layer.bias is None else {"bias": layer.bias}
    norms, convolutions = {"norm0": layer.norm0, "norm1": layer.norm1}, {"conv1": layer.conv1}
    if layer.num_heads:
        norms["norm2"], convolutions["proj"] = layer.norm2, layer.proj
    if layer.style.adaptive_scale:
        convolutions["conv0"] = layer.conv0
    if layer.skip is not None:
        convolutions["skip"] = layer.skip
    found: Rows = {f"{name}.weight": norm.weight for name, norm in norms.items()}
    for name, part in (norms | convolutions).items():
        if part.bias is not None:
            found[f"{name}.bias"] = part.bias
    return found


def conditioning(blocks: Sequence[UNetBlock], emb: Tensor) -> list[tuple[Tensor, ...]]:
    """Compute what each block's second norm takes from the embedding, by one product for all.

    That is (scale, shift), or (v,), to which the bias of conv0 is added. Each is [N, C], or [1, C] where emb has one row.
    """
    if not blocks:
        return []
    adaptive = blocks[0].style.adaptive_scale
    biases = [required(block.affine.bias) for block in blocks]
    if not adaptive:
        biases += [required(block.conv0.bias) for block in blocks]
    bias = torch.cat(biases)
    bias = bias if adaptive else bias.view(2, -1).sum(0)
    rows = torch.addmm(bias, emb, torch.cat([block.affine.weight for block in blocks]).t())
    parts = 2 if adaptive else 1
    columns = split_columns(rows, [block.out_channels for block in blocks for _ in range(parts)])
    return [columns[i : i + parts] for i in range(0, len(columns), parts)]
