"""Every op is in every place that must know it; an op that is not is told each place by name."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from ect_kernels.choice import OPS
from ect_kernels.dispatch import OPS as REGISTERED
from ect_kernels.dispatch import Backend, Op

from tests.extending.loaded import added, forgotten
from tests.kernels.places import NO_FORM, PLACES, Place, missing

ROOT = Path(__file__).parents[2]
MODEL, TOY = "perturb", "brighten"  # an op that no place excuses, and the name under which it is new


@pytest.mark.parametrize("op", OPS)
def test_every_place_knows_the_op(op: str) -> None:
    assert importlib.import_module(f"ect_kernels.{op}").OP is REGISTERED[op]
    assert missing(REGISTERED[op], ROOT) == []


def test_no_op_is_left_out_of_the_list() -> None:
    files = sorted((ROOT / "kernels" / "ect_kernels").glob("*.py"))
    declared = {file.stem for file in files if re.search(r"^OP = Op\(", file.read_text(encoding="utf-8"), re.MULTILINE)}
    assert declared == set(OPS) and MODEL in declared


def test_no_excuse_outlives_its_reason() -> None:
    for op, form in NO_FORM:
        assert form not in REGISTERED[op].backends
    assert not [(op, place.path) for place in PLACES for op in place.without if place.found(ROOT, op)]
    assert all(MODEL not in place.without for place in PLACES)


def test_an_op_from_outside_is_told_what_it_lacks() -> None:
    """The example of docs/extending.md: it works, in one form, and no place knows it."""
    with added("op") as own:
        found = missing(own.OP, ROOT)
    forms = [place for place in found if place.startswith("a form in ")]
    assert [place.split()[3].rstrip(",") for place in forms] == ["native", "triton", "cuda"]
    assert found[3:] == [place.file("scale_rows") for place in PLACES if place.form is None]


def tree(root: Path, without: Place | None) -> None:
    """Make the places of a toy op, all but one: the model's, under another name."""
    for place in PLACES:
        text = (ROOT / place.file(MODEL)).read_text(encoding="utf-8")
        path = root / place.file(TOY)
        path.parent.mkdir(parents=True, exist_ok=True)
        if place is not without:
            path.write_text(text.replace(MODEL, TOY), encoding="utf-8")
        elif "<op>" not in place.path:
            path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("left_out", [None, *PLACES], ids=lambda place: place.path if place else "nothing")
def test_a_toy_op_lacks_what_was_left_out_and_nothing_else(left_out: Place | None, tmp_path: Path) -> None:
    tree(tmp_path, left_out)
    with forgotten():
        toy = Op(TOY, dict.fromkeys(("reference", "native", "triton", "cuda"), Backend(lambda *args: None)))
        assert missing(toy, tmp_path) == ([] if left_out is None else [left_out.file(TOY)])


def test_the_checklist_of_the_docs_is_the_list() -> None:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    section = text.split("\n## An op\n")[1].split("\n## ")[0]
    assert re.findall(r"^- \[ \] `([^`]+)`", section, re.MULTILINE) == [place.path for place in PLACES]
    assert "(docs/extending.md#an-op)" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
