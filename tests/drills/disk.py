"""A disk without room, or that turned read-only, at each write of a run in turn; and a small one in earnest."""

from __future__ import annotations

import errno
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.drills.equal import EVENTS, TELEMETRY, names, same
from tests.drills.runs import FLUSH, PLAIN, REMOVE, ROOM, WHOLE, End, Fault, Ground, Place, Skipped

NEEDS = ROOM | FLUSH
BESIDE = {"lock"}
"""Without its text it locks all the same."""


def places(ground: Ground) -> int:
    """Return how many writes a whole run has."""
    return len(ground.undisturbed(WHOLE)[1].changes)


def full(ground: Ground, number: int, count: int) -> None:
    """Let one write find no room, every second time all after it too."""
    _fails(ground, f"full {number}", number, count, errno.ENOSPC, NEEDS)


def read_only(ground: Ground, number: int, count: int) -> None:
    """Let the disk turn read-only at a write, or the folder refuse it: at the first one, it was so from the start."""
    error = errno.EACCES if number % 2 else errno.EROFS
    _fails(ground, f"read-only {number}", 0 if number < 2 else number, count, error, NEEDS | REMOVE, lasting=True)


def _fails(
    ground: Ground, name: str, number: int, count: int, error: int, classes: int, lasting: bool | None = None
) -> None:  # fmt: skip
    dice = random.Random(name)
    options = WHOLE if count >= places(ground) or number % 4 == 1 else PLAIN
    want, whole = ground.undisturbed(options)
    writes = len(whole.changes)
    low, high = number * writes // count, max((number + 1) * writes // count, number * writes // count + 1)
    at = 1 if number == 0 else dice.randint(low + 1, high)
    with ground.place() as place:
        end = place.start(options, Fault(at, 0, error, bool(number % 2) if lasting is None else lasting, classes)).end()
        judge(place, end, want, tidy=not classes & REMOVE)


def judge(place: Place, end: End, want: Path, tidy: bool) -> None:
    """Hold that only what is told of a run was lost, or that it ended in a sentence; and that it goes on once it can.

    tidy: whether it could remove what it had half-written.
    """
    end.quiet()
    met = {Path(path).name for _, path, hit in end.changes if hit}
    if end.status == 0:
        same(place.run, want, telemetry=False, tidy=tidy)
    else:
        assert not all(map(told, met)), f"telemetry ended it: {end.err}"
        end.refused()
    if met and end.status == 0:
        assert "cannot be written, the run goes on without" in end.err or met <= BESIDE, (met, end.err)
    left = names(place.run) if place.run.is_dir() else set()
    assert not tidy or not [name for name in left if "tmp" in name or "lock" in name], left
    place.start(None).end().done()
    same(place.run, want, telemetry=False)


def told(name: str) -> bool:
    """Return whether a file only tells of a run; a grid has another name while it is written."""
    name = re.sub(r"^\.(.*)\.\d+\.tmp$", r"\1", name)
    return bool(TELEMETRY.fullmatch(name) or EVENTS.fullmatch(name))


def silent(ground: Ground, number: int, count: int) -> None:
    """Print onto a full disk: a run whose output cannot be written trains all the same."""
    options = (PLAIN, WHOLE)[number % 2]
    want, _ = ground.undisturbed(options)
    with ground.place() as place:
        place.start(options, out="/dev/full", real=number % 4 == 0).end().done()
        same(place.run, want)


def small(ground: Ground, number: int, count: int) -> None:
    """Train on a disk that is too small, then on the same one with room."""
    want, _ = ground.undisturbed(PLAIN)
    needed = sum(path.stat().st_size for path in want.rglob("*")) // 1024
    size = (number * needed) // count
    with ground.place() as place, mounted(place.run, f"size={4 + size}k"):
        end = place.start(PLAIN).end()
        end.quiet()
        if end.status:
            end.refused()
        subprocess.run(["mount", "-o", "remount,size=64m", place.run], check=True)
        place.start(None).end().done()
        same(place.run, want, telemetry=False)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """Make a file system in memory there, or raise Skipped."""
    folder.mkdir()
    if shutil.which("mount") is None:
        raise Skipped("no mount here")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        raise Skipped(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)
