"""tests/tracing.py: what is traced for coverage, and what need not be."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tracing import TRACED, Tracing, sparing

pytestmark = pytest.mark.untraced  # here stands another tracer


def kernel() -> None:
    """Stands for one of Triton's."""


class Launcher:
    """As Triton's GridExecutor."""

    arg_names, constexprs, fn = ("x", "n", "BLOCK"), ["BLOCK"], staticmethod(kernel)

    @sparing
    def __call__(self, *args: Any, **given: Any) -> Any:
        self.fn()
        return sys.gettrace()


@pytest.fixture
def traced() -> Iterator[Callable[[], int]]:
    """How often the kernel was called under the tracer."""
    calls: list[FrameType] = []

    def tracer(frame: FrameType, event: str, value: Any) -> Any:
        calls.extend([frame] if event == "call" and frame.f_code is kernel.__code__ else [])
        return tracer

    before = sys.gettrace()
    sys.settrace(tracer)
    yield lambda: len(calls)
    sys.settrace(before)


def test_a_launch_is_traced_once_for_each_kind(traced: Callable[[], int]) -> None:
    launch, half = Launcher(), torch.zeros(2, dtype=torch.float16)
    tracer = sys.gettrace()
    kinds = [
        ((torch.zeros(3), 3), {"BLOCK": 8}),
        ((half, 3), {"BLOCK": 8}),  # another dtype
        ((None, 3), {"BLOCK": 8}),  # an argument left out
        ((torch.zeros(3), None), {"BLOCK": 8}),
        ((torch.zeros(3), 3), {"BLOCK": 16}),  # another constant
        ((torch.zeros(3), 3.0), {"BLOCK": 8}),
    ]
    for count, (args, given) in enumerate(kinds, 1):
        assert launch(*args, **given) is tracer and traced() == count
        assert launch(*args, **given) is None and traced() == count
    assert launch(torch.ones(9), 9, BLOCK=8) is None  # other values and shapes
    assert sys.gettrace() is tracer


def test_the_exceptions_are_files_of_tests() -> None:
    assert {path.stem for path in Path(__file__).parent.rglob("test_*.py")} >= TRACED


def test_the_tracer_comes_back_after_a_launch_that_fails(traced: Callable[[], int]) -> None:
    launch, tracer = Launcher(), sys.gettrace()
    launch(1, 2, BLOCK=32)
    launch.fn = SimpleNamespace(__module__=kernel.__module__, __qualname__=kernel.__qualname__)  # type: ignore[assignment]
    with pytest.raises(TypeError):
        launch(1, 2, BLOCK=32)
    assert sys.gettrace() is tracer


@pytest.mark.parametrize(
    ("mark", "file", "marked"),
    [
        (None, "test_a.py", False),
        ("untraced", "test_a.py", True),
        ("slow", "test_a.py", True),
        ("slow", "test_run.py", False),
        ("untraced", "test_run.py", True),
    ],
)
def test_coverage_rests_in_a_test_that_is_marked(mark: str | None, file: str, marked: bool) -> None:
    seen: list[str] = []
    coverage = SimpleNamespace(pause=lambda: seen.append("pause"), resume=lambda: seen.append("resume"))
    plugins = {"_cov": SimpleNamespace(cov_controller=coverage)}
    item: Any = SimpleNamespace(
        config=SimpleNamespace(pluginmanager=SimpleNamespace(getplugin=plugins.get)),
        get_closest_marker=lambda name: name if name == mark else None,
        path=Path("tests", file),
    )
    protocol = Tracing().pytest_runtest_protocol(item)
    next(protocol)
    assert seen == (["pause"] if marked else [])
    with pytest.raises(KeyError):  # whatever happens
        protocol.throw(KeyError())
    assert seen == (["pause", "resume"] if marked else [])
    plugins.clear()  # without pytest-cov
    next(protocol := Tracing().pytest_runtest_protocol(item))
    with pytest.raises(StopIteration):
        protocol.send(True)
