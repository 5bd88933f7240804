"""Trainer: builds a run from its configuration, loops over steps, keeps intervals, resumes and stops cleanly."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from ect_kernels.calls import Recorder
from torch import Tensor

from ect import precision, schedule
from ect.assembly import flat_state, objective_type, train_step
from ect.config import HEUN_STEPS, Config
from ect.config.emas import power_profiles
from ect.cost import memory, signal_noise
from ect.data import Dataset, ImageStream
from ect.errors import UserError
from ect.files import checkpoint, kept, origin
from ect.files.resume import (
    data_fingerprint,
    refuse_bad_numbers,
    refuse_changed_data,
    refuse_changed_features,
    refuse_changed_maths,
    refuse_changed_teacher,
)
from ect.files.run_folder import from_dict, to_dict
from ect.metrics import Crossing, Evaluator, QualityRow, Target, quality_rows
from ect.models import EDMPrecond
from ect.ranks import self_check
from ect.ranks.distributed import World
from ect.ranks.health import Health
from ect.ranks.stop import StopSignal
from ect.sampler import Sampler, generate
from ect.show.clock import Clock
from ect.show.grid import GRID_SEEDS
from ect.show.log import RunLog, peak_memory

GAPS = "levels"
"""The tensor of a checkpoint with the sums of --log.levels since the last row, over all ranks."""


@dataclass
class Trainer:
    """One phase of training (diffusion or consistency) in its own run folder.

    Args: cfg: the configuration; resume and init_from are honoured. run_dir: existing folder. dataset: images and labels.
    device: where to train. evaluator: judges samples at eval intervals; None: no evaluation. stop: shared by the phases
    of a job. world: of several processes each trains on its part of every batch, and rank 0 alone writes. target: ends the
    training early where evaluations of the first average come to it. Raises UserError where checkpoint, data and options do
    not fit. `notes` says what was left out on purpose.
    """

    cfg: Config
    run_dir: Path
    dataset: Dataset
    device: torch.device
    evaluator: Evaluator | None = None
    stop: StopSignal = field(default_factory=StopSignal)
    world: World = World()
    nimg: int = 0
    target: Target | None = None

    def __post_init__(self) -> None:
        cfg = self.cfg
        self.total_img = round(cfg.total_kimg * 1000)
        self.objective = objective_type(cfg.objective)
        self.path: Path | None = None
        """Model file of the last checkpoint."""
        self.clock = Clock()
        self.crossings: list[Crossing] = []
        """The evaluations that came to a target, of all resumptions."""
        self.precision = precision.resolve(cfg.precision, self.device)
        precision.apply(self.precision)
        torch.manual_seed(cfg.seed)  # initial weights; everything later is counter-based
        saved = None if cfg.resume is None else checkpoint.Checkpoints.load(cfg.resume)
        start = origin.find(cfg, self.objective, self.dataset, self.device, saved)
        self.spec, self.net = start.spec, start.net
        self.digests = {"teacher": start.teacher_digest, "features": start.features_digest}
        checking, ops = self_check.wanted(cfg.self_check, self.device), Recorder()
        with ops if checking else nullcontext():
            plan = memory.plan(cfg, self.spec, self.dataset, self.device, self.world.size)
        self.state = flat_state(cfg, self.net)
        # A copy of now, with the memory order that the weights have now: else each call of it would convert them.
        self.ema_net = copy.deepcopy(self.net).eval().requires_grad_(False)
        stream = ImageStream(self.dataset, cfg.seed, self.device, cfg.batch)
        cfg_of_step = replace(cfg, batch_per_device=plan.batch_per_device)
        self.step = train_step(cfg_of_step, self.state, stream, self.world, start.teacher, start.features)
        self.notes = [*start.notes, str(plan), self.state.note(), stream.note]
        self.gaps = getattr(self.step.objective, "gaps", None)
        self.health = Health(self.step, self.world)
        self.checkpoints = checkpoint.Checkpoints(self.run_dir, cfg.log.keep)
        self.fingerprint = data_fingerprint(self.dataset.images, self.dataset.labels)
        if saved is not None:
            self._resume(saved)
        self.checked = self_check.run(self.step, ops.calls, self.nimg, self._stage()) if checking else []
        """Lines for log and report that say what the self-check found."""
        self.notes += self.checked
        if self.precision.half is not None and self.objective.staged:
            self.notes.append(signal_noise.note(self.net, self.precision.name, self.dataset))

    @property
    def seconds(self) -> float:
        """Wall-clock time of this phase, over all its resumptions."""
        return self.clock.seconds

    @property
    def reached(self) -> Crossing | None:
        """The evaluation that ended the training, if the target has been reached."""
        of = self.target.text if self.target is not None else None
        return next((crossing for crossing in self.crossings if crossing.confirmed and crossing.target == of), None)

    def run(self, log: RunLog) -> Path:
        """Train to total_kimg, the target or a stop signal; return the last checkpoint's model file. No step can follow."""
        with closing(self.step.stream):
            return self._run(log)

    def _run(self, log: RunLog) -> Path:
        self.log, cfg, every = log, self.cfg, self.cfg.log
        self._agree()
        self.clock.started()
        if self.path is None:
            self.grids()
            self.path = self.save()
        elif self.nimg:
            if self.nimg >= self.total_img and self.world.rank == 0:
                self.checkpoints.tidy(self.path)
            self._show(self.world.first(lambda: sorted(log.told())))
        step_seconds, row_nimg, shown = 0.0, self.nimg, {}
        stopping = self.stop.heard()
        while self.nimg < self.total_img and not stopping:
            started = time.monotonic()
            stage = self._stage()
            self.state.lr = schedule.lr_at(self.nimg, cfg.batch, self.total_img, cfg.optim)
            self.state.ema_betas = schedule.ema_betas_at(self.nimg, cfg.batch, cfg.optim)
            self.health.add(self.step(self.nimg, stage))
            self.nimg += cfg.batch
            last, stopping = self.nimg >= self.total_img, self.stop.heard()
            step_seconds += time.monotonic() - started
            if self._due(every.stats_kimg):
                row = self.row(stage, step_seconds / (self.nimg - row_nimg) * 1000)
                shown = {"loss": row["loss"], "stage": stage} if self.objective.staged else {"loss": row["loss"]}
                step_seconds, row_nimg = 0.0, self.nimg
                if (said := self.health.judge(self.nimg, last, self.checkpoints.back)) is not None:
                    self.log.note(said)
            self.log.step(self.nimg, **shown)
            if self._passed(every.weights_kimg):  # before the checkpoint: a kill in between loses none
                self.keep_weights()
            self.keep_averages()
            if self._due(every.checkpoint_kimg) or stopping:  # first of all: what follows may fail
                self.path = self.save()
            self._show()
        return self.path

    def _due(self, kimg: float) -> bool:
        """Return whether the last update was the last of all, or of an interval."""
        return self.nimg >= self.total_img or self._passed(kimg)

    def _passed(self, kimg: float) -> bool:
        """Return whether the last update came to the end of an interval; 0: there is none."""
        interval, before = round(kimg * 1000), self.nimg - self.cfg.batch
        return interval > 0 and self.nimg // interval > before // interval

    def _show(self, told: Sequence[str] = ()) -> None:
        """Rate the averages and write grids where that is due. told: what a resumed run has already, unless a kill cost it.

        At the end the report rates them, and beside a target, which the end may have come to, so does this.
        """
        not_now = self.health.bad_rows or any("/" in name for name in told)
        not_now |= self.nimg >= self.total_img and (self.target is None or self.reached is not None)
        if self._due(self.cfg.log.eval_kimg) and self.evaluator is not None and not not_now:
            self.evaluate()
        if self._due(self.cfg.log.sample_kimg) and not {f"nfe{sampler.nfe}" for sampler in self.samplers()} <= {*told}:
            self.grids()

    def _stage(self) -> int:
        return schedule.stage_at(self.nimg, self.cfg.objective)

    def row(self, stage: int, sec_per_kimg: float) -> dict[str, Any]:
        """Write the statistics since the last row, and return them; the loss is the mean of the finite ones, over all ranks."""
        row = self.health.row() | {
            "stage": stage, "lr": self.state.lr,
            **{f"ema{i or ''}_beta": beta for i, beta in enumerate(self.state.ema_betas)},
            "grad_norm": float(self.state.grad_norm), "grad_norm_max": self.health.grad_norm_max,
            "nonfinite": int(self.state.nonfinite),
            "sec_per_kimg": sec_per_kimg, "seconds": self.seconds, "memory_bytes": peak_memory(self.device),
        }  # fmt: skip
        if self.gaps is not None:
            row |= self.gaps.row(self.world.gather)
        if self.state.loss_scale is not None:
            row |= {"loss_scale": float(self.state.loss_scale), "skipped": int(self.state.skipped)}
        self.log.row(self.nimg, row)
        return row

    def average(self, i: int = 0) -> EDMPrecond:
        """Return the network with the weights of average i, in eval mode; a later call changes it."""
        self.ema_net.load_state_dict(self.state.ema_state_dict(i))
        return self.ema_net

    def samplers(self) -> Sequence[Sampler]:
        """Return the samplers by which this phase's network makes its grids."""
        return self.objective.samplers(self.cfg.eval.mid_t, HEUN_STEPS[:1])

    def grids(self) -> None:
        """Write a grid of samples of the first average, for each sampler."""
        with self._timed("grids"), precision.sampling(self.precision):
            net = self.average()
            for sampler in self.samplers():
                batches = generate(
                    net, GRID_SEEDS, sampler, batch=len(GRID_SEEDS), device=self.device, world=self.world
                )
                self.log.grid(f"nfe{sampler.nfe}", torch.cat(list(batches)))

    def evaluate(self) -> None:
        """Rate each weight average, and write a row of statistics: a figure for each average, sampler and metric."""
        figures: dict[str, float] = {}
        for i, entry in enumerate(self.cfg.optim.emas):
            average = f"ema{entry}/" if len(self.cfg.optim.emas) > 1 else ""
            rows = self._rate(i, self.samplers())
            figures |= _figures(average, rows)
            if i == 0 and self.target is not None and self.reached is None:
                figures |= _figures(f"second/{average}", self._aim(self.target, rows))
        if figures:
            self.log.row(self.nimg, {"seconds": self.seconds, **figures})

    def _rate(self, average: int, samplers: Sequence[Sampler], seed: int = 0) -> list[QualityRow]:
        """Rate a weight average, on images of which the first has this seed."""
        assert self.evaluator is not None
        cfg = self.cfg.eval
        with self._timed("evaluation"), precision.sampling(self.precision):
            return quality_rows(
                self.average(average), self.evaluator, samplers, samples=cfg.samples, seed=seed, batch=cfg.batch,
                device=self.device, world=self.world,
            )  # fmt: skip

    def _aim(self, target: Target, rows: Sequence[QualityRow]) -> list[QualityRow]:
        """Rate images of other seeds where these rows meet the target, and end the training if they meet it, too."""
        row = next(row for row in rows if row.sampler.nfe == target.nfe)
        if not target.met(row.mean(target.column)):
            return []
        seconds = self.seconds
        (second,) = self._rate(0, [row.sampler], seed=self.cfg.eval.samples)
        figure, again = row.mean(target.column), second.mean(target.column)  # on all ranks the same
        crossing = Crossing(target.text, self.nimg, seconds, figure, again, self.seconds, target.met(again))
        self.crossings.append(crossing)
        self.log.note(str(crossing))
        self.log.event("target", **asdict(crossing))
        if crossing.confirmed:
            self.total_img = self.nimg
            self.log.ends_here()
            self.keep_averages()
            self.path = self.save()
        return [second]

    def save(self) -> Path:
        """Write a checkpoint; return the path of its model file. Raises Diverged rather than write what is not finite."""
        self.health.refuse_to_save(self.nimg, self.checkpoints.back)
        with self._timed("checkpoints"):
            healthy, tensors, meta = self.health.saved()
            if self.gaps is not None:
                tensors[GAPS] = self.gaps.total(self.world.gather)
            return Path(self.world.first(lambda: str(self._write(healthy, tensors, meta))))

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Count the block as a part of the wall clock."""
        float(self.state.grad_norm)  # a device that is behind has steps to do, which are training
        with self.clock.of(part):
            yield

    def keep_weights(self) -> None:
        """Keep the weights of now, which are no average, beside the checkpoints."""
        if self.world.rank == 0:
            kept.keep(self.run_dir, self.nimg, self.net, self.spec, self._info(), self.cfg.log.kept_precision)

    def keep_averages(self) -> None:
        """Keep the averages by power profiles, where that is due, and at the end."""
        every, emas = self.cfg.log.averages_kimg, self.cfg.optim.emas
        for i in power_profiles(emas) if every > 0 and self._due(every) and self.world.rank == 0 else ():
            about, precision = {**self._info(), "ema": emas[i]}, self.cfg.log.kept_precision
            kept.keep(self.run_dir, self.nimg, self.average(i), self.spec, about, precision, emas[i])

    def _info(self) -> dict[str, Any]:
        """Return what the model files of now say of themselves."""
        return {
            "preset": self.cfg.preset, "objective": self.cfg.objective.kind, "nimg": self.nimg,
            "data": self.dataset.name, "mid_t": list(self.cfg.eval.mid_t),
        }  # fmt: skip

    def _write(self, healthy: bool, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Path:
        tensors |= self.state.state_tensors()
        tensors["grad_norm"] = torch.nan_to_num(self.state.grad_norm, 0.0, 0.0, 0.0)  # inf where a step was skipped
        meta |= {
            "nimg": self.nimg, "seconds": self.seconds, "split": self.clock.split(),
            "crossings": [asdict(crossing) for crossing in self.crossings],
            "config": to_dict(self.cfg), "data": self.fingerprint, **self.digests,
        }  # fmt: skip
        emas, info = self.cfg.optim.emas, self._info()
        (model, about), *more = [(self.state.ema_state_dict(i), {**info, "ema": emas[i]}) for i in range(len(emas))]
        return self.checkpoints.save(self.nimg, model, self.spec, about, tensors, meta, more, healthy)

    def _agree(self) -> None:
        """Raise UserError unless all ranks start from the same point."""
        state = self.state
        arenas = state.saved_arenas().values() if self.world.size > 1 else ()
        sums = [int(arena.view(torch.int32).sum(dtype=torch.int64)) for arena in arenas]
        options, weights = json.dumps(to_dict(self.cfg)), str([*sums, *self.digests.values()])
        self.world.agree({"options": options, "images": self.fingerprint, "weights": weights, "nimg": str(self.nimg)})

    def _resume(self, saved: checkpoint.Saved) -> None:
        tensors, meta, self.path = saved
        refuse_bad_numbers(tensors, self.path)
        refuse_changed_maths(to_dict(from_dict(meta["config"])), to_dict(self.cfg))
        refuse_changed_data(meta["data"], self.fingerprint, self.cfg.data.source)
        refuse_changed_teacher(meta.get("teacher"), self.digests["teacher"], self.cfg.init_from)
        refuse_changed_features(meta.get("features"), self.digests["features"])
        try:
            self.state.load_state_tensors(tensors)
            self.state.grad_norm.copy_(tensors["grad_norm"])
            self.health.restore(tensors, meta)
            if self.gaps is not None and GAPS in tensors and self.world.rank == 0:
                self.gaps.sums.copy_(tensors[GAPS])
        except KeyError as error:
            raise UserError(
                f"--resume {self.cfg.resume}: its training state is damaged, missing {error.args[0]}; resume from another "
                "checkpoint of the run, or start a new one from its weights with --init-from"
            ) from error
        self.nimg = meta["nimg"]
        self.clock.go_on(meta)
        if not self.cfg.cooldown:  # a branch has its way to the target before it
            self.crossings = [Crossing(**crossing) for crossing in meta.get("crossings", [])]
        if self.reached is not None:
            self.total_img = self.nimg


def _figures(prefix: str, rows: Sequence[QualityRow]) -> dict[str, float]:
    """Return figures as stats.jsonl names them: {"nfe2/FDc": 20.0}, each name after the prefix."""
    return {f"{prefix}nfe{row.sampler.nfe}/{name}": row.mean(name) for row in rows for name in row.values[0]}
