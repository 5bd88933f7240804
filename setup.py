"""Builds csrc/cpu where a C++ compiler is found, and csrc/ into ect_kernels._C where nvcc is.

Everything else about the package is in pyproject.toml. csrc knows nothing of torch. The CPU kernels are a library for each
instruction set (ect_kernels/cpu_build.py). For a GPU nvcc compiles each .cu file to an object (ninja, in parallel), the C++
compiler compiles the one pybind11 file, and cudart is linked statically. Whatever stands in the way of that, the install
succeeds without, says loudly why, and leaves the reason where `python -m ect_kernels` finds it.
ECT_CUDA_ARCHS="80;90" chooses the GPUs (csrc/targets.py); default: the GPUs present, else 80;90 and PTX. CXX names the C++
compiler, nvcc's too. ECT_CUDA_REQUIRED=1 and ECT_CPU_REQUIRED=1 fail the install where there are no such kernels;
ECT_SKIP_CUDA=1 and ECT_SKIP_CPU=1 leave them out.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
USUAL = Path("/usr/local/cuda")
sys.path[:0] = [str(CSRC), str(ROOT / "kernels")]

import targets  # noqa: E402
from ect_kernels import build_record, cpu_build  # noqa: E402
from ect_kernels.cpu_build import CannotBuild  # noqa: E402

ERRORS, WIDTH = 4, 200  # lines of a failed compilation that are repeated, and characters of each
Paths = Sequence[Path]


class Toolkit:
    """A CUDA toolkit and the C++ compiler beside it. Raises CannotBuild where a part is missing."""

    def __init__(self) -> None:
        self.home = cuda_home()
        self.nvcc = self.home / "bin/nvcc"
        self.include = _folders(self.home, "include", "cuda_runtime_api.h")
        if not self.include:
            raise CannotBuild(f"{self.nvcc} has no cuda_runtime_api.h beside it; install the whole CUDA toolkit")
        self.libraries = _folders(self.home, "lib", "libcudart_static.a")
        if not self.libraries:
            raise CannotBuild(f"{self.nvcc} has no libcudart_static.a beside it; install the whole CUDA toolkit")
        name = os.environ.get("CXX") or "c++"
        if shutil.which(name) is None:
            raise CannotBuild(f"there is no C++ compiler {name!r}; install g++, or name one by CXX")
        self.cxx = Path(shutil.which(name) or name)

    def known(self) -> list[int]:
        """Return the architectures that nvcc can compile for."""
        try:
            said = subprocess.run([self.nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise CannotBuild(f"{self.nvcc} does not work ({error}); install a newer CUDA toolkit") from error
        return [int(word[3:]) for word in said.split() if word[:3] == "sm_" and word[3:].isdigit()]


def cuda_home() -> Path:
    """Return the toolkit: CUDA_HOME, else of nvcc's on PATH and /usr/local/cuda the first with headers, else with nvcc."""
    named, nvcc = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    places = [Path(named)] if named else [*([Path(nvcc).resolve().parents[1]] if nvcc else []), USUAL]
    homes = [home.absolute() for home in places if (home / "bin/nvcc").is_file()]
    if not homes and named:
        raise CannotBuild(f"CUDA_HOME={named} has no bin/nvcc; unset it, or name the folder of a CUDA toolkit")
    if not homes:
        raise CannotBuild(f"no nvcc on PATH or in {USUAL}; install the CUDA toolkit, or name its folder by CUDA_HOME")
    return next((home for home in homes if _folders(home, "include", "cuda_runtime_api.h")), homes[0])


def _folders(home: Path, kind: str, file: str) -> Paths:
    """Return the folder where a toolkit keeps its headers or libraries, if one has `file`.

    NVIDIA, conda and Debian install them in different places.
    """
    patterns = (f"{kind}64", kind, f"targets/*/{kind}", f"{kind}/*-linux-gnu")
    return [path for pattern in patterns for path in sorted(home.glob(pattern)) if (path / file).is_file()][:1]


