"""The runs of a study: several at a time, each a process of its own, and what is stopped goes on where it was."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ect.errors import UserError
from ect.files.run_folder import CONFIG
from ect.scaling.grid import Run, images_of
from ect.show.dry_run import command

LOGS = "logs"
"""Folder with what each run prints."""
_LOOK = 0.2  # seconds between two looks at the processes
_LAST = 4096  # bytes of the end of a log


@dataclass
class Runner:
    """Runs what is not finished, `jobs` at a time. say: takes a line of progress.

    A run whose folder has begun is resumed. Raises UserError where a run fails, once the others have stopped.
    """

    runs: Sequence[Run]
    jobs: int
    logs: Path
    say: Callable[[str], None]
    _running: dict[str, tuple[Run, subprocess.Popen[bytes]]] = field(default_factory=dict)

    def __call__(self) -> None:
        waiting = [run for run in self.runs if not run.finished]
        whole, begin = sum(images_of(run.cfg) for run in waiting), time.monotonic()
        if there := len(self.runs) - len(waiting):
            self.say(f"{there} of {len(self.runs)} runs are there already")
        done, count = 0, there
        try:
            while waiting or self._running:
                self._start(waiting)
                run = self._ended()
                done, count = done + images_of(run.cfg), count + 1
                left = (whole - done) / done * (time.monotonic() - begin) / 60
                self.say(f"{count} of {len(self.runs)} runs, {run.name} is done; about {left:.1f} minutes left")
        finally:
            self._stop()

    def _start(self, waiting: list[Run]) -> None:
        """Launch as many runs as there is room for, of those whose teacher is there."""
        for run in [run for run in waiting if run.after is None or run.after.finished]:
            if len(self._running) == self.jobs:
                break
            waiting.remove(run)
            self._running[run.name] = run, self._process(run)

    def _process(self, run: Run) -> subprocess.Popen[bytes]:
        begun = (run.folder / CONFIG).is_file()
        words = ["--resume", str(run.folder)] if begun else shlex.split(command(run.cfg))[3:]
        with self._log(run).open("ab") as log:
            # A session of its own: a terminal's Ctrl-C reaches this process alone, which then asks each run to stop, once.
            return subprocess.Popen(
                [sys.executable, "-m", "ect.train", *words], stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def _log(self, run: Run) -> Path:
        return self.logs / f"{run.name}.txt"

    def _ended(self) -> Run:
        """Wait until a run has ended, and return it. Raises UserError where it has not come to its end."""
        while True:
            for name, (run, process) in self._running.items():
                if process.poll() is not None:
                    del self._running[name]
                    if process.returncode or not run.finished:
                        raise UserError(self._why(run, process.returncode))
                    return run
            time.sleep(_LOOK)

    def _why(self, run: Run, status: int) -> str:
        with self._log(run).open("rb") as log:
            size = log.seek(0, 2)
            log.seek(max(0, size - _LAST))
            lines = log.read().decode("utf-8", "replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "nothing was said")
        return f"{run.folder}: its run ended with status {status}: {said} (all of it is in {self._log(run)})"

    def _stop(self) -> None:
        """Ask the runs to stop, which save where they are, and wait for them; a signal meanwhile ends them at once."""
        processes = [process for _, process in self._running.values()]
        try:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()
        except KeyboardInterrupt:
            for process in processes:
                with contextlib.suppress(OSError):
                    process.kill()
            raise
