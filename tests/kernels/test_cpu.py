"""What the CPU kernels are made of (csrc/cpu/cpu.hpp), in every instruction set that this machine has, and their loader."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
import torch
from ect_kernels import cpu, cpu_build, philox
from ect_kernels.testing import emulator
from torch import Tensor


@pytest.fixture(scope="module", params=cpu.instruction_sets())
def functions(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """tests/cpu/functions.cpp."""
    source = emulator.ROOT / "tests/cpu/functions.cpp"
    return ctypes.CDLL(str(emulator.build("plain", source, flags=cpu_build.flags(request.param))))


def mapped(function: Any, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    function(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(x.numel()))
    return y


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("brain", torch.bfloat16)])
def test_half_precision_is_torchs(functions: ctypes.CDLL, name: str, dtype: torch.dtype) -> None:
    """Every half widened; rounded: every half, what lies midway between two, its neighbours, and any bits at all."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    wide, want = mapped(getattr(functions, f"widen_{name}"), every), every.view(dtype).float()
    assert torch.equal(wide.isnan(), want.isnan())
    assert torch.equal(wide.view(torch.int32)[~want.isnan()], want.view(torch.int32)[~want.isnan()])
    step = 1 << (13 if dtype == torch.float16 else 16)
    some = [want.view(torch.int32) + offset for offset in (0, 1, step // 2 - 1, step // 2, step // 2 + 1)]
    some.append(torch.randint(-(2**31), 2**31, (1 << 18,), dtype=torch.int64).to(torch.int32))
    x = torch.cat(some).view(torch.float32)
    got, rounded = mapped(getattr(functions, f"round_{name}"), x, torch.uint16).view(dtype), x.to(dtype)
    assert torch.equal(got.isnan(), x.isnan())
    assert torch.equal(got.view(torch.int16)[~x.isnan()], rounded.view(torch.int16)[~x.isnan()])


def units(got: Tensor, want: Tensor) -> float:
    """The largest error of fp32 numbers, in units in the last place of fp64 ones."""
    exponent = want.abs().clamp(min=2.0**-126).log2().floor()
    return float(((got.double() - want).abs() / 2 ** (exponent - 23)).max())


def test_elementary_functions_are_right_to_the_last_places(functions: ctypes.CDLL) -> None:
    x = torch.linspace(-87, 88.7, 1_000_003)
    assert units(mapped(functions.exponentials, x), x.double().exp()) < 2
    assert units(mapped(functions.sigmoids, x), x.double().sigmoid()) < 3
    positive = torch.cat([torch.linspace(1e-6, 2, 1_000_003), torch.logspace(-37, 38, 100_003)])
    assert units(mapped(functions.logarithms, positive), positive.double().log()) < 2
    angles = torch.linspace(0, 2 * math.pi, 1_000_003)
    for name, function in (("cosines", torch.cos), ("sines", torch.sin)):
        error = (mapped(getattr(functions, name), angles).double() - function(angles.double())).abs()
        assert float(error.max()) < 1.5e-7


def test_what_is_not_finite_stays_so(functions: ctypes.CDLL) -> None:
    x = torch.tensor([-math.inf, -1e30, -104.0, 89.0, 1e30, math.inf, math.nan])
    assert mapped(functions.exponentials, x).tolist()[:6] == [0, 0, 0, math.inf, math.inf, math.inf]
    assert mapped(functions.sigmoids, x).tolist()[:6] == [0, 0, 0, 1, 1, 1]
    for function in (functions.exponentials, functions.sigmoids):
        assert mapped(function, x).isnan().tolist() == [False] * 6 + [True]


def test_random_bits_are_those_of_philox(functions: ctypes.CDLL) -> None:
    seed, first, n = (3 << 32) | 11, 2**32 - 5, 37
    got = torch.empty(4 * n, dtype=torch.int32)
    integers = [ctypes.c_int64(value) for value in (seed, first, philox.STREAM_EPS, n)]
    functions.words(*integers, ctypes.c_void_p(got.data_ptr()))
    counters = (first + torch.arange(n)) & 0xFFFFFFFF
    want = torch.stack(philox.philox4x32(seed, counters, philox.STREAM_EPS), 1).flatten()
    assert torch.equal(got.long() & 0xFFFFFFFF, want)


@pytest.mark.parametrize("start", [0, 8, 5, 8 * 2**32 - 3])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_what_philox_keeps(functions: ctypes.CDLL, start: int, p: float) -> None:
    n, layer, seed = 1001, 7, -12345
    got = torch.empty(n)
    integers = [ctypes.c_int64(value) for value in (seed, layer, start, n, philox.dropout_threshold(p))]
    functions.factors(*integers, ctypes.c_double(philox.inv_keep(p)), ctypes.c_void_p(got.data_ptr()))
    # One value a sample: the global index is the sample's number.
    want = philox.dropout(torch.ones(n, 1, 1, 1), p, seed, layer, start).flatten()
    assert torch.equal(got, want)


def test_normal_numbers_are_torchs_to_rounding(functions: ctypes.CDLL) -> None:
    words = torch.stack(philox.philox4x32(5, torch.arange(50_000), 1), 1).flatten()
    want = philox.normal(5, 1, 0, 1, len(words), torch.device("cpu")).flatten()
    words[:4] = torch.tensor([0xFFFFFFFF, 0, 0, 0xFFFFFFFF])  # u = 1, whose logarithm is 0, and the smallest
    u = ((words >> 8).float() + 0.5) * 2.0**-24
    radius = (-2 * u[0::2].log()).sqrt()
    want[:4] = torch.stack(
        [radius * (2 * math.pi * u[1::2]).cos(), radius * (2 * math.pi * u[1::2]).sin()], 1
    ).flatten()[:4]
    got = mapped(functions.normals, words.to(torch.int32))
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)


def test_sums_are_in_one_order(functions: ctypes.CDLL) -> None:
    functions.total.restype = ctypes.c_float
    for n in (0, 1, 15, 16, 17, 1000, 1003):
        x = torch.randn(n)
        got = functions.total(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(n))
        assert got == pytest.approx(float(x.double().sum()), abs=1e-4)


@pytest.mark.parametrize(("threads", "n", "size", "ranges"), [
    (1, 10, 1 << 20, 1), (4, 10, 1 << 20, 4), (4, 3, 1 << 20, 3), (4, 10, 10, 1), (0, 5, 1 << 20, 1), (4, 0, 1, 0),
    (64, 3, 1 << 16, 3), (3, 4, 1 << 15, 2),
])  # fmt: skip
def test_threads_share_out_every_item_once(
    functions: ctypes.CDLL, threads: int, n: int, size: int, ranges: int
) -> None:
    times = torch.zeros(n, dtype=torch.int64)
    integers = [ctypes.c_int64(value) for value in (threads, n, size)]
    functions.shares.restype = ctypes.c_int64
    found = functions.shares(*integers, ctypes.c_void_p(times.data_ptr()))
    assert torch.equal(times, torch.ones_like(times)) and found == max(ranges, 1)
