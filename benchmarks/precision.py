"""The error of each arithmetic on the training signal D(x_t, t) - D(x_r, r), relative, with r/t = 1 - n(t)/256.

    python benchmarks/precision.py                       # the shipped digits model
    python benchmarks/precision.py checkpoint.safetensors --data.source datasets/cifar-10-python.tar.gz --samples 64
    python benchmarks/precision.py --check               # and exit 1 unless fp16 is at most 1.3 times TF32 at every t

Medians over images, against fp64 with the same weights, images, noise and dropout masks; the network is in train mode.
On a CPU the arithmetic is emulated: TF32 rounds the operands of convolutions and matrix products to 10 mantissa bits,
to nearest; the halves round weights and activations where a GPU stores them, and sum in fp32.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro
from lib.measure import header, reason
from lib.options import command, tyro_options
from rich.console import Console

from ect import models
from ect.config import FROM_1, IMAGES, DataConfig
from ect.cost import signal_noise
from ect.cost.signal_noise import LEVELS, differences, in_fp64, in_precision, relative_errors
from ect.data import Dataset, load
from ect.errors import UserError
from ect.files.checkpoint import load_model
from ect.models import EDMPrecond
from ect.models.layers import Conv2d
from ect.objective import Denoiser
from ect.precision import PRECISIONS, apply, round_weights
from ect.ranks import device
from ect.show.table import Table

DIGITS = Path(models.__file__).with_name("digits.safetensors")
BAR = 1.3
COMPARED = ("fp16, fp32 ends", "TF32 everywhere")
Row = dict[float, float]


@dataclass(frozen=True)
class Options:
    checkpoint: tyro.conf.Positional[Path] = DIGITS
    """A trained network: what python -m ect.sample takes."""
    data: DataConfig = field(default_factory=DataConfig)
    samples: Annotated[int, FROM_1, IMAGES] = 2000
    """The most images taken, all at every level. Over 500 images the ratios still move by 2 %, over all digits by 1 %."""
    device: str = "auto"
    check: bool = False
    """Exit 1 unless fp16's error is at most 1.3 times TF32's at every level."""
    markdown: bool = False
    """Print the table in Markdown."""


def all_in_fp16(net: EDMPrecond, labels: torch.Tensor | None = None) -> Denoiser:
    """Put both ends in fp16 as well: every convolution, and the network's input and output."""
    twin = copy.deepcopy(net)
    convolutions = {f"{name}.weight" for name, module in net.named_modules() if isinstance(module, Conv2d)}
    round_weights(twin, convolutions, torch.float16)
    twin.model.register_forward_pre_hook(lambda module, args: (args[0].half(), *args[1:]))
    return signal_noise.denoiser(twin, labels)


def measure(
    net: EDMPrecond, images: torch.Tensor, labels: torch.Tensor | None, names: Sequence[str] | None = None
) -> dict[str, Row]:
    """Return {arithmetic: {t: error}} of uint8 images [N, H, W, C], of all or of those named.

    An arithmetic that fails is left out and says so.
    """
    rows: dict[str, tuple[str, Callable[[], Denoiser]]] = {
        "TF32 everywhere": ("tf32", lambda: in_precision(net, "tf32", labels)),
        "fp16 everywhere": ("fp16", lambda: all_in_fp16(net, labels)),
        "fp16, fp32 ends": ("fp16", lambda: in_precision(net, "fp16", labels)),
        "bf16, fp32 ends": ("bf16", lambda: in_precision(net, "bf16", labels)),
        "fp32": ("fp32", lambda: in_precision(net, "fp32", labels)),
    }
    exact = differences(in_fp64(net, labels), images)
    found = {}
    for name in names or rows:
        precision, make = rows[name]
        apply(PRECISIONS[precision])
        try:
            found[name] = relative_errors(differences(make(), images), exact)
        except Exception as error:
            print(f"{name}: left out, {reason(error)}", file=sys.stderr, flush=True)
    return found


def worst(found: dict[str, Row]) -> tuple[float, float]:
    """Return (the largest ratio of fp16 with fp32 ends to TF32, its level)."""
    ours, tf32 = (found[name] for name in COMPARED)
    return max((ours[t] / tf32[t], t) for t in tf32)


def show(found: dict[str, Row], as_markdown: bool) -> None:
    headers = ["arithmetic", *(f"t = {t:g}" for t in LEVELS)]
    cells = [[name, *(f"{row[t]:.2g}" for t in LEVELS)] for name, row in found.items()]
    table = Table(headers, cells, "Relative error of D(x_t, t) - D(x_r, r), median over images")
    if as_markdown:
        print(table.markdown())
    else:
        Console(width=120).print(table)


def load_all(options: Options) -> tuple[EDMPrecond, Dataset]:
    """Return the network, on its device, and the data; raises UserError where they do not fit."""
    where = device.resolve(options.device)
    if where.type == "cpu":
        device.set_threads(1 if options.checkpoint == DIGITS else None)  # more threads slow so small a network down
    net, _ = load_model(options.checkpoint, device=where)
    dataset = load(options.data)
    classes = dataset.label_dim if net.label_dim else 0
    if (net.img_resolution, net.img_channels, net.label_dim) != (dataset.resolution, dataset.channels, classes):
        raise UserError(
            f"{options.checkpoint}: made for {net.img_channels} channel(s) of {net.img_resolution}x{net.img_resolution} and "
            f"{net.label_dim} classes, but --data.source {options.data.source} has {dataset.channels} of "
            f"{dataset.resolution}x{dataset.resolution} and {classes}; name the data it was trained on (with --data.labels)"
        )
    return net, dataset


@command
def main(args: Sequence[str] | None = None) -> int:
    options = tyro_options(Options, __doc__, args)
    net, dataset = load_all(options)
    where = next(net.parameters()).device
    images, labels = dataset.images[: options.samples].to(where), None
    if net.label_dim and dataset.labels is not None:
        labels = dataset.labels[: options.samples].to(where, torch.float32)
    arithmetic = "emulated" if where.type == "cpu" else "measured on the device"
    print(f"{options.checkpoint.name}, {len(images)} images of {dataset.name}, {arithmetic}; {header(where)}")
    found = measure(net, images, labels)
    show(found, options.markdown)
    if not found.keys() >= {*COMPARED}:
        print(f"- fp16 with fp32 ends is at most {BAR} times TF32: not decided, an arithmetic is missing")
        return 1
    ratio, level = worst(found)
    good = ratio <= BAR
    verdict = "holds" if good else "fails"
    print(f"- fp16 with fp32 ends is at most {BAR} times TF32: {verdict}, {ratio:.3f} times at t = {level:g}")
    return 0 if good or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