class Kind(NamedTuple):
    """The kernels for a kind of device.

    skip, required: variables of the environment. note: the file that keeps why there are none. instead: what runs then.
    """

    name: str
    skip: str
    required: str
    note: str
    instead: str


CUDA = Kind("CUDA", "ECT_SKIP_CUDA", "ECT_CUDA_REQUIRED", build_record.NOTE, "Triton or PyTorch will be used.")
CPU = Kind("CPU", "ECT_SKIP_CPU", "ECT_CPU_REQUIRED", build_record.CPU_NOTE, "PyTorch will be used, which is slower.")


class Build(build_ext):
    """Compiles for a GPU with nvcc and the C++ compiler through ninja, for a CPU with the C++ compiler."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or True

    def build_extensions(self) -> None:
        for ext in self.extensions:
            build_record.write(Path(self.get_ext_fullpath(ext.name)).parent, None, self._kind(ext).note)
        super().build_extensions()

    def _kind(self, ext: Extension) -> Kind:
        return CUDA if ext is extension else CPU

    def build_extension(self, ext: Extension) -> None:
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        out.unlink(missing_ok=True)  # nothing of an earlier build must pass for this one's
        kind = self._kind(ext)
        try:
            if os.environ.get(kind.skip) == "1":
                raise CannotBuild(f"{kind.skip}=1 left them out")
            made = self._cuda(out) if kind is CUDA else self._cpu(ext.name.rpartition("_")[2], out)
        except CannotBuild as reason:
            build_record.write(out.parent, str(reason), kind.note)
            if os.environ.get(kind.required) == "1":
                raise SystemExit(
                    f"ect: the {kind.name} kernels cannot be built, and {kind.required}=1: {reason}"
                ) from reason
            _say(f"the {kind.name} kernels were NOT built: {reason}", kind.instead)
            return
        print(f"ect: built the {kind.name} kernels for {made}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """Put what was built, or the reason, in the place of what an earlier editable or in-place build left there."""
        package = Path(self.get_finalized_command("build_py").get_package_dir("ect_kernels"))
        for kind in (CUDA, CPU):
            mine = [ext for ext in self.extensions if self._kind(ext) is kind]
            built = [Path(self.build_lib) / self.get_ext_filename(ext.name) for ext in mine]
            for path in built:
                (package / path.name).unlink(missing_ok=True)
            missing = [path for path in built if not path.exists()]
            reason = build_record.why_not_built(missing[0].parent, kind.note) if missing else None
            build_record.write(package, reason, kind.note)
        super().copy_extensions_to_source()

    def _cpu(self, instruction_set: str, out: Path) -> str:
        cpu_build.build(instruction_set, out)
        return instruction_set

    def _cuda(self, out: Path) -> str:
        toolkit = Toolkit()
        asked, notes = targets.wanted(os.environ.get("ECT_CUDA_ARCHS", ""))
        chosen, more = targets.buildable(asked, toolkit.known())
        notes += more
        if not chosen:
            raise CannotBuild("; ".join(notes))
        if notes:
            _say(*notes)
        folder = Path(self.build_temp).resolve() / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(toolkit, chosen))
        _run_ninja(folder)
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "_C.so", out)  # whole or not at all
        return ", ".join(f"sm_{t.arch}{' with PTX' if t.ptx else ''}" for t in chosen)


class SourceRoots:
    """An editable install as two folders on the path, as setuptools' own strategies are called.

    Where the working folder has an `ect/` too, as a clone of the public code has, Python takes the whole package from one
    place. setuptools' import hook would give single modules of ours to a package that is not ours.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, wheel: Any, files: object, mapping: object) -> None:
        wheel.writestr(f"__editable__.{self.name}.pth", f"{ROOT}\n{ROOT / 'kernels'}\n")

    def __enter__(self) -> SourceRoots:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class Editable(editable_wheel):
    """Installs by path; where a later setuptools does not ask for a strategy by this name, as it does by default."""

    def _select_strategy(self, name: str, *_: object) -> SourceRoots:
        return SourceRoots(name)


