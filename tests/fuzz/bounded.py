"""One read of a hostile file, watched: it ends in a value or a UserError, in time, in memory, and executes nothing."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from ect.errors import UserError
from ect.ranks.sentences import sentence

SECONDS, BYTES = 5.0, 1 << 30
LARGEST = 10_000_000
"""The bounds are for files of at most so many bytes."""
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_STUCK = 60  # seconds after which C code that never comes back ends the process, with a trace
_RUN = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pickle.find_class"}
_RUN |= {"socket.connect", "ctypes.dlopen", "shutil.rmtree"}
_watching: list[str] | None = None


class TooLong(BaseException):
    """A read that takes longer than SECONDS of processor time. It is no Exception, so that no reader takes it for damage."""


def _hook(event: str, _: Any) -> None:
    if _watching is not None and event in _RUN:
        _watching.append(event)


sys.addaudithook(_hook)


@contextlib.contextmanager
def _cut() -> Iterator[None]:
    """Raise TooLong inside the block once it has taken SECONDS of processor time."""

    def late(_number: int, _frame: FrameType | None) -> None:
        raise TooLong

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS, 0.5)
    faulthandler.dump_traceback_later(_STUCK, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGPROF, before)


def _memory(peak: bool) -> int:
    """Bytes of this process in memory: now, or the most since `_forget`."""
    name = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _forget() -> int:
    """Let the peak begin at what is in memory now, and return it; where the system cannot, the peak so far counts."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")
    return max(_memory(peak=False), 0)


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Let an allocation far beyond BYTES fail, before it takes the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + 4 * BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def executing_nothing() -> Iterator[None]:
    """Fail where the block starts a program, opens a connection, loads a library, or has Python's own pickle look up a name."""
    global _watching
    _watching = events = []
    try:
        yield
    finally:
        _watching = None
    assert not events, f"executed: {events}"


def bounded(read: Callable[[], Any]) -> str | None:
    """Read a file; return the sentence of the refusal, None where there was none. Fails on anything else than a value or a
    UserError of one printable line, on more than SECONDS of processor time or BYTES above what the process had, and where
    something was executed."""
    start, begin = _forget(), time.process_time()
    refusal: UserError | None = None
    gc.collect(1)  # what the reader before left: frozen once, it would be walked no more
    gc.freeze()  # what many tests before left behind is not the reader's to walk
    try:
        with executing_nothing(), warnings.catch_warnings(), _limited(), _cut():
            warnings.simplefilter("ignore")
            read()
    except UserError as error:
        refusal = error
    except TooLong:
        raise AssertionError(f"more than {SECONDS:g} s") from None
    finally:
        gc.unfreeze()
    seconds, grown = time.process_time() - begin, _memory(peak=True) - start
    assert seconds <= SECONDS, f"{seconds:.1f} s"
    assert grown <= BYTES, f"{grown >> 20} MB above what the process had"
    if refusal is None:
        return None
    assert not _out_of_memory(refusal), "it was refused for want of memory"
    said = sentence(refusal)
    assert said.isprintable() and len(said) <= 1200, said
    return said


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether a refusal hides that memory ran out."""
    while error is not None:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
