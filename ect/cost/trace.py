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

BLOCK = 512  # bytes: to a multiple of them the CUDA allocator rounds a tensor's memory up


class Storage(NamedTuple):
    """Memory that tensors share. size: in the allocator's blocks. made: under the trace. address: 0 on the meta device."""

    number: int
    size: int = 0
    made: bool = False
    address: int = 0


@dataclass(frozen=True)
class TensorMeta:
    """A tensor without its values; it keeps no memory alive."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    offset: int
    storage: Storage

    @staticmethod
    def of(t: Tensor, storage: Storage | None = None) -> TensorMeta:
        storage = storage or Storage(t.untyped_storage()._cdata)
        return TensorMeta(t.shape, t.stride(), t.dtype, t.device, int(t.storage_offset()), storage)

    def stride(self) -> tuple[int, ...]:
        return self.strides

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct elements: an expanded dimension is one."""
        sizes = [n for n, stride in zip(self.shape, self.strides, strict=True) if stride or n == 0]
        return self.dtype.itemsize * torch.Size(sizes).numel()


@dataclass(frozen=True)
class Event:
    """One operation that was run.

    args, kwargs, result: as the operation's, with a TensorMeta for each tensor. site: the calls in our modules that led to it,
    as module.function:line, innermost first; for a backward operation those of its forward, none where autograd made it up.
    alive: bytes of all storages made under the trace that exist after it.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    site: tuple[str, ...] = ()
    backward: bool = False
    alive: int = 0

    @staticmethod
    def of(op: Any, args: Any, kwargs: Any, result: Any, see: Callable[[Tensor], TensorMeta] = TensorMeta.of) -> Event:
        """Make an event of an operation on tensors."""
        return Event(op, *tree_map_only(Tensor, see, (args, kwargs, result)))

    @property
    def name(self) -> str:
        """The operation's, without namespace and overload."""
        return str(self.op.overloadpacket.__name__)

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
        self._origins: dict[int, tuple[str, ...]] = {}

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
            size = -(-storage.nbytes() // BLOCK) * BLOCK

            def died(_: object) -> None:
                del self._known[key]
                self.alive -= size * made

            address = 0 if t.device.type == "meta" else storage.data_ptr()
            self._known[key] = Storage(self.seen, size, made, address), weakref.ref(storage, died)
            self.seen += 1
            self.alive += size * made
        return TensorMeta.of(t, self._known[key][0])

    def _origin(self) -> tuple[tuple[str, ...], bool]:
        """Return (site, backward) of the operation that runs now."""
        node = torch._C._current_autograd_node()
        if node is not None:
            return self._origins.get(node._sequence_nr(), ()), True
        site = tuple(_frames(sys._getframe(2)))
        # The key is the number of the node that autograd made last: for this operation, unless it needs none.
        self._origins.setdefault(torch._C._autograd._get_sequence_nr() - 1, site)
        return site, False


def _frames(frame: FrameType | None) -> Iterator[str]:
    """Yield a frame and its callers, as far as they are ours."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(("ect.", "ect_kernels.")) and module != __name__:
            yield f"{module}.{frame.f_code.co_name}:{frame.f_lineno}"
        frame = frame.f_back


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Return the operation's result.

    Of convolutions of meta tensors it has cuDNN's strides, channels-last where x or weights are.
    """
    forward = func is torch.ops.aten.convolution.default
    if not (forward or func is torch.ops.aten.convolution_backward.default) or args[0].device.type != "meta":
        return func(*args, **kwargs)
    x, weight = args[:2] if forward else args[1:3]
    nhwc = any(t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight))
    order = torch.channels_last if nhwc else torch.contiguous_format
    if forward:
        return torch.empty_like(func(*args, **kwargs), memory_format=order)
    made = [torch.empty_like(t, memory_format=order) for t in (x, weight)] + [args[0].new_empty(weight.shape[0])]
    return [t if wanted else None for t, wanted in zip(made, args[-1], strict=True)]


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
