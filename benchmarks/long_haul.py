"""Does a long run grow? 20,000 steps of the digits network, watched for memory, open files, objects and time a step.

    python benchmarks/long_haul.py                # on one idle CPU core about 12 minutes
    python benchmarks/long_haul.py --report       # print what the results file has

The run is a tuning of the digits network as `make demo` has it, from scratch and with small batches, and everything that a
run writes is switched on: rows, TensorBoard, grids, checkpoints, evaluations. The first tenth of the steps warms up. Over the
others nothing may grow: the command ends with status 1 where the last tenth holds more than the second one by more than the
bars in `BARS`. It reads Linux's /proc. A line is appended to benchmarks/results/long_haul.jsonl.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from lib.history import append
from lib.measure import machine
from lib.options import command, tyro_options
from rich.console import Console

from ect.config import BATCH, FROM_1, SEED, Config, EvalConfig, Limit, LogConfig
from ect.data import load
from ect.errors import UserError
from ect.metrics import make_evaluator
from ect.presets import PRESETS
from ect.ranks.device import set_threads
from ect.show.log import RunLog
from ect.show.table import Table
from ect.trainer import Trainer

RESULTS = Path(__file__).parent / "results" / "long_haul.jsonl"
PROC = Path("/proc/self")
PARTS = 10
LOOKS = 20  # at memory and files, in each part
BARS = {"memory": 16.0, "files": 0.0, "objects": 1000.0, "CPU time": 0.25}
"""The most that each may grow by: MiB, number, number, part of itself."""
STEPS = Limit(
    f"a multiple of {PARTS * LOOKS}, at most a billion",
    lambda steps: 0 < steps <= 10**9 and steps % (PARTS * LOOKS) == 0,
)


@dataclass(frozen=True)
class Options:
    """Train the digits network for long, and see whether the process grows."""

    steps: Annotated[int, STEPS] = 20_000
    batch: Annotated[int, FROM_1, BATCH] = 8
    seed: Annotated[int, SEED] = 0
    results: Path = RESULTS
    report: bool = False
    """Train nothing: report the last line of the results file."""


class Watch(RunLog):
    """A log that looks at its own process after each step, and keeps what it sees in arrays made before the first one."""

    def __init__(self, folder: Path, steps: int, batch: int) -> None:
        super().__init__(folder, steps * batch, console=Console(quiet=True))
        self.cpu, self.wall = (array("d", bytes(8 * (steps + 1))) for _ in range(2))
        self.memory, self.files = (array("d", bytes(8 * PARTS * LOOKS)) for _ in range(2))
        self.objects = array("d", bytes(8 * PARTS))
        self.every, self.done = steps // (PARTS * LOOKS), 0
        self.cpu[0], self.wall[0] = time.process_time(), time.monotonic()

    def step(self, nimg: int, **stats: Any) -> None:
        """Do a log's step, then look at the process."""
        super().step(nimg, **stats)
        self.done += 1
        look, rest = divmod(self.done, self.every)
        if not rest:
            self.memory[look - 1], self.files[look - 1] = resident(), open_files()
            part, rest = divmod(look, LOOKS)
            if not rest:
                gc.collect()
                self.objects[part - 1] = len(gc.get_objects())
        self.cpu[self.done], self.wall[self.done] = time.process_time(), time.monotonic()

    def parts(self) -> list[dict[str, float]]:
        """Return what each tenth of the run held, and the milliseconds of its median step."""
        size, found = self.done // PARTS, []
        for i in range(PARTS):
            looks, steps = slice(i * LOOKS, (i + 1) * LOOKS), range(i * size, (i + 1) * size)
            cpu, wall = (1000 * statistics.median(t[k + 1] - t[k] for k in steps) for t in (self.cpu, self.wall))
            memory, files = statistics.median(self.memory[looks]), max(self.files[looks])
            found.append({
                "steps": steps.stop, "memory": memory, "files": files, "objects": self.objects[i],
                "CPU time": cpu, "wall": wall,
            })  # fmt: skip
        return found


