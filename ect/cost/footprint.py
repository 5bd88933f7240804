"""The cost of an update before any device has run it: memory, operations, kernels, bytes moved, from a pass on meta tensors.

`trace(step)` runs TrainStep.update() under a dispatch mode, which sees every operation that a device would be handed,
with shapes and strides and without data. So memory is exact but for what lies outside of tensors, operations and
launches are counted, and the bytes are the least that each operation must move: its inputs read once and its outputs
written. Kernels are an estimate of what libraries make of their operations.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ect_kernels
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ect.optim import memory_order

if TYPE_CHECKING:
    from ect.step import TrainStep

BLOCK = 512
"""Bytes to which the CUDA allocator rounds a tensor's memory up."""
CATEGORIES = (
    "conv", "conv 1x1 as gemm", "gemm/attention", "norm", "activation", "dropout", "residual", "concat", "optimizer",
    "data/loss", "other",
)  # fmt: skip

# An operation's category: by the function that called for it, else by the longest prefix of its name, else by file.
_BY_FUNCTION = {"dropout": "dropout", "add_skip": "conv 1x1 as gemm", "attention": "conv 1x1 as gemm"}
_BY_NAME = {
    "convolution": "conv",
    "mm": "gemm/attention", "addmm": "gemm/attention", "bmm": "gemm/attention", "_scaled_dot_product": "gemm/attention",
    "_softmax": "gemm/attention", "_safe_softmax": "gemm/attention",
    "group_norm_silu": "norm", "residual_group_norm_silu": "norm", "native_group_norm": "norm", "sum_rows": "norm",
    "join_columns": "other",
    "skip_product": "conv 1x1 as gemm", "silu": "activation", "cat": "concat",
    "radam_ema": "optimizer", "perturb": "data/loss", "consistency_loss": "data/loss",
}  # fmt: skip
_BY_FILE = {
    "fused.py": "network", "plain.py": "network", "products.py": "network", "layers.py": "network",
    "song_unet.py": "network", "adm_unet.py": "network",
    "arenas.py": "optimizer", "step.py": "data/loss", "objective.py": "data/loss", "precond.py": "data/loss",
    "stream.py": "data/loss", "augment.py": "data/loss",
}  # fmt: skip
_SUMS = ("add", "mul", "div", "sub")
_GEMMS = ("mm", "addmm", "bmm", "baddbmm")
_OVERWRITES = ("copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_")  # they do not read what they write
_GATHERS = ("index", "index_select", "gather", "embedding")  # they read as much of their first argument as they return
# Kernels of one call, where it is not one. Ours: see csrc/; torch's: its CUDA sources.
_KERNELS = {
    "radam_ema": 3, "native_group_norm": 3,
    "native_group_norm_backward": 5, "_scaled_dot_product_flash_attention_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 2,
}  # fmt: skip
_CAT = 64  # tensors of a launch of torch.cat, at least
_ROOTS = (str(Path(__file__).parents[1]), *ect_kernels.__path__)


@dataclass
class Line:
    """Sums over some operations: how many, launches, kernels (estimate), bytes moved."""

    ops: int = 0
    launches: int = 0
    kernels: int = 0
    bytes: int = 0

    def add(self, launches: int, kernels: int, moved: int) -> None:
        self.ops += 1
        self.launches += launches
        self.kernels += kernels
        self.bytes += moved


@dataclass
class Footprint:
    """The cost of one update.

    state_bytes: of the tensors it was given. peak_bytes: with the most that it has alive beside them. by_category, by_op,
    by_site: sums over the operations that touch device memory; views are free. A site is where in this package the call was
    made, innermost first, for a backward that of its forward (a sum of gradients counts to the backward before it).
    """

    state_bytes: int = 0
    peak_bytes: int = 0
    by_category: dict[str, Line] = field(default_factory=lambda: {name: Line() for name in CATEGORIES})
    by_op: dict[str, Line] = field(default_factory=dict)
    by_site: dict[str, Line] = field(default_factory=dict)

    def add(self, category: str, op: str, site: str, *counts: int) -> None:
        """Add one more operation; counts: launches, kernels and bytes."""
        self.by_category[category].add(*counts)
        self.by_op.setdefault(f"{category}: {op}", Line()).add(*counts)
        self.by_site.setdefault(f"{op} {site}", Line()).add(*counts)

    @property
    def ops(self) -> int:
        return sum(line.ops for line in self.by_category.values())

    @property
    def launches(self) -> int:
        """A convolution, product or attention is one, whatever its library makes of it; all else as launched."""
        return sum(line.launches for line in self.by_category.values())

    @property
    def kernels(self) -> int:
        """An estimate: the launches, with those that libraries are known to make of their operations."""
        return sum(line.kernels for line in self.by_category.values())

    @property
    def traffic(self) -> dict[str, int]:
        """Bytes by category."""
        return {name: line.bytes for name, line in self.by_category.items()}

    def table(self, by: str = "category", rows: int | None = None) -> str:
        """Return the sums by 'category', 'op' or 'site', the most bytes first, and their total."""
        lines: dict[str, Line] = getattr(self, f"by_{by}")
        named = sorted(lines.items(), key=lambda item: -item[1].bytes)[:rows]
        named.append(("all", Line(self.ops, self.launches, self.kernels, sum(self.traffic.values()))))
        width = max(len(name) for name, _ in named)
        head = f"{by:{width}}    ops  launches  kernels (est.)  GB moved"
        body = [
            f"{name:{width}}  {x.ops:5}  {x.launches:8}  {x.kernels:14}  {x.bytes / 1e9:8.3f}"
            for name, x in named
            if x.ops
        ]
        return "\n".join([head, *body])


