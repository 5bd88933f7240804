"""residual_group_norm_silu on a sum that skip_product made: x is not written again, the gradients are those of the terms."""

from __future__ import annotations

import pytest
import torch
from ect_kernels.residual_group_norm_silu import NAME, residual_group_norm_silu

from tests.kernels import test_dram
from tests.kernels.test_residual_group_norm_silu import GRADS, HALF, each_target, inputs, need

CPU = torch.device("cpu")


@each_target
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_a_sum_made_elsewhere(backend: str, device: str, dtype: torch.dtype) -> None:
    """x is a; the gradients are those of the terms, as if the sum had been made here."""
    where = need(backend, device)
    k = inputs(16, 8, 4, 5, 4, dtype=dtype, skip=None)(where)
    leaves = {name: k[name].clone().requires_grad_() for name in GRADS if k[name] is not None}
    x, y = residual_group_norm_silu(**{**k, **leaves}, backend=backend)
    cotangents = [torch.randn(t.shape, generator=torch.Generator().manual_seed(3)).to(t) for t in (x, y)]
    want = torch.autograd.grad([x, y], list(leaves.values()), cotangents)

    given = {**k, **leaves, "a": x.detach().clone().requires_grad_()}
    got_x, got_y = residual_group_norm_silu(**given, summed=True, backend=backend)
    assert got_x.data_ptr() == given["a"].data_ptr() and torch.equal(got_y, y)
    got = torch.autograd.grad([got_x, got_y], [given[name] for name in leaves], cotangents)
    for name, a, b in zip(leaves, got, want, strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(ValueError, match="skip is given, but `summed`"):
        residual_group_norm_silu(**{**k, "skip": k["a"]}, summed=True)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["cuda", "triton"])
def test_a_sum_made_elsewhere_is_read_once(form: str) -> None:
    """2s, and 2s of other: a, y and no x."""
    k = {
        name: value
        for name, value in inputs(64, 64, 16, 8, 8, n=1, dtype=HALF, skip=None)(CPU).items()
        if value is not None
    }
    with test_dram.counted(form, NAME) as (backend, meters):
        residual_group_norm_silu(**k, summed=True, backend=backend)
    case = test_dram.Case("summed", k, {"a": "", "skip": "", "x": "r"}, -2 * HALF.itemsize)
    print(test_dram.check(form, NAME, case, "forward", meters["forward"]))
