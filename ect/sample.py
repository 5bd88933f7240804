"""python -m ect.sample: images from a checkpoint, as a grid, a folder of PNG files or an .npz."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from ect.config import HEUN_STEPS, SIGMA_MAX
from ect.errors import UserError
from ect.files.checkpoint import atomic, load_model
from ect.models import ECMPrecond, EDMPrecond
from ect.precision import PRECISIONS, products, sampling
from ect.ranks import self_check
from ect.ranks.device import resolve, set_threads
from ect.ranks.distributed import World
from ect.ranks.launch import launch
from ect.sampler import Consistency, Heun, Sampler, draw, generate, levels_after_first
from ect.show.grid import save_grid, save_png

_FILES = (".png", ".npz")


@dataclass(frozen=True)
class Options:
    """Sample images from a consistency or diffusion model. One seed is one image, whatever the batch."""

    checkpoint: tyro.conf.Positional[Path]
    """A model (.safetensors of ours, .pkl of EDM or ECT) or a run folder (its latest checkpoint)."""
    ema: int | None = None
    """Which weight average of a run: --ema 1 is the second entry of its --optim.emas. Default: the first."""
    seeds: str | None = None
    """Seeds as a list of numbers and ranges: 0-63 or 3,7,100-199. Default: --count seeds from --seed on."""
    seed: int = 0
    """First seed."""
    count: int = 64
    """Number of images."""
    nfe: int | None = None
    """Network evaluations an image: 1, or 2 with the model's own mid_t (else that of ECT's CIFAR-10 models). Default: 2."""
    mid_t: tuple[float, ...] | None = None
    """Noise levels of the evaluations after the first, decreasing, between 0 and 80."""
    heun: int | None = None
    """Sample with this many steps of EDM's Heun sampler instead. Default for a diffusion model: 18."""
    class_idx: Annotated[int | None, tyro.conf.arg(name="class")] = None
    """Class of all images, counted from 0. Default for a class-conditional model: drawn by each seed."""
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


def main(args: Sequence[str] | None = None) -> None:
    """The command line; exits with status 2 and one message where the user can mend it."""

    def work(options: Options, world: World) -> int:
        sample(options, world)
        return 0

    status = launch(lambda: tyro.cli(Options, args=args, prog="python -m ect.sample"), work)
    if status:
        raise SystemExit(status)


def sample(options: Options, world: World = World()) -> None:
    """Generate the images and write them where `options.out` says. All ranks of `world` make images, rank 0 writes them. Raises
    UserError on options that do not fit."""
    seeds = _seeds(options)
    for name, value in (("batch", options.batch), ("threads", options.threads)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: expected at least 1")
    device = resolve(options.device, world)
    set_threads(options.threads, world)
    world.first(lambda: _prepare(options.out))
    net, info = load_model(options.checkpoint, device=device, ema=options.ema)
    _check_class(options.class_idx, net.label_dim)
    for line in self_check.of_sampling(net, device, world):
        print(line)
    sampler = _sampler(options, net, info)
    print(f"{options.checkpoint}: {sampler}")
    start = time.perf_counter()
    with sampling(PRECISIONS[options.precision]):
        arithmetic = products(device)
        batches = generate(
            net, seeds, sampler, class_idx=options.class_idx, batch=options.batch, device=device, world=world
        )
        if world.rank > 0:
            deque(batches, maxlen=0)  # makes them
            return
        _write(options, seeds, batches, sampler, _classes(net, seeds, options.class_idx))
    seconds = time.perf_counter() - start
    rate = f"{len(seeds) / seconds:,.1f} img/s, products in {arithmetic}"
    print(f"wrote {len(seeds)} images to {options.out} in {seconds:.1f} s ({rate})")


def _seeds(options: Options) -> list[int]:
    if options.seeds is None:
        if options.count < 1:
            raise UserError(f"--count {options.count}: expected at least 1")
        first, last = options.seed, options.seed + options.count - 1
        if not 0 <= first <= last < 2**63:
            raise UserError(f"--seed {first}: expected a number from 0 on, below 2^63")
        return list(range(first, last + 1))
    if options.seed != Options.seed or options.count != Options.count:
        raise UserError("--seeds says it all; leave out --seed and --count")
    seeds: list[int] = []
    for part in options.seeds.split(","):
        first_text, dash, last_text = part.strip().partition("-")
        last_text = last_text if dash else first_text
        if not (first_text.isdecimal() and last_text.isdecimal() and int(first_text) <= int(last_text) < 2**63):
            raise UserError(
                f"--seeds {options.seeds}: cannot read {part!r}; expected numbers and ranges such as 0-63,100"
            )
        seeds.extend(range(int(first_text), int(last_text) + 1))
    return seeds


def _prepare(out: Path) -> None:
    """Make the folder that is written to, so that a bad --out fails before the work. Raises UserError."""
    if out.suffix not in _FILES and out.suffix[1:].isalpha() and not out.is_dir():
        raise UserError(f"--out {out}: cannot write {out.suffix} files; expected NAME.png, NAME.npz or a folder")
    if out.suffix in _FILES and out.is_dir():
        raise UserError(
            f"--out {out}: is a folder; give another name, or one without {out.suffix} for a folder of images"
        )
    folder = out.parent if out.suffix in _FILES else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"--out {out}: cannot write into {folder} ({error.strerror}); choose another place") from error


