"""Before a backend is trusted: each op's automatic choice against the reference, on the device and at the shapes of a run.

A call passes where every result is finite wherever plain PyTorch's is, where its largest error against fp64 truth is at most
    4 (2 max |error of plain PyTorch at that dtype| + 4 eps max |truth|)
and so is its root mean square, with 4 eps replaced by eps, and where the dropout mask is the same in every bit. That is four
times the bar of the tests (a rounding that misses those by half is no fault), and far below what a wrong index, a race or a
missing wait does. Forward and backward are calls of their own. Whatever a backend leaves unwritten reads as NaN.

A backend that fails is refused (dispatch.refuse), and the next in line is checked, down to the reference. One that was asked
for by name is not replaced: BackendError. What does not come back within SECONDS ends the process with status HUNG.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ect_kernels import dispatch
from ect_kernels.calls import Call, Shape
from ect_kernels.dispatch import BackendError, Op

SECONDS = 60.0  # for one call, the compilation of a Triton kernel included
HUNG = 3  # exit status
MARGIN = 4.0  # over the bar of the tests


@dataclass
class Report:
    """The result of a check.

    calls: how many were compared, by (op, backend). failed: why, by (op, backend). skipped: sentences about what could
    not be checked. seconds, compiling: time spent in all, and of that in first calls of Triton kernels.
    """

    calls: dict[tuple[str, str], int] = field(default_factory=dict)
    failed: dict[tuple[str, str], str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0
    compiling: float = 0.0


def check(calls: Sequence[Call], device: torch.device, report: Report | None = None) -> Report:
    """Check the ops that `calls` need, and refuse the backends that fail. Raises BackendError for one asked for by name."""
    report, started = report or Report(), time.monotonic()
    for name in dict.fromkeys(call.op for call in calls):
        op, of_op = dispatch.OPS[name], [call for call in calls if call.op == name]
        while (failure := _failure(op, of_op, device, report)) is not None:
            backend, reason = failure
            report.failed[name, backend] = reason
            if dispatch.requested(name) is not None:
                raise BackendError(
                    f"{name}: backend {backend!r} failed its check: {reason}; leave it to auto, or name another"
                )
            dispatch.refuse(name, backend, device, reason)
    report.seconds += time.monotonic() - started
    return report


def _failure(op: Op, calls: Sequence[Call], device: torch.device, report: Report) -> tuple[str, str] | None:
    """Return the first backend that fails one of the calls it would be chosen for, and why."""
    counts: dict[tuple[str, str], int] = {}
    for call in calls:
        for backend in _candidates(op, device):
            if backend == "reference":
                break
            before = len(report.skipped)
            try:
                reason = compare(call, backend, device, report)
            except BackendError:  # a limit of the backend: the next one runs this call
                if dispatch.requested(op.name) is not None:
                    raise
                continue
            if reason is not None:
                return backend, f"{call}: {reason}"
            counts[op.name, backend] = counts.get((op.name, backend), 0) + (len(report.skipped) == before)
            break
    report.calls = {key: n for key, n in report.calls.items() if key[0] != op.name} | counts
    return None


def _candidates(op: Op, device: torch.device) -> list[str]:
    name = dispatch.requested(op.name)
    return op.candidates(device) if name is None else [name]


def compare(call: Call, backend: str, device: torch.device, report: Report) -> str | None:
    """Return why `backend` fails the call, or None. Raises BackendError where it does not take it."""
    inputs = call.inputs(device)
    try:
        truth, plain = call.run(inputs, "reference", torch.float64), call.run(inputs, "reference")
    except torch.OutOfMemoryError:
        report.skipped.append(f"{call}: not checked, out of memory")
        return None
    try:
        remedy = f"--kernels {call.op}={_next(call.op, backend, device)}"
        with bounded(f"{call.op}: backend {backend}", remedy):
            if backend == "triton":
                started = time.monotonic()
                call.run(inputs, backend)
                synchronize(device)
                report.compiling += time.monotonic() - started
            with unwritten_is_nan():
                got = call.run(inputs, backend)
            synchronize(device)
    except BackendError:
        raise
    except torch.OutOfMemoryError:
        report.skipped.append(f"{call}: {backend} not checked, out of memory")
        return None
    except Exception as error:
        return survived(error, f"{call.op}: backend {backend}", remedy, device)
    return next((text for name in truth if (text := _difference(name, call, truth, plain, got)) is not None), None)


def _difference(
    name: str, call: Call, truth: dict[str, Tensor], plain: dict[str, Tensor], got: dict[str, Tensor]
) -> str | None:
    """Return what is wrong with a result, or None."""
    want, near, found = truth[name].double(), plain[name].double(), got[name].double()
    if want.numel() == 0:
        return None
    holes = int((found.isfinite() != near.isfinite()).sum())
    if holes:
        return f"{name}: {holes} of {want.numel()} values are not finite, or should not be"
    sure = want.isfinite() & near.isfinite()
    want, near, found = want[sure], near[sure], found[sure]
    if want.numel() == 0:
        return None
    eps = _eps(call, got[name])
    worst = MARGIN * (2 * _max(near - want) + 4 * eps * _max(want))
    if name == "y" and dict(call.arguments).get("seed") is not None:
        apart = ((found == 0) != (near == 0)) & ((found - near).abs() > worst)
        if bits := int(apart.sum()):
            return f"dropout mask: {bits} of {want.numel()} bits differ"
    error, mean = found - want, MARGIN * (2 * _rms(near - want) + eps * _rms(want))
    if _max(error) > worst:
        return f"{name}: error {_max(error):.3g}, at most {worst:.3g} may be"
    if _rms(error) > mean:
        return f"{name}: mean error {_rms(error):.3g}, at most {mean:.3g} may be"
    return None


def _eps(call: Call, result: Tensor) -> float:
    """Return the rounding to expect of a result; 0 for whole numbers.

    It is that of the result's dtype. But an image is no better than the images it came from, in whose dtype a kernel
    may keep its sums, and nothing is better than fp32, in which plain PyTorch and the kernels compute.
    """
    if not result.dtype.is_floating_point:
        return 0.0
    shapes = [value for _, value in call.arguments if isinstance(value, Shape) and len(value.size) == 4]
    images = [shape.dtype for shape in shapes if shape.dtype.is_floating_point] if result.dim() == 4 else []
    # A noise level is exp(P_mean + P_std z), z of up to 6: a last bit of z, on which no two cosines agree, counts P_std times
    # over, and the truth is no better, for the draws are fp32 in any dtype.
    amplified = 1 + 8 * dict(call.arguments).get("P_std", 0.0)
    return amplified * max(torch.finfo(dtype).eps for dtype in (result.dtype, torch.float32, *images))


def _max(x: Tensor) -> float:
    return float(x.abs().max())


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _next(op: str, backend: str, device: torch.device) -> str:
    """Return what to name in place of a backend."""
    left = dispatch.OPS[op].candidates(device)
    return left[left.index(backend) + 1] if backend in left[:-1] else "reference"


def synchronize(device: torch.device) -> None:
    """Wait for the device; an error of a kernel surfaces here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alive(device: torch.device) -> bool:
    """Return whether the device still works: some faults of a kernel leave a process without it."""
    try:
        synchronize(device)
        return float(torch.ones(1, device=device)) == 1.0
    except RuntimeError:
        return False


def survived(error: Exception, what: str, remedy: str, device: torch.device) -> str:
    """Return the error in a line, or end the process if the device is lost with it: it could do nothing any more."""
    reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if not alive(device):
        _exit(f"{what} failed, and the device with it: {reason}", remedy)
    return reason


def _exit(what: str, remedy: str) -> None:
    sys.stdout.flush()  # what was said so far would go with the process
    print(f"error: {what}; start again with {remedy}", file=sys.stderr, flush=True)
    os._exit(HUNG)


@contextmanager
def bounded(what: str, remedy: str, seconds: float | None = None) -> Iterator[None]:
    """End the process if the block takes longer than SECONDS, or `seconds`.

    A kernel that hangs can be neither stopped nor survived.
    """
    seconds = SECONDS if seconds is None else seconds
    timer = threading.Timer(seconds, _exit, [f"{what} did not return within {seconds:g} s", remedy])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Fill new memory with NaN inside the block (whole numbers with their largest), not with what was right a moment ago."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # with it torch.empty fills what it returns
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
