"""The check at the start of a run on a GPU: kernels, compiled network and captured update, each before it is trusted.

1. Each op's automatic backend on the shapes of this network against the reference (ect_kernels.check has bars and rules).
2. Two compiled steps against two plain ones: losses, gradients and parameters within `BARS`.
3. Two replayed steps against two that are launched one kernel after the other: the same bits; where the plain step does not
   repeat itself bit for bit (libraries may add in any order), within `BARS`.

What fails is named with its error and replaced: cuda by triton by the reference, compiled by plain, replayed by launched. With
several ranks each checks for itself, without the sum over ranks, and all of them take the weakest choice. Weights, moments,
averages, loss scale and random state are put back bit for bit, and the order of the data follows from nimg alone.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ect_kernels import check, dispatch
from ect_kernels.calls import SAMPLES, Call, Recorder
from torch import Tensor

from ect.errors import UserError
from ect.models import EDMPrecond
from ect.precision import products
from ect.ranks.distributed import World
from ect.step import TrainStep

STEPS = 2
SECONDS = 300.0  # for them on a GPU, choice of algorithms and capture included
COMPILE_SECONDS = 3600.0
LOSS_SCALE = 2.0**10  # at most, in the check: an overflow would skip the step, and leave nothing to compare


@dataclass(frozen=True)
class Bar:
    """Largest relative difference of a loss, and of gradients and parameters' movement in the Euclidean norm."""

    loss: float
    grads: float
    movement: float


# Estimates: two roundings of one step. Half precision's are noise on a small difference (signal_noise), and an optimizer
# that divides by the gradient's size moves the smallest gradients by their sign; what is wrong, and not rounded, is off by 1.4.
BARS = {None: Bar(0.01, 0.05, 0.5), torch.float16: Bar(0.05, 0.3, 1.0), torch.bfloat16: Bar(0.1, 0.6, 1.0)}


def wanted(choice: bool | None, device: torch.device) -> bool:
    """Return whether to check: as --self-check says, else on a GPU."""
    return device.type == "cuda" if choice is None else choice


def run(step: TrainStep, calls: Sequence[Call], nimg: int, stage: int) -> list[str]:
    """Check the ops of `calls` and the step, at the image and stage where it will begin, and return what was found.

    Afterwards the step and dispatch's automatic choice are without what failed. Raises UserError where a backend asked
    for by name fails.
    """
    device, world = step.state.params.device, step.world
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        return [*_ops(calls, device, world), *_Steps(step, nimg, stage).check()]


def _ops(calls: Sequence[Call], device: torch.device, world: World) -> list[str]:
    """Check the ops, until no rank refuses any more of what another one has chosen."""
    report = check.Report()
    while True:
        try:
            check.check(calls, device, report)
        except dispatch.BackendError as error:
            raise UserError(f"--kernels: {error}") from error
        if not world.any(_share_refusals(device, world)):
            break
    lines = [
        f"{op}: {backend} failed and is not used: {why}" for (op, backend), why in dispatch.refused(device).items()
    ]
    counts = [f"{op} on {backend} ({n} calls)" for (op, backend), n in report.calls.items()]
    found = (
        f"equal to the reference within rounding: {', '.join(counts)}" if counts else "no op but references to check"
    )
    took = f"{report.seconds - report.compiling:.1f} s"
    took += f", and {report.compiling:.1f} s of compiling" if report.compiling else ""
    return [f"self-check: {line}" for line in [*lines, *report.skipped, f"{found} ({took})"]]


def _share_refusals(device: torch.device, world: World) -> bool:
    """Refuse what any rank has refused, and return whether that is more than this one had."""
    pairs = [(op.name, backend) for op in dispatch.OPS.values() for backend in op.backends]
    mine = dispatch.refused(device)
    told = world.gather(torch.tensor([int(pair in mine) for pair in pairs]))
    new = {pair: rank for rank, theirs in enumerate(told) for pair, no in zip(pairs, theirs.tolist(), strict=True)
           if no and pair not in mine}  # fmt: skip
    for (op, backend), rank in new.items():
        dispatch.refuse(op, backend, device, f"it failed on rank {rank}")
    return bool(new)


