"""docs/extending.md shows the files of this folder, letter by letter, and no other code."""

from __future__ import annotations

import re
from pathlib import Path

from tests.extending.loaded import FOLDER

ADDITIONS = ("objective", "network", "sampler", "metric", "op")


def test_the_code_of_the_page_is_the_tested_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
    shown = re.findall(r"^`tests/extending/(\w+)\.py`:\n\n```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert shown == [(name, (FOLDER / f"{name}.py").read_text(encoding="utf-8")) for name in ADDITIONS]
    assert page.count("```") == 2 * len(ADDITIONS)


def test_each_addition_has_a_test() -> None:
    assert {path.stem for path in FOLDER.glob("test_*.py")} == {f"test_{name}" for name in (*ADDITIONS, "page")}
