"""Which device a run uses, and how many CPU threads."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ect.errors import UserError

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a Linux container


def resolve(name: str) -> torch.device:
    """'auto' (CUDA where there is one, else the CPU), or a torch device by name. Raises UserError if it cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device, dtype=torch.float64)  # the samplers compute in float64, which MPS lacks
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: not usable here ({reason}); try --device auto or cpu") from error
    return device


def cpu_count() -> int:
    """CPUs this process may use: its affinity, and a container's quota where one is set."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if CPU_QUOTA.is_file():
        limit, period = CPU_QUOTA.read_text().split()
        if limit != "max":
            count = min(count, max(int(limit) // int(period), 1))
    return count


def set_threads(threads: int | None) -> None:
    """Threads of CPU operations; None: `cpu_count()`. More than there are CPUs would spin against each other."""
    torch.set_num_threads(threads or cpu_count())
