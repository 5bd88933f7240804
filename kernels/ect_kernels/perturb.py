"""perturb: from uint8 images to the inputs of student and teacher, and the noisy images their denoisers need.

    y = images / 127.5 - 1, mirrored left to right where flip[n]
    x_t = y + t[n] eps,  x_r = y + r[n] eps                                 fp32
    in_t = x_t / sqrt(t^2 + sigma_data^2),  in_r likewise with r            in `dtype`; with 1 for r where r = 0

eps is given or drawn: element j = (c H + h) W + w of sample n is philox.normal(seed, STREAM_EPS, n0, N, C H W)[n, j], from the
same uniform bits in every backend. A row with r = 0 has no teacher (its target is y), so in_r only has to be finite.
Source: Geng et al., "Consistency models made easy" (ECT, arXiv 2406.14548); c_in: Karras et al., 2022 (EDM), table 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ect_kernels import native, philox
from ect_kernels.dispatch import Backend, Op
from ect_kernels.passes import Pass, backends
from ect_kernels.preconditioning import coefficients
from ect_kernels.tensors import check_shapes, nhwc

DRAM = {"forward": "9 B + 2s a value: uint8 read, fp32 x_t, x_r and in_t, in_r written (4 B more where eps is given)"}
MAX_ROW = 8192  # values in a row of an image: what the CUDA kernel keeps in shared memory


class Inputs(NamedTuple):
    """Arguments of the op: seed and n0 None where eps is given, n0 None where it is 0."""

    images: Tensor
    t: Tensor
    r: Tensor
    seed: Tensor | None
    flip: Tensor | None
    eps: Tensor | None
    n0: Tensor | None
    sigma_data: float
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Size of the outputs: N, C, H, W."""
        n, h, w, c = self.images.shape
        return n, c, h, w


class Output(NamedTuple):
    """Channels-last [N, C, H, W]; in_t and in_r in `dtype`, x_t and x_r in t's dtype."""

    in_t: Tensor
    in_r: Tensor
    x_t: Tensor
    x_r: Tensor


def _output(i: Inputs) -> Output:
    """Return room for the results."""
    dtypes = (i.dtype, i.dtype, i.t.dtype, i.t.dtype)
    return Output(*(i.images.new_empty(i.shape, dtype=d).to(memory_format=torch.channels_last) for d in dtypes))


def reference_fwd(i: Inputs) -> Output:
    """Compute in t's dtype, fp32 or fp64."""
    n, wide = i.shape[0], i.t.dtype
    images = i.images if i.flip is None else torch.where(i.flip.view(n, 1, 1, 1), i.images.flip(2), i.images)
    y = images.permute(0, 3, 1, 2).to(wide) / 127.5 - 1
    eps = i.eps
    if eps is None:
        assert i.seed is not None
        eps = philox.normal(i.seed, philox.STREAM_EPS, i.n0, n, y[0].numel(), y.device).view(i.shape)
    out = _output(i)
    for sigma, x, scaled in ((i.t, out.x_t, out.in_t), (i.r, out.x_r, out.in_r)):
        x.copy_(y + sigma.view(n, 1, 1, 1) * eps.to(wide))
        _, _, c_in = coefficients(torch.where(sigma > 0, sigma, torch.ones_like(sigma)), i.sigma_data)
        scaled.copy_(x * c_in.view(n, 1, 1, 1))
    return out


def _limits(i: Inputs) -> str | None:
    if i.t.dtype != torch.float32 or i.dtype not in native.DTYPES:
        return f"t of {i.t.dtype} with dtype {i.dtype}"
    _, c, h, w = i.shape
    return "images of 2^28 values or more" if c * h * w >= 1 << 28 else None


def _cuda_limits(i: Inputs) -> str | None:
    _, c, _, w = i.shape
    return _limits(i) or (f"rows of more than {MAX_ROW} values" if w * c > MAX_ROW else None)


def _prepare(i: Inputs) -> tuple[Inputs]:
    images, t, r = (v.contiguous() for v in (i.images, i.t, i.r))
    flip = None if i.flip is None else i.flip.contiguous()
    eps = None if i.eps is None else nhwc(i.eps.to(i.t.dtype))
    return (i._replace(images=images, t=t, r=r, flip=flip, eps=eps),)


def _launcher(i: Inputs, out: Output) -> tuple[native.Argument, ...]:
    n, c, h, w = i.shape
    return *i[:7], *out, n, h, w, c, native.DTYPES[i.dtype], i.sigma_data


FORWARD = Pass("perturb", "fwd", (Inputs,), _output, _prepare, _launcher)
OP = Op("perturb", backends(Backend(reference_fwd), FORWARD, triton=_limits, cuda=_cuda_limits, native=_limits))
_forward_op = FORWARD.register(OP)


def perturb(
    images: Tensor, t: Tensor, r: Tensor, sigma_data: float, seed: Tensor | None, n0: Tensor | int = 0,
    flip: Tensor | None = None, eps: Tensor | None = None, dtype: torch.dtype = torch.float32, backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (in_t, in_r, x_t, x_r), channels-last [N, C, H, W]; formulas above. Nothing here has a gradient.

    Args: images: uint8 [N, H, W, C]. t, r: float32 [N], t > 0, r >= 0. sigma_data: standard deviation of the data. seed: 0-d
    int64 tensor on the images' device; n0: global number of images[0], also as such a tensor. flip: bool [N] or None. eps:
    [N, C, H, W], or None to draw it (seed is not read otherwise). dtype: of in_t and in_r. Raises ValueError,
    dispatch.BackendError.
    """
    if images.dim() != 4 or images.dtype != torch.uint8:
        raise ValueError(f"perturb: images are {images.dtype} {tuple(images.shape)}, expected uint8 [N, H, W, C]")
    n, h, w, c = images.shape
    check_shapes("perturb", ("t", t, (n,)), ("r", r, (n,)), ("flip", flip, (n,)), ("eps", eps, (n, c, h, w)))
    if r.dtype != t.dtype or t.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"perturb: t and r are {t.dtype} and {r.dtype}, expected float32")
    if flip is not None and flip.dtype != torch.bool:
        raise ValueError(f"perturb: flip is {flip.dtype}, expected bool")
    if eps is None and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(f"perturb: drawing eps needs a seed, a 0-d int64 tensor; found {seed}")
    key = (seed, philox.first_sample("perturb", n0, images.device)) if eps is None else (None, None)
    inputs = Inputs(images, t, r, key[0], flip, eps, key[1], sigma_data, dtype)
    in_t, in_r, x_t, x_r = _forward_op(*inputs, backend or "")
    return in_t, in_r, x_t, x_r
