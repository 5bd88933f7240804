"""python -m ect.merge makes one network of the weights that a run kept: a mean, an average of any width, or by a search."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from ect.ranks.interrupts import install, leave

    install(leave)

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import Progress

from ect.config import (
    BATCH,
    FROM_0,
    FROM_1,
    IMAGES,
    KIMG,
    SEED,
    SIGMA_MAX,
    SIGMA_REL,
    SOME,
    THREADS,
    Limit,
    at_most,
    refuse_beyond,
)
from ect.errors import UserError
from ect.files import kept
from ect.files.kept import Kept
from ect.files.run_folder import load
from ect.merge import lcsc, search
from ect.merge.blend import Blend, Coefficients, parts_of
from ect.merge.posthoc import distance, posthoc_coefficients
from ect.merge.profiles import uniform
from ect.options import refuse_idle
from ect.precision import PRECISIONS, sampling
from ect.ranks import self_check
from ect.ranks.device import resolve, set_threads
from ect.ranks.distributed import World
from ect.ranks.launch import launch
from ect.sampler import Consistency, levels_after_first
from ect.search.judge import data_of, judge
from ect.show.log import Screen

_WIDTH = 120  # columns, where there is no terminal that has a width


@dataclass(frozen=True)
class Options:
    """Make one network of the weights that a run kept: by --uniform, by --posthoc or by --search.

    --posthoc takes averages by power profiles (--log.averages-kimg), the others raw weights (--log.weights-kimg).
    ect.sample and ect.evaluate take the file that is written, which says what it is made of.
    """

    run: tyro.conf.Positional[Path]
    """The folder of a run."""
    uniform: str | None = None
    """FROM-TO, in kimg: the plain mean of all weights kept there, such as 640-1280."""
    posthoc: float | None = None
    """The average of another relative width, such as .075, by the power profiles that were kept (EDM2)."""
    at: float | None = None
    """The kimg at which --posthoc's average ends: some at which averages were kept. Default: the last."""
    search: bool = False
    """Search for the linear combination that samples best (LCSC; it needs the extra 'search')."""
    out: Path = Path("merged.safetensors")
    """File to write."""
    range: str | None = None
    """FROM-TO, in kimg: the weights that --search combines. Default: the later half of those that were kept."""
    nfe: int = 2
    """Network evaluations an image that --search is for; coefficients found for one number are not the best for another."""
    mid_t: tuple[float, ...] | None = None
    """Noise levels of the evaluations after the first, decreasing. Default: the model's own."""
    metric: str | None = None
    """The figure that --search lowers, a column of ect.evaluate. Default: FDc, or else FID."""
    data: str | None = None
    """Reference images of --search, as for ect.train. Default: those of the run."""
    samples: int = 2000
    """Images by which --search rates a combination."""
    ratings: int = 400
    """Number of combinations that --search tries, about."""
    seed: int = 0
    """Seed of the steps of --search."""
    batch: int = 256
    """Images computed at a time."""
    device: str = "auto"
    """'auto' (CUDA where there is one), 'cpu', 'cuda' or 'cuda:1'."""
    precision: Literal["tf32", "fp32"] = "tf32"
    """Convolutions and matrix products on a GPU: in TF32, as training samples unless it is in fp32; or in true fp32."""
    threads: int | None = None
    """CPU threads. None: as many as CPUs that this process may use."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; exit with status 2 and one message where the user can mend it."""

    def work(options: Options, world: World) -> int:
        merge(options, Screen(width=None if sys.stdout.isatty() else _WIDTH), world)
        return 0

    if status := launch(lambda: tyro.cli(Options, args=args, prog="python -m ect.merge"), work):
        raise SystemExit(status)


def merge(options: Options, console: Console, world: World = World()) -> None:
    """Choose coefficients by the way that the options ask for, and write the network that they give.

    All ranks of `world` make images, rank 0 rates and writes. Raises UserError on options that do not fit.
    """
    _check(options)
    device, run, out = resolve(options.device, world), options.run.expanduser(), options.out.expanduser()
    set_threads(options.threads, world)
    weights = kept.listed(run) if options.posthoc is None else kept.averages(run)
    about: dict[str, Any] = {"run": str(options.run), "way": "uniform"}
    if options.uniform is not None:
        blend = Blend(parts_of(within(weights, options.uniform, "--uniform")), device)
        coefficients = uniform(len(blend.parts))
    elif options.posthoc is not None:
        weights = until(weights, options.at)
        blend = Blend(parts_of(weights), device)
        coefficients, told = _posthoc(weights, options.posthoc, console)
        about |= told
    else:
        half = f"{weights[-1].nimg / 2000}-{weights[-1].nimg / 1000}"
        blend = Blend(search.parts(run, load(run), within(weights, options.range or half, "--range")), device)
        coefficients, told = _search(blend, options, device, console, world)
        about |= told
    if world.rank == 0:
        blend.save(out, coefficients, about)
        print(
            f"wrote {out}, of {int((coefficients != 0).sum())} sets of weights"
        )  # a path is not to be broken into lines