def trace(step: TrainStep, device: str = "cuda") -> Footprint:
    """Return the cost on `device` ('cuda' or 'cpu') of an update of a step whose network, state and stream are on meta."""
    return record(step.update, device)


def record(function: Callable[[], object], device: str = "cuda") -> Footprint:
    """Return the cost on `device` of a function of meta tensors."""
    footprint = Footprint()
    with _Attention(device), Recorder(footprint):
        function()
    return footprint


class _Live:
    """Bytes of the storages that still exist, and the most there were: those made under the mode, and those given to it."""

    def __init__(self) -> None:
        self.given = self.made = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def see(self, t: Tensor, made: bool) -> None:
        storage = t.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // BLOCK) * BLOCK
        if key in self._known:
            return

        def died(_: object) -> None:
            del self._known[key]
            self.made -= size * made

        self._known[key] = weakref.ref(storage, died)
        self.made += size * made
        self.given += size * (not made)
        self.peak = max(self.peak, self.made)


class Recorder(TorchDispatchMode):
    """Writes every operation run under it into `footprint`."""

    def __init__(self, footprint: Footprint) -> None:
        super().__init__()
        self.footprint, self.live = footprint, _Live()
        self._origins: dict[int, tuple[str, str]] = {}

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.footprint.state_bytes = self.live.given
        self.footprint.peak_bytes = self.live.given + self.live.peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        for t in inputs:
            self.live.see(t, made=False)
        backward = func is torch.ops.aten.convolution_backward.default
        out: Any = _convolution_backward(*args) if backward else func(*args, **kwargs)
        if func is torch.ops.aten.convolution.default:
            out = torch.empty_like(out, memory_format=_layout(*args[:2]))
        given = {t.untyped_storage()._cdata for t in inputs}
        made = [t for t in tree_iter(out) if isinstance(t, Tensor) and t.untyped_storage()._cdata not in given]
        for t in made:
            self.live.see(t, made=True)
        name = func._schema.name.split("::")[1]
        site, group = self._origin()
        moved = bytes_moved(func, name, args, kwargs, made)
        if moved:
            category = _category(name, group, [*made, *inputs])
            self.footprint.add(category, name, site, launches(name, args), _kernels(name, args), moved)
        return out

    def _origin(self) -> tuple[str, str]:
        """Return (calls in this package, innermost first; what they are for); a backward operation's are its forward's."""
        node = torch._C._current_autograd_node()
        if node is not None:
            return self._origins.get(node._sequence_nr(), ("autograd", "other"))
        frames = list(_frames())
        site = " < ".join(f"{file}:{line}" for file, line, _ in frames[:3])
        group = next((_BY_FUNCTION[name] for _, _, name in frames if name in _BY_FUNCTION), None)
        group = group or next((_BY_FILE[file] for file, _, _ in frames if file in _BY_FILE), "other")
        # The key is the number of the node that autograd made last: for this operation, unless it needs none.
        self._origins.setdefault(torch._C._autograd._get_sequence_nr() - 1, (site, group))
        return site, group


def _frames() -> Iterator[tuple[str, int, str]]:
    """Yield (file, line, function) of the callers in this package and the kernels', innermost first."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path != __file__ and path.startswith(_ROOTS):
            yield Path(path).name, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]


def _category(name: str, group: str, tensors: list[Tensor]) -> str:
    """Return the line of the table for an operation called for a purpose; tensors: what it made and was given."""
    if group in ("optimizer", "dropout") or (group == "conv 1x1 as gemm" and name.rstrip("_") in _GEMMS):
        return group
    known = [prefix for prefix in _BY_NAME if name.startswith(prefix)]
    if known:
        return _BY_NAME[max(known, key=len)]
    if group != "data/loss" and name.rstrip("_") in _SUMS and tensors[0].dim() == 4:
        return "residual"
    return group if group in CATEGORIES and group != "conv 1x1 as gemm" else "other"


def bytes_moved(func: Any, name: str, args: Any, kwargs: Any, made: list[Tensor]) -> int:
    """Return the bytes that an operation must read, write in place and make; 0 for a view or an allocation."""
    moved = sum(_extent(t) for t in made)
    if name.startswith(("empty", "new_empty")) or not (moved or func._schema.is_mutable):
        return 0
    arguments = func._schema.arguments
    given = {a.name: value for a, value in zip(arguments, args, strict=False)} | kwargs
    for i, argument in enumerate(arguments):
        size = sum(_extent(t) for t in tree_iter(given.get(argument.name)) if isinstance(t, Tensor))
        if i == 0 and name in _GATHERS:
            size = sum(_extent(t) for t in made)
        written = argument.alias_info is not None and argument.alias_info.is_write
        read = not written or not (argument.name in ("out", "shadow") or name in _OVERWRITES)
        moved += size * (written + read)
    return moved


def _extent(t: Tensor) -> int:
    """Return the bytes of a tensor's distinct elements: an expanded dimension is one."""
    sizes = [n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or n == 0]
    return t.element_size() * torch.Size(sizes).numel()


