"""The arithmetic and memory traffic of a step, counted.

Every operation that a step on the fused ops dispatches is seen on the meta device, where tensors have shapes and no
data. FLOPs are 2 a multiply-add, by torch.utils.flop_counter's formulas. Bytes are those of each operation's distinct
inputs and outputs, once each: what it cannot do without if nothing stays on the chip from one operation to the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from ect_kernels.consistency_loss import consistency_loss
from ect_kernels.perturb import perturb
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula

from ect.models import EDMPrecond, MaskKey, build
from lib import instructions

_FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


@dataclass(frozen=True)
class Work:
    """One operation.

    level: '32x32', ... or 'vectors'. kind: a category of benchmarks/lib/categories.py. dtype: of its products, None
    where it has none. backward: belongs to the backward pass. kernel: of ours, as benchmarks/lib/instructions.py names
    it, and how many rows of eight elements it handles. bits: of such an element.
    """

    level: str
    kind: str
    flops: float
    bytes: float
    dtype: torch.dtype | None
    backward: bool
    kernel: str = ""
    rows: float = 0.0
    bits: int = 0


def nbytes(tensors: Iterable[Any]) -> float:
    """Return the bytes of the distinct tensors among `tensors`; an expanded one counts what it stores."""
    seen: dict[tuple[Any, ...], int] = {}
    for t in tensors:
        if isinstance(t, Tensor):
            stored = math.prod(size for size, stride in zip(t.shape, t.stride(), strict=True) if stride)
            seen[id(t.untyped_storage()), t.storage_offset(), stored] = stored * t.element_size()
    return sum(seen.values())


def _rows(kernel: str, tensors: list[Tensor]) -> dict[str, Any]:
    """Return the fields of Work for a kernel of ours: it handles its largest tensor once."""
    largest = max(tensors, key=lambda t: nbytes([t]))
    return {"kernel": kernel, "rows": largest.numel() / 8, "bits": 8 * largest.element_size()}


@register_flop_formula(torch.ops.ect.skip_product)  # registered by the import of ect.models
def _skip_product(a: torch.Size, weight: torch.Size, *shapes: Any, **more: Any) -> int:
    """Count two operations for each pixel and weight."""
    n, _, h, w = a
    return 2 * n * h * w * weight[0] * weight[1]


def flop_formula(func: Any) -> Any:
    """Return torch's formula of an operation that multiplies, None for others; one that writes in place has its twin's."""
    name = func.overloadpacket.__name__
    twin = getattr(torch.ops.aten, name.removesuffix("_"), None) if func.namespace == "aten" else None
    return flop_registry.get(func.overloadpacket) or flop_registry.get(twin)


class Counter(TorchDispatchMode):
    """Collects Work in `found` while it is active. batch, resolution: of the images; an operation's level follows from them."""

    def __init__(self, batch: int, resolution: int) -> None:
        super().__init__()
        self.batch, self.resolution = batch, resolution
        self.sides = {resolution >> i for i in range(3)}
        self.found: list[Work] = []
        self.backward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name in _FREE:
            return out
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.numel()]
        flops = 0.0
        if (formula := flop_formula(func)) is not None:
            flops = float(formula(*args, **(kwargs or {}), out_val=out))
        if name == "convolution_backward":
            self._convolution_backward(args, outputs, flops)
        elif "group_norm_silu" in name:
            given = {argument.name: arg for argument, arg in zip(func._schema.arguments, args, strict=False)}
            self._norm(name, inputs, outputs, drops=given["p"] > 0, computes=out[0].numel() > 0)
        else:
            kind = "conv" if flops else "optimizer" if "_foreach" in name or "radam" in name else "other"
            rows = _rows(name, inputs + outputs) if name in ("perturb", "consistency_loss") else {}
            self.add(kind, inputs + outputs, flops, inputs[0].dtype if flops else None, **rows)
        return out

    def add(
        self, kind: str, tensors: list[Tensor], flops: float = 0.0, dtype: torch.dtype | None = None, **rows: Any
    ) -> None:
        self.found.append(Work(self.level(tensors), kind, flops, nbytes(tensors), dtype, self.backward, **rows))

    def level(self, tensors: list[Tensor]) -> str:
        """Return the resolution of the images among the tensors, or of those whose pixels are a matrix's rows: the output's."""
        sides = []
        for t in tensors:
            pixels = 0
            if t.dim() == 4 and t.shape[0] == self.batch:  # [N, C, H, W], or q, k, v: [N, heads, H W, C / heads]
                pixels = t.shape[2] ** 2 if t.shape[2] <= self.resolution else t.shape[2]
            elif t.dim() == 2 and t.shape[0] % self.batch == 0:
                pixels = t.shape[0] // self.batch
            if math.isqrt(pixels) in self.sides:
                sides.append(math.isqrt(pixels))
        return f"{sides[-1]}x{sides[-1]}" if sides else "vectors"

    def _convolution_backward(self, args: Any, outputs: list[Tensor], flops: float) -> None:
        """Count two kernels, each of which reads the gradient: that of the input, and that of the weight."""
        grad, x, weight = args[:3]
        mask = args[-1]
        each = flops / max(sum(mask[:2]), 1)
        if mask[0]:
            self.add("conv", [grad, weight, outputs[0]], each, grad.dtype)
        if mask[1]:
            self.add("conv", [x, grad, outputs[1 if mask[0] else 0]], each, grad.dtype)

    def _norm(self, name: str, inputs: list[Tensor], outputs: list[Tensor], drops: bool, computes: bool) -> None:
        """Split a norm: its own part is what it cannot do without, 2 passes forward and 3 backward; the rest is the sum's.

        Its instructions are shared out like the bytes.
        """
        total, largest = nbytes(inputs + outputs), max(nbytes([t]) for t in inputs + outputs)
        residual, backward = name.startswith("residual"), name.endswith("_bwd")
        own = min((3 if backward else 2) * largest if residual else total, total)
        kernel = instructions.norm(name.removesuffix("_bwd"), backward, drops, residual and computes and not backward)
        level, rows = self.level([*inputs, *outputs]), _rows(kernel, inputs + outputs)
        for kind, part in (("norm", own), ("residual", total - own)):
            if part:
                share = {**rows, "rows": rows["rows"] * part / total}
                self.found.append(Work(level, kind, 0.0, part, None, self.backward, **share))

    @contextmanager
    def fused_attention(self) -> Iterator[None]:
        """Count scaled_dot_product_attention as one kernel, whose scores stay on the chip.

        Forward it reads q, k and v and writes the output; backward it moves those, the output's gradient and three
        more. On the meta device PyTorch would spell it out.
        """
        original = F.scaled_dot_product_attention

        def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            n, heads, s, d = q.shape
            side = math.isqrt(s)
            size, flops = nbytes([q.contiguous()]), 4.0 * n * heads * s * s * d
            self.found.append(Work(f"{side}x{side}", "attention", flops, 4 * size, q.dtype, False))
            if torch.is_grad_enabled():
                self.found.append(Work(f"{side}x{side}", "attention", 2 * flops, 8 * size, q.dtype, True))
            return _Attention.apply(q, k, v)

        with mock.patch.object(F, "scaled_dot_product_attention", counted):
            yield
        assert F.scaled_dot_product_attention is original


