"""The machine of a run and its arithmetic, as a report names them."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path

import torch

from ect import precision
from ect.config import Config
from ect.ranks.device import cpu_count
from ect.ranks.distributed import World

CPUINFO = Path("/proc/cpuinfo")


def facts(device: torch.device, cfg: Config, world: World = World()) -> dict[str, str]:
    """Return what the report says of the machine that a run ends on, and of its arithmetic there."""
    name = precision.resolve(cfg.precision, device).name
    processes = f", {world.size} processes" if world.size > 1 else ""
    return {
        "device": f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}{processes}",
        "processor": f"{processor()}, {cpu_count()} for this process, {torch.get_num_threads()} thread(s)",
        "software": f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}",
        "precision": f"{name}; products of fp32 tensors in {precision.products(device)}",
    }


def processor() -> str:
    """Return the name of the processor, as far as the system tells it."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(named), platform.processor() or platform.machine())
