"""Which device a run uses, and how many CPU threads."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ect.errors import UserError


def resolve(name: str) -> torch.device:
    """'auto', or any torch device by name. Raises UserError if it does not exist here."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: not usable here ({reason}); try --device auto or cpu") from error
    return device


def cpu_count() -> int:
    """CPUs this process may use: its affinity, and a container's quota where one is set."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            count = min(count, max(int(limit) // int(period), 1))
    return count


def set_threads(threads: int | None) -> None:
    """Threads of CPU operations; None: `cpu_count()`. More than there are CPUs would spin against each other."""
    torch.set_num_threads(threads or cpu_count())
