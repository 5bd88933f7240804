"""The cost of an update before any device has run it: memory, operations, kernels and bytes moved, summed over its trace.

On meta tensors memory is exact but for what lies outside of tensors, operations and launches are counted, and the bytes
are the least that each operation must move: its inputs read once and its outputs written. Kernels are an estimate of
what libraries make of their operations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.utils._pytree import tree_iter

from ect.cost.categories import CATEGORIES, GEMMS, category
from ect.cost.trace import Event, TensorMeta
from ect.optim import memory_order

_OVERWRITES = ("copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_")  # they do not read what they write
_GATHERS = ("index", "index_select", "gather", "embedding")  # they read as much of their first argument as they return
# Kernels of one call, where it is not one. Ours: see csrc/; torch's: its CUDA sources.
_KERNELS = {
    "radam_ema": 3, "native_group_norm": 3,
    "native_group_norm_backward": 5, "_scaled_dot_product_flash_attention_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 2,
}  # fmt: skip
_CAT = 64  # tensors of a launch of torch.cat, at least


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
    """The cost of an update, or of another function that was traced.

    state_bytes: of the tensors it was given. peak_bytes: with the most that it has alive beside them. by_category, by_op,
    by_site: sums over the operations that touch device memory; views are free. A site is where in this package the call was
    made, innermost first, for a backward that of its forward (a sum of gradients counts to the backward before it).
    """

    state_bytes: int = 0
    peak_bytes: int = 0
    by_category: dict[str, Line] = field(default_factory=lambda: {name: Line() for name in CATEGORIES})
    by_op: dict[str, Line] = field(default_factory=dict)
    by_site: dict[str, Line] = field(default_factory=dict)

    @staticmethod
    def of(events: Sequence[Event]) -> Footprint:
        """Sum over a trace."""
        cost = Footprint()
        for event in events:
            if (moved := bytes_moved(event)) > 0:
                cost._add(event, launches(event), _kernels(event), moved)
        given = {t.storage for event in events for t in event.inputs if not t.storage.made}
        cost.state_bytes = sum(storage.size for storage in given)
        cost.peak_bytes = cost.state_bytes + max((event.alive for event in events), default=0)
        return cost

    def _add(self, event: Event, *counts: int) -> None:
        """Count one more operation; counts: launches, kernels and bytes."""
        line, site = category(event), " < ".join(event.site[:3]) or "autograd"
        self.by_category[line].add(*counts)
        self.by_op.setdefault(f"{line}: {event.name}", Line()).add(*counts)
        self.by_site.setdefault(f"{event.name} {site}", Line()).add(*counts)

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


def bytes_moved(event: Event) -> int:
    """Return the bytes that an operation must read, write in place and make; 0 for a view or an allocation."""
    schema, name, made = event.op._schema, event.name, sum(t.nbytes for t in event.made)
    if name.startswith(("empty", "new_empty")) or not (made or schema.is_mutable):
        return 0
    given, moved = event.arguments, made
    for i, argument in enumerate(schema.arguments):
        size = sum(t.nbytes for t in tree_iter(given.get(argument.name)) if isinstance(t, TensorMeta))
        if i == 0 and name in _GATHERS:
            size = made
        written = argument.alias_info is not None and argument.alias_info.is_write
        read = not written or not (argument.name in ("out", "shadow") or name in _OVERWRITES)
        moved += size * (written + read)
    return moved


def launches(event: Event) -> int:
    """Return the launches of an operation; see Footprint.launches."""
    library = event.name.rstrip("_") in GEMMS or event.name.startswith(("convolution", "_scaled_dot_product"))
    return 1 if library else _kernels(event)


def _kernels(event: Event) -> int:
    """Return how many kernels a CUDA device would launch for a call (an estimate).

    Copies to the layout of a convolution are among them.
    """
    name, args = event.name, event.args
    if name == "convolution":
        return 1 + (args[2] is not None) + _relayouts(args[:2])
    if name == "convolution_backward":
        return sum(args[10]) + _relayouts(args[:3])
    if name == "addmm":
        return 1 + (len(args[0].shape) == 2)  # a matrix to be added is copied into the output first
    if name in ("sum_rows", "join_columns"):
        return -(-len(args[0]) // _CAT) + (name == "sum_rows")
    if name.startswith("_foreach"):
        return foreach_kernels(name, *args[:2])
    return _KERNELS.get(name, 1)


def _relayouts(tensors: Sequence[TensorMeta]) -> int:
    """Return how many of a convolution's operands are not channels-last, if one is."""
    nhwc = [_fills_memory((t.shape[d], t.strides[d]) for d in (1, 3, 2, 0)) for t in tensors]
    return nhwc.count(False) if any(nhwc) else 0


def foreach_kernels(name: str, *lists: Sequence[Any], tensors: int = 64, blocks: int = 320, chunk: int = 65536) -> int:
    """Return the launches of _foreach_copy_ or _foreach_add_ on lists of tensors.

    By the rules of ATen's ForeachUtils.h and MultiTensorApply.cuh that is one kernel a tensor where lists mix dtypes or
    strides, else one for each `tensors` tensors or `blocks` blocks of `chunk` values, whichever is reached first. The
    limits are those of CUDA 12; CUDA 13 has 448 and 2,240.
    """
    if not _foreach_is_fast(lists, cast=name == "_foreach_copy_"):
        return sum(t.shape.numel() > 0 for t in lists[0])
    count = waiting = held = 0  # launches; blocks and tensors of the one that is being filled
    for size in (t.shape.numel() for t in lists[0] if t.shape.numel()):
        chunks = -(-size // chunk)
        held += 1
        for i in range(chunks):
            waiting += 1
            last = i == chunks - 1
            if waiting == blocks or (held == tensors and last):
                count, waiting, held = count + 1, 0, int(not last)
    return count + (waiting > 0)


def _foreach_is_fast(lists: Sequence[Sequence[Any]], cast: bool) -> bool:
    """Return whether tensors are dense, of one dtype (a copy, `cast`: one in each list), and alike in strides in all lists."""
    dtypes = [{t.dtype for t in tensors} for tensors in lists]
    if any(len(found) > 1 for found in dtypes) or (not cast and len(set.union(*dtypes)) > 1):
        return False
    orders = [[memory_order(t) for t in tensors] for tensors in lists]
    dense = (_fills_memory(sorted(order, key=lambda dimension: dimension[1])) for order in orders[0])
    return all(order == orders[0] for order in orders) and all(dense)


def _fills_memory(dimensions: Iterable[tuple[int, int]]) -> bool:
    """Return whether elements lie side by side, each in its place; dimensions: (size, stride), the innermost first."""
    step = 1
    for size, stride in dimensions:
        if size != 1 and stride != step:
            return False
        step *= size
    return True
