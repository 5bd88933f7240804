"""The log of a run: rows, console, TensorBoard, grids, and what a resume does to them."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from ect.show import log
from ect.show.log import RunLog, peak_memory


def screen(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=160)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def rows(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]


class Clock:
    """time.monotonic under our control."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(log.time, "monotonic", lambda: self.now)


def test_rows_are_on_disk_at_once_and_plain_json(tmp_path: Path) -> None:
    with RunLog(tmp_path, 1000, quiet=True) as run:
        run.row(128, {"loss": torch.tensor(0.5), "lr": 1e-4, "stage": 2, "phase": "tuning", "fid": None})
        run.row(256, {"loss": float("nan"), "scale": float("inf")})
        raw = (tmp_path / "stats.jsonl").read_text()  # before close
    assert len(raw.splitlines()) == 2 and "NaN" not in raw and "Infinity" not in raw
    assert rows(tmp_path) == [
        {"nimg": 128, "loss": 0.5, "lr": 1e-4, "stage": 2, "phase": "tuning", "fid": None},
        {"nimg": 256, "loss": None, "scale": None},
    ]


def test_a_resume_drops_the_rows_beyond_it_and_torn_ones(tmp_path: Path) -> None:
    with RunLog(tmp_path, 1000, quiet=True) as run:
        for nimg in (100, 200, 300):
            run.row(nimg, {"loss": nimg / 7})
    stats = tmp_path / "stats.jsonl"
    uninterrupted = stats.read_bytes()
    with stats.open("a") as file:
        file.write('{"nimg": 350, "loss": 3}\n{"los\nnull\n{"nimg": 100, "torn": 1}')
    with RunLog(tmp_path, 1000, quiet=True, resume_nimg=200) as run:
        assert [row["nimg"] for row in rows(tmp_path)] == [100, 200]
        run.row(300, {"loss": 300 / 7})
    assert stats.read_bytes() == uninterrupted


def test_without_a_resume_rows_are_only_appended(tmp_path: Path) -> None:
    for nimg in (100, 50):
        with RunLog(tmp_path, 1000, quiet=True) as run:
            run.row(nimg, {})
    assert [row["nimg"] for row in rows(tmp_path)] == [100, 50]


