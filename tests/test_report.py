"""The picture and the table at the end of a job."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ect.metrics import Column, QualityRow
from ect.ranks import device
from ect.sampler import Consistency, Heun
from ect.show import report

COLUMNS = (Column("FDc"), Column("FID", missing="no weights"))
ROWS = [
    QualityRow(Consistency((80.0,)), 100, (0,), ({"FDc": 123.456},), 2.0),
    QualityRow(Heun(2), 100, (0,), ({"FDc": 0.5},), 4.0),
]


def test_table_and_files(tmp_path: Path) -> None:
    report.write(tmp_path, ROWS, COLUMNS, {"tuning": 61.4})
    text = (tmp_path / "results.md").read_text()
    assert text.splitlines() == [
        "| sampler | NFE | FDc | FID | images/s |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| consistency, 1 step | 1 | 123.5 | - | 50 |",
        "| diffusion, 2 Heun steps | 3 | 0.5 | - | 25 |",
        "",
        "Wall clock: tuning 61 s.",
    ]
    assert json.loads((tmp_path / "results.json").read_text())["rows"][1]["values"] == [{"FDc": 0.5}]
    report.write(tmp_path, [], COLUMNS, {"tuning": 1.0})
    assert (tmp_path / "results.md").read_text() == "Wall clock: tuning 1 s.\n"


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    report.show(Console(width=100), ROWS, COLUMNS, {"all": 3.0})
    out = capsys.readouterr().out
    assert "consistency, 1 step" in out and "123.5" in out and "Wall clock: all 3 s" in out


@pytest.mark.parametrize("channels", [1, 3])
def test_strips(channels: int) -> None:
    images = torch.randint(0, 256, [3, 4, 4, channels], dtype=torch.uint8)
    picture = report.strips({"a title": images, "another": 255 - images}, scale=2)
    height, width = picture.shape[0] // 2, picture.shape[1]
    assert picture.dtype == torch.uint8 and picture.shape == (2 * height, width, 3)
    assert (picture[:24] < 128).any()  # the title is written
    first = picture[24:height]
    assert torch.equal(first[2:10:2, 2:10:2], images[0].expand(-1, -1, 3))


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        device.set_threads(2)
        assert torch.get_num_threads() == 2
        monkeypatch.setattr(device, "cpu_count", lambda: 3)
        device.set_threads(None)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    monkeypatch.undo()
    assert device.cpu_count() >= 1
    assert device.resolve("cpu") == torch.device("cpu") and device.resolve("auto").type in ("cpu", "cuda", "mps")


def test_a_containers_quota_limits_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(device, "CPU_QUOTA", quota)
    for text, most in [("max 100000", 10**6), ("100000 100000", 1), ("50000 100000", 1)]:
        quota.write_text(text)
        assert 1 <= device.cpu_count() <= most


@pytest.mark.slow
def test_the_claims_of_the_readme_hold_for_the_recorded_seeds() -> None:
    command = [sys.executable, "benchmarks/digits_quality.py", "--report", "--check"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("holds (3 of 3 seeds)") == 4
