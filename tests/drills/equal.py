"""Whether a run folder holds what another one holds, bit for bit, save what a clock or the memory counter says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

EVENTS = re.compile(r"events\.out\.tfevents\.\d+\..+")
CLOCKS = {"seconds", "sec_per_kimg", "memory_bytes", "time", "split", "splits"}
REPORT = {"report.html", "report.md", "curves.csv", "curves.svg"}  # which have minutes in them
TELEMETRY = re.compile(r"stats\.jsonl|history\.jsonl|levels\.png|report\.\w+|curves\.\w+|nfe\d+-[\d.]+\.png")
LEFT = re.compile(r"\..+\.tmp|lock")
LAST = "checkpoint-000000.080"


def names(folder: Path) -> set[str]:
    """Return the paths of all files below a folder but TensorBoard's, of which each start makes one."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    return {name for name in found if not EVENTS.fullmatch(Path(name).name)}


def same(
    got: Path, want: Path, telemetry: bool = True, last: bool = False, but: str = "", tidy: bool = True
) -> None:  # fmt: skip
    """Hold that two runs came to the same end, and that nothing else lies there.

    but: the file that may differ. telemetry: rows and grids too, which a full disk may cost. last: older checkpoints may
    differ, since a stop writes one. tidy: False where the disk did not let go of what was half-written, nor of the lock.
    """
    found, wanted = names(got), names(want)
    if not telemetry:
        found, wanted = ({n for n in each if not TELEMETRY.fullmatch(Path(n).name)} for each in (found, wanted))
    if last:
        found, wanted = ({n for n in each if "checkpoint-" not in n or LAST in n} for each in (found, wanted))
    if not tidy:
        found = {n for n in found if not LEFT.fullmatch(Path(n).name)}
    assert found == wanted, f"missing {sorted(wanted - found)}, stray {sorted(found - wanted)}"
    for name in sorted(wanted - {but}):
        assert _content(got / name) == _content(want / name), f"{name} differs"


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":  # whose library writes the metadata in any order
        with safe_open(path, "pt") as file:
            tensors = {name: _bits(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
            about = file.metadata()
            return tensors, _without({**about, "ect_state": json.loads(about.get("ect_state", "{}"))})
    if path.name.startswith("checkpoint-") and path.suffix == ".json":
        files = json.loads(path.read_text())
        return {key: value for key, value in files.items() if key in ("format", "nimg", "healthy")}, sorted(
            files["files"]
        )
    if path.name == "stats.jsonl":
        return [_without(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name == "history.jsonl":  # its beginnings tell what happened to a run; its end is the same
        return _without(json.loads(path.read_bytes().splitlines()[-1]))
    if path.name == "results.json":
        return _without(json.loads(path.read_text()))
    if path.name == "results.md":  # the last column and the line below are of a clock
        return [line.split("|")[:-2] for line in path.read_text().splitlines() if line.startswith("|")]
    return None if path.name in REPORT else path.read_bytes()


def _bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().numpy().tobytes()


def _without(value: Any) -> Any:
    """Leave out what a clock says, and how the run was started, at any depth."""
    if isinstance(value, list):
        return [_without(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {name: _without(one) for name, one in value.items() if name not in CLOCKS | {"resume"}}
