"""The choice of the metrics of a data set, and of the data set that a model is compared with."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from ect.config import DataConfig, EvalConfig
from ect.data import Dataset, load
from ect.errors import UserError
from ect.metrics import classifier
from ect.metrics.evaluator import Evaluator, Several
from ect.metrics.features import FeatureEvaluator
from ect.metrics.fidelity import MIN_IMAGES, FidelityEvaluator, FidelityOptions
from ect.metrics.weights import DINOV2, INCEPTION, VGG16
from ect.models import EDMPrecond
from ect.ranks.device import resolve

EXTRA: list[Callable[[Dataset | None], Evaluator | None]] = []
"""Makers of further evaluators, whose columns stand beside those of every table. A maker takes the data set (None where
statistics replace it) and returns None where its metric does not apply."""


def make_evaluator(
    dataset: Dataset | None,
    eval_cfg: EvalConfig,
    run_dir: Path,
    *,
    options: FidelityOptions | None = None,
    device: torch.device | str = "auto",
) -> Evaluator:
    """Return the evaluator of a data set: FDc and FDp where it has a features file, else torch-fidelity's metrics.

    Beside them stand the columns that EXTRA makes. Missing weights or a missing torch-fidelity are no error: the
    columns that need them say so (`Evaluator.notes`).

    Args: dataset: None only with options.reference. run_dir: for torch-fidelity's cache. options: the default takes
    eval_cfg.weights and whatever is in torch's cache, and downloads nothing. device: of torch-fidelity's extractors;
    'auto' is CUDA where there is one. Raises UserError for a named file that is not what it should be, or for too few
    samples.
    """
    options = options or FidelityOptions(weights=eval_cfg.weights)
    if device == "auto":
        device = resolve("auto")
    features = None
    if dataset is not None and options.reference is None:
        features = classifier.find(dataset.images)
    least = MIN_IMAGES if features is None else 2
    if eval_cfg.samples < least:
        raise UserError(f"{eval_cfg.samples} generated images cannot be rated; expected at least {least} samples")
    if dataset is not None and features is not None:
        for file, given in ((INCEPTION, options.weights), (VGG16, options.vgg), (DINOV2, options.dinov2)):
            if given is not None:
                file.find(given, download=False)  # unused, but a path that names nothing is a mistake
        main: Evaluator = FeatureEvaluator(features, dataset.images)
    else:
        main = FidelityEvaluator(dataset, options, run_dir, device)
    extra = [evaluator for make in EXTRA if (evaluator := make(dataset)) is not None]
    return Several([main, *extra]) if extra else main


def reference(
    net: EDMPrecond,
    info: dict[str, Any],
    model: str,
    source: str | None = None,
    resolution: int | None = None,
    convert: Literal["rgb", "grey"] | None = None,
) -> Dataset:
    """Return the data set that a model's images are compared with, checked against the model.

    Args: info: of the model's file, which may name its data. model: its name in messages. source: as --data.source;
    None: the digits for a model of the digits. resolution, convert: as --data.resolution and --data.convert. Raises
    UserError, in ect.evaluate's words, where data is missing or does not fit.
    """
    recorded = info.get("data")
    source = source or ("digits" if recorded == "digits" else None)
    if source is None:
        hint = f"it was trained on {recorded!r}" if recorded else "it does not say what it was trained on"
        raise UserError(f"{model}: {hint}; give those images, --data PATH, or --reference STATISTICS.npz")
    try:
        data = load(DataConfig(source, resolution=resolution, convert=convert))
    except UserError as error:  # which names the options of ect.train
        raise UserError(re.sub(r"--data\.(\w)", r"--\1", str(error).replace("--data.source", "--data"))) from error
    made = f"{net.img_resolution}x{net.img_resolution} with {net.img_channels} channels"
    found = f"{data.resolution}x{data.resolution} with {data.channels} channels"
    if made != found:
        raise UserError(
            f"--data {source}: images are {found}, the model's are {made}; give the data it was trained on, or for a "
            f"folder of images --resolution {net.img_resolution}"
        )
    return data
