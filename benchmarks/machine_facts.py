"""The facts of a machine that matter to a run: python benchmarks/machine_facts.py [FILE.json]. Needs none of what it names.

Prints a line a fact; with a file, writes them as JSON.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lib.options import Parser, possible_path

PACKAGES = (
    "torch", "triton", "numpy", "pillow", "safetensors", "tyro", "rich", "tensorboard", "torch-fidelity", "torchvision",
    "matplotlib", "scipy", "setuptools", "pybind11", "ninja", "pytest", "pytest-xdist", "pytest-timeout",
)  # fmt: skip
GPU = (
    "name",
    "driver_version",
    "compute_cap",
    "memory.total",
    "memory.used",
    "clocks.sm",
    "clocks.max.sm",
    "power.limit",
)


def said(command: list[str]) -> str:
    """Return what a command prints, in one line, or why there is nothing: it is missing or fails."""
    if shutil.which(command[0]) is None:
        return f"no {command[0]} on PATH"
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]} failed: {error}"
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    return " | ".join(line.strip() for line in lines) + (f" (exit status {done.returncode})" if done.returncode else "")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def of_torch() -> str:
    """Return what torch says about the GPU."""
    try:
        import torch

        if not torch.cuda.is_available():
            return f"torch {torch.__version__} for CUDA {torch.version.cuda} can use no GPU here"
        x = torch.ones(2, device="cuda").sum()
        archs = " ".join(torch.cuda.get_arch_list())
        return (
            f"torch {torch.__version__} for CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, "
            f"{torch.cuda.get_device_name()} of {torch.cuda.device_count()}, 1 + 1 = {x.item():g}; built for {archs}"
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


def facts() -> dict[str, str]:
    versions = {name: version(name) for name in PACKAGES}
    present = ", ".join(f"{name} {found}" for name, found in versions.items() if found)
    root = str(Path(__file__).parents[1])
    return {
        "GPU": said(["nvidia-smi", f"--query-gpu={','.join(GPU)}", "--format=csv,noheader"]),
        "torch": of_torch(),
        "nvcc": said(["nvcc", "--version"]).rpartition(" | ")[2],
        "C++": said(["c++", "--version"]).partition(" | ")[0],
        "CPU": f"{os.cpu_count()} of {platform.processor() or platform.machine()}, {platform.platform()}",
        "Python": sys.version.split()[0],
        "packages": present,
        "missing": ", ".join(name for name, found in versions.items() if not found) or "none",
        "commit": said(["git", "-C", root, "describe", "--always", "--dirty"]),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("file", type=possible_path, nargs="?", help="JSON file for the facts")
    path: Path | None = parser.parse_args(argv).file
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        print(f"{path}: cannot be written; name a file in a folder that exists", file=sys.stderr)
        return 2
    found = facts()
    for name, value in found.items():
        print(f"{name}: {value}")
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
