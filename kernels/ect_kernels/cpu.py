"""Calls the C launchers of csrc/cpu/: the ops on a CPU in vectorised C++, backend "native".

They are those of csrc/launchers.h, as on a GPU; in the place of the stream stands the number of threads. There is a library for
each instruction set, all of the same sources. The one that torch would choose for this machine is loaded; it has no state and
no threads of its own between two calls, so a process may fork.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ect_kernels import build_record, cpu_build

Argument = Tensor | int | float | bool | None
TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}


def library_path(instruction_set: str, folder: Path = Path(__file__).parent) -> Path:
    """Return the place of the library for an instruction set (cpu_build.INSTRUCTION_SETS)."""
    return folder / f"_cpu_{instruction_set}{EXTENSION_SUFFIXES[0]}"


def instruction_sets() -> list[str]:
    """Return those that this CPU has, the widest first: as torch says, which ATEN_CPU_CAPABILITY can narrow."""
    has = torch.backends.cpu.get_cpu_capability()
    widest = {"AVX2": "avx2", "AVX512": "avx512"}.get(has, "portable")
    known = list(cpu_build.INSTRUCTION_SETS)
    return known[known.index(widest) :]


@lru_cache(None)
def library() -> tuple[ctypes.CDLL | None, str]:
    """Return the library and its instruction set, or None and why there is none to use."""
    for name in instruction_sets():
        if (path := library_path(name)).is_file():
            break
    else:
        return None, f"the CPU kernels were not built: {build_record.why_not_built(note=build_record.CPU_NOTE)}"
    try:
        found = load(path)
    except (OSError, AttributeError) as error:
        return (
            None,
            f"the CPU kernels cannot be loaded: {str(error).splitlines()[0]}; pip install -e . builds them anew",
        )
    stale = build_record.why_stale(found, cpu=True)
    return (found, name) if stale is None else (None, f"the CPU kernels are out of date: {stale}")


def load(path: Path) -> ctypes.CDLL:
    """Load a library of launchers, with the digest of its sources as `sources`. Raises OSError, AttributeError."""
    found = ctypes.CDLL(str(path))
    found.ect_sources.restype = ctypes.c_char_p
    vars(found)["sources"] = found.ect_sources().decode()
    return found


def why_not_built() -> str | None:
    """Return why the CPU kernels cannot run, or None."""
    found, reason = library()
    return reason if found is None else None


def built_for() -> str:
    """Return the instruction set of the kernels in use, and why there are none for a wider one, as text."""
    used, widest = library()[1], instruction_sets()[0]
    note = build_record.why_not_built(note=build_record.CPU_NOTE)
    return f"in use for {used}" + (f"; none for {widest}: {note}" if used != widest else "")


def launcher(found: ctypes.CDLL, name: str) -> tuple[Callable[..., int], list[int]]:
    """Return a launcher, which takes what its C++ declaration says, and which of its arguments are addresses (None: 0).

    The last argument, the number of threads, is no address.
    """
    takes = getattr(found, f"{name}_takes")
    takes.restype = ctypes.c_char_p
    kinds, function = takes().decode(), getattr(found, name)
    function.argtypes = [TYPES[kind] for kind in kinds]
    return function, [i for i, kind in enumerate(kinds[:-1]) if kind == "p"]


@lru_cache(None)
def _launcher(name: str) -> tuple[Callable[..., int], list[int]]:
    found, reason = library()
    if found is None:
        raise RuntimeError(f"{name}: {reason}")
    return launcher(found, name)


def launch(name: str, *args: Argument) -> None:
    """Run launcher `name` on as many threads as torch would use. Raises RuntimeError where it refuses its arguments."""
    function, addresses = _launcher(name)
    values: list[Any] = list(args)
    for i in addresses:
        if values[i] is not None:
            values[i] = values[i].data_ptr()
    if function(*values, torch.get_num_threads()):
        raise RuntimeError(f"{name}: the CPU kernel does not take these arguments")
