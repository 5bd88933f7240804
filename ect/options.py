"""From a command line to a Config and back: presets, overrides, config.json, and checks that name the option."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import shlex
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from ect import emas
from ect.config import PRESETS, Config
from ect.errors import UserError

T = TypeVar("T")
RESOLVED = "resolved"
"""Key in config.json beside the options."""
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


def preset(name: str) -> Config:
    """PRESETS[name]; raises UserError that says what was meant."""
    if name in PRESETS:
        return PRESETS[name]
    close = difflib.get_close_matches(name, PRESETS, n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    raise UserError(f"--preset {name}: no such preset{meant} Known: {', '.join(PRESETS)}")


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


def describe(cfg: Config) -> str:
    """The resolved configuration, an option a line: what `python -m ect.train` takes. Unset options are comments. The last
    line, a comment too, is the command that a shell takes, with only what differs from the preset or the resumed run."""
    lines, changed = [], []
    for name, value, default in _fields(cfg, base(cfg.preset, cfg.resume)):
        if name == "dry-run":
            continue
        if value is None and default is None:
            lines.append(f"# --{name} is not set")
            continue
        lines.append(_option(name, value))
        if value != default or name in ("preset", "resume"):
            changed.append(lines[-1])
    return "\n".join([*lines, "# python -m ect.train " + " ".join(changed)])


def _fields(cfg: Any, default: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(option, value, value in `default`) of every field, nested ones included."""
    for field in dataclasses.fields(cfg):
        value, before = getattr(cfg, field.name), getattr(default, field.name)
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from _fields(value, before, f"{name}.")
        else:
            yield name, value, before


def _option(name: str, value: Any) -> str:
    """An option as a shell's command line has it."""
    if isinstance(value, bool):
        group, _, last = name.rpartition(".")
        no = "" if value else "no-"
        return f"--{group}.{no}{last}" if group else f"--{no}{last}"
    if isinstance(value, tuple):
        return " ".join([f"--{name}", *(shlex.quote(str(item)) for item in value)])
    text = str(value)
    dash = isinstance(value, (str, Path)) and text.startswith("-")  # or it would be taken for an option
    return f"--{name}{'=' if dash else ' '}{shlex.quote(text)}"


