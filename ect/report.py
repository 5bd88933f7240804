"""Samplers of a network, their quality and cost, and the end of a job: one picture and one table."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ect.checkpoint import atomic
from ect.grid import make_grid
from ect.metrics.evaluator import Evaluator
from ect.models import EDMPrecond
from ect.sampler import SIGMA_MAX, generate

_TITLE_HEIGHT = 24  # pixels


@dataclass(frozen=True)
class Sampler:
    """One way to sample a network."""

    label: str
    nfe: int
    """Network evaluations an image."""
    options: dict[str, Any]
    """Arguments of ect.sampler.generate."""


def heun_samplers(steps: Sequence[int]) -> list[Sampler]:
    """EDM's Heun sampler: n steps take 2 n - 1 evaluations."""
    return [Sampler(f"diffusion, {n} Heun steps", 2 * n - 1, {"heun_steps": n}) for n in steps]


def consistency_samplers(mid_t: Sequence[float]) -> list[Sampler]:
    """The consistency sampler at 1, 2, ... evaluations: sigma 80 first, then mid_t in order."""
    return [
        Sampler(f"consistency, {n + 1} step{'s' if n else ''}", n + 1, {"sigmas": [SIGMA_MAX, *mid_t[:n]]})
        for n in range(len(mid_t) + 1)
    ]


@dataclass(frozen=True)
class Row:
    """The figures of one sampler."""

    sampler: str
    nfe: int
    metrics: dict[str, float]
    images_per_second: float


def measure(
    net: EDMPrecond, samplers: Sequence[Sampler], evaluator: Evaluator, *,
    samples: int, batch: int, device: torch.device | str, first_seed: int = 0,
) -> list[Row]:  # fmt: skip
    """Rate `samples` images of each sampler; image i starts from seed first_seed + i, whatever the sampler.

    Args: net: in eval mode, on `device`. batch: images a forward pass.
    """
    rows = []
    for sampler in samplers:
        start = time.perf_counter()
        seeds = range(first_seed, first_seed + samples)
        images = list(generate(net, seeds, batch=batch, device=device, **sampler.options))
        rate = samples / (time.perf_counter() - start)
        rows.append(Row(sampler.label, sampler.nfe, evaluator.evaluate(images), rate))
    return rows


def strips(rows: dict[str, Tensor], scale: int) -> Tensor:
    """Rows of images uint8 [n, H, W, C], each under its title, as one picture uint8 [height, width, 3]."""
    font = ImageFont.load_default(size=15)
    parts = []
    for title, images in rows.items():
        strip = make_grid(images, columns=len(images), scale=scale).expand(-1, -1, 3)
        head = Image.new("RGB", (strip.shape[1], _TITLE_HEIGHT), "white")
        ImageDraw.Draw(head).text((2, 3), title, fill="black", font=font)
        pixels = torch.frombuffer(bytearray(head.tobytes()), dtype=torch.uint8)
        parts += [pixels.view(_TITLE_HEIGHT, strip.shape[1], 3), strip]
    return torch.cat(parts)


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells: sampler, NFE, metrics in three significant digits, images a second."""
    headers = ["sampler", "NFE", *rows[0].metrics, "images/s"]
    cells = [
        [row.sampler, str(row.nfe), *map(_three_digits, row.metrics.values()), f"{row.images_per_second:.0f}"]
        for row in rows
    ]
    return headers, cells


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def markdown(headers: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, first column left, the others right."""
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def wall_clock(seconds: dict[str, float]) -> str:
    return "Wall clock: " + ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())


def show(console: Console, rows: Sequence[Row], samples: int, seconds: dict[str, float]) -> None:
    """The table and the wall clock of each phase, on the console."""
    if rows:
        headers, cells = table(rows)
        view = Table(title=f"Quality of {samples} samples each", title_justify="left")
        for i, name in enumerate(headers):
            view.add_column(name, justify="left" if i == 0 else "right")
        for cell in cells:
            view.add_row(*cell)
        console.print(view)
    console.print(wall_clock(seconds), highlight=False)


def write(run_dir: Path, rows: Sequence[Row], samples: int, seconds: dict[str, float]) -> None:
    """results.json, and results.md with the table in Markdown, atomically."""
    result = {"samples": samples, "rows": [asdict(row) for row in rows], "seconds": seconds}
    with atomic(run_dir / "results.json") as temp:
        temp.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    with atomic(run_dir / "results.md") as temp:
        temp.write_text((markdown(*table(rows)) + "\n" if rows else "") + wall_clock(seconds) + ".\n", encoding="utf-8")
