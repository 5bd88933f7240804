"""The way from a command line to a Config and back: presets, overrides, config.json, and checks that name the option."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import math
import shlex
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro

from ect.config import COOLDOWN_SHARE, STAGED, WEIGHT_FLOOR, Config, DataConfig, Limit
from ect.config.emas import power_profiles
from ect.errors import UserError
from ect.files.run_folder import load, run_folder
from ect.presets import NOTES, PRESETS

MAX_TIGHTNESS = 16
"""log2 of the largest q^n_stages: 1 - r/t falls to 2^-16, which fp32 still resolves to 1 part in 256."""


def parse(argv: Sequence[str]) -> Config:
    """Return the configuration of `python -m ect.train argv`: preset (or the resumed run's config.json), then overrides.

    Raises UserError where a value is impossible. tyro answers --help, and unknown or ill-typed options, itself: it names the
    option meant, and exits with status 2.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--resume", type=Path)
    known, _ = first.parse_known_args(list(argv))
    default = base(known.preset or "digits", known.resume)
    known_presets = ", ".join(f"{name} ({NOTES[name]})" if name in NOTES else name for name in PRESETS)
    about = (
        f"Train or tune: a preset, and any field of it. With no argument: the digits demo.\nPresets: {known_presets}"
    )
    cfg = tyro.cli(Config, args=list(argv), default=default, prog="python -m ect.train", description=about)
    check(cfg)
    return cfg


def base(name: str, resume: Path | None) -> Config:
    """Return what a command line overrides: the configuration of the run it resumes, else the preset `name`."""
    return load(run_folder(resume)) if resume else preset(name)


def preset(name: str, asked_by: str = "--preset") -> Config:
    """Return the preset of this name. Raises UserError, which names the option `asked_by` and says what was meant."""
    if name in PRESETS:
        return PRESETS[name]
    close = difflib.get_close_matches(name, PRESETS, n=1)
    meant = f"; did you mean {close[0]}?" if close else "."
    raise UserError(f"{asked_by} {name}: no such preset{meant} Known: {', '.join(PRESETS)}")


def fields(cfg: Any, prefix: str = "") -> Iterator[tuple[str, Any, list[Limit]]]:
    """Yield (option, value, limits of the value) of every field, nested ones included."""
    for field, limits in _limits(cfg.__class__).items():
        value, name = getattr(cfg, field), prefix + field.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{name}.")
        else:
            yield name, value, limits


@functools.cache
def _limits(cls: type) -> dict[str, list[Limit]]:
    """Return the limits beside each field of a dataclass."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        field: [item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Limit)]
        for field, hint in hints.items()
    }


def option(name: str, value: Any) -> str:
    """Return an option with its value as a shell's command line has it."""
    if isinstance(value, bool):
        group, _, last = name.rpartition(".")
        no = "" if value else "no-"
        return f"--{group}.{no}{last}" if group else f"--{no}{last}"
    if isinstance(value, tuple):
        return " ".join([f"--{name}", *(shlex.quote(str(item)) for item in value)])
    text = str(value)
    dash = isinstance(value, (str, Path)) and text.startswith("-")  # or it would be taken for an option
    return f"--{name}{'=' if dash else ' '}{shlex.quote(text)}"


def refuse_idle(options: Any, names: Sequence[str], why: str) -> None:
    """Raise UserError, which says why, where one of these options of a command was given, which does nothing there."""
    for name in names:
        field = {"class": "class_idx"}.get(name, name.replace("-", "_"))
        if (value := getattr(options, field)) != getattr(type(options), field):
            raise UserError(f"{option(name, value)}: {why}")


def check(cfg: Config) -> None:
    """Raise UserError naming the first option whose value is impossible: by itself, then beside other options."""
    check_each(cfg)
    values = {name: value for name, value, _ in fields(cfg)}
    for name, fits, expected in _beside_others(cfg):
        if not fits:
            raise UserError(f"{option(name, values[name])}: expected {expected}")


def check_each(cfg: Any, prefix: str = "") -> None:
    """Raise UserError naming the first option, beginning with `prefix`, whose value is impossible by itself."""
    for name, value, limits in fields(cfg, prefix):
        numbers = [item for item in (value if isinstance(value, tuple) else (value,)) if isinstance(item, float)]
        if not all(map(math.isfinite, numbers)):
            raise UserError(f"{option(name, value)}: expected a finite number")
        for limit in limits:
            if value is not None and not limit.holds(value):
                raise UserError(f"{option(name, value)}: expected {limit.expected}")


def _beside_others(cfg: Config) -> Iterator[tuple[str, bool, str]]:
    """Yield (option, whether its value fits the others, what is expected) for each rule that no field has by itself."""
    per_device, objective, optim, log = cfg.batch_per_device, cfg.objective, cfg.optim, cfg.log
    divides = not isinstance(per_device, int) or (per_device >= 1 and cfg.batch % per_device == 0)
    yield "batch-per-device", divides, f"a divisor of --batch {cfg.batch}"
    staged = objective.kind in STAGED
    resolved = not staged or objective.n_stages * math.log2(objective.q) <= MAX_TIGHTNESS
    resolved |= objective.min_gap >= 2**-MAX_TIGHTNESS  # where the gap stops closing
    why = f"q^n_stages of at most 2^{MAX_TIGHTNESS}: beyond, t - r drowns in fp32 rounding"
    yield "objective.n-stages", resolved, why
    fits = objective.min_gap == 0 or objective.min_gap >= 2**-MAX_TIGHTNESS
    yield "objective.min-gap", fits, f"0, or at least 2^-{MAX_TIGHTNESS}, which fp32 still resolves"
    gapless = objective.min_gap == 0 or staged
    yield "objective.min-gap", gapless, f"0 with --objective.kind {objective.kind}, which has no pairs"
    pairs = objective.target == "self" or objective.kind == "consistency"
    yield (
        "objective.target",
        pairs,
        f"self with --objective.kind {objective.kind}; other targets are of consistency alone",
    )
    guided = objective.guidance is not None
    yield "objective.guidance", not guided or objective.target == "teacher", "None without --objective.target teacher"
    yield "objective.guidance", not guided or cfg.data.labels, "None without --data.labels: it is away from no class"
    dropped = not guided or cfg.init_from is not None or cfg.pretrain is None or cfg.net.label_dropout > 0
    trained = (
        "greater than 0 with --objective.guidance and --pretrain: else the teacher knows no answer without a class"
    )
    yield "net.label-dropout", dropped, trained
    resident = objective.target != "posterior" or cfg.data.augment == 0
    yield "objective.target", resident, "another with --data.augment, since augmented images are not the data's"
    adaptive = objective.weighting == "adaptive"
    without = f"another with --objective.kind {objective.kind}, which has no pairs to weigh"
    yield "objective.weighting", not adaptive or staged, without
    floored = adaptive or objective.weight_floor == WEIGHT_FLOOR
    yield "objective.weight-floor", floored, f"{WEIGHT_FLOOR}, its default, without --objective.weighting adaptive"
    drawn = objective.direction == "difference" or objective.kind == "consistency"
    yield (
        "objective.direction",
        drawn,
        f"difference with --objective.kind {objective.kind}: features are for consistency alone",
    )
    pairs = not log.levels or staged
    yield "log.levels", pairs, f"--log.no-levels with --objective.kind {objective.kind}, which has no pairs"
    power = log.averages_kimg == 0 or bool(power_profiles(optim.emas))
    yield "log.averages-kimg", power, "0 without a power profile in --optim.emas, such as rel:.05"
    keeps = log.averages_kimg > 0 or log.weights_kimg > 0 or log.kept_precision == "fp16"
    yield "log.kept-precision", keeps, "fp16, its default, without --log.weights-kimg or --log.averages-kimg"
    yield "optim.decay-kimg", optim.decay != "rsqrt" or optim.decay_kimg > 0, "greater than 0 with --optim.decay rsqrt"
    teacher = cfg.data.source == "teacher"
    yield "data.source", not teacher or cfg.init_from is not None, "--init-from with it: the diffusion model that draws"
    counted = teacher or cfg.data.teacher_samples == DataConfig.teacher_samples
    yield "data.teacher-samples", counted, f"{DataConfig.teacher_samples}, its default, without --data.source teacher"
    yield "cooldown", not cfg.cooldown or cfg.resume is not None, "--resume with it: the run that it branches off"
    cools = cfg.cooldown or optim.decay == "cooldown" or optim.cooldown_share == COOLDOWN_SHARE
    yield "optim.cooldown-share", cools, f"{COOLDOWN_SHARE}, its default, without --optim.decay cooldown"
    looks = cfg.target is None or (log.eval_kimg > 0 and cfg.eval.samples > 0)
    yield (
        "target",
        looks,
        "--log.eval-kimg with it, the interval at which quality is looked at, and --eval.samples above 0",
    )
    if cfg.pretrain is not None and cfg.resume is None:  # a resumed run has its phase's own configuration
        diffusion = preset(cfg.pretrain, "--pretrain").objective.kind == "diffusion"
        yield "pretrain", diffusion, "a preset that trains by diffusion"