def _numbers(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """(option, value) of every float, nested dicts included."""
    found = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{name}.")
        else:
            items = value if isinstance(value, list) else [value]
            found += [(f"{prefix}{name}".replace("_", "-"), item) for item in items if isinstance(item, float)]
    return found


def check(cfg: Config) -> None:
    """Raises UserError naming the first option whose value is impossible."""
    per_device, mult = cfg.batch_per_device, cfg.net.channel_mult
    for name, number in _numbers(to_dict(cfg)):
        if not math.isfinite(number):
            raise UserError(f"--{name} {number}: expected a finite number")
    rules: list[tuple[str, Any, bool, str]] = [
        ("--batch", cfg.batch, cfg.batch >= 1, "at least 1"),
        ("--batch-per-device", per_device, not isinstance(per_device, int) or (per_device >= 1 and cfg.batch % per_device == 0),
         f"a divisor of --batch {cfg.batch}"),
        ("--total-kimg", cfg.total_kimg, cfg.total_kimg > 0, "greater than 0"),
        ("--seed", cfg.seed, 0 <= cfg.seed < 2**31, "from 0 to 2^31 - 1"),
        ("--threads", cfg.threads, cfg.threads is None or cfg.threads >= 1, "at least 1"),
        ("--data.augment", cfg.data.augment, 0 <= cfg.data.augment <= 1, "a probability"),
        ("--net.dropout", cfg.net.dropout, 0 <= cfg.net.dropout < 1, "a probability below 1"),
        ("--net.label-dropout", cfg.net.label_dropout, 0 <= cfg.net.label_dropout < 1, "a probability below 1"),
        ("--net.sigma-data", cfg.net.sigma_data, cfg.net.sigma_data > 0, "greater than 0"),
        ("--net.model-channels", cfg.net.model_channels, cfg.net.model_channels >= 4 and cfg.net.model_channels % 4 == 0,
         "a multiple of 4"),
        ("--net.channel-mult", mult, len(mult) > 0 and min(mult) >= 1, "one factor of at least 1 for each resolution"),
        ("--pretrain.total-kimg", cfg.pretrain.total_kimg, cfg.pretrain.total_kimg >= 0, "0 (no pretraining) or more"),
        *(
            (f"--log.{name}-kimg", value, value >= 0, "0 or greater")
            for name, value in [
                ("stats", cfg.log.stats_kimg), ("sample", cfg.log.sample_kimg), ("eval", cfg.log.eval_kimg),
                ("checkpoint", cfg.log.checkpoint_kimg),
            ]
        ),
        ("--net.num-blocks", cfg.net.num_blocks, cfg.net.num_blocks >= 1, "at least 1"),
        ("--log.keep", cfg.log.keep, cfg.log.keep >= 1, "at least 1"),
        ("--eval.samples", cfg.eval.samples, cfg.eval.samples == 0 or cfg.eval.samples >= 2, "0 (off) or at least 2"),
        ("--eval.batch", cfg.eval.batch, cfg.eval.batch >= 1, "at least 1"),
        ("--eval.mid-t", cfg.eval.mid_t, all(a > b > 0 for a, b in zip((80.0, *cfg.eval.mid_t), cfg.eval.mid_t, strict=False)),
         "noise levels that fall from 80 towards 0"),
    ]  # fmt: skip
    for prefix, objective, optim in [
        ("", cfg.objective, cfg.optim), ("pretrain.", cfg.pretrain.objective, cfg.pretrain.optim),
    ]:  # fmt: skip
        clip = optim.clip
        rules += [
            (f"--{prefix}objective.q", objective.q, objective.q > 1, "greater than 1"),
            (f"--{prefix}objective.c", objective.c, objective.c >= 0, "0 or greater"),
            (f"--{prefix}objective.k", objective.k, objective.k >= 0, "0 or greater"),
            (f"--{prefix}objective.P-std", objective.P_std, objective.P_std > 0, "greater than 0"),
            (f"--{prefix}objective.n-stages", objective.n_stages, objective.n_stages >= 1, "at least 1"),
            (f"--{prefix}objective.stage-kimg", objective.stage_kimg, objective.stage_kimg > 0, "greater than 0"),
            (
                f"--{prefix}optim.decay-kimg",
                optim.decay_kimg,
                optim.decay_kimg >= 0 and (optim.decay != "rsqrt" or optim.decay_kimg > 0),
                "0 or greater, and above 0 for decay rsqrt",
            ),
            (f"--{prefix}optim.warmup-kimg", optim.warmup_kimg, optim.warmup_kimg >= 0, "0 or greater"),
            (
                f"--{prefix}optim.ema-rampup",
                optim.ema_rampup,
                optim.ema_rampup is None or optim.ema_rampup > 0,
                "greater than 0",
            ),
            (f"--{prefix}objective.b", objective.b, objective.b >= 0, "0 or greater"),
            (
                f"--{prefix}objective.n-stages",
                objective.n_stages,
                objective.kind == "diffusion" or objective.n_stages * math.log2(max(objective.q, 1.0)) <= MAX_TIGHTNESS,
                f"q^n_stages of at most 2^{MAX_TIGHTNESS}: beyond, t - r drowns in fp32 rounding",
            ),
            (f"--{prefix}optim.lr", optim.lr, optim.lr > 0, "greater than 0"),
            (f"--{prefix}optim.betas", optim.betas, all(0 <= b < 1 for b in optim.betas), "from 0 to below 1"),
            (f"--{prefix}optim.eps", optim.eps, optim.eps >= 0, "0 or greater"),
            (f"--{prefix}optim.clip", clip, clip is None or clip > 0, "greater than 0"),
            (
                f"--{prefix}optim.emas",
                " ".join(optim.emas),
                emas.are_few(optim.emas),
                f"1 to {emas.MAX_EMAS} weight averages, each once",
            ),
            (
                f"--{prefix}optim.emas",
                " ".join(optim.emas),
                emas.have_no_power(optim.emas),
                "constant decays such as .9999; averages by a power profile (rel:) are not there yet",
            ),
            (
                f"--{prefix}optim.emas",
                " ".join(optim.emas),
                emas.are_decays(optim.emas),
                "decays per step, from 0 to below 1, such as .9999",
            ),
        ]
    for option, value, ok, expected in rules:
        if not ok:
            raise UserError(f"{option} {value}: expected {expected}")
