"""Does tuning pay on the digits? Diffusion, ECT and consistency models from scratch, over several seeds.

    python benchmarks/digits_quality.py                 # 3 seeds, about 8 minutes each on one CPU core
    python benchmarks/digits_quality.py --check         # and exit 1 unless the claims of the README hold

A seed is a diffusion run, an ECT run from it, and two consistency models from scratch with the same recipe: one as long as
the tuning, one as long as diffusion and tuning together (its stages stretched). All samplers start from the same noise.
A line per seed is appended to benchmarks/results/digits_quality.jsonl; --report reads that file instead of training.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from ect.checkpoint import load_model
from ect.config import PRESETS, Config, EvalConfig, LogConfig, PretrainConfig
from ect.job import Job
from ect.metrics import Sampler, consistency_samplers, heun_samplers, quality_rows

RESULTS = Path(__file__).parent / "results" / "digits_quality.jsonl"
MAX_NFE = 9  # the claim: 2 evaluations of ECT beat every diffusion sampler of at most this many
Result = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Options:
    seeds: tuple[int, ...] = (0, 1, 2)
    check: bool = False
    """Exit 1 unless the claims hold for every seed."""
    report: bool = False
    """Train nothing: report the latest line of each seed in the results file."""
    results: Path = RESULTS


def stretch(cfg: Config, factor: float) -> Config:
    """The same recipe over `factor` times as many images."""
    optim, objective = cfg.optim, cfg.objective
    return replace(
        cfg,
        total_kimg=cfg.total_kimg * factor,
        objective=replace(objective, stage_kimg=objective.stage_kimg * factor),
        optim=replace(optim, decay_kimg=optim.decay_kimg * factor),
    )


def train(cfg: Config, folder: Path) -> Path:
    """Run a job in `folder`; returns the model file."""
    quiet = replace(cfg, run_dir=folder, log=LogConfig(sample_kimg=0, checkpoint_kimg=0), eval=EvalConfig(samples=0))
    job = Job(quiet, Console(quiet=True))
    if not job.run():
        raise KeyboardInterrupt
    return folder / f"checkpoint-{cfg.total_kimg:010.3f}.safetensors"


def rate(model: Path, name: str, samplers: list[Sampler], job: Job) -> Result:
    net, _ = load_model(model)
    assert job.evaluator is not None
    rows = quality_rows(net, job.evaluator, samplers, samples=3000, batch=250)
    return {f"{name}, {r.sampler.nfe} NFE": {**r.values[0], "nfe": r.sampler.nfe} for r in rows}


def one_seed(seed: int, folder: Path) -> Result:
    cfg = replace(PRESETS["digits"], seed=seed)
    scratch = replace(cfg, pretrain=PretrainConfig())
    judge = Job(replace(cfg, run_dir=folder / "judge"), Console(quiet=True))
    ect = train(cfg, folder / "ect")
    teacher = folder / "ect" / "pretrain" / f"checkpoint-{cfg.pretrain.total_kimg:010.3f}.safetensors"
    mid_t = cfg.eval.mid_t
    result = rate(teacher, "diffusion, Heun", heun_samplers((18, 5, 4, 3, 2)), judge)
    result |= rate(teacher, "diffusion, consistency sampler", consistency_samplers(mid_t), judge)
    result |= rate(ect, "ECT", consistency_samplers(mid_t), judge)
    model = train(scratch, folder / "scratch")
    result |= rate(model, "scratch, tuning's steps", consistency_samplers(mid_t), judge)
    factor = (cfg.pretrain.total_kimg + cfg.total_kimg) / cfg.total_kimg
    model = train(stretch(scratch, factor), folder / "scratch-all")
    return result | rate(model, "scratch, all steps", consistency_samplers(mid_t), judge)


def claims(result: Result) -> dict[str, bool]:
    """What must hold for each seed, with room against the spread between seeds."""
    ect = result["ECT, 2 NFE"]
    few = {k: v for k, v in result.items() if k.startswith("diffusion") and v["nfe"] <= MAX_NFE}
    scratch = result["scratch, tuning's steps, 2 NFE"]
    return {
        f"ECT at 2 NFE: FDc below 0.7 of every diffusion sampler of at most {MAX_NFE} NFE": all(
            ect["FDc"] < 0.7 * v["FDc"] for v in few.values()
        ),
        f"ECT at 2 NFE: FDp below 0.5 of every diffusion sampler of at most {MAX_NFE} NFE": all(
            ect["FDp"] < 0.5 * v["FDp"] for v in few.values()
        ),
        "ECT at 2 NFE: FDc below a consistency model from scratch of as many steps": ect["FDc"] < scratch["FDc"],
        "ECT at 2 NFE: FDp below a consistency model from scratch of as many steps": ect["FDp"] < scratch["FDp"],
    }


def show(lines: list[dict[str, Any]], console: Console) -> bool:
    """Print the table, mean +- standard deviation over seeds, and the claims; returns whether all hold."""
    seeds = [line["seed"] for line in lines]
    table = Table(title=f"Digits, seeds {', '.join(map(str, seeds))}, 3000 samples", title_justify="left")
    for i, header in enumerate(["model and sampler", "FDc", "FDp", "FDc by seed"]):
        table.add_column(header, justify="left" if i == 0 else "right")
    for name in lines[0]["result"]:
        values = {m: [line["result"][name][m] for line in lines] for m in ("FDc", "FDp")}
        cells = []
        for v in values.values():
            spread = f" +- {statistics.stdev(v):.2g}" if len(v) > 1 else ""
            cells.append(f"{statistics.fmean(v):.3g}{spread}")
        table.add_row(name, *cells, " ".join(f"{v:.1f}" for v in values["FDc"]))
    console.print(table)
    held = [claims(line["result"]) for line in lines]
    for claim in held[0]:
        count = sum(h[claim] for h in held)
        console.print(f"{'holds' if count == len(held) else 'FAILS'} for {count} of {len(held)} seeds: {claim}")
    return all(all(h.values()) for h in held)


def main() -> int:
    options = tyro.cli(Options, description=__doc__)
    console = Console(width=120)
    if options.report:
        found = [json.loads(line) for line in options.results.read_text().splitlines()]
        lines = [line for line in {line["seed"]: line for line in found}.values() if line["seed"] in options.seeds]
        if not lines:
            console.print(f"{options.results}: no line of these seeds")
            return 1
    else:
        lines = []
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as folder:
                result = one_seed(seed, Path(folder))
            line = {"seed": seed, "device": "cpu", "torch": torch.__version__, "result": result}
            lines.append(line)
            with options.results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            console.print(f"seed {seed} done")
    good = show(lines, console)
    return 0 if good or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
