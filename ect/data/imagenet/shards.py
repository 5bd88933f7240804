"""A zip for each class, and of these one zip in EDM's layout: what a kill leaves whole need not be made again."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ect.data.imagenet.classes import Class
from ect.data.imagenet.crops import CROPS, Crop
from ect.data.readers.image_files import LABELS
from ect.data.readers.pictures import converted, formats
from ect.errors import UserError
from ect.files.atomic import atomic

_WHEN = (1980, 1, 1, 0, 0, 0)  # the first that a zip can tell: the same pictures make the same bytes at any time
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Shards:
    """The zips of the classes, numbered from 0, in `folder`.

    classes: by their numbers. resolution: width of a picture in pixels. crop: how it becomes a square.
    """

    folder: Path
    classes: list[Class]
    resolution: int
    crop: Crop

    def path(self, number: int) -> Path:
        """Return where the zip of a class lies."""
        return self.folder / f"{number:05d}.zip"

    def plan(self) -> str:
        """Say what the shards are made of, as text: the names of classes and pictures, the width, and the crop."""
        names = "\n".join(f"{one.name}/{name}" for one in self.classes for name in one.pictures)
        digest = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()
        return json.dumps({"pictures": digest, "resolution": self.resolution, "crop": self.crop})

    def found(self) -> list[int]:
        """Return the numbers of the classes whose shards are there."""
        return [number for number in range(len(self.classes)) if self.path(number).is_file()]

    def make(self, jobs: int) -> Iterator[int]:
        """Make those that are not there yet, `jobs` at a time, and yield the number of each class when it is there.

        Raises UserError, naming the picture, where one cannot be read; the shards made so far stay.
        """
        missing = set(range(len(self.classes))) - set(self.found())
        with ThreadPoolExecutor(jobs, "pictures") as pool:
            made = {pool.submit(self._make, number): number for number in sorted(missing)}
            try:
                for future in as_completed(made):
                    future.result()
                    yield made[future]
            finally:
                pool.shutdown(cancel_futures=True)

    def _make(self, number: int) -> None:
        one, begin = self.classes[number], sum(len(before.pictures) for before in self.classes[:number])
        with atomic(self.path(number)) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for i, (name, data) in enumerate(one.read(), start=begin):
                png = io.BytesIO()
                self._square(data, one.path / name).save(png, "PNG", compress_level=0)  # as fast to read as can be
                archive.writestr(zipfile.ZipInfo(f"{i // 1000:05d}/img{i:08d}.png", _WHEN), png.getvalue())

    def _square(self, data: bytes, where: Path) -> Image.Image:
        try:
            with Image.open(io.BytesIO(data), formats=formats()) as image:
                return CROPS[self.crop](converted(image, "rgb"), self.resolution)
        except _UNREADABLE as error:
            reason = "of no known format" if isinstance(error, UnidentifiedImageError) else error
            raise UserError(
                f"{where}: cannot be read as an image ({reason}). Restore or remove it, and start again"
            ) from error

    def join(self, destination: Path) -> None:
        """Write the pictures of all classes, then their labels, to a zip that is there whole or not at all."""
        labels: list[tuple[str, int]] = []
        with atomic(destination) as temporary, zipfile.ZipFile(temporary, "w") as whole:
            for number in range(len(self.classes)):
                with zipfile.ZipFile(self.path(number)) as shard:
                    for member in shard.infolist():
                        whole.writestr(zipfile.ZipInfo(member.filename, _WHEN), shard.read(member))
                        labels.append((member.filename, number))
            whole.writestr(zipfile.ZipInfo(LABELS, _WHEN), json.dumps({"labels": labels}))

    def remove(self) -> None:
        """Remove the folder of the shards and what is in it, if it is there."""
        shutil.rmtree(self.folder, ignore_errors=True)
