"""The report of benchmarks/first_hour.py: report.md of what lies in its folder, whatever of it is there."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lib import history

TOP = 15  # kernels
PICTURES = ("nfe1", "nfe2", "samples")
ANSI = re.compile(r"\x1b\[[0-9;]*m")
Json = dict[str, Any]


def write(out: Path, outcomes: Sequence[Json], notes: Sequence[str]) -> None:
    parts = [*_head(out, outcomes, notes), *_stages(outcomes), *_profile(out), *_rows(out), *_training(out, outcomes)]
    (out / "report.md").write_text("\n".join(parts) + "\n", encoding="utf-8")


def telling(log: str) -> str:
    """Return the line of a log that says most: its last error, else its last line."""
    lines = [ANSI.sub("", line).strip(" │╭╮╰╯─━") for line in log.splitlines()]
    lines = [line for line in lines if line]
    errors = [
        line for line in lines if re.match(r"(error: |\w*(Error|Exception|Interrupt)\b|Unrecognized options: )", line)
    ]
    return (errors or lines or ["it said nothing"])[-1][:300]


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown, the first column left, the others right."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in (headers, *rows)]
    cells.insert(1, ["---", *["---:"] * (len(headers) - 1)])
    return "\n".join(f"| {' | '.join(row)} |" for row in cells) + "\n"


def _json(path: Path) -> Json:
    """Return a JSON object, empty where there is none or a kill tore it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _head(out: Path, outcomes: Sequence[Json], notes: Sequence[str]) -> Iterator[str]:
    good = sum(outcome["status"] == "ok" for outcome in outcomes)
    yield "# The first hour\n"
    of = len(outcomes)
    yield f"{good} of {of} stages are well. Measured, unless it says predicted, by `python benchmarks/first_hour.py`.\n"
    for note in notes:
        yield f"- {note}"
    for name, fact in _json(out / "machine.json").items():
        yield f"- {name}: {fact}"
    yield ""


def _stages(outcomes: Sequence[Json]) -> Iterator[str]:
    rows = [
        (o["name"], o["status"], f"{o['seconds']:.0f}", o["why"], o["log"] if o["seconds"] else "") for o in outcomes
    ]
    yield "## Stages\n"
    yield table(["stage", "", "s", "why", "log"], rows)


def _profile(out: Path) -> Iterator[str]:
    result = _json(out / "profile.json")
    if not result:
        return
    yield f"## The step: {result['net']}, batch {result['batch']}, {result['device']}\n"
    rows = []
    for way in result["ways"]:
        figures = [
            f"{way[key]:{form}}" if key in way else ""
            for key, form in (("ms", ".2f"), ("host_ms", ".2f"), ("launches", "d"))
        ]
        rows.append((way["name"], *figures, f"{way['start']:.1f}" if "start" in way else "", way.get("why", "")))
    yield table(["way", "ms a step", "ms until Python is back", "launches", "s to start", "failed"], rows)
    ran = next((way for way in result["ways"] if "kernels" in way), None)
    if ran is None:
        return
    yield f"**Measured against predicted**, {ran['name']}. Time: {_sheet(result)}; memory, launches: `ect.cost.memory`.\n"
    yield table(
        ["what", "measured", "predicted", "ratio"], [*_times(ran, result["floor"]), *_memory(ran), _launches(ran)]
    )
    busy = sum(ran["by_kind"].values())
    shown = [
        (k["name"][:90], k["count"], f"{k['ms']:.3f}", f"{100 * k['ms'] / busy:.1f} %") for k in ran["kernels"][:TOP]
    ]
    yield f"**What takes most time**, of {busy:.2f} ms in kernels (all: profile.json).\n"
    yield table(["kernel", "calls", "ms", "share"], shown)


def _sheet(result: Json) -> str:
    return (
        f"floors by the data sheet of {result['sheet']}"
        if result["floor"]
        else "no floor known for this device and network"
    )


def _against(what: str, measured: float, predicted: float | None, form: str) -> tuple[str, str, str, str]:
    if not predicted:
        return what, format(measured, form), "", ""
    return what, format(measured, form), format(predicted, form), f"{measured / predicted:.2f}"


def _times(way: Json, floor: Json | None) -> list[tuple[str, str, str, str]]:
    floor = floor or {}
    rows = [_against("ms a step", way["ms"], floor.get("step"), ".2f")]
    kinds = sorted(way["by_kind"].items(), key=lambda item: -item[1])
    return rows + [_against(f"ms in kernels: {kind}", ms, floor.get(kind), ".2f") for kind, ms in kinds]


