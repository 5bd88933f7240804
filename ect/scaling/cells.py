"""The cells of a study: what one run cost and came to, and cells.jsonl, which has a line for each."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ect.errors import UserError
from ect.files.atomic import atomic
from ect.ranks.sentences import printable

CELLS = "cells.jsonl"
MOST = 20
"""A grid has at most so many widths, lengths and seeds, each."""
_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "str": (str,), "dict[str, float]": (dict,)}
_LARGEST = 1e40  # of the numbers of a cell
_USABLE = 1e-9, 1e9  # figures that no law is asked to hold beyond


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
        """Return a figure; NaN where there is none of this name, or none that a law can be fitted to."""
        value = self.figures.get(name, math.nan)
        return value if _USABLE[0] <= value <= _USABLE[1] else math.nan


def write(path: Path, cells: Sequence[Cell]) -> None:
    """Write a file of cells, atomically."""
    with atomic(path) as temp:
        temp.write_text("".join(json.dumps(asdict(cell)) + "\n" for cell in cells), encoding="utf-8")


def read(path: Path, option: str) -> list[Cell]:
    """Return the cells of a file. Raises UserError, which names `option`, where it is none, or a line is damaged."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [_cell(json.loads(line)) for line in lines if line.strip()]
        _refuse_no_grid(found)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{option} {path}: cannot read it ({getattr(error, 'strerror', None) or error})") from error
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(
            f"{option} {path}: not the {CELLS} of a study ({error}); give the file that python -m ect.scaling wrote"
        ) from error
    return found


def _cell(values: Any) -> Cell:
    """Return the cell of a line. Raises TypeError, ValueError or OverflowError where a value is missing or impossible."""
    cell = Cell(**values)
    for field in fields(Cell):
        value, kinds = getattr(cell, field.name), _KINDS[str(field.type)]
        if type(value) not in kinds or (int in kinds and not 0 <= value <= _LARGEST):
            raise ValueError(f"{field.name} is {value!r:.40}")
    if not (cell.images and cell.kimg and cell.model_flops >= 1 and cell.training_flops >= 1):
        raise ValueError("images and FLOPs are above 0")
    if not all(type(value) in (float, int) for value in cell.figures.values()):
        raise TypeError("figures are numbers by their names")
    figures = {name: float(value) for name, value in cell.figures.items()}
    return replace(cell, preset=printable(cell.preset), machine=printable(cell.machine), figures=figures)


def _refuse_no_grid(cells: Sequence[Cell]) -> None:
    """Raise ValueError where there are no cells, too many values of an axis, or one cell twice."""
    places = [(cell.width, cell.kimg, cell.seed) for cell in cells]
    if not cells:
        raise ValueError("it has no cells")
    if max(len(set(axis)) for axis in zip(*places, strict=True)) > MOST:
        raise ValueError(f"more than {MOST} widths, lengths or seeds")
    if len(set(places)) < len(places):
        raise ValueError("a cell is there twice")
