"""Does an EDM2 network reach what DDPM++ reaches on the digits? Diffusion and ECT by the preset digits-edm2, several seeds.

    python benchmarks/digits_edm2.py                 # 3 seeds, about 6 minutes each on one CPU core
    python benchmarks/digits_edm2.py --check         # and exit 1 unless its means are within the other's spread, or better

DDPM++'s figures are those that digits_quality.py has recorded: samples, noise and seeds are the same. A line per seed is
appended to benchmarks/results/digits_edm2.jsonl; --report reads that file instead of training.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import digits_quality
from digits_quality import SAMPLES, Line, Result, lines_of, rate, short, train
from lib.options import command, tyro_options
from rich.console import Console

from ect.job import Job, pretrain_config
from ect.presets import PRESETS
from ect.sampler import Heun, consistency_samplers
from ect.show.table import Table

RESULTS = Path(__file__).parent / "results" / "digits_edm2.jsonl"
SPREAD = 2  # standard deviations of DDPM++'s seeds above their mean: what is within it is on a par
CLAIMED = ("diffusion, Heun, 35 NFE", "ECT, 1 NFE", "ECT, 2 NFE")


@dataclass(frozen=True)
class Options(digits_quality.Options):
    check: bool = False
    """Exit 1 unless EDM2's means are at most DDPM++'s and twice the spread of its seeds."""
    results: Path = RESULTS


def one_seed(seed: int, folder: Path) -> Result:
    cfg = replace(PRESETS["digits-edm2"], seed=seed)
    judge = Job(replace(cfg, run_dir=folder / "judge"), Console(quiet=True))
    ect, first_kimg = train(cfg, folder / "ect"), pretrain_config(cfg).total_kimg
    teacher = folder / "ect" / "pretrain" / f"checkpoint-{first_kimg:010.3f}.safetensors"
    result = rate(teacher, "diffusion, Heun", [Heun(18), Heun(5)], judge)
    return result | rate(ect, "ECT", consistency_samplers(cfg.eval.mid_t), judge)


def values(lines: Sequence[Line], row: str, metric: str = "FDc") -> list[float]:
    return [line["result"][row][metric] for line in lines]


def table(ours: Sequence[Line], theirs: Sequence[Line]) -> Table:
    """Return a row for each network, model and sampler: mean, and by seed."""
    cells = []
    for row in ours[0]["result"]:
        for name, lines in (("EDM2", ours), ("DDPM++", theirs)):
            cell = [row, name]
            for metric in ("FDc", "FDp"):
                found = values(lines, row, metric)
                spread = f" +- {short(statistics.stdev(found), 2)}" if len(found) > 1 else ""
                cell += [f"{short(statistics.fmean(found), 3)}{spread}", ", ".join(short(v, 3) for v in found)]
            cells.append(cell)
    headers = ["model and sampler", "network", "FDc", "FDc by seed", "FDp", "FDp by seed"]
    return Table(headers, cells, f"Digits, {len(ours)} seeds, {SAMPLES} samples")


def show(ours: Sequence[Line], theirs: Sequence[Line], as_markdown: bool) -> bool:
    """Print the table and the claims; returns whether all claims hold."""
    if as_markdown:
        print(table(ours, theirs).markdown())
    else:
        Console(width=140).print(table(ours, theirs))
    good = True
    for row in CLAIMED:
        mean, others = statistics.fmean(values(ours, row)), values(theirs, row)
        most = statistics.fmean(others) + SPREAD * (statistics.stdev(others) if len(others) > 1 else 0)
        good &= mean <= most
        print(f"- {row}: FDc {short(mean, 3)}, at most {short(most, 3)}: {'holds' if mean <= most else 'fails'}")
    return good


@command
def main(argv: Sequence[str] | None = None) -> int:
    options = tyro_options(Options, __doc__, argv)
    ours, theirs = lines_of(options, one_seed), lines_of(digits_quality.Options(report=True), one_seed)
    if not ours:
        return 1
    good = show(ours, theirs, options.markdown) and len(ours) == len(options.seeds)
    return 0 if good or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
