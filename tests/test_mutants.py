"""The mutants that `make mutants` makes: what is changed, that the same ones are made each time, and what kills them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests import mutants

SOURCE = '''
def rate(n: int = 3, on: bool = True) -> "int | None":
    """Up to 5."""
    if not on or n < 2:
        raise ValueError(f"{n + 1} is not {2 * 3}")
    total = min(-n, n / 2)
    total += n
    note(total, Path("a") / "b")
    warn(4)
    return total
'''


def test_every_operator_number_condition_and_call_is_changed() -> None:
    found = [mutant.change for mutant in mutants.mutants("f.py", SOURCE)]
    assert sorted(found) == sorted([
        "3 -> 4", "True -> False", "not on or n < 2 -> (not on and n < 2)", "not on -> (on)", "n < 2 -> (n <= 2)", "2 -> 3",
        "min -> max", "-n -> (n)", "n / 2 -> (n * 2)", "2 -> 3", "total += n -> pass", 'note(total, Path("a") / "b") -> pass',
    ])  # fmt: skip


def test_an_edit_elsewhere_leaves_the_others_in_place() -> None:
    before = mutants.ranked(mutants.mutants("f.py", SOURCE), 7)
    after = mutants.ranked(mutants.mutants("f.py", "import os\n" + SOURCE), 7)
    assert [m.change for m in before] == [m.change for m in after]
    assert [m.change for m in before] != [m.change for m in mutants.ranked(mutants.mutants("f.py", SOURCE), 8)]


def test_the_projects_own_are_forty_and_parse() -> None:
    picked = mutants.chosen(0, mutants.COUNT)
    assert picked == mutants.chosen(0, mutants.COUNT)
    assert len(set(picked)) == mutants.COUNT and {area for area, _ in picked} == set(mutants.AREAS)
    for area, mutant in picked:
        text = (mutants.ROOT / mutant.file).read_bytes()
        changed = text[: mutant.start] + mutant.new.encode() + text[mutant.end :]
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text)), mutant
        assert mutants.files_of_tests(area)


def test_what_is_called_equivalent_exists() -> None:
    paths = [path for area in mutants.AREAS for path in mutants.files(area)]
    every = [m for p in paths for m in mutants.mutants(p.relative_to(mutants.ROOT).as_posix(), p.read_text())]
    assert set(mutants.EQUIVALENT) <= {(m.file, m.function, m.change) for m in every}


@pytest.mark.slow
@pytest.mark.parametrize(("test", "status", "said"), [("f(2) == 3", 0, "1 of 1"), ("f(2) > 0", 1, "0 of 1")])
def test_a_mutant_dies_where_a_test_fails(
    test: str,
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "rule.py").write_text("def f(n):\n    return n + 1\n")
    (tmp_path / "tests/test_rule.py").write_text(f"from rule import f\n\n\ndef test_f():\n    assert {test}\n")
    for name, value in {"ROOT": tmp_path, "AREAS": {"rule": ["test_rule"]}, "ALLOWED": 0, "EQUIVALENT": {}}.items():
        monkeypatch.setattr(mutants, name, value)
    assert mutants.main(["--count", "1", "--jobs", "1"]) == status
    out = capsys.readouterr().out
    assert f"{said} mutants killed" in out and "rule.py:2 (f)" in out and ("SURVIVED" in out) == bool(status)
    assert (tmp_path / "rule.py").read_text() == "def f(n):\n    return n + 1\n"
    (tmp_path / "rule.py").write_text("def f(n):\n    return 0\n")
    with pytest.raises(SystemExit, match="fail on the code as it is"):
        mutants.main(["--count", "1"])
