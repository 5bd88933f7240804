"""A checkpoint that a resume reads: its manifest, the pointer to it, and the header of its training state."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save

from ect.files.checkpoint import Checkpoints, read_model
from ect.models import build
from tests.fuzz.mutations import spoilt, spoilt_text
from tests.fuzz.snapshots import SPEC

STEM = "checkpoint-000001.000"
MANIFEST, LATEST, STATE = f"{STEM}.json", "latest", f"{STEM}.state.safetensors"


@functools.cache
def whole() -> dict[str, bytes]:
    """The files of a checkpoint as a run writes them, by name."""
    folder = Path(tempfile.mkdtemp())
    try:
        torch.manual_seed(0)
        tensors = {"steps": torch.zeros(3)}
        Checkpoints(folder).save(
            1000, build(SPEC).state_dict(), SPEC, {"preset": "digits"}, tensors, {"nimg": 1000, "config": {}}
        )
        return {path.name: path.read_bytes() for path in folder.iterdir()}
    finally:
        shutil.rmtree(folder)


def with_state(meta: bytes) -> dict[str, bytes]:
    """The files of a checkpoint whose training state has this header, and whose manifest knows it so."""
    import hashlib

    data = save({"steps": torch.zeros(3)}, {"ect_state": meta.decode("utf-8", "replace")})
    manifest = json.loads(whole()[MANIFEST])
    manifest["files"][STATE] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return {STATE: data, MANIFEST: json.dumps(manifest).encode()}


_manifest = json.loads(whole()[MANIFEST])
INPUTS = st.one_of(
    spoilt_text(_manifest).map(lambda data: {MANIFEST: data}),
    spoilt(f"{STEM}\n".encode(), 3).map(lambda data: {LATEST: data}),
    spoilt_text({"format": 1, "meta": {"nimg": 1000, "config": {}}}).map(with_state),
    spoilt(whole()[STATE]).map(lambda data: {STATE: data}),
)


def read(folder: Path, changed: dict[str, bytes]) -> Any:
    for name, data in {**whole(), **changed}.items():
        (folder / name).write_bytes(data)
    read_model(folder)
    read_model(folder, 1) if len(changed) > 1 else None
    return Checkpoints.load(folder)
