"""The arithmetic of a step, and where half precision begins and ends.

The signal of consistency tuning is a small difference of two large outputs, so rounding matters where they are formed: the
first convolution, the last norm and convolution, the preconditioning and the loss stay fp32, and so do the embedding, the
norms' parameters and the biases, which are small. Half precision is for the convolutions inside the residual blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ect.errors import UserError
from ect.models import EDMPrecond

FIRST_WITH_TF32 = 8  # major compute capability of the first GPUs with TF32 and bf16


@dataclass(frozen=True)
class Precision:
    """An arithmetic that --precision names.

    half: dtype of the blocks' activations and convolution weights (None: fp32). tf32: tensor cores for fp32 products.
    loss_scale: the first one, for gradients that fp16 would flush to zero; None: no scaling.
    """

    name: str
    half: torch.dtype | None = None
    tf32: bool = False
    loss_scale: float | None = None


PRECISIONS = {
    p.name: p
    for p in (
        Precision("fp32"),
        Precision("tf32", tf32=True),
        Precision("fp16", half=torch.float16, loss_scale=2.0**16),
        Precision("bf16", half=torch.bfloat16),
    )
}


def resolve(name: str, device: torch.device) -> Precision:
    """Return the Precision of a name; 'auto' is fp16 on a GPU and fp32 elsewhere.

    On a CPU fp16 and bf16 emulate a GPU's rounding. Raises UserError where the GPU has no such arithmetic, which it would
    emulate slowly (bf16) or leave out (TF32).
    """
    if name == "auto":
        name = "fp16" if device.type == "cuda" else "fp32"
    if name in ("bf16", "tf32") and device.type == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        if major < FIRST_WITH_TF32:
            raise UserError(
                f"--precision {name}: {torch.cuda.get_device_name(device)} (sm_{major}{minor}) has no {name}, which came with "
                f"sm_{FIRST_WITH_TF32}0; choose fp16 or fp32"
            )
    return PRECISIONS[name]


def round_weights(net: EDMPrecond, names: set[str], half: torch.dtype) -> None:
    """Put the named parameters in half precision, in place, and the activations of the blocks with them."""
    for name, p in net.named_parameters():
        if name in names:
            p.data = p.data.to(half)
    net.model.run_in(half)


def apply(precision: Precision) -> None:
    """Set torch's switches: TF32 products or true fp32 ones, half-precision sums in fp32, convolutions chosen by trial.

    The trial takes the fastest kernel at a convolution's first call. All that runs the step, benchmarks too, is set up here
    alone.
    """
    _allow_tf32(precision.tf32, precision.tf32)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


@contextmanager
def sampling(precision: Precision) -> Iterator[None]:
    """Let the block, in which images are made and rated, compute fp32 products in TF32, save where fp32 was asked for.

    An image does not need the digits that the training signal needs. What follows has the products of before again.
    """
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    tf32 = precision.name != "fp32"
    _allow_tf32(tf32, tf32)
    try:
        yield
    finally:
        _allow_tf32(*before)


def products(device: torch.device) -> str:
    """Say what the products of fp32 tensors are computed in, on `device`, as torch is set now: 'TF32' or 'fp32'."""
    if device.type != "cuda" or not (torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32):
        return "fp32"
    return "TF32" if torch.cuda.get_device_capability(device)[0] >= FIRST_WITH_TF32 else "fp32"


def _allow_tf32(convolutions: bool, matrices: bool) -> None:
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.backends.cuda.matmul.allow_tf32 = matrices
