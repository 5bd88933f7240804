"""Command lines of the benchmarks: bad input ends with status 2 and one sentence that names value and remedy."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
MOST = 10**6
"""The largest number that an option takes, unless it says another."""
NUMBERS: dict[type, str] = {int: "whole number", float: "number"}


class Parser(argparse.ArgumentParser):
    """A parser whose only word on bad input is a sentence."""

    def error(self, message: str) -> NoReturn:
        with contextlib.suppress(ImportError):  # benchmarks/first_hour.py runs where ect may be missing
            from ect.ranks.sentences import printable

            message = printable(message)
        self.exit(2, f"{message}; see --help\n")


def command(main: Callable[P, int]) -> Callable[P, int]:
    """Make of a command's main one whose UserError is printed alone, with status 2."""
    from ect.errors import UserError  # not earlier: benchmarks/first_hour.py runs where ect may be missing
    from ect.ranks.sentences import sentence

    @wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(sentence(error), file=sys.stderr)
            return 2

    return run


def tyro_options(kind: type[T], about: str | None, argv: Sequence[str] | None) -> T:
    """Return the options of a command line as tyro reads them into the dataclass `kind`.

    Raises UserError where a value is beyond the limits beside its field.
    """
    import tyro

    from ect.options import check_each
    from ect.ranks.paths import refuse_impossible
    from ect.ranks.sentences import parsed

    options = parsed(lambda: tyro.cli(kind, description=about, args=argv))
    refuse_impossible(options)
    check_each(options)
    return options


def at_least(least: float, kind: type = int, most: float = MOST) -> Callable[[str], Any]:
    """Return a type of argparse's options: a number that is neither below `least` nor above `most`."""

    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            beyond = f", and at most {most:,}" if value > most else ""
            raise argparse.ArgumentTypeError(f"{text}: expected a {NUMBERS[kind]} of at least {least:g}{beyond}")
        return value

    return number


def possible_path(text: str) -> Path:
    """Read a type of argparse's options: a path that a file can have."""
    try:
        Path(text).exists()
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text}: no possible name ({getattr(error, 'strerror', error)})") from error
    return Path(text)


def new_file(text: str) -> Path:
    """Read a type of argparse's options: a file that can be written, in a folder that is there or can be made."""
    if possible_path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: is a folder; name a file")
    folder(str(Path(text).parent))
    return Path(text)


def folder(text: str) -> Path:
    """Read a type of argparse's options: a folder that is there or can be made."""
    there = next(parent for parent in (possible_path(text), *Path(text).parents) if parent.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: {there} is a file; name a folder")
    return Path(text)
