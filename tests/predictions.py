"""Predictions of memory that the tests of a process share: the same question of a CPU has the same answer.

A prediction is two thirds of a run of ten small steps. tests/test_memory.py asks `ect.cost.memory.predict` itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ect.assembly import objective_type
from ect.config import Config
from ect.cost import memory
from ect.cost.memory import Prediction
from ect.data import Dataset
from ect.models import fused

DECIDE = ("batch", "precision", "compile", "channels_last", "data", "net", "objective", "optim", "eval")
"""Fields of the configuration."""
_predict = memory.predict
_known: dict[str, Prediction] = {}


def shared(
    cfg: Config, spec: dict[str, Any], dataset: Dataset, device: torch.device, images: int, world_size: int = 1,
    resident: bool | None = None,
) -> Prediction:  # fmt: skip
    """`ect.cost.memory.predict`, asked once for a CPU; what decides nothing there is left out of the question.

    A self-check also listens to which ops are called meanwhile.
    """
    if device.type != "cpu" or cfg.self_check:
        return _predict(cfg, spec, dataset, device, images, world_size, resident)
    aside = replace(Config(), **{name: getattr(cfg, name) for name in DECIDE})
    classes = None if dataset.labels is None else dataset.labels.shape
    on_ops, objective = fused.wanted(None, torch.empty(0)), objective_type(cfg.objective)
    question = (aside, spec, dataset.images.shape, classes, images, world_size, resident, on_ops, objective)
    if (key := repr(question)) not in _known:
        _known[key] = _predict(cfg, spec, dataset, device, images, world_size, resident)
    return _known[key]


def nothing(
    cfg: Config, spec: dict[str, Any], dataset: Dataset, device: torch.device, images: int, world_size: int = 1
) -> Prediction:
    """Answer at once, for a run that is started to be killed, or whose ranks all would ask."""
    return Prediction(images, 0, 0, 0, 0, False)
