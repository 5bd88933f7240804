"""consistency_loss: every backend against fp64 truth and, with perturb, against the objective; gradients at the edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ect_kernels.consistency_loss import OP, consistency_loss
from ect_kernels.dispatch import BackendError
from ect_kernels.perturb import perturb
from ect_kernels.testing.truth import Case, check
from torch import Tensor, nn

from ect.models import EDMPrecond
from ect.objective import WEIGHTINGS, ConsistencyObjective
from tests.kernels.conftest import load_emulated, need

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


def prepare(device: str, backend: str, dtype: torch.dtype = FP32) -> torch.device:
    if backend == "emulated":
        load_emulated("perturb")
    return need(OP, backend, device, dtype)


def inputs(
    n: int, c: int, h: int, w: int, dtype: torch.dtype = FP32, device: torch.device | str = "cpu", *, huber: float = 0.0,
    scale: float = 1.0,
) -> dict[str, Any]:  # fmt: skip
    """Levels over the whole range of training; every third sample has no teacher, and NaN for its answer."""
    generator = torch.Generator().manual_seed(c * h + w)

    def image(kind: torch.dtype) -> Tensor:
        x = torch.randn(n, c, h, w, generator=generator) * scale
        return x.to(kind).contiguous(memory_format=torch.channels_last).to(device)

    t = (torch.randn(n, generator=generator) * 2 - 1.1).exp()
    r = t * (0.2 + 0.7 * torch.rand(n, generator=generator))
    r[1::3] = 0
    images = {"F_t": image(dtype), "F_r": image(dtype), "x_t": image(FP32), "x_r": image(FP32)}
    images["F_r"][1::3] = math.nan
    levels = {"t": t.to(device), "r": r.to(device), "weight": (1 / (t - r)).to(device)}
    return {**images, **levels, "c": huber, "sigma_data": 0.5}


# (N, C, H, W): CIFAR's, the digits', ADM's (on chip in CUDA, read twice in Triton), read twice in both; odd ones.
SIZES = [(4, 3, 32, 32), (5, 1, 8, 8), (1, 3, 64, 64), (2, 5, 64, 65), (3, 3, 5, 7), (2, 2, 1, 3), (2, 1, 1, 1)]


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("dtype", [HALF, BF16, FP32], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_truth(size: tuple[int, int, int, int], dtype: torch.dtype, device: str, backend: str) -> None:
    target = prepare(device, backend, dtype)
    for huber, scale in ((0.0, 1.0), (0.06, 1.0), (30.0, 0.1)):
        case = Case(
            f"{size} c={huber}",
            lambda where, o={"huber": huber, "scale": scale}: inputs(*size, dtype, where, **o),  # type: ignore[misc]
            ("F_t",),
        )
        for row in check(consistency_loss, backend, case, target):
            print(f"{backend:9} {case.name:24} {row.tensor:4} error {row.error:.2e} bar {row.bar:.2e}")


class Net(nn.Module):
    """A raw network F_x(x, c_noise): anything with parameters; keeps its outputs."""

    label_dim = 0

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.outputs: list[Tensor] = []

    def forward(self, x: Tensor, noise: Tensor, *rest: object) -> Tensor:
        F_x = (self.conv(x) + noise.view(-1, 1, 1, 1)).sin()
        self.outputs.append(F_x)
        return F_x


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("weighting", list(WEIGHTINGS))
@pytest.mark.parametrize("c", [0.0, 0.06])
def test_with_perturb_equals_the_objective(weighting: str, c: float, device: str, backend: str) -> None:
    """Loss, and gradients at F_t and at the parameters, of ConsistencyObjective.loss around EDMPrecond, from uint8 on."""
    target = prepare(device, backend)
    n, size, channels = 6, 8, 3
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (n, size, size, channels), dtype=torch.uint8, generator=generator).to(target)
    eps = torch.randn(n, channels, size, size, generator=generator).to(target)
    t = torch.tensor([0.02, 0.3, 1.0, 2.5, 10.0, 60.0], device=target)
    r = t * torch.tensor([0.0, 0.9, 0.5, 0.0, 0.98, 0.1], device=target)
    net = Net(channels).to(target)
    objective = ConsistencyObjective(c=c, weighting=weighting)
    y = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    want = objective.loss(EDMPrecond(net), y, t, r, eps, share_rng=False)
    dF_want, *dnet_want = torch.autograd.grad(want.sum(), [net.outputs[-1], *net.parameters()])  # the student's

    in_t, in_r, x_t, x_r = perturb(images, t, r, 0.5, None, eps=eps, backend=backend)
    F_t = net(in_t, t.log() / 4)
    with torch.no_grad():
        F_r = net(in_r, torch.where(r > 0, r, torch.ones_like(r)).log() / 4)
    weight = WEIGHTINGS[weighting](t, r, 0.5)
    got = consistency_loss(F_t, F_r, x_t, x_r, t, r, weight, c, 0.5, backend=backend)
    dF, *dnet = torch.autograd.grad(got.sum(), [F_t, *net.parameters()])
    torch.testing.assert_close(got, want, rtol=5e-6, atol=0)
    for a, b in zip([dF, *dnet], [dF_want, *dnet_want], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-6 * float(b.abs().max()))


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("c", [0.0, 0.06])
@pytest.mark.parametrize("size", [(3, 1, 8, 8), (3, 5, 64, 65)], ids=str)
def test_distance_zero(size: tuple[int, int, int, int], c: float, device: str, backend: str) -> None:
    """Loss 0 and gradient exactly 0 where student and teacher agree, and only there."""
    kwargs = inputs(*size, device=prepare(device, backend), huber=c)
    kwargs["F_r"], kwargs["x_r"], kwargs["r"] = kwargs["F_t"].clone(), kwargs["x_t"].clone(), kwargs["t"].clone()
    kwargs["F_t"][1] += 1
    kwargs["weight"].fill_(1.0)
    F_t = kwargs["F_t"].requires_grad_()
    loss = consistency_loss(**kwargs, backend=backend)
    (dF,) = torch.autograd.grad(loss.sum(), F_t)
    assert loss[0] == loss[2] == 0 and not dF[0].any() and not dF[2].any()
    assert loss[1] > 0 and dF[1].all()


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("name", ["F_t", "F_r", "x_t", "x_r", "t", "r", "weight"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_nonfinite(bad: float, name: str, device: str, backend: str) -> None:
    """What is not finite, or overflows in the sum, spoils its own sample and no other; F_r without a teacher spoils none."""
    target = prepare(device, backend)

    def make(where: torch.device) -> dict[str, Any]:
        kwargs = inputs(4, 2, 3, 5, device=where, huber=0.06)
        kwargs[name][(2, 1, 1, 3) if kwargs[name].dim() == 4 else 2] = bad
        return kwargs

    kwargs = make(target)
    F_t = kwargs["F_t"].requires_grad_()
    loss = consistency_loss(**kwargs, backend=backend)
    (dF,) = torch.autograd.grad(loss.sum(), F_t)
    others = [0, 1, 3]
    assert loss[others].isfinite().all() and dF[others].isfinite().all() and dF[others].any()
    assert name in ("t", "r", "weight") or (loss[2].isnan() and dF[2].isnan().all())
    if bad != 3e38:  # which fp64 can square
        check(consistency_loss, backend, Case(f"{name} {bad}", make, ("F_t",)), target)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("size", [(3, 3, 32, 32), (3, 3, 5, 7), (3, 5, 64, 65)], ids=str)
def test_deterministic_and_independent(
    size: tuple[int, int, int, int], device: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs, any order of blocks and threads, and a batch or its samples one at a time: equal bits."""
    kwargs = inputs(*size, HALF, prepare(device, backend), huber=0.06)

    def run(**changed: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.ect.consistency_loss(*{**kwargs, **changed}.values(), backend)  # type: ignore[no-any-return]

    first = run()
    for order in ("fwd", "rev", "rand:1"):  # the emulator's order of blocks and threads
        monkeypatch.setenv("CUDA_HOST_ORDER", order)
        assert all(map(torch.equal, run(), first))
    for n in range(size[0]):
        alone = run(**{k: v[n : n + 1] for k, v in kwargs.items() if isinstance(v, Tensor)})
        assert all(torch.equal(a, b[n : n + 1]) for a, b in zip(alone, first, strict=True))


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_layouts_and_empty_batch(device: str, backend: str) -> None:
    """NCHW images and expanded gradients are taken; dF is channels-last and in F_t's dtype."""
    kwargs = inputs(3, 2, 5, 4, HALF, prepare(device, backend))
    images = ("F_t", "F_r", "x_t", "x_r")
    upstream = torch.tensor([2.0, 0.0, -3.0], device=kwargs["t"].device)
    results = []
    for nchw in (False, True):
        given = {**kwargs, **{k: kwargs[k].contiguous() for k in images}} if nchw else dict(kwargs)
        F_t = given["F_t"] = given["F_t"].detach().requires_grad_()
        loss = consistency_loss(**given, backend=backend)
        results.append((loss, *torch.autograd.grad(loss, F_t, upstream, retain_graph=True)))
        one = torch.autograd.grad(loss.sum(), F_t)[0]
        torch.testing.assert_close(results[-1][1], one * upstream.view(3, 1, 1, 1).half(), rtol=2e-3, atol=1e-6)
    assert all(map(torch.equal, *results))
    dF = results[0][1]
    assert dF.dtype == HALF and dF.is_contiguous(memory_format=torch.channels_last)
    empty = inputs(0, 2, 5, 4, HALF, dF.device)
    F_t = empty["F_t"].requires_grad_()
    loss = consistency_loss(**empty, backend=backend)
    assert loss.shape == (0,) and torch.autograd.grad(loss.sum(), F_t)[0].shape == (0, 2, 5, 4)


@pytest.mark.parametrize("size", [(2, 3, 4, 6), (1, 1, 8, 8), (0, 3, 4, 6)], ids=str)
def test_opcheck(size: tuple[int, int, int, int]) -> None:
    kwargs = inputs(*size, HALF, huber=0.06)
    kwargs["F_r"].nan_to_num_()  # opcheck compares results by value
    for backend in ("reference", "native"):
        torch.library.opcheck(torch.ops.ect.consistency_loss.default, (*kwargs.values(), backend))
    dF = torch.ops.ect.consistency_loss(*kwargs.values(), "reference")[1]
    torch.library.opcheck(torch.ops.ect.consistency_loss_bwd.default, (dF, torch.ones(size[0])))


@pytest.mark.slow
def test_compiles_as_one_graph() -> None:
    kwargs = inputs(2, 1, 8, 8)
    kwargs["F_t"].requires_grad_()
    compiled = torch.compile(lambda: consistency_loss(**kwargs) * 2, fullgraph=True, backend="aot_eager")
    got, want = compiled(), consistency_loss(**kwargs) * 2
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(x.sum(), kwargs["F_t"])[0] for x in (got, want)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"F_t": torch.zeros(2, 3, 4)}, "F_t is .2, 3, 4., expected .N, C, H, W"),
        ({"x_r": torch.zeros(2, 3, 6, 4)}, "x_r is .2, 3, 6, 4., expected .2, 3, 4, 6."),
        ({"weight": torch.zeros(2, 1)}, "weight is .2, 1., expected .2,."),
        ({"c": -0.1}, "c is -0.1, expected 0 or more"),
        ({"c": math.nan}, "c is nan"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        consistency_loss(**{**inputs(2, 3, 4, 6), **change})


def test_limits() -> None:
    prepare("cpu", "emulated")
    with pytest.raises(BackendError, match=r"'emulated' cannot run: dtype torch.float64"):
        consistency_loss(**inputs(1, 1, 2, 2, torch.float64), backend="emulated")
