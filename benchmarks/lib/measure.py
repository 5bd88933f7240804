"""The machine, and time and bandwidth on it: medians of several runs, on a GPU with CUDA events."""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ect.errors import UserError
from ect.ranks.device import resolve

FLUSH = 512 << 20  # bytes written before every run: several times any L2


def device_option(name: str) -> torch.device:
    """Read --device of a benchmark, as the trainer reads it."""
    try:
        return resolve(name)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def header(device: torch.device) -> str:
    """Return the machine and the software of a measurement, in one line."""
    found = machine(device)
    where = found["device"] if device.type == "cuda" else f"{found['device']}, {os.cpu_count()} cores"
    clocks = ", ".join(f"{name} {value}" for name, value in found["clocks"].items())
    driver = f", driver {found['driver']}" if found["driver"] else ""
    return f"{where} ({clocks}){driver}; torch {found['torch']}, CUDA {found['cuda']}; commit {found['commit']}"


def machine(device: torch.device) -> dict[str, Any]:
    """Return what a timing depends on: device, driver, the clocks at this moment, torch, CUDA and commit."""
    git = ["git", "-C", str(Path(__file__).parents[2]), "describe", "--always", "--dirty"]
    found = {"torch": torch.__version__, "cuda": torch.version.cuda, "commit": _output(git) or "unknown"}
    if device.type != "cuda":
        return {"device": _processor(), "driver": None, "clocks": {"MHz now": _megahertz()}, **found}
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id={device.index or 0}"]
    values = dict(zip(fields, (value.strip() for value in _output(query).split(",")), strict=False))
    driver = values.pop("driver_version", None) or "unknown"
    return {"device": torch.cuda.get_device_name(device), "driver": driver, "clocks": values, **found}


def load() -> float | None:
    """Return how many processes wanted a core during the last minute, on average; None where the system does not say."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def slug(device: str) -> str:
    """Return a device's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower().replace("(r)", "")).strip("-")


def _output(command: list[str]) -> str:
    """Return what a command prints; nothing where it fails or is missing."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def _cpuinfo(key: str) -> list[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(key)]


def _processor() -> str:
    return "cpu " + next(iter(_cpuinfo("model name")), platform.processor() or platform.machine())


def _megahertz() -> str:
    return f"{statistics.median(map(float, speeds)):.0f}" if (speeds := _cpuinfo("cpu MHz")) else "unknown"


def interleaved(
    functions: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int, least: float = 0.2
) -> dict[str, list[float]]:
    """Return the seconds of a call, a value for each round."""

    def failed(name: str, error: Exception) -> None:
        raise error

    return list(turns(functions, device, rounds, failed, least))[-1]


def turns(
    functions: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int,
    failed: Callable[[str, Exception], None], least: float = 0.2,
) -> Iterator[dict[str, list[float]]]:  # fmt: skip
    """Yield after each round the seconds of a call so far, a value a round.

    Every round times all functions one after another, so that a machine which slows down slows them all. The functions
    have run before. failed: is told of one that raises; it has no further turn and no figure, and the others go on,
    unless the device was lost with it: then no round follows. least: seconds that a value averages over.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    calls: dict[str, int] = {}

    def took(name: str, calls: int) -> float | None:
        try:
            return _clock(functions[name], device, calls)
        except Exception as error:
            del times[name]
            failed(name, error)
            return None

    for name in functions:
        seconds = took(name, 1)
        if seconds is not None:
            calls[name] = max(1, math.ceil(least / max(seconds, 1e-6)))
        elif lost(device) is not None:
            return
    for turn in range(rounds):
        names = list(times)[turn % max(len(times), 1) :] + list(times)[: turn % max(len(times), 1)]
        for name in names:
            seconds = took(name, calls[name])
            if seconds is not None:
                times[name].append(seconds)
            elif lost(device) is not None:
                return
        if not times:
            return
        yield {name: list(values) for name, values in times.items()}


def once(function: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call."""
    return _clock(function, device, 1)


def reason(error: BaseException) -> str:
    """Return an exception's type and first line."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def lost(device: torch.device) -> str | None:
    """Return why the device takes no more work of this process, or None: after an illegal access every call fails."""
    try:
        _synchronize(device)
    except RuntimeError as error:
        return next(iter(str(error).splitlines()), "")
    return None


def _clock(function: Callable[[], Any], device: torch.device, calls: int) -> float:
    """Return the seconds of one of `calls` calls in a row, of the host and the device together, by `clock`."""
    now = clock(device)[1]
    _synchronize(device)
    start = now()
    for _ in range(calls):
        function()
    _synchronize(device)
    return (now() - start) / calls


def clock(device: torch.device) -> tuple[str, Callable[[], float]]:
    """Return what `interleaved` reads: the wall clock, but for one CPU thread its processor time, which excludes other work."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return "CPU time", time.process_time
    return "wall clock", time.perf_counter


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@cache
def _flush_buffer(device: torch.device) -> torch.Tensor:
    return torch.empty(FLUSH, dtype=torch.uint8, device=device)


def seconds(function: Callable[[], Any], device: torch.device, runs: int = 0) -> float:
    """Return the median time of one call.

    runs: 0 means 20, on the CPU as many of them as take a tenth of a second, but at least 3, or 1 that takes over a second
    (interpreters).
    """
    if device.type != "cuda":
        times: list[float] = []
        while len(times) < (runs or (1 if sum(times) > 1 else 3 if sum(times) > 0.1 else 20)):
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
def copy_bandwidth(device: torch.device, size: int = 2 * FLUSH) -> float:
    """Return the bytes per second of a copy on the device that moves `size` bytes, read and written."""
    source = torch.zeros(max(size // 2, 1), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return size / seconds(lambda: target.copy_(source), device)
