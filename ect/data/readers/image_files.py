"""Image files: a folder of them, or EDM's zip, listed in sorted order and read into one uint8 array."""

from __future__ import annotations

import lzma
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from posixpath import splitext
from typing import NamedTuple

import numpy as np

from ect.data.readers.labels import from_folders, from_json
from ect.data.readers.pictures import Convert, Source, decode_all, extensions
from ect.errors import UserError
from ect.files.foreign import what_is_at

MAX_BYTES = 2**28
"""Largest file read from a folder or a zip: more is a mistake or an attack, not a training image."""
_ALWAYS, _RATIO = 2**28, 16
"""The files of a zip have at most so many bytes unpacked, or so many times its size: pictures hardly compress further."""
_TEXT = 2**24
"""The labels of a zip have at most so many bytes, or twice the size of the zip, which has the pictures too."""

LABELS = "dataset.json"
_DAMAGED = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, OSError, EOFError, ValueError, IndexError,
    NotImplementedError, RuntimeError,
)  # fmt: skip


class Read(NamedTuple):
    """The result of a reader: uint8 [N, H, W, C], labels [N, L] or None, and lines for the log."""

    images: np.ndarray
    labels: np.ndarray | None
    notes: list[str]


def read_folder(root: Path, labels: bool, resolution: int | None, convert: Convert | None) -> Read:
    """Return all images under `root`, links followed, in sorted order of their relative paths.

    Labels, if asked for, come from dataset.json, else from the names of the top-level folders. `resolution` and `convert`
    are as for pictures.decode_all. Files and folders whose names begin with a dot, and __MACOSX, are no data. Raises
    UserError naming the first file that does not fit.
    """
    names = [Path(folder, file).relative_to(root).as_posix() for folder, files in walk(root) for file in files]
    source = _pictures(
        Source(root, sorted(names), lambda name: read_file(root / name), lambda name: _size(root / name))
    )
    if not labels:
        vectors = None
    elif LABELS in names:
        vectors = from_json(source.read(LABELS), source.names, root / LABELS)
    else:
        vectors = from_folders(source.names, root)
    images, notes = decode_all(source, resolution, convert)
    return Read(images, vectors, notes)


def read_file(path: Path) -> bytes:
    """Return what is in a file of a data set. Raises UserError where it is too large, or none: a pipe would never end."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("a pipe or a device, no file")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise OSError(f"{size:,} bytes, more than the {MAX_BYTES:,} accepted")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}). Restore or remove it") from error


def _size(path: Path) -> int:
    """Return the bytes of a file, 0 where it cannot be read, which `read_file` will say."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Walk as os.walk through links too, each real folder once on a way down.

    A link to a folder above it would never end.
    """
    for folder, inside, files in os.walk(root, followlinks=True):
        above = {os.path.realpath(parent) for parent in (Path(folder), *Path(folder).parents)}
        inside[:] = sorted(name for name in inside if os.path.realpath(Path(folder, name)) not in above)
        yield folder, files


def read_zip(path: Path, labels: bool, resolution: int | None, convert: Convert | None) -> Read:
    """Return all images of a zip in EDM's layout, in sorted order of their names; nothing is unpacked to disk.

    Names may be written with backslashes, and all may lie in one folder, as some programs pack them. Returns and raises as
    `read_folder`, but labels come from dataset.json only: the folders 00000, 00001, ... of such a zip are no classes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive)
            _check_sizes(path, members)
            source = Source(
                path,
                sorted(members),
                lambda name: _read_member(archive, path, members[name]),
                lambda name: members[name].file_size,
            )
            pictures, vectors = _pictures(source), None
            if labels:
                if LABELS not in members:
                    raise UserError(
                        f"{path}: --data.labels was given, but the zip holds no dataset.json. Add one, or unpack "
                        "the zip and pass the folder if its top-level folders are the classes"
                    )
                vectors = from_json(source.read(LABELS), pictures.names, path / LABELS)
            images, notes = decode_all(pictures, resolution, convert)
            return Read(images, vectors, notes)
    except _DAMAGED as error:
        reason = what_is_at(path) or error
        raise UserError(
            f"{path}: damaged, truncated or not a zip that can be read ({reason}). Copy or make it anew"
        ) from error


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the files by their names below the folder that holds dataset.json, if that one folder counts."""
    infos = {info.filename.replace("\\", "/"): info for info in archive.infolist() if not info.is_dir()}
    infos = {name: info for name, info in infos.items() if not name.endswith("/") and not hidden(name)}
    tops = {name.split("/")[0] for name in infos}
    top = min(tops, default="")
    if len(tops) == 1 and f"{top}/{LABELS}" in infos:
        return {name.removeprefix(f"{top}/"): info for name, info in infos.items()}
    return infos


def _check_sizes(path: Path, members: dict[str, zipfile.ZipInfo]) -> None:
    """Raise UserError where the files of a zip are far larger, unpacked, than those of a data set in it could be."""
    packed, unpacked = path.stat().st_size, sum(info.file_size for info in members.values())
    if unpacked > max(_ALWAYS, _RATIO * packed):
        raise UserError(
            f"{path}: {packed:,} bytes that unpack to {unpacked:,}: no data set of pictures. Unpack it, and look"
        )
    if LABELS in members and members[LABELS].file_size > max(_TEXT, 2 * packed):
        size = members[LABELS].file_size
        raise UserError(
            f"{path / LABELS}: {size:,} bytes in a zip of {packed:,}: no labels of pictures. Make the zip anew"
        )


def _read_member(archive: zipfile.ZipFile, path: Path, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > MAX_BYTES:
        raise UserError(
            f"{path / info.filename}: {info.file_size} bytes unpacked, more than the {MAX_BYTES} accepted. Remove it from "
            "the zip"
        )
    return archive.read(info)


def hidden(name: str) -> bool:
    return any((part.startswith(".") and part != ".") or part == "__MACOSX" for part in name.split("/"))


def _pictures(source: Source) -> Source:
    """Return the files with an extension that PIL can open, but none that is hidden."""
    known = extensions()
    names = [name for name in source.names if splitext(name)[1].lower() in known and not hidden(name)]
    if not names:
        raise UserError(
            f"{source.path}: no images in it. Expected .png, .jpg, .webp or other pictures; check --data.source"
        )
    return replace(source, names=names)
