"""python -m ect.sample makes images from a checkpoint: a grid, a folder of PNG files or an .npz."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from ect.ranks.interrupts import install, leave

    install(leave)

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ect.config import BATCH, COUNT, FROM_1, HEUN_STEPS, MAX_STEPS, MID_T, SIGMA_MAX, THREADS, refuse_beyond
from ect.config.sampling import SEEDS, listed, numbers, of_classes, one_number, refuse_together
from ect.errors import UserError
from ect.files.checkpoint import load_model
from ect.files.guide import guidance, refuse_alone, said
from ect.files.run_folder import leaving_nothing
from ect.models import EDMPrecond
from ect.options import refuse_idle
from ect.precision import PRECISIONS, products, sampling
from ect.ranks import self_check
from ect.ranks.device import resolve, set_threads
from ect.ranks.distributed import World
from ect.ranks.launch import launch
from ect.sampler import Consistency, Heun, Sampler, draw, generate, levels_after_first
from ect.search import sigmas
from ect.show import images


@dataclass(frozen=True)
class Options:
    """Sample images from a consistency or diffusion model. One seed is one image, whatever the batch."""

    checkpoint: tyro.conf.Positional[Path]
    """A model (.safetensors of ours, .pkl of EDM or ECT) or a run folder (its latest checkpoint)."""
    ema: int | None = None
    """The weight average of a run, counted from 0: --ema 1 is the second entry of its --optim.emas. Default: the first."""
    seeds: str | None = None
    """Seeds as a list of numbers and ranges: 0-63 or 3,7,100-199. Default: --count seeds from --seed on."""
    seed: int = 0
    """First seed."""
    count: int = 64
    """Number of images."""
    nfe: str | None = None
    """Network evaluations an image: 1, or 2 with the model's own mid_t (else that of ECT's CIFAR-10 models). Default: 2. With
    --search-sigmas the numbers to search for, such as 2,3,4."""
    mid_t: tuple[float, ...] | None = None
    """Noise levels of the evaluations after the first, decreasing, between 0 and 80."""
    heun: int | None = None
    """Sample with this many steps of EDM's Heun sampler instead. Default for a diffusion model: 18."""
    class_idx: Annotated[int | None, tyro.conf.arg(name="class")] = None
    """Class of all images, counted from 0. Default for a class-conditional model: drawn by each seed."""
    each_class: bool = False
    """Every class in turn, with all seeds: a grid has a row a class."""
    guidance: float | None = None
    """Move a diffusion model's answers D away from weaker ones, D_w + guidance (D - D_w): from its own without a class, or from
    those of --guide. 1 is no guidance."""
    guide: Path | None = None
    """A weaker diffusion model for --guidance: a file or folder as above, such as an earlier checkpoint of the run."""
    batch: int = 64
    """Images computed at a time."""
    out: Path = Path("samples.png")
    """NAME.png: a grid. NAME.npz: arrays images (uint8 NHWC), seeds, sigmas, class. Otherwise a folder of PNG files."""
    device: str = "auto"
    """'auto' (CUDA where there is one), 'cpu', 'cuda' or 'cuda:1'."""
    precision: Literal["tf32", "fp32"] = "tf32"
    """Convolutions and matrix products on a GPU: in TF32, as training samples unless it is in fp32; or in true fp32."""
    threads: int | None = None
    """CPU threads. None: as many as CPUs that this process may use."""
    search_sigmas: bool = False
    """Make no images: search for the noise levels after the first, the best for each number of --nfe, and print them."""
    data: str | None = None
    """Reference images of --search-sigmas, as for ect.train. Default: those of the run that the model lies in."""
    samples: int = 2000
    """Images by which --search-sigmas rates a choice of levels."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; exit with status 2 and one message where the user can mend it."""

    def work(options: Options, world: World) -> int:
        (search_sigmas if options.search_sigmas else sample)(options, world)
        return 0

    if status := launch(lambda: tyro.cli(Options, args=args, prog="python -m ect.sample"), work):
        raise SystemExit(status)


