"""The choice of the metrics of a data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ect.config import EvalConfig
from ect.data import Dataset
from ect.errors import UserError
from ect.metrics.evaluator import Evaluator, Several
from ect.metrics.features import DigitsEvaluator
from ect.metrics.fidelity import MIN_IMAGES, FidelityEvaluator, FidelityOptions
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
    """Return the evaluator of a data set: FDc and FDp for the digits, torch-fidelity's metrics for any other images.

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
    digits = dataset is not None and dataset.name == "digits" and dataset.images.shape[1:] == (8, 8, 1)
    least = 2 if digits else MIN_IMAGES
    if eval_cfg.samples < least:
        raise UserError(f"{eval_cfg.samples} generated images cannot be rated; expected at least {least} samples")
    if dataset is not None and digits and options.reference is None:
        main: Evaluator = DigitsEvaluator(dataset.images)
    else:
        main = FidelityEvaluator(dataset, options, run_dir, device)
    extra = [evaluator for make in EXTRA if (evaluator := make(dataset)) is not None]
    return Several([main, *extra]) if extra else main
