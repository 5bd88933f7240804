"""A sampler of one's own: one seed is one image whatever the batch, and its row stands in table and report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ect.checkpoint import load_model
from ect.config import DataConfig, EvalConfig
from ect.data import load
from ect.metrics import make_evaluator, quality_rows, quality_table
from ect.sampler import Consistency, generate
from ect.show import report
from tests.extending.loaded import added

MODEL = Path("ect/models/digits.safetensors")


@pytest.fixture(autouse=True)
def own() -> Iterator[Any]:
    with added("sampler") as names:
        yield names


def test_one_seed_is_one_image_and_the_noise_is_its_own(own: Any) -> None:
    """A restart is a step of the consistency sampler to the same level again."""
    net, _ = load_model(MODEL)
    one, three, same = (
        torch.cat(list(generate(net, range(3), sampler, batch=batch))).int()
        for sampler, batch in [(own.Restarts(0.8, 2), 1), (own.Restarts(0.8, 2), 3), (Consistency((80.0, 0.8, 0.8)), 3)]
    )
    assert one.shape == (3, 8, 8, 1) and not torch.equal(one[0], one[1])
    assert (one - three).abs().max() <= 1 and (three - same).abs().max() <= 1


def test_without_noises_it_draws_its_own(own: Any) -> None:
    """Of a denoiser that answers its input, the sum of all noise."""
    latents, sampler = torch.randn(2, 1, 4, 4), own.Restarts(0.5, 2)
    torch.manual_seed(1)
    found = sampler(lambda x, sigma: x, latents)
    torch.manual_seed(1)
    noises = torch.randn(2, *latents.shape)
    torch.testing.assert_close(found, (80 * latents + 0.5 * noises.sum(0)).double(), rtol=1e-6, atol=1e-5)


def test_it_is_rated_and_reported(own: Any, tmp_path: Path) -> None:
    net, _ = load_model(MODEL)
    evaluator = make_evaluator(load(DataConfig()), EvalConfig(samples=16), tmp_path)
    rows = quality_rows(net, evaluator, [own.Restarts(0.8, 2)], samples=16)
    _, cells = quality_table(rows, evaluator.columns)
    assert cells[0][:2] == ["restarts, 2 times", "3"] and float(cells[0][2]) > 0
    report.write(tmp_path, rows, evaluator.columns, {})
    assert "| restarts, 2 times | 3 |" in (tmp_path / "results.md").read_text()
    saved = json.loads((tmp_path / "results.json").read_text())["rows"][0]["sampler"]
    assert saved == {"name": "restarts, 2 times", "nfe": 3, "level": 0.8, "times": 2}
