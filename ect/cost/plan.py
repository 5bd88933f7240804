"""The cost of a configuration on six GPUs before any device has run it: --plan. Every figure is counted or predicted.

The update is traced on the meta device, so neither a GPU nor the data need be there: of data that are absent the size is known
by the preset. Nothing here is measured.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ect.assembly import network_spec, objective_type
from ect.config import Config
from ect.cost import memory
from ect.cost.flops import flops
from ect.cost.footprint import bytes_moved
from ect.cost.gpus import GPUS, Gpu
from ect.cost.trace import Event, trace
from ect.data import AugmentPipe, Dataset, load
from ect.data.datasets import TEACHER
from ect.data.stream import RESIDENT_SHARE
from ect.errors import UserError
from ect.files.checkpoint import read_model
from ect.files.phases import pretrain_config
from ect.precision import resolve
from ect.presets import SHAPES, Shape
from ect.show.table import Table

UTILISATION = 0.4
"""The part of a GPU's peak that training commonly reaches; the floor is what no step can beat."""
_CUDA = torch.device("cuda")
NOTE = (
    "FLOPs and bytes are counted on the operations of an update, two FLOPs a multiply-add. Floor: each operation at the peak "
    "rates of the GPU's data sheet, by arithmetic or memory traffic, whichever takes longer, without the cost of launches. At "
    f"{UTILISATION:.0%}: the FLOPs alone, at that part of the peak. Memory: predicted, for the most images at a time that fit. "
    "Nothing of this is measured."
)


@dataclass(frozen=True)
class Phase:
    """A phase of a run, counted: `events` are the operations of an update whose images are taken all at once."""

    name: str
    cfg: Config
    spec: dict[str, Any]
    parameters: int
    forward: float
    events: list[Event]

    @property
    def steps(self) -> int:
        """Updates."""
        return math.ceil(self.cfg.total_kimg * 1000 / self.cfg.batch)

    def hours(self, gpu: Gpu, utilisation: float | None = None) -> float:
        """Return the hours of the phase on a GPU: the floor, or by FLOPs alone at a part of the peak."""
        arithmetic = resolve(self.cfg.precision, _CUDA)
        half, tf32 = arithmetic.half, arithmetic.tf32
        seconds = 0.0
        for event in self.events:
            count = flops(event)
            fast = half is not None and any(t.dtype == half for t in event.inputs)
            rate = (gpu.fp16 if fast else gpu.tf32 if tf32 else gpu.fp32) * 1e12
            floor = max(count / rate, bytes_moved(event) / (gpu.bandwidth * 1e9))
            seconds += floor if utilisation is None else count / (rate * utilisation)
        return seconds * self.steps / 3600


def show(cfg: Config, console: Console) -> None:
    """Print the plan of a configuration. Raises UserError where data of unknown size are not there, or options do not fit."""
    dataset = _dataset(cfg)
    about = f"{cfg.preset}: {dataset.describe() if dataset.images.device.type != 'meta' else _said(dataset)}"
    console.print(f"{about}\ncounting, which takes a minute for a large network", markup=False, highlight=False)
    phases = list(_phases(cfg, dataset))
    console.print(_counted(phases), _predicted(phases, dataset), NOTE, markup=False, highlight=False)


def _counted(phases: Sequence[Phase]) -> Table:
    rows = []
    for phase in phases:
        update = sum(map(flops, phase.events))
        rows.append(
            [
                phase.name, f"{phase.parameters / 1e6:.3f}", f"{phase.forward / 2e9:.2f}", f"{phase.cfg.total_kimg / 1000:g}",
                f"{phase.steps:,}", f"{phase.cfg.batch:,}", f"{update / 1e12:.4g}", f"{update * phase.steps:.3g}",
            ]
        )  # fmt: skip
    headers = [
        "phase",
        "M parameters",
        "GMAC an image, forward",
        "Mimg",
        "updates",
        "batch",
        "TFLOP an update",
        "FLOP in all",
    ]
    return Table(headers, rows, "Counted")


