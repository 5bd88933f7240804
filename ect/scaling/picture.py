"""The picture of a study: figures over training FLOPs and over the model's, axes logarithmic, with the law and its band."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ect.scaling.laws import Array
from ect.scaling.points import Points
from ect.scaling.verdict import Verdict
from ect.show.chart import BOTTOM, COLOURS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, frame, picture, text

_STEPS = 48  # of a curve
_BAND = "#888"


@dataclass(frozen=True)
class Panel:
    """A chart.

    Args: cells: all that are shown. points: those of the law, as rings, filled where they are not held out. verdict: on them.
    """

    title: str
    x: str
    cells: Points
    points: Points
    verdict: Verdict


def draw(panels: Sequence[Panel]) -> str:
    """Return the SVG picture."""
    return picture(["".join(_panel(panel)) for panel in panels])


def _panel(panel: Panel) -> Iterator[str]:
    xs = [x for x, _, _ in [*panel.cells, *panel.points]]
    ys = [y for _, y, _ in [*panel.cells, *panel.points]]
    if panel.verdict.law is not None:
        ys += panel.verdict.law(np.array([min(xs), max(xs)])).tolist()
    across = Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, log=True)
    up = Axis(min(ys), max(ys), HEIGHT - BOTTOM, TOP, log=True)
    yield from frame(panel.title, panel.x, across, up)
    yield from _law(panel.verdict, across, up)
    widths = sorted({cell.width for _, _, cell in panel.cells})
    colours = dict(zip(widths, itertools.cycle(COLOURS), strict=False))
    for x, y, cell in panel.cells:
        yield f'<circle cx="{across.at(x):.1f}" cy="{up.at(y):.1f}" r="2.2" fill="{colours[cell.width]}" opacity="0.6"/>'
    held = panel.verdict.held if panel.verdict.held is not None else [False] * len(panel.points)
    for (x, y, cell), out in zip(panel.points, held, strict=True):
        colour = colours[cell.width]
        yield (
            f'<circle cx="{across.at(x):.1f}" cy="{up.at(y):.1f}" r="4.4" fill="{"white" if out else colour}" '
            f'stroke="{colour}" stroke-width="1.8"/>'
        )
    place = LEFT
    for width in widths:
        yield text(place, 38, f"width {width}", "start", colours[width])
        place += 7 * len(f"width {width}") + 10


def _law(verdict: Verdict, across: Axis, up: Axis) -> Iterator[str]:
    """Yield the power law that the points which are not held out have, its band, and that of one more point.

    The form with a floor is drawn dashed.
    """
    if verdict.law is None:
        return
    x = np.exp(np.linspace(math.log(verdict.compute.min()), math.log(verdict.compute.max()), _STEPS))
    for of_a_point, opacity in ((True, 0.12), (False, 0.22)):
        low, high = verdict.law.band(x, of_a_point=of_a_point)
        outline = [*_places(x, high, across, up), *reversed(list(_places(x, low, across, up)))]
        yield f'<path d="M{"L".join(outline)}Z" fill="{_BAND}" opacity="{opacity}"/>'
    yield f'<path d="M{"L".join(_places(x, verdict.law(x), across, up))}" fill="none" stroke="#333" stroke-width="1.4"/>'
    floor = "L".join(_places(x, verdict.forms[-1].curve(x), across, up))
    yield f'<path d="M{floor}" fill="none" stroke="#333" stroke-width="1" stroke-dasharray="5 4"/>'


def _places(x: Array, y: Array, across: Axis, up: Axis) -> Iterator[str]:
    """Yield the pixels of a curve, as far as it lies in the field."""
    for one, other in zip(x.tolist(), y.tolist(), strict=True):
        yield f"{across.at(one):.1f} {min(max(up.at(other), TOP), HEIGHT - BOTTOM):.1f}"
