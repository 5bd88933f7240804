"""The parts of a run, made from its configuration: the network's description, the objective, optimizer state and update."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ect import precision
from ect.config import Config, NetConfig, ObjectiveConfig
from ect.config.emas import beta_of
from ect.data import Dataset, ImageStream
from ect.errors import UserError
from ect.models import EDMPrecond, build, describe, fitting
from ect.models.guided import Guided
from ect.objective import OBJECTIVES, ConsistencyObjective, Objective
from ect.objectives.distillation import ConsistencyDistillation
from ect.objectives.gaps import Gaps
from ect.objectives.posterior import PosteriorMean, PosteriorTarget
from ect.optim import FlatState
from ect.ranks.distributed import World
from ect.step import TrainStep
from ect.tangent.network import Features

COMPILE_PAYS_STEPS = 25_000
"""Steps from which a run on a GPU compiles its network, where the configuration leaves it open. An estimate, not measured: a
few minutes of compiling against a few per cent of a step of tens of milliseconds. benchmarks/step_time.py measures it."""


def network_spec(cfg: NetConfig, precond: str, dataset: Dataset, augment_dim: int) -> dict[str, Any]:
    """Return what ect.models.build needs for a new network of the configured architecture.

    Raises UserError where the data's resolution, the channels or labels of augmentation do not fit it.
    """
    cfg = fitting(cfg, augment_dim)
    mult = " ".join(map(str, cfg.channel_mult))
    if dataset.resolution % 2 ** (len(cfg.channel_mult) - 1):
        raise UserError(
            f"--net.channel-mult {mult}: images of {dataset.resolution}x{dataset.resolution} cannot be halved "
            f"{len(cfg.channel_mult) - 1} times; give fewer factors"
        )
    kwargs: dict[str, Any] = {
        "img_resolution": dataset.resolution, "in_channels": dataset.channels, "out_channels": dataset.channels,
        "label_dim": dataset.label_dim, "augment_dim": augment_dim, "model_channels": cfg.model_channels,
        "channel_mult": list(cfg.channel_mult), "num_blocks": cfg.num_blocks,
        "attn_resolutions": list(cfg.attn_resolutions), "dropout": cfg.dropout, "label_dropout": cfg.label_dropout,
    }  # fmt: skip
    spec = describe(cfg.arch, precond, cfg.sigma_data, kwargs)
    try:
        with torch.device("meta"):
            build(spec)
    except UserError as error:
        raise UserError(
            f"--net.model-channels {cfg.model_channels}, --net.channel-mult {mult}: {error.__cause__ or error}; "
            "multiples of 64 fit"
        ) from error
    return spec


def objective_type(cfg: ObjectiveConfig) -> type[Objective]:
    """Return the configured objective's class, which says what it needs before there is a network.

    Raises UserError where none is known.
    """
    if cfg.kind not in OBJECTIVES:
        raise UserError(f"--objective.kind {cfg.kind}: there is no such objective; known: {', '.join(OBJECTIVES)}")
    targets = {"teacher": ConsistencyDistillation, "posterior": PosteriorTarget} if cfg.kind == "consistency" else {}
    return targets.get(cfg.target, OBJECTIVES[cfg.kind])


def build_objective(cfg: ObjectiveConfig, sigma_data: float) -> Objective:
    """Make the configured objective, for data of standard deviation sigma_data."""
    return objective_type(cfg).configured(cfg, sigma_data)


def frozen(cfg: Config, net: EDMPrecond) -> EDMPrecond | Guided:
    """Make `net` a teacher, in place: in eval mode, without gradients, in the configured precision and memory layout.

    With --objective.guidance it comes back guided.
    """
    device = next(net.parameters()).device
    half = precision.resolve(cfg.precision, device).half
    if half is not None:
        precision.round_weights(net, net.half_weights(), half)
    net = net.eval().requires_grad_(False)
    net = net.to(memory_format=torch.channels_last) if keeps_channels_last(cfg, device) else net
    return net if cfg.objective.guidance is None else Guided(net, cfg.objective.guidance)


def flat_state(cfg: Config, net: EDMPrecond) -> FlatState[EDMPrecond]:
    """Make the configured optimizer state of a network, in the configured precision and memory layout of its device."""
    device = next(net.parameters()).device
    arithmetic = precision.resolve(cfg.precision, device)
    state = FlatState(
        net, cfg.optim.optimizer, cfg.optim.lr, cfg.optim.betas, cfg.optim.eps,
        ema_betas=[beta_of(entry) for entry in cfg.optim.emas], clip=cfg.optim.clip,
        loss_scale=arithmetic.loss_scale, half=arithmetic.half, core=net.half_weights(),
        channels_last=keeps_channels_last(cfg, device),
    )  # fmt: skip
    if arithmetic.half is not None:
        state.compute.model.run_in(arithmetic.half)
    return state


def train_step(
    cfg: Config, state: FlatState[EDMPrecond], stream: ImageStream, world: World = World(),
    teacher: EDMPrecond | Guided | None = None, features: Features | None = None,
) -> TrainStep:  # fmt: skip
    """Make the configured update of `state`, on images of `stream`.

    teacher: made by `frozen`, for an objective that wants one. features: of the images, on their device, for
    --objective.direction features. Raises ValueError where `batch_per_device` is still 'auto' or the features are missing, and
    UserError where the objective wants all images on a device that has not the room.
    """
    device = state.params.device
    if cfg.batch_per_device == "auto":
        raise ValueError("batch_per_device is 'auto'; ect.cost.memory.plan finds the number")
    if (cfg.objective.direction == "features") != (features is not None):
        raise ValueError(
            f"--objective.direction {cfg.objective.direction}: {'without' if features is None else 'with'} features"
        )
    objective = build_objective(cfg.objective, state.compute.sigma_data)
    if cfg.log.levels and isinstance(objective, ConsistencyObjective):
        objective = replace(objective, gaps=Gaps(device))
    elif cfg.log.levels and objective.staged:
        raise UserError(f"--log.levels: the objective {cfg.objective.kind} does not count its pairs; leave it out")
    if features is not None:
        assert isinstance(objective, ConsistencyObjective)  # ect.options refuses others
        objective = replace(objective, distance=features.distance)
    posterior = posterior_mean(cfg, stream) if objective.wants_data else None
    return TrainStep(
        objective, state, stream, seed=cfg.seed, batch=cfg.batch,
        micro_batch=cfg.batch_per_device, xflip=cfg.data.xflip, augment=cfg.data.augment,
        compiled=compiles(cfg, device), graph=captures(cfg, device), world=world,
        teacher=posterior or teacher,
    )  # fmt: skip


def posterior_mean(cfg: Config, stream: ImageStream) -> PosteriorMean:
    """Return the posterior mean over the images of a stream. Raises UserError where they are not all on the device."""
    if not stream.resident:
        raise UserError(
            f"--objective.target posterior: each step reads all images, and they are not all on the device ({stream.note}); "
            "take a device with more memory, or --objective.target self"
        )
    return PosteriorMean(stream.images, stream.labels, cfg.data.xflip)


def compiles(cfg: Config, device: torch.device) -> bool:
    """Say whether a run on `device` puts its network through torch.compile: as configured, else where it is likely to pay."""
    if cfg.compile is not None:
        return cfg.compile
    return device.type == "cuda" and cfg.total_kimg * 1000 / cfg.batch >= COMPILE_PAYS_STEPS


def captures(cfg: Config, device: torch.device) -> bool:
    """Say whether a run on `device` captures its update into a CUDA graph: on a GPU, unless configured otherwise.

    Raises UserError where a graph is asked for by name on a device that has none.
    """
    if cfg.graph and device.type != "cuda":
        raise UserError(f"--graph: a CUDA graph needs a GPU, and this run is on {device}; leave the option out")
    return device.type == "cuda" and cfg.graph is not False


def keeps_channels_last(cfg: Config, device: torch.device) -> bool:
    """Say whether a run on `device` keeps the weights of convolutions channels last: as configured, else on a GPU."""
    return device.type == "cuda" if cfg.channels_last is None else cfg.channels_last
