"""The arrows between modules: who may import whom. A new arrow belongs here first."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENTRY_POINTS = {"ect.train", "ect.sample", "ect.evaluate"}
ENTRY_POINTS |= {
    f"ect.{name}.__main__" for name in ("convert", "data.imagenet", "doctor", "merge", "scaling", "tangent")
}
LIGHT = {
    "ect.config",
    "ect.config.emas",
    "ect.errors",
    "ect.options",
    "ect.presets",
    "ect.schedule",
    "ect.train",
}  # import no torch
WINGS = {  # wing -> what else of ect its modules may import: other wings, and files that lie in ect/ itself
    "config": {"errors"},
    "cost": {
        "assembly",
        "config",
        "data",
        "errors",
        "files",
        "models",
        "objective",
        "optim",
        "precision",
        "presets",
        "show",
        "step",
        "tangent",
    },
    "convert": {"errors", "files", "ranks"},
    "data": {"config", "errors", "files", "ranks"},
    "doctor": {"config", "errors", "files", "ranks", "show"},
    "files": {
        "assembly",
        "config",
        "data",
        "errors",
        "models",
        "objective",
        "options",
        "precision",
        "presets",
        "ranks",
        "sampler",
        "tangent",
    },
    "merge": {"config", "errors", "files", "options", "precision", "ranks", "sampler", "search", "show"},
    "metrics": {"config", "data", "errors", "files", "models", "ranks", "sampler"},
    "models": {"config", "errors"},
    "objectives": {"data", "objective"},  # its `weights` import nothing of ect: ect.objective imports them
    "optim": set(),
    "presets": {"config"},
    "ranks": {"config", "errors", "models", "optim", "precision", "step"},
    "scaling": {
        "assembly",
        "config",
        "cost",
        "data",
        "errors",
        "files",
        "metrics",
        "options",
        "presets",
        "ranks",
        "search",
        "show",
    },
    "search": {"config", "data", "errors", "files", "metrics", "models", "ranks", "sampler", "show"},
    "show": {
        "config",
        "data",
        "errors",
        "files",
        "metrics",
        "models",
        "objectives",
        "options",
        "precision",
        "presets",
        "ranks",
        "sampler",
    },
    "tangent": {"config", "data", "errors", "files", "ranks"},
}
DENOISER_ONLY = {"ect.objective", "ect.objectives.direction"}  # take a callable, not a network
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


def arrows() -> dict[str, set[str]]:
    """module -> modules of ect that it imports; of a package that only leads to a module, the module alone."""
    found = {name: imports(path) & ECT.keys() - {name, "ect"} for name, path in ECT.items()}
    return {
        name: {one for one in names if not any(other.startswith(f"{one}.") for other in names)}
        for name, names in found.items()
    }


@pytest.mark.parametrize("wing", [path.parent.name for path in sorted((ROOT / "ect").glob("*/__init__.py"))])
def test_a_wing_imports_what_it_may(wing: str) -> None:
    inside = {name: found for name, found in arrows().items() if name.split(".")[1:2] == [wing]}
    others = {found.split(".")[1] for names in inside.values() for found in names} - {wing}
    assert others <= WINGS[wing]


def test_no_module_imports_itself_through_others() -> None:
    graph = arrows()
    while leaves := {name for name, found in graph.items() if not found & graph.keys()}:
        graph = {name: found for name, found in graph.items() if name not in leaves}
    assert not graph, "a circle among, or behind, these"


@pytest.mark.parametrize("name", sorted(LIGHT))
def test_light_modules_import_no_torch(name: str) -> None:
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", sorted(DENOISER_ONLY))
def test_objective_knows_no_network(name: str) -> None:
    assert not any(found.startswith("ect.models") for found in imports(ECT[name]))


@pytest.mark.slow
def test_one_closed_reader_touches_pickles() -> None:
    assert {name for name, path in ECT.items() if "pickletools" in imports(path)} == {"ect.files.safe_pickle"}
    for name, path in ECT.items():
        used = {
            node.attr
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pickle"
        }
        assert used <= {"UnpicklingError"}, name  # what torch.load(weights_only=True) raises
        assert not any(found.startswith("pickle.") for found in imports(path)), name


@pytest.mark.parametrize("folder", ["ect", "kernels", "benchmarks", "tests"])
def test_files_stay_short(folder: str) -> None:
    long = {p.name: n for p in (ROOT / folder).rglob("*.py") if (n := len(p.read_text().splitlines())) > MAX_LINES}
    assert not long
