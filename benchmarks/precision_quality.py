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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from digits_quality import rate, short, train
from rich.console import Console
from rich.table import Table

from ect.checkpoint import Checkpoints
from ect.config import PRESETS, PretrainConfig
from ect.job import Job, pretrain_config
from ect.metrics import consistency_samplers
from ect.report import markdown

RESULTS = Path(__file__).parent / "results" / "precision_quality.jsonl"
NFES = (1, 2)
Line = dict[str, Any]


@dataclass(frozen=True)
class Options:
    seeds: tuple[int, ...] = (0, 1, 2)
    precisions: tuple[str, ...] = ("fp32", "fp16", "bf16")
    check: bool = False
    """Exit 1 unless fp16 and fp32 are equal within the spread."""
    report: bool = False
    """Train nothing: report what the results file has."""
    markdown: bool = False
    """Print the table in Markdown."""
    results: Path = RESULTS
    folder: Path = Path("runs/precision-quality")
    """Where teachers and runs are kept."""
    kimg: float = PRESETS["digits"].total_kimg
    """Length of each phase, to try the script; the digits recipe otherwise."""


def read(options: Options) -> dict[tuple[int, str], Line]:
    """The latest line of each seed and precision asked for, of runs of this length."""
    if not options.results.is_file():
        return {}
    lines = [json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()]
    return {
        (line["seed"], line["precision"]): line
        for line in lines
        if line["seed"] in options.seeds and line["precision"] in options.precisions and line["kimg"] == options.kimg
    }


def tune(seed: int, precision: str, options: Options) -> Line:
    """One tuning from the seed's teacher, which is trained first if need be; the judged result."""
    cfg = replace(PRESETS["digits"], seed=seed, total_kimg=options.kimg, precision="fp32")
    cfg = replace(cfg, pretrain=replace(cfg.pretrain, total_kimg=options.kimg))
    root = options.folder / f"{options.kimg:g}-kimg" / f"seed{seed}"
    root.mkdir(parents=True, exist_ok=True)
    teacher = root / "teacher" / f"checkpoint-{options.kimg:010.3f}.safetensors"
    if not teacher.is_file():
        train(pretrain_config(cfg), _fresh(root / "teacher"))
    run = _fresh(root / precision)
    model = train(replace(cfg, precision=precision, init_from=teacher, pretrain=PretrainConfig()), run)
    state = Checkpoints.load(run)[0]
    judge = Job(replace(cfg, run_dir=_fresh(root / "judge")), Console(quiet=True))
    result = rate(model, precision, consistency_samplers(cfg.eval.mid_t), judge)
    counters = {name: float(state[name]) for name in ("nonfinite", "skipped", "loss_scale") if name in state}
    return {
        "seed": seed, "precision": precision, "kimg": options.kimg, "device": "cpu", "torch": torch.__version__,
        **counters, "result": {f"{row['nfe']:.0f} NFE": row for row in result.values()},
    }  # fmt: skip


def _fresh(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3 ... that no earlier run has touched."""
    candidate, number = folder, 2
    while candidate.exists():
        candidate, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return candidate


def values(lines: dict[tuple[int, str], Line], precision: str, nfe: int, metric: str) -> list[float]:
    """The metric of every seed."""
    return [line["result"][f"{nfe} NFE"][metric] for (_, p), line in sorted(lines.items()) if p == precision]


def equal(a: list[float], b: list[float]) -> tuple[bool, float, float]:
    """(whether two precisions agree, the difference of their means, the difference allowed), over at least two seeds."""
    difference = abs(statistics.fmean(a) - statistics.fmean(b))
    allowed = math.sqrt(2) * max(statistics.stdev(a), statistics.stdev(b))
    return difference <= allowed, difference, allowed


def table(lines: dict[tuple[int, str], Line], precisions: tuple[str, ...]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells: mean +- standard deviation over seeds, and each seed's value."""
    cells = []
    for precision in precisions:
        for nfe in NFES:
            row = [f"{precision}, {nfe} NFE"]
            for metric in ("FDc", "FDp"):
                found = values(lines, precision, nfe, metric)
                spread = f" +- {short(statistics.stdev(found), 2)}" if len(found) > 1 else ""
                row += [f"{short(statistics.fmean(found), 3)}{spread}" if found else "not measured"]
                row += [", ".join(short(v, 3) for v in found)]
            cells.append(row)
    return ["precision", "FDc", "FDc by seed", "FDp", "FDp by seed"], cells


def show(lines: dict[tuple[int, str], Line], options: Options) -> bool:
    """Print the table and the comparison; returns whether fp16 equals fp32, which it does not where seeds are missing."""
    headers, cells = table(lines, options.precisions)
    if options.markdown:
        print(markdown(headers, cells))
    else:
        view = Table(title=f"Digits, seeds {', '.join(map(str, options.seeds))}, {options.kimg:g} kimg a phase")
        for i, header in enumerate(headers):
            view.add_column(header, justify="left" if i == 0 else "right")
        for row in cells:
            view.add_row(*row)
        Console(width=130).print(view)
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


def main() -> int:
    options = tyro.cli(Options, description=__doc__)
    lines = read(options)
    for seed in options.seeds:
        for precision in options.precisions:
            if options.report or (seed, precision) in lines:
                continue
            line = lines[seed, precision] = tune(seed, precision, options)
            options.results.parent.mkdir(parents=True, exist_ok=True)
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            figures = {nfe: round(row["FDc"], 1) for nfe, row in line["result"].items()}
            print(f"seed {seed}, {precision}: FDc {figures}", flush=True)
    good = show(lines, options)
    return 0 if good or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
