"""A machine to install on: a folder with a CUDA toolkit and compilers that are shell scripts."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIST_80_90 = 'if [ "$1" = --list-gpu-code ]; then printf "sm_75\\nsm_80\\nsm_90\\n"; exit; fi\n'
COMPILE = 'while [ $# -gt 0 ]; do if [ "$1" = -o ]; then echo made > "$2"; fi; shift; done\n'


@dataclass
class Machine:
    """A folder with a toolkit and its tools as shell scripts, and builds that see no other."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.home = self.folder / "cuda home"  # a space, as folders of users have
        self.file("include/cuda_runtime_api.h", "")
        self.file("lib64/libcudart_static.a", "")
        self.tool("nvcc", LIST_80_90 + 'echo "$@" >> "$ECT_TEST_LOG"\n' + COMPILE)
        self.tool("c++", COMPILE)
        self.file("python/pybind11.py", f"def get_include(): return {str(self.home)!r}\n")
        if importlib.util.find_spec("ninja") is None and (ninja := shutil.which("ninja")):
            (self.home / "bin/ninja").symlink_to(ninja)

    def file(self, name: str, text: str) -> Path:
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def tool(self, name: str, text: str) -> None:
        self.file(f"bin/{name}", "#!/bin/sh\n" + text).chmod(0o755)

    def build(self, *options: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "setup.py", "-q", "build_ext", "-t", str(self.folder / "temp"), *options]
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
        env = {
            **kept, "CUDA_HOME": str(self.home), "PATH": str(self.home / "bin"), "PYTHONPATH": str(self.home / "python"),
            "ECT_TEST_LOG": str(self.folder / "log"), **self.env,
        }  # fmt: skip
        return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)

    def targets(self) -> set[str]:
        """-gencode of every call of nvcc, which are one set."""
        calls = (self.folder / "log").read_text().splitlines()
        found = {frozenset(word[9:] for word in call.split() if word.startswith("-gencode=")) for call in calls}
        assert len(found) == 1 and len(calls) == len(list((ROOT / "csrc").glob("*.cu")))
        return set(next(iter(found)))


def gpus(*said: str) -> Callable[[Machine], None]:
    """nvidia-smi that prints these lines."""
    return lambda machine: machine.tool("nvidia-smi", "".join(f"echo '{line}'\n" for line in said))


def without(name: str) -> Callable[[Machine], None]:
    return lambda machine: (machine.home / name).unlink()


def tool(name: str, text: str) -> Callable[[Machine], None]:
    return lambda machine: machine.tool(name, text)


def env(**values: str) -> Callable[[Machine], None]:
    return lambda machine: machine.env.update(values)
