"""The report of a scaling study: its law, points, costs and picture; and the file of cells that it is made of."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from ect.errors import UserError
from ect.scaling import __main__ as scaling
from ect.scaling import cells as files
from ect.scaling.cells import Cell
from ect.scaling.report import Report
from ect.show.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH
from tests.test_scaling_laws import cell


def study(seeds: int = 2) -> list[Cell]:
    """Cells of a grid whose figures follow a power law of the compute, to a part of a hundred thousand."""
    return [
        cell(width, kimg, seed, 1e5 * (4e6 * width**2 * kimg) ** -0.4 * (1 + 1e-5 * ((width + seed) % 3)))
        for width in (8, 12, 16, 24, 32, 48)
        for kimg in (1.0, 4.0, 16.0, 64.0)
        for seed in range(seeds)
    ]


def test_a_report_names_the_law_its_points_and_its_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files.write(tmp_path / "cells.jsonl", study())
    assert files.read(tmp_path / "cells.jsonl", "--report") == study()
    assert scaling.main(["--report", str(tmp_path / "cells.jsonl")]) == 0
    shown = capsys.readouterr().out
    said = " ".join(shown.split())
    assert "FDc against training FLOPs: a power law is supported: it predicts the" in said
    assert "FDc against model FLOPs: a power law is supported: it predicts the 2 held-out points" in said
    assert "Points: the cells of 64 kimg, the most images; 12 points at 6 different computes." in said
    assert "exponent 0.4, with 95% from 0.4 to 0.4;" in said
    assert "Tuning took 1.6 minutes of all runs together, the teachers 0.2 minutes." in said
    assert [*tmp_path.iterdir()] == [tmp_path / "cells.jsonl"]
    Report(study(), "FDc", 2).write(tmp_path, "python -m ect.scaling", "It took 3 minutes.")
    text = (tmp_path / "report.md").read_text()
    assert "```\npython -m ect.scaling\n```\n\nIt took 3 minutes.\n" in text
    assert re.search(r"\| power law \| 1e\+05 C\^-0\.4 \| \S+ \| \S+ \|", text)
    assert re.search(r"\| 48 \| 64 \| 5\.898e\+11 \|( 1\.9\d+ \|){3}", text)
    assert "| 48 | 4,800 | 2.304e+06 | 9.216e+06 | " in text


def test_the_picture_has_every_point_in_its_field() -> None:
    report = Report(study(), "FDc", 2)
    root = ET.fromstring(report.picture())
    circles = [*root.iter("{http://www.w3.org/2000/svg}circle")]
    assert len(circles) == 48 + 12 + sum(len(found) for _, _, found, _ in report.subjects)
    for circle in circles:
        assert (
            LEFT <= float(circle.attrib["cx"]) <= WIDTH - RIGHT and TOP <= float(circle.attrib["cy"]) <= HEIGHT - BOTTOM
        )
    held = sum(int(verdict.held.sum()) for *_, verdict in report.subjects if verdict.held is not None)
    assert sum(circle.attrib["fill"] == "white" for circle in circles) == held > 2
    names = {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"width 48", "training FLOPs (counted)", "FDc against model FLOPs"} <= names
    assert (
        len([path for path in root.iter("{http://www.w3.org/2000/svg}path") if path.attrib.get("fill") == "#888"]) == 4
    )


def test_a_cell_without_a_figure_is_left_out_by_name() -> None:
    cells = study(1)
    cells[0] = replace(cells[0], figures={"nfe2/FDc": float("nan")})
    said = [block for block in Report(cells, "FDc", 2).blocks() if isinstance(block, str)]
    assert "Left out, without such a figure above 0: width 8, 1 kimg, seed 0." in said
    assert any(text.startswith("Points: all cells; 23 points") for text in said)
    with pytest.raises(
        UserError, match=r"--metric FID --nfe 2: no cell has such a figure above 0; they have: nfe2/FDc"
    ):
        Report(cells, "FID", 2)
    with pytest.raises(UserError, match="of several presets"):
        Report([*cells, replace(cells[1], samples=5)], "FDc", 2)


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "{}", "null", '{"width": 8}', *({name: value} for name, value in [
        ("width", "8"), ("figures", {"nfe2/FDc": "x"}), ("figures", None), ("kimg", float("nan")), ("model_flops", 0),
        ("training_flops", -1.0), ("more", 1), ("seed", True), ("preset", 5),
    ])],
)  # fmt: skip
def test_damaged_cells_are_refused_in_a_sentence(
    line: str | dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cells.jsonl"
    path.write_text(line if isinstance(line, str) else json.dumps(asdict(study()[0]) | line))
    assert scaling.main(["--report", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --report {path}: ") and len(said.splitlines()) == 1 and "give the file" in said
