"""Lines of benchmarks/results/<device>.jsonl, one a run and network, and how a new one compares with the last.

While a run goes on, its line so far stands in a file of its own (`partial`), which `read` reads too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
TOLERANCE = 0.05


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file that has one a line; none where it does not exist. What a kill tore is passed by."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def read(path: Path) -> list[dict[str, Any]]:
    """Return the step_time lines of a file."""
    return [line for line in lines(path) if line.get("benchmark") == "step_time"]


def append(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.is_file() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * torn + json.dumps(line) + "\n")


def partial(path: Path, line: dict[str, Any]) -> Path:
    """Return the file where a run's line stands until the run is over."""
    return path.with_name(f"{path.stem}-{line['net']}-{line['batch']}.partial")


def keep(path: Path, line: dict[str, Any]) -> None:
    """Write the line so far, in one go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f"{path.name}.tmp")
    temp.write_text(json.dumps(line) + "\n", encoding="utf-8")
    os.replace(temp, path)


def first(line: dict[str, Any]) -> str:
    """Return the name of the row that a line's ratios are to: its first one with figures."""
    return next((name for name, row in line["rows"].items() if row["ms"] is not None), "")


def comparable(lines: list[dict[str, Any]], line: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of the same device, network, batch and number of threads whose ratios are to the same row."""
    same = ("device", "net", "batch", "threads")
    return [old for old in lines if all(old[key] == line[key] for key in same) and first(old) == first(line)]


def last(path: Path, line: dict[str, Any]) -> dict[str, Any] | None:
    """Return the latest earlier line that `line` compares with."""
    found = comparable(read(path), line)
    return found[-1] if found else None


def regressions(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Return what got slower by more than TOLERANCE.

    On a GPU that is a row's time; on a CPU, which other work disturbs, its ratio to the first row of the same run.
    """
    key, unit = ("ratio", "of the first row") if new["device"].startswith("cpu") else ("ms", "ms")
    for name, row in new["rows"].items():
        before, now = old["rows"].get(name, {}).get(key), row.get(key)
        if before and now and now > before * (1 + TOLERANCE):
            yield f"{new['net']}, {name}: {now:.3g} {unit}, was {before:.3g} ({100 * (now / before - 1):+.0f} %)"
