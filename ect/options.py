"""From a command line to a Config and back: presets, overrides, config.json, and checks that name the option."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro

from ect.config import Config, Limit
from ect.errors import UserError
from ect.files.run_folder import load, run_folder
from ect.presets import PRESETS

MAX_TIGHTNESS = 16
"""log2 of the largest q^n_stages: 1 - r/t falls to 2^-16, which fp32 still resolves to 1 part in 256."""


def parse(argv: Sequence[str]) -> Config:
    """The configuration of `python -m ect.train argv`: preset (or the resumed run's config.json), then overrides.

    tyro answers --help and unknown or ill-typed options itself, with the option meant, and exits with status 2.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--resume", type=Path)
    known, _ = first.parse_known_args(list(argv))
    default = base(known.preset or "digits", known.resume)
    known_presets = ", ".join(PRESETS)
    about = (
        f"Train or tune: a preset, and any field of it. With no argument: the digits demo.\nPresets: {known_presets}"
    )
    cfg = tyro.cli(Config, args=list(argv), default=default, prog="python -m ect.train", description=about)
    check(cfg)
    return cfg


def base(name: str, resume: Path | None) -> Config:
    """What a command line overrides: the configuration of the run it resumes, else the preset `name`."""
    return load(run_folder(resume)) if resume else preset(name)


def preset(name: str, option: str = "--preset") -> Config:
    """PRESETS[name]; raises UserError that says what was meant by `option`."""
    if name in PRESETS:
        return PRESETS[name]
    close = difflib.get_close_matches(name, PRESETS, n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    raise UserError(f"{option} {name}: no such preset{meant} Known: {', '.join(PRESETS)}")


def fields(cfg: Any, prefix: str = "") -> Iterator[tuple[str, Any, list[Limit]]]:
    """(option, value, limits of the value) of every field, nested ones included."""
    hints = typing.get_type_hints(type(cfg), include_extras=True)
    for field in dataclasses.fields(cfg):
        value, name = getattr(cfg, field.name), prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{name}.")
        else:
            beside = getattr(hints[field.name], "__metadata__", ())
            yield name, value, [limit for limit in beside if isinstance(limit, Limit)]


def check(cfg: Config) -> None:
    """Raises UserError naming the first option whose value is impossible: by itself, then beside other options."""
    for name, value, limits in fields(cfg):
        numbers = [item for item in (value if isinstance(value, tuple) else (value,)) if isinstance(item, float)]
        if not all(map(math.isfinite, numbers)):
            raise UserError(f"--{name} {value}: expected a finite number")
        for limit in limits:
            if value is not None and not limit.holds(value):
                shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
                raise UserError(f"--{name} {shown}: expected {limit.expected}")
    per_device, objective, optim = cfg.batch_per_device, cfg.objective, cfg.optim
    rules: list[tuple[str, Any, bool, str]] = [
        (
            "batch-per-device",
            per_device,
            not isinstance(per_device, int) or (per_device >= 1 and cfg.batch % per_device == 0),
            f"a divisor of --batch {cfg.batch}",
        ),
        (
            "objective.n-stages",
            objective.n_stages,
            objective.kind == "diffusion" or objective.n_stages * math.log2(objective.q) <= MAX_TIGHTNESS,
            f"q^n_stages of at most 2^{MAX_TIGHTNESS}: beyond, t - r drowns in fp32 rounding",
        ),
        (
            "optim.decay-kimg",
            optim.decay_kimg,
            optim.decay != "rsqrt" or optim.decay_kimg > 0,
            "greater than 0 with --optim.decay rsqrt",
        ),
    ]
    if cfg.pretrain is not None and cfg.resume is None:  # a resumed run has its phase's own configuration
        phase = preset(cfg.pretrain, "--pretrain")
        rules.append(
            ("pretrain", cfg.pretrain, phase.objective.kind == "diffusion", "a preset that trains by diffusion")
        )
    for name, value, holds, expected in rules:
        if not holds:
            raise UserError(f"--{name} {value}: expected {expected}")
