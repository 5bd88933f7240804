"""A phase of training whose time is charged: its steps alone, not what is written, drawn or rated on the way."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ect.config import Config
from ect.data import Dataset
from ect.files.lock import locked
from ect.files.run_folder import has_begun, write_config
from ect.metrics import Evaluator
from ect.ranks import self_check
from ect.show.log import STATS, RunLog
from ect.trainer import Trainer
from lib import history

PROBE = 64  # images of the forward pass by which the machine's pace is measured


class Watch:
    """Counts seconds while it runs: processor time of all threads (core-seconds), or on a GPU the wall clock (GPU-seconds)."""

    def __init__(self, device: torch.device, seconds: float = 0.0) -> None:
        self._device, self._seconds, self._since = device, seconds, -1.0

    def now(self) -> float:
        """Return the clock's reading, once the device has done what it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return time.monotonic()
        return time.process_time()

    @property
    def seconds(self) -> float:
        """Seconds counted so far."""
        return self._seconds + (self.now() - self._since if self._since >= 0 else 0.0)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count inside the block."""
        self._since = self.now()
        try:
            yield
        finally:
            self._seconds, self._since = self.seconds, -1.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count inside the block."""
        ran, self._seconds, self._since = self._since >= 0, self.seconds, -1.0
        try:
            yield
        finally:
            self._since = self.now() if ran else -1.0


@dataclass
class Charged(Trainer):
    """A trainer that writes into stats.jsonl what its steps have cost: "charged" beside each evaluation and checkpoint.

    With each row of statistics it also times one forward pass of the network ("pace"), whose cost says how fast the machine
    is at that moment: other work on it slows a core down by half and more.
    """

    watch: Watch = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        charged = [row for row in rows(self.run_dir) if "charged" in row and row["nimg"] <= self.nimg]
        self.watch = Watch(self.device, charged[-1]["charged"] if charged and self.nimg else 0.0)

    def run(self, log: RunLog) -> Path:
        with self.watch.running():
            return super().run(log)

    def row(self, stage: int, sec_per_kimg: float) -> dict[str, Any]:
        with self.watch.paused():
            self.log.row(self.nimg, {"pace": self._pace()})
            return super().row(stage, sec_per_kimg)

    def save(self) -> Path:
        with self.watch.paused():
            self.log.row(self.nimg, {"charged": self.watch.seconds})
            return super().save()

    def grids(self) -> None:
        """Draw nothing: these runs are for figures."""

    def evaluate(self) -> None:
        with self.watch.paused():
            self.log.row(self.nimg, {"charged": self.watch.seconds})
            super().evaluate()

    @torch.no_grad()
    def _pace(self) -> float:
        """Return the seconds of one forward pass of PROBE images, the same of every recipe."""
        net = self.average()
        x = torch.zeros(PROBE, net.img_channels, net.img_resolution, net.img_resolution, device=self.device)
        labels = torch.zeros(PROBE, net.label_dim, device=self.device) if net.label_dim else None
        start = self.watch.now()
        net(x, torch.ones(PROBE, device=self.device), labels)
        return self.watch.now() - start


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's stats.jsonl; none where there is no run."""
    return history.lines(folder / STATS)


def train(cfg: Config, folder: Path, dataset: Dataset, device: torch.device, evaluator: Evaluator | None) -> Path:
    """Train a phase to its end in `folder`, from its last checkpoint if it has one; return its model file.

    With an evaluator it is rated at its evaluation intervals and at its end. Raises KeyboardInterrupt where a signal stopped
    it, with a checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        self_check.choose(device, cfg.kernels)
        resume = folder if has_begun(folder) else None
        trainer = Charged(replace(cfg, resume=resume), folder, dataset, device, evaluator)
        write_config(cfg, folder, self_check.resolved(trainer.step))
        resumed = None if resume is None else trainer.nimg
        with (
            trainer.stop.watch(),
            RunLog(folder, trainer.total_img, quiet=True, resume_nimg=resumed, device=device) as log,
        ):
            path = trainer.run(log)
            if trainer.nimg < trainer.total_img:
                raise KeyboardInterrupt
            if evaluator is not None:
                trainer.evaluate()
    return path


def account(folder: Path) -> dict[str, Any]:
    """Return what a finished run cost and reached.

    seconds: of all steps. pace: median seconds of the forward pass. curve: per evaluation [kimg, seconds, {figure: value}].
    """
    found = rows(folder)
    charged = {row["nimg"]: row["charged"] for row in found if "charged" in row}
    rated = {row["nimg"]: row for row in found if any(name.startswith("nfe") for name in row)}
    curve = [
        [nimg / 1000, charged[nimg], {name: value for name, value in row.items() if name.startswith("nfe")}]
        for nimg, row in sorted(rated.items())
    ]
    paces = [row["pace"] for row in found if "pace" in row]
    return {"seconds": charged[max(charged)], "pace": statistics.median(paces), "curve": curve}
