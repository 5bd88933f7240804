"""Builds the .cu files of csrc/ with g++ and the CPU runtime of tests/emulator, for backend 'emulated' (from a source tree).

A library is made once per content of its source and the headers, and kept under build/emulator; who needs it meanwhile waits.

    python -m ect_kernels.testing.emulator      makes all of them, as many at a time as there are CPUs
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ect_kernels import native

ROOT = Path(__file__).resolve().parents[3]
FLAGS = {
    "plain": ["-O2", "-fPIC", "-shared"],
    "program": ["-O2"],
    "address": ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O0", "-fsanitize=thread"],
    "record": ["-O0", "-fPIC", "-shared", "-include", "record_launches.h"],
}


def cuda_include() -> Path:
    """Return the folder of CUDA's headers: the toolkit's, or that of the wheels nvidia-cuda-runtime, -crt and -cccl.

    Raises FileNotFoundError.
    """
    wheels = Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/include")
    for folder in (Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include", *wheels):
        if (folder / "cuda_bf16.h").is_file() and (folder / "crt" / "host_defines.h").is_file():
            return folder
    raise FileNotFoundError(
        "no CUDA headers: install a CUDA toolkit, or nvidia-cuda-runtime, nvidia-cuda-crt, nvidia-cuda-cccl"
    )


def sources() -> list[Path]:
    return sorted((ROOT / "csrc").glob("*.cu"))


def build(kind: str, *files: Path, defines: Sequence[str] = (), flags: Sequence[str] = ()) -> Path:
    """Compile `files` into a shared library or a program for the CPU.

    kind: 'plain' is a library; 'record' is one whose launches are written down, not run; 'program', 'address' and
    'thread' are programs, for `files` that have a main. flags: further ones for the compiler.
    """
    flags = [*FLAGS[kind], *(f"-D{d}" for d in defines), *flags]
    headers = [path for suffix in ("cuh", "h", "hpp") for path in sorted((ROOT / "csrc").rglob(f"*.{suffix}"))]
    headers += sorted((ROOT / "tests/emulator").glob("*.h"))
    digest = hashlib.sha256(repr((flags, [f.name for f in files])).encode())
    for file in (*files, *headers):
        digest.update(file.read_bytes())
    suffix = ".so" if "-shared" in flags else ""
    out = ROOT / "build" / "emulator" / f"{files[0].stem}-{kind}-{digest.hexdigest()[:16]}{suffix}"
    if out.exists():
        return out
    compiler = shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("the emulator needs g++ 12 or newer")
    common = ["-std=c++20", "-g1", "-Wall", "-Wno-unknown-pragmas", "-ffp-contract=off"]
    folders = (cuda_include(), ROOT / "csrc", ROOT / "csrc" / "common", ROOT / "tests" / "emulator")
    include = [f"-I{folder}" for folder in folders]
    inputs = [word for file in files for word in ("-x", "c++", str(file))]
    out.parent.mkdir(parents=True, exist_ok=True)
    temp = out.with_name(f"{out.name}.{os.getpid()}")
    with out.with_name(f"{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            subprocess.run([compiler, *common, *flags, *include, *inputs, "-o", str(temp)], check=True)
            temp.rename(out)
    return out


def load(*names: str) -> None:
    """Build if needed and load csrc/<name>.cu, each as a library of its own, for backend 'emulated'. Default: all."""
    files = [ROOT / "csrc" / f"{name}.cu" for name in names] or sources()
    for file in files:
        native.load_emulator(build("plain", file))


def main() -> None:
    """Build every library before the tests ask for them. Where that is not possible it says why: the tests skip."""
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda file: build("plain", file), sources()))
    except FileNotFoundError as error:
        print(error)


if __name__ == "__main__":
    main()
