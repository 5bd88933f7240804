"""A metric of one's own stands beside the others, in the table of a run and in that of a rating."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ect.checkpoint import load_model
from ect.config import DataConfig, EvalConfig
from ect.data import load
from ect.metrics import make_evaluator, quality_rows, quality_table
from ect.sampler import Consistency
from tests.extending.loaded import added
from tests.tiny import config, run


@pytest.fixture(autouse=True)
def own() -> Iterator[Any]:
    with added("metric") as names:
        yield names


@pytest.mark.slow
def test_the_data_itself_has_contrast_1() -> None:
    data = load(DataConfig())
    evaluator = make_evaluator(data, EvalConfig(samples=8), Path())
    assert [column.name for column in evaluator.columns] == ["FDc", "FDp", "imbalance", "contrast"]
    assert evaluator.evaluate(data.images.split(500))["contrast"] == pytest.approx(1)
    assert evaluator.evaluate((data.images // 2).split(500))["contrast"] == pytest.approx(0.5, abs=0.02)
    assert evaluator.used["contrast"] == {"images": len(data.images)}


def test_it_is_a_column_of_the_table() -> None:
    net, _ = load_model(Path("ect/models/digits.safetensors"))
    evaluator = make_evaluator(load(DataConfig()), EvalConfig(samples=32), Path())
    headers, cells = quality_table(quality_rows(net, evaluator, [Consistency((80.0,))], samples=32), evaluator.columns)
    assert headers[-1] == "contrast" and 0.5 < float(cells[0][-1]) < 1.5


@pytest.mark.slow
def test_a_run_reports_it(tmp_path: Path) -> None:
    job = run(config(eval=EvalConfig(samples=8)), tmp_path / "run")
    assert "| contrast |" in (job.run_dir / "results.md").read_text()
