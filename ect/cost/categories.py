"""The purposes of a step's operations: one table, by the place that called for an operation and by its name."""

from __future__ import annotations

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
    "ect::radam_ema": "optimizer", "ect::levels": "data/loss", "ect::perturb": "data/loss",
    "ect::consistency_loss": "data/loss",
}  # fmt: skip
"""A name's category. Operations called by the optimizer or for dropout are theirs, whatever they do."""
GEMMS = ("mm", "addmm", "bmm", "baddbmm")
_SUMS = ("add", "mul", "div", "sub")


def category(event: Event) -> str:
    """Return the line of CATEGORIES that an operation belongs to."""
    *places, operation = rows(event)
    place = next((TABLE[row] for row in places if row), "other")
    name = event.name.rstrip("_")
    if place in ("optimizer", "dropout") or (place == "conv 1x1 as gemm" and name in GEMMS):
        return place
    if operation:
        return TABLE[operation]
    if place != "data/loss" and name in _SUMS and len([*event.made, *event.inputs][0].shape) == 4:
        return "residual"
    return "other" if place == "conv 1x1 as gemm" else place


def rows(event: Event) -> tuple[str, str, str]:
    """Return the rows of TABLE that an operation falls under: of a function, a module, its name; '' for none."""
    calls = [call.rpartition(":")[0] for call in event.site]
    modules = [call.rsplit(".", n)[0] for call in calls for n in range(1, call.count("."))]
    operation = event.op.overloadpacket._qualified_op_name
    known = [row for row in TABLE if operation.startswith(row)]
    return _first(calls), _first(modules), max(known, key=len, default="")


def _first(names: list[str]) -> str:
    return next((name for name in names if name in TABLE), "")
