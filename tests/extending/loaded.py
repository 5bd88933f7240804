"""The files of this folder as a stranger's: docs/extending.md shows them, and what they register is forgotten after a test."""

from __future__ import annotations

import contextlib
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from ect_kernels import choice as kernels
from ect_kernels import dispatch

from ect import config, models, objective
from ect.metrics import choice

FOLDER = Path(__file__).parent


@contextlib.contextmanager
def forgotten() -> Iterator[None]:
    """Take back, at the end, what was registered within."""
    with contextlib.ExitStack() as stack:
        for known in (models._UNETS, objective.OBJECTIVES, dispatch.OPS, kernels.KNOWN):
            stack.enter_context(mock.patch.dict(known))
        for name in ("Architecture", "Kind"):
            stack.enter_context(mock.patch.object(config, name, getattr(config, name)))
        stack.callback(config.STAGED.intersection_update, {*config.STAGED})
        stack.enter_context(mock.patch.object(choice, "EXTRA", [*choice.EXTRA]))
        yield


@contextlib.contextmanager
def added(name: str) -> Iterator[Any]:
    """Yield the names that a file of this folder defines, and forget them at the end."""
    with forgotten():
        yield SimpleNamespace(**runpy.run_path(str(FOLDER / f"{name}.py"), run_name=name))