def _posthoc(stored: Sequence[Kept], sigma_rel: float, console: Console) -> tuple[Coefficients, dict[str, Any]]:
    nimg, widths = [one.nimg for one in stored], [one.sigma_rel or 0.0 for one in stored]
    found = posthoc_coefficients(nimg, widths, nimg[-1], sigma_rel)
    off = distance(found, nimg, widths, nimg[-1], sigma_rel)
    met = f"the profile of width {sigma_rel:g} at {nimg[-1] / 1000:g} kimg is met to {100 * off:.2g} %"
    console.print(met, highlight=False)
    return found, {"way": "posthoc", "sigma_rel": sigma_rel, "distance": off}


def _search(
    blend: Blend, options: Options, device: torch.device, console: Console, world: World
) -> tuple[Coefficients, dict[str, Any]]:
    levels = (SIGMA_MAX, *levels_after_first(options.mid_t, blend.info))
    if options.nfe > len(levels):
        raise UserError(f"--nfe {options.nfe}: also give its {options.nfe - 1} later noise levels, --mid-t")
    beside = [nfe for nfe in range(1, len(levels) + 1) if nfe != options.nfe]
    samplers = [Consistency(levels[:nfe]) for nfe in (options.nfe, *beside)]
    self_check.choose(device)
    for line in self_check.of_sampling(blend.net, device, world):
        console.print(line, markup=False, highlight=False)
    data, folder = data_of(blend.net, blend.info, options.run.expanduser(), options.data)
    rater = judge(data, folder, options.metric, options.samples, options.batch, device, world)
    lcsc.library()  # before the minutes of rating
    with sampling(PRECISIONS[options.precision]), Progress(console=console, transient=True) as rater.progress:
        rater.progress.add_task("rating", total=options.ratings + len(search.single(blend)))
        return search.search(blend, rater, samplers, options.ratings, options.seed, console)


def within(weights: Sequence[Kept], asked: str, option: str) -> list[Kept]:
    """Return the weights that were kept from one number of kimg to another, both included; asked: "FROM-TO".

    Raises UserError, which names `option`, where that is no range, or there are none.
    """
    low, high = _range(asked, option)
    found = [one for one in weights if low <= one.nimg / 1000 <= high]
    if not found:
        there = f"the run has some from {weights[0].nimg / 1000:g} to {weights[-1].nimg / 1000:g} kimg"
        raise UserError(f"{option} {asked}: no weights were kept there; {there}")
    return found


def _range(asked: str, option: str) -> tuple[float, float]:
    """Return both ends of a range in kimg."""
    try:
        low, high = (float(end) for end in asked.split("-"))
        if 0 <= low <= high < math.inf:
            return low, high
    except ValueError:
        pass
    raise UserError(f"{option} {asked:.60}: expected FROM-TO in kimg, such as 640-1280")


def until(weights: Sequence[Kept], kimg: float | None) -> list[Kept]:
    """Return what was kept until some kimg, at which there is some; None: the last. Raises UserError where there is none."""
    last = weights[-1].nimg if kimg is None else round(kimg * 1000)
    if last not in {one.nimg for one in weights}:
        near = min((one.nimg for one in weights), key=lambda nimg: abs(nimg - last))
        raise UserError(f"--at {kimg:g}: no averages were kept there; the nearest are of {near / 1000:g} kimg")
    return [one for one in weights if one.nimg <= last]


_EVALUATIONS = Limit("from 1 to 1,000 network evaluations", lambda nfe: 1 <= nfe <= 1000)


def _check(options: Options) -> None:
    """Raise UserError where an option is impossible, alone or beside others."""
    refuse_beyond(
        {
            "nfe": (options.nfe, _EVALUATIONS), "samples": (options.samples, SOME, IMAGES), "seed": (options.seed, SEED),
            "ratings": (options.ratings, FROM_1, at_most(10**6)), "batch": (options.batch, FROM_1, BATCH),
            "threads": (options.threads, FROM_1, THREADS), "posthoc": (options.posthoc, SIGMA_REL),
            "at": (options.at, FROM_0, KIMG),
        }
    )  # fmt: skip
    for asked, option in ((options.uniform, "--uniform"), (options.range, "--range")):
        if asked is not None:
            _range(asked, option)
    levels_after_first(options.mid_t, {})
    if options.out.suffix != ".safetensors" or not options.out.expanduser().parent.is_dir():
        raise UserError(f"--out {options.out}: name a file NAME.safetensors in a folder that is there")
    if [options.uniform is None, options.posthoc is None, not options.search].count(False) != 1:
        raise UserError(f"{options.run}: give --uniform FROM-TO, --posthoc WIDTH or --search, one of the three")
    if options.posthoc is None:
        refuse_idle(options, ("at",), "it is of --posthoc; leave it out")
    if not options.search:
        idle = ("range", "nfe", "mid-t", "metric", "data", "samples", "ratings", "seed", "batch")
        refuse_idle(options, idle, "it is of --search; leave it out")


if __name__ == "__main__":
    main()
