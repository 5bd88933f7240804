"""python -m ect.evaluate: the quality of a model at 1 and 2 network evaluations, in one table and in metrics.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from ect.config import DataConfig, EvalConfig
from ect.data import Dataset, load
from ect.errors import UserError
from ect.files.checkpoint import atomic, load_model
from ect.metrics import (
    Evaluator,
    FidelityOptions,
    QualityRow,
    RemoteEvaluator,
    make_evaluator,
    quality_rows,
    quality_table,
)
from ect.models import EDMPrecond
from ect.precision import PRECISIONS, products, sampling
from ect.ranks import self_check
from ect.ranks.device import resolve
from ect.ranks.distributed import World
from ect.ranks.launch import launch
from ect.sampler import Heun, Sampler, consistency_samplers, levels_after_first
from ect.show.table import Table

_SAMPLES = 50_000  # as published figures have it
_DIGITS_SAMPLES = 3_000  # enough for 1,797 digits
_WIDTH = 120  # columns, where there is no terminal that has a width


@dataclass(frozen=True)
class Options:
    """Rate a model: FDc and FDp for the digits; FID, KID, IS and precision/recall (torch-fidelity) for other images.

    Published CIFAR-10 figures are minima of 3 repeats of 50,000 samples against the 50,000 training images.
    """

    model: tyro.conf.Positional[Path]
    """A model (.safetensors of ours, .pkl of EDM or ECT) or a run folder (its latest checkpoint)."""
    ema: int | None = None
    """Which weight average of a run: --ema 1 is the second entry of its --optim.emas. Default: the first."""
    data: str | None = None
    """Reference images: 'digits', or a path as for ect.train. Default: the digits for a model of the digits."""
    resolution: int | None = None
    """Resize and centre-crop a folder of images to this size (pixels)."""
    samples: int | None = None
    """Generated images a repeat. Default: 50,000; for the digits 3,000."""
    mid_t: tuple[float, ...] | None = None
    """Noise levels of the evaluations after the first, decreasing. Default: the model's own, else that of ECT's
    CIFAR-10 models."""
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
    """Folder for metrics.json and torch-fidelity's cache of the reference. Default: runs/evaluation-<model>."""
    device: str = "auto"
    """'auto' (CUDA where there is one), 'cpu', 'cuda' or 'cuda:1'."""
    precision: Literal["tf32", "fp32"] = "tf32"
    """Convolutions and matrix products on a GPU: in TF32, as training samples unless it is in fp32; or in true fp32."""


def main(args: Sequence[str] | None = None) -> None:
    """The command line; exits with status 2 and one message where the user can mend it."""

    def work(options: Options, world: World) -> int:
        console = Console()
        if not console.is_terminal:
            console.width = max(console.width, _WIDTH)
        evaluate(options, console, world)
        return 0

    status = launch(lambda: tyro.cli(Options, args=args, prog="python -m ect.evaluate"), work)
    if status:
        raise SystemExit(status)


def evaluate(options: Options, console: Console, world: World = World()) -> list[QualityRow]:
    """Rate the model, print the table and write metrics.json. All ranks of `world` make images, rank 0 rates them, prints and
    writes. Raises UserError on what the user can mend."""
    _check_numbers(options)
    device = resolve(options.device, world)
    net, info = load_model(options.model, device=device, ema=options.ema)
    assert isinstance(net, EDMPrecond)  # ECMPrecond is one too
    for line in self_check.of_sampling(net, device, world):
        console.print(Text(line))
    samplers = _samplers(options, info)
    data = _reference(options, net, info)
    run_dir = Path(world.first(lambda: str(_run_dir(options))))
    files = FidelityOptions(options.weights, options.vgg, options.dinov2, options.reference, options.download)
    samples = options.samples
    if samples is None:
        samples = _DIGITS_SAMPLES if data is not None and data.name == "digits" else _SAMPLES
    evaluator: Evaluator = RemoteEvaluator()
    if world.rank == 0:
        evaluator = make_evaluator(data, EvalConfig(samples=samples), run_dir, options=files, device=device)
    with sampling(PRECISIONS[options.precision]):
        arithmetic = products(device)
        rows = _rate(options, samples, net, info, evaluator, samplers, device, console, world)
    if world.rank > 0:
        return rows
    unrated = [QualityRow(sampler, samples, (), (), 0.0) for sampler in samplers]
    _print(console, options, evaluator, rows or unrated, arithmetic)
    if not rows:
        raise UserError(f"{options.model}: no metric can be computed; the lines below the table say what each needs")
    _write(run_dir / "metrics.json", options, net, info, evaluator, rows, arithmetic)
    console.print(Text(f"wrote {run_dir / 'metrics.json'}"))
    return rows