@dataclass(frozen=True)
class Trace:
    """The losses, gradients and parameters that some steps leave, on the host."""

    losses: Tensor
    grads: Tensor
    params: Tensor

    def same(self, other: Trace) -> bool:
        """Compare bit for bit; NaN is NaN."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs)

    def beyond(self, bar: Bar, other: Trace, start: Tensor) -> str | None:
        """Return how this differs from another trace by more than the bar, both from parameters `start`, or None."""
        pairs = [("loss", mine, its, its) for mine, its in zip(self.losses, other.losses, strict=True)]
        pairs += [
            ("gradients", self.grads, other.grads, other.grads),
            ("parameters", self.params, other.params, other.params - start),
        ]
        for (name, mine, its, size), most in zip(pairs, (*[bar.loss] * STEPS, bar.grads, bar.movement), strict=True):
            apart = float((mine - its).norm() / size.norm()) if not torch.equal(mine, its) else 0.0
            if not apart <= most:
                where = f"{float(mine):.6g} for {float(its):.6g}" if name == "loss" else f"{apart:.3g} of their size"
                return f"{name}: {where}, at most {most:g} of it may be"
        return None


class _Apart(World):
    """A rank whose steps are its own: no sum waits for ranks that may have failed."""

    def sum_(self, tensor: Tensor) -> None:
        pass


class _Steps:
    """The checks of `step`, which sum nothing over ranks."""

    def __init__(self, step: TrainStep, nimg: int, stage: int) -> None:
        self.step, self.at, self.world = step, (nimg, stage), step.world
        self.device = step.state.params.device
        half = step.state.half
        self.bar = BARS[torch.float16 if half is None and products(self.device) == "TF32" else half]  # as many digits

    def check(self) -> list[str]:
        """Return what was found; the step goes on without what failed, and as if nothing had been run."""
        step, compiled, graph = self.step, self.step.compiled, self.step.wants_graph
        if not compiled and not graph:
            return []
        self.saved = [tensor.to("cpu", copy=True) for tensor in step.tensors()]
        lines, started, compiling = [], time.monotonic(), 0.0
        step.world = _Apart(self.world.rank, self.world.size)
        try:
            step.use(False, False)
            try:
                want = self._trace("the plain step", "--kernels '*=reference'")
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"--batch-per-device {step.micro_batch}: a step of as many images at a time does not fit into the memory "
                    f"of {self.device}; try --batch-per-device auto"
                ) from error
            except Exception as error:  # where the device is lost, the process ends here, with the remedy
                check.survived(error, "the plain step", "--kernels '*=reference'", self.device)
                raise
            if compiled:
                begin = time.monotonic()
                want, line = self._compiled(want)
                compiling = time.monotonic() - begin
                lines.append(f"{line} ({compiling:.0f} s)")
            if graph:
                lines.append(self._replayed(want))
        finally:
            step.world = self.world
        lines.append(f"{time.monotonic() - started - compiling:.1f} s for the steps" + ", beside compiling" * compiled)
        return [f"self-check: {line}" for line in lines]

    def _compiled(self, want: Trace) -> tuple[Trace, str]:
        """Keep the compiled network if every rank's is right; return the trace that a replay is to equal, and what to say."""
        step, reason = self.step, None
        step.use(True, False)
        try:
            got = self._trace("the compiled step", "--no-compile", COMPILE_SECONDS)
            reason = got.beyond(self.bar, want, self.saved[0])
        except Exception as error:
            reason = check.survived(error, "the compiled step", "--no-compile", self.device)
        if reason := self._any(reason):
            step.use(False, False)
            return want, f"compile failed and is off: {reason}"
        return got, f"the compiled step agrees with the plain one: losses within {self.bar.loss:.0%}"

    def _replayed(self, want: Trace) -> str:
        """Keep the captured update if every rank's is right; return what to say."""
        step, told = self.step, "equals the launched one bit for bit"
        try:  # before there is a graph, which keeps the memory of an update: another one beside it may not fit
            repeats = self._trace("the launched step", "--kernels '*=reference'").same(want)
            step.use(step.compiled, True)
            with self._bounded("the capture", "--no-graph", SECONDS):
                reason = step.capture()
            if reason is None:
                got = self._trace("the replayed step", "--no-graph")
                if not got.same(want):
                    told = "agrees with the launched one, which does not repeat itself bit for bit"
                    reason = got.beyond(self.bar, want, self.saved[0])
                    if reason is None and repeats:
                        reason = "other bits than those of the launched step, which repeats its own"
        except Exception as error:
            reason = check.survived(error, "the replayed step", "--no-graph", self.device)
        if reason := self._any(reason):
            step.use(step.compiled, False)
            return f"graph failed and is off: {reason}"
        return f"the replayed step {told}" + "; the sum over ranks is between two graphs" * (self.world.size > 1)

    def _any(self, reason: str | None) -> str | None:
        """Return a reason of this rank or, where it has none, of another one."""
        return (reason or "it failed on another rank") if self.world.any(reason is not None) else None

    def _trace(self, what: str, remedy: str, seconds: float = SECONDS) -> Trace:
        """Run some steps, undo them, and return their trace."""
        step, (nimg, stage) = self.step, self.at
        with self._bounded(what, remedy, seconds):
            try:
                if step.state.loss_scale is not None:
                    step.state.loss_scale.clamp_(max=LOSS_SCALE)
                losses = [step(nimg + i * step.batch, stage).to("cpu", copy=True) for i in range(STEPS)]
                grads, params = (t.to("cpu", copy=True) for t in (step.state.grads, step.state.params))
                return Trace(torch.stack(losses), grads, params)
            finally:
                for tensor, saved in zip(step.tensors(), self.saved, strict=True):
                    tensor.copy_(saved)

    def _bounded(self, what: str, remedy: str, seconds: float) -> contextlib.AbstractContextManager[None]:
        """Bound the time of the block on a GPU. On a CPU a step may take as long as it likes: none hangs there."""
        return check.bounded(what, remedy, seconds) if self.device.type == "cuda" else contextlib.nullcontext()


