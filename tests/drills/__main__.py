"""python -m tests.drills holds all drills, as often as in the gate or in full, and prints a table of how many were stood."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ect.show.table import Table
from tests.drills.drill import DRILLS, Drill
from tests.drills.runs import ROOT, Ground, Skipped

RESULTS = ROOT / "benchmarks/results/drills.md"


@dataclass
class Row:
    """What came of a drill."""

    tried: int = 0
    passed: int = 0
    longest: float = 0.0
    skipped: str = ""

    def cells(self, name: str) -> list[str]:
        return [
            name if not self.skipped else f"{name} (left out: {self.skipped})",
            str(self.tried),
            str(self.passed),
            f"{self.longest:.1f}",
        ]


def hold(ground: Ground, drill: Drill, number: int, count: int, row: Row, until: float) -> None:
    """Hold one case, and enter it into the row of its drill; none any more after `until`."""
    begun = time.monotonic()
    if begun > until:
        return
    try:
        drill.case(ground, number, count)
        passed = True
    except Skipped as reason:
        row.skipped = str(reason)
        return
    except Exception:
        print(f"{drill.name}, case {number} of {count}:\n{traceback.format_exc(-2, chain=False)}", flush=True)
        passed = False
    with ground.lock:
        row.tried, row.passed = row.tried + 1, row.passed + passed
        row.longest = max(row.longest, time.monotonic() - begun)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.drills", description=__doc__)
    parser.add_argument("--count", choices=["short", "long"], default="short", help="as in the gate, or in full")
    parser.add_argument("--only", default="", help="the drills whose name holds this")
    parser.add_argument("--number", type=int, help="of the only case to hold, as an earlier failure named it")
    parser.add_argument("--minutes", type=float, help="begin no case later than this; all drills get their share")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    parser.add_argument("--write", action="store_true", help=f"also write the table to {RESULTS.relative_to(ROOT)}")
    options = parser.parse_args(argv)
    rows, begun = {drill.name: Row() for drill in DRILLS if options.only in drill.name}, time.monotonic()
    until = begun + 60 * options.minutes if options.minutes is not None else float("inf")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        ground, cases = Ground(Path(folder)), []
        for drill in (drill for drill in DRILLS if drill.name in rows):
            asked = drill.short if options.count == "short" else drill.long
            count = asked(ground) if callable(asked) else asked
            numbers = range(count) if options.number is None else [options.number]
            cases += [((number + 0.5) / count, drill, number, count) for number in numbers]
        for _, drill, number, count in sorted(cases, key=lambda case: case[0]):
            pool.submit(hold, ground, drill, number, count, rows[drill.name], until)
    table = Table(["drill", "tried", "passed", "longest (s)"], [row.cells(name) for name, row in rows.items()])
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    stopped = f", stopped after {options.minutes:g} minutes" if time.monotonic() > until else ""
    spent = f"{options.jobs} at a time, {(time.monotonic() - begun) / 60:.0f} minutes"
    text = (
        f"Drills, the {options.count} form{stopped}, on a CPU ({spent}), at commit {commit.strip() or 'unknown'}.\n\n"
    )
    print(text := text + table.markdown())
    if options.write:
        RESULTS.write_text(text, encoding="utf-8")
    return int(any(row.passed < row.tried for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
