"""The picture levels.png of a run with --log.levels: the gap of its pairs, and the one that they suggest, over t."""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ect.files.atomic import atomic
from ect.objectives.gaps import Level, means
from ect.show.curves import rows

SIZE, MARGIN = (720, 480), 60
COLOURS = {"gap t - r": "#4269d0", "suggested, A / B": "#ff725c"}


def plot(run_dir: Path) -> Path | None:
    """Write levels.png of the later half of the rows in stats.jsonl, atomically; None where they say nothing of levels.

    A damaged line is passed over. Raises OSError where the rows cannot be read.
    """
    told = [row for row in rows(run_dir) if any(name.startswith("levels/") for name in row)]
    found = means(told[len(told) // 2 :])
    if not found:
        return None
    with atomic(run_dir / "levels.png") as temp:
        draw(found).save(temp, "PNG")
    return run_dir / "levels.png"


def draw(levels: dict[float, Level]) -> Image.Image:
    """Draw gap and suggested gap over t, both axes logarithmic. levels: by the middle of a bin of ln t."""
    curves = {
        "gap t - r": {x: level.gap for x, level in levels.items()},
        "suggested, A / B": {x: level.suggested for x, level in levels.items()},
    }
    points = {
        name: [(x / math.log(10), math.log10(y)) for x, y in curve.items() if y > 0] for name, curve in curves.items()
    }
    flat = [point for curve in points.values() for point in curve]
    (left, right), (low, high) = ((math.floor(min(axis)), math.ceil(max(axis))) for axis in zip(*flat, strict=True))
    right, high = max(right, left + 1), max(high, low + 1)
    image, font = Image.new("RGB", SIZE, "white"), ImageFont.load_default(size=14)
    pen, (width, height) = ImageDraw.Draw(image), SIZE

    def at(x: float, y: float) -> tuple[float, float]:
        across = MARGIN + (x - left) / (right - left) * (width - 2 * MARGIN)
        return across, height - MARGIN - (y - low) / (high - low) * (height - 2 * MARGIN)

    for x in range(left, right + 1):
        pen.line([at(x, low), at(x, high)], "#dddddd")
        pen.text((at(x, low)[0], height - MARGIN + 6), f"1e{x}", "black", font, "ma")
    for y in range(low, high + 1):
        pen.line([at(left, y), at(right, y)], "#dddddd")
        pen.text((MARGIN - 6, at(left, y)[1]), f"1e{y}", "black", font, "rm")
    pen.text((width / 2, height - 18), "noise level t", "black", font, "mm")
    for i, (name, curve) in enumerate(points.items()):
        places = [at(*point) for point in curve]
        pen.line(places, COLOURS[name], 2)
        for across, up in places:
            pen.ellipse([across - 3, up - 3, across + 3, up + 3], COLOURS[name])
        pen.text((MARGIN + 10, MARGIN - 45 + 18 * i), name, COLOURS[name], font)
    return image
