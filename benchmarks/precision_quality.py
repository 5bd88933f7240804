"""Does half precision cost quality on the digits? ECT tunings in fp32, fp16 and bf16 from one fp32 teacher a seed.

    python benchmarks/precision_quality.py --seeds 0 1 2      # on one CPU core 1.5 minutes a teacher, 2 to 4 a tuning
    python benchmarks/precision_quality.py --check            # and exit 1 unless fp16 equals fp32 within the spread

On a CPU the halves are emulated: rounded where a GPU rounds, summed in fp32. A teacher's tunings see the same images, noise
and noise levels, and their samples (judged in fp32) start from the same noise. Equal within the spread: for 1 and for 2 NFE
the means over seeds of FDc differ by at most sqrt(2) times the larger of the two standard deviations over seeds.

A line per tuning is appended to benchmarks/results/precision_quality.jsonl, and what the file already has is not trained
again: delete lines to repeat them. Teachers stay in --folder. --report trains nothing.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from digits_quality import rate, short, train
from lib.measure import reason
from lib.options import command, tyro_options
from rich.console import Console

from ect.config import KIMG, SEED, Config, Limit
from ect.errors import UserError
from ect.files.checkpoint import Checkpoints
from ect.job import Job, pretrain_config
from ect.presets import PRESETS
from ect.sampler import consistency_samplers
from ect.show.table import Table

RESULTS = Path(__file__).parent / "results" / "precision_quality.jsonl"
NFES = (1, 2)
Name = Literal["fp32", "fp16", "bf16"]
Line = dict[str, Any]


SEEDS = Limit("seeds from 0 to 2^31 - 1", lambda seeds: all(map(SEED.holds, seeds)))


@dataclass(frozen=True)
class Options:
    seeds: Annotated[tuple[int, ...], SEEDS] = (0, 1, 2)
    precisions: tuple[Name, ...] = ("fp32", "fp16", "bf16")
    check: bool = False
    """Exit 1 unless fp16 and fp32 are equal within the spread."""
    report: bool = False
    """Train nothing: report what the results file has."""
    markdown: bool = False
    """Print the table in Markdown."""
    results: Path = RESULTS
    folder: Path = Path("runs/precision-quality")
    """The folder in which the pretrained networks are kept."""
    kimg: Annotated[float, KIMG] = PRESETS["digits"].total_kimg
    """Length of each phase, to try the script; the digits recipe otherwise."""


def read(options: Options) -> dict[tuple[int, str], Line]:
    """Return the latest line of each seed and precision asked for, of runs of this length."""
    if not options.results.is_file():
        return {}
    lines = [json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()]
    return {
        (line["seed"], line["precision"]): line
        for line in lines
        if line["seed"] in options.seeds and line["precision"] in options.precisions and line["kimg"] == options.kimg
    }


def teacher(cfg: Config, path: Path) -> Path:
    """Return the model file of the diffusion phase of cfg, which is trained unless it is there."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            train(pretrain_config(cfg), Path(folder) / "run").replace(path)
    return path


