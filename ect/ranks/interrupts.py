"""Signals outside the training loop, and a reader of the output who leaves. Imports nothing that takes time."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""The signals that ask a process to end: Ctrl-C, a scheduler or shutdown, a terminal that closes (not on Windows)."""
NOBODY_READS = 128 + 13
"""Exit status, as of what SIGPIPE ends."""
Handler = Callable[[int, FrameType | None], Any]


def install(handler: Handler) -> dict[int, Any]:
    """Let `handler` answer the signals, save those that are ignored (nohup ignores SIGHUP); return who answered before."""
    if threading.current_thread() is not threading.main_thread():
        return {}  # only the main thread may
    wanted = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in wanted}


@contextlib.contextmanager
def answered_by(handler: Handler) -> Iterator[None]:
    """Let `handler` answer the signals inside the block."""
    before = install(handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def leave(number: int, frame: FrameType | None) -> None:
    """End the process at once and without a word, where there is nothing yet to save or clean up: status 130, 143 or 129."""
    os._exit(128 + number)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt for any of the signals; its argument is the signal's number."""
    raise KeyboardInterrupt(number)


def status(error: KeyboardInterrupt) -> int:
    """Return the exit status that tells of the signal, as a shell has it."""
    return 128 + (error.args[0] if error.args else int(signal.SIGINT))


@contextlib.contextmanager
def read_or_not() -> Iterator[None]:
    """End quietly, with the status of SIGPIPE, where nobody reads what the block prints (`--help | head -1`).

    Where it has no room, say so and end with status 2.
    """
    try:
        try:
            yield
        finally:
            _flush()
    except BrokenPipeError:
        _to_nowhere()
        raise SystemExit(NOBODY_READS) from None


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _to_nowhere()
        print(f"error: the output cannot be written ({error.strerror}); send it where there is room", file=sys.stderr)
        raise SystemExit(2) from None


def _to_nowhere() -> None:
    """Let stdout lead nowhere, for what is flushed at the exit."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
