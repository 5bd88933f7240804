"""Autograd's backward pass, walked in Python: torch's own engine asks CUDA for devices and streams, which are not there.

Every node computes what it always computes; only the walk from node to node is done here, and what the engine checks on the
way is checked here too: a gradient has the shape, dtype and device of what it is the gradient of.
"""

from __future__ import annotations

import contextlib
import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.autograd.graph import get_gradient_edge

Edge = tuple[Any, int]


@contextlib.contextmanager
def walked_in_python() -> Iterator[None]:
    """Inside the block torch.autograd.grad and Tensor.backward come here."""

    def set_materialize_grads(ctx: Any, value: bool) -> None:
        ctx.materialize_grads = value
        ctx.takes_none = not value

    with (
        mock.patch.object(FunctionCtx, "set_materialize_grads", set_materialize_grads),
        mock.patch.object(torch.autograd, "_engine_run_backward", run_backward),
        mock.patch.object(torch.autograd.graph, "_engine_run_backward", run_backward),
    ):
        yield


def run_backward(
    outputs: Sequence[Tensor], grads: Sequence[Tensor | None], keep_graph: bool, create_graph: bool,
    inputs: Sequence[Any] = (), allow_unreachable: bool = False, accumulate_grad: bool = False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """What the engine's function of that name takes and returns."""
    roots, wanted = [_edge(t) for t in outputs], [_edge(t) for t in inputs]
    sequence = _nodes(roots)
    needed = _leading_to({node for node, _ in wanted}, sequence) if wanted else set(sequence)
    waiting = Counter(node for parent in needed for node, _ in parent.next_functions if node in needed)
    arrived: dict[Any, dict[int, Tensor]] = {}
    for edge, grad in zip(roots, grads, strict=True):
        if grad is not None:
            _arrive(arrived, edge, grad)
    found: dict[Edge, Tensor] = {}
    # The latest node first, as the engine has it.
    order = {node: i for i, node in enumerate(sequence)}
    ready = [(-_number(node), order[node], node) for node in needed if waiting[node] == 0]
    heapq.heapify(ready)
    with torch.set_grad_enabled(create_graph):
        while ready:
            node = heapq.heappop(ready)[-1]
            given = arrived.pop(node, {})
            found |= {(node, k): grad for k, grad in given.items()}
            leaf = hasattr(node, "variable")
            if leaf and accumulate_grad and not wanted and given:
                variable = node.variable
                variable.grad = given[0] if variable.grad is None else variable.grad + given[0]
            passed = () if leaf or not any(n in needed for n, _ in node.next_functions) else _call(node, given)
            for (following, slot), grad in zip(node.next_functions, passed, strict=False):
                if following in needed and grad is not None:
                    _arrive(arrived, (following, slot), grad)
            for following, _ in node.next_functions:
                if following in needed:
                    waiting[following] -= 1
                    if waiting[following] == 0:
                        heapq.heappush(ready, (-_number(following), order[following], following))
    results = tuple(found.get(edge) for edge in wanted)
    if not allow_unreachable and any(r is None for r in results):
        raise RuntimeError("One of the differentiated Tensors appears to not have been used in the graph")
    return results


def _edge(tensor: Any) -> Edge:
    edge = tensor if isinstance(tensor, torch.autograd.graph.GradientEdge) else get_gradient_edge(tensor)
    return edge[0], edge[1]


def _nodes(roots: Sequence[Edge]) -> list[Any]:
    """Every node that can be reached."""
    seen: dict[Any, None] = {}
    left = [node for node, _ in roots]
    while left:
        node = left.pop()
        if node not in seen:
            seen[node] = None
            left += [following for following, _ in node.next_functions if following is not None]
    return list(seen)


def _leading_to(ends: set[Any], nodes: Sequence[Any]) -> set[Any]:
    parents: dict[Any, list[Any]] = {}
    for parent in nodes:
        for following, _ in parent.next_functions:
            parents.setdefault(following, []).append(parent)
    found, left = set(), [node for node in nodes if node in ends]
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += parents.get(node, [])
    return found


def _number(node: Any) -> int:
    return 2**62 if hasattr(node, "variable") else node._sequence_nr()


def _arrive(arrived: dict[Any, dict[int, Tensor]], edge: Edge, grad: Tensor) -> None:
    """Add a gradient to what a node is waiting for, in the form of the tensor that it belongs to."""
    node, slot = edge
    expected = node._input_metadata[slot]
    if grad.shape != torch.Size(expected.shape):
        grad = grad.sum_to_size(expected.shape)
    if grad.device != expected.device:
        raise RuntimeError(f"{node.name()} got a gradient on {grad.device}, expected {expected.device}")
    grad = grad if grad.dtype == expected.dtype else grad.to(expected.dtype)
    slots = arrived.setdefault(node, {})
    slots[slot] = grad if slot not in slots else slots[slot] + grad


def _call(node: Any, given: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients that a node passes on, one for each of its next functions."""
    metadata = node._input_metadata
    if not isinstance(node, BackwardCFunction):
        result = node(*(given.get(k) for k in range(len(metadata))))
        return result if isinstance(result, tuple) else (result,)
    grads: list[Tensor | None] = [given.get(k) for k in range(len(metadata))]
    if not getattr(node, "takes_none", False):
        grads = [
            torch.zeros(m.shape, dtype=m.dtype, device=m.device) if grad is None else grad
            for grad, m in zip(grads, metadata, strict=True)
        ]
    result = node.apply(*grads)
    result = result if isinstance(result, tuple) else (result,)
    # A function of the user's also returns one for each argument that is no tensor.
    tensors = iter(grad for grad, need in zip(result, node.needs_input_grad, strict=False) if need)
    return tuple(None if following is None else next(tensors) for following, _ in node.next_functions)