def test_a_kill_while_dropping_rows_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunLog(tmp_path, 1000, quiet=True) as run:
        run.row(100, {})
        run.row(200, {})

    def stopping(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", stopping)
    with pytest.raises(KeyboardInterrupt):
        RunLog(tmp_path, 1000, quiet=True, resume_nimg=100)
    assert [row["nimg"] for row in rows(tmp_path)] == [100, 200]


def test_tensorboard_holds_the_rows_and_grids_of_one_uninterrupted_run(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with RunLog(tmp_path, 1000, quiet=True) as run:
        for nimg in (100, 200, 300):
            run.row(nimg, {"loss": nimg / 4, "phase": "tuning"})
        run.grid("samples", torch.zeros(4, 8, 8, 1, dtype=torch.uint8))
    with RunLog(tmp_path, 1000, quiet=True, resume_nimg=200) as run:
        run.row(300, {"loss": 0.25})
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(100, 25.0), (200, 50.0), (300, 0.25)]
    assert events.Images("samples") == []  # drawn beyond the resume

    with RunLog(tmp_path / "..", 1000, quiet=True, resume_nimg=200) as run:
        run.grid("samples", torch.zeros(4, 8, 8, 3, dtype=torch.uint8))
    events = accumulator.EventAccumulator(str(tmp_path.parent))
    events.Reload()
    (image,) = events.Images("samples")
    assert (image.step, image.width, image.height) == (200, 886, 886)


@pytest.mark.parametrize("back", [0, 1, 3600, 40_000_000])
def test_tensorboard_reads_a_resume_last_whatever_the_clock_says(
    back: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a resume in a second in which there is a file already, of a writer whose number has one digit more."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
    monkeypatch.setattr(writer, "_global_uid", writer.AtomicCounter(8))
    begin = int(time.time())
    for number, resume in enumerate((None, 100, 300)):
        monkeypatch.setattr(time, "time", lambda now=begin - number * back: now)
        with RunLog(tmp_path, 1000, quiet=True, resume_nimg=resume) as run:
            for nimg in range((resume or 0) + 100, 501, 100):
                run.row(nimg, {"loss": number})
    assert len(list(tmp_path.glob("events.*"))) == 3
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(100, 0), (200, 1), (300, 1), (400, 2), (500, 2)]


def test_a_run_without_tensorboard_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # makes its import fail
    with RunLog(tmp_path, 1000, quiet=True) as run:
        run.row(1, {"loss": 1.0})
        run.grid("samples", torch.zeros(1, 8, 8, 1, dtype=torch.uint8))
    names = ["history.jsonl", "samples-000000.001.png", "stats.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_grid_is_named_by_the_images_seen(tmp_path: Path) -> None:
    images = torch.arange(2 * 2 * 2 * 1, dtype=torch.uint8).view(2, 2, 2, 1)
    with RunLog(tmp_path, 1000, quiet=True, resume_nimg=64) as run:
        assert run.grid("first", images) == tmp_path / "first-000000.064.png"
        run.step(128_256)
        path = run.grid("samples", images)
    assert path == tmp_path / "samples-000128.256.png"
    with Image.open(path) as picture:
        pixels = np.array(picture)
    assert pixels[2, 2] == 0 and pixels[-3, -3] == 7 and pixels[0, 0] == 255


def test_plain_lines_at_intervals_where_there_is_no_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, console = Clock(monkeypatch), screen()
    monkeypatch.setattr(log, "peak_memory", lambda device: 512 * 2**20)
    with RunLog(tmp_path, 100_000, console=console) as run:
        run.phase("tuning")
        for second in range(25):
            clock.now = 100.0 + second
            run.step(second * 1000, loss=0.123456, stage=3, lr=1e-4)
    assert text(console).splitlines() == [
        "tuning",
        "tuning 10.0/100.0 kimg  1,000 img/s  ETA 0:01:30  loss 0.1235  stage 3  lr 0.0001  512 MiB",
        "tuning 20.0/100.0 kimg  1,000 img/s  ETA 0:01:20  loss 0.1235  stage 3  lr 0.0001  512 MiB",
    ]


def test_the_rate_is_of_the_last_seconds_and_of_this_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, console = Clock(monkeypatch), screen()
    with RunLog(tmp_path, 10**9, console=console) as run:
        nimg = 0
        for rate in (5, 7):
            run.phase("tuning")
            for _ in range(60):
                clock.now += 1
                nimg += rate
                run.step(nimg)
        for _ in range(60):
            clock.now += 1
            nimg += 9
            run.step(nimg)
        clock.now += 1000
        run.step(nimg + 9000)
    rates = [line.split("  ")[1] for line in text(console).splitlines() if "img/s" in line]
    assert rates[:6] == ["5 img/s"] * 6 and rates[6:12] == ["7 img/s"] * 6 and rates[-2] == "9 img/s"
    assert rates[-1] == "9 img/s"  # a long pause between two steps


def test_a_first_step_has_no_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, console = Clock(monkeypatch), screen()
    with RunLog(tmp_path, 1000, console=console, resume_nimg=500) as run:
        clock.now += 100
        run.step(500, loss=1.0)
    assert text(console).startswith("starting 0.5/1.0 kimg  loss 1  ")


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    console = screen(terminal=True)
    with RunLog(tmp_path, 1000, console=console) as run:
        run.phase("pretraining")
        run.step(250, loss=0.5)
        run.note("a line above the bar, [not markup]")
        run.step(500, loss=0.25)
    shown = text(console)
    assert "pretraining" in shown and "50%" in shown and "loss 0.25" in shown and "[not markup]" in shown
    run.close()  # a second time is fine
    assert run.console.is_terminal


def test_quiet_says_nothing_and_writes_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, 1000, quiet=True) as run:
        run.phase("tuning")
        run.step(1, loss=1.0)
        run.note("x")
        run.row(1, {})
    assert capsys.readouterr() == ("", "")
    assert rows(tmp_path) == [{"nimg": 1}]


def test_an_error_closes_the_log(tmp_path: Path) -> None:
    console = screen(terminal=True)
    with pytest.raises(KeyboardInterrupt), RunLog(tmp_path, 1000, console=console) as run:
        raise KeyboardInterrupt
    assert (
        json.loads((tmp_path / "history.jsonl").read_text().splitlines()[-1])["event"] == "stop"
    )  # by a signal, at once
    with pytest.raises(ValueError, match="closed file"):
        run.row(1, {})


@pytest.mark.skipif(sys.platform == "win32", reason="nobody counts it there")
def test_memory_counts_what_this_process_holds() -> None:
    before = peak_memory()
    held = torch.ones(40 * 2**20)  # 160 MiB, touched
    after = peak_memory("cpu")
    assert before is not None and after is not None and held[0] == 1
    assert 40 * 2**20 < after < 2**40 and after >= before


def test_memory_on_a_gpu_and_where_it_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 77 if device.index == 1 else 0)
    assert peak_memory("cuda:1") == 77
    monkeypatch.setattr(sys, "platform", "win32")
    assert peak_memory() is None
