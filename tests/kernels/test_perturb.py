"""perturb: every backend against fp64 truth; its noise, mirroring and scaling against what the plain step does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ect_kernels import philox
from ect_kernels.dispatch import BackendError
from ect_kernels.perturb import MAX_ROW, OP, perturb
from ect_kernels.testing.truth import Case, check
from torch import Tensor

from ect.data.stream import to_float
from tests.kernels.conftest import need

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
GPU = torch.cuda.is_available()
BACKENDS = [
    pytest.param("cpu", "reference"),
    pytest.param("cpu", "native"),
    pytest.param(
        "cpu", "triton", marks=pytest.mark.skipif(GPU, reason="the interpreter is for machines without a GPU")
    ),
    pytest.param("cpu", "emulated"),
    *(pytest.param("cuda", name, marks=pytest.mark.gpu) for name in ("triton", "cuda")),
]
SEED = (1234567 << 32) | 89  # both halves of the key


def prepare(device: str, backend: str, dtype: torch.dtype = FP32) -> torch.device:
    return need(OP, backend, device, dtype)


def inputs(
    n: int, h: int, w: int, c: int, dtype: torch.dtype = FP32, device: torch.device | str = "cpu", *, flip: bool = False,
    eps: bool = False, n0: int = 3,
) -> dict[str, Any]:  # fmt: skip
    generator = torch.Generator().manual_seed(h * w + c)
    t = (torch.randn(n, generator=generator) * 2 - 1.1).exp()
    r = t * torch.rand(n, generator=generator)
    r[1::3] = 0
    given: dict[str, Any] = {
        "images": torch.randint(0, 256, (n, h, w, c), dtype=torch.uint8, generator=generator),
        "t": t, "r": r, "sigma_data": 0.5, "seed": torch.tensor(SEED), "n0": n0, "dtype": dtype,
    }  # fmt: skip
    if flip:
        given["flip"] = torch.arange(n) % 2 == 0
    if eps:
        given["eps"] = torch.randn(n, c, h, w, generator=generator)
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}


def drawn(seed: Tensor, n0: int, n: int, c: int, h: int, w: int) -> Tensor:
    """The noise in fp64 from philox's uniform bits: [n, c, h, w]."""
    u = philox.uniform(seed, philox.STREAM_EPS, n0, n, c * h * w + c * h * w % 2, seed.device).double().view(n, -1, 2)
    radius, angle = (-2 * u[..., 0].log()).sqrt(), 2 * math.pi * u[..., 1]
    both = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).view(n, -1)
    return both[:, : c * h * w].reshape(n, c, h, w)


def with_truth(**kwargs: Any) -> tuple[Tensor, ...]:
    """perturb; with fp64 levels everything is fp64, the drawn noise included."""
    if kwargs["t"].dtype == torch.float64:
        kwargs["dtype"] = torch.float64
        n, h, w, c = kwargs["images"].shape
        if kwargs.get("eps") is None:
            kwargs["eps"] = drawn(kwargs["seed"], kwargs["n0"], n, c, h, w)
    return perturb(**kwargs)


