"""The rows of a case, timed in rounds; a row that fails is left out with its reason, and takes no other along.

What is known so far is handed on whenever a row gained something: a run that is killed keeps what it paid for.
"""

from __future__ import annotations

import gc
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import roofline
import torch

from lib import categories, measure, waterfall
from lib.products import Products

PRODUCTS = "products alone"  # the floor that a CPU run measures
Result = dict[str, Any]
Report = Callable[[Result, str], None]
"""Takes what is known so far, and a line of news about a row."""


class NoRow(Exception):
    """No row of a case ran; says why."""


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


def reason(error: BaseException, limit: float) -> str:
    """Say in a line why a row is left out."""
    if isinstance(error, Overtime):
        return f"over {limit:g} s to start"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory, try a smaller --batch"
    return measure.reason(error)


class Measurement:
    """The measurement of one case: `run` prepares the rows, times them, and returns a line's "rows", "floor" and "rounds".

    Complete "rounds" are counted; 0: every row's figure is that of one step.
    """

    def __init__(self, case: waterfall.Case, device: torch.device, rounds: int, limit: float, report: Report) -> None:
        self.case, self.device, self.rounds, self.limit, self.report = case, device, rounds, limit, report
        self.done = 0
        self.found: dict[str, Result] = {}
        self.runners: dict[str, Callable[[], Any]] = {}
        self.floor: Result | None = None

    def run(self, names: list[str] | None) -> Result:
        rows = waterfall.rows(self.device)
        for row in rows:
            if self.device.type in row.not_on:
                self.found[row.name] = {"ms": None, "why": f"not on {self.device.type}"}
            elif names is None or row.name in names or row is rows[0]:
                self.prepare(row)
        if not self.runners:
            why = {row["why"] for row in self.found.values() if not row["why"].startswith("not on")}
            raise NoRow(f"{self.case.name}, batch {self.case.cfg.batch}: no row ran ({'; '.join(sorted(why))})")
        if measure.lost(self.device) is None:
            self.take_turns()
        if self.device.type == "cuda":  # last of all: counting instructions may take a minute
            try:
                self.floor = floor(self.case, self.device)
            except Exception as error:
                self.floor = {"ms": None, "what": f"none: {reason(error, self.limit)}"}
        return self.result()

    def prepare(self, row: waterfall.Row) -> None:
        """Run a row's first steps and its profile, and take the time of one step, which stands until the rounds."""
        if (lost := measure.lost(self.device)) is not None:
            self.leave_out(row.name, f"the device was lost before: {lost}")
            return
        start = time.perf_counter()
        try:
            with time_limit(self.limit):
                runner, taken = prepared(row, self.case, self.device, min(self.rounds, 5))
                once = measure.once(runner, self.device)
        except (Overtime, Exception) as error:
            self.leave_out(row.name, reason(error, self.limit))
            return
        self.runners[row.name] = runner
        self.found[row.name] = {"ms": None, **taken}
        known = {name: [1e-3 * found["ms"]] for name, found in self.timed().items()}
        self.update(known | {row.name: [once]})
        seconds = time.perf_counter() - start
        self.report(self.result(), f"{row.name}: {1e3 * once:.2f} ms once, ready after {seconds:.1f} s")

    def take_turns(self) -> None:
        """Run the rounds. A row that fails in one is left out; where it takes the device along, all else stays as it was."""
        if self.device.type != "cuda":
            self._prepare_products()

        def failed(name: str, error: Exception) -> None:
            del self.runners[name]
            if name == PRODUCTS:
                self.floor = {"ms": None, "what": f"none: {reason(error, self.limit)}"}
            else:
                self.leave_out(name, reason(error, self.limit))

        for number, times in enumerate(measure.turns(dict(self.runners), self.device, self.rounds, failed), 1):
            products = times.pop(PRODUCTS, None)
            if products is not None:
                self.floor = {"ms": 1e3 * statistics.median(products), "what": "measured: the products of a step alone"}
            if times:
                self.update(times)
            self.done = number
            self.report(self.result(), f"round {number} of {self.rounds}")

    def leave_out(self, name: str, why: str) -> None:
        self.found[name] = {"ms": None, "why": why}
        gc.collect()
        if self.device.type == "cuda" and measure.lost(self.device) is None:
            torch.cuda.empty_cache()
        self.report(self.result(), f"{name}: left out, {why}")

    def timed(self) -> dict[str, Result]:
        return {name: row for name, row in self.found.items() if row["ms"] is not None}

    def update(self, times: dict[str, list[float]]) -> None:
        """Make figures of the seconds of each row, a value a round.

        Ratios are to the first row: the public code's operations, or the first that runs.
        """
        first = next(iter(times.values()))
        for name, values in times.items():
            ratios = [value / base for value, base in zip(values, first, strict=True)]
            self.found[name] |= figures(values, self.case)
            self.found[name] |= {"ratio": statistics.median(ratios), "ratio_iqr": quartiles(ratios)}

    def result(self) -> Result:
        floor = self.floor or {"ms": None, "what": "none known"}
        return {"rounds": self.done, "rows": self.found, "floor": floor}

    def _prepare_products(self) -> None:
        eager = next(row for row in waterfall.rows(self.device) if row.name == "plain")
        try:
            self.runners[PRODUCTS] = Products(waterfall.Runner(eager, self.case, self.device))
        except Exception as error:
            self.floor = {"ms": None, "what": f"none: {reason(error, self.limit)}"}


