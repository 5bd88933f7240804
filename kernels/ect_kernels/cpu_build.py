"""The build of the CPU kernels, csrc/cpu/*.cpp: one library for each instruction set, each by one call of the C++ compiler.

setup.py uses it, where torch may be absent: standard library only.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ect_kernels.build_record import SOURCES, digest

INSTRUCTION_SETS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"],
    "avx2": ["-mavx2", "-mfma"],
    "portable": [],
}
"""The widest first, with what tells a compiler."""
FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread",
    # Not -ffast-math: NaN and infinities have their meaning, and sums their order.
    "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
]  # fmt: skip


class CannotBuild(Exception):
    """The reason why there is no library, with the remedy, in one line."""


def buildable() -> list[str]:
    """Return the instruction sets that the CPUs of this machine's kind may have."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return [name for name in INSTRUCTION_SETS if x86 or name == "portable"]


def build(instruction_set: str, out: Path, sources: Path = SOURCES) -> None:
    """Make the library `out`. Raises CannotBuild."""
    name = os.environ.get("CXX") or "c++"
    compiler = shutil.which(name)
    if compiler is None:
        raise CannotBuild(f"there is no C++ compiler {name!r}; install g++, or name one by CXX")
    out.parent.mkdir(parents=True, exist_ok=True)
    half_made = out.with_name(f"{out.name}.part")
    try:
        _run([compiler, "-shared", *flags(instruction_set, sources), *map(str, sorted((sources / "cpu").glob("*.cpp"))),
              "-o", str(half_made)])  # fmt: skip
        half_made.replace(out)  # whole or not at all
    finally:
        half_made.unlink(missing_ok=True)


def flags(instruction_set: str, sources: Path = SOURCES) -> list[str]:
    """Return what tells a compiler how to compile the kernels, and whatever includes their header."""
    include = [f"-I{sources}", f"-I{sources / 'common'}", f"-I{sources / 'cpu'}"]
    return [*FLAGS, *INSTRUCTION_SETS[instruction_set], *include, f'-DECT_SOURCES="{digest(sources, cpu=True)}"']


def _run(words: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise CannotBuild(f"{words[0]} does not run: {error}") from error
    if done.returncode != 0:
        lines = [line.strip() for line in done.stdout.splitlines()]
        telling = [line for line in lines if "error" in line.lower()] or lines or [f"status {done.returncode}"]
        raise CannotBuild(f"the compilation failed: {telling[0][:200]}; name another C++ compiler by CXX")