def _memory(way: Json) -> list[tuple[str, str, str, str]]:
    """Report the memory of the profile, which has neither the averaged network nor sampling, as a run's prediction has."""
    memory = way["memory"]
    predicted = memory["predicted"]
    step = (predicted["state"] + predicted["update"]) / 1e9
    rows = [("GB of a whole run", "", f"{memory['predicted_run'] / 1e9:.2f}", "")]
    if "tensors" in memory:
        rows = [_against("GB of tensors at the step's peak", memory["tensors"] / 1e9, step, ".2f"), *rows]
        rows.append(
            (
                "GB of the device in use",
                f"{memory['in_use'] / 1e9:.2f}",
                f"{(step * 1e9 + predicted['allowance']) / 1e9:.2f}",
                "",
            )
        )
    return rows


def _launches(way: Json) -> tuple[str, str, str, str]:
    """Report the launches as they are counted: a convolution, product or attention is one, whatever the library makes of it."""
    return _against("launches", way["launches"], way["memory"]["predicted"].get("launches"), "d")


def _rows(out: Path) -> Iterator[str]:
    """Yield step_time's line, or what a killed run left of it."""
    paths = sorted((out / "results").glob("*.jsonl")) + sorted((out / "results").glob("*.partial"))
    for line in [lines[-1] for path in paths if (lines := history.lines(path))]:
        unfinished = f" (not finished: {line['partial']})" if "partial" in line else ""
        yield f"## Rows: {line['net']}, batch {line['batch']}, {line['rounds']} rounds{unfinished}\n"
        headers = (
            "row",
            "ms a step",
            "of the first",
            "images/s",
            "minutes of the recipe (predicted)",
            "launches",
            "s to start",
        )
        yield table(headers, [_row(name, row) for name, row in line["rows"].items()])
        if line["floor"]["ms"]:
            yield f"Floor {line['floor']['ms']:.2f} ms, {line['floor']['what']}.\n"
        payback = line.get("payback")
        if payback:
            steps = payback["steps"]
            answer = payback["why"] if steps is None else f"after {steps:,} steps ({payback['why']})"
            yield f"{payback['rows'][1]} pays for its start, against {payback['rows'][0]}: {answer}.\n"


def _row(name: str, row: Json) -> tuple[str, ...]:
    if row["ms"] is None:
        return name, row["why"], "", "", "", "", ""
    rates = f"{row['ratio']:.3f}", f"{row['images_per_second']:.0f}", f"{row['predicted_minutes']:.1f}"
    return name, f"{row['ms']:.2f}", *rates, str(row["launches"]), f"{row['start']:.1f}"


def _training(out: Path, outcomes: Sequence[Json]) -> Iterator[str]:
    logs = {o["name"]: out / o["log"] for o in outcomes if o["seconds"]}
    for name, title in (("run", "A run"), ("digits", "The digits")):
        folder = out / "work" / name
        rows = [row for row in history.lines(folder / "stats.jsonl") if "loss" in row]
        if not rows:
            continue
        yield f"## {title}\n"
        first, last = rows[0], rows[-1]
        yield f"- {last['nimg'] / 1000:g} kimg; loss {first['loss']:.4g} at first, {last['loss']:.4g} at last"
        yield f"- {last['sec_per_kimg']:.3f} s/kimg in the last row of statistics"
        if last.get("memory_bytes"):
            yield f"- peak memory {last['memory_bytes'] / 1e9:.2f} GB; {_predicted(logs.get(name))}"
        if last.get("nonfinite"):
            yield f"- {last['nonfinite']} non-finite values in gradients were replaced"
        yield ""
        if (folder / "results.md").is_file():
            yield (folder / "results.md").read_text(encoding="utf-8")
        for picture in _pictures(folder, out / "pictures", name):
            yield f"![{picture.stem}](pictures/{picture.name})\n"


def _predicted(log: Path | None) -> str:
    """Return the prediction that a run printed when it began."""
    text = (
        " ".join(log.read_text(encoding="utf-8", errors="replace").split()) if log is not None and log.is_file() else ""
    )
    found = re.search(r"predicted peak memory [^()]*\([^()]*\)", ANSI.sub("", text))
    return found[0] if found else "no prediction in its log"


def _pictures(folder: Path, to: Path, name: str) -> list[Path]:
    """Copy the last picture of each kind beside the report: the run's folder is large, and need not be kept."""
    copied = []
    for kind in PICTURES:
        found = sorted(folder.glob(f"{kind}*.png"))
        if found:
            to.mkdir(parents=True, exist_ok=True)
            copied.append(Path(shutil.copyfile(found[-1], to / f"{name}-{found[-1].name}")))
    return copied
