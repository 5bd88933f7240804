"""The log of a run: a progress bar or plain lines, stats.jsonl, history.jsonl, TensorBoard events and image grids."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Column
from rich.text import Text
from torch import Tensor

from ect.errors import Diverged, UserError
from ect.files.atomic import atomic, itself
from ect.ranks.distributed import Severed
from ect.show.grid import make_grid, save_png

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

STATS = "stats.jsonl"
HISTORY = "history.jsonl"
"""Name of the file that says when a phase began, went on and ended, and how: one JSON object a line."""
_EVENTS = "events.out.tfevents."
_LINE_SECONDS = 10.0  # between two plain lines, where there is no terminal for a bar
_RATE_SECONDS = 30.0  # window of the rate


class Screen(Console):
    """A console that falls silent where nobody reads it any more (`| head`), or its file has no room, and ends no run."""

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print as rich does, or say once on stderr that it cannot."""
        try:
            super().print(*args, **kwargs)
        except OSError as error:
            warnings.warn(f"the output cannot be written, the run goes on without ({error.strerror})", stacklevel=2)
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Do what rich does, which sends the output to nowhere, but do not exit."""
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()


class RunLog:
    """The log of one run, a context manager.

    Args: run_dir: existing folder. total_nimg: images of the whole run, all phases together. quiet: nothing on the
    console; files are written all the same. resume_nimg: rows and events beyond it are dropped, so that the files of a
    resumed run read as those of an uninterrupted one. device: whose memory is shown. console: for tests. writes: False for
    ranks other than 0: neither files nor console.
    """

    def __init__(
        self,
        run_dir: Path,
        total_nimg: int,
        quiet: bool = False,
        resume_nimg: int | None = None,
        device: torch.device | str = "cpu",
        console: Console | None = None,
        writes: bool = True,
    ) -> None:
        quiet = quiet or not writes
        self.run_dir, self.total_nimg, self.nimg = Path(run_dir), total_nimg, resume_nimg or 0
        self.device = torch.device(device)
        self.console = console if console is not None and writes else Screen(quiet=quiet)
        if not self.console.is_terminal:
            self.console.width = max(self.console.width, 120)  # a file or a pipe has no width to wrap at
        self._quiet = quiet
        self._phase = "starting"
        self._seen: deque[tuple[float, int]] = deque()  # (seconds, nimg) of the last steps
        self._next_line = 0.0
        self._stats: IO[bytes] | None = None
        self._failed: set[str] = set()  # what has been said to fail
        self._board: SummaryWriter | None = None
        self._writes, self._excepthook = writes, threading.excepthook
        if writes:
            threading.excepthook = self._thread_failed
            stats = self.run_dir / STATS
            begun: dict[str, Any] = {"event": "start"}
            with self.surviving(STATS):
                if resume_nimg is not None and stats.is_file():
                    begun = {"event": "resume", "reached": max(_drop_rows_after(stats, resume_nimg), resume_nimg)}
                self._stats = open(stats, "ab", buffering=0, opener=itself)  # noqa: SIM115  `close` closes it
            self.event(**begun)
            with self.surviving("TensorBoard"):
                self._board = _summary_writer(self.run_dir, resume_nimg)
        self._bar: Progress | None = None
        if self.console.is_terminal and not quiet:
            self._start_bar()

    def phase(self, name: str) -> None:
        """Say what the run does from here on: "pretraining", "tuning", "evaluating". The rate is measured anew."""
        self._phase = name
        self._seen.clear()
        self._next_line = time.monotonic() + _LINE_SECONDS
        if self._bar is not None:
            self._bar.update(self._task, description=name, text="")
        self.note(name)

    def step(self, nimg: int, **stats: Any) -> None:
        """Show progress: `nimg` images seen, and stats such as loss, stage and lr. Cheap: call it often."""
        now = time.monotonic()
        self.nimg = nimg
        self._seen.append((now, nimg))
        while self._seen[0][0] < now - _RATE_SECONDS and len(self._seen) > 2:
            self._seen.popleft()
        if self._bar is not None:
            self._bar.update(self._task, completed=nimg, text=self._line(stats))
        elif not self._quiet and now >= self._next_line:
            self._next_line = now + _LINE_SECONDS
            self.note(f"{self._phase} {nimg / 1000:.1f}/{self.total_nimg / 1000:.1f} kimg  {self._line(stats)}")

    def row(self, nimg: int, stats: dict[str, Any]) -> None:
        """Append {"nimg": nimg, **stats} to stats.jsonl, and the numbers to TensorBoard at step nimg.

        Values are text, None or numbers (0-d tensors too); what is not finite becomes null: JSON has no name for it.
        """
        self.nimg = nimg
        if not self._writes:
            return
        plain = {name: _plain(value) for name, value in stats.items()}
        with self.surviving(STATS):
            if self._stats is not None:
                _append(self._stats, (json.dumps({"nimg": nimg, **plain}) + "\n").encode())
        with self.surviving("TensorBoard"):
            if self._board is not None:
                for name, value in plain.items():
                    if isinstance(value, (int, float)):
                        self._board.add_scalar(name, value, nimg)
                self._board.flush()

    def event(self, event: str, **facts: Any) -> None:
        """Append {"time": in UTC, "event": event, "nimg": images seen, **facts} to history.jsonl; facts are JSON-able.

        The events are "start"; "resume", with the images that the log had `reached` before; "target", an evaluation that
        came to it (ect.metrics.Crossing); and how it ended: "end", "stop" (by a signal), "diverged", "failed" and "lost" (a
        process of several), these three with a `text`. A run that is killed writes none of the last five.
        """
        if self._writes:
            self._happened(event, facts)

    def ended(self, event: str, text: str) -> None:
        """Write how another process ended the run: "failed", "stop" or "lost". Where rank 0 is lost, another one writes that.

        It may come from a thread of its own, and after `close`.
        """
        if self._writes or (event == "lost" and (self.run_dir / HISTORY).is_file()):
            self._happened(event, {"text": text})

    def _happened(self, event: str, facts: dict[str, Any]) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        line = json.dumps({"time": now, "event": event, "nimg": self.nimg, **facts}) + "\n"
        with self.surviving(HISTORY), open(self.run_dir / HISTORY, "a+b", buffering=0, opener=itself) as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
            _append(file, b"\n" * (file.read(1) not in (b"", b"\n")) + line.encode())  # after one that a kill tore

    def ends_here(self) -> None:
        """Let the images seen be all of the run, which has come to its end sooner than planned."""
        self.total_nimg = self.nimg
        if self._bar is not None:
            self._bar.update(self._task, total=self.nimg)

    def grid(self, name: str, images: Tensor) -> Path | None:
        """Write uint8 images [N, H, W, C] as <name>-<kimg>.png, also to TensorBoard; returns the path if it wrote it."""
        if not self._writes:
            return None
        path, written = self.run_dir / f"{name}-{self.nimg / 1000:010.3f}.png", None
        image = make_grid(images)
        with self.surviving("grids"):
            save_png(image, path)
            written = path
        with self.surviving("TensorBoard"):
            if self._board is not None:
                self._board.add_image(name, image, self.nimg, dataformats="HWC")
        return written

    @contextlib.contextmanager
    def surviving(self, what: str) -> Iterator[None]:
        """Report once, as a warning, a failure to write inside the block: what is only told of a run never ends it."""
        try:
            yield
        except (OSError, UserError) as error:
            if what == "TensorBoard":
                self._board = None  # its thread has ended, and with it the file
            if what not in self._failed:
                self._failed.add(what)
                warnings.warn(
                    f"{self.run_dir}: {what} cannot be written, the run goes on without ({error})", stacklevel=4
                )

    def told(self) -> set[str]:
        """Return the names of the grids, and of the statistics in stats.jsonl, that there are of the present nimg."""
        end, stats = f"-{self.nimg / 1000:010.3f}.png", self.run_dir / STATS
        names = {path.name.removesuffix(end) for path in self.run_dir.glob(f"*{end}")}
        with self.surviving(STATS):
            for line in stats.read_bytes().splitlines() if stats.is_file() else ():
                with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                    row = json.loads(line)
                    names |= row.keys() if row["nimg"] == self.nimg else set()
        return names

    def _thread_failed(self, args: threading.ExceptHookArgs) -> None:
        """Say nothing of TensorBoard's thread, whose error meets the next write and is said there."""
        if not type(args.thread).__module__.startswith("tensorboard."):
            self._excepthook(args)

    def note(self, text: str) -> None:
        """Print one line on the console, above the bar."""
        with self.surviving("the console"):
            self.console.print(Text(text))

    def close(self) -> None:
        """Stop the bar and close the files; a second call does nothing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._stats is not None:
            self._stats.close()
        board, self._board = self._board, None
        if board is not None:
            with self.surviving("TensorBoard"):
                board.close()
        if threading.excepthook == self._thread_failed:
            threading.excepthook = self._excepthook

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.event("end" if self.nimg >= self.total_nimg else "stop")
        elif isinstance(error, KeyboardInterrupt):
            self.event("stop")
        elif not isinstance(error, Severed):  # of which `ended` hears why
            what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            self.event("diverged" if isinstance(error, Diverged) else "failed", text=what)
        self.close()

    def _start_bar(self) -> None:
        rest = Column(no_wrap=True, ratio=1)  # the one that gives way on a narrow terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}", markup=False, table_column=rest),
            console=self.console,
            expand=True,
            refresh_per_second=2,  # the drawing thread shares the CPU with the training
        )
        self._task = self._bar.add_task(self._phase, total=self.total_nimg, completed=self.nimg, text="")
        self._bar.start()

    def _line(self, stats: dict[str, Any]) -> str:
        (start, first), (now, last) = self._seen[0], self._seen[-1]
        parts = []
        if last > first and now > start:
            rate = (last - first) / (now - start)
            left = timedelta(seconds=round(max(self.total_nimg - last, 0) / rate))
            parts += [f"{rate:,.0f} img/s", f"ETA {left}"]
        parts += [f"{name} {_show(value)}" for name, value in stats.items()]
        memory = peak_memory(self.device)
        if memory is not None:
            parts.append(f"{memory / 2**20:,.0f} MiB")
        return "  ".join(parts)


def peak_memory(device: torch.device | str = "cpu") -> int | None:
    """Return the most bytes held so far: of the GPU by tensors, else of main memory by this process. None where unknown."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _summary_writer(run_dir: Path, resume_nimg: int | None) -> SummaryWriter | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    _make_older(sorted(run_dir.glob(f"{_EVENTS}*")))
    return SummaryWriter(str(run_dir), purge_step=None if resume_nimg is None else resume_nimg + 1)


