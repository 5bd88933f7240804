"""The grid of a study: a run for each width, length and seed, tuned from a teacher of its width and seed.

Runs are those of `python -m ect.train`, each in a folder of its own. A teacher is trained once, and all lengths start from it.
Of another length than the preset's, a run has the same schedule, stretched: stages, warm-up and decay scale with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ect.assembly import objective_type
from ect.config import HEUN_STEPS, Config, LogConfig
from ect.data import Dataset
from ect.errors import UserError
from ect.files.phases import pretrain_config
from ect.options import preset
from ect.presets import PRESETS
from ect.scaling.cells import Cell
from ect.scaling.counted import Counted, of_an_image, spec_of

RESULTS = "results.json"
_CHECKPOINTS = 4  # of a run: a stopped one repeats a fourth of it at most


def base_config(name: str, pretrain_kimg: float | None, samples: int | None, device: str) -> Config:
    """Return what all runs of a study have in common: the preset, on one thread.

    Raises UserError where there is no such preset, or it has no teacher to train.
    """
    cfg = preset(name)
    if cfg.pretrain is None:
        known = ", ".join(name for name, cfg in PRESETS.items() if cfg.pretrain is not None)
        raise UserError(
            f"--preset {name}: it has no pretraining, and each width needs a teacher of its own; presets with one: {known}"
        )
    rated = cfg.eval if samples is None else replace(cfg.eval, samples=samples)
    cfg = replace(cfg, pretrain_kimg=pretrain_kimg or cfg.pretrain_kimg, eval=rated, device=device, threads=1)
    return replace(cfg, log=LogConfig(stats_kimg=cfg.log.stats_kimg, sample_kimg=0.0, checkpoint_kimg=0.0, keep=1))


def teacher_config(base: Config) -> Config:
    """Return the configuration of the teachers; nobody rates them."""
    cfg = pretrain_config(base)
    return replace(cfg, eval=replace(cfg.eval, samples=0))


def stretched(cfg: Config, kimg: float) -> Config:
    """Return the same recipe over so many kimg."""
    factor = kimg / cfg.total_kimg
    return replace(
        cfg,
        total_kimg=kimg,
        objective=replace(cfg.objective, stage_kimg=cfg.objective.stage_kimg * factor),
        optim=replace(cfg.optim, warmup_kimg=cfg.optim.warmup_kimg * factor, decay_kimg=cfg.optim.decay_kimg * factor),
    )


def images_of(cfg: Config) -> int:
    """Return the images that a run sees: its last batch is a whole one."""
    return math.ceil(round(cfg.total_kimg * 1000) / cfg.batch) * cfg.batch


@dataclass(frozen=True)
class Run:
    """A run of ect.train. name: of its folder. after: the run whose network it starts from."""

    name: str
    cfg: Config
    after: Run | None = None

    @property
    def folder(self) -> Path:
        assert self.cfg.run_dir is not None
        return self.cfg.run_dir

    @property
    def finished(self) -> bool:
        return (self.folder / RESULTS).is_file()

    def results(self) -> dict[str, Any]:
        """Return the results of a finished run. Raises UserError where they are damaged."""
        path = self.folder / RESULTS
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(found, dict):
                return found
            reason: object = "expected an object"
        except (OSError, ValueError, RecursionError) as error:
            reason = error
        raise UserError(f"{path}: cannot be read ({reason}); remove {self.folder}, and it is trained again")


@dataclass(frozen=True)
class Grid:
    """Widths, lengths and seeds of a study in the folder `out`; base: as `base_config` returns it."""

    base: Config
    data: Dataset
    widths: Sequence[int]
    kimg: Sequence[float]
    seeds: Sequence[int]
    out: Path

    def at(self, width: int, seed: int) -> Config:
        """Return the configuration of a width and seed."""
        return replace(self.base, seed=seed, net=replace(self.base.net, model_channels=width))

    def teacher(self, width: int, seed: int) -> Run:
        """Return the run that trains the teacher of a width and seed."""
        name = f"w{width}-s{seed}-teacher"
        return Run(name, self._placed(teacher_config(self.at(width, seed)), name))

    def tuning(self, width: int, kimg: float, seed: int) -> Run:
        """Return the run of a cell."""
        name, teacher = f"w{width}-s{seed}-{kimg}kimg", self.teacher(width, seed)
        cfg = replace(
            stretched(self.at(width, seed), kimg), pretrain=None, pretrain_kimg=None, init_from=teacher.folder
        )
        return Run(name, self._placed(cfg, name), teacher)

    def _placed(self, cfg: Config, name: str) -> Config:
        log = replace(cfg.log, checkpoint_kimg=cfg.total_kimg / _CHECKPOINTS)
        return replace(cfg, run_dir=self.out / name, log=log)

    def runs(self) -> list[Run]:
        """Return all runs in the order in which they are begun: seed by seed, first the teachers, then the long ones."""
        found = []
        for seed in self.seeds:
            found += [self.teacher(width, seed) for width in self._wide]
            found += [
                self.tuning(width, kimg, seed) for kimg in sorted(self.kimg, reverse=True) for width in self._wide
            ]
        return found

    @property
    def _wide(self) -> list[int]:
        return sorted(self.widths, reverse=True)

    @cached_property
    def counted(self) -> dict[int, tuple[Counted, Counted]]:
        """The FLOPs of each width, of tuning and of the teacher."""
        return {
            width: (
                of_an_image(self.at(width, 0), self.data), of_an_image(teacher_config(self.at(width, 0)), self.data)
            )
            for width in self.widths
        }  # fmt: skip

    def check(self) -> None:
        """Raise UserError where a network of one of the widths does not fit the data."""
        for width in self.widths:
            spec_of(self.at(width, 0), self.data)

    def evaluations(self) -> list[int]:
        """Return the numbers of network evaluations by which the runs are rated."""
        samplers = objective_type(self.base.objective).samplers(self.base.eval.mid_t, HEUN_STEPS)
        return [sampler.nfe for sampler in samplers]

    def cells(self) -> list[Cell]:
        """Return the cells of all finished runs. Raises UserError where results are damaged."""
        return [
            self._cell(width, kimg, run)
            for seed in self.seeds
            for width in self.widths
            for kimg in self.kimg
            if (run := self.tuning(width, kimg, seed)).finished
        ]

    def _cell(self, width: int, kimg: float, run: Run) -> Cell:
        assert run.after is not None
        found, (tuning, teacher), images = run.results(), self.counted[width], images_of(run.cfg)
        try:
            first = [row for row in found["rows"] if row.get("ema") in (None, self.base.optim.emas[0])]
            about = found["about"]
            return Cell(
                preset=self.base.preset, width=width, kimg=float(kimg), seed=run.cfg.seed, images=images,
                parameters=tuning.parameters, model_flops=tuning.evaluation, training_flops=tuning.update * images,
                teacher_flops=teacher.update * images_of(run.after.cfg),
                seconds=float(found["seconds"]["tuning"]),
                teacher_seconds=float(run.after.results()["seconds"]["training"]),
                samples=self.base.eval.samples,
                figures={f"nfe{row['sampler']['nfe']}/{k}": float(v) for row in first for k, v in row["mean"].items()},
                machine=f"{about['device']}; {about['processor']}; {about['software']}",
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{run.folder / RESULTS}: cannot be read ({error!r}); remove {run.folder}, and it is trained again"
            ) from error
