"""Writing a file so that it is there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from ect.errors import UserError

_LEFT = re.compile(r"\..+\.\d+\.tmp|\.tmp[0-9A-Za-z]{6}")
"""The names of temporary files: those of `atomic`, and those under which safetensors writes."""


@contextlib.contextmanager
def atomic(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes its place, on any error `path` stays as it was.

    durable=False spares the flush to the disk: safe when the process is killed, not when the power fails. Raises
    UserError naming `path` where the system refuses (no such folder, no permission, disk full).
    """
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        temp.unlink(missing_ok=True)  # a link, through which the file would be written elsewhere
    try:
        yield temp
        if durable:
            _flush(temp, os.O_RDWR)  # Windows flushes only what is open for writing
        os.replace(temp, path)
        if durable and os.name != "nt":  # Windows cannot flush a folder
            _flush(path.parent, os.O_RDONLY)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot write it ({reason}); choose a writable place with room") from error
    finally:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)


def itself(name: str, flags: int) -> int:
    """Return the descriptor of a file, as an opener of `open`. Raises OSError where a link leads to another file."""
    if os.path.islink(name) and (os.path.isfile(name) or not os.path.exists(name)):
        raise OSError(errno.ELOOP, "it is a link to another file", name)
    return os.open(name, flags, 0o666)


def left_by_a_kill(folder: Path) -> list[Path]:
    """Return what a kill while writing left in a folder: temporary files of `atomic`, and of safetensors; no other ones."""
    return [
        path for path in folder.glob(".*") if _LEFT.fullmatch(path.name) and path.is_file() and not path.is_symlink()
    ]


def remove(path: Path) -> None:
    """Remove a file that may be gone already, or warn that it stays."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"{path}: cannot be removed ({error.strerror}); it is not needed any more", stacklevel=2)


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
