"""The memory that a run will need, known before it starts, and the batch per device that fits.

What lives in tensors is exact, from an update and a sampling pass on the meta device (ect.cost.trace); what does not is an
allowance, each stated below.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch

from ect import precision
from ect.assembly import captures, compiles, flat_state, frozen, keeps_channels_last, objective_type, train_step
from ect.config import Config
from ect.cost.footprint import Footprint
from ect.cost.trace import trace
from ect.data import Dataset, ImageStream
from ect.data.readers.space import free_memory
from ect.data.stream import RESIDENT_SHARE
from ect.errors import UserError
from ect.models import EDMPrecond, build, fused
from ect.optim import FlatState
from ect.show.grid import GRID_SEEDS
from ect.step import TrainStep
from ect.tangent.network import Features

GB = 1e9
CUDA_CONTEXT = 600_000_000  # the driver's, and the code of torch, cuBLAS and cuDNN as far as it is loaded
WORKSPACES = 1_000_000_000  # of cuDNN's convolutions and of cuBLAS
FRAGMENTATION = 0.1  # of the update's tensors: what the caching allocator cannot put to use
# A process that trains on a CPU, tensors aside; measured on Linux with torch 2.14: 0.53 GB by importing torch, another 0.18 by
# what a prediction and a network make torch import, another 0.06 by the first updates, grids and checkpoint.
PROCESS = 780_000_000
COMPILER = 170_000_000  # measured likewise: torch.compile on a CPU, beside PROCESS


@dataclass(frozen=True)
class Prediction:
    """Peak memory of a run, in bytes.

    state: parameters, gradients, moments, averages, the averaged network, a frozen teacher, features, images. update: the most
    that an update has alive beside them. between: the most that sampling or a checkpoint has; a captured graph keeps the
    update's memory meanwhile. allowance: for what lies outside of tensors. launches: no memory, but counted on the way: of an
    update.
    """

    batch_per_device: int
    state: int
    update: int
    between: int
    allowance: int
    graph: bool
    launches: int = 0

    @property
    def total(self) -> int:
        beside = self.update + self.between if self.graph else max(self.update, self.between)
        return self.state + beside + self.allowance

    def __str__(self) -> str:
        parts = {
            "state": self.state,
            "update": self.update,
            "between updates": self.between,
            "allowance": self.allowance,
        }
        listed = ", ".join(f"{name} {size / GB:.2f}" for name, size in parts.items())
        return (
            f"predicted peak memory {self.total / GB:.1f} GB with {self.batch_per_device} images at a time ({listed})"
        )


def predict(
    cfg: Config,
    spec: dict[str, Any],
    dataset: Dataset,
    device: torch.device,
    batch_per_device: int,
    world_size: int = 1,
) -> Prediction:
    """Predict the peak memory of training the network of `spec` (ect.models.build) on `device`.

    Its share of the batch is taken `batch_per_device` images at a time. Reads neither images nor weights, and allocates
    nothing. Not in it: Inception at evaluations, and on a CPU what the ops' reference implementations need inside of
    them.
    """
    net, state, step = update_of(cfg, spec, dataset, device, batch_per_device, world_size)
    update = Footprint.of(trace(step.update, device.type))
    with torch.no_grad():
        images = max(len(GRID_SEEDS), cfg.eval.batch if cfg.eval.samples else 0)
        x = torch.empty(images, net.img_channels, net.img_resolution, net.img_resolution, device="meta")
        sampling = Footprint.of(trace(lambda: net.eval()(x, x[:, 0, 0, 0]), device.type))
    weights = state.params.untyped_storage().nbytes()
    gpu = device.type == "cuda"
    copies = len(state.saved_arenas()) + len(state.emas)  # that a checkpoint makes: of its state and its model files
    transient = update.peak_bytes - update.state_bytes
    process = PROCESS + (COMPILER if compiles(cfg, device) else 0)
    allowance = CUDA_CONTEXT + WORKSPACES + round(FRAGMENTATION * transient) if gpu else process
    between = max(sampling.peak_bytes - sampling.state_bytes, copies * weights)
    return Prediction(
        batch_per_device,
        update.state_bytes + weights,
        transient,
        between,
        allowance,
        captures(cfg, device),
        update.launches,
    )


def update_of(
    cfg: Config,
    spec: dict[str, Any],
    dataset: Dataset,
    device: torch.device,
    batch_per_device: int,
    world_size: int = 1,
) -> tuple[EDMPrecond, FlatState[EDMPrecond], TrainStep]:
    """Return a network, its state and its step on the meta device, as they would be on `device`.

    Of a share of the batch that takes more than two passes it does the first two.
    """
    share = cfg.batch // world_size
    passes = min(2, share // batch_per_device)  # the second adds to the gradients of the first, as would a third
    traced = replace(
        cfg, batch=passes * batch_per_device, batch_per_device=batch_per_device, compile=False, graph=False,
        precision=precision.resolve(cfg.precision, device).name,  # type: ignore[arg-type]
        channels_last=keeps_channels_last(cfg, device),
    )  # fmt: skip
    on_ops = device.type == "cuda" or fused.wanted(None, torch.empty(0))
    with torch.device("meta"):
        net, teacher, features = build(spec).train(), None, None
        net.model.on_ops = on_ops
        if objective_type(cfg.objective).wants_teacher:
            teacher = frozen(traced, copy.deepcopy(net))
        if cfg.objective.direction == "features":
            features = Features(dataset.resolution, dataset.channels).requires_grad_(False)
    state = flat_state(traced, net)
    stream = ImageStream(dataset, cfg.seed, "meta", traced.batch, _resident(dataset, device))
    return net, state, train_step(traced, state, stream, teacher=teacher, features=features)


def fit(
    cfg: Config, spec: dict[str, Any], dataset: Dataset, device: torch.device, memory: int, world_size: int = 1
) -> Prediction:
    """Return the prediction for the most images at a time that divide the share of the batch and need at most `memory` bytes.

    Raises UserError where one image is too many.
    """
    share = cfg.batch // world_size
    for images in (n for n in range(share, 0, -1) if share % n == 0):
        prediction = predict(cfg, spec, dataset, device, images, world_size)
        if prediction.total <= memory:
            return prediction
    raise UserError(
        f"--batch-per-device auto: {memory / GB:.1f} GB of memory are free on {device}, but one image at a time needs "
        f"{prediction.total / GB:.1f} GB; choose a smaller network or another --device, or try with --batch-per-device 1"
    )


def plan(cfg: Config, spec: dict[str, Any], dataset: Dataset, device: torch.device, world_size: int = 1) -> Prediction:
    """Return the prediction for the configured number of images at a time.

    'auto' is found by `fit` in the memory that is free.
    """
    if cfg.batch_per_device == "auto":
        return fit(cfg, spec, dataset, device, available(device), world_size)
    return predict(cfg, spec, dataset, device, cfg.batch_per_device or cfg.batch // world_size, world_size)


def _resident(dataset: Dataset, device: torch.device) -> bool:
    """Return what ImageStream will choose on `device`; that the images fit, where there is no such device to ask."""
    asked = device.type == "cuda" and torch.cuda.is_available()
    return not asked or dataset.images.nbytes <= RESIDENT_SHARE * available(device)


def available(device: torch.device) -> int:
    """Return the free bytes of a device; for a CPU what the machine has left, or the container where that is less."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = free_memory()
    if free is None:
        raise UserError("--batch-per-device auto: this system does not tell its free memory; give a number")
    return free
