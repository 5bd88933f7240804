"""Bounds on the description of a network, whoever wrote it: each value is held against them before anything is built.

A model file is a stranger's. Whatever its description claims, building the network must come to an end, in little time.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Sequence
from typing import Any

from ect.config import MAX_BLOCKS, MAX_LEVELS, SIGMA_DATA, SIGMA_MAX
from ect.errors import UserError
from ect.models.unet import UNet

MAX_COUNT = (1 << 16) - 1
"""Channels, classes, pixels a side, and whatever else is counted, are at most so many."""
_MAX_TEXT = 31  # characters of an argument such as encoder_type
_MOST_ITEMS = 15  # of a list such as resample_filter
_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def arguments(unet: type) -> dict[str, Any]:
    """Return the keyword arguments of a network's class, its base classes' among them, by name, with their types."""
    found: dict[str, Any] = {}
    for cls in reversed(unet.__mro__):
        if issubclass(cls, UNet) and "__init__" in vars(cls):
            kinds = typing.get_type_hints(cls.__init__)
            found |= {item.name: kinds.get(item.name, Any) for item in _parameters(cls) if item.kind not in _REST}
    return found


def _parameters(cls: type) -> list[inspect.Parameter]:
    return list(inspect.signature(vars(cls)["__init__"]).parameters.values())[1:]


def checked_arguments(unet: type, given: Any) -> dict[str, Any]:
    """Return the keyword arguments of a description, lists as lists and floats as floats.

    Raises UserError naming the first that the class does not know, or whose value is impossible.
    """
    kinds = arguments(unet)
    if not isinstance(given, dict):
        raise UserError(f"the arguments of {unet.__name__} are {shown(given)}; expected an object")
    takes_others = any(
        item.kind is inspect.Parameter.VAR_KEYWORD for item in inspect.signature(unet).parameters.values()
    )
    for name in given:
        if name not in kinds and not takes_others:
            raise UserError(f"{unet.__name__} was made with the unknown argument {shown(name)}")
    return {name: checked(name, value, kinds.get(name, Any)) for name, value in given.items()}


def checked(name: str, value: Any, kind: Any) -> Any:
    """Return the value of the argument `name`, of type `kind`.

    Raises UserError where it is of another type or out of bounds.
    """
    most = MAX_BLOCKS if name == "num_blocks" else MAX_COUNT
    longest = MAX_LEVELS if name == "channel_mult" else _MOST_ITEMS

    def count(item: Any) -> bool:
        return type(item) is int and 0 <= item <= most

    if kind is int and count(value):
        return value
    if kind is float and type(value) in (int, float) and 0 <= value < (1 if name.endswith("dropout") else MAX_COUNT):
        return float(value)
    if kind is str and type(value) is str and len(value) <= _MAX_TEXT:
        return value
    if kind == Sequence[int] and isinstance(value, list | tuple) and len(value) <= longest and all(map(count, value)):
        return list(value)
    if kind not in (int, float, str, Sequence[int]):  # of a network from elsewhere, which has to check it itself
        return value
    raise UserError(f"the U-Net argument {name} is missing or impossible; expected {getattr(kind, '__name__', kind)}")


def sigma_data(value: Any) -> float:
    """Return the standard deviation of the data. Raises UserError where it is no number that a denoiser can have."""
    if type(value) not in (int, float) or not SIGMA_DATA.holds(value):
        raise UserError(f"sigma_data is {shown(value)}; expected {SIGMA_DATA.expected}")
    return float(value)


def sigma_min(value: Any) -> float:
    """Return the noise level at which an ECMPrecond returns its input. Raises UserError where it is no noise level."""
    if type(value) not in (int, float) or not 0 <= value < SIGMA_MAX or not math.isfinite(value):
        raise UserError(f"sigma_min is {shown(value)}; expected a noise level from 0 to below {SIGMA_MAX:g}")
    return float(value)


def shown(value: Any) -> str:
    """Return a stranger's value for a message: itself where it is short, else its type."""
    plain = type(value) in (int, float, str, bool, type(None))
    return (
        repr(value)
        if plain and (type(value) is not int or abs(value) < 10**20) and len(repr(value)) <= 40
        else (f"of type {type(value).__name__}")
    )
