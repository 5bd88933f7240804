"""Docstrings are sentences: a function's begins with a verb, and none only finishes the name above it."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VERBS = {
    "Add", "Append", "Apply", "Ask", "Attend", "Bound", "Bring", "Build", "Call", "Catch", "Change", "Check",
    "Choose", "Compare", "Compile", "Compute", "Convolve", "Copy", "Count", "Create", "Do", "Download",
    "Downsample", "Draw", "End", "Fill", "Filter", "Fit", "Flatten", "Generate", "Give", "Go", "Group", "Hold",
    "Invert", "Join", "Keep", "Launch", "Lay", "Let", "Limit", "Listen", "Load", "Make", "Measure", "Move", "Multiply",
    "Name", "Note", "Order", "Plot", "Predict", "Print", "Profile", "Put", "Raise", "Rate", "Read", "Record",
    "Refuse", "Register", "Remove", "Replace", "Report", "Resample", "Return", "Round", "Run", "Say", "Set", "Show",
    "Split", "Stop", "Sum", "Train", "Transform", "Turn", "Update", "Upsample", "Use", "Wait", "Walk", "Write",
    "Yield",
}  # fmt: skip
FRAGMENT = re.compile(
    r"(What|Which|Why|Whether|Where|How|Who|When|Of|By|In|With|For|From|At|To|As|Its?|Those|That|Until|Without|Beside)\b"
)


FOLDERS = [ROOT / name for name in ("benchmarks", "ect", "kernels")]
FILES = sorted(
    [ROOT / "setup.py", ROOT / "csrc/targets.py", *(path for folder in FOLDERS for path in folder.rglob("*.py"))]
)


def docstrings(path: Path) -> Iterator[tuple[str, str, bool]]:
    """Yield (place, docstring, whether it is a function's that is called) of all that a file has, attributes included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
            decorators = map(ast.unparse, getattr(node, "decorator_list", ()))
            called = isinstance(node, ast.FunctionDef) and not any("property" in name for name in decorators)
            yield f"{path.relative_to(ROOT)}:{getattr(node, 'name', '')}", text, called
        body = getattr(node, "body", None)
        for target, below in itertools.pairwise(body if isinstance(body, list) else []):
            if isinstance(target, (ast.Assign, ast.AnnAssign)) and isinstance(below, ast.Expr):
                text = ast.literal_eval(below.value) if isinstance(below.value, ast.Constant) else ""
                yield f"{path.relative_to(ROOT)}:{target.lineno}", str(text), False


def faults(place: str, text: str, called: bool) -> list[str]:
    """Return what is wrong with a docstring; a verb that is not in VERBS may be added there."""
    first = re.split(r"\W", text, maxsplit=1)[0]
    if called and first not in VERBS:
        return [f"{place}: begins with {first!r}, which is no verb of VERBS: {text.splitlines()[0]}"]
    return [f"{place}: only finishes the name: {text.splitlines()[0]}"] if FRAGMENT.match(text) else []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_are_sentences(path: Path) -> None:
    assert [fault for found in docstrings(path) for fault in faults(*found)] == []


def test_an_attribute_has_its_docstring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "a.py").write_text('A = 1\n"""Of a tile."""\nclass B:\n    b: int\n    """Which tile."""\n')
    assert [(place, text) for place, text, _ in docstrings(tmp_path / "a.py")] == [
        ("a.py:1", "Of a tile."), ("a.py:4", "Which tile."),
    ]  # fmt: skip


def test_a_fragment_is_a_fault() -> None:
    assert faults("a", "Of a tile.", False) and faults("a", "The width of a tile.", True)
    assert not faults("a", "Return the width of a tile.", True) and not faults("a", "A tile.", False)
    assert len(FILES) > 80
