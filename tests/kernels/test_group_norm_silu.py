"""group_norm_silu: every backend against fp64 truth, its masks, determinism, registration, limits."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from ect_kernels import group_norm_silu as gns
from ect_kernels import native, philox
from ect_kernels.dispatch import BackendError
from ect_kernels.group_norm_silu import OP, Inputs, group_norm_silu
from ect_kernels.testing.truth import Case, check
from torch import Tensor

from tests.kernels.conftest import need

GRADS = ("x", "gamma", "beta", "v", "scale", "shift")
HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
GPU = torch.cuda.is_available()
CPU_BACKENDS = [
    pytest.param("cpu", "reference"),
    pytest.param("cpu", "native"),
    pytest.param(
        "cpu", "triton", marks=pytest.mark.skipif(GPU, reason="the interpreter is for machines without a GPU")
    ),
    pytest.param("cpu", "emulated"),
]
GPU_BACKENDS = [
    pytest.param(
        "cuda",
        name,
        marks=pytest.mark.gpu,
        id=f"cuda-{name}",
    )
    for name in ("triton", "cuda")
]
BACKENDS = [*CPU_BACKENDS, *GPU_BACKENDS]


def prepare(device: str, backend: str, dtype: torch.dtype = FP32) -> torch.device:
    return need(OP, backend, device, dtype)


def inputs(
    n: int, c: int, groups: int, h: int, w: int, dtype: torch.dtype, device: torch.device | str = "cpu", *, v: bool = False,
    modulated: bool = False, act: bool = True, p: float = 0.0, mean: float = 0.0, std: float = 1.0, v_mean: float = 0.0,
    n0: int = 3, first: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    generator = torch.Generator().manual_seed(c * h + w)

    def random(*shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale + offset).to(device)

    kwargs: dict[str, Any] = {"x": random(n, c, h, w, scale=std, offset=mean).to(dtype)}
    kwargs["x"][:, ::groups, 0, 0] += first
    kwargs["x"] = kwargs["x"].contiguous(memory_format=torch.channels_last)
    kwargs |= {"gamma": random(c, scale=0.2, offset=1), "beta": random(c, scale=0.3), "groups": groups, "eps": 1e-6}
    if v:
        kwargs["v"] = random(n, c, offset=v_mean).to(dtype)
    if modulated:
        kwargs |= {"scale": random(n, c, scale=0.3).to(dtype), "shift": random(n, c, scale=0.3).to(dtype)}
    if p > 0:
        kwargs |= {"p": p, "seed": torch.tensor(-(2**40) - 17, device=device), "layer": 33, "n0": n0}
    return kwargs | {"act": act}


def case(name: str, *shape: Any, **options: Any) -> Case:
    return Case(name, lambda device: inputs(*shape, **{"device": device, **options}), GRADS)


CASES = [
    # The real group sizes, 4, 8, 12 and 16 channels; the register-resident form at 8x8 and 16x16, the loop at 32x32.
    case("C128 G32 8x8 fp16", 2, 128, 32, 8, 8, HALF, v=True, p=0.2),
    case("C256 G32 8x8 fp32", 1, 256, 32, 8, 8, FP32, v=True, p=0.2),
    case("C384 G32 8x8 bf16", 1, 384, 32, 8, 8, BF16),
    case("C384 G32 8x8 fp16", 1, 384, 32, 8, 8, HALF, v=True, p=0.2),
    case("C512 G32 8x8 fp16 linear", 1, 512, 32, 8, 8, HALF, act=False),
    case("C128 G32 16x16 fp16", 1, 128, 32, 16, 16, HALF),
    case("C128 G32 16x16 bf16", 2, 128, 32, 16, 16, BF16, v=True, p=0.2),
    case("C32 G8 32x32 fp16", 1, 32, 8, 32, 32, HALF, v=True, p=0.2),
    case("C48 G4 32x32 fp32", 1, 48, 4, 32, 32, FP32, v=True, p=0.2),
    # ADM's: 6 channels a group, modulation; 48 channels a group; a feature map of 64x64.
    case("C192 G32 8x8 fp16 modulated", 2, 192, 32, 8, 8, HALF, modulated=True, p=0.1),
    case("C96 G2 8x8 fp32 modulated", 1, 96, 2, 8, 8, FP32, modulated=True, v=True, p=0.2),
    case("C24 G4 64x64 bf16 modulated", 1, 24, 4, 64, 64, BF16, modulated=True),
    # No multiple of anything: ragged chunks, partial slabs, groups of one, one position.
    case("C24 G2 15x20 fp32", 1, 24, 2, 15, 20, FP32, v=True, p=0.2),
    case("C144 G8 5x3 fp16", 2, 144, 8, 5, 3, HALF, v=True, p=0.2),
    case("C12 G4 5x5 fp32 modulated", 3, 12, 4, 5, 5, FP32, v=True, modulated=True, p=0.2),
    case("C7 G7 3x3 fp32 linear", 2, 7, 7, 3, 3, FP32, act=False, p=0.5),
    case("C10 G1 1x1 bf16", 2, 10, 1, 1, 1, BF16),
    # Values: mean/std = 1000, no variance.
    case("large mean fp32", 1, 64, 16, 16, 16, FP32, mean=1000.0, p=0.2),
    case("large mean fp16 linear", 1, 128, 32, 8, 8, HALF, mean=1000.0, act=False),
    case("large mean bf16", 1, 128, 32, 8, 8, BF16, v=True, mean=100.0),
    # Where a mean kept in fp32, or the difference of two of them, would cost digits: every step of its own rounding shows.
    case("mean 1000 bf16 linear", 1, 128, 32, 8, 8, BF16, mean=1000.0, act=False),
    case("mean 1000 bf16", 1, 384, 32, 8, 8, BF16, mean=1000.0),
    case("mean 1000 chunked linear", 1, 48, 1, 32, 32, FP32, mean=1000.0, act=False),
    case("mean -300 and v fp32", 2, 32, 4, 16, 1, FP32, v=True, modulated=True, mean=-300.0),
    case("mean -300 and v fp32 ragged", 2, 30, 3, 16, 1, FP32, v=True, modulated=True, mean=-300.0, act=False),
    # Little is left of a gradient in a group of two: terms rounded to the tensor's dtype on the way would be all of it.
    case("pairs fp16", 2, 32, 16, 1, 1, HALF, v=True),
    case("v of 300, one element fp16", 2, 1, 1, 1, 1, HALF, v=True, modulated=True, std=0.01, v_mean=300.0),
    case("zero variance fp32", 1, 24, 2, 15, 20, FP32, mean=0.1, std=0.0),
    case("zero variance fp16", 1, 64, 16, 8, 8, HALF, mean=37.7, std=0.0),
]  # fmt: skip


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_vectors_may_be_columns_of_a_larger_tensor_or_one_row(device: str, backend: str) -> None:
    """Same bits, values and gradients, as with vectors of their own; the kernels read them where they lie."""
    kwargs = inputs(3, 24, 6, 4, 4, FP32, prepare(device, backend), v=True, modulated=True, p=0.2)
    wide = torch.randn(3, 100, generator=torch.Generator().manual_seed(1)).to(kwargs["x"].device)
    lying = {"v": wide[:1, 2:26].expand(3, -1), "scale": wide[:, 26:50], "shift": wide[:, 60:84]}
    results = []
    for vectors in (lying, {name: vector.contiguous() for name, vector in lying.items()}):
        leaves = {name: vector.detach().requires_grad_() for name, vector in vectors.items()}
        y = group_norm_silu(**(kwargs | leaves), backend=backend)
        results.append([y, *torch.autograd.grad(y.sin().sum(), list(leaves.values()))])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
    *_, v_stride, stride = Inputs(
        kwargs["x"], kwargs["gamma"], kwargs["beta"], *lying.values(), None, 6, 0, True, 0, 0, 0
    ).vectors()
    assert (v_stride, stride) == (0, 100)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_truth(case: Case, device: str, backend: str) -> None:
    target = prepare(device, backend, case.make(torch.device("cpu"))["x"].dtype)
    for row in check(group_norm_silu, backend, case, target):
        print(f"{backend:9} {case.name:30} {row.tensor:7} error {row.error:.2e} bar {row.bar:.2e}")


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite(device: str, backend: str, bad: float) -> None:
    target = prepare(device, backend)

    def make(where: torch.device) -> dict[str, Any]:
        kwargs = inputs(2, 24, 4, 6, 6, FP32, where, v=True, p=0.2)
        kwargs["x"][0, 7, 2, 3] = bad  # spoils group 1 of sample 0 and no more
        return kwargs

    case = Case(f"{bad}", make, GRADS)
    check(group_norm_silu, backend, case, target)
    y = group_norm_silu(**make(target), backend=backend)
    assert y[0, 6:12].isnan().any()
    assert y[0, :6].isfinite().all() and y[0, 12:].isfinite().all() and y[1].isfinite().all()


def gradients(kwargs: dict[str, Any], backend: str, dy: Tensor | None = None) -> list[Tensor]:
    """y and the gradients of everything."""
    leaves = {k: kwargs[k].detach().requires_grad_() for k in GRADS if k in kwargs}
    y = group_norm_silu(**{**kwargs, **leaves}, backend=backend)
    if dy is None:
        dy = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y).to(y.dtype)
    return [y, *torch.autograd.grad(y, list(leaves.values()), dy)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_deterministic(device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs = inputs(2, 48, 8, 9, 7, HALF, prepare(device, backend, HALF), v=True, modulated=True, p=0.2)
    first = gradients(kwargs, backend)
    for order in ("fwd", "rev", "rand:1"):  # the emulator's order of blocks and threads
        monkeypatch.setenv("CUDA_HOST_ORDER", order)
        assert same(gradients(kwargs, backend), first)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_samples_are_independent(device: str, backend: str) -> None:
    """A batch equals its samples one at a time, masks included, to the bit."""
    kwargs = inputs(3, 48, 8, 9, 7, HALF, prepare(device, backend, HALF), v=True, modulated=True, p=0.2, n0=5)
    whole = group_norm_silu(**kwargs, backend=backend)
    for n in range(3):
        cut: dict[str, Any] = {k: kwargs[k][n : n + 1] for k in ("x", "v", "scale", "shift")}
        assert torch.equal(group_norm_silu(**{**kwargs, **cut, "n0": 5 + n}, backend=backend), whole[n : n + 1])


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize(("c", "groups"), [(32, 8), (24, 2), (12, 4), (9, 1)])
@pytest.mark.parametrize("n0", [0, 3, 2**34 + 1])
def test_mask_bits(device: str, backend: str, c: int, groups: int, n0: int) -> None:
    """What is dropped, forward and backward, is what philox.dropout drops, wherever the global index is."""
    target = prepare(device, backend)
    kwargs = inputs(2, c, groups, 5, 7, FP32, target, p=0.4, act=False, n0=n0)
    want = philox.dropout(torch.ones_like(kwargs["x"]), 0.4, kwargs["seed"], kwargs["layer"], n0) != 0
    assert 0.4 < want.float().mean() < 0.8
    assert torch.equal(group_norm_silu(**kwargs, backend=backend) != 0, want)
    beta = kwargs["beta"].requires_grad_()
    dy = torch.zeros_like(kwargs["x"])
    dy[1, :, 2, 3] = 1  # dbeta is then the mask of one position
    (dbeta,) = torch.autograd.grad(group_norm_silu(**kwargs, backend=backend), beta, dy)
    assert torch.equal(dbeta != 0, want[1, :, 2, 3])


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_layouts(device: str, backend: str) -> None:
    """NCHW x and NCHW gradients are taken; everything that comes out is channels-last."""
    kwargs = inputs(2, 24, 4, 5, 7, HALF, prepare(device, backend, HALF), v=True, p=0.2)
    dy = torch.randn(kwargs["x"].shape, generator=torch.Generator().manual_seed(0)).to(kwargs["x"])
    want = gradients(kwargs, backend, dy.contiguous(memory_format=torch.channels_last))
    got = gradients({**kwargs, "x": kwargs["x"].contiguous()}, backend, dy.contiguous())
    assert same(got, want)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in got[:2])


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_empty_batch(device: str, backend: str) -> None:
    kwargs = inputs(0, 24, 4, 5, 7, FP32, prepare(device, backend), v=True, modulated=True, p=0.2)
    y, dx, dgamma, dbeta, *rest = gradients(kwargs, backend)
    assert y.shape == dx.shape == (0, 24, 5, 7)
    assert [tuple(t.shape) for t in rest] == [(0, 24)] * 3
    assert torch.equal(dgamma, torch.zeros(24)) and torch.equal(dbeta, torch.zeros(24))


@pytest.mark.parametrize("options", [{}, {"v": True, "p": 0.2}, {"v": True, "modulated": True, "act": False}])
@pytest.mark.parametrize("shape", [(2, 12, 3, 4, 5), (1, 8, 2, 1, 1), (0, 12, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_opcheck(backend: str, shape: tuple[int, int, int, int, int], options: dict[str, Any]) -> None:
    prepare("cpu", backend)
    kwargs = inputs(*shape, dtype=HALF, **options)
    leaves = {k: kwargs.get(k) for k in GRADS}
    drop = (kwargs.get("seed"), torch.tensor(1) if "seed" in kwargs else None)
    rest = (*drop, kwargs["groups"], 1e-6, kwargs["act"], kwargs.get("p", 0.0), 3, backend)
    torch.library.opcheck(torch.ops.ect.group_norm_silu.default, (*leaves.values(), *rest))
    y, mean, rstd = torch.ops.ect.group_norm_silu(*leaves.values(), *rest)
    gradient = (torch.ones_like(y), mean, rstd, *leaves.values(), *rest)
    torch.library.opcheck(torch.ops.ect.group_norm_silu_bwd.default, gradient)


def test_compiles_as_one_graph() -> None:
    kwargs = inputs(2, 24, 4, 5, 7, FP32, v=True, p=0.2)
    leaves = [kwargs[name].requires_grad_() for name in ("x", "gamma", "beta", "v")]
    compiled = torch.compile(lambda: group_norm_silu(**kwargs) * 2, fullgraph=True, backend="aot_eager")
    got, want = compiled(), group_norm_silu(**kwargs) * 2
    assert torch.equal(got, want)
    assert all(map(torch.equal, *(torch.autograd.grad(y.square().sum(), leaves) for y in (got, want))))


def test_plain_pytorch() -> None:
    """The reference is GroupNorm, SiLU: torch's own, without the extras."""
    kwargs = inputs(2, 24, 4, 5, 7, FP32)
    own = torch.nn.functional.group_norm(kwargs["x"], 4, kwargs["gamma"], kwargs["beta"], 1e-6)
    torch.testing.assert_close(group_norm_silu(**kwargs), torch.nn.functional.silu(own))
    torch.testing.assert_close(group_norm_silu(**{**kwargs, "act": False}), own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 5}, "5 groups dividing C"),
        ({"x": torch.zeros(2, 24, 5)}, "expected \\[N, C, H, W\\]"),
        ({"gamma": torch.ones(23)}, "gamma is \\(23,\\), expected \\(24,\\)"),
        ({"v": torch.ones(1, 24)}, "v is \\(1, 24\\), expected \\(2, 24\\)"),
        ({"scale": torch.ones(2, 24)}, "scale and shift go together"),
        ({"p": 1.0, "seed": torch.tensor(1)}, "expected 0 <= p < 1"),
        ({"p": 0.2}, "needs a seed"),
        ({"p": 0.2, "seed": torch.tensor(1.0)}, "needs a seed, a 0-d int64 tensor"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**{**inputs(2, 24, 4, 5, 7, FP32), **change})


