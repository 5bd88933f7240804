"""One line of the ledger: the teacher of a seed, what a recipe rests on, its tuning, and what it came to."""

from __future__ import annotations

import hashlib
import json
import resource
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ect.config import DataConfig
from ect.data import Dataset, load
from ect.errors import UserError
from ect.files.atomic import atomic
from ect.files.checkpoint import load_model
from ect.files.resume import weights_fingerprint
from ect.metrics import Evaluator, make_evaluator, quality_rows
from ect.ranks.device import resolve, set_threads
from ect.sampler import Heun
from lib import charged, measure, recipes
from lib.ledger_lines import Line
from lib.recipes import RECIPES, TEACHER

HEUN_STEPS = 18


class Bench:
    """A data set on a device, with its judge: makes lines of it.

    folder: where teachers and runs are kept, so that a command that was stopped goes on. Raises UserError where the data set
    cannot be read.
    """

    def __init__(self, data: str, folder: Path, threads: int) -> None:
        cfg = recipes.config(data, recipes.BASE, 1.0, 0, threads)
        set_threads(threads)
        self.data, self.folder, self.threads = data, folder / data, threads
        self._teachers: dict[int, Path] = {}
        self.device = resolve(cfg.device)
        self.dataset: Dataset = load(cfg.data)
        self.evaluator: Evaluator = make_evaluator(self.dataset, cfg.eval, self.folder, device=self.device)
        if "FDc" not in {column.name for column in self.evaluator.available}:
            raise UserError(
                f"--data {data}: its images have no features file; make one with python -m ect.metrics.features"
            )

    def teacher(self, seed: int) -> Path:
        """Return the diffusion model of a seed, which is trained once and shared by all recipes."""
        if seed not in self._teachers:
            cfg, folder = recipes.teacher_config(self.data, seed, self.threads), self._of(seed) / "teacher"
            self._teachers[seed] = charged.train(cfg, folder, self.dataset, self.device, None)
        return self._teachers[seed]

    def line(self, recipe: str, length: float, seed: int, again: bool = False) -> Line:
        """Train a recipe, or rate the teacher where that is the recipe, and return the line.

        again: from the beginning, though a part of it may be done.
        """
        teacher = self.teacher(seed)
        if recipe == TEACHER:
            found = self._rate(teacher, seed)
        else:
            folder = self._of(seed) / f"{recipe}-x{length:g}"
            if again:
                shutil.rmtree(folder, ignore_errors=True)
            cfg = recipes.config(self.data, recipe, length, seed, self.threads)
            before = sum(self._before(command, cfg.data, teacher) for command in RECIPES[recipe].before)
            cfg = replace(cfg, init_from=teacher, pretrain=None)
            charged.train(cfg, folder, self.dataset, self.device, self.evaluator)
            found = charged.account(folder)
            found["before"] = before
            found["seconds"] += before
            found["curve"] = [[kimg, spent + before, values] for kimg, spent, values in found["curve"]]
        machine = measure.machine(self.device)
        return {
            "data": self.data, "recipe": recipe, "length": length, "seed": seed,
            "options": recipes.options_of(self.data, recipe), "samples": self._samples(),
            "unit": "GPU-seconds" if self.device.type == "cuda" else "core-seconds", **found,
            "teacher": self._about(teacher, seed), "machine": machine["device"],
            "threads": self.threads, "torch": machine["torch"], "commit": machine["commit"],
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }  # fmt: skip

    def _of(self, seed: int) -> Path:
        return self.folder / f"seed{seed}"

    def _samples(self) -> int:
        return recipes.config(self.data, recipes.BASE, 1.0, 0, self.threads).eval.samples

    def _rate(self, teacher: Path, seed: int) -> dict[str, Any]:
        """Return the account of the diffusion model by EDM's sampler; it has cost nothing since the teacher."""
        net, _ = load_model(teacher, device=self.device)
        cfg = recipes.teacher_config(self.data, seed, self.threads)
        sampler = Heun(HEUN_STEPS)
        (row,) = quality_rows(
            net, self.evaluator, [sampler], samples=cfg.eval.samples, batch=cfg.eval.batch, device=self.device
        )
        figures = {f"nfe{sampler.nfe}/{name}": value for name, value in row.values[0].items()}
        pace = charged.account(self._of(seed) / "teacher")["pace"]
        return {"seconds": 0.0, "pace": pace, "curve": [[0.0, 0.0, figures]]}

    def _about(self, teacher: Path, seed: int) -> dict[str, Any]:
        net, info = load_model(teacher)
        cost = charged.account(self._of(seed) / "teacher")["seconds"]
        return {"weights_sha256": weights_fingerprint(net)[:16], "kimg": info["nimg"] / 1000, "seconds": cost}

    def _before(self, command: str, data: DataConfig, teacher: Path) -> float:
        """Run a command of python that a recipe rests on, unless it has been run here; return what it cost.

        Raises UserError where it fails.
        """
        places = {"data": data.source, "resolution": data.resolution, "teacher": teacher}
        words = [word.format(**places) for word in shlex.split(command)]
        path = self.folder / f"before-{hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]}.json"
        if path.is_file():
            return float(json.loads(path.read_text(encoding="utf-8"))["seconds"])
        start = self._spent()
        done = subprocess.run([sys.executable, *words], check=False)
        if done.returncode:
            raise UserError(f"python {shlex.join(words)}: ended with status {done.returncode}; the recipe rests on it")
        cost = self._spent() - start
        with atomic(path) as temp:
            temp.write_text(json.dumps({"command": words, "seconds": cost}) + "\n", encoding="utf-8")
        return cost

    def _spent(self) -> float:
        """Return the processor time of all ended child processes, seconds; on a GPU the wall clock, as a line is charged."""
        if self.device.type == "cuda":
            return time.monotonic()
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime
