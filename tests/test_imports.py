"""The arrows between modules: who may import whom. A new arrow belongs here first."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENTRY_POINTS = {"ect.train", "ect.sample", "ect.evaluate", "ect.convert"}
LIGHT = {"ect.config", "ect.errors", "ect.options", "ect.schedule", "ect.train"}  # import no torch
DENOISER_ONLY = {"ect.objective"}  # take a callable, not a network
MAX_LINES = 400


def modules(folder: str, source: Path) -> dict[str, Path]:
    return {
        ".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


ECT = modules("ect", ROOT)
KERNELS = modules("kernels/ect_kernels", ROOT / "kernels")
BENCHMARKS = modules("benchmarks", ROOT)


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_never_import_the_trainer(name: str) -> None:
    assert "ect" not in roots(KERNELS[name])


@pytest.mark.parametrize("name", [*ECT, *KERNELS, *BENCHMARKS])
def test_nobody_imports_an_entry_point_tests_or_benchmarks(name: str) -> None:
    path = {**ECT, **KERNELS, **BENCHMARKS}[name]
    assert not imports(path) & (ENTRY_POINTS - {name})
    assert not roots(path) & {"tests", "benchmarks"}


@pytest.mark.parametrize("name", sorted(LIGHT))
def test_light_modules_import_no_torch(name: str) -> None:
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", sorted(DENOISER_ONLY))
def test_objective_knows_no_network(name: str) -> None:
    assert not any(found.startswith("ect.models") for found in imports(ECT[name]))


def test_only_closed_readers_touch_pickles() -> None:
    calls = ("pickle.Unpickler", "pickle.load(", "pickle.loads(")
    readers = {name for name, path in ECT.items() if any(call in path.read_text() for call in calls)}
    assert readers <= {"ect.files.safe_pickle", "ect.data.readers.cifar10"}


@pytest.mark.parametrize("folder", ["ect", "kernels", "benchmarks", "tests"])
def test_files_stay_short(folder: str) -> None:
    long = {p.name: n for p in (ROOT / folder).rglob("*.py") if (n := len(p.read_text().splitlines())) > MAX_LINES}
    assert not long
