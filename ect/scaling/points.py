"""The points of a study that a law is fitted to: which cells stand for a compute."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from ect.scaling.cells import Cell

Points = list[tuple[float, float, Cell]]
"""(compute, figure, the cell)."""


def against_training(cells: Sequence[Cell], name: str) -> Points:
    """Return the points over training FLOPs: for each seed the cells that are best for their compute, by the other seeds.

    A cell is best if no other costs as much or less and has a lower figure, in the mean of the other seeds. The best by their
    own figures would be the lucky ones, whose figures fall with compute even where nothing but chance is at work. Of one seed
    alone all cells are returned.
    """
    seeds = sorted({cell.seed for cell in cells})
    if len(seeds) == 1:
        return [(cell.training_flops, cell.figure(name), cell) for cell in cells]
    found: Points = []
    for seed in seeds:
        best = _frontier([cell for cell in cells if cell.seed != seed], name)
        found += [
            (cell.training_flops, cell.figure(name), cell)
            for cell in cells
            if cell.seed == seed and (cell.width, cell.kimg) in best
        ]
    return found


def _frontier(cells: Sequence[Cell], name: str) -> set[tuple[int, float]]:
    """Return width and length of the cells whose figure, the mean over seeds, none has that costs as much or less."""
    places: dict[tuple[int, float], list[Cell]] = {}
    for cell in cells:
        places.setdefault((cell.width, cell.kimg), []).append(cell)
    means = [
        (group[0].training_flops, fmean(cell.figure(name) for cell in group), place) for place, group in places.items()
    ]
    found, least = set(), math.inf
    for _, figure, place in sorted(means):
        if figure < least:
            found.add(place)
            least = figure
    return found


def against_model(cells: Sequence[Cell], name: str) -> Points:
    """Return the points over the model's FLOPs: the cells of the most images."""
    most = max(cell.images for cell in cells)
    return [(cell.model_flops, cell.figure(name), cell) for cell in cells if cell.images == most]