def launches(name: str, args: Any) -> int:
    """Return the launches of an operation; see Footprint.launches."""
    library = name.rstrip("_") in _GEMMS or name.startswith(("convolution", "_scaled_dot_product"))
    return 1 if library else _kernels(name, args)


def _kernels(name: str, args: Any) -> int:
    """Return how many kernels a CUDA device would launch for a call (an estimate).

    Copies to the layout of a convolution are among them.
    """
    if name == "convolution":
        return 1 + (args[2] is not None) + _relayouts(args[:2])
    if name == "convolution_backward":
        return sum(args[10]) + _relayouts(args[:3])
    if name == "addmm":
        return 1 + (args[0].dim() == 2)  # a matrix to be added is copied into the output first
    if name in ("sum_rows", "join_columns"):
        return -(-len(args[0]) // _CAT) + (name == "sum_rows")
    if name.startswith("_foreach"):
        return foreach_kernels(name, *args[:2])
    return _KERNELS.get(name, 1)


def _relayouts(tensors: Any) -> int:
    """Return how many of a convolution's operands are not channels-last, if one is."""
    nhwc = [t.is_contiguous(memory_format=torch.channels_last) for t in tensors]
    return nhwc.count(False) if any(nhwc) else 0


def foreach_kernels(
    name: str, *lists: Sequence[Tensor], tensors: int = 64, blocks: int = 320, chunk: int = 65536
) -> int:
    """Return the launches of _foreach_copy_ or _foreach_add_ on lists of tensors.

    By the rules of ATen's ForeachUtils.h and MultiTensorApply.cuh that is one kernel a tensor where lists mix dtypes or
    strides, else one for each `tensors` tensors or `blocks` blocks of `chunk` values, whichever is reached first. The
    limits are those of CUDA 12; CUDA 13 has 448 and 2,240.
    """
    if not _foreach_is_fast(lists, cast=name == "_foreach_copy_"):
        return sum(t.numel() > 0 for t in lists[0])
    count = waiting = held = 0  # launches; blocks and tensors of the one that is being filled
    for size in (t.numel() for t in lists[0] if t.numel()):
        chunks = -(-size // chunk)
        held += 1
        for i in range(chunks):
            waiting += 1
            last = i == chunks - 1
            if waiting == blocks or (held == tensors and last):
                count, waiting, held = count + 1, 0, int(not last)
    return count + (waiting > 0)


def _foreach_is_fast(lists: Sequence[Sequence[Tensor]], cast: bool) -> bool:
    """Return whether tensors are dense, of one dtype (a copy, `cast`: one in each list), and alike in strides in all lists."""
    dtypes = [{t.dtype for t in tensors} for tensors in lists]
    if any(len(found) > 1 for found in dtypes) or (not cast and len(set.union(*dtypes)) > 1):
        return False
    orders = [[memory_order(t) for t in tensors] for tensors in lists]
    return all(order == orders[0] for order in orders) and all(map(_is_dense, lists[0]))


def _is_dense(t: Tensor) -> bool:
    """Return whether the elements fill their memory, each its own place."""
    step = 1
    for size, stride in sorted(memory_order(t), key=lambda dimension: dimension[1]):
        if stride != step:
            return False
        step *= size
    return True


def _convolution_backward(dy: Tensor, x: Tensor, weight: Tensor, bias_sizes: Any, *rest: Any) -> list[Tensor | None]:
    """Return the results of a convolution's backward with cuDNN's strides."""
    layout = _layout(x, weight)
    of_x, of_weight, of_bias = rest[-1]
    return [
        torch.empty_like(x, memory_format=layout) if of_x else None,
        torch.empty_like(weight, memory_format=layout) if of_weight else None,
        dy.new_empty(weight.shape[0]) if of_bias else None,
    ]


def _layout(x: Tensor, weight: Tensor) -> torch.memory_format:
    """Return cuDNN's choice for a convolution: channels-last where x or the weights are. Those of meta tensors never are."""
    nhwc = any(t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return torch.channels_last if nhwc else torch.contiguous_format


class _Attention(TorchFunctionMode):
    """scaled_dot_product_attention by the kernel that a device would choose; the meta device has a choice of its own."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        if self.device == "cpu":
            return aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        if args[0].dtype == torch.float32:
            needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in args)
            return aten._scaled_dot_product_efficient_attention(*args, None, needs_grad)[0]
        return aten._scaled_dot_product_flash_attention(*args)[0]
