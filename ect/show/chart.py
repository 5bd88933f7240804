"""Line charts as one SVG picture: text stays text, and no library draws it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

COLOURS = ("#4269d0", "#ff725c", "#3ca951", "#a463f2", "#efb118")
WIDTH, HEIGHT = 440, 300  # pixels of a chart
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 52, 44  # pixels around the field of its curves
LOG_FROM = 20.0  # times the least value: the largest one from which the axis is logarithmic
Point = tuple[float, float]


@dataclass(frozen=True)
class Chart:
    """Curves over one axis.

    curves: points (x, y) by name, x rising; a curve alone is named by the title. levels: values of y by name, drawn dashed.
    x: name of the axis.
    """

    title: str
    x: str
    curves: Mapping[str, Sequence[Point]]
    levels: Mapping[str, float] = field(default_factory=dict)


def draw(charts: Sequence[Chart], columns: int = 2) -> str:
    """Return an SVG picture of charts, row by row. Each has a point at least."""
    return picture(["".join(_chart(chart)) for chart in charts], columns)


def picture(charts: Sequence[str], columns: int = 2) -> str:
    """Return an SVG picture of charts that are drawn, each WIDTH by HEIGHT pixels, row by row."""
    across = min(columns, len(charts))
    size = WIDTH * across, HEIGHT * math.ceil(len(charts) / across)
    parts = [
        f'<g transform="translate({WIDTH * (i % across)} {HEIGHT * (i // across)})">{chart}</g>'
        for i, chart in enumerate(charts)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}" height="{size[1]}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _chart(chart: Chart) -> Iterator[str]:
    points = [point for curve in chart.curves.values() for point in curve]
    xs, ys = [x for x, _ in points], [*(y for _, y in points), *chart.levels.values()]
    log = min(ys) > 0 and max(ys) >= LOG_FROM * min(ys)
    across, up = Axis(min(0.0, *xs), max(xs), LEFT, WIDTH - RIGHT), Axis(min(ys), max(ys), HEIGHT - BOTTOM, TOP, log)
    yield from frame(chart.title, chart.x, across, up)
    names = LEFT
    for (name, curve), colour in zip(chart.curves.items(), itertools.cycle(COLOURS), strict=False):
        places = [f"{across.at(x):.1f} {up.at(y):.1f}" for x, y in curve]
        yield f'<path d="M{"L".join(places)}" fill="none" stroke="{colour}" stroke-width="1.8" stroke-linejoin="round"/>'
        if len(places) <= 40:  # each point is worth seeing
            yield "".join('<circle cx="{}" cy="{}" r="2.6" fill="{}"/>'.format(*p.split(), colour) for p in places)
        if len(chart.curves) > 1:
            yield text(names, 38, name, "start", colour)
            names += 7 * len(name) + 16
    for name, value in chart.levels.items():
        y = up.at(value)
        yield f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#555" stroke-dasharray="5 4"/>'
        yield text(LEFT + 5, y - 5, name, "start", "#555")  # where curves that fall have not come yet


def frame(title: str, x: str, across: Axis, up: Axis) -> Iterator[str]:
    """Yield the title of a chart, its grid, and the values beside it. x: name of the axis."""
    yield text(LEFT, 18, title, "start", "black", 'font-weight="bold"')
    for value in across.ticks():
        place = across.at(value)
        yield f'<path d="M{place:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#e4e4e4"/>'
        yield text(place, HEIGHT - BOTTOM + 17, f"{value:g}", "middle")
    for value in up.ticks():
        place = up.at(value)
        yield f'<path d="M{LEFT} {place:.1f}H{WIDTH - RIGHT}" stroke="#e4e4e4"/>'
        yield text(LEFT - 6, place + 4, f"{value:g}", "end")
    yield text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x, "middle")


def text(x: float, y: float, text: str, anchor: str, fill: str = "#555", more: str = "") -> str:
    """Return text as SVG. anchor: which end of it is at x: start, middle or end. more: further attributes."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" {more}>{escape(text)}</text>'


class Axis:
    """Values from `low` to `high`, rounded to ticks where they are logarithmic, onto pixels from `start` to `end`."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False) -> None:
        self.log, self.start, self.end = log, start, end
        if not high > low:
            low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
        self.low, self.high = low, high
        if log:
            self.low, self.high = low / 1.15, high * 1.15
        elif start > end:  # the curves of an upright axis keep off its ends
            margin = (high - low) * 0.06
            self.low, self.high = (low - margin if low - margin > 0 or low < 0 else 0.0), high + margin

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round values within the axis, three to eight of them."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1, 3), (1,)):
                found = [digit * 10.0**power for power in decades for digit in digits]
                found = [value for value in found if self.low <= value <= self.high]
                if len(found) <= 8:
                    break
            if len(found) >= 3:
                return found
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 3))
        step = next(step * digit for digit in (5, 2, 1) if (self.high - self.low) / (step * digit) >= 3)
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
