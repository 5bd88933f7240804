"""The price of rounding: the error that an arithmetic puts on the training signal, D(x_t, t) - D(x_r, r).

The signal is a small difference of two large outputs, so an output that is right to three digits may leave it with
none. Here it is computed for the same weights, images, noise and dropout masks in an arithmetic and in fp64, and
compared.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from ect_kernels.preconditioning import coefficients, noise_label
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from ect.data import Dataset
from ect.data.stream import to_float
from ect.models import EDMPrecond, MaskKey
from ect.objective import Denoiser, Mapping
from ect.precision import PRECISIONS, round_weights

LEVELS = (0.02, 0.1, 0.3, 1.0, 3.0, 10.0, 40.0)
TIGHTEST = Mapping("sigmoid", q=256.0)
"""r/t = 1 - n(t) / 256, where all recipes end and the signal is smallest."""
NOTE_IMAGES = 16
_SEED = 1


def signal_noise(
    net: EDMPrecond, precision: str, images: Tensor, labels: Tensor | None = None, *,
    levels: Sequence[float] = LEVELS, mapping: Mapping = TIGHTEST, stage: int = 0, against: torch.dtype = torch.float64,
) -> dict[float, float]:  # fmt: skip
    """Return {t: median over images of ||Delta - Delta_64|| / ||Delta_64||}, where Delta = D(x_t, t) - D(x_r, r)."""
    exact = differences(plain(net, labels, against), images, levels, mapping, stage)
    return relative_errors(differences(in_precision(net, precision, labels), images, levels, mapping, stage), exact)


def note(net: EDMPrecond, precision: str, dataset: Dataset) -> str:
    """Return what a precision costs on the first images of a data set, as a line for a run's log; net as for `signal_noise`."""
    device, labels = next(net.parameters()).device, dataset.labels
    images = dataset.images[:NOTE_IMAGES].to(device)
    labels = None if labels is None else labels[:NOTE_IMAGES].to(device, torch.float32)
    noise = signal_noise(net, precision, images, labels, against=torch.float32)
    found = ", ".join(f"{100 * error:.0f} % at t = {t:g}" for t, error in noise.items())
    return f"noise of {precision} on the signal D(x_t, t) - D(x_r, r) at its smallest: {found}"


@torch.no_grad()
def differences(
    net: Denoiser, images: Tensor, levels: Sequence[float] = LEVELS, mapping: Mapping = TIGHTEST, stage: int = 0
) -> dict[float, Tensor]:
    """Return {t: Delta [N, C, H, W] in fp64} of uint8 images [N, H, W, C]: the noise is the same at every level and call."""
    y = to_float(images)
    eps = torch.randn(y.shape, generator=torch.Generator().manual_seed(_SEED)).to(y.device)
    found = {}
    for level in levels:
        t = torch.full((len(y),), level, device=y.device)
        r = mapping(t, stage)
        if not bool((r > 0).all()):
            raise ValueError(f"level {level}: r is 0, where the target is the image itself; use a tighter stage")
        D_t, D_r = (net(y + s.view(-1, 1, 1, 1) * eps, s) for s in (t, r))
        found[level] = D_t.double() - D_r.double()
    return found


def relative_errors(found: dict[float, Tensor], exact: dict[float, Tensor]) -> dict[float, float]:
    """Return {t: median over samples of ||found - exact|| / ||exact||}."""

    def norm(x: Tensor) -> Tensor:
        return x.flatten(1).norm(dim=1)

    return {t: float((norm(found[t] - exact[t]) / norm(exact[t])).median()) for t in exact}


def in_precision(net: EDMPrecond, precision: str, labels: Tensor | None = None) -> Denoiser:
    """Return the denoiser of a copy of net that computes in this precision."""
    half, twin = PRECISIONS[precision].half, copy.deepcopy(net)
    if half is not None:
        round_weights(twin, net.half_weights(), half)
    emulate = precision == "tf32" and next(net.parameters()).device.type == "cpu"
    if emulate:
        twin.model.on_ops = False  # products inside of an op would stay fp32
    return denoiser(twin, labels, emulated_tf32 if emulate else contextlib.nullcontext)


def denoiser(
    net: EDMPrecond, labels: Tensor | None, arithmetic: Callable[[], Any] = contextlib.nullcontext
) -> Denoiser:
    """Return D(x, sigma) of net, with one dropout mask for all calls; net goes into train mode. arithmetic: opens a context."""
    net.train().model.begin_step()

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        with arithmetic():
            return net(x, sigma, labels, None, _mask(x))

    return denoise


def in_fp64(net: EDMPrecond, labels: Tensor | None = None) -> Denoiser:
    """Return the exact denoiser."""
    return plain(net, labels, torch.float64)


def plain(net: EDMPrecond, labels: Tensor | None, dtype: torch.dtype) -> Denoiser:
    """Compute the U-Net's plain forward and EDM's preconditioning of training, all in one dtype."""
    unet = copy.deepcopy(net.model)
    unet.begin_step()
    unet = unet.to(dtype).train()
    unet.on_ops = False
    sigma_data, label_dim = net.sigma_data, net.label_dim

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        x_, s = x.to(dtype), sigma.to(dtype)
        c_skip, c_out, c_in = coefficients(s.view(-1, 1, 1, 1), sigma_data)
        given = x_.new_zeros(1, label_dim) if labels is None else labels.to(dtype)
        F_x = unet(c_in * x_, noise_label(s), given if label_dim else None, None, _mask(x))
        return c_skip * x_ + c_out * F_x

    return denoise


def _mask(x: Tensor) -> MaskKey:
    return MaskKey(torch.full((), _SEED, dtype=torch.int64, device=x.device), 0)


_ATEN = torch.ops.aten
_PRODUCTS = {
    _ATEN.convolution.default: 2,
    _ATEN.addmm.default: 0,
    _ATEN.addmm_.default: 0,
    _ATEN.baddbmm.default: 0,
    _ATEN.mm.default: None,
    _ATEN.bmm.default: None,
}
"""Operations that tensor cores do, and the position of the argument that is added, not multiplied."""


class _RoundOperands(TorchDispatchMode):
    """Products of fp32 tensors see their operands rounded to TF32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            args = tuple(
                to_tf32(a) if isinstance(a, Tensor) and a.dtype == torch.float32 and i != _PRODUCTS[func] else a
                for i, a in enumerate(args)
            )
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def emulated_tf32() -> Iterator[None]:
    """Compute convolutions and matrix products of fp32 tensors in the block as tensor cores do them in TF32.

    Operands have 10 mantissa bits, sums are fp32. Attention is done by its plain formula, so that its two products are
    seen.
    """
    with _RoundOperands(), sdpa_kernel(SDPBackend.MATH):
        yield


def to_tf32(x: Tensor) -> Tensor:
    """Round fp32 to 10 mantissa bits, to nearest, ties away from zero (PTX cvt.rna.tf32)."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32).view(x.shape)
