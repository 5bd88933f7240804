"""skip_product: the end of a decoder's residual block, whose skip path is a 1x1 convolution of two sources.

    out = (a + bias[c] + skip_bias[c] + x W[:, :C]^T + other W[:, C:]^T) * scale          over channels, at each pixel

One matrix product over both sources, never concatenated, with the sum as its epilogue: summed in fp32 and rounded once. Two
calls of a library would write the sum to memory, in half precision, before the second product and before the biases; that is
noise on the training signal. In single precision rounding is no matter: the library is called, whatever --kernels asks for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ect_kernels.dispatch import Backend, Op
from ect_kernels.passes import Pass
from ect_kernels.tensors import check_shapes, empty_image, nhwc, wide

HALVES = (torch.float16, torch.bfloat16)
DRAM = {"forward": "4s where all channel counts are equal: a, x, other, out (the weight stays in L2)"}


class Inputs(NamedTuple):
    """Arguments of the op."""

    a: Tensor
    weight: Tensor
    x: Tensor
    other: Tensor
    bias: Tensor | None
    skip_bias: Tensor | None
    scale: float


class Output(NamedTuple):
    """Channels-last [N, O, H, W] in a's dtype."""

    out: Tensor


def pixels(image: Tensor) -> Tensor:
    """Return [N H W, C] of an image, without a copy where it is channels-last."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def _room(i: Inputs) -> Output:
    return Output(empty_image(i.a, i.a.shape[1]))


def reference_fwd(i: Inputs) -> Output:
    dtype, out = wide(i.a), _room(i)
    left, right = i.weight.to(dtype).t().split([i.x.shape[1], i.other.shape[1]])
    into = pixels(out.out) if out.out.dtype == dtype else None
    total = torch.addmm(pixels(i.a).to(dtype), pixels(i.x).to(dtype), left, beta=i.scale, alpha=i.scale, out=into)
    total.addmm_(pixels(i.other).to(dtype), right, alpha=i.scale)
    for bias in (i.bias, i.skip_bias):
        total = total if bias is None else total.add_(bias.to(dtype), alpha=i.scale)
    if into is None:
        pixels(out.out).copy_(total)
    return out


def _prepare(i: Inputs) -> tuple[Inputs]:
    return (i._replace(a=nhwc(i.a), other=nhwc(i.other), x=nhwc(i.x), weight=i.weight.contiguous()),)


def _limits(i: Inputs) -> str | None:
    return None if i.a.dtype in HALVES else f"dtype {i.a.dtype} (only float16, bfloat16)"


FORWARD = Pass("skip_product", "fwd", (Inputs,), _room, _prepare)
OP = Op(
    "skip_product",
    {"reference": Backend(reference_fwd), "triton": Backend(FORWARD.compiled("triton"), limits=_limits)},
)
forward_op = FORWARD.register(OP)


def skip_product(
    a: Tensor, weight: Tensor, x: Tensor, other: Tensor, bias: Tensor | None = None, skip_bias: Tensor | None = None,
    scale: float = 1.0, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Return the sum above, channels-last [N, O, H, W] in a's dtype, without a gradient: ect.models.fused has the block's.

    Args: a: [N, O, H, W]. x: [N, C, H, W], other: [N, C2, H, W] and weight [O, C + C2], of a's dtype. bias, skip_bias:
    [O] of any float dtype. Raises ValueError for arguments that do not fit together, BackendError for a named backend
    that cannot run.
    """
    n, o, h, w = a.shape
    c, c2 = x.shape[1], other.shape[1]
    check_shapes(
        "skip_product", ("x", x, (n, c, h, w)), ("other", other, (n, c2, h, w)), ("weight", weight, (o, c + c2)),
        ("bias", bias, (o,)), ("skip_bias", skip_bias, (o,)),
    )  # fmt: skip
    for name, tensor in (("x", x), ("other", other), ("weight", weight)):
        if tensor.dtype != a.dtype:
            raise ValueError(f"skip_product: {name} is {tensor.dtype} but a is {a.dtype}; cast one of them")
    inputs = Inputs(a, weight, x, other, bias, skip_bias, scale)
    if backend is None and a.dtype not in HALVES:
        backend = "reference"
    out: Tensor = forward_op(*inputs, backend or "")
    return out