def _check_numbers(options: Options) -> None:
    for name, value, least in (("repeats", options.repeats, 1), ("batch", options.batch, 1), ("seed", options.seed, 0)):
        if value < least:
            raise UserError(f"--{name} {value}: expected at least {least}")
    if options.seed + options.repeats * (options.samples or _SAMPLES) > 2**63:
        raise UserError(f"--seed {options.seed}: the last image's seed must be below 2^63")
    if options.reference is not None and options.data is not None:
        raise UserError("--reference replaces the images of --data; leave out one of the two")
    if any(steps < 1 for steps in options.heun):
        raise UserError(f"--heun {' '.join(map(str, options.heun))}: expected at least 1 step")


def _samplers(options: Options, info: dict[str, Any]) -> list[Sampler]:
    return [*consistency_samplers(levels_after_first(options.mid_t, info)), *map(Heun, options.heun)]


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
    run_dir = options.run_dir
    if run_dir is None:
        model = options.model.resolve()
        name = model.name if model.is_dir() else f"{model.parent.name}-{model.stem}"
        run_dir = Path("runs") / f"evaluation-{name}{f'-ema{options.ema}' if options.ema else ''}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: cannot make this folder ({error.strerror}); choose another") from error
    return run_dir


def _rate(
    options: Options,
    samples: int,
    net: EDMPrecond,
    info: dict[str, Any],
    evaluator: Evaluator,
    samplers: list[Sampler],
    device: torch.device,
    console: Console,
    world: World,
) -> list[QualityRow]:
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("rating", total=samples * options.repeats * len(samplers))
        return quality_rows(
            net,
            evaluator,
            samplers,
            samples=samples,
            repeats=options.repeats,
            seed=options.seed,
            batch=options.batch,
            device=device,
            on_images=lambda count: progress.advance(task, count),
            ema=None if options.ema is None else info.get("ema"),
            world=world,
        )


def _print(
    console: Console, options: Options, evaluator: Evaluator, rows: list[QualityRow], arithmetic: str
) -> None:  # fmt: skip
    spread = f"mean (minimum) of {options.repeats} repeats of" if options.repeats > 1 else "from"
    console.print(Text(f"{options.model}: {spread} {rows[0].samples:,} samples, products in {arithmetic}"))
    console.print(Table(*quality_table(rows, evaluator.columns)))
    for note in evaluator.notes:
        console.print(Text(f"- {note}"))


def _write(
    path: Path, options: Options, net: EDMPrecond, info: dict[str, Any], evaluator: Evaluator, rows: list[QualityRow],
    arithmetic: str,
) -> None:  # fmt: skip
    weights = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        weights.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    report = {
        "format": 2,
        "model": {"path": str(options.model), "weights_sha256": weights.hexdigest(), "info": info},
        "products": arithmetic,
        "used": evaluator.used,
        "missing": {column.name: column.missing for column in evaluator.columns if column.missing is not None},
        "rows": [row.as_json() for row in rows],
    }
    with atomic(path) as temp:
        temp.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
