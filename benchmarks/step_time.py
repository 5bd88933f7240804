"""Time of a training step, row by row from the public design to this project's: python benchmarks/step_time.py.

The rows take turns, in several rounds, so that a machine which slows down slows them all; a figure is the median over rounds,
its spread the interquartile range. Appends a line a network to benchmarks/results/<device>.jsonl and compares it with the last
one of the device; --check exits 1 where a row got more than 5 % slower (on a CPU: its ratio to the first row), and then
records nothing. A row whose first steps take longer than --limit seconds, compilation included, is left out and says so.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # before torch is imported: the profiler reports on stderr what it lacks
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import categories
import history
import measure
import roofline
import torch
import waterfall
from products import Products
from rich.console import Console
from rich.table import Table
from torch._inductor import config as inductor

PRODUCTS = "products alone"  # the floor that a CPU run measures


class Overtime(BaseException):  # an Exception would be taken for a failure of torch.compile's, and wrapped
    """Raised by time_limit."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise Overtime in the block once it has run that long, as soon as Python is back from what it calls. Main thread only."""

    def over(number: int, frame: Any) -> None:
        raise Overtime

    previous = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def measured(
    case: waterfall.Case, device: torch.device, names: list[str] | None, rounds: int, limit: float
) -> dict[str, Any]:
    """One line of results for a case: every row that runs here, and why the others do not."""
    found: dict[str, dict[str, Any]] = {}
    runners: dict[str, Callable[[], Any]] = {}
    for row in waterfall.rows(device):
        if device.type in row.not_on:
            found[row.name] = {"ms": None, "why": f"not on {device.type}"}
        elif names is None or row.name in names or row.name == "plain":
            try:
                with time_limit(limit):
                    runners[row.name], found[row.name] = prepared(row, case, device, min(rounds, 5))
            except Overtime:
                found[row.name] = {"ms": None, "why": f"over {limit:g} s to start"}
            except torch.OutOfMemoryError:
                found[row.name] = {"ms": None, "why": "out of memory, try a smaller --batch"}
                torch.cuda.empty_cache()
    if not runners:
        why = {row["why"] for row in found.values() if not row["why"].startswith("not on")}
        raise SystemExit(f"{case.name}, batch {case.cfg.batch}: no row ran ({'; '.join(sorted(why))})")
    floor = _floor(case, device)
    if floor is None:
        eager = next(row for row in waterfall.rows(device) if row.name == "plain")
        runners[PRODUCTS] = Products(waterfall.Runner(eager, case, device))
    times = measure.interleaved(runners, device, rounds)
    products = times.pop(PRODUCTS, None)
    first = next(iter(times.values()))  # the plain row, or the first that fits in memory
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, first, strict=True)]
        found[name] |= figures(values, case) | {"ratio": statistics.median(ratios), "ratio_iqr": quartiles(ratios)}
    if products is not None:
        floor = {"ms": 1e3 * statistics.median(products), "what": "measured: the products of a step alone"}
    return {"rows": found, "floor": floor or {"ms": None, "what": "none known"}}


def prepared(
    row: waterfall.Row, case: waterfall.Case, device: torch.device, profiled: int
) -> tuple[waterfall.Runner, dict[str, Any]]:
    """A row's runner after its first steps, with its launches, memory, and split by category over `profiled` steps."""
    gpu, peak = device.type == "cuda", 0
    others = torch.cuda.memory_allocated(device) if gpu else 0
    runner = waterfall.Runner(row, case, device)
    for _ in range(2):  # compiles, captures, chooses algorithms
        if gpu:
            torch.cuda.reset_peak_memory_stats(device)
        runner()
        if gpu:  # a captured step has its memory from its first call, which records it
            peak = max(peak if row.name == "+graph" else 0, torch.cuda.max_memory_allocated(device) - others)
    taken = categories.take(runner, device, profiled)
    memory = peak if gpu else runner.resident() + taken.transient
    return runner, {"launches": taken.launches, "memory": memory, "share": taken.share}


def teacher(case: waterfall.Case, device: torch.device, rounds: int) -> str:
    """What it costs that the compiled teacher runs the student's graph, which keeps what a backward would need; in a line."""
    runners = {row.name: waterfall.Runner(row, case, device) for row in waterfall.teacher_rows(device)}
    for runner in runners.values():
        runner(), runner()  # compiles
    plain, shared = measure.interleaved(runners, device, rounds).values()
    added = [100 * (b / a - 1) for a, b in zip(plain, shared, strict=True)]
    low, high = quartiles(added)
    return (
        f"{case.name}, batch {case.cfg.batch}, compiled: {1e3 * statistics.median(shared):.2f} ms a step with the teacher on "
        f"the student's graph, {1e3 * statistics.median(plain):.2f} ms under no_grad; {statistics.median(added):+.1f} % "
        f"(quartiles {low:+.1f}, {high:+.1f}; {measure.clock(device)[0]})"
    )


def figures(seconds: list[float], case: waterfall.Case) -> dict[str, Any]:
    """Median and quartiles of a step in ms, throughput, and the minutes the recipe would take at it (predicted)."""
    step = statistics.median(seconds)
    sec_per_kimg = step / case.cfg.batch * 1000
    return {
        "ms": 1e3 * step, "iqr": [1e3 * q for q in quartiles(seconds)], "images_per_second": case.cfg.batch / step,
        "sec_per_kimg": sec_per_kimg, "predicted_minutes": sec_per_kimg * case.kimg / 60,
    }  # fmt: skip