def tune(seed: int, precision: Name, options: Options) -> Line:
    """Run one tuning from the seed's teacher, and judge it."""
    kimg = options.kimg
    cfg = replace(PRESETS["digits"], seed=seed, total_kimg=kimg, pretrain_kimg=kimg, precision="fp32")
    start = teacher(cfg, options.folder / f"teacher-{kimg:g}-kimg-seed{seed}.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        model = train(replace(cfg, precision=precision, init_from=start, pretrain=None), run)
        state = Checkpoints.load(run)[0]
        judge = Job(replace(cfg, run_dir=Path(folder) / "judge"), Console(quiet=True))
        result = rate(model, precision, consistency_samplers(cfg.eval.mid_t), judge)
    line: Line = {
        "seed": seed, "precision": precision, "kimg": kimg, "device": "cpu", "torch": torch.__version__,
        "result": {f"{row['nfe']:.0f} NFE": row for row in result.values()},
    }  # fmt: skip
    return line | {name: float(state[name]) for name in ("nonfinite", "skipped", "loss_scale") if name in state}


def values(lines: dict[tuple[int, str], Line], precision: str, nfe: int, metric: str) -> list[float]:
    """Return the metric of every seed."""
    return [line["result"][f"{nfe} NFE"][metric] for (_, p), line in sorted(lines.items()) if p == precision]


def paired(lines: dict[tuple[int, str], Line], precision: str, nfe: int) -> list[float]:
    """Return the FDc less that of the same seed in fp32, for every seed that has both."""
    return [
        line["result"][f"{nfe} NFE"]["FDc"] - lines[seed, "fp32"]["result"][f"{nfe} NFE"]["FDc"]
        for (seed, p), line in sorted(lines.items())
        if p == precision != "fp32" and (seed, "fp32") in lines
    ]


def equal(a: list[float], b: list[float]) -> tuple[bool, float, float]:
    """Return (whether two precisions agree, the difference of their means, the difference allowed), over at least two seeds."""
    difference = abs(statistics.fmean(a) - statistics.fmean(b))
    allowed = math.sqrt(2) * max(statistics.stdev(a), statistics.stdev(b))
    return difference <= allowed, difference, allowed


def table(lines: dict[tuple[int, str], Line], options: Options) -> Table:
    """Return one row a precision and NFE: mean +- standard deviation over seeds, each seed's value, and its FDc less fp32's."""
    cells = []
    for precision in options.precisions:
        for nfe in NFES:
            row = [f"{precision}, {nfe} NFE"]
            for metric in ("FDc", "FDp"):
                found = values(lines, precision, nfe, metric)
                spread = f" +- {short(statistics.stdev(found), 2)}" if len(found) > 1 else ""
                row += [f"{short(statistics.fmean(found), 3)}{spread}" if found else "not measured"]
                row += [", ".join(short(v, 3) for v in found)]
            row.insert(3, ", ".join(f"{d:+.1f}" for d in paired(lines, precision, nfe)))
            cells.append(row)
    title = f"Digits, seeds {', '.join(map(str, options.seeds))}, {options.kimg:g} kimg a phase"
    return Table(["precision", "FDc", "FDc by seed", "less fp32's", "FDp", "FDp by seed"], cells, title)


def show(lines: dict[tuple[int, str], Line], options: Options) -> bool:
    """Print the table and the comparison; returns whether fp16 equals fp32, which it does not where seeds are missing."""
    if options.markdown:
        print(table(lines, options).markdown())
    else:
        Console(width=130).print(table(lines, options))
    verdicts = []
    for nfe in NFES:
        half, single = (values(lines, precision, nfe, "FDc") for precision in ("fp16", "fp32"))
        if len(half) != len(options.seeds) or len(single) != len(options.seeds) or len(half) < 2:
            print(
                f"- {nfe} NFE: not decided, fp16 has {len(half)} and fp32 {len(single)} of {len(options.seeds)} seeds"
            )
            verdicts.append(False)
            continue
        good, difference, allowed = equal(half, single)
        verb = "equal" if good else "differ"
        print(f"- {nfe} NFE: fp16 and fp32 {verb}: means {difference:.1f} apart, the spread allows {allowed:.1f}")
        verdicts.append(good)
    return all(verdicts)


@command
def main(args: Sequence[str] | None = None) -> int:
    options = tyro_options(Options, __doc__, args)
    if not options.seeds or not options.precisions or options.kimg <= 0:
        raise UserError(
            f"--seeds, --precisions, --kimg {options.kimg:g}: expected one or more seeds and precisions, and a length above 0"
        )
    if options.report and not options.results.is_file():
        raise UserError(f"--results {options.results}: no such file; leave --report out to make one")
    lines = read(options)
    for seed in options.seeds:
        for precision in options.precisions:
            if options.report or (seed, precision) in lines:
                continue
            try:
                line = lines[seed, precision] = tune(seed, precision, options)
            except Exception as error:  # the others may do better
                print(f"seed {seed}, {precision} failed: {reason(error)}", flush=True)
                continue
            options.results.parent.mkdir(parents=True, exist_ok=True)
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            figures = {nfe: round(row["FDc"], 1) for nfe, row in line["result"].items()}
            print(f"seed {seed}, {precision}: FDc {figures}", flush=True)
    good = show(lines, options)
    return 0 if good or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
