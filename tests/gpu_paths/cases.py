"""Steps on a fake GPU: small networks of every architecture, with everything that a configuration can switch."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch

from ect.assembly import flat_state, frozen, network_spec, objective_type, train_step
from ect.config import Config
from ect.data import Dataset, ImageStream
from ect.models import EDMPrecond, build
from ect.presets import PRESETS
from ect.step import TrainStep
from ect.tangent.network import Features
from tests.gpu_paths.pairwise import Case, product

BATCH, RESOLUTION = 4, 16
AXES: dict[str, list[Any]] = {
    "arch": ["ddpmpp", "ncsnpp", "adm", "edm2-narrow"],
    "objective": ["consistency", "diffusion", "distillation", "adaptive", "posterior"],
    "precision": ["fp16", "bf16", "tf32", "fp32"],
    "gpu": ["T4", "A100", "H100", "RTX 5090"],
    "kernels": ["built", "absent"],
    "images": ["resident", "streamed"],
    "accumulation": [False, True],
    "labels": [False, True],
    "augment": [False, True],
    "xflip": [False, True],
    "clip": [False, True],
}
BUILT = [(80, 0), (86, 0), (89, 0), (90, 0), (100, 0), (120, 120)]


def allowed(case: Case) -> bool:
    """The precision is one that the device has, the posterior is over images that are there and as they are, and EDM2 has no
    labels of augmentation."""
    posterior = case.get("objective") == "posterior" and (case.get("images") == "streamed" or case.get("augment"))
    labelled = case.get("arch") == "edm2-narrow" and case.get("augment")
    return not posterior and not labelled and (case.get("gpu") != "T4" or case.get("precision") not in ("bf16", "tf32"))


MAIN = ("arch", "objective", "precision", "kernels", "accumulation", "labels", "augment")


def full() -> list[Case]:
    """Every combination of the axes that decide which code runs; the others take turns."""
    turns = {axis: itertools.cycle(values) for axis, values in AXES.items() if axis not in MAIN}
    found = product({axis: AXES[axis] for axis in MAIN}, allowed)
    cases = (case | {axis: next(turn) for axis, turn in turns.items()} for case in found)
    return [case if allowed(case) else case | {"gpu": "A100", "images": "resident"} for case in cases]


def archs(case: Case) -> list[tuple[int, int]] | None:
    """What the extension was built for."""
    return BUILT if case["kernels"] == "built" else None


def configuration(**case: Any) -> Config:
    """Of a case, or of a part of one; small: with as few shapes as a U-Net can have."""
    base = PRESETS["edm-cifar10" if case.get("objective") == "diffusion" else "cifar10-1h"]
    net = replace(
        base.net, arch=case.get("arch", "ddpmpp"), model_channels=32, num_blocks=1,
        channel_mult=(1,) if case.get("small") else (1, 2),
        attn_resolutions=(RESOLUTION // 2,), label_dropout=0.1 if case.get("labels") else 0.0,
    )  # fmt: skip
    target: Any = {"distillation": "teacher", "posterior": "posterior"}.get(case.get("objective", ""), "self")
    weighting: Any = "adaptive" if case.get("objective") == "adaptive" else "inverse_gap"
    least = 0.01 if case.get("objective") == "adaptive" else 0.0  # another option of the pair, along with it
    levels = case.get("objective") in ("adaptive", "posterior")
    guidance = 2.0 if target == "teacher" and case.get("labels") else None
    direction: Any = "features" if case.get("objective") == "distillation" else "difference"  # along with it, likewise
    return replace(
        base, net=net, precision=case.get("precision", "fp16"), batch=BATCH, compile=False, graph=False,
        log=replace(base.log, levels=levels),
        objective=replace(
            base.objective, target=target, weighting=weighting, min_gap=least, direction=direction, guidance=guidance
        ),
        batch_per_device=BATCH // 2 if case.get("accumulation") else None,
        data=replace(base.data, augment=0.12 if case.get("augment") else 0.0, xflip=bool(case.get("xflip"))),
        optim=replace(base.optim, clip=1.0 if case.get("clip") else None),
    )  # fmt: skip


def dataset(labels: bool = False, count: int = 16) -> Dataset:
    """Images and classes of nothing."""
    images = torch.zeros(count, RESOLUTION, RESOLUTION, 3, dtype=torch.uint8)
    return Dataset("nothing", images, torch.eye(10)[torch.arange(count) % 10] if labels else None)


def network(cfg: Config, data: Dataset, device: str = "cuda") -> EDMPrecond:
    precond = objective_type(cfg.objective).precond
    return build(network_spec(cfg.net, precond, data, 9 if cfg.data.augment else 0)).to(device).train()


def step(**case: Any) -> TrainStep:
    """The update of a case, ready to run on the device that torch has now."""
    cfg, data = configuration(**case), dataset(bool(case.get("labels")))
    device = case.get("device", "cuda")
    teacher = frozen(cfg, network(cfg, data, device)) if objective_type(cfg.objective).wants_teacher else None
    state = flat_state(cfg, network(cfg, data, device))
    resident = {"resident": True, "streamed": False}.get(case.get("images", ""))
    features = (
        Features(RESOLUTION, 3).to(device).requires_grad_(False) if cfg.objective.direction == "features" else None
    )
    stream = ImageStream(data, cfg.seed, device, cfg.batch, resident)
    return train_step(cfg, state, stream, teacher=teacher, features=features)
