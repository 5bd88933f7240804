"""The folder of a run: a new one, the one that --resume means, and its config.json."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from ect.config import Config
from ect.errors import UserError

T = TypeVar("T")
RESOLVED = "resolved"
"""Key in config.json beside the options."""


def new_run_dir(cfg: Config) -> Path:
    """--run-dir if it is new or empty, else the next free runs/<number>-<preset>; the folder is created."""
    if cfg.run_dir is not None:
        path = cfg.run_dir.expanduser()
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(
                f"--run-dir {path}: not an empty folder; choose another, or continue it with --resume {path}"
            )
        path.mkdir(parents=True, exist_ok=True)
        return path
    root = Path("runs")
    root.mkdir(exist_ok=True)
    number = max((int(p.name[:5]) for p in root.iterdir() if p.name[:5].isdigit()), default=-1) + 1
    while True:
        path = root / f"{number:05d}-{cfg.preset}"
        try:
            path.mkdir()
            return path
        except FileExistsError:  # another job took the number
            number += 1


def run_folder(path: Path) -> Path:
    """The run folder of --resume's value, a run folder or a file in one. Raises UserError if it holds no config.json."""
    path = path.expanduser()
    folder = path if path.is_dir() else path.parent
    if not path.exists() or not (folder / "config.json").is_file():
        raise UserError(f"--resume {path}: expected a run folder (with its config.json) or a checkpoint inside one")
    return folder


def load(folder: Path) -> Config:
    """The configuration a run was started with, from its config.json."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return from_dict(
            Config, {k: v for k, v in values.items() if k != RESOLVED} if isinstance(values, dict) else values
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a configuration this version can read ({error})") from error


def resolved(folder: Path) -> dict[str, Any]:
    """What the run in a folder computed with (self_check.resolved), from its config.json; {} where it does not say."""
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")).get(RESOLVED, {}) if path.is_file() else {}


def to_dict(cfg: Config) -> dict[str, Any]:
    """JSON-able form of a configuration."""
    return json.loads(json.dumps(dataclasses.asdict(cfg), default=str))


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """The inverse of to_dict. Raises KeyError or TypeError where fields are unknown or of another shape."""
    if not isinstance(values, dict):
        raise TypeError(f"expected an object, found {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    unknown = values.keys() - hints.keys()
    if unknown:
        raise KeyError(f"unknown fields {sorted(unknown)}")
    return cls(**{name: _convert(hints[name], value) for name, value in values.items()})


def _convert(kind: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        return from_dict(typing.cast(type, kind), value)
    choices = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is not None and Path in choices:
        return Path(value)
    return tuple(value) if isinstance(value, list) else value
