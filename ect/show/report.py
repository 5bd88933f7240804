"""The end of a job or an evaluation: samples of every sampler side by side, and a table of their quality and cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.text import Text
from torch import Tensor

from ect.files.atomic import atomic
from ect.metrics import Column, Evaluator, QualityRow, quality_table
from ect.show.grid import make_grid
from ect.show.table import Table

_TITLE_HEIGHT = 24  # pixels


def strips(rows: dict[str, Tensor], scale: int) -> Tensor:
    """Lay out rows of images uint8 [n, H, W, C], each under its title, as one picture uint8 [height, width, 3]."""
    font = ImageFont.load_default(size=15)
    parts = []
    for title, images in rows.items():
        strip = make_grid(images, columns=len(images), scale=scale).expand(-1, -1, 3)
        head = Image.new("RGB", (strip.shape[1], _TITLE_HEIGHT), "white")
        ImageDraw.Draw(head).text((2, 3), title, fill="black", font=font)
        pixels = torch.frombuffer(bytearray(head.tobytes()), dtype=torch.uint8)
        parts += [pixels.view(_TITLE_HEIGHT, strip.shape[1], 3), strip]
    widest = max(part.shape[1] for part in parts)  # a small data set may have fewer images than the samplers
    return torch.cat([torch.nn.functional.pad(part, (0, 0, 0, widest - part.shape[1]), value=255) for part in parts])


def table(rows: Sequence[QualityRow], columns: Sequence[Column]) -> Table:
    """Return one row a sampler: its name, NFE, metrics and images a second."""
    headers, cells = quality_table(rows, columns)
    rates = [f"{row.samples * len(row.values) / row.seconds:.0f}" for row in rows]
    lines = [[*cell, rate] for cell, rate in zip(cells, rates, strict=True)]
    return Table([*headers, "images/s"], lines, f"Quality of {rows[0].samples} samples each")


def wall_clock(seconds: dict[str, float]) -> str:
    return "Wall clock: " + ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())


def show(console: Console, rows: Sequence[QualityRow], columns: Sequence[Column], seconds: dict[str, float]) -> None:
    """Print the table and the wall clock of each phase on the console."""
    if rows:
        console.print(table(rows, columns))
    console.print(wall_clock(seconds), highlight=False)


def write(
    run_dir: Path, rows: Sequence[QualityRow], columns: Sequence[Column], seconds: dict[str, float],
    checked: Sequence[str] = (), more: Mapping[str, Any] = MappingProxyType({}),
) -> None:  # fmt: skip
    """Write results.json, and results.md with the table in Markdown, atomically.

    checked: what the self-check found. more: further keys of results.json, JSON-able.
    """
    result = {"rows": [row.as_json() for row in rows], "seconds": seconds, "checked": list(checked), **more}
    with atomic(run_dir / "results.json") as temp:
        temp.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = table(rows, columns).markdown() + "\n" if rows else ""
    with atomic(run_dir / "results.md") as temp:
        temp.write_text("\n\n".join([text + wall_clock(seconds) + ".", *checked]) + "\n", encoding="utf-8")


def show_metrics(console: Console, rows: Sequence[QualityRow], evaluator: Evaluator) -> None:
    """Print the table of an evaluation, and below it why columns are missing."""
    console.print(Table(*quality_table(rows, evaluator.columns)))
    for note in evaluator.notes:
        console.print(Text(f"- {note}"))


def write_metrics(
    path: Path, model: dict[str, Any], rows: Sequence[QualityRow], evaluator: Evaluator, arithmetic: str
) -> None:
    """Write metrics.json, atomically. model: what was rated, JSON-able. arithmetic: `ect.precision.products` of the device."""
    found = {
        "format": 2,
        "model": model,
        "products": arithmetic,
        "used": evaluator.used,
        "missing": {column.name: column.missing for column in evaluator.columns if column.missing is not None},
        "rows": [row.as_json() for row in rows],
    }
    with atomic(path) as temp:
        temp.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
