"""Errors as one sentence each, whatever a file, an option or a parser put into them. Imports nothing that takes time."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")
LONGEST = 1000
"""Characters of a line, at most: an option or a name in a file may have a million."""
_UNWRAPPED = "1000000"  # columns: no sentence of a parser is cut into lines
_RULE = re.compile(r"^ +-{4,} *$", re.MULTILINE)  # between the title and the parts of what tyro says
_NO_TYPE = re.compile(r"no type matching (\S+) could be instantiated from")
_NUMBER = re.compile(r"invalid literal for int\(\) with base 10:|could not convert string to float:")


def sentence(error: BaseException) -> str:
    """Return the text of an error for a terminal: printable, one line, or as many as an error says that it has."""
    lines = str(error).split("\n") if getattr(error, "several_lines", False) else [str(error)]
    return "\n".join(map(printable, lines))


def printable(text: str) -> str:
    """Return text on one line: what a terminal would obey is spelled out, and a long text is cut in the middle."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def parsed(parse: Callable[[], T]) -> T:
    """Return what a parser of a command line returns.

    Where it exits with status 2 (tyro draws a box, argparse prints its usage first), say the same in one sentence.
    """
    out, err = io.StringIO(), io.StringIO()
    try:
        with _wide(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            found = parse()
    except SystemExit as end:
        if end.code == 2:
            print(f"error: {_words(err.getvalue())}; see --help", file=sys.stderr)
            raise
        return parse()  # --help, which knows the terminal's width
    except Exception:
        _pass_on(out, err)
        raise
    _pass_on(out, err)
    return found


def _pass_on(out: io.StringIO, err: io.StringIO) -> None:
    """Write what a parser wrote where it meant it to go."""
    for said, stream in ((out.getvalue(), sys.stdout), (err.getvalue(), sys.stderr)):
        if said:  # a full disk refuses to be written even nothing
            stream.write(said)


@contextlib.contextmanager
def _wide() -> Iterator[None]:
    """Let no parser cut its sentences into lines inside the block."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = _UNWRAPPED
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def _words(text: str) -> str:
    """Return what a parser said, without argparse's usage or tyro's box."""
    usage, argparses, words = text.partition(": error: ")
    return printable(words.strip()) if argparses else _from_box(usage)


def _from_box(text: str) -> str:
    """Return the first part of what tyro draws where it writes to no terminal, with the options that it thinks were meant."""
    _title, *parts = _RULE.split(text)
    first = next(iter(parts), text)
    words = " ".join(first.split()).partition(" Got errors: ")[0].removeprefix("Error parsing ").removesuffix(".")
    words = _NO_TYPE.sub(r"expected \1, not", _NUMBER.sub("expected a number, not", words))
    lines = [line for part in parts if "Perhaps you meant" in part for line in part.splitlines()]
    meant = [line.split()[0] for line in lines if line.startswith("      --")]
    return printable(words + (f"; perhaps you meant {' or '.join(meant[:3])}" if meant else ""))
