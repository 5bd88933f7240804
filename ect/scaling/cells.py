"""The cells of a study: what one run cost and came to, and cells.jsonl, which has a line for each."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ect.errors import UserError
from ect.files.atomic import atomic

CELLS = "cells.jsonl"


@dataclass(frozen=True)
class Cell:
    """One run of the grid, whose teacher was a network of its width and seed.

    Args: images: seen in tuning. figures: of the end, by names such as nfe2/FDc. model_flops: of one evaluation of the network,
    for an image; training_flops, teacher_flops: of the tuning, and of the teacher's training; all counted. seconds: of the
    tuning, wall clock; teacher_seconds: likewise. samples: images that were rated. machine: where it ran.
    """

    preset: str
    width: int
    kimg: float
    seed: int
    images: int
    parameters: int
    model_flops: float
    training_flops: float
    teacher_flops: float
    seconds: float
    teacher_seconds: float
    samples: int
    figures: dict[str, float]
    machine: str

    def figure(self, name: str) -> float:
        """Return a figure; NaN where there is none of this name, or none that has a logarithm."""
        value = self.figures.get(name, math.nan)
        return value if 0 < value < math.inf else math.nan


def write(path: Path, cells: Sequence[Cell]) -> None:
    """Write a file of cells, atomically."""
    with atomic(path) as temp:
        temp.write_text("".join(json.dumps(asdict(cell)) + "\n" for cell in cells), encoding="utf-8")


def read(path: Path, option: str) -> list[Cell]:
    """Return the cells of a file. Raises UserError, which names `option`, where it is none, or a line is damaged."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [_cell(json.loads(line)) for line in lines if line.strip()]
    except (OSError, RuntimeError) as error:
        raise UserError(f"{option} {path}: cannot read it ({getattr(error, 'strerror', None) or error})") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{option} {path}: not the {CELLS} of a study ({error}); give the file that python -m ect.scaling wrote"
        ) from error
    if not found:
        raise UserError(f"{option} {path}: has no cells; give the file that python -m ect.scaling wrote")
    return found


_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}


def _cell(values: Any) -> Cell:
    """Return the cell of a line. Raises TypeError or ValueError where a value is missing, foreign or impossible."""
    cell = Cell(**values)
    for field in fields(Cell):
        value, kinds = getattr(cell, field.name), _KINDS.get(str(field.type), (dict,))
        if type(value) not in kinds:
            raise TypeError(f"{field.name} is {value!r:.40}")
        if float in kinds and not 0 <= value < math.inf:
            raise ValueError(f"{field.name} is {value!r:.40}")
    if not all(isinstance(value, float | int) for value in cell.figures.values()):
        raise TypeError("figures are numbers by their names")
    if not cell.model_flops or not cell.training_flops:
        raise ValueError("FLOPs are above 0")
    return cell
