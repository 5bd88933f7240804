"""Calls of the registered ops as shapes, strides and numbers: recorded from any code, and made anew with other values.

A Call says all that decides which kernel runs and how: names and sizes of the arguments, but of the samples only a few, and
no value of a tensor. Values are drawn by the argument's name, so that each op gets what makes sense to it (t > r, statistics
that are those of x), the same at every call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SAMPLES = 4  # of a batch: each is work of its own to every kernel
ARENA = (1 << 20) + 24  # parameters: whole chunks of the optimizer's kernels and a part of one
_BY_SAMPLE = (
    "t",
    "r",
    "weight",
    "flip",
    "dloss",
)  # vectors with a number for each sample; others have one for each channel
_STEP = 10  # of the optimizer: past those that RAdam does not rectify
_KEY = (3 << 32) | 11  # of the random draws: a run's seed and a step


@dataclass(frozen=True)
class Shape:
    """All that a kernel can see of a tensor but its values.

    offset: distance of the first element from a boundary of 32 bytes or more, in elements.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @staticmethod
    def of(t: Tensor, dtype: torch.dtype | None = None) -> Shape:
        """Return the shape of a tensor; `dtype` takes the place of a float tensor's own."""
        dtype = dtype if dtype and t.is_floating_point() else t.dtype
        return Shape(tuple(t.shape), t.stride(), dtype, int(t.storage_offset()) % 8)

    def cut(self, first: int) -> Shape:
        """Return this shape with at most `first` in the first dimension."""
        return replace(self, size=(min(self.size[0], first), *self.size[1:]))

    def place(self, values: Tensor) -> Tensor:
        """Return a tensor of this shape, in memory of its own.

        values: [*size]. An element that several places share takes the first of them.
        """
        last = self.offset + sum((n - 1) * stride for n, stride in zip(self.size, self.stride, strict=True) if n > 0)
        placed = values.new_zeros(last + 1, dtype=self.dtype).as_strided(self.size, self.stride, self.offset)
        distinct = tuple(slice(None) if stride else slice(0, 1) for stride in self.stride)
        placed[distinct].copy_(values[distinct])
        return placed


# The numbers of a layer and of the first sample go into the random draws and nowhere else, so one is enough.
_INTO_DRAWS: dict[str, Any] = {"layer": 5, "n0": Shape((), (), torch.int64, 0)}


