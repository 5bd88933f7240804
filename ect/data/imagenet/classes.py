"""The classes of a data set and their pictures: in a folder each, or in the tar files in which ImageNet is published."""

from __future__ import annotations

import io
import itertools
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from ect.data.readers.image_files import hidden, read_file, walk
from ect.data.readers.pictures import extensions
from ect.errors import UserError

EXPECTED = (
    "Expected a folder with a folder of pictures for each class, the folder of the classes' tar files, or "
    "ILSVRC2012_img_train.tar itself"
)


@dataclass(frozen=True)
class Class:
    """One class: its name, the file or folder `path` with its pictures, and their names, sorted.

    start, size: in a tar file of tar files, the bytes from which and how many are this class's own; else 0.
    """

    name: str
    path: Path
    pictures: tuple[str, ...]
    start: int = 0
    size: int = 0

    def read(self) -> Iterator[tuple[str, bytes]]:
        """Yield the name and the bytes of each picture. Raises UserError where the file is not what it was."""
        if self.path.is_dir():
            for name in self.pictures:
                yield name, read_file(self.path / name)
            return
        with self.path.open("rb") as file:
            file.seek(self.start)
            whole = io.BytesIO(file.read(self.size or -1))  # a class of ImageNet has 100 to 300 MB
        tar, found = _opened(whole, self.path)
        members = {member.name: member for member in found}
        for name in self.pictures:
            picture = tar.extractfile(members[name])
            assert picture is not None  # it is a file
            yield name, picture.read()


def find(source: Path) -> list[Class]:
    """Return the classes of `source`, by their sorted names, the order in which the field numbers them.

    Raises UserError, naming what does not fit, where `source` is none of the three, and where a class has no picture.
    """
    if source.is_dir():
        classes = [*_folders(source), *_tars(source)]
    elif source.is_file():
        classes = list(_inside(source))
    else:
        raise UserError(f"{source}: no such file or folder. {EXPECTED}")
    if not classes:
        raise UserError(f"{source}: no classes in it. {EXPECTED}")
    classes.sort(key=lambda one: one.name)
    for one, following in itertools.pairwise(classes):
        if one.name == following.name:
            raise UserError(f"{source}: class {one.name} is there twice, as folder and tar file. Remove one of them")
    for one in classes:
        if not one.pictures:
            raise UserError(f"{one.path}: class {one.name} has no pictures. Copy it anew, or remove it")
    return classes


def _folders(source: Path) -> Iterator[Class]:
    """Yield the folders of `source` that are classes; pictures may lie in folders below them."""
    known, found = extensions(), defaultdict[str, list[str]](list)
    for folder, files in walk(source):
        for file in files:
            name = PurePosixPath(Path(folder, file).relative_to(source).as_posix())
            if hidden(str(name)) or name.suffix.lower() not in known:
                continue
            if len(name.parts) == 1:
                raise UserError(f"{source / file}: a picture that lies in no class. {EXPECTED}")
            found[name.parts[0]].append(str(name.relative_to(name.parts[0])))
    for folder_ in sorted(path for path in source.iterdir() if path.is_dir() and not hidden(path.name)):
        yield Class(folder_.name, folder_, tuple(sorted(found[folder_.name])))


def _tars(source: Path) -> Iterator[Class]:
    """Yield the tar files of `source`, each of them a class."""
    for path in sorted(path for path in source.glob("[!.]*.tar") if path.is_file()):
        with path.open("rb") as file:
            yield Class(path.stem, path, _pictures(_opened(file, path)))


def _inside(source: Path) -> Iterator[Class]:
    """Yield the tar files of the tar file `source`, each of them a class."""
    with source.open("rb") as file:
        outer, members = _opened(file, source)
        for member in members:
            if PurePosixPath(member.name).suffix != ".tar":
                raise UserError(f"{source}: it holds {member.name}, where a tar file of one class was due. {EXPECTED}")
            inner = outer.extractfile(member)
            assert inner is not None  # it is a file
            pictures = _pictures(_opened(inner, source / member.name))
            yield Class(PurePosixPath(member.name).stem, source, pictures, member.offset_data, member.size)


def _pictures(opened: tuple[tarfile.TarFile, list[tarfile.TarInfo]]) -> tuple[str, ...]:
    known, names = extensions(), {member.name for member in opened[1]}
    return tuple(sorted(name for name in names if PurePosixPath(name).suffix.lower() in known and not hidden(name)))


def _opened(file: IO[bytes], where: Path) -> tuple[tarfile.TarFile, list[tarfile.TarInfo]]:
    """Return a tar file, and the files in it. It is not compressed, or a small one could hold any number of bytes."""
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  the caller closes the file below it
        return tar, [member for member in tar if member.isfile()]
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{where}: damaged, truncated or no plain tar file ({error}). Copy it anew") from error