def prepared(
    row: waterfall.Row, case: waterfall.Case, device: torch.device, profiled: int
) -> tuple[waterfall.Runner, Result]:
    """Return a row's runner after its first steps.

    Beside it: the seconds these took, its launches, memory, and split by category over `profiled` steps.
    """
    gpu, peak, start = device.type == "cuda", 0, time.perf_counter()
    others = torch.cuda.memory_allocated(device) if gpu else 0
    runner = waterfall.Runner(row, case, device)
    for _ in range(2):  # compiles, captures, chooses algorithms
        if gpu:
            torch.cuda.reset_peak_memory_stats(device)
        runner()
        if gpu:  # a captured step has its memory from its first call, which records it
            peak = max(peak if row.captured else 0, torch.cuda.max_memory_allocated(device) - others)
    if gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    taken = categories.take(runner, device, profiled)
    memory = peak if gpu else runner.resident() + taken.transient
    return runner, {"start": seconds, "launches": taken.launches, "memory": memory, "share": taken.share}


def figures(seconds: list[float], case: waterfall.Case) -> Result:
    """Return the median and quartiles of a step in ms, throughput, and the minutes the recipe would take at it (predicted)."""
    step = statistics.median(seconds)
    sec_per_kimg = step / case.cfg.batch * 1000
    return {
        "ms": 1e3 * step, "iqr": [1e3 * q for q in quartiles(seconds)], "images_per_second": case.cfg.batch / step,
        "sec_per_kimg": sec_per_kimg, "predicted_minutes": sec_per_kimg * case.kimg / 60,
    }  # fmt: skip


def quartiles(values: list[float]) -> list[float]:
    """Return the first and the third quartile."""
    if len(values) < 2:
        return [values[0], values[0]]
    q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return [q1, q3]


def floor(case: waterfall.Case, gpu: torch.device) -> Result:
    """Return the floor from the data sheet of a known GPU."""
    sheet = roofline.known(torch.cuda.get_device_name(gpu))
    if sheet is None or case.name != "ddpmpp":
        return {"ms": None, "what": "none: no data sheet for this device and network"}
    step = roofline.floor(sheet, batch=case.cfg.batch)["step"]
    return {"ms": step, "what": f"predicted: fp16 roofline of {sheet.name}"}
