"""The words of ect.sample's options: --seeds, --nfe, --class and --each-class. This module imports no torch."""

from __future__ import annotations

from pathlib import Path

from ect.config import COUNT, refuse_beyond
from ect.errors import UserError

SEEDS = 2**32
"""The number of different images: of a larger seed torch's generator on a CPU takes the low 32 bits."""
ONE_FILE = (".png", ".npz")
"""The endings of an --out that is one file, and no folder."""


def listed(text: str) -> list[int]:
    """Return the numbers of a text such as 0-63,100, in its order. Raises UserError, which names --seeds, where it is none."""
    seeds: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        high = high if dash else low
        if not (low.isdecimal() and high.isdecimal() and len(high) < 20 and int(low) <= int(high)):
            what = f"cannot read {part!r:.60}; expected numbers and ranges such as 0-63,100"
            raise UserError(f"--seeds {text:.60}: {what}")
        if not COUNT.holds(len(seeds) + int(high) - int(low) + 1):
            raise UserError(f"--seeds {text:.60}: expected {COUNT.expected} images; sample the rest afterwards")
        if int(high) >= SEEDS:
            raise UserError(f"--seeds {text:.60}: expected numbers below 2^32; beyond, images repeat")
        seeds.extend(range(int(low), int(high) + 1))
    return seeds


def numbers(nfe: str | None) -> list[int]:
    """Return the numbers of --nfe, increasing; 2 without it. Raises UserError where they are none."""
    parts = (nfe or "2").split(",")
    if not all(part.strip().isdecimal() and len(part) < 5 for part in parts):
        raise UserError(f"--nfe {nfe:.60}: expected a number of network evaluations, or several such as 2,3,4")
    return sorted({int(part) for part in parts})


def one_number(nfe: str | None) -> int | None:
    """Return the number of --nfe; None without it. Raises UserError where there are several, which are for a search."""
    found = numbers(nfe)
    if len(found) > 1:
        raise UserError(f"--nfe {nfe}: expected one number; several are for --search-sigmas")
    return None if nfe is None else found[0]


def refuse_together(class_idx: int | None, each_class: bool, out: Path) -> None:
    """Raise UserError where --each-class stands beside --class, or beside a folder of images, which has one a seed."""
    if each_class and class_idx is not None:
        raise UserError(f"--class {class_idx}: --each-class makes them all; leave out one of the two")
    if each_class and out.suffix.lower() not in ONE_FILE:
        raise UserError(f"--each-class: --out {out} is a folder, with one file a seed; give NAME.png or NAME.npz")


def of_classes(
    seeds: list[int], class_idx: int | None, each_class: bool, classes: int
) -> tuple[list[int], list[int] | None]:
    """Return a seed and a class for each image, as --class or --each-class has it; None for classes that the seeds draw.

    classes: that the model knows. Raises UserError where it knows none, or not this one, or the images are too many.
    """
    if class_idx is None and not each_class:
        return seeds, None
    asked = "--each-class" if class_idx is None else f"--class {class_idx}"
    if not classes:
        raise UserError(f"{asked}: this model is unconditional; leave the option out")
    if class_idx is not None and not 0 <= class_idx < classes:
        raise UserError(f"{asked}: expected 0 to {classes - 1}, the classes of this model")
    every = range(classes) if class_idx is None else [class_idx]
    refuse_beyond({"count": (len(seeds) * len(every), COUNT)})
    return seeds * len(every), [one for one in every for _ in seeds]
