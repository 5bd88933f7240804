"""The choice of the implementation of an op: made when the op runs, printed as a table, never silently slow.

Order: the `backend` argument of a call, then `set_choice` (the trainer's --kernels), then the environment variable
ECT_KERNELS, each of the form "group_norm_silu=cuda,*=triton", where * speaks to every op that has the form, then
`auto`. A named backend that cannot run raises BackendError with the reason; only `auto` may fall back, and it warns
once for each shape that makes it. What failed on a device (ect.ranks.self_check finds out) is refused there: `auto`
passes it by.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ect_kernels import choice, cpu, native
from ect_kernels.choice import NAMES, BackendError

AUTO = {"cuda": ("cuda", "triton", "reference"), "cpu": ("native", "reference")}


@dataclass(frozen=True)
class Backend:
    """One written form of an op.

    fwd, bwd: functions of the op's registered forward and backward (bwd None for an op without). limits: called with the
    arguments of fwd, returns why this backend cannot take them, or None.
    """

    fwd: Callable[..., Any]
    bwd: Callable[..., Any] | None = None
    limits: Callable[..., str | None] = lambda *args: None


@dataclass
class Op:
    """An operation and its written forms by name."""

    name: str
    backends: Mapping[str, Backend]
    _warned: set[str] = field(default_factory=set)
    _known: dict[torch.device, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        OPS[self.name] = self
        choice.KNOWN[self.name] = None

    def pick(self, device: torch.device, args: tuple[Any, ...], backend: str | None = None) -> str:
        """Return the backend for a call with these arguments on `device`.

        backend: one by name; None or '' where --kernels, ECT_KERNELS or auto decide. Raises BackendError for a named
        one that cannot run.
        """
        name = backend or requested(self.name)
        if name:
            reason = self.why_not(name, device) or self.backends[name].limits(*args)
            if reason is not None:
                raise BackendError(
                    f"{self.name}: backend {name!r} cannot run: {reason}; have: {', '.join(self.usable(device))}"
                )
            return name
        first = None
        for name in self.candidates(device):
            reason = self.backends[name].limits(*args)
            if reason is None:
                if first is not None and first not in self._warned:
                    self._warned.add(first)
                    warnings.warn(f"{self.name}: {first}; using {name}", stacklevel=3)
                return name
            first = first or f"{name} does not take {reason}"
        raise BackendError(f"{self.name}: {first}; no backend does")

    def candidates(self, device: torch.device) -> list[str]:
        """Return the backends that `auto` may choose on `device`, in order: found once, until `forget` or `refuse`."""
        found = self._known.get(device)
        if found is None:
            names = AUTO.get(device.type, ("reference",))
            found = self._known[device] = [name for name in names if self.why_not(name, device) is None]
        return found

    def usable(self, device: torch.device) -> list[str]:
        return [name for name in self.backends if self.why_not(name, device) is None]

    def why_not(self, name: str, device: torch.device) -> str | None:
        """Return why backend `name` cannot run on `device` at all, or None."""
        if name not in self.backends:
            return f"this op has no such backend, but {', '.join(self.backends)}"
        if (failure := _refused.get((self.name, name, device.type))) is not None:
            return failure
        if name in ("cuda", "apex") and device.type != "cuda":
            return f"it needs CUDA tensors, these are on {device.type}"
        if name == "native":
            return (
                cpu.why_not_built() if device.type == "cpu" else f"it runs on CPU tensors, these are on {device.type}"
            )
        if name == "cuda":
            return native.why_not_built(device)
        if name == "triton":
            return native.why_no_triton(device)
        if name == "emulated":
            return "it runs on CPU tensors" if device.type != "cpu" else native.why_not_emulated()
        if name == "apex":
            return native.why_no_apex()
        return None


OPS: dict[str, Op] = {}
_choice: dict[str, str] = {}
_refused: dict[tuple[str, str, str], str] = {}  # (op, backend, type of device) -> why


def refuse(op: str, backend: str, device: torch.device, reason: str) -> None:
    """Let `backend` of `op` run no more in this process on devices of this type; `reason` says why.

    Raises BackendError for the reference, which nothing could stand in for.
    """
    if backend == "reference":
        raise BackendError(
            f"{op}: the reference failed on {device} ({reason}), and there is no other form to fall back to"
        )
    _refused[op, backend, device.type] = reason
    forget()


def refused(device: torch.device) -> dict[tuple[str, str], str]:
    """Return {(op, backend): why} of what was refused on devices of this type."""
    return {(op, backend): why for (op, backend, where), why in _refused.items() if where == device.type}


def clear_refused() -> None:
    """Let everything run again."""
    _refused.clear()
    forget()


def forget() -> None:
    """Let each op find out anew, at its next call, what can run here."""
    for op in OPS.values():
        op._known.clear()


def parse_choice(text: str) -> dict[str, str]:
    """Return {"op or *": "backend"} as `choice.read` does, of the backends that there are now. Raises BackendError."""
    return choice.read(text, NAMES)


def set_choice(text: str | None) -> None:
    """Choose backends for all following calls; None or '' goes back to ECT_KERNELS and auto."""
    global _choice
    _choice = parse_choice(text or "")


def requested(op: str) -> str | None:
    """Return the backend asked for by name for this op, or None for auto."""
    text = os.environ.get("ECT_KERNELS")
    if not _choice and not text:  # at every call of an op, so quickly
        return None
    for chosen in (_choice, parse_choice(text or "")):
        every = chosen.get("*")
        name = chosen.get(op, every if every in OPS[op].backends else None)
        if name is not None:
            return name
    return None


def named() -> dict[str, str]:
    """Name the ops for which a backend was asked for by name: {op: backend}."""
    asked = {op: requested(op) for op in OPS}
    return {op: name for op, name in asked.items() if name is not None}


def check_named(device: torch.device) -> None:
    """Raise BackendError where a backend that was asked for by name cannot run on `device` at all."""
    for op, name in named().items():
        if (reason := OPS[op].why_not(name, device)) is not None:
            usable = ", ".join(OPS[op].usable(device))
            raise BackendError(f"{op}: backend {name!r} cannot run: {reason}; have: {usable}")


def table(device: torch.device) -> list[tuple[str, str, str]]:
    """Return (op, backend, why) for each op on `device`, as `auto` or the request decides before any shape is known."""
    rows = []
    for op in OPS.values():
        name = requested(op.name)
        if name is not None:
            reason = op.why_not(name, device)
            rows.append((op.name, name, "asked for by name" if reason is None else f"CANNOT RUN: {reason}"))
            continue
        name = op.candidates(device)[0]
        first = AUTO.get(device.type, ("reference",))
        passed = [f"{other}: {op.why_not(other, device)}" for other in first[: first.index(name)]]
        why = "; ".join(passed) if passed else f"first choice on {device.type}"
        rows.append((op.name, name, why))
    return rows