def _check_class(class_idx: int | None, label_dim: int) -> None:
    if class_idx is None:
        return
    if label_dim == 0:
        raise UserError(f"--class {class_idx}: this model is unconditional; leave the option out")
    if not 0 <= class_idx < label_dim:
        raise UserError(f"--class {class_idx}: expected 0 to {label_dim - 1}, the classes of this model")


def _sampler(options: Options, net: EDMPrecond, info: dict[str, Any]) -> Sampler:
    """The sampler that the options ask for, or else the one that suits the model."""
    nfe, mid_t, heun = options.nfe, options.mid_t, options.heun
    if heun is None and nfe is None and mid_t is None and not isinstance(net, ECMPrecond):
        heun = HEUN_STEPS[0]  # a diffusion model: two evaluations would only blur
    if heun is not None:
        if nfe is not None or mid_t is not None:
            raise UserError("--heun is the diffusion sampler; leave out --nfe and --mid-t")
        if heun < 1:
            raise UserError(f"--heun {heun}: expected at least 1 step")
        return Heun(heun)
    if nfe is None:
        nfe = 2 if mid_t is None else len(mid_t) + 1
    if nfe < 1:
        raise UserError(f"--nfe {nfe}: expected at least 1 network evaluation")
    if mid_t is None and nfe > 2:
        raise UserError(f"--nfe {nfe}: also give its {nfe - 1} later noise levels, --mid-t, decreasing")
    if mid_t is not None and len(mid_t) != nfe - 1:
        raise UserError(
            f"--nfe {nfe} takes {nfe - 1} noise levels in --mid-t, got {len(mid_t)}; leave out one of the two"
        )
    return Consistency((SIGMA_MAX, *levels_after_first(mid_t, info)[: nfe - 1]))


def _classes(net: EDMPrecond, seeds: Sequence[int], class_idx: int | None) -> list[int]:
    """Class of each image as `generate` chooses it; -1 for an unconditional model."""
    return [draw(net, seed)[1] if class_idx is None else class_idx for seed in seeds]


def _write(
    options: Options, seeds: Sequence[int], batches: Iterator[Tensor], sampler: Sampler, classes: Sequence[int]
) -> None:
    out = options.out
    if out.suffix == ".png":
        save_grid(torch.cat(list(batches)), out)
    elif out.suffix == ".npz":
        images = torch.cat(list(batches)).numpy()
        arrays: dict[str, Any] = {
            "images": images,
            "seeds": np.array(seeds),
            "sigmas": np.array(getattr(sampler, "sigmas", ())),
            "class": np.array(classes),
        }
        with atomic(out) as temp, temp.open("wb") as file:
            np.savez(file, **arrays)
    else:
        for seed, image in zip(seeds, itertools.chain.from_iterable(batches), strict=True):
            folder = out / f"{seed - seed % 1000:06d}"
            folder.mkdir(exist_ok=True)
            save_png(image, folder / f"{seed:06d}.png", durable=False)


if __name__ == "__main__":
    main()
