"""Checkpoints of a run, and reading a model from any file or folder that holds one.

A checkpoint is three files, written in this order: `checkpoint-<kimg>.state.safetensors` (what a resume needs),
`checkpoint-<kimg>.safetensors` (a model file with the averaged weights) and `checkpoint-<kimg>.json` (size and SHA-256
of the others). Further weight averages have model files too, `checkpoint-<kimg>.ema1.safetensors` and so on, written before
that last file. A checkpoint without it is incomplete and never loaded. `latest` names the newest one.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ect.config.emas import MAX_EMAS
from ect.errors import UserError
from ect.files import edm_pickle
from ect.files.atomic import atomic, left_by_a_kill, remove
from ect.files.edm_pickle import Snapshot
from ect.files.fit import check_finite
from ect.files.model_file import (
    FORMAT,
    check_fits,
    parse_header,
    read_model_file,
    read_tensors,
    save_model,
    write_tensors,
)
from ect.models import EDMPrecond, build, preconditioning

Saved = tuple[dict[str, Tensor], dict[str, Any], Path]
"""(training state, meta, path of the model file) of a checkpoint."""
_STATE, _MODEL, _MANIFEST = ".state.safetensors", ".safetensors", ".json"
_MODELS = (_MODEL, *(f".ema{i}{_MODEL}" for i in range(1, MAX_EMAS)))
"""The ends of the names of the model files, one for each weight average."""
_SEAL, _UNSEALED = "sha256", {"format", "nimg", "healthy", "files"}
"""Key of a manifest's own checksum; earlier versions wrote none, and no more than the others."""
_STEM = re.compile(r"checkpoint-(\d{6,12})\.(\d{3})")


def read_model(path: Path, ema: int | None = None) -> Snapshot:
    """Return description and weights of a network, on the CPU.

    `path` is a model file of ours, an EDM or ECT pickle (.pkl), a run folder (its latest checkpoint) or any file of a
    checkpoint. ema: which weight average of a run, counted from 0; None: the one that `path` names, else the first. Raises
    UserError on a missing, foreign, damaged or newer file, and where there is no such average.
    """
    path = Path(path)
    if path.is_dir():
        stem = _newest(path, (_MODEL,))
        kind = _average(path, stem, ema or 0)
        return read_model_file(path / f"{stem if kind == _MODEL else _newest(path, (kind,))}{kind}")
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a model (.safetensors or .pkl) or the folder of a run")
    named = _parts(path)
    whole = named is not None and (path.parent / f"{named[0]}{_MANIFEST}").is_file()
    if ema and not whole:
        raise UserError(f"--ema {ema}: {path} holds one network; give the folder of a run, or a checkpoint in it")
    if named is None:
        return edm_pickle.read(path) if path.suffix == ".pkl" else read_model_file(path)
    stem, kind = named[0], named[1] if named[1] in _MODELS else _MODEL
    if whole:
        kind = kind if ema is None else _average(path.parent, stem, ema)
        _verify(path.parent, stem, (kind,))
    return read_model_file(path.parent / f"{stem}{kind}")


def read_spec(path: Path) -> dict[str, Any]:
    """Return the description of the network in a model file of ours, whose weights stay unread. Raises as `read_model`."""
    return read_model_file(path, weights=False).spec


def _average(folder: Path, stem: str, ema: int) -> str:
    """Return the kind of file that holds a weight average of a checkpoint. Raises UserError where there is none."""
    listed = _listed(folder, stem)
    kept = [kind for kind in _MODELS if f"{stem}{kind}" in listed]
    if not 0 <= ema < len(kept):
        known = "one weight average, 0" if len(kept) == 1 else f"weight averages 0 to {len(kept) - 1}"
        raise UserError(f"--ema {ema}: {folder / stem} has {known}")
    return kept[ema]


