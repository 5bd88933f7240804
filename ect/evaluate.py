"""python -m ect.evaluate rates a model at 1 and 2 network evaluations, in one table and in metrics.json."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from ect.ranks.interrupts import install, leave

    install(leave)

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from ect.config import BATCH, FOURS, FROM_1, IMAGES, MAX_STEPS, THREADS, EvalConfig, at_most, refuse_beyond
from ect.config.sampling import SEEDS
from ect.errors import UserError
from ect.files.checkpoint import load_model
from ect.files.guide import guidance, of_model, refuse_alone, said
from ect.files.resume import weights_fingerprint
from ect.files.run_folder import evaluation_dir, leaving_nothing
from ect.metrics import Evaluator, FidelityOptions, QualityRow, RemoteEvaluator, make_evaluator, quality_rows, reference
from ect.precision import PRECISIONS, products, sampling
from ect.ranks import self_check
from ect.ranks.device import resolve, set_threads
from ect.ranks.distributed import World
from ect.ranks.launch import launch
from ect.sampler import Heun, Sampler, consistency_samplers, levels_after_first
from ect.show import report
from ect.show.log import Screen

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
    """The weight average of a run, counted from 0: --ema 1 is the second entry of its --optim.emas. Default: the first."""
    guidance: float | None = None
    """Move a diffusion model's answers away from weaker ones, as ect.sample does."""
    guide: Path | None = None
    """A weaker diffusion model for --guidance."""
    data: str | None = None
    """Reference images: 'digits', or a path as for ect.train. Default: the digits for a model of the digits."""
    resolution: int | None = None
    """Resize and centre-crop a folder of images to this size (pixels)."""
    convert: Literal["rgb", "grey"] | None = None
    """Make a folder or zip of images RGB or grey, as the model's training images were."""
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
    """Inception weights (FID, KID, IS). Default: torch's cache; with --download, a download of 96 MB."""
    vgg: Path | None = None
    """VGG16 weights (precision, recall). Default: torch's cache; with --download, a download of 528 MB."""
    dinov2: Path | None = None
    """DINOv2 weights, such as dinov2_vitl14_pretrain.pth: adds the column FD-DINOv2."""
    reference: Path | None = None
    """EDM's statistics of a data set (.npz with mu and sigma) instead of images: FID and IS only."""
    download: bool = False
    """Fetch weights that are neither given nor cached. Without it no command uses the network."""
    run_dir: Path | None = None
    """Folder for metrics.json and torch-fidelity's cache of the reference. Default: runs/evaluation-<model>."""
    device: str = "auto"
    """'auto' (CUDA where there is one), 'cpu', 'cuda' or 'cuda:1'."""
    precision: Literal["tf32", "fp32"] = "tf32"
    """Convolutions and matrix products on a GPU: in TF32, as training samples unless it is in fp32; or in true fp32."""
    threads: int | None = None
    """CPU threads. None: as many as CPUs that this process may use."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; exit with status 2 and one message where the user can mend it."""

    def work(options: Options, world: World) -> int:
        evaluate(options, Screen(width=None if sys.stdout.isatty() else _WIDTH), world)
        return 0

    status = launch(lambda: tyro.cli(Options, args=args, prog="python -m ect.evaluate"), work)
    if status:
        raise SystemExit(status)


def evaluate(options: Options, console: Console, world: World = World()) -> list[QualityRow]:
    """Rate the model, print the table, write metrics.json, and return the table's rows.

    All ranks of `world` make images, rank 0 rates them, prints and writes. Raises UserError on what the user can mend.
    """
    _check_numbers(options)
    device = resolve(options.device, world)
    set_threads(options.threads, world)
    self_check.choose(device)
    net, info = load_model(options.model.expanduser(), device=device, ema=options.ema)
    denoiser, nets = guidance(net, options.guidance, options.guide, device)
    for line in (line for one in nets for line in self_check.of_sampling(one, device, world)):
        console.print(Text(line))
    few = consistency_samplers(levels_after_first(options.mid_t, info))
    samplers: list[Sampler] = [*few, *map(Heun, options.heun)]
    data = None
    if options.reference is None:
        data = reference(net, info, str(options.model), options.data, options.resolution, options.convert)
    made: list[Path] = []
    run_dir = Path(world.first(lambda: str(evaluation_dir(options.run_dir, options.model, options.ema, made))))
    with leaving_nothing(made):
        files = FidelityOptions(options.weights, options.vgg, options.dinov2, options.reference, options.download)
        samples = options.samples
        if samples is None:
            samples = _DIGITS_SAMPLES if data is not None and data.name == "digits" else _SAMPLES
        evaluator: Evaluator = RemoteEvaluator()
        if world.rank == 0:
            evaluator = make_evaluator(data, EvalConfig(samples=samples), run_dir, options=files, device=device)
        with sampling(PRECISIONS[options.precision]):
            arithmetic = products(device)
            with Progress(console=console, transient=True) as progress:
                task = progress.add_task("rating", total=samples * options.repeats * len(samplers))
                rows = quality_rows(
                    denoiser, evaluator, samplers, samples=samples, repeats=options.repeats, seed=options.seed,
                    batch=options.batch, device=device, on_images=lambda count: progress.advance(task, count),
                    ema=None if options.ema is None else info.get("ema"), world=world,
                )  # fmt: skip
        if world.rank > 0:
            return rows
        spread = f"mean (minimum) of {options.repeats} repeats of" if options.repeats > 1 else "from"
        console.print(
            Text(f"{options.model}: {spread} {samples:,} samples, products in {arithmetic}{said(options.guidance)}")
        )
        unrated = [QualityRow(sampler, samples, (), (), 0.0) for sampler in samplers]
        report.show_metrics(console, rows or unrated, evaluator)
        if not rows:
            raise UserError(
                f"{options.model}: no metric can be computed; the lines below the table say what each needs"
            )
        model = {"path": str(options.model), "weights_sha256": weights_fingerprint(net), "info": info}
        model |= of_model(options.guidance, options.guide)
        report.write_metrics(run_dir / "metrics.json", model, rows, evaluator, arithmetic)
        console.print(Text(f"wrote {run_dir / 'metrics.json'}"))
        return rows


def _check_numbers(options: Options) -> None:
    refuse_alone(options.guidance, options.guide)
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: expected at least 0")
    refuse_beyond(
        {
            "repeats": (options.repeats, FROM_1, at_most(1000)), "batch": (options.batch, FROM_1, BATCH),
            "samples": (options.samples, FROM_1, IMAGES), "threads": (options.threads, FROM_1, THREADS),
            "resolution": (options.resolution, FOURS, at_most(4096)),
        }
    )  # fmt: skip
    if options.seed + options.repeats * (options.samples or _SAMPLES) > SEEDS:
        raise UserError(f"--seed {options.seed}: the last image's seed must be below 2^32")
    if options.reference is not None and options.data is not None:
        raise UserError("--reference replaces the images of --data; leave out one of the two")
    if not all(1 <= steps <= MAX_STEPS for steps in options.heun):
        shown = " ".join(map(str, options.heun))
        raise UserError(f"--heun {shown}: expected at least 1 step, and at most {MAX_STEPS:,}")


if __name__ == "__main__":
    main()
