"""Vectors as rows: the norms' gradients by sample, and their one sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ect_kernels.group_norm_silu import group_norm_silu
from ect_kernels.residual_group_norm_silu import residual_group_norm_silu
from ect_kernels.rows import by_sample, join_columns, split_columns, sum_rows
from torch import Tensor

from ect.cost.trace import trace
from tests.kernels import test_group_norm_silu as plain
from tests.kernels import test_residual_group_norm_silu as residual
from tests.kernels.conftest import need

CPU = torch.device("cpu")
VECTORS = ("gamma", "beta", "bias", "skip_bias")


def norm(backend: str) -> tuple[Any, dict[str, Any]]:
    need(plain.OP, backend, "cpu")
    return group_norm_silu, plain.inputs(5, 24, 4, 5, 7, torch.float16, v=True, p=0.2)


def seam(backend: str) -> tuple[Any, dict[str, Any]]:
    need(residual.OP, backend, "cpu")
    return residual_group_norm_silu, residual.inputs(16, 8, 4, 5, 4, n=5, dtype=torch.float16)(CPU)


@pytest.mark.parametrize("backend", ["reference", "triton", "emulated"])
@pytest.mark.parametrize("make", [norm, seam])
def test_rows_have_the_gradients_of_vectors_by_sample(make: Any, backend: str) -> None:
    """Rows of one sample alone are those of a batch of it; summed they are the vector's gradient, in its dtype."""
    op, k = make(backend)
    names = [name for name in VECTORS if name in k]
    k["beta"] = k["beta"].half()
    n = 5

    def gradients(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        y = op(**{**k, **given}, backend=backend)
        y = y[1] if isinstance(y, tuple) else y
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
        return torch.autograd.grad(y, list(given.values()), weights)

    vectors = {name: k[name].clone().requires_grad_() for name in names}
    rows = {name: t.detach().expand(n, -1).requires_grad_() for name, t in vectors.items()}
    through = dict(zip(names, by_sample(list(vectors.values()), n), strict=True))
    y = op(**{**k, **through}, backend=backend)
    y = y[1] if isinstance(y, tuple) else y
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    together = torch.autograd.grad(y, list(vectors.values()), weights)
    for name, whole, by_row, summed in zip(names, gradients(vectors), gradients(rows), together, strict=True):
        assert by_row.shape == (n, *whole.shape) and whole.dtype == by_row.dtype == summed.dtype == k[name].dtype
        bar = 1e-5 if whole.dtype == torch.float32 else 5e-3
        torch.testing.assert_close(by_row.double().sum(0), whole.double(), rtol=bar, atol=bar)
        torch.testing.assert_close(summed, whole, rtol=bar, atol=bar)
        assert (by_row[0] != by_row[1]).any()


def test_one_op_sums_the_rows_of_all_vectors_that_have_a_gradient() -> None:
    vectors = [
        torch.randn(c, dtype=dtype).requires_grad_()
        for c, dtype in ((3, torch.float32), (5, torch.float16), (2, torch.float32))
    ]
    a, b, _ = by_sample(vectors, 7)
    assert a.shape == (7, 3) and a.data_ptr() == vectors[0].data_ptr()

    weights, got = [torch.randn(7, 3), torch.randn(7, 5)], []

    def run() -> None:
        total = (a * weights[0]).sum() + (b.float() * weights[1]).sum()
        got.extend(torch.autograd.grad(total, vectors, allow_unused=True))

    assert [len(event.args[0]) for event in trace(run) if event.name == "sum_rows"] == [2]
    assert got[2] is None and got[1].dtype == torch.float16
    torch.testing.assert_close(got[0], weights[0].sum(0))
    torch.testing.assert_close(got[1].float(), weights[1].sum(0), rtol=1e-3, atol=2e-3)


def test_split_columns_are_views_whose_gradients_are_joined() -> None:
    rows = torch.randn(4, 10).requires_grad_()
    parts = split_columns(rows, [3, 5, 2])
    assert [t.shape[1] for t in parts] == [3, 5, 2] and parts[1].data_ptr() == rows[:, 3:].data_ptr()
    weights = [torch.randn(t.shape) for t in parts]
    (grad,) = torch.autograd.grad(parts, rows, weights)
    assert torch.equal(grad, torch.cat(weights, 1))


@pytest.mark.parametrize("op", [sum_rows, join_columns])
def test_opcheck(op: Any) -> None:
    torch.library.opcheck(op, ([torch.randn(4, 3), torch.randn(8, 5)[:4, 1:], torch.randn(4, 1)],))


@pytest.mark.parametrize("backend", ["reference", "triton", "emulated"])
def test_what_gets_no_gradient_is_a_constant(backend: str) -> None:
    """x and joined, where that is said; the other gradients are those of both used with zeros."""
    _, k = seam(backend)
    a = k["a"].clone().requires_grad_()

    def results(**options: bool) -> tuple[Tensor, ...]:
        return residual_group_norm_silu(**{**k, "a": a}, joined=True, backend=backend, **options)

    x, y, joined = results()
    (want,) = torch.autograd.grad([x, y, joined], a, [torch.zeros_like(x), y.detach(), torch.zeros_like(y)])
    x, y, joined = results(dx=False, djoined=False)
    assert not x.requires_grad and not joined.requires_grad
    assert torch.equal(torch.autograd.grad(y, a, y.detach())[0], want)
