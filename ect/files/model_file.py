"""Our safetensors files: written atomically, nothing in them is ever executed; and whether weights fit a network.

A model file holds `net.state_dict()` under EDM's parameter names; its metadata says how to build the network.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ect.errors import UserError
from ect.files.atomic import atomic
from ect.files.edm_pickle import Snapshot
from ect.files.fit import about, check_finite, check_names
from ect.files.foreign import what_is_at
from ect.models import build

FORMAT = 1
_CHECKSUM = "weights_sha256"
_SEAL = "ect_sha256"
"""Keys of the metadata of model files, the second one of the description; earlier versions wrote none."""


def save_model(path: Path, state: dict[str, Tensor], spec: dict[str, Any], info: dict[str, Any]) -> None:
    """Write a model file, atomically.

    Args: state: net.state_dict(), fp32 (fp16 the parameters of raw weights), any device and memory format. spec: what
    `ect.models.build` takes. info: free, JSON-able ("preset", "nimg", "data", "mid_t", ...).
    Raises UserError where `path` cannot be written.
    """
    header = json.dumps({"format": FORMAT, "spec": spec, "info": info})
    seals = {_SEAL: hashlib.sha256(header.encode()).hexdigest(), _CHECKSUM: _digest(state)}
    write_tensors(Path(path), state, {"ect": header, **seals})


def load_weights(net: nn.Module, snapshot: Snapshot) -> list[str]:
    """Copy a pretrained network's weights into `net`, in place; returns one line for each thing left out on purpose.

    The augmentation head of a teacher (EDM pretrains with labels of the augmentation, tuning has none) is left out.
    Anything else that differs raises UserError by name.
    """
    state, ours, notes = dict(snapshot.state), net.state_dict(), []
    heads = [key for key in state if ".map_augment." in key and key not in ours]
    for key in heads:
        del state[key]
    if heads:
        notes.append(f"left out the pretrained augmentation head ({', '.join(heads)}): this run uses no such labels")
    missing_head = [key for key in ours if ".map_augment." in key and key not in state]
    if missing_head:
        raise UserError(
            f"the pretrained network has no augmentation head ({missing_head[0]}), but --data.augment wants one; "
            "tune with --data.augment 0"
        )
    theirs, wanted = _num_classes(state), _num_classes(ours)
    if theirs != wanted:
        raise UserError(
            f"map_label: the pretrained network knows {theirs} classes, this run {wanted} (0: unconditional); "
            "set --data.labels as the network was trained"
        )
    check_names(ours, state, "the pretrained network")
    check_finite(state, "the pretrained network")
    net.load_state_dict(state)
    return notes


def check_fits(snapshot: Snapshot, source: str) -> None:
    """Raise UserError, naming `source` and what differs, unless the network of snapshot.spec has exactly these weights.

    Costs no memory, whatever a foreign file asks for: the network is built without storage, and given up where the
    file holds far fewer tensors than it has.
    """
    try:
        with torch.device("meta"), about(len(snapshot.state)):
            expected = build(snapshot.spec).state_dict()
    except (UserError, ArithmeticError, LookupError, RuntimeError) as error:
        raise UserError(f"{source}: its description makes no network ({error})") from error
    check_names(expected, snapshot.state, source)


def _num_classes(state: dict[str, Tensor]) -> int:
    return next(
        (t.shape[-1] for key, t in state.items() if key.endswith((".map_label.weight", ".emb_label.weight"))), 0
    )


def read_model_file(path: Path, weights: bool = True) -> Snapshot:
    tensors, metadata = read_tensors(path, weights)
    if "ect" not in metadata:
        hint = "it is the training state of a checkpoint" if "ect_state" in metadata else "it has no 'ect' metadata"
        raise UserError(f"{path}: not a model file of ours: {hint}; make one with python -m ect.convert or ect.train")
    if _SEAL in metadata and metadata[_SEAL] != hashlib.sha256(metadata["ect"].encode()).hexdigest():
        raise UserError(f"{path}: damaged: its description is not the one that was written; copy or convert it again")
    header = parse_header(path, metadata["ect"], ("spec", "info"))
    if weights and _CHECKSUM in metadata and metadata[_CHECKSUM] != _digest(tensors):
        raise UserError(f"{path}: damaged: its weights are not those that were written; copy or convert it again")
    return Snapshot(header["spec"], tensors, header["info"])


def _digest(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def parse_header(path: Path, text: str, fields: tuple[str, ...]) -> dict[str, Any]:
    """Return the JSON object that describes one of our files. Raises UserError where it is damaged or of a later format."""
    try:
        header = json.loads(text)
        if int(header["format"]) > FORMAT:
            raise UserError(f"{path}: format {header['format']}, this version reads up to {FORMAT}; update the package")
        if not all(isinstance(header[field], dict) for field in fields):
            raise TypeError(f"{' and '.join(fields)} must be objects")
    except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{path}: its description is damaged ({error!r}); copy or convert it again") from error
    return dict(header)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    # Clones: weights may be channels-last or share one arena, and a safetensors file holds plain contiguous tensors.
    plain = {key: t.detach().cpu().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
    with atomic(path) as temp:
        temp.touch()
        mode = temp.stat().st_mode  # the user's umask; safetensors would make the file private
        try:
            save_file(plain, temp, metadata)
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(str(error)) from error
        temp.chmod(mode)


def read_tensors(path: Path, wanted: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors if they are wanted, metadata) of a safetensors file.

    Raises UserError where it is missing, truncated or no such file.
    """
    try:
        with safe_open(path, "pt") as file:
            # Clones: a mapped file could not be replaced or pruned on Windows while its tensors live.
            names = file.keys() if wanted else []
            return {name: file.get_tensor(name).clone() for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        reason = what_is_at(path) or error
        raise UserError(f"{path}: not a readable safetensors file: missing, truncated or damaged ({reason})") from error
