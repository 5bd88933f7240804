"""setup.py: which GPUs it builds for, and that whatever stands in the way costs the extension and never the install."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import setuptools
import torch
from ect_kernels import build_record, native
from ect_kernels.__main__ import built

from tests.kernels.machine import COMPILE, LIST_80_90, ROOT, Machine, env, gpus, tool, without

NEEDS_NINJA = pytest.mark.skipif(
    importlib.util.find_spec("ninja") is None and shutil.which("ninja") is None, reason="needs ninja"
)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module; setup() does nothing, and no tool is found."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("ECT_CUDA_ARCHS", "CUDA_HOME", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    spec = importlib.util.spec_from_file_location("ect_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "USUAL", Path("/nowhere/cuda"))
    return module


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


OLD_GCC = (
    LIST_80_90
    + 'echo "host_config.h:138:2: error: #error -- unsupported GNU version! gcc versions later than 13" >&2\n'
    'echo "In file included from x.cu"; exit 1\n'
)
HALF_MADE = COMPILE + 'echo "ld: error: no space left on device"; exit 1\n'
CANNOT = {
    "compute capability 7.5": (gpus("7.5"), "sm_75 is too old, the kernels need sm_80 or newer"),
    "compute capability 7.0": (gpus("7.0"), "sm_70 is too old, the kernels need sm_80 or newer"),
    "nonsense": (env(ECT_CUDA_ARCHS="ninety"), "ECT_CUDA_ARCHS: cannot read 'ninety', expected compute capabilities"),
    "nvcc of long ago": (tool("nvcc", "echo sm_52\n"), "this nvcc knows no sm_80; install a newer CUDA toolkit"),
    "nvcc that fails": (tool("nvcc", "exit 3\n"), "does not work"),
    "nvcc that is no program": (lambda machine: (machine.home / "bin/nvcc").chmod(0o644), "does not work"),
    "no nvcc": (without("bin/nvcc"), "cuda home has no bin/nvcc; unset it, or name the folder of a CUDA toolkit"),
    "no headers": (without("include/cuda_runtime_api.h"), "no cuda_runtime_api.h beside it; install the whole CUDA"),
    "no cudart": (without("lib64/libcudart_static.a"), "no libcudart_static.a beside it; install the whole CUDA"),
    "no C++ compiler": (without("bin/c++"), "there is no C++ compiler 'c++'; install g++, or name one by CXX"),
    "a C++ compiler by name": (env(CXX="g++-99"), "there is no C++ compiler 'g++-99'"),
    "no pybind11": (tool("../python/pybind11.py", "raise ImportError\n"), "pybind11 is not installed"),
    "ninja fails": (lambda machine: machine.file("python/ninja.py", "raise SystemExit('ninja: no')"), "ninja: no"),
    "ECT_SKIP_CUDA": (env(ECT_SKIP_CUDA="1"), "ECT_SKIP_CUDA=1 left them out"),
    "nvcc refuses g++": (tool("nvcc", OLD_GCC), "error: #error -- unsupported GNU version! gcc versions later than 13"),
    "the link fails": (tool("c++", HALF_MADE), "ld: error: no space left on device"),
}


@pytest.mark.parametrize(
    ("case", "required"), [*((case, "0") for case in CANNOT), ("no nvcc", "1"), ("nvcc refuses g++", "1")]
)
@NEEDS_NINJA
def test_what_cannot_be_built_is_left_out_loudly(machine: Machine, case: str, required: str) -> None:
    spoil, reason = CANNOT[case]
    spoil(machine)
    machine.env["ECT_CUDA_REQUIRED"] = required
    done = machine.build("-b", str(machine.folder / "lib"))
    assert done.returncode == int(required), done.stderr
    said = {"0": "*** ect: the CUDA kernels were NOT built:", "1": "cannot be built, and ECT_CUDA_REQUIRED=1:"}
    assert said[required] in done.stderr and reason in done.stderr and "Traceback" not in done.stderr
    assert reason in build_record.why_not_built(machine.folder / "lib/ect_kernels")
    assert not list((machine.folder / "lib").rglob("_C*.so"))


# (ECT_CUDA_ARCHS, what nvidia-smi says, targets where nvcc knows 75, 80, 86, 90 and 100, what is said about the rest)
TARGETS = {
    "no GPU": ("", [], [(80, 0), (90, 90)], ""),
    "an A100": ("", ["8.0"], [(80, 80)], ""),
    "three GPUs of two kinds": ("", ["9.0", "8.0", "9.0"], [(80, 0), (90, 90)], ""),
    "a T4": ("", ["7.5"], [], "sm_75 is too old, the kernels need sm_80 or newer"),
    "a T4 beside an A100": ("", ["7.5", "8.0"], [(80, 80)], "sm_75 is too old, the kernels need sm_80 or newer"),
    "a GPU newer than nvcc": ("", ["12.0"], [(100, 100)], "this nvcc knows no sm_120, which gets the PTX of sm_100"),
    "a GPU that nvcc skips": ("", ["8.9", "9.0"], [(86, 86), (90, 90)], "knows no sm_89, which gets the PTX of sm_86"),
    "no answer": ("", ["[N/A]"], [(80, 0), (90, 90)], ""),
    "half an answer": ("", ["[N/A]", "8.0"], [(80, 80)], ""),
    "native": ("native", ["8.0"], [(80, 80)], ""),
    "native without a GPU": ("native", [], [(80, 0), (90, 90)], ""),
    "native and one more": ("native;90", ["8.0"], [(80, 0), (90, 90)], ""),
    "one": ("80", ["9.0"], [(80, 80)], ""),
    "with points": ("8.6;9.0", [], [(86, 0), (90, 90)], ""),
    "with commas": ("90, 80", [], [(80, 0), (90, 90)], ""),
    "with spaces": (" 9.0 8.0 ", [], [(80, 0), (90, 90)], ""),
    "a semicolon at the end": ("100;80;", [], [(80, 0), (100, 100)], ""),
    "three digits": ("10.0", [], [(100, 100)], ""),
    "PTX": ("8.0+PTX", [], [(80, 80)], ""),
    "PTX of the older": ("8.0+PTX;9.0", [], [(80, 80), (90, 0)], ""),
    "90a": ("90a", [], [(90, 90)], ""),
    "nvcc's words": ("sm_80,compute_90", [], [(80, 0), (90, 90)], ""),
    "too old beside good": ("7.5;8.0", [], [(80, 80)], "sm_75 is too old"),
    "nonsense beside good": ("80;x", [], [(80, 80)], "cannot read 'x'"),
    "nonsense": ("ninety", ["8.0"], [], "cannot read 'ninety'"),
    "too large": ("800", [], [], "cannot read '800'"),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets(script: ModuleType, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    text, gpus, want, said = TARGETS[case]
    monkeypatch.setattr(script.targets, "present", lambda: gpus)
    asked, unread = script.targets.wanted(text)
    built, notes = script.targets.buildable(asked, [75, 80, 86, 90, 100])
    assert built == want and said in "; ".join(unread + notes) and bool(unread + notes) == bool(said)


@pytest.mark.parametrize(
    ("said", "want", "loudly"),
    [
        (["7.5", "8.0"], {"compute_80,code=sm_80", "compute_80,code=compute_80"}, "sm_75 is too old"),
        (["12.0"], {"compute_90,code=sm_90", "compute_90,code=compute_90"}, "which gets the PTX of sm_90"),
        (None, {"compute_80,code=sm_80", "compute_90,code=sm_90", "compute_90,code=compute_90"}, ""),  # it fails
    ],
)
@NEEDS_NINJA
def test_builds_for_the_gpus_present(machine: Machine, said: list[str] | None, want: set[str], loudly: str) -> None:
    gpus(*said)(machine) if said is not None else machine.tool("nvidia-smi", "echo 8.0; exit 9\n")
    machine.env["ECT_CUDA_REQUIRED"] = "1"
    done = machine.build("-b", str(machine.folder / "lib"))
    assert done.returncode == 0, done.stderr
    assert machine.targets() == {f"arch={arch}" for arch in want}
    assert loudly in done.stderr and ("***" in done.stderr) == bool(loudly)
    assert "ect: built the CUDA kernels for sm_" in done.stderr
    (module,) = (machine.folder / "lib").rglob("_C*.so")
    assert module.read_text() == "made\n" and not list(module.parent.glob("*.txt"))


@NEEDS_NINJA
def test_the_compiler_is_told_to_nvcc(machine: Machine) -> None:
    machine.tool("g++-13", COMPILE)
    machine.env["CXX"] = "g++-13"
    assert machine.build("-b", str(machine.folder / "lib")).returncode == 0
    assert f"-ccbin {machine.home}/bin/g++-13" in (machine.folder / "log").read_text()


@pytest.mark.slow
@NEEDS_NINJA
def test_a_failed_build_in_place_leaves_no_older_extension(machine: Machine) -> None:
    """As `pip install -e .` does it: the file beside the sources is this build's, or none with the reason."""
    root = machine.folder / "a checkout"
    for name in ("csrc", "kernels", "setup.py", "pyproject.toml", "ect/__init__.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        ignore = shutil.ignore_patterns("*.so", "__pycache__", build_record.NOTE)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, root / name, **({"ignore": ignore} if copy is shutil.copytree else {}))
    package = root / "kernels/ect_kernels"
    inplace = ("-b", str(root / "build/lib"), "--inplace")
    assert machine.build(*inplace, root=root).returncode == 0
    (module,) = package.glob("_C*.so")
    other = package / "_C.cpython-27-of-another-python.so"
    other.touch()
    machine.tool("nvcc", OLD_GCC)
    (root / "csrc/levels.cu").write_text("changed")
    done = machine.build(*inplace, root=root)
    assert done.returncode == 0, done.stderr
    assert not module.exists() and not list((root / "build").rglob("_C*.so")) and other.exists()
    assert "unsupported GNU version" in build_record.why_not_built(package)
    machine.tool("nvcc", LIST_80_90 + COMPILE)
    assert machine.build(*inplace, root=root).returncode == 0
    assert module.exists() and not (package / build_record.NOTE).exists()


def test_nvidia_smi_that_hangs(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where it leaves children that hold its output open."""
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\nsleep 30\necho 9.0\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("shutil.which", lambda name: str(fake) if name == "nvidia-smi" else None)
    monkeypatch.setattr(script.targets, "PATIENCE", 0.1)
    begin = time.monotonic()
    assert script.targets.wanted("")[0] == [(80, 0), (90, 90)]
    assert time.monotonic() - begin < 15  # well below the thirty, whatever else the machine does


def test_where_the_toolkit_is(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CUDA_HOME speaks alone; else nvcc on PATH and the usual folder, the first that has the headers too."""

    def toolkit(name: str, *files: str) -> Path:
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).touch()
        return tmp_path / name

    header = "include/cuda_runtime_api.h"
    with pytest.raises(script.CannotBuild, match="no nvcc on PATH or in /nowhere/cuda; install the CUDA toolkit"):
        script.cuda_home()
    bare, whole = toolkit("bare", "bin/nvcc"), toolkit("whole", "bin/nvcc", header)
    conda = toolkit("conda", "bin/nvcc", f"targets/x86_64-linux/{header}")
    monkeypatch.setattr("shutil.which", lambda name: str(bare / "bin/nvcc") if name == "nvcc" else None)
    assert script.cuda_home() == bare
    for full in (whole, conda):
        monkeypatch.setattr(script, "USUAL", full)
        assert script.cuda_home() == full
    monkeypatch.setenv("CUDA_HOME", str(bare))
    assert script.cuda_home() == bare
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(script.CannotBuild, match=f"CUDA_HOME={tmp_path} has no bin/nvcc"):
        script.cuda_home()


def test_without_ninja(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(script.CannotBuild, match="ninja is not installed; leave out --no-build-isolation"):
        script._run_ninja(tmp_path)


def test_an_extension_of_other_sources_is_stale(tmp_path: Path) -> None:
    (tmp_path / "a.cu").write_text("1")
    now = build_record.digest(tmp_path)
    assert build_record.why_stale(SimpleNamespace(sources=now), tmp_path) is None
    (tmp_path / "a.cu").write_text("2")
    for module in (SimpleNamespace(sources=now), SimpleNamespace()):
        assert "other sources than csrc/ holds now" in (build_record.why_stale(module, tmp_path) or "")
        assert build_record.why_stale(module, tmp_path / "an installed package has none") is None


def test_a_reason_outlives_the_install_and_goes_with_success(tmp_path: Path) -> None:
    assert "pip install -e ." in build_record.why_not_built(tmp_path)
    build_record.write(tmp_path, "no nvcc")
    assert build_record.why_not_built(tmp_path) == "no nvcc"
    build_record.write(tmp_path, None)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Put a module in the extension's place, or what its import raises."""

    def put(found: object = None, error: ImportError | None = None) -> None:
        def load(name: str) -> object:
            if error is not None:
                raise error
            return found

        monkeypatch.setattr(native.importlib, "import_module", load)
        native._load.cache_clear()

    yield put
    monkeypatch.undo()
    native._load.cache_clear()


@pytest.mark.parametrize(
    ("found", "error", "reason"),
    [
        (None, ModuleNotFoundError("no _C"), "was not built: because of this"),
        (
            None,
            ImportError("GLIBCXX_3.4.32 not found\nmore"),
            "cannot be loaded: GLIBCXX_3.4.32 not found; pip install",
        ),
        (
            SimpleNamespace(sources="another"),
            None,
            "is out of date: it was built from other sources than csrc/ holds now",
        ),
        (SimpleNamespace(), None, "is out of date"),  # built before anybody noted the sources
    ],
)
def test_an_extension_that_cannot_be_used_says_why(
    module: Callable[..., None], found: object, error: ImportError | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_record, "why_not_built", lambda **_: "because of this")
    module(found, error)
    assert native.extension() is None
    for text in (native.why_not_built(torch.device("cuda")), built()[0]):
        assert text is not None and f"the CUDA extension {reason}" in text


def test_the_packages_are_whole(tmp_path: Path) -> None:
    """What is installed is all that lies there: no list of packages to forget one in."""
    command = [sys.executable, "setup.py", "-q", "build_py", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    built = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    sources = {
        path.relative_to(root).as_posix()
        for root, package in ((ROOT, "ect"), (ROOT / "kernels", "ect_kernels"))
        for path in (root / package).rglob("*")
        if path.suffix in {".py", ".npz", ".safetensors", ".md", ".typed"}
    }
    assert {name for name in built if "__pycache__" not in name} == sources
    assert {"ect/py.typed", "ect_kernels/py.typed", "ect/data/DIGITS.md"} < sources
