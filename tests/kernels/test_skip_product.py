"""skip_product: every form against the sum in fp64; half precision is rounded once."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from ect_kernels import dispatch
from ect_kernels.dispatch import BackendError
from ect_kernels.skip_product import OP, forward_op, skip_product
from torch import Tensor

from tests.kernels import conftest

torch.set_num_threads(1)
HALF = torch.float16
TARGETS = [
    ("reference", "cpu"),
    ("triton", "cpu"),
    pytest.param("reference", "cuda", marks=pytest.mark.gpu),
    pytest.param("triton", "cuda", marks=pytest.mark.gpu),
]
SHAPES = {
    "256+256 to 256": (1, 256, 256, 256, 8, 8),
    "256+128 to 256": (2, 256, 256, 128, 4, 4),
    "24+8 to 40, nothing aligned": (3, 40, 24, 8, 5, 3),
    "three tiles of channels, one pixel": (1, 272, 16, 48, 1, 1),
}


def arguments(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", **changes: Any) -> dict[str, Any]:
    n, o, c, c2, h, w = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    images = {name: normal(n, k, h, w).to(memory_format=torch.channels_last) for name, k in (("a", o), ("x", c))}
    images |= {"other": normal(n, c2, h, w).to(memory_format=torch.channels_last), "weight": normal(o, c + c2) / 16}
    given = {name: value.to(dtype) for name, value in images.items()} | {"bias": normal(o), "skip_bias": normal(o)}
    return {name: value.to(device) for name, value in given.items()} | {"scale": 0.5**0.5} | changes


def truth(k: dict[str, Any]) -> Tensor:
    total = k["a"].double() + torch.einsum(
        "nchw,oc->nohw", torch.cat([k["x"], k["other"]], 1).double(), k["weight"].double()
    )
    for name in ("bias", "skip_bias"):
        total = total if k[name] is None else total + k[name].double()[:, None, None]
    return total * k["scale"]


need = functools.partial(conftest.need, OP)


@pytest.mark.parametrize(("backend", "device"), TARGETS)
@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_is_the_sum_rounded_once(backend: str, device: str, dtype: torch.dtype, name: str) -> None:
    need(backend, device, dtype)
    if backend == "triton" and dtype in (torch.float32, torch.float64):
        pytest.skip("the Triton form takes half precision only")
    for changes in ({}, {"bias": None}, {"bias": None, "skip_bias": None, "scale": 1.0}):
        k = arguments(SHAPES[name], dtype, device, **changes)
        got, want = skip_product(**k, backend=backend), truth(k)
        assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
        error = (got.double() - want).abs()
        # Half a unit of the last place, and what summing in fp32 (fp64) leaves of terms of this size.
        sums = truth({key: v.abs() if isinstance(v, Tensor) else v for key, v in k.items()}) * (
            2**-50 if dtype == torch.float64 else 2**-22
        )
        assert (error <= want.abs() * torch.finfo(dtype).eps / 2 * 1.001 + sums).all(), float(error.max())


def test_two_roundings_would_be_seen() -> None:
    """The bound above is missed where the sum is stored in half precision between the products, as a library's calls would."""
    k = arguments(SHAPES["256+256 to 256"], HALF, bias=None, skip_bias=None, scale=1.0)
    first = skip_product(**{**k, "other": torch.zeros_like(k["other"])})
    got, want = skip_product(**{**k, "a": first, "x": torch.zeros_like(k["x"])}), truth(k)
    error = (got.double() - want).abs()
    assert not (error <= want.abs() * torch.finfo(HALF).eps / 2 * 1.001 + 64 * 2**-22).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(1, 8, 4, 4)}, "x is torch.float32 but a is torch.float16"),
        ({"weight": torch.zeros(8, 15, dtype=HALF)}, "weight"),
        ({"other": torch.zeros(1, 8, 2, 4, dtype=HALF)}, "other"),
        ({"bias": torch.zeros(7)}, "bias"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        skip_product(**arguments((1, 8, 8, 8, 4, 4), HALF) | changes)


def test_triton_refuses_single_precision_by_name() -> None:
    need("triton", "cpu")
    with pytest.raises(BackendError, match="only float16, bfloat16"):
        skip_product(**arguments((1, 8, 8, 8, 4, 4), torch.float32), backend="triton")


def test_a_request_to_all_ops_passes_by_an_op_without_that_form() -> None:
    """There is no CUDA form: `*=cuda` leaves this op to the automatic choice, a request by its name is refused."""
    k = arguments((1, 8, 8, 8, 4, 4), HALF)
    try:
        dispatch.set_choice("*=emulated")
        skip_product(**k)
        dispatch.set_choice("skip_product=emulated")
        with pytest.raises(BackendError, match="no such backend"):
            skip_product(**k)
    finally:
        dispatch.set_choice(None)


@pytest.mark.parametrize("choice", ["*=triton", "skip_product=triton"])
def test_single_precision_is_the_librarys_whatever_was_chosen(choice: str) -> None:
    """A run that trains in half precision samples in single precision, with the same --kernels."""
    need("triton", "cpu")
    k = arguments((1, 8, 8, 8, 4, 4), torch.float32)
    want = skip_product(**k)
    try:
        dispatch.set_choice(choice)
        assert torch.equal(skip_product(**k), want)
    finally:
        dispatch.set_choice(None)


def test_single_precision_compiles_where_triton_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the choice does not fall back, which would warn, and break the graph."""
    monkeypatch.setattr(OP, "candidates", lambda device: ["triton", "reference"])
    k = arguments((1, 8, 8, 8, 4, 4), torch.float32)
    want = skip_product(**k, backend="reference")
    compiled = torch.compile(lambda **given: skip_product(**given), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**k), want)


def test_opcheck() -> None:
    k = arguments((2, 8, 8, 16, 3, 3), HALF)
    torch.library.opcheck(
        forward_op, (*(k[name] for name in ("a", "weight", "x", "other", "bias", "skip_bias")), 0.7, "reference")
    )
