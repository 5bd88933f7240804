"""Every operation of a function, before any device has run it: the one trace from which all costs are counted.

`trace(function)` runs it under a dispatch mode, which sees every operation that a device would be handed. On meta tensors,
which have shapes and no data, a whole update takes seconds; a convolution then gets the memory order that cuDNN gives it, and
attention is the kernel that the device would choose, since the meta device chooses otherwise.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

BLOCK = 512
"""Bytes to which the CUDA allocator rounds a tensor's memory up."""


class Storage(NamedTuple):
    """Memory that tensors share. made: under the trace, not given to it. address: 0 on the meta device."""

    number: int
    nbytes: int
    made: bool
    address: int

    @property
    def block_bytes(self) -> int:
        """Bytes that the allocator takes for it."""
        return -(-self.nbytes // BLOCK) * BLOCK


@dataclass(frozen=True)
class TensorMeta:
    """A tensor without its values; it answers as the tensor would, and keeps no memory alive."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    offset: int
    storage: Storage

    @staticmethod
    def of(t: Tensor, storage: Storage | None = None) -> TensorMeta:
        storage = storage or Storage(t.untyped_storage()._cdata, t.untyped_storage().nbytes(), False, 0)
        return TensorMeta(t.shape, t.stride(), t.dtype, t.device, int(t.storage_offset()), storage)

    def stride(self) -> tuple[int, ...]:
        return self.strides

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()

    def element_size(self) -> int:
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct elements: an expanded dimension is one."""
        sizes = [n for n, stride in zip(self.shape, self.strides, strict=True) if stride or n == 0]
        return self.dtype.itemsize * torch.Size(sizes).numel()


class Frame(NamedTuple):
    """A call in one of our modules."""

    module: str
    function: str
    line: int

    def __str__(self) -> str:
        return f"{self.module}:{self.line}"


@dataclass(frozen=True)
class Event:
    """One operation that was run.

    args, kwargs, result: as the operation's, with a TensorMeta for each tensor. site: the calls in our modules that led to it,
    innermost first; for a backward operation those of its forward, none where autograd made it up. alive: bytes of all storages
    made under the trace that exist after it, in the allocator's blocks.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    site: tuple[Frame, ...] = ()
    backward: bool = False
    alive: int = 0

    @staticmethod
    def of(op: Any, args: Any, kwargs: Any, result: Any, see: Callable[[Tensor], TensorMeta] = TensorMeta.of) -> Event:
        """Make an event of an operation on tensors."""
        return Event(op, *tree_map_only(Tensor, see, (args, kwargs, result)))

    @property
    def name(self) -> str:
        """The operation's, without namespace and overload."""
        name: str = self.op.overloadpacket.__name__
        return name

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments by their names, without those that were left out."""
        named = zip(self.op._schema.arguments, self.args, strict=False)
        return {argument.name: value for argument, value in named} | self.kwargs

    @property
    def inputs(self) -> list[TensorMeta]:
        return [t for t in tree_iter((self.args, self.kwargs)) if isinstance(t, TensorMeta)]

    @property
    def outputs(self) -> list[TensorMeta]:
        return [t for t in tree_iter(self.result) if isinstance(t, TensorMeta)]

    @property
    def made(self) -> list[TensorMeta]:
        """The outputs that are no views of inputs."""
        given = {t.storage for t in self.inputs}
        return [t for t in self.outputs if t.storage not in given]


def trace(function: Callable[[], object], device: str = "cuda") -> list[Event]:
    """Return the operations that a call of `function` runs, in order.

    device: what the meta device stands for, 'cuda' or 'cpu'.
    """
    tracer = _Tracer()
    with _Attention(device), tracer:
        function()
    return tracer.events


class _Tracer(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.alive = self.seen = 0
        self._known: dict[int, tuple[Storage, weakref.ref[Any]]] = {}
        self._origins: dict[int, tuple[Frame, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given, named = tree_map_only(Tensor, self._see, (args, kwargs))
        out = _run(func, args, kwargs)
        result = tree_map_only(Tensor, partial(self._see, made=True), out)
        site, backward = self._origin()
        self.events.append(Event(func, given, named, result, site, backward, self.alive))
        return out

    def _see(self, t: Tensor, made: bool = False) -> TensorMeta:
        """Return what is known of t. made: under the trace, if its storage is new."""
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            address = 0 if t.device.type == "meta" else storage.data_ptr()
            new = Storage(self.seen, storage.nbytes(), made, address)

            def died(_: object) -> None:
                del self._known[key]
                self.alive -= new.block_bytes * made

            self._known[key] = new, weakref.ref(storage, died)
            self.seen += 1
            self.alive += new.block_bytes * made
        return TensorMeta.of(t, self._known[key][0])

    def _origin(self) -> tuple[tuple[Frame, ...], bool]:
        """Return (site, backward) of the operation that runs now."""
        node = torch._C._current_autograd_node()
        if node is not None:
            return self._origins.get(node._sequence_nr(), ()), True
        site = tuple(_frames(sys._getframe(2)))
        # The key is the number of the node that autograd made last: for this operation, unless it needs none.
        self._origins.setdefault(torch._C._autograd._get_sequence_nr() - 1, site)
        return site, False


def _frames(frame: FrameType | None) -> Iterator[Frame]:
    """Yield a frame and its callers, as far as they are ours."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(("ect.", "ect_kernels.")) and module != __name__:
            yield Frame(module, frame.f_code.co_name, frame.f_lineno)
        frame = frame.f_back


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Return the operation's result; of convolutions of meta tensors, which are never channels-last, with cuDNN's strides."""
    aten = torch.ops.aten
    if func is aten.convolution_backward.default and args[0].device.type == "meta":
        return _convolution_backward(*args)
    out = func(*args, **kwargs)
    if func is aten.convolution.default and out.device.type == "meta":
        return torch.empty_like(out, memory_format=_layout(*args[:2]))
    return out


def _convolution_backward(dy: Tensor, x: Tensor, weight: Tensor, bias_sizes: Any, *rest: Any) -> list[Tensor | None]:
    layout = _layout(x, weight)
    of_x, of_weight, of_bias = rest[-1]
    return [
        torch.empty_like(x, memory_format=layout) if of_x else None,
        torch.empty_like(weight, memory_format=layout) if of_weight else None,
        dy.new_empty(weight.shape[0]) if of_bias else None,
    ]


def _layout(x: Tensor, weight: Tensor) -> torch.memory_format:
    """Return cuDNN's choice for a convolution: channels-last where x or the weights are."""
    nhwc = any(t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return torch.channels_last if nhwc else torch.contiguous_format


class _Attention(TorchFunctionMode):
    """scaled_dot_product_attention of meta tensors by the kernel that a device would choose."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention or args[0].device.type != "meta":
            return func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        if self.device == "cpu":
            if any(t.stride(-1) != 1 for t in args):
                return func(*args)  # which has no kernel: products and a softmax, on both devices
            return aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        if args[0].dtype == torch.float32:
            needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in args)
            return aten._scaled_dot_product_efficient_attention(*args, None, needs_grad)[0]
        return aten._scaled_dot_product_flash_attention(*args)[0]
