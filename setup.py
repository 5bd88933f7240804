"""Builds csrc/ into ect_kernels._C where nvcc is found; everything else about the package is in pyproject.toml.

csrc knows nothing of torch: nvcc compiles each .cu file to an object (ninja, in parallel), the C++ compiler compiles the one
pybind11 file, and cudart is linked statically. Without nvcc the install succeeds and says loudly what is missing.
ECT_CUDA_ARCHS="80;90" chooses targets; default: the GPU present, else 80;90 and PTX. ECT_SKIP_CUDA=1 leaves the extension out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"


def cuda_home() -> Path | None:
    """The toolkit: CUDA_HOME, else where nvcc on PATH lies, else /usr/local/cuda."""
    nvcc = shutil.which("nvcc")
    for home in (os.environ.get("CUDA_HOME"), Path(nvcc).resolve().parents[1] if nvcc else None, "/usr/local/cuda"):
        if home and (Path(home) / "bin/nvcc").is_file() and (Path(home) / "include/cuda_runtime_api.h").is_file():
            return Path(home)
    return None


def targets() -> list[tuple[int, int]]:
    """(compute capability of the cubin, of the PTX beside it or 0)."""
    text = os.environ.get("ECT_CUDA_ARCHS", "")
    if not text and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=False)
        if found.returncode == 0:
            text = ";".join(
                sorted({line.strip().replace(".", "") for line in found.stdout.splitlines() if line.strip()})
            )
    archs = sorted(int(part.replace(".", "")) for part in (text or "80;90").replace(",", ";").split(";") if part)
    return [(arch, arch if arch == archs[-1] else 0) for arch in archs]


class BuildCuda(build_ext):
    """Compiles with nvcc and g++ through ninja."""

    def build_extension(self, ext: Extension) -> None:
        home = cuda_home()
        if home is None or os.environ.get("ECT_SKIP_CUDA") == "1":
            why = "ECT_SKIP_CUDA=1" if home is not None else "no nvcc on PATH, in CUDA_HOME or /usr/local/cuda"
            print(
                f"\n*** ect: the CUDA kernels were NOT built ({why}); Triton or PyTorch will be used. ***\n",
                file=sys.stderr,
            )
            return
        import pybind11

        build = Path(self.build_temp).resolve() / "cuda"
        build.mkdir(parents=True, exist_ok=True)
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        gencode = " ".join(
            f"-gencode arch=compute_{a},code=sm_{a}" + (f" -gencode arch=compute_{p},code=compute_{p}" if p else "")
            for a, p in targets()
        )
        archs = ",".join(f"{{{a},{p}}}" for a, p in targets())
        python_include = sysconfig.get_paths()["include"]
        lines = [
            "ninja_required_version = 1.3",
            "rule nvcc",
            f"  command = {home}/bin/nvcc -c $in -o $out -O3 -std=c++17 -Xcompiler -fPIC {gencode} -I{CSRC}/common",
            "rule cxx",
            f"  command = c++ -c $in -o $out -O2 -std=c++17 -fPIC -fvisibility=hidden '-DECT_ARCHS={archs}' "
            f"-I{home}/include -I{pybind11.get_include()} -I{python_include} -I{CSRC}",
            "rule link",
            f"  command = c++ -shared $in -o $out -L{home}/lib64 -lcudart_static -lpthread -ldl -lrt",
            f"build bindings.o: cxx {CSRC}/bindings.cpp | {CSRC}/launchers.h",
        ]
        headers = " ".join(str(path) for path in sorted((CSRC / "common").iterdir()))
        objects = ["bindings.o"]
        for source in sorted(CSRC.glob("*.cu")):
            objects.append(f"{source.stem}.o")
            lines.append(f"build {source.stem}.o: nvcc {source} | {headers}")
        lines += [f"build {out}: link {' '.join(objects)}", ""]
        (build / "build.ninja").write_text("\n".join(lines))
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(build)], check=True)
        print(f"ect: built the CUDA kernels for {targets()}", file=sys.stderr)


extension = Extension("ect_kernels._C", sources=[], optional=sys.platform != "linux")
setup(ext_modules=[extension] if sys.platform == "linux" else [], cmdclass={"build_ext": BuildCuda})