def test_limits() -> None:
    double = inputs(1, 8, 2, 3, 3, torch.float64)
    for backend in ("emulated", "native"):
        prepare("cpu", backend)
        with pytest.raises(BackendError, match="4097 channels a group \\(only up to 4096"):
            group_norm_silu(**inputs(1, 4097, 1, 1, 1, FP32), backend=backend)
        check(group_norm_silu, backend, case("widest group", 1, 4096, 1, 2, 1, FP32, v=True), "cpu")
        with pytest.raises(BackendError, match=f"'{backend}' cannot run: dtype torch\\.float64"):
            group_norm_silu(**double, backend=backend)
    if not GPU and native.why_no_triton(torch.device("cpu")) is None:
        with pytest.raises(BackendError, match="'triton' cannot run: dtype torch\\.float64"):
            group_norm_silu(**double, backend="triton")
        with pytest.raises(BackendError, match="2048 channels a group"):
            group_norm_silu(**inputs(1, 2048, 1, 1, 1, FP32), backend="triton")


def apex_inputs(c: int = 128, groups: int = 32, **options: Any) -> Inputs:
    kwargs = inputs(2, c, groups, 4, 4, HALF, **options)
    fields = {"p": 0.0, "layer": 0, **dict.fromkeys(("v", "scale", "shift", "seed"))}
    return Inputs(**{**fields, **kwargs, "n0": None})


