"""Recognise a file that somebody took for another, by its first bytes."""

from __future__ import annotations

import contextlib
from pathlib import Path

_KINDS = {
    b"version https://git-lfs": "a git-lfs pointer, not the file itself; fetch that by git lfs pull",
    b"<!doctype html": "a web page, not the file itself; download it again by a link to the file",
    b"<html": "a web page, not the file itself; download it again by a link to the file",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x93NUMPY": "a numpy array",
    b"\x89HDF": "an HDF5 file",
}


def what_it_is(head: bytes) -> str | None:
    """Say what the file is that begins with `head`, and what to do about it; None where that does not tell."""
    if not head:
        return "the file is empty; download it again"
    text = head.lstrip().lower()
    return next((what for start, what in _KINDS.items() if head.startswith(start) or text.startswith(start)), None)


def what_is_at(path: Path) -> str | None:
    """Say what the file at `path` is, as `what_it_is` does; None also where it cannot be read."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return what_it_is(file.read(64))
    return None
