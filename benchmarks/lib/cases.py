"""The ops at the shapes of DDPM++/NCSN++ on CIFAR-10, with the bytes that each must move: what benchmarks/ops.py runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from ect_kernels.testing.truth import Case
from torch import Tensor

LEVELS = [(128, 32), (256, 32), (384, 32), (512, 32), (256, 16), (512, 16), (256, 8), (512, 8)]  # channels, height
# Channels, of the other source, height.
SEAMS = [(256, 0, 32), (256, 256, 32), (256, 128, 32), (256, 256, 16), (256, 256, 8)]


@dataclass(frozen=True)
class Bench:
    """One op at one shape.

    forward, backward: bytes of device memory that it cannot do without; backward 0: it has none. timed: what is timed in
    place of `function`, which is checked.
    """

    case: Case
    function: Callable[..., Any]
    forward: int
    backward: int = 0
    timed: Callable[..., Any] | None = None


def benches(op: str, n: int, dtype: torch.dtype, quick: bool = False) -> Iterator[Bench]:
    """Yield the cases of an op for n images; quick: the first two shapes only."""
    function = getattr(importlib.import_module(f"ect_kernels.{op}"), op)
    makers = {
        "group_norm_silu": _group_norm_silu,
        "residual_group_norm_silu": _residual_group_norm_silu,
        "skip_product": _skip_product,
        "levels": _levels,
        "perturb": _perturb,
        "consistency_loss": _consistency_loss,
        "radam_ema": _radam_ema,
    }
    yield from makers[op](function, n, dtype, 2 if quick else None)


def _draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _to(device: torch.device, values: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()}


def _group_norm_silu(function: Callable[..., Any], n: int, dtype: torch.dtype, shapes: int | None) -> Iterator[Bench]:
    for c, h in LEVELS[:shapes]:
        for p in (0.0, 0.2):

            def make(device: torch.device, c: int = c, h: int = h, p: float = p) -> dict[str, Any]:
                values = {"x": _draw(n, c, h, h, dtype=dtype), "gamma": 1 + _draw(c, seed=1), "beta": _draw(c, seed=2)}
                values |= {"v": _draw(n, c, dtype=dtype, seed=3), "seed": torch.tensor(7)}
                return _to(device, values | {"groups": 32, "eps": 1e-6, "p": p})

            tensor = n * c * h * h * dtype.itemsize
            case = Case(f"{c}x{h}x{h} p {p}", make, ("x", "gamma", "beta", "v"))
            yield Bench(case, function, 2 * tensor, 3 * tensor)


def _residual_group_norm_silu(
    function: Callable[..., Any], n: int, dtype: torch.dtype, shapes: int | None
) -> Iterator[Bench]:
    for c, more, h in SEAMS[:shapes]:

        def make(device: torch.device, c: int = c, more: int = more, h: int = h) -> dict[str, Any]:
            values = {"a": _draw(n, c, h, h, dtype=dtype), "skip": _draw(n, c, h, h, dtype=dtype, seed=1)}
            values |= {"gamma": 1 + _draw(c + more, seed=2), "beta": _draw(c + more, seed=3)}
            values |= {"bias": _draw(c, seed=4), "skip_bias": _draw(c, seed=5)}
            if more:
                values["other"] = _draw(n, more, h, h, dtype=dtype, seed=6)
            return _to(device, values | {"groups": 32, "eps": 1e-6, "skip_scale": 0.5**0.5})

        names = ("a", "skip", "gamma", "beta", "bias", "skip_bias", *(["other"] if more else []))
        tensor, other = (n * channels * h * h * dtype.itemsize for channels in (c, more))
        # a, skip -> x, y and dx, dy, x -> da; the second source adds itself, its part of y, and in backward three.
        yield Bench(Case(f"{c}+{more}x{h}x{h}", make, names), function, 4 * tensor + 2 * other, 4 * tensor + 3 * other)


def _skip_product(function: Callable[..., Any], n: int, dtype: torch.dtype, shapes: int | None) -> Iterator[Bench]:
    for c, more, h in SEAMS[1:][:shapes]:

        def make(device: torch.device, c: int = c, more: int = more, h: int = h) -> dict[str, Any]:
            values = {"a": _draw(n, c, h, h, dtype=dtype), "x": _draw(n, c, h, h, dtype=dtype, seed=1)}
            values |= {"other": _draw(n, more, h, h, dtype=dtype, seed=2), "bias": _draw(c, seed=3)}
            values |= {"weight": _draw(c, c + more, dtype=dtype, seed=4) / 16, "skip_bias": _draw(c, seed=5)}
            return _to(device, values | {"scale": 0.5**0.5})

        # a and both sources in, the sum out; the weight stays on the chip.
        yield Bench(Case(f"{c}+{more}x{h}x{h}", make), function, n * h * h * (3 * c + more) * dtype.itemsize)


def _levels(function: Callable[..., Any], n: int, dtype: torch.dtype, shapes: int | None) -> Iterator[Bench]:
    def make(device: torch.device) -> dict[str, Any]:
        values = {"seed": torch.tensor(7), "stage": torch.tensor(3), "n0": 0, "batch": n}
        return _to(device, {**values, "P_mean": -1.1, "P_std": 2.0, "q": 2.0, "k": 8.0, "b": 1.0})

    yield Bench(Case(f"{n} images", make), function, 17 * n)


def _perturb(function: Callable[..., Any], n: int, dtype: torch.dtype, shapes: int | None) -> Iterator[Bench]:
    def make(device: torch.device) -> dict[str, Any]:
        images = torch.randint(256, (n, 32, 32, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        t = 0.05 + _draw(n).abs()
        values = {"images": images, "t": t, "r": 0.5 * t, "seed": torch.tensor(7)}
        return _to(device, values | {"sigma_data": 0.5, "flip": torch.arange(n) % 2 == 0, "dtype": dtype})

    # A byte in; x_t and x_r in fp32 and both inputs of the network out.
    yield Bench(Case("3x32x32", make), function, n * 3072 * (1 + 8 + 2 * dtype.itemsize))


def _consistency_loss(function: Callable[..., Any], n: int, dtype: torch.dtype, shapes: int | None) -> Iterator[Bench]:
    def make(device: torch.device) -> dict[str, Any]:
        values = {name: _draw(n, 3, 32, 32, dtype=dtype, seed=i) for i, name in enumerate(("F_t", "F_r"))}
        values |= {name: _draw(n, 3, 32, 32, seed=2 + i) for i, name in enumerate(("x_t", "x_r"))}
        t = 0.05 + _draw(n, seed=4).abs()
        values |= {"t": t, "r": 0.5 * t * (torch.arange(n) % 4 != 0), "weight": 1 / t}
        return _to(device, values | {"c": 0.06, "sigma_data": 0.5})

    # F_t, F_r, dF and two fp32 images; backward scales dF.
    images = n * 3072
    yield Bench(
        Case("3x32x32", make, ("F_t",)), function, images * (3 * dtype.itemsize + 8), 2 * images * dtype.itemsize
    )


def _radam_ema(function: Callable[..., Any], n: int, dtype: torch.dtype, shapes: int | None) -> Iterator[Bench]:
    from ect_kernels.radam_ema import new_state

    size = 55_733_760 if n >= 128 else 8192  # parameters of DDPM++ (a multiple of 8), or a small arena

    def make(device: torch.device) -> dict[str, Any]:
        names = ("params", "grads", "exp_avg", "exp_avg_sq", "ema")
        values = {name: _draw(size, seed=i) for i, name in enumerate(names)}
        values["exp_avg_sq"] = values["exp_avg_sq"].square()
        f64, i64 = new_state("radam", 1e-4, (0.9, 0.99), 1e-8, ema_betas=(0.999,))
        i64[0] = 10  # past the steps that RAdam does not rectify
        return _to(device, values | {"f64": f64, "i64": i64})

    def in_place(f64: Tensor, i64: Tensor, ema: Tensor, backend: str, **arenas: Tensor) -> None:
        function(**arenas, emas=[ema], shadow=None, state_f64=f64, state_i64=i64, backend=backend)

    def step(backend: str, **arenas: Tensor) -> tuple[Tensor, ...]:
        """Run the step out of place, so that it can be checked."""
        new = {name: value.clone() for name, value in arenas.items()}
        in_place(**new, backend=backend)
        return new["params"], new["exp_avg"], new["exp_avg_sq"], new["ema"]

    yield Bench(Case(f"{size} parameters, 1 EMA", make), step, 40 * size, timed=in_place)
