"""scale_rows: y[n] = s[n] x[n] of images x, in one launch; dx[n] = s[n] dy[n]. The weights s have no gradient."""

from typing import Any, NamedTuple

import torch
from ect_kernels.dispatch import Backend, Op
from ect_kernels.passes import Pass
from ect_kernels.tensors import check_shapes
from torch import Tensor

DRAM = {"forward": "2s: x, y", "backward": "2s: dy, dx"}


class Inputs(NamedTuple):
    """Arguments of the op."""

    x: Tensor
    s: Tensor


class Output(NamedTuple):
    """Like x."""

    y: Tensor


class Saved(NamedTuple):
    """What the backward takes beside the arguments."""

    dy: Tensor


class Grads(NamedTuple):
    """Like x."""

    dx: Tensor


def empty_output(i: Inputs) -> Output:
    return Output(i.x.new_empty(i.x.shape))


def empty_grads(saved: Saved, i: Inputs) -> Grads:
    return Grads(i.x.new_empty(i.x.shape))


def reference_fwd(i: Inputs) -> Output:
    return Output(i.x * i.s.to(i.x.dtype).view(-1, 1, 1, 1))


def reference_bwd(saved: Saved, i: Inputs) -> Grads:
    return Grads(saved.dy * i.s.to(i.x.dtype).view(-1, 1, 1, 1))


FORWARD = Pass("scale_rows", "fwd", (Inputs,), empty_output, lambda *args: args)
BACKWARD = Pass("scale_rows", "bwd", (Saved, Inputs), empty_grads, lambda *args: args)
OP = Op("scale_rows", {"reference": Backend(reference_fwd, reference_bwd)})
forward_op, backward_op = FORWARD.register(OP), BACKWARD.register(OP)


class _ScaleRows(torch.autograd.Function):
    """The op with a gradient for x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, backend: str) -> Any:
        ctx.save_for_backward(x, s)
        ctx.backend = backend
        return forward_op(x, s, backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return backward_op(dy, *ctx.saved_tensors, ctx.backend), None, None


def scale_rows(x: Tensor, s: Tensor, backend: str | None = None) -> Tensor:
    """Return s[n] x[n] of x [N, C, H, W] and s [N], in x's dtype. Raises ValueError, dispatch.BackendError."""
    check_shapes("scale_rows", ("s", s, (len(x),)))
    y: Tensor = _ScaleRows.apply(x, s, backend or "")
    return y
