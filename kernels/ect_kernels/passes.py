"""The passes of the functional ops: their registration with PyTorch and the calls of their compiled backends.

A pass is one direction of an op, a function of NamedTuples that returns a NamedTuple of tensors. PyTorch sees the
fields, one after the other, and the name of a backend.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import itemgetter
from typing import Any, get_type_hints

import torch
from torch import Tensor

from ect_kernels import cpu, native
from ect_kernels.dispatch import Backend, Op
from ect_kernels.registry import register

KINDS: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", float: "float", bool: "bool", torch.dtype: "ScalarType",
}  # fmt: skip


@dataclass(frozen=True)
class Pass:
    """One direction of `op`: way "fwd" or "bwd".

    inputs: the NamedTuples it takes, the op's own arguments in the last one; where the first tensor of that is empty, all
    results are zeros. The functions below take them, and so do the backends' limits. room: the results, not yet filled.
    prepare: the same inputs, in the layouts and dtypes that backends read. launcher: of these and the results, the arguments of
    the C launchers <op>_<way> of csrc/ and csrc/cpu/, where there are any.
    """

    op: str
    way: str
    inputs: tuple[type[Any], ...]
    room: Callable[..., Any]
    prepare: Callable[..., tuple[Any, ...]]
    launcher: Callable[..., tuple[native.Argument, ...]] = lambda *args: ()

    def compiled(self, backend: str) -> Callable[..., Any]:
        """Return the pass on backend "triton" (function <way> of module <op>_triton), "native", "cuda" or "emulated"."""

        def run(*args: Any) -> Any:
            results = self.room(*args)
            if backend == "triton":  # imported here because triton may be absent
                function = getattr(importlib.import_module(f"ect_kernels.{self.op}_triton"), self.way)
                with native.current(results[0].device):
                    function(*args, results)
            elif backend == "native":
                cpu.launch(f"{self.op}_{self.way}", *self.launcher(*args, results))
            else:
                native.launch(backend, f"{self.op}_{self.way}", *self.launcher(*args, results))
            return results

        return run

    def register(self, op: Op) -> Any:
        """Register ect::<op> or ect::<op>_bwd with PyTorch, and return it as a function, which has no gradient.

        The last argument names a backend, or is empty for an automatic choice, which is made when the op runs: a
        compiled graph holds the op, not the choice.
        """

        hints = [hint for kind in self.inputs for hint in get_type_hints(kind).items()]
        ends = list(accumulate((len(kind._fields) for kind in self.inputs), initial=0))
        parts = [(kind._make, slice(*pair)) for kind, pair in zip(self.inputs, pairwise(ends), strict=True)]
        places = [i for i, (_, kind) in enumerate(hints) if kind in (Tensor, Tensor | None)]
        tensors, names = itemgetter(*places), [hints[i][0] for i in places]

        def unpack(args: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple([make(args[part]) for make, part in parts])

        def plain(results: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
            return tuple(results) if len(results) > 1 else results[0]

        def function(*args: Any) -> Tensor | tuple[Tensor, ...]:
            device = native.one_device(self.op, names, tensors(args))
            unpacked = unpack(args)
            backend = op.pick(device, unpacked, args[-1])
            if unpacked[-1][0].numel() == 0:
                return plain(tuple(t.zero_() for t in self.room(*unpacked)))
            return plain(getattr(op.backends[backend], self.way)(*self.prepare(*unpacked)))

        def fake(*args: Any) -> Tensor | tuple[Tensor, ...]:
            native.one_device(self.op, names, tensors(args))
            return plain(self.room(*unpack(args)))

        arguments = ", ".join([*(f"{KINDS[kind]} {name}" for name, kind in hints), "str backend"])
        results = ", ".join("Tensor" for _ in get_type_hints(self.room)["return"]._fields)
        name = self.op + ("" if self.way == "fwd" else "_bwd")
        return register(name, f"({arguments}) -> ({results})", function, fake)


def backends(
    reference: Backend, forward: Pass, backward: Pass | None = None, *, triton: Callable[..., str | None],
    cuda: Callable[..., str | None], native: Callable[..., str | None] | None = None,
) -> dict[str, Backend]:  # fmt: skip
    """Return the written forms that every functional op has; native, triton, cuda: limits of these backends."""
    forms = {"reference": reference}
    for name, limits in (("native", native), ("triton", triton), ("cuda", cuda), ("emulated", cuda)):
        if limits is not None:
            forms[name] = Backend(forward.compiled(name), None if backward is None else backward.compiled(name), limits)
    return forms
