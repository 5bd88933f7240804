"""The models of a job side by side: the same noise through every sampler of each, and their figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ect import precision
from ect.config import Config
from ect.files.checkpoint import load_model
from ect.metrics import Evaluator, QualityRow, quality_rows
from ect.metrics.quality import named
from ect.ranks.stop import StopSignal
from ect.sampler import Sampler, generate

SEEDS = range(20)


@dataclass(frozen=True)
class Rated:
    """A weight average of a phase, and how it is sampled for the report."""

    path: Path
    ema: int
    entry: str | None
    """The entry of --optim.emas that names it, where there are several."""
    samplers: Sequence[Sampler]
    phase: str
    """The name that the job has for the phase."""

    @classmethod
    def averages(cls, path: Path, cfg: Config, samplers: Sequence[Sampler], phase: str) -> list[Rated]:
        """Return all weight averages of the phase with this configuration, model file and name."""
        emas = cfg.optim.emas
        return [cls(path, i, entry if len(emas) > 1 else None, samplers, phase) for i, entry in enumerate(emas)]


def compare(
    models: Sequence[Rated], cfg: Config, evaluator: Evaluator | None, device: torch.device, stop: StopSignal
) -> tuple[dict[str, Tensor], list[QualityRow]] | None:
    """Return pictures uint8 [20, H, W, C] by name, and a row of figures for each model and sampler; None if told to stop.

    All ranks of stop.world make images.
    """
    pictures: dict[str, Tensor] = {}
    rows: list[QualityRow] = []
    for model in models:
        net, _ = load_model(model.path, device=device, ema=model.ema)
        for sampler in model.samplers:
            with precision.sampling(precision.resolve(cfg.precision, device)):
                images = generate(net, SEEDS, sampler, device=device, world=stop.world)
                pictures[f"{named(sampler, model.entry)} (NFE {sampler.nfe})"] = torch.cat(list(images))
                if evaluator is not None:
                    rows += quality_rows(
                        net, evaluator, [sampler], samples=cfg.eval.samples, batch=cfg.eval.batch, device=device,
                        ema=model.entry, world=stop.world,
                    )  # fmt: skip
            if stop.heard():  # the models are saved; --resume comes back to this report
                return None
    return pictures, rows