def _make_older(files: list[Path]) -> None:
    """Move TensorBoard's files to older names, in their order, where one is to come whose name will not sort behind them.

    A name begins with the time at which the file was begun, and TensorBoard reads them in the order of their names. A clock
    that was set back, or a resume in the same second, would put the rows of the resume before those that they replace.
    """
    now = int(time.time())
    begun = [stamp for path in files if (stamp := path.name.removeprefix(_EVENTS).partition(".")[0]).isdecimal()]
    if len(begun) == len(files) and any(int(stamp) >= now for stamp in begun):
        for seconds, (path, stamp) in enumerate(zip(files[::-1], begun[::-1], strict=True), start=1):
            path.rename(path.with_name(path.name.replace(stamp, f"{now - seconds:010d}", 1)))


def _append(file: IO[bytes], line: bytes) -> None:
    """Append a line to an unbuffered file, or raise OSError and leave no part of it there."""
    size = file.seek(0, os.SEEK_END)
    try:
        if file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(size)
        raise


def _drop_rows_after(path: Path, nimg: int) -> int:
    """Keep, as they are, the rows of stats.jsonl up to `nimg`; a row that is torn or damaged goes too.

    Returns the nimg of the last row that there was.
    """
    lines, kept, reached = path.read_bytes().splitlines(keepends=True), [], 0
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            found = json.loads(line)["nimg"]
            reached = max(reached, found)
            if line.endswith(b"\n") and found <= nimg:
                kept.append(line)
    if kept != lines:
        with atomic(path) as temp:
            temp.write_bytes(b"".join(kept))
    return reached


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool, int)):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _show(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
