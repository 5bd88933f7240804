"""A job: the phases of a configuration (diffusion, then consistency) in one run folder, and the report at the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ect_kernels import dispatch
from rich.console import Console
from torch import Tensor

from ect.assembly import objective_type
from ect.config import HEUN_STEPS, Config
from ect.data import load
from ect.data.datasets import TEACHER
from ect.errors import Diverged, UserError
from ect.files import drawn
from ect.files.branch import cooled
from ect.files.drawn import Drawn
from ect.files.lock import locked
from ect.files.phases import pretrain_config
from ect.files.resume import data_fingerprint, refuse_changed_maths, refuse_new_start
from ect.files.run_folder import (
    CONFIG,
    absent,
    can_make,
    has_begun,
    leaving_nothing,
    new_run_dir,
    refuse_used,
    resolved,
    run_folder,
    to_dict,
    write_config,
)
from ect.files.run_folder import load as load_config
from ect.metrics import Crossing, Evaluator, QualityRow, RemoteEvaluator, Target, make_evaluator
from ect.models import fused
from ect.ranks import self_check
from ect.ranks.device import resolve, set_threads
from ect.ranks.distributed import World, check_share
from ect.ranks.stop import StopSignal
from ect.show import levels, machine, page, report
from ect.show.comparison import SEEDS, Rated, compare
from ect.show.grid import save_png
from ect.show.idle import idle_options
from ect.show.log import RunLog, Screen
from ect.tangent import file as features
from ect.trainer import Trainer

STRIP_WIDTH = 900  # pixels, about


@dataclass
class Job:
    """The phases of a run and its report: `run` does them all, and returns False if a signal stopped it before the end.

    world: every rank runs the job; rank 0 alone writes and reports. Raises UserError where options, data and files do not fit.
    """

    cfg: Config
    console: Console = field(default_factory=Screen)
    world: World = World()

    def __post_init__(self) -> None:
        cfg = self.cfg
        check_share(cfg, self.world.size)
        set_threads(cfg.threads, self.world)
        self.device = resolve(cfg.device, self.world)
        self._choose_kernels()
        self.seconds: dict[str, float] = {}
        self.drawn: Drawn | None = None
        if cfg.data.source == TEACHER:
            self.drawn = drawn.find(
                cfg, self.device, self.world, partial(self.console.print, markup=False, highlight=False)
            )
            self.seconds["drawing"] = float(self.drawn.seconds)
        self.dataset = load(cfg.data) if self.drawn is None else self.drawn.dataset()
        reference = self.dataset if self.drawn is None else self.drawn.reference()
        if self.world.size > 1:  # all ranks have come so far, before one of them makes a folder
            self.world.agree({"images": data_fingerprint(self.dataset.images, self.dataset.labels)})
        for line in (self.dataset.describe(), *self.dataset.notes, *idle_options(cfg, self.dataset)):
            self.console.print(line, markup=False, highlight=False)
        self.stop = StopSignal(world=self.world)
        self.splits: dict[str, dict[str, float]] = {}
        self.checked: list[str] = []
        self.target: Target | None = None
        self.crossings: list[Crossing] = []
        self._made: list[Path] = []
        self._trained = False  # whether a phase has done steps of its own, here and now
        if cfg.resume is not None:
            begun = load_config(run_folder(cfg.resume))
            refuse_changed_maths(to_dict(begun), to_dict(cfg))
            refuse_new_start(begun.init_from, cfg.init_from, cfg.objective.target)
            if cfg.cooldown:
                self.cfg = cfg = cooled(cfg, begun)
        if cfg.objective.direction == "features":
            features.find(self.dataset.images, cfg.data)  # or a teacher would be trained first, for nothing
        self._starts = cfg.resume is None or cfg.cooldown  # and has a folder of its own
        goes_on = None if self._starts else cfg.resume
        self.run_dir = Path(self.world.first(self._new_run_dir)) if goes_on is None else run_folder(goes_on)
        self.evaluator: Evaluator | None = None
        if cfg.eval.samples and self.world.rank == 0:
            with leaving_nothing(self._made):
                self.evaluator = make_evaluator(reference, cfg.eval, self.run_dir, device=self.device)
        elif cfg.eval.samples:
            self.evaluator = RemoteEvaluator()
        for note in self.evaluator.notes if self.evaluator is not None else []:
            self.console.print(note, markup=False, highlight=False)
        if cfg.target is not None:
            with leaving_nothing(self._made):
                self.target = Target(**self.world.first(self._find_target))

    def _find_target(self) -> dict[str, Any]:
        """Return what --target means, on rank 0, which alone knows the columns."""
        cfg, columns = self.cfg, self.evaluator.columns if self.evaluator is not None else ()
        samplers = objective_type(cfg.objective).samplers(cfg.eval.mid_t, HEUN_STEPS[:1])
        return asdict(Target.find(cfg.target or "", columns, samplers))

    def _choose_kernels(self) -> None:
        """Apply --kernels, and say which backend each op uses where the networks run on the ops."""
        self_check.choose(self.device, self.cfg.kernels)
        if self.cfg.resume is not None:
            self_check.keep(resolved(run_folder(self.cfg.resume)), self.device)
        if fused.wanted(None, torch.zeros(0, device=self.device)):
            for op, backend, why in dispatch.table(self.device):
                self.console.print(f"{op}: {backend} ({why})", markup=False, highlight=False)

    def _new_run_dir(self) -> str:
        asked = self.cfg.run_dir
        made = absent(Path("runs") if asked is None else asked)
        path = new_run_dir(self.cfg)
        self._made = [path, *made] if asked is None else made
        return str(path)

    def run(self) -> bool:
        lock = locked(self.run_dir) if self.world.rank == 0 else contextlib.nullcontext()
        with leaving_nothing(self._made), self.stop.watch(), lock:
            if self._starts and self.world.rank == 0:
                refuse_used(self.run_dir)  # by another process that found it empty too
            try:
                done = self._run()
            except Diverged as error:
                self._report_early(str(error))
                raise
            if not done:
                self._report_early(
                    f"a signal stopped this run; python -m ect.train --resume {self.run_dir} goes on with it"
                )
            return done

    def _run(self) -> bool:
        cfg = self.cfg
        models: list[Rated] = []
        if cfg.pretrain is not None and cfg.init_from is None:
            folder = self.run_dir / "pretrain"
            phase = pretrain_config(cfg, folder)
            teacher = self.train("pretraining", phase, folder)
            if teacher is None:
                return False
            models += Rated.averages(
                teacher, phase, objective_type(phase.objective).samplers(cfg.eval.mid_t, HEUN_STEPS), "pretraining"
            )
            cfg = replace(cfg, init_from=teacher)
        name = "tuning" if cfg.init_from is not None else "training"
        model = self.train(name, cfg, self.run_dir)
        if model is None:
            return False
        models += Rated.averages(model, cfg, objective_type(cfg.objective).samplers(cfg.eval.mid_t, HEUN_STEPS), name)
        return self.finish(models)

    def train(self, name: str, cfg: Config, run_dir: Path) -> Path | None:
        """Train one phase, from its last checkpoint if it has one.

        Returns its model file, or None if stopped before its end.
        """
        resume = None
        if self.cfg.resume is not None:
            named = self.cfg.resume.expanduser()
            if self.cfg.cooldown or (named.is_file() and named.parent == run_dir and named.name != CONFIG):
                resume = named
            elif has_begun(run_dir, early=self._trained):
                resume = run_dir
            elif run_dir != self.run_dir and has_begun(self.run_dir):
                raise UserError(f"--resume {self.run_dir}: the phase before is gone, {run_dir}; put it back")
            else:
                self.console.print(f"{name}: no checkpoint yet, starting anew")
        cfg = replace(cfg, resume=resume)
        before = resolved(run_folder(resume) if cfg.cooldown else run_dir) if resume else {}
        self_check.keep(before, self.device)
        target = self.target if run_dir == self.run_dir else None
        trainer = Trainer(cfg, run_dir, self.dataset, self.device, self.evaluator, self.stop, self.world, target=target)
        staged = objective_type(cfg.objective).staged
        if self.cfg.preset != "digits" and staged and cfg.init_from is None and not resume:
            trainer.notes.append("no --init-from: training a consistency model from scratch, not tuning a teacher")
        now = self_check.resolved(trainer.step)
        self.checked += [*trainer.checked, *self_check.changes(before, now)]
        trainer.notes += self_check.changes(before, now)
        writes = self.world.rank == 0
        if cfg.cooldown:  # before there is a config.json: a resume of it is never to start anew
            trainer.path = trainer.save()
            trainer.notes.append(
                f"branching off {resume} at {trainer.nimg / 1000:g} kimg, and cooling down to {cfg.total_kimg:g} kimg"
            )
        if writes:
            if self.drawn is not None and self._starts:
                self.drawn.save(self.run_dir)
            write_config(self.cfg, self.run_dir, now)  # first, also while pretraining: --resume finds the job by it
            if run_dir != self.run_dir:  # not before the trainer stands: a refused start leaves nothing behind
                with can_make(str(run_dir)):
                    run_dir.mkdir(exist_ok=True)
                write_config(cfg, run_dir, now)
        start = trainer.nimg
        resume_nimg = None if self.cfg.resume is None else start
        log = RunLog(
            run_dir, trainer.total_img, resume_nimg=resume_nimg, console=self.console, device=self.device, writes=writes
        )
        self.world.can_go_on(self.run_dir, lambda: trainer.path, log.ended)
        with log:
            for note in trainer.notes:
                log.note(note)
            log.phase(name)
            try:
                path = trainer.run(log)
            finally:
                self.seconds[name], self.splits[name] = trainer.seconds, trainer.clock.split()
                if trainer.state.nonfinite > 0:
                    log.note(f"{int(trainer.state.nonfinite)} non-finite gradient values were replaced while {name}")
        if cfg.log.levels and writes:
            with log.surviving("levels.png"):
                levels.plot(run_dir)
        self._trained, self.crossings = trainer.nimg > start, trainer.crossings
        return path if trainer.nimg >= trainer.total_img else None

    def finish(self, models: Sequence[Rated]) -> bool:
        """Report on the models: samples.png (side by side), the table on the console, results.json, results.md, the page.

        Returns False if stopped before the end.
        """
        begin = time.monotonic()
        made = compare(models, self.cfg, self.evaluator, self.device, self.stop)
        if made is None:
            return False
        pictures, rows = made
        if self.world.rank == 0:
            phases = [model.phase for model in models for _ in model.samplers] if rows else []
            self._report({"data": self.dataset.images[: len(SEEDS)]} | pictures, rows, phases, begin)
        return True

    def _report(
        self, pictures: dict[str, Tensor], rows: Sequence[QualityRow], phases: Sequence[str], begin: float
    ) -> None:
        scale = max(STRIP_WIDTH // (len(SEEDS) * self.dataset.resolution), 1)
        save_png(report.strips(pictures, scale), self.run_dir / "samples.png")
        self.seconds["evaluation"] = time.monotonic() - begin
        columns = self.evaluator.columns if self.evaluator is not None else ()
        report.write(self.run_dir, rows, columns, self.seconds, self.checked, self._facts(phases))
        report.show(self.console, rows, columns, self.seconds)
        made = page.write(self.run_dir, report.table(rows, columns) if rows else None)
        self.console.print(
            f"In {self.run_dir}: {made}samples.png, results.md, grids, checkpoints", markup=False, highlight=False
        )

    def _report_early(self, ending: str) -> None:
        """Write the page of a run that has trained, but did not come to its end."""
        if self.world.rank == 0 and self.splits:
            early = {"rows": [], "seconds": self.seconds, "checked": self.checked, **self._facts([])}
            page.write(self.run_dir, results=early, ending=ending)

    def _facts(self, phases: Sequence[str]) -> dict[str, Any]:
        """Return what results.json has beside figures."""
        crossings = [crossing for crossing in self.crossings if crossing.target == self.cfg.target]
        about = machine.facts(self.device, self.cfg, self.world) | {"data": self.dataset.describe()}
        more: dict[str, Any] = {
            "phases": phases, "splits": self.splits, "about": about, "target": None,
            "missing": [] if self.evaluator is None else self.evaluator.notes,
        }  # fmt: skip
        if self.target is not None:
            more["target"] = asdict(self.target) | {
                "means": str(self.target),
                "crossings": list(map(asdict, crossings)),
            }
        return more
