"""python -m ect.evaluate: the quality of a model at 1 and 2 network evaluations, in one table and in metrics.json."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from ect.checkpoint import atomic, load_model
from ect.config import DataConfig, EvalConfig
from ect.data import Dataset, load
from ect.device import resolve
from ect.errors import UserError
from ect.metrics.choice import make_evaluator
from ect.metrics.evaluator import Column, Evaluator
from ect.metrics.fidelity import FidelityOptions
from ect.models import EDMPrecond
from ect.report import Row, Sampler, consistency_samplers, heun_samplers, measure
from ect.sampler import SIGMA_MAX

_MID_T = (0.821,)  # the second noise level of ECT's CIFAR-10 models


@dataclass(frozen=True)
class Options:
    """Rate a model: FDc and FDp for the digits; FID, KID, IS and precision/recall (torch-fidelity) for other images.

    Published CIFAR-10 figures are minima of 3 repeats of 50,000 samples against the 50,000 training images.
    """

    model: tyro.conf.Positional[Path]
    """A model (.safetensors of ours, .pkl of EDM or ECT) or a run folder (its latest checkpoint)."""
    data: str | None = None
    """Reference images: 'digits', or a path as for ect.train. Default: the digits for a model of the digits."""
    resolution: int | None = None
    """Resize and centre-crop a folder of images to this size (pixels)."""
    samples: int = 50_000
    """Generated images a repeat."""
    mid_t: tuple[float, ...] | None = None
    """Noise levels of the evaluations after the first, decreasing. Default: the model's own, else 0.821."""
    heun: tuple[int, ...] = ()
    """Also rate EDM's Heun sampler at each of these numbers of steps."""
    repeats: int = 3
    """Times that everything is sampled and rated, each with seeds of its own."""
    seed: int = 0
    """Seed of the first image; image i has seed + i, and the repeats follow one another."""
    batch: int = 256
    """Images computed at a time."""
    weights: Path | None = None
    """Inception weights (FID, KID, IS). Default: torch's cache, else a download of 96 MB."""
    vgg: Path | None = None
    """VGG16 weights (precision, recall). Default: torch's cache, else a download of 528 MB."""
    dinov2: Path | None = None
    """DINOv2 weights, such as dinov2_vitl14_pretrain.pth: adds the column FD-DINOv2."""
    reference: Path | None = None
    """EDM's statistics of a data set (.npz with mu and sigma) instead of images: FID and IS only."""
    download: bool = True
    """Fetch weights that are neither given nor cached."""
    run_dir: Path | None = None
    """Folder for metrics.json and the cache of the reference. Default: evaluation-<model> beside the model."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'."""


@dataclass(frozen=True)
class Quality:
    """One sampler's figures, a row for each repeat; repeat i made its images from first_seeds[i] on."""

    sampler: Sampler
    first_seeds: tuple[int, ...]
    repeats: tuple[Row, ...]

    def mean(self, column: str) -> float:
        """Mean over the repeats."""
        return fmean(row.metrics[column] for row in self.repeats)

    def minimum(self, column: str) -> float:
        """Minimum over the repeats (EDM's published FIDs are minima of three)."""
        return min(row.metrics[column] for row in self.repeats)

    def cell(self, column: Column) -> str:
        """'mean (minimum)' of several repeats, the figure of one, '-' where it is missing."""
        if column.missing is not None:
            return "-"
        mean = f"{self.mean(column.name):.4g}"
        return mean if len(self.repeats) == 1 else f"{mean} ({self.minimum(column.name):.4g})"


def main(args: Sequence[str] | None = None) -> None:
    """The command line; exits with status 2 and one message where the user can mend it."""
    options = tyro.cli(Options, args=args, prog="python -m ect.evaluate")
    try:
        evaluate(options, Console())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def evaluate(options: Options, console: Console) -> list[Quality]:
    """Rate the model, print the table and write metrics.json. Raises UserError on what the user can mend."""
    _check_numbers(options)
    device = resolve(options.device)
    net, info = load_model(options.model, device=device)
    assert isinstance(net, EDMPrecond)  # ECMPrecond is one too
    samplers = _samplers(options, info)
    data = _reference(options, net, info)
    run_dir = _run_dir(options)
    files = FidelityOptions(options.weights, options.vgg, options.dinov2, options.reference, options.download)
    evaluator = make_evaluator(data, EvalConfig(samples=options.samples), run_dir, options=files, device=device)
    rows = []
    if evaluator.available:
        rows = _rate(options, net, evaluator, samplers, device, console)
    _print(console, options, evaluator, rows or [Quality(sampler, (), ()) for sampler in samplers])
    if not rows:
        raise UserError(f"{options.model}: no metric can be computed; the lines below the table say what each needs")
    _write(run_dir / "metrics.json", options, net, info, evaluator, rows)
    console.print(Text(f"wrote {run_dir / 'metrics.json'}"))
    return rows


