"""Docstrings are sentences: a function's begins with a verb, and none only finishes the name above it."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
VERBS = {
    "Add", "Append", "Apply", "Ask", "Attend", "Bound", "Bring", "Build", "Call", "Catch", "Change", "Check",
    "Choose", "Compare", "Compile", "Compute", "Convolve", "Copy", "Count", "Create", "Do", "Download",
    "Downsample", "Draw", "End", "Fill", "Filter", "Fit", "Flatten", "Generate", "Give", "Group", "Invert", "Join",
    "Keep", "Launch", "Lay", "Let", "Load", "Make", "Measure", "Move", "Multiply", "Name", "Note", "Plot",
    "Predict", "Print", "Profile", "Put", "Raise", "Rate", "Read", "Record", "Refuse", "Register", "Remove",
    "Replace", "Report", "Resample", "Return", "Round", "Run", "Say", "Set", "Show", "Split", "Stop", "Sum",
    "Train", "Transform", "Turn", "Update", "Upsample", "Use", "Wait", "Walk", "Write", "Yield",
}  # fmt: skip
FRAGMENT = re.compile(
    r"(What|Which|Why|Whether|Where|How|Who|When|Of|By|In|With|For|From|At|To|As|Its?|Those|That|Until|Without|Beside)\b"
)


def waiting(path: Path) -> bool:
    """Say whether pyproject.toml lets the docstrings of a file wait."""
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]
    return "D401" in ruff["lint"]["per-file-ignores"].get(path.relative_to(ROOT).as_posix(), ())


FOLDERS = [ROOT / name for name in ("benchmarks", "ect", "kernels")]
PATHS = [ROOT / "setup.py", ROOT / "csrc/targets.py", *(path for folder in FOLDERS for path in folder.rglob("*.py"))]
FILES = sorted(path for path in PATHS if not waiting(path))


def docstrings(path: Path) -> Iterator[tuple[str, str, bool]]:
    """Yield (place, docstring, whether it is a function's that is called) of all that a file has."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
            decorators = map(ast.unparse, getattr(node, "decorator_list", ()))
            called = isinstance(node, ast.FunctionDef) and not any("property" in name for name in decorators)
            yield f"{path.relative_to(ROOT)}:{getattr(node, 'name', '')}", text, called


def faults(place: str, text: str, called: bool) -> list[str]:
    """Return what is wrong with a docstring; a verb that is not in VERBS may be added there."""
    first = re.split(r"\W", text, maxsplit=1)[0]
    if called and first not in VERBS:
        return [f"{place}: begins with {first!r}, which is no verb of VERBS: {text.splitlines()[0]}"]
    return [f"{place}: only finishes the name: {text.splitlines()[0]}"] if FRAGMENT.match(text) else []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_are_sentences(path: Path) -> None:
    assert [fault for found in docstrings(path) for fault in faults(*found)] == []


def test_a_fragment_is_a_fault() -> None:
    assert faults("a", "Of a tile.", False) and faults("a", "The width of a tile.", True)
    assert not faults("a", "Return the width of a tile.", True) and not faults("a", "A tile.", False)
    assert len(FILES) > 80
