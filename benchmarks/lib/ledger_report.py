"""Reports of a data set's lines: a table, the time to a target, and a picture of quality over time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from ect.show.table import Table
from lib import ledger_lines
from lib.claims import quality
from lib.ledger_lines import Line, figure, mean_and_spread, of, reached, seconds, share_of_time
from lib.recipes import BASE, RECIPES, SETS, TEACHER

NFES = (1, 2)


def runs(lines: Sequence[Line]) -> list[tuple[str, float]]:
    """Return the recipes and lengths of these lines, in the order of RECIPES, the longest first."""
    order = list(RECIPES)
    return sorted({(line["recipe"], line["length"]) for line in lines}, key=lambda run: (order.index(run[0]), -run[1]))


def unit(lines: Sequence[Line]) -> str:
    return " and ".join(sorted({line["unit"] for line in lines}))


def table(lines: Sequence[Line], data: str) -> Table:
    """Return one row a recipe and length; see the docstring of ledger.py for its columns."""
    quiet, cells = ledger_lines.quiet_pace(lines), []
    for recipe, length in runs(lines):
        found = of(lines, recipe, length)
        row = [recipe, f"{length:g}", str(len(found))]
        if recipe == TEACHER:
            (name,) = {name for line in found.values() for name in line["curve"][-1][2] if name.endswith("FDc")}
            nfe = int(name[3:].partition("/")[0])
            cells.append([*row, "", f"{mean_and_spread([figure(line, nfe) for line in found.values()])} at {nfe}"])
            continue
        row.append(mean_and_spread([seconds(line, quiet) for line in found.values()]))
        for nfe in NFES:
            row.append(mean_and_spread([figure(line, nfe) for line in found.values()]))
            against = quality(lines, recipe, BASE, length, nfe) if recipe != BASE else None
            wins = against is not None and against.wins and against.seeds >= SETS[data].seeds
            nothing = "" if recipe == BASE else "dearer"
            row.append(nothing if against is None else f"{against}{', wins' * wins}")
        shares = [share_of_time(lines, recipe, BASE, length, nfe).values() for nfe in NFES]
        row.append(" / ".join(_share(list(found)) for found in shares))
        cells.append(row)
    headers = ["recipe", "length", "seeds", unit(lines), "FDc, 1 evaluation", f"of {BASE}'s"]
    headers += ["FDc, 2 evaluations", f"of {BASE}'s", f"time to {BASE}'s FDc, 1 / 2"]
    return Table(headers, cells, data)


def _share(found: Sequence[float]) -> str:
    if not found:
        return "-"
    median = statistics.median(found)
    return f"{median:.2f}" if median < math.inf else "never"


def time_table(lines: Sequence[Line], target: float, nfe: int) -> Table:
    """Return one row a recipe and length: when each seed first had an FDc of at most `target`."""
    quiet, cells = ledger_lines.quiet_pace(lines), []
    for recipe, length in runs(lines):
        if recipe == TEACHER:
            continue
        found = {seed: (line, reached(line, target, nfe)) for seed, line in sorted(of(lines, recipe, length).items())}
        times = {seed: math.inf if t is None else seconds(line, quiet, t) for seed, (line, t) in found.items()}
        shown = ", ".join(f"{seed}: {t:.0f}" if t < math.inf else f"{seed}: never" for seed, t in times.items())
        median = statistics.median(times.values())
        cells.append([recipe, f"{length:g}", f"{median:.0f}" if median < math.inf else "never", shown])
    headers = ["recipe", "length", f"{unit(lines)}, median", "by seed"]
    return Table(
        headers, cells, f"FDc of at most {target:g} at {nfe} evaluation{'s' * (nfe > 1)}", left=["recipe", "by seed"]
    )


def plot(lines: Sequence[Line], data: str, path: Path) -> None:
    """Draw FDc over time, a line a recipe and length: the geometric mean over seeds, and each seed faintly."""
    import matplotlib

    matplotlib.use("Agg")  # no display
    from matplotlib import pyplot as plt

    quiet = ledger_lines.quiet_pace(lines)
    figure_, axes = plt.subplots(1, len(NFES), figsize=(11, 5), layout="constrained", sharex=True)
    for panel, nfe in zip(axes, NFES, strict=True):
        for i, (recipe, length) in enumerate(run for run in runs(lines) if run[0] != TEACHER):
            curves = [
                [(seconds(line, quiet, spent), values[f"nfe{nfe}/FDc"]) for _, spent, values in line["curve"]]
                for line in of(lines, recipe, length).values()
            ]
            for curve in curves:
                panel.plot(*zip(*curve, strict=True), color=f"C{i % 10}", alpha=0.2, linewidth=0.8)
            points = [list(zip(*point, strict=True)) for point in zip(*curves, strict=False)]
            times, figures = zip(*((statistics.fmean(t), statistics.geometric_mean(f)) for t, f in points), strict=True)
            style = "-" if i < 10 else "--"
            panel.plot(times, figures, style, color=f"C{i % 10}", label=f"{recipe}, length {length:g}", marker=".")
        panel.set_yscale("log")
        panel.set_xlabel(f"{unit(lines)} since the teacher, at the machine's quickest pace")
        panel.set_title(f"{data}: FDc at {nfe} evaluation{'s' * (nfe > 1)}", fontsize=10)
        panel.grid(alpha=0.3, which="both")
    axes[-1].legend(fontsize=7)
    figure_.savefig(path, dpi=110)
    plt.close(figure_)
