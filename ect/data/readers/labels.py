"""Class labels from EDM's dataset.json or from folder names, as [N, L]."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ect.errors import UserError

MAX_CLASSES = 32_768  # a larger class index is a mistake, and its one-hot rows would fill the memory
_SMALL, _MAX_NUMBERS, _SHARE = 10**7, 180_000_000, 64
"""A file of labels below so many bytes may make so many numbers, a larger one so many for each of its bytes: a large index in
a small file must not fill the memory. ImageNet's has 30 for each byte."""
_FLOATS = 2**26
"""One-hot labels of more numbers are bytes: ImageNet's have 1.3 GB so, and would have 5."""
_LARGEST = float(np.finfo(np.float32).max)


def one_hot(indices: np.ndarray, classes: int) -> np.ndarray:
    """Turn integer class indices [N] in [0, classes) into float32 [N, classes], or uint8 where those would be many."""
    labels = np.zeros((len(indices), classes), np.float32 if len(indices) * classes <= _FLOATS else np.uint8)
    labels[np.arange(len(indices)), indices] = 1
    return labels


def refuse_too_many(where: Path, images: int, classes: int, size: int) -> None:
    """Raise UserError where one-hot labels would be far larger than a file of `size` bytes with class indices accounts for."""
    if images * classes > (_MAX_NUMBERS if size < _SMALL else _SHARE * size):
        raise UserError(
            f"{where}: {classes:,} classes for {images:,} images, whose labels would fill the memory. Number the classes from "
            "0 on, without gaps, or train without --data.labels"
        )


def from_json(text: bytes, names: list[str], where: Path) -> np.ndarray:
    """Return the labels of the images `names` from dataset.json (EDM's format): {"labels": [[name, label], ...]}.

    A label is a class index (the classes are 0 to the largest index found) or a list of numbers, alike for all images.
    Raises UserError naming the file `where` unless every image has exactly one label and every label an image.
    """
    remedy = "Rewrite it, or train without --data.labels"
    by_name = _parse(text, where, remedy)
    missing = [name for name in names if name not in by_name]
    if missing:
        raise UserError(
            f"{where}: no label for {missing[0]} ({len(missing)} of {len(names)} images have none). {remedy}"
        )
    extra = sorted(by_name.keys() - set(names))
    if extra:
        raise UserError(
            f"{where}: it labels {extra[0]}, which is not there ({len(by_name)} labels, {len(names)} images). "
            "Restore the missing images or remove their labels"
        )
    values = [by_name[name] for name in names]
    if type(values[0]) is int:
        return _from_indices(values, names, where, remedy, len(text))
    return _from_vectors(values, names, where, remedy)


def from_folders(names: list[str], root: Path) -> np.ndarray:
    """Return the class of each image: the rank of its top-level folder's name among the sorted names."""
    remedy = "Make a folder for each class or a dataset.json, or train without --data.labels"
    tops = [PurePosixPath(name).parts[0] for name in names]
    for name, top in zip(names, tops, strict=True):
        if name == top:
            raise UserError(
                f"{root / name}: no label: the image lies in no class folder, and there is no dataset.json. {remedy}"
            )
    classes = sorted(set(tops))
    if len(classes) < 2:
        raise UserError(
            f"{root}: --data.labels was given, but there is no dataset.json and only one class folder "
            f"({classes[0]}). {remedy}"
        )
    rank = {top: i for i, top in enumerate(classes)}
    return one_hot(np.array([rank[top] for top in tops]), len(classes))


def _parse(text: bytes, where: Path, remedy: str) -> dict[str, Any]:
    """Return name -> label, as the JSON has them."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}). {remedy}") from error
    pairs = content.get("labels") if isinstance(content, dict) else None
    if pairs is None:
        raise UserError(f'{where}: --data.labels was given, but the file has no "labels" (or null). {remedy}')
    if not isinstance(pairs, list):
        raise UserError(
            f'{where}: "labels" must be a list of [file name, label] pairs, not {type(pairs).__name__}. {remedy}'
        )
    by_name: dict[str, Any] = {}
    for i, pair in enumerate(pairs):
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise UserError(
                f'{where}: "labels"[{i}] must be a [file name, label] pair, found {str(pair)[:60]}. {remedy}'
            )
        name = pair[0].replace("\\", "/")  # written on Windows
        if name in by_name:
            raise UserError(f"{where}: {name} is labelled twice. {remedy}")
        by_name[name] = pair[1]
    return by_name


def _from_indices(values: list[Any], names: list[str], where: Path, remedy: str, size: int) -> np.ndarray:
    for name, value in zip(names, values, strict=True):
        if type(value) is not int or not 0 <= value < MAX_CLASSES:
            raise UserError(
                f"{where}: label {str(value)[:60]} of {name}: expected a class index in 0..{MAX_CLASSES - 1}, "
                f"as {names[0]} has. {remedy}"
            )
    refuse_too_many(where, len(values), max(values) + 1, size)
    return one_hot(np.array(values), max(values) + 1)


def _from_vectors(values: list[Any], names: list[str], where: Path, remedy: str) -> np.ndarray:
    length = len(values[0]) if isinstance(values[0], list) else 0
    for name, value in zip(names, values, strict=True):
        numbers = isinstance(value, list) and all(type(v) in (int, float) and abs(v) <= _LARGEST for v in value)
        if not (numbers and len(value) == length > 0):
            raise UserError(
                f"{where}: label {str(value)[:60]} of {name}: expected class indices (whole numbers) throughout, "
                f"or lists of finite numbers of one length throughout. {remedy}"
            )
    return np.array(values, np.float32)