def resident() -> float:
    """Return the main memory that this process holds now, in MiB."""
    return int((PROC / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files() -> int:
    """Return how many file handles this process has open."""
    return len(os.listdir(PROC / "fd")) - 1  # one of them reads the folder


def configured(options: Options) -> Config:
    """Return the digits recipe for so many steps, with everything that a run writes."""
    kimg, base = options.steps * options.batch / 1000, PRESETS["digits"]
    return replace(
        base, batch=options.batch, total_kimg=kimg, seed=options.seed, pretrain=None,
        objective=replace(base.objective, stage_kimg=kimg / base.objective.n_stages),
        optim=replace(base.optim, warmup_kimg=kimg / 12, decay_kimg=kimg / 2),
        log=LogConfig(kimg / 200, kimg / 40, kimg / 20, kimg / 40),
        eval=EvalConfig(samples=250, batch=250),
    )  # fmt: skip


def haul(options: Options, folder: Path) -> list[dict[str, float]]:
    """Train in a folder; return what each tenth of the run held."""
    cfg, device = configured(options), torch.device("cpu")
    set_threads(cfg.threads)
    data = load(cfg.data)
    trainer = Trainer(cfg, folder, data, device, make_evaluator(data, cfg.eval, folder, device=device))
    log = Watch(folder, options.steps, options.batch)
    with log:
        trainer.run(log)
    if log.done < options.steps:
        raise KeyboardInterrupt
    return log.parts()


def growth(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return by how much each of BARS grew from the second tenth to the last one."""
    before, after = parts[1], parts[-1]
    grown = {name: after[name] - before[name] for name in BARS}
    return grown | {"CPU time": grown["CPU time"] / before["CPU time"]}


def show(line: dict[str, Any]) -> bool:
    """Print a line of the results file; return whether nothing grew."""
    columns = {"steps": "d", "memory": ".1f", "files": "d", "objects": "d", "CPU time": ".2f", "wall": ".2f"}
    heads = ["up to step", "MiB", "open files", "objects", "CPU ms/step", "ms/step"]
    cells = [[format(int(part[n]) if f == "d" else part[n], f) for n, f in columns.items()] for part in line["parts"]]
    what = f"{line['steps']:,} steps of {line['batch']} digits in {line['seconds'] / 60:.1f} minutes"
    where = f"{line['device']}, 1 thread, torch {line['torch']}, commit {line['commit']}"
    Console(width=120).print(Table(heads, cells, f"{what}: {where}"))
    grown, good = growth(line["parts"]), True
    for name, unit in (("memory", " MiB"), ("files", ""), ("objects", ""), ("CPU time", "")):
        held = grown[name] <= BARS[name]
        amount, most = (f"{x:+.1%}" if name == "CPU time" else f"{x:+,.1f}{unit}" for x in (grown[name], BARS[name]))
        print(f"- {name}: {amount} from the second tenth to the last; {'holds' if held else 'GREW'}, the bar is {most}")
        good &= held
    return good


@command
def main(argv: Sequence[str] | None = None) -> int:
    options = tyro_options(Options, __doc__, argv)
    if options.report:
        if not options.results.is_file():
            raise UserError(f"--results {options.results}: no such file; leave --report out to make one")
        return 0 if show(json.loads(options.results.read_text(encoding="utf-8").splitlines()[-1])) else 1
    if not (PROC / "statm").is_file():
        raise UserError(f"{PROC}: memory and open files are read there, which only Linux has; run it on Linux")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        parts = haul(options, Path(folder))
    facts = {key: value for key, value in machine(torch.device("cpu")).items() if key in ("device", "torch", "commit")}
    line = {
        "steps": options.steps,
        "batch": options.batch,
        "seconds": time.monotonic() - began,
        **facts,
        "parts": parts,
    }
    append(options.results, line)
    return 0 if show(line) else 1


if __name__ == "__main__":
    sys.exit(main())
