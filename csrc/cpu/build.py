"""The build of the CPU kernels: one library for each instruction set, of all .cpp files here, by one call of the C++ compiler.

setup.py uses it, and the tests, which build with sanitizers: standard library only.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ect_kernels.build_record import INSTRUCTION_SETS, digest

HERE = Path(__file__).parent
X86 = ("x86_64", "amd64")
FLAGS = {
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mprefer-vector-width=512".split(),
    "avx2": "-mavx2 -mfma".split(),
    "portable": [],
}
# Not -ffast-math: NaN and infinities have their meaning, and sums their order.
COMMON = "-std=c++17 -O3 -fno-math-errno -fno-trapping-math -fPIC -fvisibility=hidden -pthread".split()


def buildable() -> list[str]:
    """Return the instruction sets that a compiler for this machine may know."""
    return [name for name in INSTRUCTION_SETS if name == "portable" or platform.machine().lower() in X86]


def command(compiler: str, instruction_set: str, out: Path, sources: Path = HERE) -> list[str]:
    """Return the command that makes the library `out`."""
    facts = [f'-DECT_SOURCES="{digest(sources.parent, cpu=True)}"', f"-I{sources.parent}", f"-I{sources.parent / 'common'}"]
    files = sorted(map(str, sources.glob("*.cpp")))
    return [compiler, *COMMON, *FLAGS[instruction_set], *facts, "-shared", *files, "-o", str(out)]


def run(words: Sequence[str]) -> str | None:
    """Run a compiler, and return what it said where it failed, else None."""
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False)
    except OSError as error:
        return str(error)
    return done.stdout if done.returncode else None
