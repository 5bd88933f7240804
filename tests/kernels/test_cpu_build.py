"""The CPU kernels' build: a library for each instruction set, and what stands in its way costs them and never the install."""

from __future__ import annotations

import ctypes
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ect_kernels import build_record, cpu, cpu_build, dispatch
from ect_kernels.__main__ import built
from ect_kernels.levels import levels

from tests.kernels.machine import COMPILE, ROOT, Machine, env, tool, without

ON_X86 = pytest.mark.skipif(len(cpu_build.buildable()) == 1, reason="this machine's CPUs have the portable form alone")
CPU = torch.device("cpu")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Without nvcc."""
    found = Machine(tmp_path)
    found.env["ECT_SKIP_CUDA"] = "1"
    return found


def libraries(machine: Machine) -> list[str]:
    return sorted(path.name.split(".")[0][5:] for path in (machine.folder / "lib").rglob("_cpu_*.so"))


@ON_X86
def test_there_is_a_library_for_each_instruction_set(machine: Machine) -> None:
    machine.tool("c++", f'echo "$@" >> "$ECT_TEST_LOG"\n{COMPILE}')
    done = machine.build("-b", str(machine.folder / "lib"))
    assert done.returncode == 0 and libraries(machine) == ["avx2", "avx512", "portable"], done.stderr
    commands = (machine.folder / "log").read_text().splitlines()
    sources = sorted(str(path) for path in (ROOT / "csrc/cpu").glob("*.cpp"))
    for command in commands:
        (name,) = [name for name in cpu_build.INSTRUCTION_SETS if f"_cpu_{name}" in command]
        words = command.split()
        assert [word for word in words if word.endswith(".cpp")] == sources
        assert [word for word in words if word.startswith("-m")] == cpu_build.INSTRUCTION_SETS[name]
        assert "-ffast-math" not in words and f"ect: built the CPU kernels for {name}" in done.stderr
    assert len(commands) == 3 and not (machine.folder / "lib/ect_kernels" / build_record.CPU_NOTE).exists()


def test_other_machines_have_the_portable_form(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, wanted in (("aarch64", ["portable"]), ("AMD64", list(cpu_build.INSTRUCTION_SETS))):
        monkeypatch.setattr(platform, "machine", lambda name=name: name)
        assert cpu_build.buildable() == wanted


FAILS = COMPILE + 'echo "cpu.hpp:9: error: unknown type"; exit 1\n'
CANNOT = {
    "no compiler": (without("bin/c++"), "there is no C++ compiler 'c++'; install g++, or name one by CXX"),
    "no compiler of the name": (env(CXX="g++-99"), "there is no C++ compiler 'g++-99'"),
    "it fails": (tool("c++", FAILS), "the compilation failed: cpu.hpp:9: error: unknown type; name another"),
    "it says nothing": (tool("c++", "exit 7\n"), "the compilation failed: status 7"),
    "it is no program": (lambda machine: machine.file("bin/c++", "\0"), "does not run"),
    "left out": (env(ECT_SKIP_CPU="1"), "ECT_SKIP_CPU=1 left them out"),
}


@pytest.mark.parametrize(("case", "required"), [*((case, "0") for case in CANNOT), ("it fails", "1")])
def test_what_cannot_be_built_is_left_out_loudly(machine: Machine, case: str, required: str) -> None:
    spoil, reason = CANNOT[case]
    spoil(machine)
    machine.env["ECT_CPU_REQUIRED"] = required
    done = machine.build("-b", str(machine.folder / "lib"))
    assert done.returncode == int(required), done.stderr
    said = {"0": "*** ect: the CPU kernels were NOT built:", "1": "cannot be built, and ECT_CPU_REQUIRED=1:"}
    assert said[required] in done.stderr and reason in done.stderr and "Traceback" not in done.stderr
    assert reason in build_record.why_not_built(machine.folder / "lib/ect_kernels", build_record.CPU_NOTE)
    assert libraries(machine) == []


@ON_X86
def test_a_compiler_that_lacks_an_instruction_set_builds_the_others(machine: Machine) -> None:
    refuses = 'case "$*" in *avx512*) echo "error: -mavx512f: unknown option" >&2; exit 1;; esac\n'
    machine.tool("c++", refuses + COMPILE)
    done = machine.build("-b", str(machine.folder / "lib"))
    assert done.returncode == 0 and libraries(machine) == ["avx2", "portable"]
    note = build_record.why_not_built(machine.folder / "lib/ect_kernels", build_record.CPU_NOTE)
    assert "unknown option" in note and f"NOT built: {note}" in done.stderr


def test_a_failed_build_in_place_leaves_no_older_library(machine: Machine) -> None:
    """As `pip install -e .` does it: the files beside the sources are this build's, or none with the reason."""
    root = machine.folder / "a checkout"
    for name in ("csrc", "kernels"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_*.txt"))
    (root / "ect").mkdir()
    for name in ("setup.py", "pyproject.toml", "ect/__init__.py"):
        shutil.copyfile(ROOT / name, root / name)
    package, inplace = root / "kernels/ect_kernels", ("-b", str(root / "build/lib"), "--inplace")
    assert machine.build(*inplace, root=root).returncode == 0
    assert {path.name for path in package.glob("_cpu_*.so")} == {
        cpu.library_path(name).name for name in cpu_build.buildable()
    }
    machine.tool("c++", FAILS)
    assert machine.build(*inplace, root=root).returncode == 0
    assert [path.name for path in package.glob("_cpu_*")] == [build_record.CPU_NOTE]
    assert "unknown type" in build_record.why_not_built(package, build_record.CPU_NOTE)
    machine.tool("c++", COMPILE)
    assert machine.build(*inplace, root=root).returncode == 0
    assert len(list(package.glob("_cpu_*.so"))) == len(cpu_build.buildable()) and not list(package.glob("_cpu_*.txt"))


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """An installed package with libraries of these names, on a machine whose CPU torch says has `capability`."""
    forget = (cpu.library, cpu._launcher)
    monkeypatch.setattr(cpu, "library_path", lambda name: tmp_path / name)

    def put(*names: str, capability: str = "AVX512") -> None:
        for name in names:
            (tmp_path / name).touch()
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        for function in forget:
            function.cache_clear()

    put()
    yield put
    monkeypatch.undo()
    for function in forget:
        function.cache_clear()


def loads(monkeypatch: pytest.MonkeyPatch, sources: str | None = None) -> None:
    digest = build_record.digest(cpu=True) if sources is None else sources
    monkeypatch.setattr(cpu, "Library", lambda path: SimpleNamespace(path=path.name, sources=digest))


@pytest.mark.parametrize(("capability", "there", "used"), [
    ("AVX512", ("avx512", "avx2", "portable"), "avx512"), ("AVX2", ("avx512", "avx2", "portable"), "avx2"),
    ("DEFAULT", ("avx512", "avx2", "portable"), "portable"), ("SVE256", ("portable",), "portable"),
    ("AVX512", ("avx2", "portable"), "avx2"),
])  # fmt: skip
def test_the_widest_library_that_the_cpu_can_run_is_used(
    package: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capability: str, there: tuple[str, ...], used: str
) -> None:
    package(*there, capability=capability)
    loads(monkeypatch)
    monkeypatch.setattr(build_record, "why_not_built", lambda **_: "because of this")
    assert cpu.library()[0].path == cpu.library()[1] == used  # type: ignore[union-attr]
    narrower = "; none for avx512: because of this" if (capability, used) == ("AVX512", "avx2") else ""
    assert cpu.why_not_built() is None and built()[1] == f"CPU kernels: in use for {used}{narrower}"
    assert dispatch.OPS["levels"].candidates(CPU) == ["native", "reference"]


def test_a_library_that_cannot_be_used_says_why_and_the_reference_runs(
    package: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unusable(reason: str) -> None:
        package()
        assert cpu.why_not_built() is not None and reason in str(cpu.why_not_built()) and reason in built()[1]
        assert dispatch.OPS["levels"].candidates(CPU) == ["reference"]
        args = torch.tensor(5), torch.tensor(1), 0, 4, -1.1, 2.0, 2.0, 8.0, 1.0
        assert levels(*args).t.shape == (4,)
        with pytest.raises(dispatch.BackendError, match="backend 'native' cannot run: the CPU kernels"):
            levels(*args, backend="native")
        with pytest.raises(RuntimeError, match="levels_fwd: the CPU kernels"):
            cpu.launch("levels_fwd")

    monkeypatch.setattr(build_record, "why_not_built", lambda **_: "because of this")
    unusable("were not built: because of this")
    package("avx2")
    unusable("cannot be loaded: ")  # an empty file
    loads(monkeypatch, "another")
    unusable("are out of date: they were built from other sources than csrc/cpu/ holds now")


def test_on_other_devices_it_has_a_reason() -> None:
    reason = dispatch.OPS["levels"].why_not("native", torch.device("cuda"))
    assert reason == "it runs on CPU tensors, these are on cuda"


def test_the_cpu_kernels_are_stale_by_their_own_sources(tmp_path: Path) -> None:
    """A change of CUDA alone asks for no new build of them, nor the other way round; the declarations are both's."""
    for name in ("a.cu", "launchers.h", "cpu/a.cpp", "cpu/a.hpp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    for name, changes in {
        "a.cu": (True, False),
        "launchers.h": (True, True),
        "cpu/a.cpp": (False, True),
        "cpu/a.hpp": (False, True),
    }.items():
        before = [build_record.digest(tmp_path, on_cpu) for on_cpu in (False, True)]
        (tmp_path / name).write_text("2")
        after = [build_record.digest(tmp_path, on_cpu) for on_cpu in (False, True)]
        assert tuple(a != b for a, b in zip(before, after, strict=True)) == changes, name
    module = SimpleNamespace(sources=build_record.digest(tmp_path, cpu=True))
    assert build_record.why_stale(module, tmp_path, cpu=True) is None


def test_a_launcher_says_what_it_takes() -> None:
    found, _ = cpu.library()
    if found is None:
        pytest.skip(str(cpu.why_not_built()))
    function, addresses = cpu.launcher(found, "levels_fwd")
    arguments = function.argtypes  # type: ignore[attr-defined]
    pointer, integer, double = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    assert arguments == [*[pointer] * 8, integer, *[double] * 5, pointer] and addresses == list(range(8))
    with pytest.raises(RuntimeError, match="levels_fwd: the CPU kernel does not take these arguments"):
        cpu.launch(
            "levels_fwd", *[torch.zeros(1, dtype=torch.int64)] * 2, None, *[torch.zeros(1)] * 5, 0, 1, 1, 2.0, 1, 1
        )