class _Attention(torch.autograd.Function):
    """Shapes of attention's output and gradients, and no operation."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)


def network(spec: dict[str, Any], half: torch.dtype | None) -> EDMPrecond:
    """Return the network of a spec on the meta device, on the fused ops, channels-last, its core weights in `half`."""
    with torch.device("meta"):
        net = build(spec)
    core = net.half_weights() if half is not None else set()
    for name, p in net.named_parameters():
        p.data = p.data.to(half if name in core else p.dtype)
    net.model.on_ops = True
    return net.to(memory_format=torch.channels_last).train()


def forward(net: EDMPrecond, batch: int) -> list[Work]:
    """Count one pass of the U-Net over `batch` images."""
    counter = Counter(batch, net.img_resolution)
    with torch.no_grad(), counter.fused_attention(), counter:
        _unet(net, _image(net, batch))
    return counter.found


def step(net: EDMPrecond, batch: int, half: torch.dtype | None) -> list[Work]:
    """Count a whole update: inputs, student, teacher, loss, backward, optimizer with one weight average."""
    counter = Counter(batch, net.img_resolution)
    n = sum(p.numel() for p in net.parameters())
    side, channels = net.img_resolution, net.img_channels
    with torch.device("meta"):
        images = torch.empty(batch, side, side, channels, dtype=torch.uint8)
        t, seed = torch.empty(batch), torch.empty((), dtype=torch.int64)
    with counter.fused_attention(), counter:
        in_t, in_r, x_t, x_r = perturb(images, t, t, 0.5, seed)
        with torch.no_grad():
            F_r = _unet(net, in_r)
        loss = consistency_loss(_unet(net, in_t), F_r, x_t, x_r, t, t, t, 0.0, 0.5).sum()
        counter.backward = True
        torch.autograd.grad(loss, list(net.parameters()))
    # Gradients are put into their arena (read, written), checked (read), and the update reads params, grads, two moments and
    # an average, and writes all but the gradients, and the half-precision copy.
    read = sum(p.numel() * p.element_size() for p in net.parameters())
    size = read + n * (4 + 4 + 4 * 5 + 4 * 4 + (2 if half is not None else 0))
    return [*counter.found, Work("vectors", "optimizer", 0.0, size, None, True, "radam_ema", n / 8, 32)]


def _image(net: EDMPrecond, batch: int) -> Tensor:
    shape = (batch, net.img_channels, net.img_resolution, net.img_resolution)
    return torch.empty(shape, device="meta").to(memory_format=torch.channels_last)


def _unet(net: EDMPrecond, x: Tensor) -> Tensor:
    noise, seed = torch.empty(len(x), device="meta"), torch.empty((), dtype=torch.int64, device="meta")
    out: Tensor = net.model(x, noise, None, None, MaskKey(seed, 0))
    return out


@cache
def ddpmpp_step(batch: int, half: torch.dtype | None) -> tuple[Work, ...]:
    """Count a step of the network of cifar10-1h."""
    return tuple(step(network(ddpmpp_spec(), half), batch, half))


def ddpmpp_spec() -> dict[str, Any]:
    """Return the description of the network of cifar10-1h: DDPM++ for 32x32 colour images without labels."""
    from ect.assembly import network_spec
    from ect.data import Dataset
    from ect.presets import PRESETS

    dataset = Dataset("meta", torch.empty(1, 32, 32, 3, dtype=torch.uint8, device="meta"), None)
    return network_spec(PRESETS["cifar10-1h"].net, "ECMPrecond", dataset, 0)
