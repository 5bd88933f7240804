"""The trainer's step on a device: time, kernels, memory, against what was predicted: python benchmarks/profile_step.py.

For each way to run it (as the trainer does, on Triton alone, without the graph): its kernels and their time, by kind beside the
floor of benchmarks/roofline.py, and its memory beside the prediction of ect.cost.memory. --out writes JSON after each way: what
fails or is killed costs no earlier figure.
"""

from __future__ import annotations

import collections
import dataclasses
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # before torch is imported: the profiler reports on stderr what it lacks

import roofline
import torch
from ect_kernels import dispatch
from lib import categories, measure, waterfall
from lib.options import Parser, at_least, new_file
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from ect.assembly import network_spec
from ect.cost import memory
from ect.show.table import Table

MOST = 60  # kernels that are kept


@dataclass(frozen=True)
class Way:
    """A way to run the step. options: of the configuration. kernels: as --kernels."""

    name: str
    options: dict[str, Any]
    kernels: str = ""


def ways(device: torch.device) -> list[Way]:
    """Return the ways to run the step, the trainer's own first."""
    if device.type != "cuda":
        return [Way("as the trainer runs it", {"compile": False})]
    captured = {"precision": "fp16", "channels_last": True, "compile": False, "graph": True}
    return [
        Way("as the trainer runs it", captured),
        Way("every op on Triton", captured, "*=triton"),
        Way("without the graph", {**captured, "graph": False}),
    ]


def profiled(way: Way, case: waterfall.Case, device: torch.device, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield what is known of a way to run the step, more each time."""
    gpu, start = device.type == "cuda", time.perf_counter()
    half = "fp16" if gpu else "fp32"
    row = waterfall.Row(way.name, half, waterfall._own(**way.options), captured=bool(way.options.get("graph")))
    dispatch.set_choice(way.kernels)
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    runner = waterfall.Runner(row, case, device)
    for _ in range(2):
        runner()
    found: dict[str, Any] = {"name": way.name, "ok": True, "kernels_option": way.kernels}
    times = measure.interleaved({way.name: runner}, device, rounds)[way.name]
    found |= {
        "start": time.perf_counter() - start,
        "ms": 1e3 * statistics.median(times),
        "clock": measure.clock(device)[0],
    }
    found["memory"] = _memory(way, case, device)
    yield found
    started = time.perf_counter()
    runner()
    found["host_ms"] = 1e3 * (time.perf_counter() - started)  # until Python is back, on a GPU before the step is done
    listed = kernels(runner, device)
    found["launches"] = sum(count for _, count, _ in listed)
    by_kind: dict[str, float] = collections.defaultdict(float)
    for name, _, milliseconds in listed:
        by_kind[categories.category(name) or "other"] += milliseconds
    found["by_kind"] = dict(by_kind)
    found["kernels"] = [{"name": name, "count": count, "ms": ms} for name, count, ms in listed[:MOST]]
    yield found


def kernels(runner: waterfall.Runner, device: torch.device) -> list[tuple[str, int, float]]:
    """Return (name, calls, ms) of a step's kernels, on a CPU of its operations, the longest first."""
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as trace:
        runner()
        measure.lost(device)  # waits for it
    sums: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for event in trace.events() or []:
        if categories._is_kernel(event) if gpu else event.name.startswith(("aten::", "ect::")):
            sums[event.name][0] += 1
            sums[event.name][1] += (event.time_range.elapsed_us() if gpu else event.self_cpu_time_total) / 1e3
    listed = [(name, int(count), ms) for name, (count, ms) in sums.items()]
    return sorted(listed, key=lambda item: -item[2])


def _memory(way: Way, case: waterfall.Case, device: torch.device) -> dict[str, Any]:
    """Return the bytes at the peak, measured and predicted.

    The benchmark has no averaged network and samples nothing; a prediction for it leaves both out.
    """
    spec = network_spec(case.cfg.net, "ECMPrecond", case.dataset, 0)
    cfg = dataclasses.replace(case.cfg, **way.options)
    plan = memory.predict(cfg, spec, case.dataset, device, case.cfg.batch)
    found: dict[str, Any] = {"predicted": dataclasses.asdict(plan), "predicted_run": plan.total}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found |= {
            "tensors": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
        }
        found |= {"in_use": total - free, "device": total}
    return found


def run(case: waterfall.Case, device: torch.device, rounds: int, out: Path | None) -> dict[str, Any]:
    """Return all ways, and what they are measured against."""
    result: dict[str, Any] = {
        **measure.machine(device), "net": case.name, "batch": case.cfg.batch, "floor": None, "sheet": None, "ways": [],
    }  # fmt: skip

    def write() -> None:
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    def keep(found: dict[str, Any]) -> None:
        result["ways"] = [way for way in result["ways"] if way["name"] != found["name"]] + [found]
        write()

    for way in ways(device):
        if (lost := measure.lost(device)) is not None:
            keep({"name": way.name, "ok": False, "why": f"the device was lost before: {lost}"})
            continue
        known: dict[str, Any] = {"name": way.name}
        try:
            for known in profiled(way, case, device, rounds):
                keep(known)
        except Exception as error:
            keep({**known, "ok": False, "why": measure.reason(error)})
        finally:
            dispatch.set_choice(None)
            gc.collect()
    gpu = roofline.known(result["device"])
    if gpu is not None and case.name == "ddpmpp":  # last of all: counting instructions may take a minute
        result |= {"floor": roofline.floor(gpu, batch=case.cfg.batch), "sheet": gpu.name}
        write()
    return result


def table(result: dict[str, Any], rows: int) -> Iterator[Table]:
    """Yield a table of the ways to run the step, a line each, then the kernels of the first that ran."""
    ran = [way for way in result["ways"] if "kernels" in way]
    lines = []
    for way in result["ways"]:
        tensors = way.get("memory", {}).get("tensors")
        cells = [f"{way['ms']:.2f}" if "ms" in way else "", str(way.get("launches", ""))]
        cells += [f"{tensors / 1e9:.2f}" if tensors else "", f"{way['start']:.1f}" if "start" in way else ""]
        lines.append([way["name"], *cells, way.get("why", "")])
    headers = ["way", "ms", "launches", "GB of tensors", "first step after, s", "failed"]
    yield Table(
        headers, lines, f"{result['net']}, batch {result['batch']}: ways to run the step", left=("way", "failed")
    )
    if ran:
        most = [
            [k["name"][:100], k["count"], f"{k['ms']:.3f}", categories.category(k["name"]) or "other"]
            for k in ran[0]["kernels"][:rows]
        ]
        title = f"{ran[0]['name']}: what takes most time"
        yield Table(["kernel", "calls", "ms", "kind"], most, title, left=("kernel", "kind"))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--device", default="auto", type=measure.device_option)
    parser.add_argument("--net", choices=("digits", "ddpmpp"), default="ddpmpp")
    parser.add_argument("--batch", type=at_least(1), help="default: 64 for digits; 128 for ddpmpp, on a CPU 4")
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--rows", type=at_least(1), default=25, help="kernels to print")
    parser.add_argument("--out", type=new_file, help="JSON file for all figures")
    options = parser.parse_args(argv)
    result = run(
        waterfall.case(options.net, options.device, options.batch), options.device, options.rounds, options.out
    )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(measure.header(options.device), *table(result, options.rows), highlight=False)
    return 0 if any(way["ok"] for way in result["ways"][:1]) else 1


if __name__ == "__main__":
    sys.exit(main())
