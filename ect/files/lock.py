"""One process at a time in a run folder."""

from __future__ import annotations

import contextlib
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from ect.errors import UserError
from ect.files.atomic import itself, left_by_a_kill, remove

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"
"""Name of the lock file, whose text says who holds it."""
INSIDE = ("pretrain", "weights", "averages")
"""The folders inside a run's in which it writes too."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep the lock of a run folder inside the block. Raises UserError, naming host and process, where another one holds it.

    What a kill left half-written, in the folder or one of INSIDE, goes first. The system gives the lock back when its process
    ends, however it ends: the file that a kill leaves locks nothing. On Windows there is no such lock, and two processes in
    one folder go unnoticed; so they do, after a warning, on a file system without locks.
    """
    path = folder / LOCK
    descriptor = None if fcntl is None else _acquire(path)
    try:
        for left in (left for place in (folder, *map(folder.joinpath, INSIDE)) for left in left_by_a_kill(place)):
            remove(left)  # nobody else writes here
        yield
    finally:
        if descriptor is not None:
            remove(path)  # while it is held: nobody else's
            os.close(descriptor)


def holder(folder: Path) -> str | None:
    """Return who holds the lock of a run folder now, by host and process; None where nobody does, or nobody can tell."""
    path = folder / LOCK
    if not path.is_file():  # a pipe under that name would be waited for
        return None
    try:
        with path.open("rb") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return (
            path.read_bytes()[:200].decode(errors="replace").strip() if path.is_file() else "a process that just ended"
        )
    except OSError:
        pass
    return None


def _acquire(path: Path) -> int | None:
    """Return the descriptor that holds the lock, None where the file system has no locks."""
    patience = 3
    while True:
        try:
            descriptor = itself(str(path), os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise UserError(f"{path}: cannot write it ({error.strerror}); choose a writable run folder") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            if patience:  # `holder` above has it for a moment, to ask
                patience -= 1
                time.sleep(0.05)
                continue
            raise UserError(
                f"{path.parent}: another process works in this folder ({holder}); wait for it, stop it, or give another folder"
            ) from error
        except OSError as error:
            os.close(descriptor)
            warnings.warn(
                f"{path}: no locks here ({error.strerror}); start no other process in this folder", stacklevel=4
            )
            return None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                with contextlib.suppress(OSError):  # a full disk: it is held all the same
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"host {socket.gethostname()}, process {os.getpid()}\n".encode())
                return descriptor
        os.close(descriptor)  # its holder ended, and took the file away, between our opening and locking it
