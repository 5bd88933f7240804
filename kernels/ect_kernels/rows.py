"""Vectors by channel as rows [N, C] that are all alike, one for each sample.

The norm ops take gamma, beta and biases as [C], whose gradients they sum over the samples, or as such rows. The
gradients of rows stay by sample, as the norms' backward passes make them, until one sum over the samples serves all
vectors of a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ect_kernels.registry import register
from ect_kernels.tensors import Some


def _width(tensors: Sequence[Tensor]) -> int:
    return sum(t.shape[1] for t in tensors)


# Ops of their own, because torch.compile would make as many copies of the result as there are tensors.
sum_rows = register(
    "sum_rows", "(Tensor[] rows) -> Tensor",
    lambda rows: torch.cat(rows, dim=1).sum(0), lambda rows: rows[0].new_empty(_width(rows)),
)  # fmt: skip
"""Sum all [N, C_i] over n, and return the sums one after the other: [sum of C_i]."""

join_columns = register(
    "join_columns", "(Tensor[] columns) -> Tensor",
    lambda columns: torch.cat(columns, dim=1), lambda columns: columns[0].new_empty(len(columns[0]), _width(columns)),
)  # fmt: skip
"""Join all [N, C_i] side by side, to [N, sum of C_i]."""


class _Split(torch.autograd.Function):
    """split_columns, whose backward is one join_columns."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, *sizes: int) -> tuple[Tensor, ...]:
        return rows.split(sizes, dim=1)

    @staticmethod
    def backward(ctx: Any, *columns: Tensor) -> tuple[Tensor | None, ...]:
        return join_columns(columns), *[None] * len(columns)


def split_columns(rows: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Split rows [N, C] in parts of so many columns, without a copy."""
    parts: tuple[Tensor, ...] = _Split.apply(rows, *sizes)
    return parts


class _BySample(torch.autograd.Function):
    """by_sample, whose backward is one sum_rows."""

    @staticmethod
    def forward(ctx: Any, n: int, *vectors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [v.dtype for v in vectors]
        return tuple(v.expand(n, -1) for v in vectors)

    @staticmethod
    def backward(ctx: Any, *rows: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [t for t in rows if t is not None]
        if not given:
            return (None,) * (1 + len(rows))
        sums = iter(sum_rows(given).split([t.shape[1] for t in given]))
        grads = (None if t is None else next(sums).to(dtype) for t, dtype in zip(rows, ctx.dtypes, strict=True))
        return None, *grads


def by_sample(vectors: Sequence[Tensor], n: int) -> tuple[Tensor, ...]:
    """Return each vector [C] as rows [n, C], without a copy."""
    rows: tuple[Tensor, ...] = _BySample.apply(n, *vectors)
    return rows


def vector(t: Some) -> Some:
    """Return the [C] of a vector, or of rows that are all alike."""
    if t is None or t.dim() == 1:
        return t
    return t.select(0, 0) if t.shape[0] else t.new_zeros(t.shape[1])


class Form(NamedTuple):
    """The form in which a vector was given."""

    by_sample: bool
    channels: int
    dtype: torch.dtype


def form(t: Tensor | None) -> Form | None:
    return None if t is None else Form(t.dim() == 2, t.shape[-1], t.dtype)


def gradients(rows: Tensor, forms: Sequence[Form | None]) -> list[Tensor | None]:
    """Return the gradients of vectors, in the forms that these were given in, from the gradients by sample [K, N, C].

    The K-th also serves further vectors, which were added to the K-th.
    """
    planes = rows.unbind()
    totals = planes if all(f is None or f.by_sample for f in forms) else rows.sum(1).unbind()
    found: list[Tensor | None] = []
    for k, f in enumerate(forms):
        if f is None:
            found.append(None)
            continue
        gradient = (planes if f.by_sample else totals)[min(k, len(planes) - 1)]
        if gradient.shape[-1] != f.channels:
            gradient = gradient[..., : f.channels]
        found.append(gradient if gradient.dtype == f.dtype else gradient.to(f.dtype))
    return found
