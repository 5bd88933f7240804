"""python -m ect.scaling trains a grid of widths, lengths and seeds, and says whether quality follows a power law of compute."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from ect.ranks.interrupts import install, leave

    install(leave)

import contextlib
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ect.config import ABOVE_0, FOURS, FROM_1, IMAGES, KIMG, SEED, SOME, Limit, at_most
from ect.data import load
from ect.errors import UserError
from ect.files.atomic import atomic, left_by_a_kill
from ect.files.lock import LOCK, locked
from ect.files.resume import flatten
from ect.files.run_folder import absent, can_make, from_dict, make, remove_empty, to_dict
from ect.metrics import make_evaluator
from ect.options import check_each, refuse_idle
from ect.ranks.device import resolve
from ect.ranks.distributed import World
from ect.ranks.launch import launch
from ect.scaling import cells as files
from ect.scaling.grid import Grid, base_config, teacher_config
from ect.scaling.laws import library
from ect.scaling.report import REPORT, Report
from ect.scaling.runs import LOGS, Runner
from ect.search.judge import lowered
from ect.show.log import Screen

STUDY = "study.json"
"""The configurations that all runs of a study have in common; by them a folder is known again."""
COMMAND = "python -m ect.scaling"
_WIDTH = 120  # columns, where there is no terminal that has a width


def _few(what: str, each: Sequence[Limit]) -> Limit:
    """Limit a list of different values, each by these limits."""
    return Limit(
        f"1 to {files.MOST} {what}, each once",
        lambda values: 1 <= len(values) <= files.MOST and len(set(values)) == len(values)
        and all(limit.holds(value) for limit in each for value in values),
    )  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Train a grid of networks and lengths from teachers of their width, and fit a power law of quality against compute.

    A study that was stopped goes on with the same command line. More widths, lengths or seeds may be added to it.
    """

    preset: str = "digits"
    """The recipe of all runs, one with a pretraining, such as digits or fashion."""
    widths: Annotated[tuple[int, ...], _few("multiples of 4 up to 4,096", (FOURS, at_most(4096)))] = (8, 12, 16, 24, 32)
    """Channels of the networks (--net.model-channels)."""
    kimg: Annotated[tuple[float, ...], _few("lengths above 0", (ABOVE_0, KIMG))] = (4.8, 9.6, 19.2, 38.4, 76.8)
    """Lengths of the tuning, thousands of images; the recipe's schedule is stretched to each."""
    seeds: Annotated[tuple[int, ...], _few("seeds from 0 to 2^31 - 1", (SEED,))] = (0, 1)
    """Seeds; each trains its own teachers."""
    pretrain_kimg: Annotated[float | None, ABOVE_0, KIMG] = None
    """Length of a teacher's training. Default: as in the preset."""
    samples: Annotated[int | None, SOME, IMAGES] = None
    """Images by which a run is rated. Default: as in the preset."""
    metric: str | None = None
    """The figure that the law is of, a column of ect.evaluate that is better the lower. Default: FDc, or else FID."""
    nfe: Annotated[int, FROM_1, at_most(1000)] = 2
    """Network evaluations of an image that is rated."""
    jobs: Annotated[int, FROM_1, at_most(256)] = 2
    """Runs at a time, a process of one thread each."""
    device: str = "auto"
    """'auto' (CUDA where there is one), 'cpu', 'cuda' or 'cuda:1'; all runs share it."""
    out: Path = Path("runs/scaling")
    """Folder of the study: its runs, cells.jsonl, report.md and scaling.svg."""
    report: Path | None = None
    """Train nothing: print the report on the cells of this file, the cells.jsonl of a study."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 2, with one sentence, where the user can mend it."""
    return launch(
        lambda: checked(tyro.cli(Options, args=args, prog=COMMAND)),
        lambda options, world: work(options, world, shlex.join(sys.argv[1:] if args is None else args)),
        interrupted="interrupted; what is done is kept, and the same command goes on",
    )


def checked(options: Options) -> Options:
    """Return the options. Raises UserError where one is impossible, alone or beside --report."""
    check_each(options)
    if options.report is not None:
        idle = ("preset", "widths", "kimg", "seeds", "pretrain-kimg", "samples", "jobs", "device", "out")
        refuse_idle(options, idle, "--report trains nothing; leave it out")
    return options


