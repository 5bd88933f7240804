"""The networks that a phase starts with: from a checkpoint, from --init-from, or of the configured architecture made anew."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ect.assembly import frozen, network_spec
from ect.config import Config
from ect.data import AugmentPipe, Dataset
from ect.errors import UserError
from ect.files.checkpoint import Saved, load_model, read_model, read_spec
from ect.files.model_file import check_fits, load_weights
from ect.files.resume import weights_fingerprint
from ect.models import EDMPrecond, build, preconditioning
from ect.models.guided import Guided, guided
from ect.objective import Objective
from ect.tangent import file as features_file
from ect.tangent.network import Features


@dataclass(frozen=True)
class Origin:
    """The network to train, and the frozen one beside it where the objective wants a teacher.

    spec: the network's description for ect.models.build. net: in train mode, on the device. teacher_digest: of its weights,
    by which a resume knows it. features: of the images, for --objective.direction, with a digest likewise. notes: for the log.
    """

    spec: dict[str, Any]
    net: EDMPrecond
    notes: list[str]
    teacher: EDMPrecond | Guided | None = None
    teacher_digest: str | None = None
    features: Features | None = None
    features_digest: str | None = None


def find(
    cfg: Config, objective: type[Objective], dataset: Dataset, device: torch.device, saved: Saved | None
) -> Origin:
    """Return the networks of a phase. saved: the checkpoint that it resumes from.

    Raises UserError where the network of --init-from does not fit the data, the teacher is none, or the data have no classes
    for an objective that wants them, or no features for a direction that does.
    """
    if objective.wants_data and dataset.labels is not None and not dataset.has_classes:
        raise UserError(
            f"--objective.target posterior: {dataset.name} has label vectors, and the posterior is within a class; leave out "
            "--data.labels, or take --objective.target self"
        )
    spec, net, notes = _network(cfg, objective, dataset, saved)
    net = net.to(device).train()
    found = Origin(spec, net, notes)
    if objective.wants_teacher:
        teacher, _ = load_teacher(cfg, device, "--objective.target teacher")
        notes.append(f"the frozen teacher is {cfg.init_from}")
        found = replace(found, teacher=frozen(cfg, teacher), teacher_digest=weights_fingerprint(teacher))
    if cfg.objective.direction == "features":
        features = features_file.find(dataset.images, cfg.data).to(device)
        digest = weights_fingerprint(features)
        notes.append(f"D_t is drawn along features of {dataset.name} (SHA-256 {digest[:12]})")
        found = replace(found, features=features, features_digest=digest)
    return found


def _network(
    cfg: Config, objective: type[Objective], dataset: Dataset, saved: Saved | None
) -> tuple[dict[str, Any], EDMPrecond, list[str]]:
    """Return description, network and notes: the architecture is that of the checkpoint or of --init-from, else new."""
    if saved is not None:
        spec = read_spec(saved[2])
        return spec, build(spec), []
    augment_dim = AugmentPipe.label_dim if cfg.data.augment > 0 else 0
    if cfg.init_from is None:
        spec = network_spec(cfg.net, objective.precond, dataset, augment_dim)
        return spec, build(spec), []
    try:
        snapshot = read_model(cfg.init_from.expanduser())
    except UserError as error:
        raise UserError(f"--init-from {error}") from error
    check_fits(snapshot, str(cfg.init_from))
    kwargs = {**snapshot.spec["kwargs"], "augment_dim": augment_dim, "label_dim": dataset.label_dim}
    kept = cfg.objective.guidance is None  # a guided teacher's answers are for a class
    kwargs |= {"dropout": cfg.net.dropout, "label_dropout": cfg.net.label_dropout if kept else 0.0}
    precond = preconditioning(snapshot.spec["unet"], objective.precond)
    spec = {**snapshot.spec, "precond": precond, "kwargs": kwargs}
    expected = (kwargs["img_resolution"], kwargs["in_channels"])
    if expected != (dataset.resolution, dataset.channels):
        raise UserError(
            f"--init-from {cfg.init_from}: the network is for {expected[0]}x{expected[0]} images with {expected[1]} "
            f"channel(s), --data.source {cfg.data.source} has {dataset.resolution}x{dataset.resolution} with "
            f"{dataset.channels}; choose data or checkpoint to match, or resize with --data.resolution"
        )
    net = build(spec)
    notes = load_weights(net, snapshot)
    return (
        spec,
        net,
        [*notes, f"architecture and sigma_data are those of {cfg.init_from}; of --net only the dropouts count"],
    )


def load_teacher(cfg: Config, device: torch.device, asked_by: str) -> tuple[EDMPrecond, dict[str, Any]]:
    """Load the network of --init-from, which a resume reads again, and the info of its file.

    Raises UserError, in the words of the option `asked_by`, where there is none, or a consistency model.
    """
    if cfg.init_from is None:
        raise UserError(
            f"{asked_by}: there is no teacher; give a diffusion model with --init-from, or train one before, with --pretrain "
            "PRESET"
        )
    net, info = load_model(cfg.init_from, device=device)
    if net.is_consistency:
        raise UserError(
            f"{asked_by}: --init-from {cfg.init_from} is a consistency model, whose answers give no ODE; give a diffusion "
            "model, or tune this one with --objective.target self"
        )
    if cfg.objective.guidance is not None:
        guided(net, cfg.objective.guidance, None, "--objective.guidance")  # refuses what does not fit
    return net, info