def sample(options: Options, world: World = World()) -> None:
    """Generate the images and write them where `options.out` says.

    All ranks of `world` make images, rank 0 writes them. Raises UserError on options that do not fit.
    """
    seeds, out = _seeds(options), options.out.expanduser()
    _check_levels(options)
    refuse_alone(options.guidance, options.guide)
    refuse_together(options.class_idx, options.each_class, options.out)
    refuse_idle(options, ("data", "samples"), "it is of --search-sigmas; leave it out, or say that too")
    device = resolve(options.device, world)
    self_check.choose(device)
    set_threads(options.threads, world)
    with leaving_nothing(list(map(Path, world.first(lambda: images.prepare(out))))):
        net, info = load_model(options.checkpoint.expanduser(), device=device, ema=options.ema)
        columns = len(seeds) if options.each_class else None
        seeds, chosen = of_classes(seeds, options.class_idx, options.each_class, net.label_dim)
        denoiser, nets = guidance(net, options.guidance, options.guide, device)
        for line in (line for one in nets for line in self_check.of_sampling(one, device, world)):
            print(line)
        sampler = _sampler(options, net, info)
        print(f"{options.checkpoint}: {sampler}{said(options.guidance)}")
        start = time.perf_counter()
        with sampling(PRECISIONS[options.precision]):
            arithmetic = products(device)
            batches = generate(
                denoiser, seeds, sampler, class_idx=chosen, batch=options.batch, device=device, world=world
            )
            if world.rank > 0:
                deque(batches, maxlen=0)  # makes them
                return
            labels = chosen or [draw(net, seed)[1] for seed in seeds]
            images.write(out, seeds, batches, {"sigmas": getattr(sampler, "sigmas", ()), "class": labels}, columns)
        count, seconds = len(seeds), time.perf_counter() - start
        rate = f"{count / seconds:,.1f} img/s, products in {arithmetic}"
        print(f"wrote {count} images to {out} in {seconds:.1f} s ({rate})")


def search_sigmas(options: Options, world: World = World()) -> None:
    """Print the noise levels that suit the model best, for each number of --nfe, with what they gain and their use.

    All ranks of `world` make images, rank 0 rates them. Raises UserError on options that do not fit, or without images to
    compare with.
    """
    asked = numbers(options.nfe)
    _check_levels(replace(options, nfe=None))
    idle = ("seeds", "seed", "count", "mid-t", "heun", "class", "each-class", "guidance", "guide", "out")
    refuse_idle(options, idle, "--search-sigmas makes no images, and finds its own levels; leave it out")
    device = resolve(options.device, world)
    self_check.choose(device)
    set_threads(options.threads, world)
    with sampling(PRECISIONS[options.precision]):
        sigmas.find(
            options.checkpoint, options.ema, asked, data=options.data, samples=options.samples, batch=options.batch,
            device=device, world=world,
        )  # fmt: skip


def _seeds(options: Options) -> list[int]:
    if options.seeds is None:
        refuse_beyond({"count": (options.count, FROM_1, COUNT)})
        first, last = options.seed, options.seed + options.count - 1
        if not 0 <= first <= last < SEEDS:
            raise UserError(f"--seed {first}: expected a number from 0 on, and all seeds below 2^32")
        return list(range(first, last + 1))
    if options.seed != Options.seed or options.count != Options.count:
        raise UserError("--seeds says it all; leave out --seed and --count")
    return listed(options.seeds)


def _check_levels(options: Options) -> None:
    """Raise UserError where --nfe, --mid-t and --heun are impossible, alone or together."""
    refuse_beyond({"batch": (options.batch, FROM_1, BATCH), "threads": (options.threads, FROM_1, THREADS)})
    nfe, mid_t, heun = one_number(options.nfe), options.mid_t, options.heun
    if heun is not None and (nfe is not None or mid_t is not None):
        raise UserError("--heun is the diffusion sampler; leave out --nfe and --mid-t")
    if heun is not None and not 1 <= heun <= MAX_STEPS:
        raise UserError(f"--heun {heun}: expected at least 1 step, and at most {MAX_STEPS:,}")
    if nfe is not None and nfe < 1:
        raise UserError(f"--nfe {nfe}: expected at least 1 network evaluation")
    if nfe is not None and nfe > 2 and mid_t is None:
        raise UserError(f"--nfe {nfe}: also give its {nfe - 1} later noise levels, --mid-t, decreasing")
    if nfe is not None and mid_t is not None and len(mid_t) != nfe - 1:
        takes = f"--nfe {nfe} takes {nfe - 1} noise levels in --mid-t"
        raise UserError(f"{takes}, got {len(mid_t)}; leave out one of the two")
    levels_after_first(mid_t or MID_T, {})


def _sampler(options: Options, net: EDMPrecond, info: dict[str, Any]) -> Sampler:
    """Return the sampler that the options ask for, or else the one that suits the model."""
    nfe, mid_t, heun = one_number(options.nfe), options.mid_t, options.heun
    if heun is None and nfe is None and mid_t is None and not net.is_consistency:
        heun = HEUN_STEPS[0]  # a diffusion model: two evaluations would only blur
    if heun is not None:
        return Heun(heun)
    nfe = nfe if nfe is not None else 2 if mid_t is None else len(mid_t) + 1
    return Consistency((SIGMA_MAX, *levels_after_first(mid_t, info)[: nfe - 1]))


if __name__ == "__main__":
    main()
