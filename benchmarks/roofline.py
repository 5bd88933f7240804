"""The time below which a training step of DDPM++ on CIFAR-10 (batch 128) cannot go: python benchmarks/roofline.py.

Every figure is PREDICTED: the FLOPs and bytes of each operation of the step on the fused ops, counted by lib/work.py, at
the peak rates of a GPU's data sheet. An operation takes the longest of its arithmetic, its traffic and, where it is a CUDA
kernel of ours, the issue of its instructions (benchmarks/lib/instructions.py; that takes nvcc, and a minute the first time).
Operations run one after another, launches cost nothing. A second table shows which limit rules our kernels. --results FILE adds
measured / floor for the lines that benchmarks/step_time.py wrote.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lib import history, instructions, work
from lib.options import Parser, possible_path
from rich.console import Console

from ect.cost.gpus import GPUS, Gpu
from ect.show.table import Table

BATCH, STEPS = 128, 8000
PRECISIONS = {"fp16": torch.float16, "tf32": None}
KINDS = ("conv", "norm", "residual", "attention", "optimizer", "other")
NOTE = (
    "Predicted, not measured: FLOPs and bytes counted on the step's operations, at data-sheet peaks, the longer of the two for "
    "each operation, one after another, without the cost of launches. In fp16, what stays fp32 runs outside tensor cores. "
)
ISSUE = (
    "Our CUDA kernels (norm, residual, optimizer, and two small ones in other) also issue instructions: those of the longest "
    "way through their loops, counted in the SASS for each GPU's architecture, without what is outside of loops, at four a "
    "clock and SM and the boost clock, never stalled. The longer of traffic and issue rules."
)
NO_ISSUE = (
    "*** No nvcc or nvdisasm that could do it here: the instructions of our kernels are NOT counted; the times of the norms "
    "and the optimizer are those of their DRAM traffic alone, too short on the faster GPUs. ***"
)
LANES = 32


def known(device: str) -> Gpu | None:
    """Return the data sheet of a device by torch's name for it."""
    return next((gpu for gpu in GPUS if re.search(gpu.pattern, device)), None)


def limits(item: work.Work, gpu: Gpu, precision: str) -> dict[str, float]:
    """Return the milliseconds by each limit: 'arithmetic', 'DRAM' and, where its instructions are known, 'issue'.

    What stays fp32 in an fp16 step runs outside of the tensor cores.
    """
    rate = gpu.fp16 if item.dtype == torch.float16 else gpu.tf32 if precision == "tf32" else gpu.fp32
    found = {"arithmetic": item.flops / (rate * 1e9), "DRAM": item.bytes / (gpu.bandwidth * 1e6)}
    counts = instructions.counts(gpu.arch) if item.kernel else None
    if counts is not None:
        found["issue"] = item.rows / LANES * counts[item.bits][item.kernel] / gpu.issue * 1e3
    return found


def milliseconds(item: work.Work, gpu: Gpu, precision: str) -> float:
    """Return the milliseconds by the limit that rules."""
    return max(limits(item, gpu, precision).values())


def note() -> str:
    return NOTE + (NO_ISSUE if instructions.counts(GPUS[0].arch) is None else ISSUE)


def floor(gpu: Gpu, precision: str = "fp16", batch: int = BATCH) -> dict[str, float]:
    """Return the predicted milliseconds of a step by kind, and their sum as 'step'."""
    times = dict.fromkeys(KINDS, 0.0)
    for item in work.ddpmpp_step(batch, PRECISIONS[precision]):
        times[item.kind] += milliseconds(item, gpu, precision)
    return {**times, "step": sum(times.values())}


def grouped(items: Iterable[work.Work]) -> dict[tuple[str, str], list[work.Work]]:
    """Group by (level, kind), in the order of the network's levels."""
    groups: dict[tuple[str, str], list[work.Work]] = {}
    for item in items:
        groups.setdefault((item.level, item.kind), []).append(item)
    order = sorted({level for level, _ in groups}, key=lambda level: -int(level.split("x")[0]) if "x" in level else 0)
    return {(lv, kind): groups[lv, kind] for lv in order for kind in KINDS if (lv, kind) in groups}