def work(options: Options, world: World, line: str) -> int:
    """Train what is missing and report, or report alone. line: the command line, for the report."""
    if world.size > 1:
        raise UserError(f"{COMMAND} starts processes of its own, --jobs at a time; leave torchrun out")
    library()  # before minutes of training
    console = Screen(width=None if sys.stdout.isatty() else _WIDTH)
    if options.report is not None:
        cells = files.read(options.report.expanduser(), "--report")
        Report(cells, options.metric or _metric_of(cells), options.nfe).show(console)
        return 0
    begin = time.monotonic()
    grid, metric = study(options)
    runs = grid.runs()
    missing = sum(not run.finished for run in runs)
    print(f"{len(runs)} runs, of which {len(options.seeds) * len(options.widths)} train teachers", flush=True)
    with begun(grid) as out:
        _ = grid.counted  # now, since a fault there is worth less than hours of training
        Runner(runs, options.jobs, out / LOGS, lambda said: print(said, flush=True))()
        cells = grid.cells()
        files.write(out / files.CELLS, cells)
        report = Report(cells, metric, options.nfe)
        minutes = (time.monotonic() - begin) / 60
        spent = f"It trained {missing} of {len(runs)} runs in {minutes:.1f} minutes, {options.jobs} at a time."
        report.write(out, f"{COMMAND} {line}".strip(), spent)
    report.show(console)
    print(f"{spent}\nwrote {out / REPORT}")
    return 0


def study(options: Options) -> tuple[Grid, str]:
    """Return the grid and the metric. Raises UserError where options, data and networks do not fit."""
    device = resolve(options.device)
    base = base_config(options.preset, options.pretrain_kimg, options.samples, options.device)
    data, out = load(base.data), options.out.expanduser()
    grid = Grid(base, data, options.widths, options.kimg, options.seeds, out)
    if options.nfe not in (there := grid.evaluations()):
        raise UserError(
            f"--nfe {options.nfe}: the runs of --preset {options.preset} are rated by {', '.join(map(str, there))} evaluations"
        )
    metric = lowered(make_evaluator(data, base.eval, out, device=device), options.metric)
    grid.check()
    return grid, metric


def _metric_of(cells: Sequence[files.Cell]) -> str:
    """Return FDc or else FID, whichever the cells have."""
    known = {name.partition("/")[2] for cell in cells for name in cell.figures}
    return "FDc" if "FDc" in known else "FID"


@contextlib.contextmanager
def begun(grid: Grid) -> Iterator[Path]:
    """Keep the folder of a study for the block, alone; if no run begins in it, it is left as it was.

    Raises UserError where the folder is another study's, or holds other things.
    """
    out = grid.out
    missing, there = absent(out), (out / STUDY).is_file()
    mine = {"tuning": to_dict(grid.base), "teacher": to_dict(teacher_config(grid.base))}
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file; name a folder")
    if out.is_dir() and not there and {*out.iterdir()} - {out / LOCK, *left_by_a_kill(out)}:
        raise UserError(f"--out {out}: a folder with other things than a study; choose another")
    try:
        with can_make(f"--out {out}"):
            make(out)
    except UserError as error:
        raise UserError(str(error).replace("--run-dir", "--out")) from error
    try:
        with locked(out):
            if there:
                _refuse_another(out, mine)
            else:
                with atomic(out / STUDY) as temp:
                    temp.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")
            (out / LOGS).mkdir(exist_ok=True)
            yield out
    finally:
        if not there and not any((out / LOGS).glob("*")):
            (out / STUDY).unlink(missing_ok=True)
            remove_empty([out / LOGS, *missing])


def _refuse_another(out: Path, mine: dict[str, dict[str, object]]) -> None:
    """Raise UserError where a study's common configuration is another than this one."""
    path = out / STUDY
    try:
        saved = {
            name: to_dict(from_dict(found)) for name, found in json.loads(path.read_text(encoding="utf-8")).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not what a study wrote ({error}); put it back, or choose another --out") from error
    old, new = flatten(saved), flatten(mine)
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            option = name.partition(".")[2].replace("_", "-")
            raise UserError(
                f"--out {out}: its study was begun with --{option} {old.get(name)}, and this one has {new.get(name)}; give the "
                "options that it was begun with, or another --out"
            )


if __name__ == "__main__":
    sys.exit(main())
