"""levels: the draws of training pairs that are one number an image, in one launch.

    z = philox.normal(seed, STREAM_T, n0, N, 1),  t = exp(P_mean + P_std z)
    r = max(t (1 - q^-(stage + 1) (1 + k sigmoid(-b t))), 0)                 k = 0: a gap that is a fixed share of t
    label_t = ln(t) / 4,  label_r likewise, with 1 for r where r = 0
    flip = philox.uniform(seed, STREAM_FLIP, n0, N, 1) < 1/2

A row with r = 0 has no teacher (its target is the image itself), so its label only has to be finite.
Source: Geng et al., "Consistency models made easy" (ECT, arXiv 2406.14548), section 3.2; labels: Karras et al., 2022 (EDM).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ect_kernels import native, philox
from ect_kernels.dispatch import Backend, Op
from ect_kernels.passes import Pass, backends
from ect_kernels.preconditioning import noise_label

DRAM = {"forward": "17 B an image: four fp32 numbers and a flag written"}


class Inputs(NamedTuple):
    """Arguments of the op."""

    seed: Tensor
    stage: Tensor
    n0: Tensor | None
    batch: int
    P_mean: float
    P_std: float
    q: float
    k: float
    b: float


class Output(NamedTuple):
    """Each [N], float32, but flip, bool: the images to mirror."""

    t: Tensor
    r: Tensor
    label_t: Tensor
    label_r: Tensor
    flip: Tensor


def _room(i: Inputs) -> Output:
    dtypes = (*[torch.float32] * 4, torch.bool)
    return Output(*(i.seed.new_empty(i.batch, dtype=dtype) for dtype in dtypes))


def noise_level(normal: Tensor, P_mean: float, P_std: float) -> Tensor:
    """Return t = exp(P_mean + P_std z) of standard normal numbers z of any shape."""
    return (P_mean + P_std * normal).exp()


def gap(t: Tensor, k: float, b: float) -> Tensor:
    """Return n(t) = 1 + k sigmoid(-b t), the shape of the gap t - r over t; 1 everywhere for k = 0."""
    return 1 + k * torch.sigmoid(-b * t)


def lower_level(t: Tensor, stage: Tensor | int, q: float, k: float, b: float) -> Tensor:
    """Return r = max(t (1 - q^-(stage + 1) n(t)), 0) in t's dtype, of levels t [N] > 0 and a stage >= 0.

    The stage is an int or a 0-d tensor.
    """
    power = torch.as_tensor(stage, dtype=torch.float64, device=t.device) + 1
    return (t * (1 - (q**-power).to(t.dtype) * gap(t, k, b))).clamp(min=0)


def reference_fwd(i: Inputs) -> Output:
    at = (i.n0, i.batch, 1, i.seed.device)
    t = noise_level(philox.normal(i.seed, philox.STREAM_T, *at).view(-1), i.P_mean, i.P_std)
    r = lower_level(t, i.stage, i.q, i.k, i.b)
    flip = philox.uniform(i.seed, philox.STREAM_FLIP, *at).view(-1) < 0.5
    return Output(t, r, noise_label(t), noise_label(torch.where(r > 0, r, torch.ones_like(r))), flip)


def _launcher(i: Inputs, out: Output) -> tuple[native.Argument, ...]:
    return i.seed, i.stage, i.n0, *out, *i[3:]


def _limits(i: Inputs) -> str | None:
    return "2^31 samples or more" if i.batch >= 2**31 else None


FORWARD = Pass("levels", "fwd", (Inputs,), _room, lambda i: (i,), _launcher)
OP = Op("levels", backends(Backend(reference_fwd), FORWARD, triton=_limits, cuda=_limits, native=_limits))
_forward_op = FORWARD.register(OP)


def levels(
    seed: Tensor, stage: Tensor, n0: Tensor | int, batch: int, P_mean: float, P_std: float, q: float, k: float, b: float,
    backend: str | None = None,
) -> Output:  # fmt: skip
    """Return (t, r, label_t, label_r, flip) by the formulas above, of the global samples n0 ... n0 + batch, without gradient.

    Args: seed, stage, n0 (also an int): 0-d int64 tensors on one device, stage >= 0. q > 1. Raises ValueError, BackendError.
    """
    for name, tensor in (("seed", seed), ("stage", stage)):
        if tensor.dtype != torch.int64 or tensor.numel() != 1 or tensor.device != seed.device:
            found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            raise ValueError(f"levels: {name} is {found}, expected a 0-d int64 tensor on {seed.device}")
    if batch < 1 or not q > 1:
        raise ValueError(f"levels: batch is {batch} and q is {q}, expected batch >= 1 and q > 1")
    first = philox.first_sample("levels", n0, seed.device)
    inputs = Inputs(seed, stage, first, batch, P_mean, P_std, q, k, b)
    return Output(*_forward_op(*inputs, backend or ""))
