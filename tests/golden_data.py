"""Reads the golden vectors under tests/golden (their README says what they are)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"
MANIFEST: dict[str, Any] = json.loads((FOLDER / "manifest.json").read_text())


def load(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def rel_l2(got: Tensor, want: Tensor) -> float:
    """Relative L2 error of a tensor, in float64."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300))