def _check_numbers(options: Options) -> None:
    for name, value, least in (("repeats", options.repeats, 1), ("batch", options.batch, 1), ("seed", options.seed, 0)):
        if value < least:
            raise UserError(f"--{name} {value}: expected at least {least}")
    if options.seed + options.repeats * options.samples > 2**63:
        raise UserError(f"--seed {options.seed}: the last image's seed must be below 2^63")
    if options.reference is not None and options.data is not None:
        raise UserError("--reference replaces the images of --data; leave out one of the two")
    if any(steps < 1 for steps in options.heun):
        raise UserError(f"--heun {' '.join(map(str, options.heun))}: expected at least 1 step")


def _samplers(options: Options, info: dict[str, Any]) -> list[Sampler]:
    mid_t = options.mid_t
    if mid_t is None:
        mid_t = tuple(info.get("mid_t") or _MID_T)
    if not all(high > low > 0 for high, low in itertools.pairwise((SIGMA_MAX, *mid_t))):
        given = " ".join(f"{t:g}" for t in mid_t)
        raise UserError(f"--mid-t {given}: expected strictly decreasing levels between 0 and {SIGMA_MAX:g}")
    return consistency_samplers(mid_t) + heun_samplers(options.heun)


def _reference(options: Options, net: EDMPrecond, info: dict[str, Any]) -> Dataset | None:
    """The data set to compare with, checked against the model; None where --reference replaces it."""
    if options.reference is not None:
        return None
    recorded = info.get("data")
    source = options.data or ("digits" if recorded == "digits" else None)
    if source is None:
        hint = f"it was trained on {recorded!r}" if recorded else "it does not say what it was trained on"
        raise UserError(f"{options.model}: {hint}; give those images, --data PATH, or --reference STATISTICS.npz")
    data = load(DataConfig(source, resolution=options.resolution))
    made = f"{net.img_resolution}x{net.img_resolution} with {net.img_channels} channels"
    found = f"{data.resolution}x{data.resolution} with {data.channels} channels"
    if made != found:
        raise UserError(
            f"--data {source}: images are {found}, the model's are {made}; give the data it was trained on, or for a "
            f"folder of images --resolution {net.img_resolution}"
        )
    return data


def _run_dir(options: Options) -> Path:
    run_dir = options.run_dir or options.model.parent / f"evaluation-{options.model.stem}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: cannot make this folder ({error.strerror}); choose another") from error
    return run_dir


def _rate(
    options: Options,
    net: EDMPrecond,
    evaluator: Evaluator,
    samplers: list[Sampler],
    device: torch.device,
    console: Console,
) -> list[Quality]:
    """All repeats of all samplers; in each repeat they start from the same latents."""
    first_seeds = tuple(options.seed + i * options.samples for i in range(options.repeats))
    result = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(samplers) * options.repeats)
        for sampler in samplers:
            repeats: list[Row] = []
            for first in first_seeds:
                progress.update(task, description=f"{sampler.label}, {len(repeats) + 1} of {options.repeats}")
                repeats += measure(
                    net,
                    [sampler],
                    evaluator,
                    samples=options.samples,
                    batch=options.batch,
                    device=device,
                    first_seed=first,
                )
                progress.advance(task)
            result.append(Quality(sampler, first_seeds, tuple(repeats)))
    return result


def _print(console: Console, options: Options, evaluator: Evaluator, rows: list[Quality]) -> None:
    spread = f"mean (minimum) of {options.repeats} repeats of" if options.repeats > 1 else "from"
    table = Table(title=Text(f"{options.model}: {spread} {options.samples:,} samples"), title_justify="left")
    for i, header in enumerate(["sampler", "NFE", *(column.name for column in evaluator.columns)]):
        table.add_column(Text(header), justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(Text(row.sampler.label), str(row.sampler.nfe), *map(row.cell, evaluator.columns))
    console.print(table)
    for note in evaluator.notes:
        console.print(Text(f"- {note}"))


def _write(
    path: Path, options: Options, net: EDMPrecond, info: dict[str, Any], evaluator: Evaluator, rows: list[Quality]
) -> None:
    weights = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        weights.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    names = [column.name for column in evaluator.available]
    report = {
        "format": 1,
        "model": {"path": str(options.model), "weights_sha256": weights.hexdigest(), "info": info},
        "samples": options.samples,
        "used": evaluator.used,
        "missing": {column.name: column.missing for column in evaluator.columns if column.missing is not None},
        "rows": [
            {
                "sampler": row.sampler.label,
                "nfe": row.sampler.nfe,
                "options": row.sampler.options,
                "first_seeds": row.first_seeds,
                "images_per_second": fmean(repeat.images_per_second for repeat in row.repeats),
                "mean": {name: row.mean(name) for name in names},
                "minimum": {name: row.minimum(name) for name in names},
                "repeats": [repeat.metrics for repeat in row.repeats],
            }
            for row in rows
        ],
    }
    with atomic(path) as temp:
        temp.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
