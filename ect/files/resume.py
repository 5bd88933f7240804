"""Changes that a resume may make, and those that would make it another run: options and data, refused by name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ect.config.emas import spelled
from ect.errors import UserError
from ect.files.fit import check_finite

_FREE = {"run_dir", "resume", "dry_run", "plan", "device", "threads", "batch_per_device", "init_from", "kernels"}
_FREE |= {"graph", "compile", "channels_last", "self_check", "heartbeat", "cooldown", "target"}
# The data may have moved: their fingerprint says whether they are the same.
_FREE |= {"data.source", "data.resolution"}
_FREE_GROUPS = ("log.", "eval.")
_COOLS = {"optim.decay", "optim.cooldown_share", "total_kimg", "pretrain", "pretrain_kimg"}
"""The options that ect.files.branch sets."""
_SHOWN = {"grad_norm", "tally_loss"}
"""Tensors of the state that are shown and teach nothing; version 0.1 wrote them as they were."""
_ROWS = 4096
"""Images or labels of a fingerprint that are copied at a time."""


class ChangedMaths(UserError):
    """A resume with other options, one a line."""

    several_lines = True


def refuse_changed_maths(saved: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise UserError listing every option by which a resumed run would compute something else.

    Args: saved, new: dataclasses.asdict of the two configurations. Logging, evaluation, device and the size of a
    forward pass are free, and so is total_kimg unless the learning rate falls towards it. A run that branches off to cool
    down differs by what ect.files.branch sets.
    """
    old, now = flatten(saved), flatten(new)
    free = set(_FREE)
    if old.get("optim.decay") in ("constant", "rsqrt"):
        free.add("total_kimg")
    if now.get("cooldown"):
        free |= _COOLS
    changed = [
        f"--{name.replace('_', '-')}: checkpoint has {_show(old, name)}, command line says {_show(now, name)}"
        for name in sorted(old.keys() | now.keys())
        if old.get(name) != now.get(name) and name not in free and not name.startswith(_FREE_GROUPS)
    ]
    if changed:
        raise ChangedMaths(
            "--resume: these options change what is computed:\n  " + "\n  ".join(changed) + "\n"
            "Resume with the checkpoint's values, or start a new run from its weights: --init-from CHECKPOINT"
        )


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten {"optim": {"lr": 1}} to {"optim.lr": 1}, values as JSON gives them back (tuples are lists, paths are text)."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        elif name == "emas":
            flat[f"{prefix}{name}"] = [spelled(entry) for entry in value]
        else:
            flat[f"{prefix}{name}"] = json.loads(json.dumps(value, default=str))
    return flat


def _show(config: dict[str, Any], name: str) -> str:
    return json.dumps(config[name]) if name in config else "nothing"


def data_fingerprint(images: Tensor, labels: Tensor | None) -> str:
    """Return the SHA-256 of a data set: uint8 images [N, H, W, C] and labels [N, L] or None, with their shapes.

    Labels count as float32, some rows at a time, in whatever type they are kept.
    """
    digest = hashlib.sha256()
    for tensor, dtype in ((images, torch.uint8), (labels, torch.float32)):
        if tensor is not None:
            digest.update(f"{tuple(tensor.shape)} {dtype};".encode())
            for rows in tensor.detach().split(_ROWS):
                digest.update(rows.cpu().to(dtype).contiguous().numpy().data)
    return digest.hexdigest()


def weights_fingerprint(net: nn.Module) -> str:
    """Return the SHA-256 of the names and bytes of a network's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def refuse_new_start(saved: Path | None, new: Path | None, target: str) -> None:
    """Raise UserError where a resume names another network to begin with, which only a teacher may be (it may have moved).

    Args: saved, new: --init-from then and now. target: --objective.target.
    """
    if saved != new and target != "teacher":
        raise UserError(
            f"--init-from {new}: a resumed run goes on with the weights of its checkpoint; leave it out, or start a new run "
            "without --resume"
        )


def refuse_changed_teacher(saved: str | None, new: str | None, source: Path | None) -> None:
    """Raise UserError unless both fingerprints of the teacher's weights agree. source: what --init-from says now."""
    if saved != new:
        raise UserError(
            f"--init-from {source}: it is not the teacher that the run was started with; give that one, or start a new run"
        )


def refuse_changed_features(saved: str | None, new: str | None) -> None:
    """Raise UserError unless both fingerprints of the weights of --objective.direction's features agree."""
    if saved != new:
        raise UserError(
            "--objective.direction features: the features of these images are not those that the run was started with; put "
            "their file back, or start a new run"
        )


def refuse_bad_numbers(tensors: dict[str, Tensor], model: Path) -> None:
    """Raise UserError, naming it, where a weight, moment or average of a training state is not finite. model: its file."""
    check_finite({name: tensor for name, tensor in tensors.items() if name not in _SHOWN}, str(model))


def refuse_changed_data(saved: str, new: str, source: str) -> None:
    """Raise UserError unless both fingerprints (`data_fingerprint`) agree. source: what --data.source says now."""
    if saved != new:
        raise UserError(
            f"--data.source: {source} holds other images or labels than the run was started with (SHA-256 {new[:12]}, "
            f"checkpoint has {saved[:12]}); put the original data back, or start a new run with --init-from"
        )
