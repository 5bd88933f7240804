"""Time, bytes and error of every op, backend and shape: python benchmarks/ops.py [--device cpu] [--op NAME] [--dtype fp16].

A backend is timed only after it passed truth.check on the same numbers. One that fails has its reason for a row, and costs no
other: each op's table is printed as soon as it is complete, and the exit status is 1. The last columns give the bytes that the
op cannot do without per second of its time, also as a share of a copy's: on a GPU of a large one, each run starting with a cold
L2, on a CPU of one that moves as many bytes, in cache where these fit. `reference` is the op in plain PyTorch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

from ect_kernels import dispatch
from ect_kernels.choice import OPS
from ect_kernels.testing import emulator, truth
from lib import cases, measure
from lib.options import Parser, at_least
from rich.console import Console
from rich.text import Text

from ect.show.table import Table

NO_GPU = "on a CPU: triton is interpreted and emulated compiled with g++; their times are no forecast of a GPU's"
STAND_INS = ("triton", "emulated")  # on a CPU
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def times(bench: cases.Bench, backend: str, device: torch.device) -> Iterator[tuple[str, float, int]]:
    """Yield (pass, seconds, bytes) of forward and, where there is one, backward."""
    kwargs, function = bench.case.make(device), bench.timed or bench.function
    with torch.no_grad():
        seconds = measure.seconds(lambda: function(**kwargs, backend=backend), device)
    yield "fwd", seconds, bench.forward
    if not bench.backward:
        return
    inputs: dict[str, Tensor] = {name: kwargs[name].requires_grad_() for name in bench.case.grads}
    outputs = function(**kwargs, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    ones = [torch.ones_like(out) for out in outputs]

    def backward() -> Any:
        return torch.autograd.grad(outputs, list(inputs.values()), ones, retain_graph=True)

    yield "bwd", measure.seconds(backward, device), bench.backward


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--device", default="auto", type=measure.device_option)
    parser.add_argument("--op", choices=OPS, action="append", help="only this op (may be repeated)")
    parser.add_argument("--backend", choices=dispatch.NAMES, action="append", help="only this one (may be repeated)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--images", type=at_least(1), help="batch size (128 on a GPU, 1 on the CPU)")
    parser.add_argument("--quick", action="store_true", help="two shapes an op")
    options = parser.parse_args(argv)
    device, gpu, wanted = options.device, options.device.type == "cuda", options.backend or dispatch.NAMES
    caption = NO_GPU if not gpu and any(name in wanted for name in STAND_INS) else ""
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(measure.header(device), highlight=False)
    if not gpu:
        torch.set_num_threads(1)
        if "emulated" in wanted:
            _load_emulator(options.op or OPS, console)
    failed = False
    for op in options.op or OPS:
        headers = ["op", "shape", "backend", "pass", "ms", "MB", "error/bar", "GB/s", "of copy"]
        lines: list[list[str | Text]] = []
        table = Table(headers, lines, caption=caption, left=headers[:4])
        for bench in cases.benches(op, options.images or (128 if gpu else 1), DTYPES[options.dtype], options.quick):
            for backend in dispatch.OPS[op].usable(device):
                if backend not in wanted:
                    continue
                if (lost := measure.lost(device)) is not None:
                    console.print(table, f"the device was lost: {lost}", highlight=False, markup=False)
                    return 1
                rows, why, wrong = measured(bench, backend, device)
                failed |= wrong
                for row in rows:
                    lines.append([op, bench.case.name, backend, *row])
                if why:
                    lines.append([op, bench.case.name, backend, "", "", "", Text(why, "red" if wrong else "")])
        console.print(table, highlight=False)
    return 1 if failed else 0


def measured(bench: cases.Bench, backend: str, device: torch.device) -> tuple[list[list[str]], str, bool]:
    """Return (cells from "pass" on, a row for each pass; why there are none, or not all; whether the backend is at fault)."""
    rows: list[list[str]] = []
    try:
        figures = truth.check(bench.function, backend, bench.case, device)
        worst = max((f.error / f.bar if f.bar else 0.0 for f in figures), default=0.0)
        for name, seconds, size in times(bench, backend, device):
            row = [name, f"{1e3 * seconds:.3f}", f"{size / 1e6:.2f}", f"{worst:.2f}"]
            if device.type == "cuda" or backend not in STAND_INS:
                rate = size / seconds
                copy = measure.copy_bandwidth(device) if device.type == "cuda" else measure.copy_bandwidth(device, size)
                row += [f"{rate / 1e9:.3g}", f"{100 * rate / copy:.0f} %"]
            rows.append(row)
    except dispatch.BackendError as error:
        return rows, str(error), False  # does not take this shape
    except AssertionError as error:
        return rows, str(error), True
    except Exception as error:
        return rows, measure.reason(error), True
    return rows, "", False


def _load_emulator(ops: Sequence[str], console: Console) -> None:
    written = [op for op in ops if (emulator.ROOT / "csrc" / f"{op}.cu").exists()]
    try:
        if written:  # no name would be all of them
            emulator.load(*written)
    except FileNotFoundError as error:
        console.print(f"no backend 'emulated': {error}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