def table(precision: str) -> Table:
    """Return the floors per level and kind of operation."""
    items = work.ddpmpp_step(BATCH, PRECISIONS[precision])

    def row(level: str, kind: str, part: Sequence[work.Work]) -> list[str]:
        figures = [f"{sum(w.flops for w in part) / 1e12:.2f}", f"{sum(w.bytes for w in part) / 1e9:.2f}"]
        return [level, kind, *figures, *(f"{sum(milliseconds(w, gpu, precision) for w in part):.2f}" for gpu in GPUS)]

    minutes = [sum(milliseconds(w, gpu, precision) for w in items) * STEPS / 6e4 for gpu in GPUS]
    rows = [
        *(row(level, kind, part) for (level, kind), part in grouped(items).items()),
        [],
        *(row("all", kind, [w for w in items if w.kind == kind]) for kind in KINDS),
        [],
        row("all", "all", items),
        [f"{STEPS} steps", "minutes", "", "", *(f"{m:.1f}" for m in minutes)],
    ]
    headers = ["level", "op", "TFLOP", "GB", *(gpu.name for gpu in GPUS)]
    return Table(headers, rows, f"{precision}, batch {BATCH}: predicted floor of a step, ms", left=headers[:2])


def issue_table(precision: str) -> Table:
    """Return a table of our kernels: a step's time by DRAM and by issue slots."""
    groups: dict[tuple[str, str], list[work.Work]] = {}
    for item in work.ddpmpp_step(BATCH, PRECISIONS[precision]):
        if item.kernel:
            groups.setdefault((item.level, item.kernel), []).append(item)
    rows = []
    for (level, kernel), part in sorted(groups.items(), key=lambda group: -sum(w.bytes for w in group[1])):
        cells = []
        for gpu in GPUS:
            found = [limits(w, gpu, precision) for w in part]
            dram, issue = (sum(each.get(limit, 0.0) for each in found) for limit in ("DRAM", "issue"))
            counted = all("issue" in each for each in found)
            cells.append(f"{dram:.2f} {'<' if dram < issue else '>'} {issue:.2f}" if counted else f"{dram:.2f} > ?")
        rows.append([level, kernel, *cells])
    title = f"{precision}, batch {BATCH}: predicted ms of our kernels by DRAM and by issue slots, the longer one rules"
    return Table(["level", "kernel", *(gpu.name for gpu in GPUS)], rows, title, left=("level", "kernel"))


def assumptions() -> Table:
    headers = ["GPU", "fp16 TFLOP/s", "TF32 TFLOP/s", "fp32 TFLOP/s", "GB/s", "SMs", "GHz", "source"]
    rates = ((gpu.fp16, gpu.tf32, gpu.fp32, gpu.bandwidth, gpu.sms, gpu.clock) for gpu in GPUS)
    rows = [[gpu.name, *(f"{rate:g}" for rate in each), gpu.sheet] for gpu, each in zip(GPUS, rates, strict=True)]
    return Table(headers, rows, "Peak rates, dense", left=("GPU", "source"))


def compared(lines: Iterable[dict[str, Any]]) -> Table:
    """Return the measured rows of step_time's lines over their floors."""
    rows = []
    for line in lines:
        for name, row in line["rows"].items():
            if row.get("ms") is None:
                continue
            floor_ms = line["floor"]["ms"]
            ratio = f"{row['ms'] / floor_ms:.2f}" if floor_ms else ""
            cells = (f"{row['ms']:.2f}", f"{floor_ms:.2f}" if floor_ms else "none", ratio, line["floor"]["what"])
            rows.append([line["device"], line["net"], name, *cells])
    headers = ["device", "net", "row", "measured ms", "floor ms", "measured / floor", "floor is"]
    return Table(headers, rows, left=("device", "net", "row", "floor is"))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp16")
    parser.add_argument("--results", type=possible_path, help="a file of benchmarks/results/: prints measured / floor")
    options = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if options.results is not None:
        if not options.results.is_file():
            parser.error(
                f"--results {options.results}: no such file; python benchmarks/step_time.py writes one a device"
            )
        lines = history.read(options.results)
        console.print(compared(lines), highlight=False)
        return 0
    console.print(assumptions(), table(options.precision), highlight=False)
    if instructions.counts(GPUS[0].arch) is not None:
        console.print(issue_table(options.precision), highlight=False)
    console.print(note(), highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
