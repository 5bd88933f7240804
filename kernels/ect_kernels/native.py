"""Calls the C launchers of csrc/: on the GPU through the built extension, on the CPU through the emulator's library.

Every launcher has the form `extern "C" int op_fwd(pointers, int64_t, double ..., void* stream)` and returns a CUDA error code.
So one calling convention serves both: tensors go as addresses (None and empty ones as 0), ints as int64, floats as double.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ect_kernels import build_record

Argument = Tensor | int | float | bool | None


DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""dtype codes of the launchers (csrc/common/vec.cuh)."""


@lru_cache(None)
def _load() -> tuple[Any | None, str]:
    """Return the compiled module ect_kernels._C and '', or None and why there is none to use."""
    try:
        module = importlib.import_module("ect_kernels._C")
    except ModuleNotFoundError:
        return None, f"the CUDA extension was not built: {build_record.why_not_built()}"
    except ImportError as error:
        return (
            None,
            f"the CUDA extension cannot be loaded: {str(error).splitlines()[0]}; pip install -e . builds it anew",
        )
    stale = build_record.why_stale(module)
    return (module, "") if stale is None else (None, f"the CUDA extension is out of date: {stale}")


def extension() -> Any | None:
    """Return the compiled module ect_kernels._C, or None where there is none to use."""
    return _load()[0]


def why_no_extension() -> str | None:
    """Return why there is no CUDA extension to use on any GPU, or None."""
    return _load()[1] or None


def why_not_built(device: torch.device) -> str | None:
    """Return why the CUDA kernels cannot run on `device`, or None."""
    module = extension()
    if module is None:
        return why_no_extension() or "there is no CUDA extension"
    major, minor = torch.cuda.get_device_capability(device)
    have = 10 * major + minor
    if not any(_serves(arch, ptx, major, minor) for arch, ptx in module.archs()):
        oldest = build_record.OLDEST
        remedy = f"reinstall with ECT_CUDA_ARCHS={have}" if have >= oldest else f"it needs sm_{oldest} or newer"
        return f"it was built for {built_for()}, not for sm_{have}; {remedy}"
    if not hasattr(module, "probe"):
        return None
    return _probe(torch.cuda.current_device() if device.index is None else device.index)


def _serves(arch: int, ptx: int, major: int, minor: int) -> bool:
    """Return whether a cubin of `arch` or the PTX beside it (0: none) runs on a GPU of this compute capability."""
    return (arch // 10 == major and arch % 10 <= minor) or 0 < ptx <= 10 * major + minor


def built_for() -> str:
    """Return the GPUs that the extension has code for, as text."""
    module = extension()
    targets = [] if module is None else module.archs()
    return ", ".join(f"sm_{arch}" + (f" and PTX {ptx}" if ptx else "") for arch, ptx in targets)


@lru_cache(None)
def _probe(index: int) -> str | None:
    """Return why no kernel of the extension can be loaded on GPU `index`, or None.

    The extension brings its own CUDA runtime, which may be newer than the driver, and the code for a GPU may be
    missing.
    """
    module = extension()
    assert module is not None
    with torch.cuda.device(index):
        error = module.probe()
    if not error:
        return None
    return (
        f"its kernels cannot be loaded ({error}); update the NVIDIA driver, or reinstall with nvcc of its CUDA version"
    )


@lru_cache(None)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_no_triton(device: torch.device) -> str | None:
    """Return why Triton kernels cannot run on `device`, or None. On CPU tensors they run under TRITON_INTERPRET=1 only."""
    if not _has_triton():
        return "triton is not installed (it exists for Linux)"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "it needs a GPU, or TRITON_INTERPRET=1"


def why_no_apex() -> str | None:
    """Return why NVIDIA apex's GroupNorm cannot be used, or None."""
    try:
        importlib.import_module("apex.contrib.group_norm")
    except ImportError:
        return "apex.contrib.group_norm is not installed (NVIDIA/apex from source; PyPI's apex is another project)"
    return None


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one inside the block: kernels and streams are the current device's, not the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def one_device(op: str, names: Iterable[str], args: Iterable[Any]) -> torch.device:
    """Return the device of an op's tensors, the CPU where it has none.

    Raises ValueError, naming the first tensor that is elsewhere: a kernel would take its address all the same.
    """
    try:
        devices = {value.device for value in args if value is not None}
    except AttributeError:  # there are lists, or numbers
        devices = set()
    if len(devices) == 1:
        return devices.pop()
    first: tuple[str, torch.device] | None = None
    for name, value in zip(names, args, strict=False):
        for tensor in value if isinstance(value, list | tuple) else (value,):
            if not isinstance(tensor, Tensor):
                continue
            if first is None:
                first = name, tensor.device
            elif tensor.device != first[1]:
                raise ValueError(
                    f"{op}: {name} is on {tensor.device} but {first[0]} is on {first[1]}; move one of them"
                )
    return first[1] if first is not None else torch.device("cpu")


_emulated: list[ctypes.CDLL] = []


def load_emulator(path: str | os.PathLike[str]) -> None:
    """Use a library that kernels/ect_kernels/testing/emulator.py made of a .cu file, for backend 'emulated'."""
    library = ctypes.CDLL(os.fspath(path))
    library.cuda_host_message.restype = ctypes.c_char_p
    _emulated.insert(0, library)


def why_not_emulated() -> str | None:
    return None if _emulated else "no emulator library is loaded (load() of kernels/ect_kernels/testing/emulator.py)"


def launch(backend: str, name: str, *args: Argument) -> None:
    """Run launcher `name` on the current stream of the tensors' device.

    Tensors must outlive the call, which their use on the same stream ensures. Raises RuntimeError with CUDA's (or the
    emulator's) message, ValueError where the tensors are on several devices.
    """
    device = one_device(name, map(str, range(len(args))), args)
    values = [0 if a is None else a.data_ptr() if isinstance(a, Tensor) else a for a in args]
    if backend == "cuda":
        module = extension()
        assert module is not None
        with current(device):
            getattr(module, name)(*values, torch.cuda.current_stream(device).cuda_stream)
        return
    assert backend == "emulated"
    library = next((lib for lib in _emulated if hasattr(lib, name)), None)
    if library is None:
        raise RuntimeError(f"{name}: not in the emulator libraries that are loaded")
    converted = [ctypes.c_double(v) if isinstance(v, float) else ctypes.c_int64(int(v)) for v in values]
    code = getattr(library, name)(*converted, ctypes.c_void_p(0))
    if code != 0:
        raise RuntimeError(f"{name}: error {code}: {library.cuda_host_message().decode()}")