@pytest.mark.parametrize(
    ("options", "reason"),
    [({}, None), ({"act": False}, None), ({"v": True}, "v, scale"), ({"modulated": True}, "v, scale"),
     ({"p": 0.2}, "dropout"), ({"c": 192}, "192 channels in 32 groups"), ({"groups": 8}, "128 channels in 8 groups")],
)  # fmt: skip
def test_apex_limits(options: dict[str, Any], reason: str | None) -> None:
    found = gns.apex_limits(apex_inputs(**options))
    assert found is None if reason is None else reason in str(found)


def test_apex_plumbing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that has apex's two functions: its saved sums come back to it, whatever they mean."""

    def fprop(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, act: str, passes: int) -> Any:
        i = Inputs(x, weight, bias, *[None] * 5, groups, eps, act == "silu", 0.0, 0)
        out = gns.reference_fwd(i)
        return out.y, torch.cat([out.rstd.flatten(), out.mean.flatten()])

    def bprop(
        dy: Tensor, sums: Tensor, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, act: str, passes: int
    ) -> Any:  # fmt: skip
        i = Inputs(x, weight, bias, *[None] * 5, groups, eps, act == "silu", 0.0, 0)
        rstd, mean = sums.view(2, -1, groups)
        dx, rows, *_ = gns.reference_bwd(gns.Saved(dy, mean, rstd), i)
        return dx, *rows.sum(1)

    module = types.SimpleNamespace(group_norm_nhwc_fprop=fprop, group_norm_nhwc_bprop=bprop)
    for name in ("apex", "apex.contrib"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "apex.contrib.group_norm", types.SimpleNamespace(group_norm=module))
    i = apex_inputs()
    out, want = gns.apex_fwd(i), gns.reference_fwd(i)
    assert torch.equal(out.y, want.y)
    dy = torch.ones_like(i.x)
    got = gns.apex_bwd(gns.Saved(dy, out.mean, out.rstd), i)
    reference = gns.reference_bwd(gns.Saved(dy, want.mean, want.rstd), i)
    assert same([got.x, got.rows.sum(1)], [reference.x, reference.rows.sum(1)])
