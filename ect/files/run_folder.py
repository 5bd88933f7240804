"""The folder of a run: a new one, the one that --resume means, and its config.json."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from ect.config import Config
from ect.errors import UserError
from ect.files.atomic import atomic, left_by_a_kill
from ect.files.lock import LOCK
from ect.files.old_configs import FORMAT, current

T = TypeVar("T")
CONFIG = "config.json"
RESOLVED = "resolved"
"""Key in config.json beside the options."""


def new_run_dir(cfg: Config) -> Path:
    """Create and return --run-dir if it is new or empty, else the next free runs/<number>-<preset>.

    Raises UserError where it cannot be made.
    """
    if cfg.run_dir is not None:
        with can_make(f"--run-dir {cfg.run_dir}"):
            path = cfg.run_dir.expanduser()
            refuse_used(path)
            make(path)
            return path
    with can_make("runs, where a run without --run-dir goes"):
        root = Path("runs")
        make(root)
        number = max((int(p.name[:5]) for p in root.iterdir() if p.name[:5].isdigit()), default=-1) + 1
        while True:
            path = root / f"{number:05d}-{cfg.preset}"
            try:
                path.mkdir()
                return path
            except FileExistsError:  # another job took the number
                number += 1


def refuse_used(path: Path) -> None:
    """Raise UserError where a new run cannot go into this folder: it holds more than what a kill at the very start leaves."""
    if path.exists() and (not path.is_dir() or {*path.iterdir()} - {path / LOCK, *left_by_a_kill(path)}):
        raise UserError(f"--run-dir {path}: not an empty folder; choose another, or continue it with --resume {path}")


def absent(path: Path) -> list[Path]:
    """Return a folder and its parents, as far as there are none yet, the deepest first."""
    path = Path(os.path.expanduser(path))
    return [folder for folder in (path, *path.parents) if not os.path.exists(folder)]


def make(path: Path) -> None:
    """Make a folder and its parents, or none of them and raise OSError."""
    missing = absent(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        remove_empty(missing)
        raise


@contextlib.contextmanager
def leaving_nothing(folders: list[Path]) -> Iterator[None]:
    """Remove these folders where the block fails with nothing in them: a refused start leaves none behind."""
    try:
        yield
    except BaseException:
        remove_empty(folders)
        raise


def remove_empty(folders: list[Path]) -> None:
    """Remove those of these folders that there are and that hold nothing."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def can_make(what: str) -> Iterator[None]:
    """Turn a failure to make a folder inside the block into a UserError that begins with `what`."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of a user that there is not
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{what}: cannot make this folder ({reason}); choose another with --run-dir") from error


def has_begun(folder: Path, early: bool = False) -> bool:
    """Return whether a phase has a checkpoint in its folder; a run writes one before its first step.

    early: it cannot have had one, because the phase before has just come to its end. Else raises UserError, naming what is
    missing, where it once had one.
    """
    found = any(folder.glob("checkpoint-*.json"))
    if early or found:
        return found
    gone = [name for name in ("latest", "stats.jsonl") if (folder / name).is_file() and (folder / name).stat().st_size]
    if gone:
        raise UserError(
            f"--resume {folder}: its checkpoints are gone: {' and '.join(gone)} say that there were some, but there is no "
            "checkpoint-*.json; put them back, or start a new run"
        )
    return False


def evaluation_dir(run_dir: Path | None, model: Path, ema: int | None, made: list[Path]) -> Path:
    """Create and return `run_dir`, else runs/evaluation-<model>, for a weight average with -ema<i>. Raises UserError.

    made: gets the folders that were not there before.
    """
    if run_dir is None:
        model = model.resolve()
        name = model.name if model.is_dir() else f"{model.parent.name}-{model.stem}"
        run_dir = Path("runs") / f"evaluation-{name}{f'-ema{ema}' if ema else ''}"
    with can_make(f"--run-dir {run_dir}"):
        run_dir = run_dir.expanduser()
        missing = absent(run_dir)
        make(run_dir)
    made += missing
    return run_dir


def run_folder(path: Path) -> Path:
    """Return the run folder of --resume's value, a run folder or a file in one. Raises UserError if it has no config.json."""
    folder = path
    with contextlib.suppress(
        OSError, ValueError, RuntimeError
    ):  # too long; a null character; ~ of a user that there is not
        path = path.expanduser()
        folder = path if path.is_dir() else path.parent
    if not os.path.exists(path) or not (folder / CONFIG).is_file():
        raise UserError(f"--resume {path}: expected a run folder (with its config.json) or a checkpoint inside one")
    return folder


def load(folder: Path) -> Config:
    """Return the configuration a run was started with, from its config.json."""
    values = _read(folder)
    try:
        return from_dict({name: value for name, value in values.items() if name != RESOLVED})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG}: not a configuration this version can read ({error})") from error


def resolved(folder: Path) -> dict[str, Any]:
    """Return what the run in a folder computed with (self_check.resolved), from its config.json; {} where it does not say."""
    return _read(folder).get(RESOLVED, {}) if (folder / CONFIG).is_file() else {}


def _read(folder: Path) -> dict[str, Any]:
    """Return the object in a config.json. Raises UserError where it is none, or what was resolved is none."""
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a configuration this version can read ({error})") from error
    if not isinstance(values, dict) or not isinstance(values.get(RESOLVED, {}), dict):
        raise UserError(
            f"{path}: not a configuration this version can read (expected an object, and another in {RESOLVED})"
        )
    return values


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


def write_config(cfg: Config, folder: Path, now: dict[str, Any]) -> None:
    """Write config.json: the options of a run, and what it computes with (RESOLVED)."""
    values = to_dict(dataclasses.replace(cfg, resume=None, cooldown=False)) | {RESOLVED: now}
    with atomic(folder / CONFIG) as temp:
        temp.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
