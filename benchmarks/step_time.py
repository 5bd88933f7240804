"""Time of a training step, row by row from the public code's operations to this project's: python benchmarks/step_time.py.

The first row is what the public code does at each step, and all ratios are to it. The rows take turns, in several rounds, so
that a machine which slows down slows them all; a figure is the median over rounds, its spread the interquartile range. Appends
a line a network to benchmarks/results/<device>.jsonl and compares it with the last one that has the same first row; --check
exits 1 where a row got more than 5 % slower (on a CPU: its ratio to the first row), and then records nothing. A row that fails,
or whose first steps take longer than --limit seconds, compilation included, is left out and says so. What is measured so far
stands in benchmarks/results/<device>-<net>-<batch>.partial until the line is complete.
The last line says after how many steps torch.compile has paid for its start, with an empty compiler cache.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # before torch is imported: the profiler reports on stderr what it lacks
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from lib import categories, history, measure, payback, rounds, waterfall
from lib.options import Parser, at_least, folder
from rich.console import Console
from torch._inductor import config as inductor

from ect.show.table import Table


def teacher(case: waterfall.Case, device: torch.device, count: int) -> str:
    """Return, in a line, what it costs that the compiled teacher runs the student's graph.

    That graph keeps what a backward would need.
    """
    runners = {row.name: waterfall.Runner(row, case, device) for row in waterfall.teacher_rows(device)}
    for runner in runners.values():
        runner(), runner()  # compiles
    plain, shared = measure.interleaved(runners, device, count).values()
    added = [100 * (b / a - 1) for a, b in zip(plain, shared, strict=True)]
    low, high = rounds.quartiles(added)
    return (
        f"{case.name}, batch {case.cfg.batch}, compiled: {1e3 * statistics.median(shared):.2f} ms a step with the teacher on "
        f"the student's graph, {1e3 * statistics.median(plain):.2f} ms under no_grad; {statistics.median(added):+.1f} % "
        f"(quartiles {low:+.1f}, {high:+.1f}; {measure.clock(device)[0]})"
    )


def tables(line: dict[str, Any]) -> list[Table]:
    """Return the waterfall, and its split by category."""
    net, floor = f"{line['net']}, batch {line['batch']}", line["floor"]
    title = f"{net}: {line['clock']}" + (f"; floor {floor['ms']:.1f} ms, {floor['what']}" if floor["ms"] else "")
    times: list[list[str]] = []
    split: list[list[str]] = []
    for name, row in line["rows"].items():
        if row["ms"] is None:
            times.append([name, row["why"]])
            continue
        over = f"{row['ms'] / floor['ms']:.2f}" if floor["ms"] else ""
        times.append([
            name, f"{row['ms']:.2f}", "{:.2f}-{:.2f}".format(*row["iqr"]), f"{row['ratio']:.3f}",
            "{:.3f}-{:.3f}".format(*row["ratio_iqr"]), over, f"{row['images_per_second']:.1f}",
            f"{row['sec_per_kimg']:.3f}", f"{row['predicted_minutes']:.1f}", f"{row['memory'] / 1e6:.0f}",
            str(row["launches"]),
        ])  # fmt: skip
        split.append([name, *(f"{row['ms'] * row['share'][c]:.2f}" for c in categories.CATEGORIES)])
    figures = (
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
    )
    by_category, shares = f"{net}: ms by category", "share of profiled steps, times the median"
    return [Table(("row", *figures), times, title), Table(("row", *categories.CATEGORIES), split, by_category, shares)]


def run(case: waterfall.Case, device: torch.device, options: argparse.Namespace, console: Console) -> bool:
    """Measure, print, compare and record a case; return False where it got slower or nothing ran."""
    line: dict[str, Any] = {
        "benchmark": "step_time", "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **measure.machine(device), "clock": measure.clock(device)[0], "threads": torch.get_num_threads(),
        "net": case.name, "batch": case.cfg.batch, "load": [measure.load()],
    }  # fmt: skip
    path = options.results / f"{measure.slug(line['device'])}.jsonl"
    partial = history.partial(path, line)

    def report(known: rounds.Result, news: str) -> None:
        console.print(news, highlight=False, markup=False)
        if options.append:
            history.keep(partial, {**line, "partial": news, **known})

    measurement = rounds.Measurement(case, device, options.rounds, options.limit, report)
    try:
        line |= measurement.run(options.rows)
    except rounds.NoRow as error:
        console.print(str(error), highlight=False, markup=False)
        return False
    line["load"].append(measure.load())
    before, after = waterfall.compile_rows(device)
    line["payback"] = payback.steps(line["rows"], before, after)
    for table in tables(line):
        console.print(table, highlight=False)
    console.print(payback.sentence(line["payback"], case.cfg), highlight=False, markup=False)
    old = history.last(path, line)
    slower = list(history.regressions(old, line)) if old is not None else []
    if old is not None:
        against = f"against {old['commit']} of {old['time']}"
        console.print(f"{against}: " + ("; ".join(slower) or "nothing more than 5 % slower"), highlight=False)
    failed = bool(slower) and options.check
    if options.append and not failed:
        history.append(path, line)
    partial.unlink(missing_ok=True)
    return not failed


@contextmanager
def empty_compiler_cache() -> Iterator[None]:
    """Give the block an empty compiler cache, as a machine has it that compiles a network for the first time.

    With another one a row's start would depend on what ran before.
    """
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ |= {name: str(Path(folder) / name.lower()) for name in names}
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--device", default="auto", type=measure.device_option)
    parser.add_argument("--net", choices=("digits", "ddpmpp"), action="append", help="default: ddpmpp, on a CPU both")
    parser.add_argument("--batch", type=at_least(1), help="default: 64 for digits; 128 for ddpmpp, on a CPU 4")
    parser.add_argument("--rounds", type=at_least(1), default=7)
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows, and the first")
    parser.add_argument(
        "--limit", type=at_least(0.1, float), default=300, help="seconds that a row's first steps may take"
    )
    parser.add_argument("--threads", type=at_least(1), default=1, help="CPU threads")
    parser.add_argument("--results", type=folder, default=history.RESULTS, help="folder of the recorded lines")
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
    with empty_compiler_cache():
        results = [run(waterfall.case(net, device, options.batch), device, options, console) for net in nets]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