def _predicted(phases: Sequence[Phase], dataset: Dataset) -> Table:
    @functools.cache
    def needed(number: int, images: int, resident: bool) -> int:
        phase = phases[number]
        return memory.predict(phase.cfg, phase.spec, dataset, _CUDA, images, resident=resident).total

    rows = []
    for gpu in GPUS:
        room, most, peak = round(gpu.memory * memory.GB), [], 0
        resident = dataset.images.nbytes <= RESIDENT_SHARE * room
        for number, phase in enumerate(phases):
            batch = phase.cfg.batch
            parts = [n for n in range(1, batch + 1) if batch % n == 0]
            first = bisect.bisect_right(parts, room, key=lambda n: needed(number, n, resident))
            most.append(f"{parts[first - 1]:,}" if first else "none")
            peak = max(peak, needed(number, parts[max(first - 1, 0)], resident))
        hours = [f"{sum(phase.hours(gpu, part) for phase in phases):,.2f}" for part in (None, UTILISATION)]
        rows.append([gpu.name, *hours, f"{gpu.memory:g}", f"{peak / memory.GB:.1f}", ", ".join(most)])
    headers = ["GPU", "hours, floor", f"hours at {UTILISATION:.0%}", "GB", "GB needed", "images at a time"]
    return Table(headers, rows, f"Predicted, on one GPU, in {resolve(phases[-1].cfg.precision, _CUDA).name}")


def _phases(cfg: Config, dataset: Dataset) -> Iterator[Phase]:
    if cfg.pretrain is not None and cfg.init_from is None:
        yield _phase("pretraining", pretrain_config(cfg), dataset)
        yield _phase("tuning", cfg, dataset)
    else:
        yield _phase("training" if cfg.init_from is None else "tuning", cfg, dataset)


def _phase(name: str, cfg: Config, dataset: Dataset) -> Phase:
    objective, augment_dim = objective_type(cfg.objective), AugmentPipe.label_dim if cfg.data.augment > 0 else 0
    spec = network_spec(cfg.net, objective.precond, dataset, augment_dim)
    if cfg.init_from is not None and cfg.init_from.expanduser().exists():
        spec = read_model(cfg.init_from.expanduser()).spec
        if (size := spec["kwargs"]["img_resolution"]) != dataset.resolution:
            raise UserError(f"--init-from {cfg.init_from}: the network is for {size}x{size} images, the data are not")
        spec = {**spec, "precond": objective.precond}
    net, _, step = memory.update_of(cfg, spec, dataset, _CUDA, cfg.batch)
    events = trace(step.update)
    with torch.no_grad():
        x = torch.empty(1, net.img_channels, net.img_resolution, net.img_resolution, device="meta")
        forward = sum(map(flops, trace(lambda: net.eval()(x, x[:, 0, 0, 0]))))
    return Phase(name, cfg, spec, sum(p.numel() for p in net.parameters()), forward, events)


def _dataset(cfg: Config) -> Dataset:
    """Return the data, or what stands for them: images without pixels, as many and as large as the preset's are."""
    source = cfg.data.source
    shape = SHAPES.get(source)
    if source == TEACHER:
        assert cfg.init_from is not None  # ect.options saw to it
        kwargs = read_model(cfg.init_from.expanduser()).spec["kwargs"]
        shape = Shape(cfg.data.teacher_samples, kwargs["img_resolution"], kwargs["in_channels"], kwargs["label_dim"])
    if shape is None or Path(source).expanduser().exists():
        return load(cfg.data)
    side = cfg.data.resolution or shape.resolution
    with torch.device("meta"):
        labels = torch.empty(shape.images, shape.classes) if cfg.data.labels else None
        return Dataset(source, torch.empty((shape.images, side, side, shape.channels), dtype=torch.uint8), labels)


def _said(dataset: Dataset) -> str:
    side, classes = dataset.resolution, f", {dataset.label_dim:,} classes" if dataset.label_dim else ""
    colour = "grey" if dataset.channels == 1 else "RGB"
    return (
        f"{len(dataset.images):,} images of {side}x{side}, {colour}{classes}; they are not there yet ({dataset.name})"
    )
