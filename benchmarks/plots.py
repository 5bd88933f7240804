"""Render benchmarks/results/README.md and its plots from the recorded lines: python benchmarks/plots.py (part of make bench).

For each device and network: the latest waterfall as a table and a stacked bar chart, and, from two lines on, the course of
its rows. Below them the predicted floors of benchmarks/roofline.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import roofline
import step_time
from lib import categories, history
from lib.options import Parser, possible_path

matplotlib.use("Agg")  # no display
from matplotlib import pyplot as plt

COLOURS = dict(
    zip(
        categories.CATEGORIES,
        ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#9c6b4e", "#bbbbbb"),
        strict=True,
    )
)
HEAD = """# Results

Written by `make bench`. Every figure is measured unless it says predicted; each table names its machine, and the command
that prints it. Ratios compare rows of one run, in which the rows took turns. Where a table has the row `public`, its
ratios are to that row: what the public ECT code does at each step, in our own code (`benchmarks/lib/public_step.py`). IQR:
first and third quartile. MB: what a row holds from step to step, with the most that a step has alive beside it. Launches:
kernels on a GPU, operations on a CPU.
"""


def waterfall(line: dict[str, Any], path: Path) -> None:
    """Plot one bar a row, split by category; the floor is a line."""
    rows = {name: row for name, row in line["rows"].items() if row["ms"] is not None}
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(rows) + 1.5), layout="constrained")
    left = [0.0] * len(rows)
    for kind in categories.CATEGORIES:
        widths = [row["ms"] * row["share"][kind] for row in rows.values()]
        axes.barh(list(rows), widths, left=left, label=kind, color=COLOURS[kind])
        left = [start + width for start, width in zip(left, widths, strict=True)]
    centres, (low, high) = range(len(rows)), zip(*(row["iqr"] for row in rows.values()), strict=True)
    axes.hlines(centres, low, high, colors="black", linewidth=1)
    if line["floor"]["ms"]:
        axes.axvline(line["floor"]["ms"], color="black", linestyle="--", linewidth=1, label="floor")
    axes.invert_yaxis()
    axes.set_xlabel(f"ms a step ({line['clock']}), median and interquartile range")
    axes.set_title(f"{line['net']}, batch {line['batch']}: {line['device']}", fontsize=10)
    figure.legend(fontsize=7, loc="outside right center")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def course(lines: list[dict[str, Any]], path: Path) -> None:
    """Plot the ratio of each row to the first, line by line."""
    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    labels = ["\n".join((line["commit"].replace("-dirty", "\nchanged"), line["time"][:10])) for line in lines]
    for name in lines[-1]["rows"]:
        values = [line["rows"].get(name, {}).get("ratio") for line in lines]
        if any(values) and name != history.first(lines[-1]):
            axes.plot(range(len(lines)), [v or float("nan") for v in values], marker="o", label=name)
    axes.set_xticks(range(len(lines)), labels, fontsize=7)
    axes.set_ylabel(f"ratio to {history.first(lines[-1])!r}")
    axes.set_title(f"{lines[-1]['net']}, batch {lines[-1]['batch']}: {lines[-1]['device']}", fontsize=10)
    axes.set_ylim(bottom=0)
    figure.legend(fontsize=7, loc="outside right center")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def section(lines: list[dict[str, Any]], folder: Path, stem: str) -> Iterator[str]:
    """Yield the Markdown of one device and network, whose plots are written to `folder`."""
    line = lines[-1]
    clocks = ", ".join(f"{name} {value}" for name, value in line["clocks"].items())
    driver = f", driver {line['driver']}" if line["driver"] else ""
    load = f", load average {line['load'][0]} before and {line['load'][-1]} after" if line.get("load") else ""
    yield f"## {line['net']}, batch {line['batch']}: {line['device']}\n"
    yield (
        f"{line['time']}, commit {line['commit']}, torch {line['torch']}{driver}, {clocks}, {line['threads']} CPU thread(s), "
        f"median of {line['rounds']} rounds{load}.\n\n    python benchmarks/step_time.py --net {line['net']}\n"
    )
    for table in step_time.tables(line):
        yield f"{table.title}\n\n{table.markdown()}"
    waterfall(line, folder / f"{stem}.png")
    yield f"![time by row and category]({stem}.png)\n"
    lines = history.comparable(lines, line)
    if len(lines) > 1:
        course(lines[-12:], folder / f"{stem}-course.png")
        yield f"![ratios over the recorded runs]({stem}-course.png)\n"


def sections(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.jsonl")):
        groups: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
        for line in history.read(path):
            groups.setdefault((line["net"], line["batch"], line["threads"]), []).append(line)
        for (net, batch, threads), lines in groups.items():
            yield from section(
                lines, folder, f"{path.stem}-{net}-{batch}" + (f"-threads{threads}" if threads > 1 else "")
            )


def floors() -> Iterator[str]:
    yield "## Predicted floors of a DDPM++ step\n\n    python benchmarks/roofline.py\n"
    yield f"{roofline.note()}\n\n{roofline.assumptions().markdown()}"
    for precision in roofline.PRECISIONS:
        table = roofline.table(precision)
        yield f"{table.title}\n\n{table.markdown()}"


def render(folder: Path, parts: Iterable[str] = ()) -> Path:
    """Write README.md and the plots of a folder of results; returns its path."""
    path = folder / "README.md"
    path.write_text("\n".join([HEAD, *sections(folder), *parts]), encoding="utf-8")
    return path


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--results", type=possible_path, default=history.RESULTS, help="folder of the recorded lines")
    options = parser.parse_args(argv)
    if not options.results.is_dir():
        parser.error(f"--results {options.results}: no such folder; python benchmarks/step_time.py writes it")
    print(render(options.results, floors()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
