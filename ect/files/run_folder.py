"""The folder of a run: a new one, the one that --resume means, and its config.json."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from ect.config import Config
from ect.errors import UserError
from ect.files.old_configs import FORMAT, current

T = TypeVar("T")
CONFIG = "config.json"
RESOLVED = "resolved"
"""Key in config.json beside the options."""


def new_run_dir(cfg: Config) -> Path:
    """Create and return --run-dir if it is new or empty, else the next free runs/<number>-<preset>."""
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


def evaluation_dir(run_dir: Path | None, model: Path, ema: int | None) -> Path:
    """Create and return `run_dir`, else runs/evaluation-<model>, for a weight average with -ema<i>. Raises UserError."""
    if run_dir is None:
        model = model.resolve()
        name = model.name if model.is_dir() else f"{model.parent.name}-{model.stem}"
        run_dir = Path("runs") / f"evaluation-{name}{f'-ema{ema}' if ema else ''}"
    run_dir = run_dir.expanduser()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: cannot make this folder ({error.strerror}); choose another") from error
    return run_dir


def run_folder(path: Path) -> Path:
    """Return the run folder of --resume's value, a run folder or a file in one. Raises UserError if it has no config.json."""
    path = path.expanduser()
    folder = path if path.is_dir() else path.parent
    if not path.exists() or not (folder / CONFIG).is_file():
        raise UserError(f"--resume {path}: expected a run folder (with its config.json) or a checkpoint inside one")
    return folder


def load(folder: Path) -> Config:
    """Return the configuration a run was started with, from its config.json."""
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return from_dict({name: value for name, value in values.items() if name != RESOLVED})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a configuration this version can read ({error})") from error


def resolved(folder: Path) -> dict[str, Any]:
    """Return what the run in a folder computed with (self_check.resolved), from its config.json; {} where it does not say."""
    path = folder / CONFIG
    return json.loads(path.read_text(encoding="utf-8")).get(RESOLVED, {}) if path.is_file() else {}


def to_dict(cfg: Config) -> dict[str, Any]:
    """Return a configuration in a form that JSON has, with the number of its format."""
    return {"format": FORMAT, **json.loads(json.dumps(dataclasses.asdict(cfg), default=str))}


def from_dict(values: dict[str, Any]) -> Config:
    """Invert to_dict, also for what earlier versions wrote.

    Raises KeyError where fields are unknown, and TypeError or ValueError where they are of another type.
    """
    return _build(Config, current(values))


def _build(cls: type[T], values: dict[str, Any]) -> T:
    hints = typing.get_type_hints(cls)
    unknown = values.keys() - hints.keys()
    if unknown:
        raise KeyError(f"unknown fields {sorted(unknown)}")
    return cls(**{name: _convert(hints[name], value, name) for name, value in values.items()})


def _convert(kind: Any, value: Any, name: str) -> Any:
    """Turn a value of JSON into the field `name`, of type `kind`."""
    for choice in typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,):
        origin, args = typing.get_origin(choice), typing.get_args(choice)
        if dataclasses.is_dataclass(choice) and isinstance(value, dict):
            return _build(typing.cast(type, choice), value)
        if origin is tuple and isinstance(value, list):
            kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
            return tuple(_convert(one, item, name) for one, item in zip(kinds, value, strict=True))
        if choice is Path and isinstance(value, str):
            return Path(value)
        if type(value) is choice or (choice is float and type(value) is int) or (origin is Literal and value in args):
            return value
    raise TypeError(f"{name}: {value!r} is not of type {kind}")
