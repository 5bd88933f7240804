"""The Triton kernels keep to what the oldest Triton can compile that pyproject.toml admits, 3.2.

It is not installed beside the tests. Two things that it does not know have stood here before, and are sought in the source: it
keeps no tuple in a variable, and it evaluates both sides of an `and`, the second also where the first is false.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

KERNELS = sorted((Path(__file__).parents[2] / "kernels/ect_kernels").glob("*_triton.py"))


def jitted(source: str) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(mark) for mark in node.decorator_list):
            yield node


def faults(source: str) -> list[str]:
    """What Triton 3.2 does not compile, as source."""
    found: list[str] = []
    for function in jitted(source):
        for node in ast.walk(function):
            kept = isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
            if kept and not all(isinstance(target, ast.Tuple) for target in node.targets):  # type: ignore[union-attr]
                found.append(ast.unparse(node))
            both = isinstance(node, ast.BoolOp) and "tl." in ast.unparse(node.values[-1])
            if both and any("None" in ast.unparse(value) for value in node.values[:-1]):  # type: ignore[union-attr]
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_compile_in_the_oldest_triton(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert list(jitted(source)) or "gn_triton" in source
    assert faults(source) == []


def test_the_two_faults_are_found() -> None:
    source = """
@triton.jit
def kernel(flip, n):
    values = ()
    a, b = 1, 2
    if flip is not None and tl.load(flip + n) != 0:
        pass
    if flip is not None and n is not None:
        pass
"""
    assert faults(source) == ["values = ()", "flip is not None and tl.load(flip + n) != 0"]
