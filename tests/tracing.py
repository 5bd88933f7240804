"""Where coverage's tracer rests: it makes all Python code twice as slow, torch's compiler and Triton's interpreter too.

A slow test runs without it, since quick ones reach almost every line; so does a test marked `untraced`. TRACED has the
exceptions: what walks a GPU's code, whose every line is to be reached. A launch in Triton's interpreter runs without it where
it can reach no new line: the process has traced one of the same kernel, with the same constants, the same arguments left out
and the same dtypes. Torch's own work on a fake GPU (tests/gpu_paths/fake_gpu.py) runs without it too. What is lost shows:
`make test` holds a bar on coverage, and tests/gpu_paths/report.py names lines.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
import sys
from collections.abc import Generator, Hashable
from typing import Any

import pytest

TRACED = {
    "test_driver",
    "test_memory",
    "test_run",
    "test_self_check",
    "test_self_check_of_runs",
    "test_step",
}
"""Files whose slow tests are traced too."""


def rests(item: pytest.Item) -> bool:
    """Whether the tracer rests in a test."""
    slow = item.get_closest_marker("slow") is not None and item.path.stem not in TRACED
    return slow or item.get_closest_marker("untraced") is not None


def kind(launcher: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Hashable:
    """What decides which lines of a kernel a launch runs."""
    values = {**dict(zip(launcher.arg_names, args, strict=False)), **given}
    fixed = {*launcher.constexprs, *(name for name, value in values.items() if value is None)}
    types = {
        name: repr(value) if name in fixed else str(getattr(value, "dtype", type(value)))
        for name, value in values.items()
    }
    return launcher.fn.__module__, launcher.fn.__qualname__, frozenset(types.items())


def resting(function: Any) -> Any:
    """The function without the tracer: for what is not ours, and calls nothing of ours."""

    @functools.wraps(function)
    def rested(*args: Any, **given: Any) -> Any:
        tracer = sys.gettrace()
        # Set and set back in one frame: the tracer counts the calls and returns that it sees.
        sys.settrace(None)
        try:
            return function(*args, **given)
        finally:
            sys.settrace(tracer)

    return rested


def sparing(launch: Any) -> Any:
    """A launch of Triton's interpreter that is traced once for each kind."""
    traced: set[Hashable] = set()
    rested = resting(launch)

    @functools.wraps(launch)
    def spared(self: Any, *args: Any, **given: Any) -> Any:
        if sys.gettrace() is None or (of_kind := kind(self, args, given)) in traced:
            return rested(self, *args, **given)
        traced.add(of_kind)
        return launch(self, *args, **given)

    return spared


def once() -> None:
    """Do here, under the tracer, what a process does a single time: a test that is not traced may be the first to do it."""
    import ect_kernels
    from ect_kernels import native
    from ect_kernels.testing import emulator

    for module in pkgutil.iter_modules(ect_kernels.__path__, "ect_kernels."):
        if not module.name.endswith("__main__") and "._cpu_" not in module.name:  # libraries, and no modules
            importlib.import_module(module.name)
    native._has_triton()
    with contextlib.suppress(FileNotFoundError):  # no compiler, no CUDA headers
        emulator.load("levels")


class Tracing:
    """A plugin of pytest: without pytest-cov it does nothing."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if sys.gettrace() is not None:
            once()
        interpreter: Any = sys.modules.get("triton.runtime.interpreter")
        if interpreter is not None and sys.gettrace() is not None:
            interpreter.GridExecutor.__call__ = sparing(interpreter.GridExecutor.__call__)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        coverage = getattr(item.config.pluginmanager.getplugin("_cov"), "cov_controller", None)
        if coverage is None or not rests(item):
            return (yield)
        coverage.pause()
        try:
            return (yield)
        finally:
            coverage.resume()
