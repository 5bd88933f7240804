"""What is only told of a run never ends it: rows, events and grids that cannot be written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from ect.show import log
from ect.show.log import RunLog

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


@pytest.mark.filterwarnings("error")
def test_tensorboards_own_thread_fails_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise FULL

    before = threading.excepthook
    with RunLog(tmp_path, 1000, quiet=True) as run:
        monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
        with pytest.warns(UserWarning, match="TensorBoard cannot be written"):
            run.row(1, {"loss": 0.5})
        run.row(2, {"loss": 0.5})
        other = threading.Thread(target=full)  # whose traceback is not ours to hide
        with monkeypatch.context() as patch:
            patch.setattr(run, "_excepthook", lambda args: print("said", args.exc_value, file=sys.stderr))
            other.start()
            other.join()
    assert capsys.readouterr().err == f"said {FULL}\n" and threading.excepthook == before
    assert nimgs(tmp_path) == [1, 2]


@pytest.mark.parametrize("what", ["directory", "rewriting"])
def test_rows_that_cannot_be_written_at_all_end_no_run(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = tmp_path / "stats.jsonl"
    if what == "directory":
        stats.mkdir()
    else:
        stats.write_text('{"nimg": 5}\n')
        monkeypatch.setattr(os, "replace", raising)
    with pytest.warns(UserWarning, match=r"stats\.jsonl cannot be written"):
        run = RunLog(tmp_path, 1000, quiet=True, resume_nimg=4)
    with run:
        run.row(6, {"loss": 0.5})
        monkeypatch.undo()
        assert run.grid("grid", torch.zeros(1, 8, 8, 1, dtype=torch.uint8)) is not None
    assert what == "directory" or stats.read_text() == '{"nimg": 5}\n'


def raising(*args: Any) -> None:
    raise FULL


def test_damaged_rows_go_and_what_needs_no_change_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = tmp_path / "stats.jsonl"
    good = b'{"nimg": 1}\n{"nimg": 2}\n'
    stats.write_bytes(b"\xff\xfe\n" + good + b"[" * 100_000 + b'\n3\n{"nimg": 3}\n{"nimg": 4')
    with RunLog(tmp_path, 1000, quiet=True, resume_nimg=2):
        assert stats.read_bytes() == good
    monkeypatch.setattr(os, "replace", raising)
    with RunLog(tmp_path, 1000, quiet=True, resume_nimg=2) as run:
        run.row(3, {})
    assert nimgs(tmp_path) == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_an_output_without_room_ends_no_run(tmp_path: Path) -> None:
    script = "from ect.show.log import Screen; s = Screen(); [s.print('x') for _ in range(3)]"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", script], env=environment, stdout=full, stderr=-1, text=True)
    assert done.returncode == 0 and done.stderr.count("the output cannot be written, the run goes on without") == 1


@pytest.mark.filterwarnings("error")
def test_a_history_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").mkdir()
    with pytest.warns(UserWarning, match=r"history\.jsonl cannot be written"):
        run = RunLog(tmp_path, 1000, quiet=True)
    with run:
        run.row(1, {"loss": 0.5})
    assert nimgs(tmp_path) == [1]
