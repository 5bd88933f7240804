"""The purposes of a step's operations: one table, by the place that called for an operation and by its name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ect.cost.trace import Event

CATEGORIES = (
    "conv", "conv 1x1 as gemm", "gemm/attention", "norm", "activation", "dropout", "residual", "concat", "optimizer",
    "data/loss", "other",
)  # fmt: skip
TABLE = {
    # functions: what they do is theirs, whoever calls them
    "ect_kernels.philox.dropout": "dropout",
    "ect.models.products.add_skip": "conv 1x1 as gemm",
    "ect.models.products.attention": "conv 1x1 as gemm",
    # modules and packages: of the innermost one that is named
    "ect.models": "other", "ect.models.precond": "data/loss", "ect.optim": "optimizer", "ect.step": "data/loss",
    "ect.objective": "data/loss", "ect.data": "data/loss",
    # operations, by the longest beginning of their name
    "aten::convolution": "conv",
    "aten::mm": "gemm/attention", "aten::addmm": "gemm/attention", "aten::bmm": "gemm/attention",
    "aten::_scaled_dot_product": "gemm/attention", "aten::_softmax": "gemm/attention",
    "aten::_safe_softmax": "gemm/attention",
    "ect::group_norm_silu": "norm", "ect::residual_group_norm_silu": "norm", "aten::native_group_norm": "norm",
    "ect::sum_rows": "norm", "ect::join_columns": "other",
    "ect::skip_product": "conv 1x1 as gemm", "aten::silu": "activation", "aten::cat": "concat",
    "ect::radam_ema": "optimizer", "ect::perturb": "data/loss", "ect::consistency_loss": "data/loss",
}  # fmt: skip
"""A name's category. Operations called by the optimizer or for dropout are theirs, whatever they do."""
GEMMS = ("mm", "addmm", "bmm", "baddbmm")
_SUMS = ("add", "mul", "div", "sub")


def category(event: Event) -> str:
    """Return the line of CATEGORIES that an operation belongs to."""
    place, name = _of_place(event), event.name.rstrip("_")
    if place in ("optimizer", "dropout") or (place == "conv 1x1 as gemm" and name in GEMMS):
        return place
    if (row := _of_name(event)) is not None:
        return TABLE[row]
    if place != "data/loss" and name in _SUMS and [*event.made, *event.inputs][0].dim() == 4:
        return "residual"
    return "other" if place == "conv 1x1 as gemm" else place


def rows(event: Event) -> Iterator[str]:
    """Return the rows of TABLE that an operation falls under, which of them decides or not."""
    yield from (name for name in (_of_function(event), _of_module(event), _of_name(event)) if name is not None)


def _of_place(event: Event) -> str:
    row = _of_function(event) or _of_module(event)
    return "other" if row is None else TABLE[row]


def _of_function(event: Event) -> str | None:
    return _first(f"{frame.module}.{frame.function}" for frame in event.site)


def _of_module(event: Event) -> str | None:
    parts = (frame.module.split(".") for frame in event.site)
    return _first(".".join(names[:n]) for names in parts for n in range(len(names), 1, -1))


def _of_name(event: Event) -> str | None:
    name = event.op.overloadpacket._qualified_op_name
    return max((row for row in TABLE if name.startswith(row)), key=len, default=None)


def _first(names: Iterable[str]) -> str | None:
    return next((name for name in names if name in TABLE), None)
