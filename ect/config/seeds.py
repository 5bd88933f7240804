"""The words of --seeds, numbers and ranges of numbers, and the classes of their images."""

from __future__ import annotations

from ect.config import COUNT, refuse_beyond
from ect.errors import UserError


def listed(text: str) -> list[int]:
    """Return the numbers of a text such as 0-63,100, in its order. Raises UserError, which names --seeds, where it is none."""
    seeds: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        high = high if dash else low
        if not (low.isdecimal() and high.isdecimal() and len(high) < 20 and int(low) <= int(high) < 2**63):
            what = f"cannot read {part!r:.60}; expected numbers and ranges such as 0-63,100"
            raise UserError(f"--seeds {text:.60}: {what}")
        if not COUNT.holds(len(seeds) + int(high) - int(low) + 1):
            raise UserError(f"--seeds {text:.60}: expected {COUNT.expected} images; sample the rest afterwards")
        seeds.extend(range(int(low), int(high) + 1))
    return seeds


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
