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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from lib.measure import reason
from lib.options import command, tyro_options
from rich.console import Console

from ect.config import SEED, Config, EvalConfig, Limit, LogConfig
from ect.errors import UserError
from ect.files.checkpoint import load_model
from ect.job import Job, pretrain_config
from ect.metrics import quality_rows
from ect.presets import PRESETS
from ect.sampler import Heun, Sampler, consistency_samplers
from ect.show.table import Table

RESULTS = Path(__file__).parent / "results" / "digits_quality.jsonl"
SAMPLES = 3000
MAX_NFE = 9  # the claim: 2 evaluations of ECT beat every diffusion sampler of at most this many
Result = dict[str, dict[str, float]]
Line = dict[str, Any]


SEEDS = Limit("seeds from 0 to 2^31 - 1", lambda seeds: all(map(SEED.holds, seeds)))


@dataclass(frozen=True)
class Options:
    seeds: Annotated[tuple[int, ...], SEEDS] = (0, 1, 2)
    check: bool = False
    """Exit 1 unless the claims hold for every seed."""
    report: bool = False
    """Train nothing: report the latest line of each seed in the results file."""
    markdown: bool = False
    """Print the table in Markdown."""
    results: Path = RESULTS


def stretch(cfg: Config, factor: float) -> Config:
    """Return the same recipe over `factor` times as many images."""
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


def rate(model: Path, name: str, samplers: Sequence[Sampler], job: Job) -> Result:
    net, _ = load_model(model)
    assert job.evaluator is not None
    rows = quality_rows(net, job.evaluator, samplers, samples=SAMPLES, batch=250)
    return {f"{name}, {r.sampler.nfe} NFE": {**r.values[0], "nfe": r.sampler.nfe} for r in rows}


def one_seed(seed: int, folder: Path) -> Result:
    cfg = replace(PRESETS["digits"], seed=seed)
    scratch = replace(cfg, pretrain=None)
    judge = Job(replace(cfg, run_dir=folder / "judge"), Console(quiet=True))
    ect, first_kimg = train(cfg, folder / "ect"), pretrain_config(cfg).total_kimg
    teacher = folder / "ect" / "pretrain" / f"checkpoint-{first_kimg:010.3f}.safetensors"
    mid_t = cfg.eval.mid_t
    result = rate(teacher, "diffusion, Heun", [Heun(n) for n in (18, 5, 4, 3, 2)], judge)
    result |= rate(teacher, "diffusion, consistency sampler", consistency_samplers(mid_t), judge)
    result |= rate(ect, "ECT", consistency_samplers(mid_t), judge)
    model = train(scratch, folder / "scratch")
    result |= rate(model, "scratch, tuning's steps", consistency_samplers(mid_t), judge)
    factor = (first_kimg + cfg.total_kimg) / cfg.total_kimg
    model = train(stretch(scratch, factor), folder / "scratch-all")
    return result | rate(model, "scratch, all steps", consistency_samplers(mid_t), judge)


def claims(result: Result) -> dict[str, bool]:
    """Return what must hold for each seed, with room against the spread between seeds."""
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


def short(value: float, digits: int) -> str:
    """Return `digits` significant digits, never an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.{digits}g}"


def table(lines: list[Line]) -> Table:
    """Return one row a model and sampler: mean +- standard deviation over seeds."""
    cells = []
    for name in lines[0]["result"]:
        row = [name]
        for metric in ("FDc", "FDp"):
            values = [line["result"][name][metric] for line in lines]
            spread = f" +- {short(statistics.stdev(values), 2)}" if len(values) > 1 else ""
            row += [f"{short(statistics.fmean(values), 3)}{spread}", ", ".join(short(v, 3) for v in values)]
        cells.append(row)
    headers = ["model and sampler", "FDc", "FDc by seed", "FDp", "FDp by seed"]
    return Table(headers, cells, f"Digits, {len(lines)} seeds, {SAMPLES} samples")


def show(lines: list[Line], as_markdown: bool) -> bool:
    """Print the table and the claims; returns whether all claims hold."""
    if as_markdown:
        print(table(lines).markdown())
    else:
        Console(width=130).print(table(lines))
    held = [claims(line["result"]) for line in lines]
    for claim in held[0]:
        count = sum(h[claim] for h in held)
        print(f"- {claim}: {'holds' if count == len(held) else 'fails'} ({count} of {len(held)} seeds)")
    return all(all(h.values()) for h in held)


def lines_of(options: Options, one_seed: Callable[[int, Path], Result]) -> list[Line]:
    """Train a line of the results file for each seed, and append them; or return those that it has.

    A seed that fails is left out, with a word. Raises UserError where there is nothing to report.
    """
    if not options.seeds:
        raise UserError("--seeds: name at least one")
    if options.report:
        if not options.results.is_file():
            raise UserError(f"--results {options.results}: no such file; leave --report out to make one")
        found = [json.loads(line) for line in options.results.read_text().splitlines()]
        lines = [line for line in {line["seed"]: line for line in found}.values() if line["seed"] in options.seeds]
        if not lines:
            raise UserError(f"--results {options.results}: has none of --seeds {options.seeds}; leave --report out")
        return lines
    lines = []
    for seed in options.seeds:
        try:
            with tempfile.TemporaryDirectory() as folder:
                result = one_seed(seed, Path(folder))
        except Exception as error:  # the others may do better
            print(f"seed {seed} failed: {reason(error)}", flush=True)
            continue
        lines.append({"seed": seed, "device": "cpu", "torch": torch.__version__, "result": result})
        with options.results.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        print(f"seed {seed} done", flush=True)
    return lines


@command
def main(argv: Sequence[str] | None = None) -> int:
    options = tyro_options(Options, __doc__, argv)
    lines = lines_of(options, one_seed)
    if not lines:
        return 1
    good = show(lines, options.markdown) and len(lines) == len(options.seeds)
    return 0 if good or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
