"""The arithmetic and memory traffic of a step, counted.

Every operation that a step on the fused ops dispatches is seen on the meta device, where tensors have shapes and no
data. FLOPs are 2 a multiply-add, by torch.utils.flop_counter's formulas. Bytes are those of each operation's distinct
inputs and outputs, once each: what it cannot do without if nothing stays on the chip from one operation to the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from ect_kernels.consistency_loss import consistency_loss
from ect_kernels.perturb import perturb
from torch import Tensor

from ect.cost.flops import flops
from ect.cost.trace import Event, TensorMeta, trace
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


def nbytes(tensors: Iterable[TensorMeta]) -> float:
    """Return the bytes of the distinct tensors among `tensors`; an expanded one counts what it stores."""
    return sum({(t.storage, t.offset, t.nbytes): t.nbytes for t in tensors}.values())


def _rows(kernel: str, tensors: list[TensorMeta]) -> dict[str, Any]:
    """Return the fields of Work for a kernel of ours: it handles its largest tensor once."""
    largest = max(tensors, key=lambda t: nbytes([t]))
    return {"kernel": kernel, "rows": largest.shape.numel() / 8, "bits": 8 * largest.dtype.itemsize}


@dataclass(frozen=True)
class Counter:
    """Tells the work of an operation. batch, resolution: of the images; an operation's level follows from them."""

    batch: int
    resolution: int

    def of(self, events: Iterable[Event]) -> list[Work]:
        """Count the work of a trace."""
        return [work for event in events for work in self._work(event)]

    def _work(self, event: Event) -> Iterator[Work]:
        name, inputs, outputs = event.name, event.inputs, [t for t in event.outputs if t.shape.numel()]
        if event.op.is_view or name in _FREE:
            return
        if name.startswith("_scaled_dot_product"):
            yield self._attention(event)
        elif name == "convolution_backward":
            yield from self._convolution_backward(event)
        elif "group_norm_silu" in name:
            yield from self._norm(event, inputs + outputs)
        else:
            rows = _rows(name, inputs + outputs) if name in ("perturb", "consistency_loss") else {}
            yield self._product(event, inputs + outputs, flops(event), **rows)

    def _product(self, event: Event, tensors: list[TensorMeta], of_it: float, **rows: Any) -> Work:
        """Count an operation, or a part of it, that multiplies or does not."""
        kind, dtype = ("conv", event.inputs[0].dtype) if of_it else ("other", None)
        return Work(self.level(tensors), kind, of_it, nbytes(tensors), dtype, event.backward, **rows)

    def level(self, tensors: list[TensorMeta]) -> str:
        """Return the resolution of the images among the tensors, or of those whose pixels are a matrix's rows: the output's."""
        sides, possible = [], {self.resolution >> i for i in range(3)}
        for t in tensors:
            pixels = 0
            if len(t.shape) == 4 and t.shape[0] == self.batch:  # [N, C, H, W], or q, k, v: [N, heads, H W, C / heads]
                pixels = t.shape[2] ** 2 if t.shape[2] <= self.resolution else t.shape[2]
            elif len(t.shape) == 2 and t.shape[0] % self.batch == 0:
                pixels = t.shape[0] // self.batch
            if math.isqrt(pixels) in possible:
                sides.append(math.isqrt(pixels))
        return f"{sides[-1]}x{sides[-1]}" if sides else "vectors"

    def _convolution_backward(self, event: Event) -> Iterator[Work]:
        """Count two kernels, each of which reads the gradient: that of the input, and that of the weight."""
        grad, x, weight = event.args[:3]
        results = [(given, out) for given, out in zip((weight, x), event.result, strict=False) if out is not None]
        for given, out in results:
            yield self._product(event, [given, grad, out], flops(event) / len(results))

    def _norm(self, event: Event, tensors: list[TensorMeta]) -> Iterator[Work]:
        """Split a norm: its own part is what it cannot do without, 2 passes forward and 3 backward; the rest is the sum's.

        Its instructions are shared out like the bytes.
        """
        name, computes = event.name, event.result[0].shape.numel() > 0
        total, largest = nbytes(tensors), max(t.nbytes for t in tensors)
        residual, backward = name.startswith("residual"), name.endswith("_bwd")
        own = min((3 if backward else 2) * largest if residual else total, total)
        computed = residual and computes and not backward
        kernel = instructions.norm(name.removesuffix("_bwd"), backward, event.arguments["p"] > 0, computed)
        level, rows = self.level(tensors), _rows(kernel, tensors)
        for kind, part in (("norm", own), ("residual", total - own)):
            if part:
                share = {**rows, "rows": rows["rows"] * part / total}
                yield Work(level, kind, 0.0, part, None, event.backward, **share)

    def _attention(self, event: Event) -> Work:
        """Count one kernel, whose scores stay on the chip.

        Forward it reads q, k and v and writes the output; backward it moves those, the output's gradient and three
        more. The arithmetic is that of the formula, without what a kernel computes twice.
        """
        backward = event.name.endswith("_backward")
        q = event.args[int(backward)]
        n, heads, s, d = q.shape
        times, side = 1 + backward, math.isqrt(s)
        return Work(
            f"{side}x{side}", "attention", times * 4.0 * n * heads * s * s * d, times * 4 * q.nbytes, q.dtype, backward
        )


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
    with torch.no_grad():
        events = trace(lambda: _unet(net, _image(net, batch)))
    return Counter(batch, net.img_resolution).of(events)


def step(net: EDMPrecond, batch: int, half: torch.dtype | None) -> list[Work]:
    """Count a whole update: inputs, student, teacher, loss, backward, optimizer with one weight average."""
    n = sum(p.numel() for p in net.parameters())
    side, channels = net.img_resolution, net.img_channels
    with torch.device("meta"):
        images = torch.empty(batch, side, side, channels, dtype=torch.uint8)
        t, seed = torch.empty(batch), torch.empty((), dtype=torch.int64)

    def gradients() -> None:
        in_t, in_r, x_t, x_r = perturb(images, t, t, 0.5, seed)
        with torch.no_grad():
            F_r = _unet(net, in_r)
        loss = consistency_loss(_unet(net, in_t), F_r, x_t, x_r, t, t, t, 0.0, 0.5).sum()
        torch.autograd.grad(loss, list(net.parameters()))

    found = Counter(batch, net.img_resolution).of(trace(gradients))
    # Gradients are put into their arena (read, written), checked (read), and the update reads params, grads, two moments and
    # an average, and writes all but the gradients, and the half-precision copy.
    read = sum(p.numel() * p.element_size() for p in net.parameters())
    size = read + n * (4 + 4 + 4 * 5 + 4 * 4 + (2 if half is not None else 0))
    return [*found, Work("vectors", "optimizer", 0.0, size, None, True, "radam_ema", n / 8, 32)]


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
