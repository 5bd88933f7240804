"""Up- and downsampling: the filter that it is, in every dtype and memory order, without a convolution of many groups."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ect.cost.trace import trace
from ect.models.layers import Conv2d, resample
from tests.golden_data import rel_l2
from tests.test_fused import VARIANTS, build, run


def by_groups(x: Tensor, taps: Tensor, up: bool, padding: int) -> Tensor:
    """The definition: each channel convolved with the outer product of the taps, at stride 2, or the transpose of that."""
    kernel = torch.outer(taps, taps).expand(x.shape[1], 1, -1, -1)
    if up:
        return F.conv_transpose2d(x, 4 * kernel, None, 2, padding, groups=x.shape[1])
    return F.conv2d(x, kernel, None, 2, padding, groups=x.shape[1])


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5, 6])
def test_two_products_are_the_filter(taps: int, channels_last: bool, up: bool) -> None:
    """Values and gradients in fp64, at sizes even and odd, with padding and without; the memory order stays."""
    order = torch.channels_last if channels_last else torch.contiguous_format
    weights = torch.rand(taps, dtype=torch.float64)  # not symmetric
    for size in ((8, 8), (7, 10)):
        for padding in {0, (taps - 1) // 2}:
            x = torch.randn(2, 3, *size, dtype=torch.float64).contiguous(memory_format=order).requires_grad_()
            want, got = by_groups(x, weights, up, padding), resample(x, weights, up, padding)
            cotangent = torch.randn_like(want)
            torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
            grads = (torch.autograd.grad(y, x, cotangent)[0] for y in (got, want))
            torch.testing.assert_close(*grads, rtol=1e-13, atol=1e-13)
            assert got.is_contiguous(memory_format=order)


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("taps", [(1, 1), (2, 2), (1, 3, 3, 1)], ids=str)
def test_a_layer_rounds_like_its_dtype_and_sums_in_fp32(taps: tuple[int, ...], dtype: torch.dtype, up: bool) -> None:
    layer = Conv2d(6, 6, 0, up=up, down=not up, resample_filter=taps)
    x = (100 + torch.randn(4, 6, 16, 16)).to(dtype).requires_grad_()  # sums of few digits would lose what differs
    y = layer(x)
    weights = torch.tensor(taps, dtype=torch.float64) / sum(taps)
    exact = x.detach().double().requires_grad_()
    want = by_groups(exact, weights, up, (len(taps) - 1) // 2)
    cotangent = torch.randn_like(y)
    roundings = 1 if len(taps) == 2 else 2  # of half precision: one after each product; else one a term as well
    bar = roundings * torch.finfo(dtype).eps * (1 if dtype.itemsize == 2 else len(taps))
    assert y.dtype == dtype and y.shape == want.shape
    torch.testing.assert_close(y.double(), want, rtol=bar / 2, atol=0)
    (got,), (grad,) = (torch.autograd.grad(*each) for each in ((y, x, cotangent), (want, exact, cotangent.double())))
    assert rel_l2(got.double(), grad) <= bar
    if up and len(taps) == 2:
        assert torch.equal(y, x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("use_ops", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_no_network_has_a_convolution_of_many_groups(name: str, use_ops: bool) -> None:
    net = build(name)
    events = [event for event in trace(lambda: run(net, use_ops)) if "convolution" in event.name]
    seen = {(event.name, event.arguments["groups"]) for event in events}
    assert seen == {("convolution", 1), ("convolution_backward", 1)}
