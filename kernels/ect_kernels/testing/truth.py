"""check(): one op, one backend, one case against fp64 truth. Used by tests and benchmarks alike.

The bar, per output and per gradient: max |error| <= 2 max |error of plain PyTorch at that dtype| + 4 eps(dtype) max |truth|.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Inputs of an op.

    make: device -> keyword arguments of the op's public function, the same at every call (seeded). Float tensors named in
    `grads` get gradients.
    """

    name: str
    make: Callable[[torch.device], dict[str, Any]]
    grads: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Figure:
    """One tensor's error: what was measured, and the bar."""

    tensor: str
    error: float
    bar: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bar


def run(
    function: Callable[..., Any], kwargs: dict[str, Any], grads: tuple[str, ...], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return outputs out0, out1, ... and gradients d<name> of sum(out_i * cotangent_i), cotangents seeded by shape.

    dtype: cast every float tensor to it first (float64 for the truth).
    """
    args = {}
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.detach().to(dtype or value.dtype)
            if name in grads:
                value = value.clone(memory_format=torch.preserve_format).requires_grad_()
        args[name] = value
    outputs = function(**args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    result = {f"out{i}": out.detach() for i, out in enumerate(outputs)}
    generator = torch.Generator().manual_seed(1)
    total = None
    for out in outputs:
        cotangent = torch.randn(out.shape, generator=generator)
        if out.requires_grad and grads:
            # Rounded as the tested dtype would round it, so that truth and test see the same numbers.
            low = kwargs[grads[0]].dtype
            part = (out * cotangent.to(low).to(device=out.device, dtype=out.dtype)).to(torch.float64).sum()
            total = part if total is None else total + part
    if total is not None:
        named = [name for name in grads if args.get(name) is not None]
        for name, grad in zip(
            named, torch.autograd.grad(total, [args[n] for n in named], allow_unused=True), strict=True
        ):
            result[f"d{name}"] = torch.zeros_like(args[name]) if grad is None else grad
    return result


def figures(function: Callable[..., Any], backend: str, case: Case, device: torch.device) -> list[Figure]:
    """Return the errors of `function(..., backend=backend)` on the case, each beside its bar."""
    kwargs = case.make(device)
    truth = run(lambda **k: function(**k, backend="reference"), kwargs, case.grads, torch.float64)
    plain = run(lambda **k: function(**k, backend="reference"), kwargs, case.grads)
    got = run(lambda **k: function(**k, backend=backend), kwargs, case.grads)
    rows = []
    for name, want in truth.items():
        want = want.double()
        if want.numel() == 0:
            assert got[name].shape == want.shape, name
            continue
        finite = want.isfinite()
        assert torch.equal(got[name].isnan(), plain[name].isnan()), f"{name}: NaN at other places than plain PyTorch"
        error = _worst((got[name].double() - want)[finite])
        allowed = 2 * _worst((plain[name].double() - want)[finite])
        eps = torch.finfo(got[name].dtype).eps if got[name].is_floating_point() else 0.0
        rows.append(Figure(name, error, allowed + 4 * eps * _worst(want[finite])))
    return rows


def _worst(x: Tensor) -> float:
    return float(x.abs().nan_to_num(nan=float("inf")).max()) if x.numel() else 0.0


def check(function: Callable[..., Any], backend: str, case: Case, device: torch.device | str = "cpu") -> list[Figure]:
    """Return `figures`, raising AssertionError with every tensor that misses its bar."""
    rows = figures(function, backend, case, torch.device(device))
    bad = [f"{r.tensor}: error {r.error:.3g}, bar {r.bar:.3g}" for r in rows if not r.ok]
    assert not bad, f"{backend} on {case}: " + "; ".join(bad)
    return rows