def ninja_file(toolkit: Toolkit, chosen: Sequence[targets.Target]) -> str:
    """Return the rules: an object for each .cu file, one of the bindings, and _C.so of them all."""
    try:
        import pybind11
    except ImportError as error:
        raise CannotBuild(
            "pybind11 is not installed; leave out --no-build-isolation, or pip install pybind11"
        ) from error
    gencode = [
        f"-gencode=arch=compute_{arch},code={kind}_{arch}"
        for target in chosen
        for arch, kind in ((target.arch, "sm"), (target.ptx, "compute"))
        if arch
    ]
    includes = [*toolkit.include, pybind11.get_include(), sysconfig.get_paths()["include"], CSRC]
    archs = ",".join(f"{{{t.arch},{t.ptx}}}" for t in chosen)
    facts = [f"-DECT_ARCHS={archs}", f'-DECT_SOURCES="{build_record.digest(CSRC)}"']
    nvcc = [toolkit.nvcc, "-c", "-O3", "-std=c++17", "-Xcompiler", "-fPIC", *gencode, f"-I{CSRC}/common"]
    if "CXX" in os.environ:
        nvcc += ["-ccbin", toolkit.cxx]
    cxx = [
        toolkit.cxx,
        "-c",
        "-O2",
        "-std=c++17",
        "-fPIC",
        "-fvisibility=hidden",
        *facts,
        *(f"-I{i}" for i in includes),
    ]
    link = [toolkit.cxx, "-shared", *(f"-L{path}" for path in toolkit.libraries)]
    headers = " ".join(map(_escaped, [*sorted((CSRC / "common").iterdir()), CSRC / "launchers.h"]))
    kernels = {f"{source.stem}.o": source for source in sorted(CSRC.glob("*.cu"))}
    return "\n".join(
        [
            "ninja_required_version = 1.3",
            f"rule nvcc\n  command = {_command(nvcc)} $in -o $out",
            f"rule cxx\n  command = {_command(cxx)} $in -o $out",
            f"rule link\n  command = {_command(link)} $in -o $out -lcudart_static -lpthread -ldl -lrt",
            f"build bindings.o: cxx {_escaped(CSRC / 'bindings.cpp')} | {_escaped(CSRC / 'launchers.h')}",
            *(f"build {name}: nvcc {_escaped(source)} | {headers}" for name, source in kernels.items()),
            f"build _C.so: link bindings.o {' '.join(kernels)}",
            "",
        ]
    )


def _command(words: Sequence[object]) -> str:
    return shlex.join(map(str, words)).replace("$", "$$")


def _escaped(path: Path) -> str:
    """Return a path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _run_ninja(folder: Path) -> None:
    module = importlib.util.find_spec("ninja") is not None
    if not module and shutil.which("ninja") is None:
        raise CannotBuild("ninja is not installed; leave out --no-build-isolation, or pip install ninja")
    command = [*([sys.executable, "-m", "ninja"] if module else ["ninja"]), "-C", str(folder)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
    )
    print(done.stdout, file=sys.stderr)
    if done.returncode != 0:
        lines = [line.strip() for line in done.stdout.splitlines()]
        telling = [line for line in lines if "error" in line.lower() or "cannot find" in line] or lines[-ERRORS:]
        first = " | ".join(line[:WIDTH] for line in telling[:ERRORS])
        raise CannotBuild(
            f"the compilation failed: {first}; if nvcc does not take this C++ compiler, name another by CXX"
        )


def _say(*lines: str) -> None:
    """Print lines loudly, among the many of an install."""
    print("", *(f"*** ect: {line} ***" for line in lines), "", sep="\n", file=sys.stderr)


extension = Extension("ect_kernels._C", sources=[], optional=True)
libraries = [Extension(f"ect_kernels._cpu_{name}", sources=[], optional=True) for name in cpu_build.buildable()]
setup(
    ext_modules=[*libraries, *([extension] if sys.platform == "linux" else [])],
    cmdclass={"build_ext": Build, "editable_wheel": Editable},
)
