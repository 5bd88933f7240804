"""The tests that need a GPU: they run with what a bare machine has, on exact products, and each has a twin that needs none."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from ect import precision
from tests.conftest import FLAGS

ROOT = Path(__file__).parents[1]
COLLECT = """
import json, sys

class Absent:  # what a machine with torch and pytest alone lacks
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"tyro", "sklearn", "scipy", "torch_fidelity", "torchvision", "tensorboard", "matplotlib",
                                  "pytest_cov", "pybind11", "ninja"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

class Told:
    def pytest_collection_finish(self, session):
        for item in session.items:
            marks = [mark.kwargs.get("twin") for mark in item.iter_markers("gpu")]
            name = item.nodeid.split("[")[0]
            sys.__stderr__.write(json.dumps([name, bool(marks), next(filter(None, marks), None)]) + "\\n")

sys.meta_path.insert(0, Absent())
import pytest
sys.exit(pytest.main(["--collect-only", "-q", *sys.argv[1:]], plugins=[Told()]))
"""


def make(folder: Path, *options: str) -> str:
    """What `make test-gpu` would run there."""
    command = ["make", "--no-print-directory", "-n", "test-gpu", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def gpu_files() -> list[str]:
    return sorted(word for word in make(ROOT).split() if word.endswith(".py"))


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_test_gpu_installs_nothing(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_it.py").write_text("@pytest.mark." + "gpu")  # apart, or this file were one of them
    (tmp_path / "tests/test_other.py").touch()
    assert make(tmp_path, "PYTHON=some-python") == "some-python -m pytest -m gpu tests/test_it.py\n"
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").touch()
    assert make(tmp_path, "PYTHON=some-python") == ".venv/bin/python -m pytest -m gpu tests/test_it.py\n"
    assert len(gpu_files()) >= 10 and "tests/test_gpu.py" in gpu_files()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_each_has_a_twin_and_needs_torch_and_pytest_alone() -> None:
    """A twin: the same test on a case that is not marked, or the test that the mark names."""
    command = [sys.executable, "-c", COLLECT, *gpu_files()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    kinds: dict[str, set[bool]] = defaultdict(set)
    twins: dict[str, str] = {}
    for line in done.stderr.splitlines():
        if line.startswith("["):
            name, marked, twin = json.loads(line)
            kinds[name].add(marked)
            if twin is not None:
                twins[name] = twin
    marked = [name for name, seen in kinds.items() if True in seen]
    assert len(marked) > 30
    assert [name for name in marked if False not in kinds[name] and name not in twins] == []
    for file, _, function in (twin.partition("::") for twin in twins.values()):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert function in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)], (file, function)


def exact() -> list[bool]:
    return [bool(getattr(where, name)) for where, name in FLAGS]


@pytest.mark.parametrize("order", ["before", "after"])
def test_products_are_exact_and_repeatable_in_every_test(order: str) -> None:
    """Whatever the test before did: the first of these two leaves TF32 and cuDNN's trials on."""
    names = [name for _, name in FLAGS]
    assert dict(zip(names[:3], exact()[:3], strict=True)) == {
        "allow_tf32": False,
        "deterministic": True,
        "benchmark": False,
    }
    assert not any(exact()[3:])
    precision.apply(precision.PRECISIONS["tf32"])
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
