"""The driver of this machine's NVIDIA GPU: whether torch can use the GPU, and if not, why and what to do about it.

torch says no more than "no CUDA" where the driver is too old for it, where it is a build for CPUs, or where the driver
does not start; so the driver itself is asked, through libcuda, which needs no torch.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
VERSION = Path("/proc/driver/nvidia/version")
NODES = Path("/dev")  # holds nvidia0, nvidia1 ...
_NO_DEVICE = 100  # cuInit's answer where there is no GPU, or CUDA_VISIBLE_DEVICES hides all
_OLDEST = {12: "525.60 or newer", 13: "580.65 or newer"}  # the Linux drivers for every CUDA of this number

_heard: list[str] = []  # torch's own words


@dataclass(frozen=True)
class Driver:
    """The driver's answers. cuda: the newest CUDA that it is for, such as (12, 4). fault: why it cannot be used, or ''."""

    gpus: int
    cuda: tuple[int, int] = (0, 0)
    fault: str = ""


def available() -> bool:
    """Return whether torch can use a GPU.

    It does so quietly, unlike torch's own function, which warns the first time that it is called.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer = torch.cuda.is_available()
    _heard.extend(" ".join(str(warning.message).split()).split(" (Triggered internally")[0] for warning in caught)
    return answer


def hidden() -> bool:
    """Return whether somebody hid all GPUs by CUDA_VISIBLE_DEVICES."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")


def why_unusable(device: int | None = None) -> str | None:
    """Return why torch cannot use the GPU of this number (None: the current one), with the remedy.

    The answer is None where it can, where there is no GPU, and where all are hidden.
    """
    if available():
        return _why_no_kernels(device)
    driver = ask()
    if driver.gpus == 0:
        return None
    here = f"this machine has an NVIDIA GPU, but torch {torch.__version__}"
    newest = ".".join(map(str, driver.cuda))
    if driver.fault:
        return f"{here} cannot use it: {driver.fault}"
    if torch.version.cuda is None:
        return (
            f"{here} was built without CUDA; install a build for CUDA {driver.cuda[0]}, its driver takes up to {newest}"
        )
    needed = int(torch.version.cuda.split(".")[0])
    if needed > driver.cuda[0]:
        return (
            f"{here} was built for CUDA {torch.version.cuda}, and the driver{_version()} is for CUDA up to {newest}; update "
            f"the driver to {_OLDEST.get(needed, 'a newer one')}, or install a torch built for CUDA {driver.cuda[0]}"
        )
    return f"{here} cannot use it: {_heard[0] if _heard else 'it does not say why'}; does nvidia-smi work?"


def ask() -> Driver:
    """Ask the driver, without torch."""
    if hidden():
        return Driver(0)
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        nodes = len(
            list(NODES.glob("nvidia[0-9]*"))
        )  # without its library, as in a container that was given the GPU alone
        return Driver(nodes, fault=f"the driver's {LIBRARY} is not installed here" if nodes else "")
    number, count = ctypes.c_int(), ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(number))
    cuda = (number.value // 1000, number.value % 1000 // 10)
    code = library.cuInit(0)
    if code == _NO_DEVICE:
        return Driver(0, cuda)
    if code != 0:
        return Driver(
            1,
            cuda,
            f"the driver{_version()} does not start (error {code}{_meaning(library, code)}); reboot, or reinstall it",
        )
    library.cuDeviceGetCount(ctypes.byref(count))
    return Driver(count.value, cuda)


def _meaning(library: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    if library.cuGetErrorString(code, ctypes.byref(text)) != 0 or not text.value:
        return ""
    return f": {text.value.decode()}"


def _why_no_kernels(device: int | None) -> str | None:
    """Return why torch's own kernels do not run on a GPU that it can reach: it is too old for this build, or too new."""
    archs = torch.cuda.get_arch_list()
    if not archs or torch.version.cuda is None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    for arch in archs:
        kind, _, digits = arch.partition("_")
        has = divmod(int(re.sub(r"\D", "", digits)), 10)
        if has <= (major, minor) and (kind == "compute" or has[0] == major):
            return None
    name = torch.cuda.get_device_name(device)
    return (
        f"torch {torch.__version__} was built for {', '.join(archs)}, and the {name} is sm_{major}{minor}; install a build of "
        f"torch that has sm_{major}{minor}"
    )


def _version() -> str:
    """Return the version of the driver that is loaded, such as ' 535.104.05'; '' where nothing says so."""
    match = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", VERSION.read_text()) if VERSION.is_file() else None
    return f" {match[0]}" if match else ""
