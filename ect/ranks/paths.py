"""Options that no file system can take, refused before anything looks for them. Imports nothing that takes time."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path

from ect.errors import UserError


def why_no_path(text: str) -> str | None:
    """Say why no file can have this name; None where one can."""
    try:
        os.lstat(text)
    except ValueError:
        return "it holds a null character"
    except OSError as error:
        return "it is too long" if error.errno == errno.ENAMETOOLONG else None
    return None


def refuse_impossible(options: object, prefix: str = "") -> None:
    """Raise UserError naming the first option, in a dataclass or one inside it, whose text or path no file system takes.

    A text that is no path may be long, but the system takes no null character in it either.
    """
    for field in dataclasses.fields(options) if dataclasses.is_dataclass(options) else ():
        value, name = getattr(options, field.name), prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            refuse_impossible(value, f"{name}.")
        why = why_no_path(str(value)) if isinstance(value, Path) or (type(value) is str and "\0" in value) else None
        if why is not None:
            raise UserError(f"--{name} {value}: no possible name ({why}); choose another")
