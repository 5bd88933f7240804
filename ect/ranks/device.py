"""The device of a run, and its number of CPU threads."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

from ect.errors import UserError
from ect.ranks import driver
from ect.ranks.distributed import World

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a Linux container


def resolve(name: str, world: World = World()) -> torch.device:
    """Return the device of a name: 'auto' (CUDA where there is one, else the CPU), or any that torch knows.

    Of several processes on a machine each gets a GPU of its own. A GPU becomes the process's current one, where every
    stream and kernel goes that names none. Raises UserError if the device cannot be used; 'auto' takes the CPU then,
    and warns if there is a GPU.
    """
    if name == "auto":
        name = "cuda" if driver.available() else "cpu"
        if (why := driver.why_unusable()) is not None:
            name = "cpu"
            if world.local_rank == 0:
                warnings.warn(f"--device auto: using the CPU: {why}", stacklevel=2)
    if world.size > 1 and name.startswith("cuda"):
        name = _own_gpu(name, world)
    try:
        device = torch.device(name)
        if device.type == "cuda":
            _check_gpu(device)
        if device.type == "meta":
            raise RuntimeError("it holds shapes, and no numbers")
        torch.zeros(1, device=device, dtype=torch.float64)  # the samplers compute in float64, which MPS lacks
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: not usable here ({reason}); try --device auto or cpu") from error
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _check_gpu(device: torch.device) -> None:
    """Raise UserError where torch cannot use this GPU, or there is none of that number."""
    if driver.hidden():
        raise UserError(f"--device {device}: CUDA_VISIBLE_DEVICES hides every GPU; unset it, or try --device cpu")
    count = torch.cuda.device_count()
    if count and device.index is not None and device.index >= count:
        raise UserError(
            f"--device {device}: this machine has {count} GPU(s), from cuda:0 to cuda:{count - 1}; choose one"
        )
    if (why := driver.why_unusable(device.index)) is not None:
        raise UserError(f"--device {device}: {why}")


def _own_gpu(name: str, world: World) -> str:
    if name != "cuda":
        raise UserError(f"--device {name}: each process of torchrun takes a GPU of its own; say --device cuda")
    count = torch.cuda.device_count()
    if world.local_size > count:
        raise UserError(
            f"torchrun --nproc-per-node {world.local_size}: this machine has {count} GPU(s), one for each process; start as "
            "many processes, or train with --device cpu"
        )
    return f"cuda:{world.local_rank}"


def cpu_count() -> int:
    """Return how many CPUs this process may use: its affinity, and a container's quota where one is set."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if CPU_QUOTA.is_file():
        limit, period = CPU_QUOTA.read_text().split()
        if limit != "max":
            count = min(count, max(int(limit) // int(period), 1))
    return count


def set_threads(threads: int | None, world: World = World()) -> None:
    """Set the threads of CPU operations; None: this process's part of `cpu_count()`.

    More threads than CPUs would spin against each other.
    """
    torch.set_num_threads(threads or max(cpu_count() // world.local_size, 1))
