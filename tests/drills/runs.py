"""Small runs as processes of their own, that can be killed, stopped and let fail at any of their writes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("preload.c")
NET = "--net.model-channels 8 --net.channel-mult 1 --net.num-blocks 1 --net.attn-resolutions --net.dropout .1"
TINY = (
    f"--device cpu --threads 1 --batch 8 --total-kimg .08 {NET} --objective.n-stages 4 --objective.stage-kimg .024 "
    "--log.stats-kimg .016 --log.sample-kimg .032 --log.checkpoint-kimg .032 --log.weights-kimg .024 --optim.emas .9999 .999"
).split()
"""Ten steps, four stages, two averages, four checkpoints of which three are kept, and raw weights of three steps."""
PLAIN = [*TINY, "--pretrain", "None", "--eval.samples", "0"]
WHOLE = [*TINY, "--pretrain", "digits-diffusion", "--pretrain-kimg", ".032"]
WHOLE += ["--eval.samples", "2", "--eval.batch", "2", "--log.eval-kimg", ".048"]
"""Both phases, with evaluation on the way and at the end."""
RESUME = ["--resume", "run"]
ROOM, REMOVE, FLUSH = 1, 2, 4
PATIENCE = 300.0  # seconds that a run may take, on a machine that others use


class Skipped(Exception):
    """A drill that cannot be done here; its argument says why."""


@dataclass(frozen=True)
class Fault:
    """What preload.c does to a run, or only notes where `at` is 0.

    at: the number, from 1, of the change of a file that meets it. signal: sent then. error: with which it fails, and with it,
    if lasting, all that follow. classes: the changes that count.
    """

    at: int = 0
    signal: int = 0
    error: int = 0
    lasting: bool = False
    classes: int = ROOM | REMOVE | FLUSH


@dataclass(frozen=True)
class End:
    """How a run ended: its exit status, negative for a signal, what it printed, and the changes of files that it made.

    changes: (name of the call, path below the run's folder, whether it met the fault).
    """

    status: int
    out: str
    err: str
    seconds: float
    changes: list[tuple[str, str, bool]]

    @property
    def hit(self) -> str | None:
        """The file that the fault met first, None where it met none."""
        return next((path for _, path, hit in self.changes if hit), None)

    def quiet(self) -> None:
        """Hold that nothing looks like an accident of the program."""
        assert "Traceback" not in self.err + self.out, self.err[-3000:]

    def done(self) -> None:
        self.quiet()
        assert self.status == 0, (self.status, self.err[-3000:])

    def refused(self) -> str:
        """Hold that it was refused in one sentence, and return that."""
        self.quiet()
        said = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert self.status == 2 and len(said) == 1, (self.status, self.err[-3000:])
        return said[0]


@dataclass
class Run:
    """A process that trains."""

    process: Any
    place: Place
    begun: float = field(default_factory=time.monotonic)

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def send(self, number: int) -> None:
        """Send a signal, if the run has not ended."""
        if self.status() is None:
            os.kill(self.pid, number)

    def status(self) -> int | None:
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll()
        with self.place.ground.lock:  # multiprocessing asks after all its children whenever it starts one
            return self.process.exitcode  # type: ignore[no-any-return]

    def end(self) -> End:
        """Wait until it ends; one that does not is killed, and that is a failure."""
        deadline = self.begun + PATIENCE
        while self.status() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        hangs = self.status() is None
        if hangs:
            os.kill(self.pid, signal.SIGKILL)
        while hangs and self.status() is None:
            time.sleep(0.01)
        place, status = self.place, self.status()
        assert not hangs and status is not None, f"it hangs: {place.text('err')[-2000:]}"
        return End(status, place.text("out"), place.text("err"), time.monotonic() - self.begun, place.changes())


@dataclass
class Place:
    """An empty folder in which runs are started, by the name `run`."""

    folder: Path
    ground: Ground

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def options(self) -> list[str]:
        """What goes on here: a resume where there is a configuration, else the start once more."""
        return (
            RESUME if (self.run / "config.json").exists() else [*self.ground.started[self.folder], "--run-dir", "run"]
        )

    def text(self, name: str) -> str:
        path = self.folder / name
        return path.read_text(errors="replace") if path.is_file() else ""

    def changes(self) -> list[tuple[str, str, bool]]:
        lines = (line.split(" ", 2) for line in self.text("log").splitlines())
        return [(call, os.path.relpath(path, self.run), mark == "!") for mark, call, path in lines]

    def start(
        self, options: list[str] | None = None, fault: Fault | None = None, real: bool = False, out: str = "out", **orders: Any
    ) -> Run:  # fmt: skip
        """Start a run with these options, or go on (`options`). real: as a new process of Python, else forked."""
        if options is not None and options != RESUME and "--resume" not in options:
            self.ground.started[self.folder] = options
            options = options if "--run-dir" in options else [*options, "--run-dir", "run"]
        for name in ("out", "err", "log"):
            (self.folder / name).unlink(missing_ok=True)
        given = options if options is not None else self.options
        drill = ""
        if fault is not None:
            values = fault.classes, fault.at, fault.signal, fault.error, int(fault.lasting)
            drill = "|".join(map(str, (self.run, *values, self.folder / "log")))
        if not real:
            return Run(self.ground.forked(given, self.folder, out, "err", drill, **orders), self)
        command, env = [sys.executable, "-m", "ect.train", *given], self.ground.environment | {"DRILL": drill}
        if not drill:
            del env["DRILL"]
        with open(self.folder / out, "a") as printed, open(self.folder / "err", "a") as said:
            return Run(subprocess.Popen(command, cwd=self.folder, env=env, stdout=printed, stderr=said), self)


class Ground:
    """Where drills are held: a folder, the server that forks, and runs that nothing happened to."""

    def __init__(self, folder: Path) -> None:
        if not sys.platform.startswith("linux"):
            raise Skipped("the drills need Linux: they fork, and preload a library")
        self.folder, self.started = folder, dict[Path, list[str]]()
        library, compiler = folder / "preload.so", os.environ.get("CC") or shutil.which("cc") or "c++"
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-x", "c", SOURCE, "-o", library, "-ldl"], check=True)
        paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, sys.path)]
        self.environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "LD_PRELOAD": str(library),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.drills.child"])
        self.lock = threading.RLock()
        with _environment(self.environment):
            self._context.Process(target=len, args=("",)).start()  # the server is there from now on
        self._whole = dict[str, tuple[Path, End]]()

    def forked(self, *args: Any, **orders: Any) -> Any:
        from tests.drills.child import Orders, train  # not earlier: it imports all that a run needs

        process = self._context.Process(target=train, args=(Orders(*args, **orders),))
        with self.lock:
            process.start()
        return process

    @contextmanager
    def place(self) -> Iterator[Place]:
        """Give an empty folder, which is removed after it."""
        with TemporaryDirectory(dir=self.folder) as folder:
            os.chmod(folder, 0o755)
            yield Place(Path(folder), self)

    def undisturbed(self, options: list[str]) -> tuple[Path, End]:
        """Return a run to its end in a process of its own, and how it ended."""
        key = " ".join(options)
        with self.lock:
            if key not in self._whole:
                folder = self.folder / f"whole{len(self._whole)}"
                folder.mkdir()
                place = Place(folder, self)
                end = place.start(options, Fault(), real=True).end()
                end.done()
                self._whole[key] = folder / "run", end
            return self._whole[key]

    def seconds(self, options: list[str]) -> float:
        """Return how long a forked run takes, on this machine now."""
        with self.lock, self.place() as place:
            key = f"seconds {' '.join(options)}"
            if key not in self._whole:
                end = place.start(options).end()
                end.done()
                self._whole[key] = place.run, end
            return self._whole[key][1].seconds


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


FULL, READ_ONLY = errno.ENOSPC, errno.EROFS
Case = Callable[[Ground, int, int], None]
