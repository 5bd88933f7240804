"""A pilot of a data set of the ledger: what a step and an image cost here, and so what its runs will take."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from ect.config import Config
from ect.data import load
from ect.ranks.device import resolve, set_threads
from ect.sampler import consistency_samplers, generate
from ect.show.log import peak_memory
from ect.show.table import Table
from lib import recipes
from lib.charged import Charged, Watch
from lib.ledger_report import NFES

IMAGES = 128  # sampled, to time it
HOUR = 3600


def pilot(data: str, steps: int, threads: int) -> Table:
    """Measure `steps` steps of a data set's diffusion phase and of its base recipe, after one that is not counted.

    A row says milliseconds of the processor a step (median, least), images a second while sampling by one evaluation, the
    memory of the process so far, and the core-hours of the whole phase, with those of its evaluations.
    """
    set_threads(threads)
    phases = {
        "diffusion": recipes.teacher_config(data, 0, threads),
        "tuning": recipes.config(data, recipes.BASE, 1.0, 0, threads),
    }
    rows = [_row(name, cfg, steps, recipes.SETS[data].points) for name, cfg in phases.items()]
    headers = [
        "phase",
        "parameters",
        "ms a step",
        "least",
        "ms an image and evaluation",
        "MiB",
        "steps",
        "core-hours",
        "rated",
    ]
    return Table(headers, rows, f"{data}, {threads} thread{'s' * (threads > 1)}")


def _row(name: str, cfg: Config, steps: int, points: int) -> list[str]:
    device, dataset = resolve(cfg.device), load(cfg.data)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Charged(cfg, Path(folder), dataset, device)
        watch, times, nimg = Watch(device), [], 0
        for _ in range(steps + 1):
            start = watch.now()
            trainer.step(nimg, 0)
            times.append(watch.now() - start)
            nimg += cfg.batch
        trainer.step.stream.close()
    start = watch.now()
    for _ in generate(
        trainer.average(), range(IMAGES), consistency_samplers(())[0], batch=cfg.eval.batch, device=device
    ):
        pass
    image = (watch.now() - start) / IMAGES
    step, whole = statistics.median(times[1:]), round(cfg.total_kimg * 1000 / cfg.batch)
    evaluations = points * sum(NFES) if trainer.objective.staged else 35  # of an image
    memory = peak_memory(device)
    return [
        name, f"{sum(p.numel() for p in trainer.net.parameters()):,}", f"{step * 1e3:.0f}", f"{min(times[1:]) * 1e3:.0f}",
        f"{image * 1e3:.2f}", "-" if memory is None else f"{memory / 2**20:,.0f}", f"{whole:,}",
        f"{step * whole / HOUR:.2f}", f"{image * evaluations * cfg.eval.samples / HOUR:.2f}",
    ]  # fmt: skip
