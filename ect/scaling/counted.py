"""The FLOPs of a network for an image, counted on the trace of an update and of an evaluation, in plain PyTorch and fp32."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ect.assembly import network_spec, objective_type
from ect.config import Config
from ect.cost.flops import flops
from ect.cost.memory import update_of
from ect.cost.trace import trace
from ect.data import AugmentPipe, Dataset

_IMAGES = 2  # of a traced update, whose arithmetic is divided by them: a batch of one might be computed otherwise


class Counted(NamedTuple):
    """The FLOPs of an image's share of an update, and of one evaluation; and the parameters."""

    update: float
    evaluation: float
    parameters: int


def spec_of(cfg: Config, dataset: Dataset) -> dict[str, Any]:
    """Return the description of the configured network. Raises UserError where it does not fit the data."""
    augment_dim = AugmentPipe.label_dim if cfg.data.augment > 0 else 0
    return network_spec(cfg.net, objective_type(cfg.objective).precond, dataset, augment_dim)


def of_an_image(cfg: Config, dataset: Dataset) -> Counted:
    """Count the FLOPs of a configured network, 2 a multiply-add of convolutions, matrix products and attention.

    An update's are those of its forward and backward passes, and of the forward pass of its target. Reads no images and
    allocates nothing. Raises UserError where the network does not fit the data.
    """
    few, cpu = replace(cfg, batch=_IMAGES, precision="fp32"), torch.device("cpu")
    net, _, step = update_of(few, spec_of(cfg, dataset), dataset, cpu, _IMAGES)
    update = _sum(step.update)
    x = torch.empty(_IMAGES, net.img_channels, net.img_resolution, net.img_resolution, device="meta")
    with torch.no_grad():
        evaluation = _sum(lambda: net.eval()(x, x[:, 0, 0, 0]))
    return Counted(update / _IMAGES, evaluation / _IMAGES, sum(p.numel() for p in net.parameters()))


def _sum(function: Callable[[], object]) -> float:
    """Return the FLOPs of a function, whose attention is a GPU's kernel: torch's formulas know no other."""
    return math.fsum(map(flops, trace(function, "cuda")))