# (N, H, W, C): CIFAR's, ADM's, the digits'; more than one block with a last one that is smaller; channels and pixels that no
# four divide; one value.
SIZES = [
    (2, 32, 32, 3),
    pytest.param((1, 64, 64, 3), marks=pytest.mark.slow),
    (5, 8, 8, 1),
    (2, 40, 10, 5),
    (3, 13, 29, 3),
    (2, 3, 5, 7),
    (2, 6, 2, 9),
    (1, 1, 1, 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("dtype", [HALF, BF16, FP32], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_truth(size: tuple[int, int, int, int], dtype: torch.dtype, device: str, backend: str) -> None:
    target = prepare(device, backend, dtype)
    for options in ({}, {"flip": True}, {"flip": True, "eps": True}):
        case = Case(f"{size} {options}", lambda where, o=options: inputs(*size, dtype, where, **o))  # type: ignore[misc]
        for row in check(with_truth, backend, case, target):
            print(f"{backend:9} {case.name:45} {row.tensor} error {row.error:.2e} bar {row.bar:.2e}")


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("n0", [0, 1, 2**33 + 5])
def test_noise_is_the_plain_steps(size: tuple[int, int, int, int], n0: int, device: str, backend: str) -> None:
    """x_r - x_t at r = t - 1 is eps: the values of philox.normal, where the plain step puts them."""
    n, h, w, c = size
    kwargs = inputs(*size, device=prepare(device, backend), n0=n0)
    kwargs["images"].fill_(0)
    kwargs["t"].fill_(1.0)
    _, _, x_t, _ = perturb(**kwargs, backend=backend)
    want = philox.normal(kwargs["seed"], philox.STREAM_EPS, n0, n, c * h * w, x_t.device).view(n, c, h, w)
    torch.testing.assert_close(x_t + 1, want, atol=2e-6, rtol=0)


@pytest.mark.parametrize("flip", [False, True])
def test_reference_is_the_plain_step(flip: bool) -> None:
    """To the bit: y, eps and x_t of TrainStep, and c_in x of EDMPrecond."""
    kwargs = inputs(4, 8, 8, 3, flip=flip)
    in_t, in_r, x_t, x_r = perturb(**kwargs, backend="reference")
    y = to_float(kwargs["images"], kwargs.get("flip"))
    eps = philox.normal(kwargs["seed"], philox.STREAM_EPS, 3, 4, 192, y.device).view(y.shape)
    sigma_t, sigma_r = (kwargs[k].view(4, 1, 1, 1) for k in "tr")
    assert torch.equal(x_t, y + sigma_t * eps) and torch.equal(x_r, y + sigma_r * eps)
    assert torch.equal(in_t, 1 / (sigma_t**2 + 0.25).sqrt() * x_t)
    teacher = torch.where(sigma_r > 0, sigma_r, torch.ones_like(sigma_r))
    assert torch.equal(in_r, 1 / (teacher**2 + 0.25).sqrt() * x_r)
    assert torch.equal(x_r[1], y[1])  # r = 0


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_every_byte(device: str, backend: str) -> None:
    """y is byte / 127.5 - 1, correctly rounded, for all 256."""
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).to(prepare(device, backend))
    zero = torch.zeros(1, device=images.device)
    x_r = perturb(images, zero + 1, zero, 0.5, torch.tensor(SEED, device=images.device), backend=backend)[3]
    assert torch.equal(x_r, to_float(images))


@pytest.mark.slow
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_moments(device: str, backend: str) -> None:
    """Noise of 49,152 values: mean, variance, third and fourth moment of a normal; no correlation between neighbours."""
    kwargs = inputs(16, 32, 32, 3, device=prepare(device, backend))
    kwargs["images"].fill_(0)
    kwargs["t"].fill_(1.0)
    z = (perturb(**kwargs, backend=backend)[2] + 1).double()
    bars = [(z.mean(), 0, 1), (z.var(), 1, 2), ((z**3).mean(), 0, 15), ((z**4).mean(), 3, 96)]
    bars += [((z * z.roll(1, d)).mean(), 0, 1) for d in range(4)]
    for found, want, variance in bars:
        assert abs(float(found) - want) < 4.5 * (variance / z.numel()) ** 0.5


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_nonfinite(device: str, backend: str) -> None:
    def make(where: torch.device) -> dict[str, Any]:
        kwargs = inputs(4, 6, 6, 3, device=where)
        kwargs["t"][1], kwargs["r"][2] = math.nan, math.inf
        return kwargs

    target = prepare(device, backend)
    check(with_truth, backend, Case("nonfinite", make), target)
    in_t, in_r, x_t, x_r = perturb(**make(target), backend=backend)
    assert x_t[1].isnan().all() and in_t[1].isnan().all() and not x_r[2].isfinite().any()
    assert all(out[0].isfinite().all() and out[3].isfinite().all() for out in (in_t, in_r, x_t, x_r))


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("size", [(3, 13, 29, 3), (4, 8, 8, 1)], ids=str)
def test_deterministic_and_independent(
    size: tuple[int, int, int, int], device: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs, any order of blocks and threads, and a batch or its samples one at a time: equal bits."""
    kwargs = inputs(*size, HALF, prepare(device, backend), flip=True)
    first = perturb(**kwargs, backend=backend)
    for order in ("fwd", "rev", "rand:1"):  # the emulator's order of blocks and threads
        monkeypatch.setenv("CUDA_HOST_ORDER", order)
        assert all(map(torch.equal, perturb(**kwargs, backend=backend), first))
    for n in range(size[0]):
        one = {k: kwargs[k][n : n + 1] for k in ("images", "t", "r", "flip")}
        alone = perturb(**{**kwargs, **one, "n0": 3 + n}, backend=backend)
        assert all(torch.equal(a, b[n : n + 1]) for a, b in zip(alone, first, strict=True))


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_layouts_and_empty_batch(device: str, backend: str) -> None:
    """Strided images and NCHW eps are taken; results are channels-last."""
    kwargs = inputs(2, 6, 10, 3, HALF, prepare(device, backend), flip=True, eps=True)
    want = perturb(**kwargs, backend=backend)
    odd = {"images": kwargs["images"].permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)}
    odd["eps"] = kwargs["eps"].contiguous(memory_format=torch.channels_last)
    odd["t"] = torch.stack([kwargs["t"], kwargs["r"]], 1)[:, 0]
    got = perturb(**{**kwargs, **odd}, backend=backend)
    assert all(map(torch.equal, got, want))
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in got)
    empty = perturb(**inputs(0, 6, 10, 3, HALF, got[0].device, flip=True), backend=backend)
    assert [(tuple(out.shape), out.dtype) for out in empty] == [((0, 3, 6, 10), d) for d in (HALF, HALF, FP32, FP32)]


@pytest.mark.parametrize("options", [{}, {"flip": True}, {"flip": True, "eps": True}])
@pytest.mark.parametrize("size", [(2, 4, 6, 3), (1, 8, 8, 1), (0, 4, 6, 3)], ids=str)
def test_opcheck(size: tuple[int, int, int, int], options: dict[str, bool]) -> None:
    k = inputs(*size, HALF, **options)
    seed, n0 = (None, None) if "eps" in k else (k["seed"], torch.tensor(3))
    args = (k["images"], k["t"], k["r"], seed, k.get("flip"), k.get("eps"), n0, 0.5, HALF)
    for backend in ("reference", "native"):
        torch.library.opcheck(torch.ops.ect.perturb.default, (*args, backend))


def test_compiles_as_one_graph() -> None:
    kwargs = inputs(2, 8, 8, 1, flip=True)
    compiled = torch.compile(lambda: perturb(**kwargs)[0] * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), perturb(**kwargs)[0] * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 4, 6, 3)}, "images are torch.float32 .2, 4, 6, 3., expected uint8"),
        ({"t": torch.ones(3)}, "t is .3,., expected .2,."),
        ({"eps": torch.ones(2, 4, 6, 3)}, "eps is .2, 4, 6, 3., expected .2, 3, 4, 6."),
        ({"t": torch.ones(2, dtype=HALF)}, "t and r are torch.float16 and torch.float32"),
        ({"flip": torch.ones(2)}, "flip is torch.float32, expected bool"),
        ({"seed": None}, "needs a seed"),
        ({"seed": torch.tensor(1.0)}, "needs a seed, a 0-d int64 tensor"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perturb(**{**inputs(2, 4, 6, 3), **change})


def test_limits() -> None:
    prepare("cpu", "emulated")
    with pytest.raises(BackendError, match="'emulated' cannot run: rows of more than 8192 values"):
        perturb(**inputs(1, 1, MAX_ROW + 1, 1), backend="emulated")
    perturb(**inputs(1, 2, MAX_ROW, 1), backend="emulated")
    with pytest.raises(BackendError, match=r"with dtype torch.float64"):
        perturb(**inputs(1, 2, 2, 1, torch.float64), backend="emulated")
