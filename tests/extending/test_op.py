"""An op written outside of ect_kernels: values, gradients, fake tensors, and a table that knows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ect_kernels import dispatch
from torch._subclasses.fake_tensor import FakeTensorMode

from ect.options import parse
from tests.extending.loaded import added


@pytest.fixture(autouse=True)
def own() -> Iterator[Any]:
    with added("op") as names:
        yield names


def test_values_and_gradients(own: Any) -> None:
    x, s = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True), torch.tensor([0.5, 2.0, -1.0]).double()
    assert torch.equal(own.scale_rows(x, s), torch.einsum("nchw,n->nchw", x, s))
    assert torch.autograd.gradcheck(lambda x: own.scale_rows(x, s), [x])


def test_shapes_alone_are_enough_for_a_compiler(own: Any) -> None:
    with FakeTensorMode():
        y = own.scale_rows(torch.empty(3, 2, 4, 4, dtype=torch.bfloat16, device="cuda"), torch.empty(3, device="cuda"))
        assert y.shape == (3, 2, 4, 4) and y.dtype == torch.bfloat16 and y.device.type == "cuda"
    with pytest.raises(ValueError, match=r"scale_rows: s is \(2,\)"):
        own.scale_rows(torch.zeros(3, 2, 4, 4), torch.zeros(2))


def test_it_has_a_row_in_the_table_of_backends_and_a_name_that_can_be_chosen(own: Any) -> None:
    assert [row[:2] for row in dispatch.table(torch.device("cpu")) if row[0] == "scale_rows"] == [
        ("scale_rows", "reference")
    ]
    assert dispatch.parse_choice("scale_rows=reference") == {"scale_rows": "reference"}
    assert parse(["--kernels", "scale_rows=reference", "--dry-run"]).kernels == "scale_rows=reference"
    with pytest.raises(dispatch.BackendError, match="this op has no such backend, but reference"):
        own.scale_rows(torch.zeros(1, 1, 1, 1), torch.zeros(1), backend="triton")
