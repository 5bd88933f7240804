"""What is only told of a run never ends it: rows, events and grids that cannot be written."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ect.errors import UserError
from ect.show import log
from ect.show.log import RunLog
from tests.tiny import config, run

FULL = OSError(errno.ENOSPC, "No space left on device")


class Board:
    """A SummaryWriter of which one method fails."""

    def __init__(self, fails: str) -> None:
        self.fails, self.calls = fails, list[str]()

    def __getattr__(self, name: str) -> Any:
        def method(*args: Any, **kwargs: Any) -> None:
            self.calls.append(name)
            if name == self.fails:
                raise FULL

        return method


class File:
    """A file that has room for so many bytes, then for more again."""

    def __init__(self, real: Any, room: int) -> None:
        self.real, self.room = real, room

    def write(self, data: bytes) -> int:
        self.real.write(data[: self.room])
        return min(self.room, len(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def log_two(folder: Path) -> None:
    with RunLog(folder, 1000, quiet=True) as run:
        for nimg in (1, 2):
            run.row(nimg, {"loss": 0.5})
            assert run.grid("grid", torch.zeros(1, 8, 8, 1, dtype=torch.uint8)) is not None


def nimgs(folder: Path) -> list[int]:
    return [json.loads(line)["nimg"] for line in (folder / "stats.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings("error")
def test_a_row_that_finds_no_room_is_left_out_whole_and_said_once(tmp_path: Path) -> None:
    with RunLog(tmp_path, 1000, quiet=True) as run:
        run.row(1, {"loss": 0.5})
        whole, run._stats = run._stats, File(run._stats, 5)  # type: ignore[assignment]
        with pytest.warns(UserWarning, match=r"stats\.jsonl cannot be written, the run goes on .*No space"):
            run.row(2, {"loss": 0.5})
        run.row(3, {"loss": 0.5})  # a second warning would be an error
        run._stats = whole
        run.row(4, {"loss": 0.5})
    assert nimgs(tmp_path) == [1, 4]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_disk_that_is_full_from_the_start(tmp_path: Path) -> None:
    (tmp_path / "stats.jsonl").symlink_to("/dev/full")
    with RunLog(tmp_path, 1000, quiet=True) as run, pytest.warns(UserWarning, match="No space left"):
        run.row(1, {"loss": 0.5})


@pytest.mark.parametrize("fails", ["add_scalar", "flush", "add_image", "close"])
def test_tensorboard_that_fails_is_left_alone(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(fails)
    monkeypatch.setattr(log, "_summary_writer", lambda *args: board)
    with pytest.warns(UserWarning, match="TensorBoard cannot be written") as said:
        log_two(tmp_path)
    assert len(said) == 1 and board.calls[-1] == fails and board.calls.count(fails) == 1
    assert nimgs(tmp_path) == [1, 2] and len(list(tmp_path.glob("*.png"))) == 2


def test_tensorboard_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise FULL

    monkeypatch.setattr(log, "_summary_writer", broken)
    with pytest.warns(UserWarning, match="TensorBoard cannot"), RunLog(tmp_path, 1000, quiet=True) as run:
        run.row(1, {})
    assert nimgs(tmp_path) == [1]


@pytest.mark.slow
def test_a_whole_run_outlives_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def full(path: Path, durable: bool = True) -> Iterator[Path]:
        raise UserError(f"{path}: cannot write it ({FULL.strerror})")
        yield path

    def append(*args: Any) -> None:
        raise FULL

    monkeypatch.setattr("ect.show.grid.atomic", full)
    monkeypatch.setattr(log, "_append", append)
    monkeypatch.setattr(log, "_summary_writer", lambda *args: Board("flush"))
    monkeypatch.setattr("ect.job.save_png", lambda *args: None)  # samples.png is a result, not telemetry
    with pytest.warns(UserWarning, match="cannot be written, the run goes on") as said:
        folder = run(config(), tmp_path / "run").run_dir
    assert sorted(str(warning.message).split(": ")[1].split(" cannot")[0] for warning in said) == [
        "TensorBoard",
        "grids",
        "history.jsonl",
        "stats.jsonl",
    ]
    assert (folder / "latest").read_text().strip() == "checkpoint-000000.080" and not list(folder.glob("nfe*"))
    assert os.path.getsize(folder / "stats.jsonl") == 0 and (folder / "results.md").is_file()
