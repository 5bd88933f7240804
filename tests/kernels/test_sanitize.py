"""The sanitizer builds: they catch planted bugs of every kind, and pass every kernel of csrc/, CUDA's and the CPU's."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

import pytest
from ect_kernels.testing import emulator

HERE = emulator.ROOT / "tests" / "emulator"
CLEAN, NO_BARRIER, GLOBAL_END, SHARED_END, MISALIGNED, UNWRITTEN, DIVERGENT, LOST_ADD, NO_WAIT, WRONG_SPACE = range(10)
EARLY, LOWERED, LARGE = range(10, 13)
# (planted bug, kind of build, what its report says)
CAUGHT = [
    (NO_BARRIER, "thread", "data race"),
    (NO_BARRIER, "program", "value: y"),
    (GLOBAL_END, "address", "heap-buffer-overflow"),
    (SHARED_END, "address", "out of bounds"),
    (SHARED_END, "program", "value: y"),
    (MISALIGNED, "address", "misaligned address"),
    (UNWRITTEN, "program", "value: y"),
    (UNWRITTEN, "address", "value: y"),
    (DIVERGENT, "program", "divergent __syncthreads"),
    (DIVERGENT, "thread", "divergent __syncthreads"),
    (LOST_ADD, "thread", "data race"),
    (NO_WAIT, "program", "value: y"),
    (WRONG_SPACE, "program", "global access to shared memory"),
    (WRONG_SPACE, "address", "global access to shared memory"),
    (EARLY, "program", "value: y"),
    (LOWERED, "program", "limit of shared memory lowered"),
    (LARGE, "program", "the device allows 101376"),
]
KINDS = ("program", "address", "thread")


CPU = emulator.ROOT / "csrc" / "cpu"
# Three threads, however small their shares.
CPU_FLAGS = ("-DSTREAM=reinterpret_cast<void*>(3)", "-DGRAIN=1", f"-I{CPU}", "-pthread")


@cache
def _build(kind: str, *files: Path, flags: tuple[str, ...] = ()) -> Path:
    return emulator.build(kind, *files, flags=flags)


def run(
    kind: str, source: Path, main: Path, *args: str, flags: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Build (once) and run a sanitizer main; skips where g++ or CUDA's headers are missing."""
    try:
        program = _build(kind, source, main, flags=flags)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    # Threads last to first, so that what a missing barrier leaves open is read before it is written.
    env = {**os.environ, "CUDA_HOST_ORDER": "rev"}
    return subprocess.run([program, *args], capture_output=True, text=True, env=env, timeout=300)


def plant(kind: str, number: int) -> subprocess.CompletedProcess[str]:
    return run(kind, HERE / "plants.cu", HERE / "plants_main.cpp", str(number))


@pytest.mark.parametrize(("number", "kind", "report"), CAUGHT)
def test_planted_bug_is_caught(number: int, kind: str, report: str) -> None:
    result = plant(kind, number)
    assert result.returncode != 0
    assert report in result.stderr, result.stderr[:2000]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_clean_kernel_passes(kind: str) -> None:
    result = plant(kind, CLEAN)
    assert result.returncode == 0, result.stderr[:2000]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["address", "thread"])
@pytest.mark.parametrize("source", emulator.sources(), ids=lambda path: path.stem)
def test_kernels_pass_the_sanitizers(source: Path, kind: str) -> None:
    main = HERE / f"san_{source.stem}.cpp"
    assert main.is_file(), f"no sanitizer main {main.name} for {source.name}"
    result = run(kind, source, main)
    assert result.returncode == 0, (result.stdout + result.stderr)[:4000]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["address", "thread"])
@pytest.mark.parametrize(
    "source", [path for path in sorted(CPU.glob("*.cpp")) if path.stem != "library"], ids=lambda p: p.stem
)
def test_kernels_of_the_cpu_pass_the_sanitizers(source: Path, kind: str) -> None:
    """The same calls as of the CUDA kernels: heap blocks of the exact size, results that are written in every place."""
    result = run(kind, source, HERE / f"san_{source.stem}.cpp", flags=CPU_FLAGS)
    assert result.returncode == 0, (result.stdout + result.stderr)[:4000]


def test_the_libraries_are_built_or_said_to_be_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built: list[tuple[str, Path]] = []
    monkeypatch.setattr(emulator, "build", lambda kind, file: built.append((kind, file)))
    emulator.main()
    assert sorted(built) == [("plain", file) for file in emulator.sources()] and capsys.readouterr().out == ""

    def absent(kind: str, file: Path) -> None:
        raise FileNotFoundError("the emulator needs g++")

    monkeypatch.setattr(emulator, "build", absent)
    emulator.main()
    assert capsys.readouterr().out == "the emulator needs g++\n"


def test_missing_headers_are_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="install a CUDA toolkit, or nvidia-cuda-runtime"):
        emulator.cuda_include()


def test_headers_of_a_wheel_are_found_and_given_to_the_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    headers, commands = tmp_path / "nvidia" / "cu13" / "include", []
    for file in (headers / "cuda_bf16.h", headers / "crt" / "host_defines.h", tmp_path / "a.cu"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(emulator, "ROOT", tmp_path)
    monkeypatch.setattr("shutil.which", lambda name: name)

    def run(command: list[str], check: bool) -> None:
        commands.append(command)
        Path(command[-1]).touch()

    monkeypatch.setattr(subprocess, "run", run)
    assert emulator.build("plain", tmp_path / "a.cu").is_file()
    (command,) = commands
    assert f"-I{headers}" in command and command[-3] == str(tmp_path / "a.cu")