def quartiles(values: list[float]) -> list[float]:
    """First and third."""
    if len(values) < 2:
        return [values[0], values[0]]
    q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return [q1, q3]


def _floor(case: waterfall.Case, device: torch.device) -> dict[str, Any] | None:
    """From the data sheet of a known GPU; None where a floor must be measured."""
    if device.type != "cuda":
        return None
    gpu = roofline.known(torch.cuda.get_device_name(device))
    if gpu is None or case.name != "ddpmpp":
        return {"ms": None, "what": "none: no data sheet for this device and network"}
    step = roofline.floor(gpu, batch=case.cfg.batch)["step"]
    return {"ms": step, "what": f"predicted: fp16 roofline of {gpu.name}"}


def tables(line: dict[str, Any]) -> list[Table]:
    """The waterfall, and its split by category."""
    net, floor = f"{line['net']}, batch {line['batch']}", line["floor"]
    title = f"{net}: {line['clock']}" + (f"; floor {floor['ms']:.1f} ms, {floor['what']}" if floor["ms"] else "")
    times = Table(title=title)
    for column in (
        "row",
        "ms/step",
        "ms IQR",
        "ratio",
        "ratio IQR",
        "/ floor",
        "img/s",
        "sec/kimg",
        "predicted min",
        "MB",
        "launches",
    ):
        times.add_column(column, justify="left" if column == "row" else "right")
    split = Table(title=f"{net}: ms by category", caption="share of profiled steps, times the median")
    for column in ("row", *categories.CATEGORIES):
        split.add_column(column, justify="left" if column == "row" else "right")
    for name, row in line["rows"].items():
        if row["ms"] is None:
            times.add_row(name, row["why"])
            continue
        over = f"{row['ms'] / floor['ms']:.2f}" if floor["ms"] else ""
        times.add_row(
            name, f"{row['ms']:.2f}", "{:.2f}-{:.2f}".format(*row["iqr"]), f"{row['ratio']:.3f}",
            "{:.3f}-{:.3f}".format(*row["ratio_iqr"]), over, f"{row['images_per_second']:.1f}",
            f"{row['sec_per_kimg']:.3f}", f"{row['predicted_minutes']:.1f}", f"{row['memory'] / 1e6:.0f}",
            str(row["launches"]),
        )  # fmt: skip
        split.add_row(name, *(f"{row['ms'] * row['share'][c]:.2f}" for c in categories.CATEGORIES))
    return [times, split]


def run(case: waterfall.Case, device: torch.device, options: argparse.Namespace, console: Console) -> bool:
    """Measure, print, compare and record a case; False where it got slower."""
    line = {
        "benchmark": "step_time", "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **measure.machine(device), "clock": measure.clock(device)[0], "threads": torch.get_num_threads(),
        "net": case.name, "batch": case.cfg.batch, "rounds": options.rounds,
        **measured(case, device, options.rows, options.rounds, options.limit),
    }  # fmt: skip
    for table in tables(line):
        console.print(table, highlight=False)
    path = options.results / f"{measure.slug(line['device'])}.jsonl"
    old = history.last(path, line)
    slower = list(history.regressions(old, line)) if old is not None else []
    if old is not None:
        against = f"against {old['commit']} of {old['time']}"
        console.print(f"{against}: " + ("; ".join(slower) or "nothing more than 5 % slower"), highlight=False)
    failed = bool(slower) and options.check
    if options.append and not failed:
        history.append(path, line)
    return not failed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    parser.add_argument("--net", choices=("digits", "ddpmpp"), action="append", help="default: ddpmpp, on a CPU both")
    parser.add_argument("--batch", type=int, help="default: 64 for digits; 128 for ddpmpp, on a CPU 4")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows, and the first")
    parser.add_argument("--limit", type=float, default=300, help="seconds that a row's first steps may take")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--results", type=Path, default=history.RESULTS, help="folder of the recorded lines")
    parser.add_argument("--check", action="store_true", help="exit 1 where a row got more than 5 %% slower")
    parser.add_argument("--no-append", dest="append", action="store_false", help="record nothing")
    parser.add_argument(
        "--teacher", action="store_true", help="only what it costs that the compiled teacher has gradients"
    )
    options = parser.parse_args(argv)
    device: torch.device = options.device
    known = [row.name for row in waterfall.rows(device)]
    for name in options.rows or []:
        if name not in known:
            parser.error(f"--rows: no row {name!r}; known: {', '.join(map(repr, known))}")
    torch.set_num_threads(options.threads)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # says at compilation that there is no GPU
    inductor.cpp.enable_kernel_profile = True  # lets the profiler see the kernels that torch.compile makes for a CPU
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(measure.header(device), highlight=False)
    if options.teacher:
        net = (options.net or ["ddpmpp" if device.type == "cuda" else "digits"])[0]
        console.print(teacher(waterfall.case(net, device, options.batch), device, options.rounds), highlight=False)
        return 0
    nets = options.net or (["ddpmpp"] if device.type == "cuda" else ["digits", "ddpmpp"])
    results = [run(waterfall.case(net, device, options.batch), device, options, console) for net in nets]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