@dataclass(frozen=True)
class Call:
    """A call of torch.ops.ect.<function>; arguments are (name, value), a tensor's value is its Shape."""

    function: str
    arguments: tuple[tuple[str, Any], ...]

    @property
    def op(self) -> str:
        return self.function.removesuffix("_bwd")

    @property
    def overload(self) -> Any:
        return getattr(torch.ops.ect, self.function).default

    def results(self) -> list[str]:
        """Return the names of what `run` returns: of the arguments that are written in place, or of the results."""
        schema = self.overload._schema
        if schema.is_mutable:
            return [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        module = importlib.import_module(f"ect_kernels.{self.op}")
        direction = module.FORWARD if self.function == self.op else module.BACKWARD
        return list(get_type_hints(direction.room)["return"]._fields)

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """Return the arguments for `run`, without the backend."""
        pool = _normals().to(device)

        def make(name: str, value: Any, turn: int) -> Any:
            if isinstance(value, tuple):
                return [make(name, item, turn + i) for i, item in enumerate(value)]
            turn = 0 if name in ("t", "r") else turn  # they are a pair
            return _draw(name, value, pool.roll(turn * 49_999)) if isinstance(value, Shape) else value

        drawn = {name: make(name, value, i) for i, (name, value) in enumerate(self.arguments)}
        if "rstd" in drawn:  # no free choice: a backward may use what the statistics of x have in common
            sources = [t.double() for t in (drawn["x"], drawn.get("other")) if t is not None]
            if drawn["v"] is not None:
                sources[0] += drawn["v"][:, :, None, None]
            joined = torch.cat(sources, 1)
            var, mean = torch.var_mean(joined.reshape(len(joined), drawn["groups"], -1), 2, correction=0)
            drawn["mean"].copy_(mean)
            drawn["rstd"].copy_((var + drawn["eps"]).rsqrt())
        return drawn

    def run(self, inputs: dict[str, Any], backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return the results by name, from fresh copies of the inputs; `dtype` takes the place of every float's own."""

        def copy(value: Any) -> Any:
            if isinstance(value, list):
                return [copy(item) for item in value]
            if isinstance(value, torch.dtype):
                return value if dtype is None else dtype
            if not isinstance(value, Tensor):
                return value
            return Shape.of(value, dtype).place(value)

        arguments = {name: copy(value) for name, value in inputs.items()}
        out = self.overload(**arguments, backend=backend)
        if self.overload._schema.is_mutable:
            out = [arguments[name] for name in self.results()]
        named = zip(self.results(), out if isinstance(out, (tuple, list)) else (out,), strict=True)
        results = {name: t for name, value in named for name, t in _flat(name, value)}
        if self.function == "residual_group_norm_silu_bwd":  # its third row of sums has C places that mean something
            results["rows"][2, :, results["da"].shape[1] :].zero_()
        return results

    def __str__(self) -> str:
        shapes = [f"{name} {'x'.join(map(str, v.size))}" for name, v in self.arguments if isinstance(v, Shape)]
        return f"{self.function}({', '.join(shapes)})"


def _flat(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, list):
        yield from ((f"{name}[{i}]", t) for i, t in enumerate(value))
    elif value is not None:
        yield name, value


class Recorder(TorchDispatchMode):
    """Collects in `calls` each different call of an op made under it.

    It leaves out calls that name their backend. Tensors on the meta device suffice.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: dict[Call, None] = {}

    @property
    def calls(self) -> list[Call]:
        return list(self._calls)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ect" and func._schema.arguments[-1].name == "backend" and not args[-1]:
            self._calls[_call(func, args, kwargs or {})] = None
        return func(*args, **(kwargs or {}))


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Call:
    function = func._schema.name.split("::")[1]
    arena = function == "radam_ema"

    def plain(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return tuple(plain(name, item) for item in value)
        if isinstance(value, Tensor) and name not in _INTO_DRAWS:
            shape, dims = Shape.of(value), value.dim()
            if arena and dims == 1 and not name.startswith("state_"):
                return shape.cut(ARENA)
            by_sample = dims == 4 or (dims == 2 and name != "weight") or (dims == 1 and name in _BY_SAMPLE)
            return shape.cut(SAMPLES) if by_sample else shape
        return _INTO_DRAWS.get(name, value)

    named = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    return Call(function, tuple((name, plain(name, value)) for name, value in named.items() if name != "backend"))


@lru_cache(None)
def _normals() -> Tensor:
    """Return standard normal numbers on the host, which are repeated where more are needed.

    Their number is no power of two, so that no two rows of a tensor are the same.
    """
    return torch.randn(1_000_003, generator=torch.Generator().manual_seed(7))


def _draw(name: str, shape: Shape, pool: Tensor) -> Tensor:
    """Return the values for an argument, made of normal numbers."""
    count = torch.Size(shape.size).numel()
    normal = pool.repeat(count // len(pool) + 1)[:count].view(shape.size)
    if shape.dtype == torch.int64:
        number = {"seed": _KEY, "stage": 3, "n0": 5}.get(name, 0)
        values = (
            _optimizer_state()[1].to(pool.device)
            if name == "state_i64"
            else torch.full_like(normal, number, dtype=torch.int64)
        )
    elif shape.dtype == torch.uint8:
        values = (64 * normal).remainder(256).to(torch.uint8)
    elif shape.dtype == torch.bool:
        values = normal < 0
    elif name == "state_f64":
        values = _optimizer_state()[0].to(pool.device)
    else:
        values = _VALUES.get(name, lambda x: x)(normal)
    return shape.place(values)


_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "t": lambda x: 0.05 + x.abs(),
    "r": lambda x: (0.05 + x.abs()) / 2 * (torch.arange(len(x), device=x.device) % 4 != 3),  # 0: there is no teacher
    "weight": lambda x: 0.5 + x.abs() if x.dim() == 1 else x / x.shape[1] ** 0.5,
    "x": lambda x: x + 0.5,
    "gamma": lambda x: 1 + 0.5 * x,
    "exp_avg_sq": torch.square,
}


def _optimizer_state() -> tuple[Tensor, Tensor]:
    """Return the state of a step in which the norm is bounded and the averages move."""
    from ect_kernels.radam_ema import I64, new_state

    floats, ints = new_state(
        "radam", 1e-3, (0.9, 0.99), 1e-8, clip=1.0, ema_betas=(0.9, 0.99, 0.999, 0.5), loss_scale=8.0
    )
    ints[I64.STEPS] = _STEP
    return floats, ints


def default_calls() -> list[Call]:
    """Return the calls of the presets' networks and of their training: forward and backward of every op, in each dtype."""
    recorder = Recorder()
    with recorder:
        for dtype, levels in _DEFAULT.items():
            _images(dtype, levels)
        _vectors()
    return recorder.calls


def _meta(*size: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    t = torch.empty(size, dtype=dtype, device="meta", requires_grad=grad and dtype.is_floating_point)
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 and dtype != torch.uint8 else t


_DEFAULT = {
    torch.float16: ((256, 32), (256, 16), (256, 8)),
    torch.bfloat16: ((256, 16),),
    torch.float32: ((256, 32), (128, 8)),
}
"""Channels and heights."""


def _images(dtype: torch.dtype, levels: Iterable[tuple[int, int]]) -> None:
    """Call the ops of a U-Net and of its loss."""
    from ect_kernels.consistency_loss import consistency_loss
    from ect_kernels.group_norm_silu import group_norm_silu
    from ect_kernels.perturb import perturb
    from ect_kernels.residual_group_norm_silu import residual_group_norm_silu
    from ect_kernels.skip_product import skip_product

    n, seed = SAMPLES, _meta(dtype=torch.int64)
    for c, h in levels:
        x, gamma, beta, v = _meta(n, c, h, h, dtype=dtype), _meta(c), _meta(c), _meta(n, c, dtype=dtype)
        scale, shift = _meta(n, c, dtype=dtype), _meta(n, c, dtype=dtype)
        options: list[dict[str, Any]] = [
            {"v": v, "p": 0.2, "seed": seed},
            {"v": v, "scale": scale, "shift": shift},
            {"act": False},
        ]
        for some in options:
            group_norm_silu(x, gamma, beta, 32, 1e-6, **some).sum().backward()
        skip, bias = _meta(n, c, h, h, dtype=dtype), _meta(c)
        y = residual_group_norm_silu(x, gamma, beta, 32, 1e-6, bias, skip, bias, 0.5**0.5, joined=True)
        torch.cat([part.flatten() for part in y]).sum().backward()
        for more in (256, 128):
            other, wide = _meta(n, more, h, h, dtype=dtype), _meta(c + more)
            y = residual_group_norm_silu(x, wide, wide, 32, 1e-6, bias, skip, bias, 0.5**0.5, other, joined=True)
            torch.cat([part.flatten() for part in y]).sum().backward()
            if dtype != torch.float32:
                weight = _meta(c, c + more, dtype=dtype)
                skip_product(
                    x.detach(), weight.detach(), x.detach(), other.detach(), bias.detach(), bias.detach(), 0.5**0.5
                )
    images, t = _meta(n, 32, 32, 3, dtype=torch.uint8), _meta(n, grad=False)
    _, _, x_t, x_r = perturb(images, t, t, 0.5, seed, dtype=dtype, flip=_meta(n, dtype=torch.bool))
    F = _meta(n, 3, 32, 32, dtype=dtype)
    consistency_loss(F, F.detach(), x_t, x_r, t, t, t, 0.06, 0.5).sum().backward()


def _vectors() -> None:
    """Call the draws of noise levels, and the optimizer."""
    from ect_kernels.levels import levels
    from ect_kernels.radam_ema import new_state, radam_ema

    zero = _meta(dtype=torch.int64)
    levels(zero, zero, 0, 128, -1.1, 2.0, 2.0, 8.0, 1.0)
    for half in (None, torch.float16, torch.bfloat16):
        params, grads, exp_avg, exp_avg_sq, ema = (_meta(ARENA, grad=False) for _ in range(5))
        shadow = None if half is None else _meta(ARENA, dtype=half, grad=False)
        state_f64, state_i64 = new_state("radam", 1e-4, (0.9, 0.99), 1e-8, device="meta")
        radam_ema(params, grads, exp_avg, exp_avg_sq, [ema], shadow, state_f64, state_i64)