def choose(device: torch.device, kernels: str | None = None) -> None:
    """Apply --kernels, unless it is None.

    Raises UserError where a backend that was asked for by name is unknown or cannot run on the device.
    """
    try:
        if kernels is not None:
            dispatch.set_choice(kernels)
        dispatch.check_named(device)
    except dispatch.BackendError as error:
        raise UserError(f"{f'--kernels {kernels}' if kernels else 'ECT_KERNELS'}: {error}") from error


def of_sampling(net: EDMPrecond, device: torch.device, world: World = World()) -> list[str]:
    """Check the ops that images need before they are made on a GPU, and say what failed, which is not used then.

    Raises UserError where a backend asked for by name fails.
    """
    if device.type != "cuda":
        return []
    with Recorder() as recorder, torch.no_grad():
        twin = copy.deepcopy(net).to("meta")
        twin.model.on_ops = True
        x = torch.empty(SAMPLES, net.img_channels, net.img_resolution, net.img_resolution, device="meta")
        twin(x, x[:, 0, 0, 0])
    _ops(recorder.calls, device, world)
    return [
        f"{op}: {backend} failed its check and is not used: {why}"
        for (op, backend), why in dispatch.refused(device).items()
    ]


def resolved(step: TrainStep) -> dict[str, Any]:
    """Return what a run computes with, for its config.json."""
    device = step.state.params.device
    return {
        "device": _name(device),
        "kernels": {op: backend for op, backend, _ in dispatch.table(device)},
        "refused": {f"{op}={backend}": why for (op, backend), why in dispatch.refused(device).items()},
        "compile": step.compiled,
        "graph": step.wants_graph,
    }


def keep(recorded: dict[str, Any], device: torch.device) -> None:
    """Refuse on the device that a run was started on what was refused then, so that a resume goes on with the same backends."""
    if recorded.get("device") == _name(device):
        for pair, why in recorded["refused"].items():
            op, _, backend = pair.partition("=")
            if op in dispatch.OPS and dispatch.requested(op) != backend:  # a name stands above what was found
                dispatch.refuse(op, backend, device, why)


def changes(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return what a resumed run computes with that it did not before."""
    if not recorded:
        return []
    told = [
        f"{name}: {now[name]}, before the resume {recorded[name]}"
        for name in ("device", "compile", "graph") if recorded.get(name) != now[name]
    ]  # fmt: skip
    before = recorded.get("kernels", {})
    told += [
        f"{op}: on {backend}, before the resume on {before[op]}"
        for op, backend in now["kernels"].items() if op in before and before[op] != backend
    ]  # fmt: skip
    return told


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
