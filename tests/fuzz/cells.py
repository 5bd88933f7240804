"""cells.jsonl of a scaling study, and the report that is made of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from ect.scaling import cells
from ect.scaling.report import Report
from tests.fuzz.mutations import spoilt_text
from tests.test_scaling_laws import cell

WHOLE = [asdict(cell(8 * width, 4.0, seed, 50.0 / width + seed)) for width in range(1, 6) for seed in (0, 1)]
LINES = [json.dumps(line).encode() for line in WHOLE]


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A file of which some lines are spoilt, absent or doubled."""
    lines = [draw(spoilt_text(json.loads(line))) if draw(st.integers(0, 9)) == 0 else line for line in LINES]
    kept = [line for line in lines for _ in range(draw(st.sampled_from([1, 1, 1, 1, 1, 1, 1, 1, 0, 2])))]
    return b"\n".join(kept)


INPUTS = st.one_of(files(), st.binary(max_size=40))


def read(folder: Path, data: bytes) -> Any:
    path = folder / cells.CELLS
    path.write_bytes(data)
    report = Report(cells.read(path, "--report"), "FDc", 2)
    report.write(folder, "a command", "a minute")
    return report.verdicts()
