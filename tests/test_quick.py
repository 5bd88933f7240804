"""The quick loop refuses what is slow and not marked so, names what comes near it, and keeps most tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFTEST = """
import pytest
from tests import quick

quick.SLOW, quick.REFUSED = 0.1, 0.4

def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true")

def pytest_configure(config):
    config.addinivalue_line("markers", "slow")
    config.pluginmanager.register(quick.Quick(config))
"""
TESTS = """
import time
import pytest

def work(seconds):
    start = time.process_time()
    while time.process_time() - start < seconds:
        pass

@pytest.mark.slow
def test_marked(): work(0.5)
def test_near(): work(0.2)
def test_hidden(): work(0.5)
@pytest.mark.parametrize("number", range({short}))
def test_short(number): time.sleep(0.001)
"""


def run(folder: Path, *options: str, short: int = 9) -> tuple[int, str]:
    """pytest on some tests: exit status and output."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text(TESTS.format(short=short))
    (folder / "pytest.ini").write_text("[pytest]\ntestpaths = test_it.py\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_what_is_slow_and_not_marked_is_refused(workers: str, tmp_path: Path) -> None:
    status, out = run(tmp_path, "--quick", "-n", workers)
    assert status == 1 and "11 passed" in out and "1 error" in out
    assert "ERROR test_it.py::test_hidden" in out and "is marked slow" in out
    assert "11 of 12 tests are not marked slow\n" in out
    assert "s, not marked slow: test_it.py::test_near" in out and "test_marked" not in out


@pytest.mark.slow
def test_without_the_option_it_is_named(tmp_path: Path) -> None:
    status, out = run(tmp_path)
    assert status == 0 and "12 passed" in out
    named = [line.rpartition("::")[2] for line in out.splitlines() if "not marked slow: " in line]
    assert named == ["test_hidden", "test_near"]


@pytest.mark.slow
@pytest.mark.parametrize(("short", "status"), [(4, 1), (5, 0)])
def test_too_many_marks_fail(short: int, status: int, tmp_path: Path) -> None:
    """One of 6 is more than 15 %, one of 7 is less."""
    found, out = run(tmp_path, "--quick", "--deselect", "test_it.py::test_hidden", short=short)
    assert found == status and ("85% must be" in out) == bool(status)


def test_the_core_is_files_that_exist() -> None:
    files = (ROOT / "tests/core.txt").read_text(encoding="utf-8").split()
    assert len(files) > 20 and all((ROOT / file).is_file() for file in files)
