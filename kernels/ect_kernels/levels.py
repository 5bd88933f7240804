"""levels: from standard normal draws to the noise levels of training pairs and the U-Net's noise labels, in one launch.

    t = exp(P_mean + P_std normal)
    r = max(t (1 - q^-(stage + 1) (1 + k sigmoid(-b t))), 0)                 k = 0: a gap that is a fixed share of t
    label_t = ln(t) / 4,  label_r likewise, with 1 for r where r = 0

All [N], fp32. A row with r = 0 has no teacher (its target is the image itself), so its label only has to be finite.
Source: Geng et al., "Consistency models made easy" (ECT, arXiv 2406.14548), section 3.2; labels: Karras et al., 2022 (EDM).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ect_kernels import native
from ect_kernels.dispatch import Backend, Op
from ect_kernels.passes import Pass, backends


class Inputs(NamedTuple):
    """Arguments of the op: normal float32 [N], stage int64 0-d."""

    normal: Tensor
    stage: Tensor
    P_mean: float
    P_std: float
    q: float
    k: float
    b: float


class Output(NamedTuple):
    """Each [N]."""

    t: Tensor
    r: Tensor
    label_t: Tensor
    label_r: Tensor


def _room(i: Inputs) -> Output:
    return Output(*(torch.empty_like(i.normal, memory_format=torch.contiguous_format) for _ in range(4)))


def reference_fwd(i: Inputs) -> Output:
    t = (i.P_mean + i.P_std * i.normal).exp()
    decay = (i.q ** -(i.stage.double() + 1)).to(t.dtype)
    r = (t * (1 - decay * (1 + i.k * torch.sigmoid(-i.b * t)))).clamp(min=0)
    return Output(t, r, t.log() / 4, torch.where(r > 0, r, torch.ones_like(r)).log() / 4)


def _launcher(i: Inputs, out: Output) -> tuple[native.Argument, ...]:
    return i.normal, i.stage, *out, i.normal.numel(), i.P_mean, i.P_std, i.q, i.k, i.b


def _limits(i: Inputs) -> str | None:
    return None if i.normal.dtype == torch.float32 else f"draws of {i.normal.dtype}"


def _prepare(i: Inputs) -> tuple[Inputs]:
    return (i._replace(normal=i.normal.contiguous()),)


FORWARD = Pass("levels", "fwd", (Inputs,), _room, _prepare, _launcher)
OP = Op("levels", backends(Backend(reference_fwd), FORWARD, triton=_limits, cuda=_limits))
forward_op = FORWARD.register(OP)


def levels(
    normal: Tensor, stage: Tensor, P_mean: float, P_std: float, q: float, k: float, b: float, backend: str | None = None
) -> Output:
    """(t, r, label_t, label_r), formulas above, of draws [N] and a stage (int64, 0-d, >= 0). Nothing here has a gradient."""
    inputs = Inputs(normal, stage, P_mean, P_std, q, k, b)
    return Output(*forward_op(*inputs, OP.pick(normal.device, (inputs,), backend)))
