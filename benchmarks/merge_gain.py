"""Does a search of saved weights pay on the digits? Several runs, and python -m ect.merge --search on each.

    python benchmarks/merge_gain.py                 # 5 seeds: a run of 3 minutes and two searches of about as many each
    python benchmarks/merge_gain.py --check         # and exit 1 unless the claim holds

A run is that of `make demo` with --log.weights-kimg 1.28. It is searched at 1 and at 2 evaluations, and both its best single
average and what was found are rated at both, on images that no search has seen. A line for each search is appended to
benchmarks/results/merge_gain.jsonl; --report reads that file instead of training.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
from lib import history
from lib.measure import machine
from lib.options import command, tyro_options
from rich.console import Console

from ect.config import FROM_1, SEED, EvalConfig, Limit, LogConfig, at_most
from ect.errors import UserError
from ect.files.kept import listed
from ect.files.run_folder import load
from ect.job import Job
from ect.merge.blend import Blend
from ect.merge.search import parts, search
from ect.presets import PRESETS
from ect.ranks.device import set_threads
from ect.ranks.distributed import World
from ect.sampler import consistency_samplers
from ect.search.judge import data_of, judge
from ect.show.table import Table

RESULTS = Path(__file__).parent / "results" / "merge_gain.jsonl"
CPU = torch.device("cpu")
KEPT_KIMG = 1.28
FIGURES = [(metric, nfe) for nfe in (1, 2) for metric in ("FDc", "FDp")]
SEEDS = Limit("seeds from 0 to 2^31 - 1", lambda seeds: bool(seeds) and all(map(SEED.holds, seeds)))


@dataclass(frozen=True)
class Options:
    """Train digits models, and search for the best combination of the weights of each."""

    seeds: Annotated[tuple[int, ...], SEEDS] = (0, 1, 2, 3, 4)
    ratings: Annotated[int, FROM_1, at_most(10**6)] = 400
    """Combinations that a search tries, about."""
    samples: Annotated[int, FROM_1, at_most(10**6)] = 2000
    """Images by which a combination is rated."""
    runs: Path | None = None
    """Folder of runs seed0, seed1 and so on, which are not trained again. Default: all are trained, and not kept."""
    check: bool = False
    """Exit 1 unless the search loses in no run."""
    report: bool = False
    """Train nothing: report the latest line of each seed in the results file."""
    markdown: bool = False
    """Print the table in Markdown."""
    results: Path = RESULTS


def train(seed: int, folder: Path) -> None:
    """Make the run of a seed."""
    log = LogConfig(sample_kimg=0, checkpoint_kimg=0, weights_kimg=KEPT_KIMG)
    cfg = replace(PRESETS["digits"], seed=seed, run_dir=folder, log=log, eval=EvalConfig(samples=0))
    if not Job(cfg, Console(quiet=True)).run():
        raise KeyboardInterrupt


def gain(run: Path, nfe: int, options: Options) -> dict[str, Any]:
    """Return the figures before and after a search of a run's weights, those of its later half, at so many evaluations."""
    cfg, weights = load(run), listed(run)
    set_threads(cfg.threads)
    blend = Blend(parts(run, cfg, [one for one in weights if 2 * one.nimg >= weights[-1].nimg]), CPU)
    data, folder = data_of(blend.net, blend.info, run, None)
    rater = judge(data, folder, "FDc", options.samples, 250, CPU, World())
    samplers = sorted(consistency_samplers(cfg.eval.mid_t), key=lambda sampler: sampler.nfe != nfe)
    _, told = search(blend, rater, samplers, options.ratings, 0, Console(quiet=True))
    single, found = (
        {f"{metric} {row['sampler']['nfe']}": row["mean"][metric] for row in rows for metric in ("FDc", "FDp")}
        for rows in told["report"].values()
    )
    few = {name: told[name] for name in ("best_single", "ratings", "samples", "minutes", "finals")}
    return {"nfe": nfe, **few, "single": single, "found": found}


def table(lines: Sequence[dict[str, Any]]) -> Table:
    """Return a row a search, and the mean gain of each figure below."""
    heads = ["seed", "searched at", "minutes", "best single average", *(f"{m} at {nfe} NFE" for m, nfe in FIGURES)]
    names = [f"{metric} {nfe}" for metric, nfe in FIGURES]
    rows: list[list[object]] = []
    for nfe in sorted({line["nfe"] for line in lines}):
        some = [line for line in lines if line["nfe"] == nfe]
        for line in some:
            changes = [f"{line['single'][name]:.3g} -> {line['found'][name]:.3g}" for name in names]
            rows.append([line["seed"], f"{nfe} NFE", f"{line['minutes']:.1f}", line["best_single"], *changes])
        gains = [fmean(line["found"][name] / line["single"][name] - 1 for line in some) for name in names]
        minutes = fmean(line["minutes"] for line in some)
        rows.append(["mean", f"{nfe} NFE", f"{minutes:.1f}", "", *map("{:+.0%}".format, gains)])
    first = lines[0]
    title = f"{first['samples']:,} images a rating, {first['ratings']} ratings; {first['device']}, 1 thread"
    return Table(heads, rows, title, left=("seed", "best single average"))


def show(lines: Sequence[dict[str, Any]], as_markdown: bool) -> bool:
    """Print the table and the claim; return whether it holds."""
    if as_markdown:
        print(table(lines).markdown())
    else:
        Console(width=160).print(table(lines))
    won = [line["found"][f"FDc {line['nfe']}"] <= line["single"][f"FDc {line['nfe']}"] for line in lines]
    claim = "FDc at the evaluations searched for, on images not seen: no greater than the best single average's"
    print(f"- {claim}: {'holds' if all(won) else 'fails'} ({sum(won)} of {len(won)} searches)")
    return all(won)


@command
def main(argv: Sequence[str] | None = None) -> int:
    options = tyro_options(Options, __doc__, argv)
    if options.report:
        if not options.results.is_file():
            raise UserError(f"--results {options.results}: no such file; leave --report out to make one")
        found = history.lines(options.results)
        latest = {(line["seed"], line["nfe"]): line for line in found if line["seed"] in options.seeds}
        if not latest:
            raise UserError(f"--results {options.results}: has none of --seeds {options.seeds}; leave --report out")
        return 0 if show([*latest.values()], options.markdown) or not options.check else 1
    facts = {key: value for key, value in machine(CPU).items() if key in ("device", "torch", "commit")}
    lines = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as place:
            run = Path(place) / "run" if options.runs is None else options.runs / f"seed{seed}"
            if not run.is_dir():
                train(seed, run)
            for nfe in (1, 2):
                lines.append({"seed": seed, **facts, **gain(run, nfe, options)})
                history.append(options.results, lines[-1])
    return 0 if show(lines, options.markdown) or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
