"""The short form of all drills, a test for each case."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.drills.drill import DRILLS, Drill
from tests.drills.runs import Ground, Skipped

CASES = [pytest.param(drill, number, id=f"{drill.name} {number}") for drill in DRILLS for number in range(drill.short)]


@pytest.fixture(scope="session")
def ground() -> Iterator[Ground]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            held = Ground(Path(folder))
        except Skipped as reason:
            pytest.skip(str(reason))
        yield held


@pytest.mark.slow
@pytest.mark.parametrize(("drill", "number"), CASES)
def test_a_run_stands(drill: Drill, number: int, ground: Ground) -> None:
    try:
        drill.case(ground, number, drill.short)
    except Skipped as reason:
        pytest.skip(str(reason))
