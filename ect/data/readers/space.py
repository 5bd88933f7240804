"""Room for the pixels of a data set: in memory, or in a file that is mapped where they are too many for it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from ect.errors import UserError

MEMORY_INFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # of a Linux container
SHARE = 0.5
"""The part of the memory that is free which pixels may take: the rest is for what the run itself needs."""


def free_memory() -> int | None:
    """Return the bytes that the machine has left, or the container where that is less; None where nobody tells."""
    free = []
    if MEMORY_INFO.is_file():
        rows = dict(line.split(":") for line in MEMORY_INFO.read_text().splitlines())
        free.append(int(rows["MemAvailable"].split()[0]) * 1024)
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        free.append(int(limit.read_text()) - int(used.read_text()))
    return min(free, default=None)


def empty(shape: tuple[int, ...], what: str) -> np.ndarray:
    """Return a uint8 array of this shape, to be filled.

    Where it would take more than SHARE of the free memory it is a file, which the system reads and forgets by the page. The
    file has no name, so it ends with the process; it lies in the folder for temporary files, which TMPDIR names. Raises
    UserError, saying `what` it was for, where that folder has not the room.
    """
    size = int(np.prod(shape, dtype=object))
    free = free_memory()
    if free is None or size <= SHARE * free:
        with contextlib.suppress(MemoryError):
            return np.empty(shape, np.uint8)
    folder = tempfile.gettempdir()
    try:
        if size > shutil.disk_usage(folder).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # now, and not in the midst of the pictures
        with tempfile.TemporaryFile(dir=folder) as file:
            return np.memmap(file, np.uint8, "w+", shape=shape)
    except OSError as error:
        raise UserError(
            f"{what} take {size / 1e9:,.1f} GB, more than the memory has to spare, and {folder} has no room for them "
            f"({error.strerror}). Let TMPDIR name a folder with room, or choose a smaller --data.resolution"
        ) from error
