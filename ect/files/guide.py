"""The guidance that a command line asks for: --guidance, and the weaker model of --guide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ect.config import GUIDANCE, refuse_beyond
from ect.errors import UserError
from ect.files.checkpoint import load_model
from ect.models import EDMPrecond
from ect.models.guided import Guided, guided


def refuse_alone(weight: float | None, guide: Path | None) -> None:
    """Raise UserError where --guidance is beyond its bounds, or --guide comes without it."""
    refuse_beyond({"guidance": (weight, GUIDANCE)})
    if guide is not None and weight is None:
        raise UserError(f"--guide {guide}: also give its weight, such as --guidance 2")


def said(weight: float | None) -> str:
    """Return the words that a line about a sampler ends with: none without guidance."""
    return "" if weight is None else f", each answer guided by {weight:g} at twice the evaluations"


def of_model(weight: float | None, guide: Path | None) -> dict[str, Any]:
    """Return what a record of a rated model says of its guidance: nothing where there was none."""
    return {} if weight is None else {"guidance": weight, "guide": None if guide is None else str(guide)}


def guidance(
    net: EDMPrecond, weight: float | None, path: Path | None, device: torch.device
) -> tuple[EDMPrecond | Guided, list[EDMPrecond]]:
    """Return the denoiser to sample with, `net` itself without a weight, and the networks in it.

    Raises UserError as `load_model` and `guided` do.
    """
    if weight is None:
        return net, [net]
    guide = None if path is None else load_model(path.expanduser(), device=device)[0]
    return guided(net, weight, guide, "--guidance"), [net] if guide is None else [net, guide]
