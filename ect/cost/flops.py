"""The arithmetic of an update, counted on its trace: 2 FLOPs a multiply-add, by torch.utils.flop_counter's formulas.

Convolutions, matrix products and attention are counted; what multiplies element by element is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from ect.assembly import flat_state, frozen, network_spec, objective_type, train_step
from ect.config import Config
from ect.cost.trace import Event, TensorMeta, trace
from ect.data import AugmentPipe, Dataset, ImageStream
from ect.models import build
from ect.tangent.network import Features

_IMAGES = 2  # of a traced update, whose arithmetic is divided by them: a batch of one might be computed otherwise


def flop_formula(func: Any) -> Any:
    """Return torch's formula of an operation that multiplies, None for others; one that writes in place has its twin's."""
    name = func.overloadpacket.__name__
    twin = getattr(torch.ops.aten, name.removesuffix("_"), None) if func.namespace == "aten" else None
    return flop_registry.get(func.overloadpacket) or flop_registry.get(twin)


def flops(event: Event) -> float:
    """Count by torch's formula; 0 for an operation that does not multiply."""
    if (formula := flop_formula(event.op)) is None:
        return 0.0
    args, kwargs, out = tree_map_only(TensorMeta, lambda t: t.shape, (event.args, event.kwargs, event.result))
    return float(formula(*args, **kwargs, out_val=out))


class Counted(NamedTuple):
    """The FLOPs of a network for an image: of its share of an update, and of one evaluation; and its parameters."""

    update: float
    evaluation: float
    parameters: int


def of_an_image(cfg: Config, dataset: Dataset) -> Counted:
    """Count the FLOPs of a configured network, new and in plain PyTorch.

    An update's are those of its forward and backward passes, and of the forward pass of its target. Reads no images and
    allocates nothing. Raises UserError where the network does not fit the data.
    """
    traced = replace(cfg, batch=_IMAGES, batch_per_device=_IMAGES, compile=False, graph=False, precision="fp32")
    objective = objective_type(cfg.objective)
    augment_dim = AugmentPipe.label_dim if cfg.data.augment > 0 else 0
    spec = network_spec(cfg.net, objective.precond, dataset, augment_dim)
    with torch.device("meta"):
        net, teacher, features = build(spec).train(), None, None
        net.model.on_ops = False
        if objective.wants_teacher:
            teacher = frozen(traced, build(spec))
        if cfg.objective.direction == "features":
            features = Features(dataset.resolution, dataset.channels).requires_grad_(False)
    state = flat_state(traced, net)
    stream = ImageStream(dataset, cfg.seed, "meta", _IMAGES, resident=True)
    step = train_step(traced, state, stream, teacher=teacher, features=features)
    x = torch.empty(_IMAGES, net.img_channels, net.img_resolution, net.img_resolution, device="meta")
    with torch.no_grad():
        evaluation = _sum(lambda: net.eval()(x, x[:, 0, 0, 0]))
    net.train()
    parameters = sum(p.numel() for p in net.parameters())
    return Counted(_sum(step.update) / _IMAGES, evaluation / _IMAGES, parameters)


def _sum(function: Callable[[], object]) -> float:
    return math.fsum(map(flops, trace(function)))
