"""Images that a teacher draws, for a run without data of its own: --data.source teacher. They are kept in the run's folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from ect.config import DRAWN, HEUN_STEPS, Config, DataConfig
from ect.config.sampling import SEEDS
from ect.data import Dataset, load
from ect.data.datasets import TEACHER
from ect.data.readers.labels import one_hot
from ect.errors import UserError
from ect.files import npz
from ect.files.atomic import atomic
from ect.files.origin import load_teacher
from ect.files.run_folder import run_folder
from ect.precision import PRECISIONS, sampling
from ect.ranks.distributed import World
from ect.sampler import Heun, draw, generate

FILE = "teacher-samples.npz"
"""Name of the file in a run's folder: arrays images, uint8 [N, H, W, C], and classes, int64 [N] or empty."""
_FIRST = 2**31
"""Seeds from here on are those of training images: an evaluation, whose seeds begin at 0, shares no latents with them."""
_SPOKEN = 10.0  # seconds between two lines of progress
_HEADERS = 2**16  # bytes of the file that are no images, at most


@dataclass(frozen=True)
class Drawn:
    """A run's images, by its teacher.

    images: uint8 [N, H, W, C]. classes: int64 [N], or [0] without --data.labels. of: the data that the teacher was trained
    on, as its file says, with the number of its classes. seconds: that drawing took.
    """

    images: np.ndarray
    classes: np.ndarray
    of: np.ndarray
    seconds: np.ndarray

    def dataset(self) -> Dataset:
        """Return them as a data set."""
        name, label_dim = str(self.of[0]), int(self.of[1])
        labels = torch.from_numpy(one_hot(self.classes, label_dim)) if len(self.classes) else None
        return Dataset(
            f"{name or 'teacher'}-drawn", torch.from_numpy(np.require(self.images, requirements="W")), labels
        )

    def reference(self) -> Dataset:
        """Return what images of the run are compared with: the digits if the teacher is of them, else the teacher's images."""
        return load(DataConfig()) if str(self.of[0]) == "digits" else self.dataset()

    def save(self, folder: Path) -> None:
        """Write them to the folder of a run, atomically."""
        with atomic(folder / FILE) as temporary, temporary.open("wb") as file:
            np.savez(file, **{name: getattr(self, name) for name in _ARRAYS})


_ARRAYS = tuple(field.name for field in fields(Drawn))


def find(cfg: Config, device: torch.device, world: World, say: Callable[[str], None]) -> Drawn:
    """Return the images of a run's teacher: those in the folder of the run that `cfg` resumes, or else drawn now.

    They are --data.teacher-samples images, each by EDM's sampler of 18 steps from a seed of its own, with the class that the
    seed draws if --data.labels. All ranks draw, and return the same. say: prints a line. Raises UserError where there is no
    teacher, it has no classes to learn, or a resumed run has lost its images.
    """
    if cfg.resume is not None:
        return _read(run_folder(cfg.resume) / FILE)
    net, info = load_teacher(cfg, device, f"--data.source {TEACHER}")
    if cfg.data.labels and not net.label_dim:
        raise UserError(f"--data.labels: the teacher {cfg.init_from} has no classes; leave the option out")
    count, sampler = cfg.data.teacher_samples, Heun(HEUN_STEPS[0])
    first = first_seed(cfg.seed)
    seeds, images, done = range(first, first + count), [], 0
    begin = spoken = time.monotonic()
    say(f"drawing {count:,} images of {cfg.init_from}: {sampler}")
    with sampling(PRECISIONS["tf32"]):
        for batch in generate(net, seeds, sampler, batch=cfg.eval.batch, device=device, world=world):
            images.append(batch)
            done, now = done + len(batch), time.monotonic()
            if now - spoken > _SPOKEN:
                spoken, left = now, (count - done) * (now - begin) / done
                say(f"{done:,} of {count:,} images drawn, {left / 60:.1f} minutes left")
    classes = [draw(net, seed)[1] for seed in seeds] if cfg.data.labels else []
    return Drawn(
        torch.cat(images).numpy(), np.array(classes, np.int64), np.array([str(info.get("data") or ""), str(net.label_dim)]),
        np.array(time.monotonic() - begin),
    )  # fmt: skip


def first_seed(seed: int) -> int:
    """Return the seed of the first image of a run of this seed: one of 2 billion, and all that follow are below SEEDS."""
    return _FIRST + seed * 1_000_000_007 % (SEEDS - _FIRST - DRAWN)


def _read(path: Path) -> Drawn:
    try:
        return Drawn(**npz.read(path, _ARRAYS, path.stat().st_size + _HEADERS))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: the images that the teacher drew for this run are gone ({error}); put them back"
        ) from error
