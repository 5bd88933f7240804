"""Command lines of the benchmarks: bad input ends with status 2 and one sentence that names value and remedy."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn, ParamSpec

P = ParamSpec("P")
NUMBERS: dict[type, str] = {int: "whole number", float: "number"}


class Parser(argparse.ArgumentParser):
    """A parser whose only word on bad input is a sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{message}; see --help\n")


def command(main: Callable[P, int]) -> Callable[P, int]:
    """Make of a command's main one whose UserError is printed alone, with status 2."""
    from ect.errors import UserError  # not earlier: benchmarks/first_hour.py runs where ect may be missing

    @wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(error, file=sys.stderr)
            return 2

    return run


def at_least(least: float, kind: type = int) -> Callable[[str], Any]:
    """Return a type of argparse's options: a number that is not below `least`."""

    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text}: expected a {NUMBERS[kind]} of at least {least:g}")
        return value

    return number


def new_file(text: str) -> Path:
    """Read a type of argparse's options: a file that can be written, in a folder that is there or can be made."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: is a folder; name a file")
    folder(str(path.parent))
    return path


def folder(text: str) -> Path:
    """Read a type of argparse's options: a folder that is there or can be made."""
    path = Path(text)
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: {there} is a file; name a folder")
    return path