def load_model(
    path: Path, precond: str | None = None, device: torch.device | str = "cpu", ema: int | None = None
) -> tuple[EDMPrecond, dict[str, Any]]:
    """Return (network in eval mode on `device`, its info) from whatever `read_model` reads, of weight average `ema`.

    `precond` replaces the preconditioning that the file names: "ECMPrecond" makes an EDM teacher the start of a
    consistency model. Raises UserError as `read_model`, and when weights and description do not fit.
    """
    snapshot = read_model(path, ema)
    if precond is not None:
        precond = preconditioning(snapshot.spec.get("unet"), precond)
        snapshot = replace(snapshot, spec={**snapshot.spec, "precond": precond})
    check_fits(snapshot, str(path))
    check_finite(snapshot.state, str(path))
    net = build(snapshot.spec)
    net.load_state_dict(snapshot.state)
    net = net.eval().to(device)
    if (
        torch.device(device).type == "cuda"
    ):  # where convolutions take channels-last weights as they are, others by a copy
        net = net.to(memory_format=torch.channels_last)
    return net, snapshot.info


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run folder; the last `keep` of them stay."""

    run_dir: Path
    keep: int = 3

    def save(
        self,
        nimg: int,
        model_state: dict[str, Tensor],
        spec: dict[str, Any],
        info: dict[str, Any],
        tensors: dict[str, Tensor],
        meta: dict[str, Any],
        averages: Iterable[tuple[dict[str, Tensor], dict[str, Any]]] = (),
        healthy: bool = True,
    ) -> Path:
        """Write the checkpoint of `nimg` images seen, prune older ones, and return the path of its model file.

        Args: model_state, spec, info: as for `save_model`, the averaged weights. tensors, meta: all that a resume
        needs; meta is JSON-able. averages: (model_state, info) of further weight averages. healthy: False where
        updates since the checkpoint before were not finite; the last healthy one is never pruned. Killed at any point,
        the run folder still loads the checkpoint before.
        """
        for left in left_by_a_kill(self.run_dir):
            remove(left)
        stem = f"checkpoint-{nimg / 1000:010.3f}"
        state_meta = {"ect_state": json.dumps({"format": FORMAT, "meta": meta})}
        write_tensors(self.run_dir / f"{stem}{_STATE}", tensors, state_meta)
        names = []
        for kind, (weights, about) in zip(_MODELS, itertools.chain([(model_state, info)], averages), strict=False):
            names.append(f"{stem}{kind}")
            save_model(self.run_dir / names[-1], weights, spec, about)
        files = {name: _fingerprint(self.run_dir / name) for name in [*names, f"{stem}{_STATE}"]}
        with atomic(self.run_dir / f"{stem}{_MANIFEST}") as temp:
            temp.write_text(_sealed({"format": FORMAT, "nimg": nimg, "healthy": healthy, "files": files}))
        self._point(stem)
        self._prune(stem)
        return self.run_dir / f"{stem}{_MODEL}"

    @staticmethod
    def load(path: Path) -> Saved:
        """Return what a checkpoint holds, its checksums verified.

        `path` is a run folder or any file of a checkpoint. In a run folder an incomplete or damaged checkpoint is
        passed over, with a warning, for the one before; a checkpoint that was named raises UserError.
        """
        path = Path(path)
        if path.is_dir():
            folder, stem = path, _newest(path, (_MODEL, _STATE))
        else:
            folder, named = path.parent, _parts(path)
            if named is None or not path.is_file():
                raise UserError(f"{path}: no such checkpoint; expected a run folder or its checkpoint-<kimg>{_MODEL}")
            stem = named[0]
            _verify(folder, stem, (_MODEL, _STATE))
        state_file = folder / f"{stem}{_STATE}"
        tensors, metadata = read_tensors(state_file)
        meta = parse_header(state_file, metadata.get("ect_state", "{}"), ("meta",))["meta"]
        return tensors, meta, folder / f"{stem}{_MODEL}"

    @staticmethod
    def healthy(model: Path) -> bool:
        """Return whether the checkpoint of a model file is healthy, as all of version 0.1 are. Raises UserError."""
        return bool(_manifest(model.parent, model.name.removesuffix(_MODEL)).get("healthy", True))

    def back(self) -> Path:
        """Let `latest` name the last healthy checkpoint up to the one that it names now; return the path of its model file."""
        stem = _newest(self.run_dir, (_MODEL, _STATE))
        known = [other for other in _stems(self.run_dir, _MANIFEST) if _seen(other) <= _seen(stem)]
        stem = self._healthy(known) or stem
        self._point(stem)
        return self.run_dir / f"{stem}{_MODEL}"

    def tidy(self, model: Path) -> None:
        """Remove what a kill left of the checkpoints before this last one, as the next save would if there were one."""
        self._prune(model.name.removesuffix(_MODEL))

    def _point(self, stem: str) -> None:
        with atomic(self.run_dir / "latest") as temp:
            temp.write_text(f"{stem}\n")

    def _healthy(self, stems: list[str]) -> str | None:
        """Return the last of these checkpoints that is healthy, as all of version 0.1 are; None without one."""
        for stem in reversed(stems):
            with contextlib.suppress(UserError):  # of a damaged one
                if _manifest(self.run_dir, stem).get("healthy", True):
                    return stem
        return None

    def _prune(self, newest: str) -> None:
        """Remove what is older than the last `keep` but the last healthy one, and what a killed save or prune left incomplete.

        Checkpoints beyond `newest` are of a run that was then continued from further back: not ours to remove.
        The manifest goes first and the state last, so that a half-removed checkpoint is known as one.
        """
        complete = [stem for stem in _stems(self.run_dir, _MANIFEST) if _seen(stem) <= _seen(newest)]
        incomplete = set(_stems(self.run_dir, _STATE)) - set(_stems(self.run_dir, _MANIFEST))
        for stem in {*complete[: -max(self.keep, 1)], *incomplete} - {self._healthy(complete)}:
            for kind in (_MANIFEST, *_MODELS, _STATE):
                remove(self.run_dir / f"{stem}{kind}")


def _stems(run_dir: Path, kind: str) -> list[str]:
    """Return the names, without ending, of the checkpoints that have this kind of file, the earliest first."""
    names = (path.name.removesuffix(kind) for path in run_dir.glob(f"checkpoint-*{kind}"))
    return sorted(filter(_STEM.fullmatch, names), key=_seen)


def _seen(stem: str) -> int:
    """Return the images seen by a checkpoint, from its name: from a billion on, that is longer than others."""
    match = _STEM.fullmatch(stem)
    assert match is not None
    return int(match[1] + match[2])


def _parts(path: Path) -> tuple[str, str] | None:
    """Return (name of the checkpoint that a file belongs to, the file's ending); None for any other file."""
    for kind in (_STATE, *reversed(_MODELS), _MANIFEST):
        if path.name.startswith("checkpoint-") and path.name.endswith(kind):
            return path.name.removesuffix(kind), kind
    return None


def _newest(run_dir: Path, kinds: tuple[str, ...]) -> str:
    """Return the checkpoint that `latest` names, or the newest whole one before it, else after it.

    Warns of each one that is passed over.
    """
    latest, complete = _pointer(run_dir), set(_stems(run_dir, _MANIFEST))
    stems = sorted(complete | set(_stems(run_dir, _STATE)), key=_seen, reverse=True)
    # Those after it: the run was then continued from further back, or killed before it moved the pointer.
    after = [stem for stem in stems if latest is not None and _seen(stem) > _seen(latest) and stem in complete]
    for stem in [*(stem for stem in stems if stem not in after), *after]:
        try:
            _verify(run_dir, stem, kinds)
        except UserError as error:
            warnings.warn(f"{error}; using the checkpoint before it", stacklevel=3)
        else:
            if stem in after:
                warnings.warn(f"{run_dir / 'latest'}: it names {latest}, which is not here; using {stem}", stacklevel=3)
            return stem
    raise UserError(f"{run_dir}: no complete checkpoint in this folder; give a run folder or a model file")


def _pointer(run_dir: Path) -> str | None:
    """Return what `latest` names; None where it is missing or names no checkpoint, with a warning in the second case."""
    path = run_dir / "latest"
    if not path.is_file():
        return None
    try:
        text = path.read_bytes().decode().strip()
    except (OSError, UnicodeDecodeError):
        text = ""
    if _STEM.fullmatch(text):
        return text
    warnings.warn(f"{path}: it names no checkpoint; using the newest whole one", stacklevel=4)
    return None


def _verify(folder: Path, stem: str, kinds: tuple[str, ...]) -> None:
    """Compare size and SHA-256 of a checkpoint's files with its manifest; raises UserError naming what differs."""
    listed = _listed(folder, stem)
    for name in (f"{stem}{kind}" for kind in kinds):
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: incomplete checkpoint: the file is missing")
        try:
            found = _fingerprint(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
        if found != listed.get(name):
            raise UserError(f"{path}: damaged: size and SHA-256 are {found}, {stem}{_MANIFEST} says {listed.get(name)}")


def _listed(folder: Path, stem: str) -> dict[str, Any]:
    """Return size and SHA-256 of a checkpoint's files, by name, as its manifest has them. Raises UserError on a damaged one."""
    files: dict[str, Any] = _manifest(folder, stem)["files"]
    return files


def _manifest(folder: Path, stem: str) -> dict[str, Any]:
    """Return a checkpoint's manifest. Raises UserError on a damaged one."""
    manifest = folder / f"{stem}{_MANIFEST}"
    if not manifest.is_file():
        raise UserError(f"{folder / stem}: incomplete checkpoint: {manifest.name} is missing")
    try:
        text = manifest.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{manifest}: cannot be read ({error})") from error
    found = parse_header(manifest, text, ("files",))
    seal = found.pop(_SEAL, None)
    if text != _sealed(found) if seal is not None else found.keys() - _UNSEALED:
        raise UserError(f"{manifest}: damaged: it is not what was written")
    return found


def _sealed(manifest: dict[str, Any]) -> str:
    """Return the text of a manifest, with its own SHA-256."""
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, _SEAL: digest}, indent=1) + "\n"


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
