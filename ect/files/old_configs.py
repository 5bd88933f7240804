"""Configurations that earlier versions wrote, in today's form: a run's config.json, and its copy in each checkpoint."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from ect.config import ObjectiveConfig, OptimConfig
from ect.config.emas import emas_of
from ect.errors import UserError
from ect.presets import PRESETS

FORMAT = 2
"""The number of a configuration's form as JSON; version 0.1 wrote none. Whoever renames or removes a field counts on, and adds
a rule below."""
NO_PRESET = "no-preset"
"""--pretrain of a run whose diffusion phase is none of PRESETS: the config.json of the phase itself says what it is."""


def current(values: dict[str, Any]) -> dict[str, Any]:
    """Return today's options of a configuration as its JSON has it. Raises UserError where a later version wrote it."""
    values = dict(values)
    written = values.pop("format", 1)
    if written > FORMAT:
        raise UserError(f"a configuration of format {written}: this version reads up to {FORMAT}; update the package")
    return _from_0_1(values) if written == 1 else values


def _from_0_1(values: dict[str, Any]) -> dict[str, Any]:
    """Turn the options of version 0.1 into today's.

    It had the options of the diffusion phase, {total_kimg, objective, optim}, where now a preset has its name; and one
    weight average.
    """
    phase = values.pop("pretrain", {"total_kimg": 0})
    if "optim" in values:
        values["optim"] = _optim_from_0_1(values["optim"])
    if phase["total_kimg"] > 0:
        phase = {**phase, "optim": _optim_from_0_1(phase["optim"])}
        values |= {"pretrain": _preset_of(phase), "pretrain_kimg": phase["total_kimg"]}
    return values


def _optim_from_0_1(optim: dict[str, Any]) -> dict[str, Any]:
    """Turn {"ema_beta": 0.9, ...} into today's {"emas": [".9"], ...}."""
    rest = {name: value for name, value in optim.items() if name != "ema_beta"}
    return {**rest, "emas": list(emas_of(optim["ema_beta"]))} if "ema_beta" in optim else rest


def _preset_of(phase: dict[str, Any]) -> str:
    """Return the name of the first preset with this objective and optimizer; NO_PRESET if there is none.

    Options that version 0.1 did not know are at their defaults.
    """
    parts = {
        "objective": _as_json(ObjectiveConfig()) | phase["objective"],
        "optim": _as_json(OptimConfig()) | phase["optim"],
    }
    for name, preset in PRESETS.items():
        if all(_as_json(getattr(preset, part)) == wanted for part, wanted in parts.items()):
            return name
    return NO_PRESET


def _as_json(config: ObjectiveConfig | OptimConfig) -> dict[str, Any]:
    return dict(json.loads(json.dumps(dataclasses.asdict(config))))
