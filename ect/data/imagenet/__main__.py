"""python -m ect.data.imagenet SRC OUT.zip makes a data set of small squares and their classes, from ImageNet as published."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from ect.ranks.interrupts import install, leave

    install(leave)

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from ect.config import Limit, refuse_beyond
from ect.data.imagenet.classes import find
from ect.data.imagenet.crops import Crop
from ect.data.imagenet.shards import Shards
from ect.data.readers.labels import MAX_CLASSES
from ect.data.readers.pictures import MAX_SIDE, is_resolution
from ect.errors import UserError
from ect.files.atomic import atomic
from ect.files.lock import locked
from ect.ranks.distributed import World
from ect.ranks.launch import launch

PLAN = "plan.json"
_SPOKEN = 5.0  # seconds between two lines of progress


@dataclass(frozen=True)
class Options:
    """Make a zip of small RGB squares, with their classes, that ect.train takes as --data.source, with --data.labels.

    A run that was stopped goes on where it was, with the same command line. Pictures are read by PIL; nothing is unpacked.
    """

    source: tyro.conf.Positional[Path]
    """A folder with a folder of pictures for each class, the folder of the classes' tar files, or ILSVRC2012_img_train.tar."""
    destination: tyro.conf.Positional[Path]
    """The zip to write, in EDM's layout; its name ends in .zip. What is half done lies beside it, in *.zip.parts."""
    resolution: int = 64
    """Width of a picture in pixels."""
    crop: Crop = "dhariwal"
    """'dhariwal': squares as those of EDM2's and ADM's models; 'center': as those of EDM's."""
    jobs: int = 0
    """Classes at a time; 0: as many as there are processors."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 2, with one sentence, where the user can mend it."""
    return launch(lambda: checked(tyro.cli(Options, args=args, prog="python -m ect.data.imagenet")), work)


def checked(options: Options) -> Options:
    """Return the options. Raises UserError for values that no data set can have."""
    refuse_beyond(
        {
            "resolution": (options.resolution, Limit(f"a multiple of 4, up to {MAX_SIDE:,}", is_resolution)),
            "jobs": (options.jobs, Limit("0, or from 1 to 1,024", lambda jobs: 0 <= jobs <= 1024)),
        }
    )
    if options.destination.suffix.lower() != ".zip":
        raise UserError(f"{options.destination}: the file to write must be named *.zip")
    return options


def work(options: Options, world: World) -> int:
    """Make the data set, in a folder beside it until it is whole."""
    source, destination = options.source.expanduser(), options.destination.expanduser()
    if destination.exists():
        raise UserError(f"{destination}: there already. Remove it, or give another name")
    print(f"looking for the classes in {source}", flush=True)
    classes = find(source)
    if len(classes) > MAX_CLASSES:
        raise UserError(f"{source}: {len(classes):,} classes. Expected at most {MAX_CLASSES:,}")
    count = sum(len(one.pictures) for one in classes)
    print(f"{count:,} pictures of {len(classes):,} classes, from {classes[0].name} to {classes[-1].name}", flush=True)
    folder = destination.with_name(f"{destination.name}.parts")
    shards = Shards(folder, classes, options.resolution, options.crop)
    with begun(shards):
        room = 2 * count * 3 * options.resolution**2 - sum(path.stat().st_size for path in folder.glob("*.zip"))
        if (free := shutil.disk_usage(folder).free) < room:
            raise UserError(
                f"{destination}: making it takes {room / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free there. Make room, or "
                "write it elsewhere"
            )
        _follow(shards, options.jobs or os.cpu_count() or 1)
        print(f"joining them in {destination}", flush=True)
        shards.join(destination)
        shards.remove()
    side = options.resolution
    print(f"wrote {destination}: {count:,} pictures of {side}x{side}, {destination.stat().st_size / 1e6:,.1f} MB")
    return 0


@contextlib.contextmanager
def begun(shards: Shards) -> Iterator[None]:
    """Keep the folder of the shards for the block, alone. Raises UserError where it is another data set's.

    A folder without a single shard does not stay.
    """
    folder, plan = shards.folder, shards.plan()
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot make this folder ({error.strerror}); choose a writable place") from error
    try:
        with locked(folder):
            path = folder / PLAN
            if not path.is_file():
                with atomic(path) as temporary:
                    temporary.write_text(plan)
            elif path.read_text() != plan:
                raise UserError(f"{folder}: begun with other pictures, --resolution or --crop. Remove it to begin anew")
            yield
    finally:
        if not any(folder.glob("*.zip")):
            shards.remove()


def _follow(shards: Shards, jobs: int) -> None:
    """Make the shards, and say how far that is every few seconds."""
    begin = spoken = time.monotonic()
    sizes = [len(one.pictures) for one in shards.classes]
    before, done, whole = shards.found(), 0, sum(sizes)
    there = sum(sizes[number] for number in before)
    if before:
        print(f"{len(before):,} classes are there already", flush=True)
    for count, number in enumerate(shards.make(jobs), start=len(before) + 1):
        done, now = done + sizes[number], time.monotonic()
        if now - spoken > _SPOKEN or there + done == whole:
            rate, spoken = done / max(now - begin, 1e-9), now
            print(
                f"{count:,} of {len(sizes):,} classes, {there + done:,} of {whole:,} pictures, {rate:,.0f} a second, "
                f"{(whole - there - done) / rate / 60:,.1f} minutes left", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
