"""Time and bandwidth: the median of several runs, on a GPU with CUDA events and a cold L2."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

FLUSH = 512 << 20  # bytes written before every run: several times any L2


def header(device: torch.device) -> str:
    """The machine and the software of a measurement, in one line."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {os.cpu_count()} cores"
    git = ["git", "-C", str(Path(__file__).parents[1]), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return f"{where}; torch {torch.__version__}, CUDA {torch.version.cuda}; commit {commit}"


@cache
def _flush_buffer(device: torch.device) -> torch.Tensor:
    return torch.empty(FLUSH, dtype=torch.uint8, device=device)


def seconds(function: Callable[[], Any], device: torch.device, runs: int = 0) -> float:
    """Median time of one call. runs: 0 means 20 on a GPU and, on the CPU, 3, or 1 that takes over a second (interpreters)."""
    if device.type != "cuda":
        times: list[float] = []
        while len(times) < (runs or (1 if sum(times) > 1 else 3)):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    for _ in range(3):
        function()
    events = []
    for _ in range(runs or 20):
        _flush_buffer(device).zero_()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        function()
        after.record()
        events.append((before, after))
    torch.cuda.synchronize(device)
    return statistics.median(before.elapsed_time(after) for before, after in events) / 1e3


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy on the device."""
    source = torch.empty(FLUSH, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * FLUSH / seconds(lambda: target.copy_(source), device)
