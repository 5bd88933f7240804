"""The CUDA kernels of group_norm_silu and residual_group_norm_silu, called at their launchers, against fp64 autograd.

The very .cu files run on the CPU through the emulator; with a GPU and the built extension the same cases run there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from ect_kernels import native, philox
from ect_kernels.group_norm_silu import group_norm_silu
from torch import Tensor
from torch.nn.functional import silu

from tests.kernels.conftest import load_emulated

BACKENDS = ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
EPS, SEED, LAYER, N0 = 1e-6, -(2**40) - 7, 3, 5


@dataclass(frozen=True)
class Case:
    """Sizes and options; c2 > 0 or residual: the second op."""

    n: int
    hw: tuple[int, int]
    c: int
    groups: int
    dtype: torch.dtype = torch.float32
    p: float = 0.2
    act: bool = True
    v: bool = False
    adaptive: bool = False
    residual: bool = False
    bias: bool = True
    skip: bool = True
    c2: int = 0
    mean: float = 0.0
    offset: int = 0  # elements between an aligned address and x: odd ones forbid vectors

    def __str__(self) -> str:
        name = f"{self.n}x{self.hw[0]}x{self.hw[1]}x{self.c}+{self.c2}g{self.groups}-{str(self.dtype)[6:]}-p{self.p}"
        flags = ("act", "v", "adaptive", "residual", "bias", "skip", "mean", "offset")
        return name + "".join(f"-{flag}" for flag in flags if getattr(self, flag))


def inputs(case: Case) -> dict[str, Tensor]:
    """Seeded tensors: images NHWC in the case's dtype, vectors fp32."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def image(c: int, shift: float = 0.0) -> Tensor:
        flat = torch.empty(case.n * case.hw[0] * case.hw[1] * c + case.offset, dtype=case.dtype)[case.offset :]
        return flat.view(case.n, *case.hw, c).copy_(normal(case.n, *case.hw, c) + shift)

    everything = case.c + case.c2
    out = {"gamma": 1 + 0.3 * normal(everything), "beta": 0.3 * normal(everything), "dy": image(everything)}
    out["x"] = image(case.c, case.mean)
    if case.residual:
        out["dx"] = image(case.c)
        if case.skip:
            out["skip"] = image(case.c)
        if case.bias:
            out["bias"], out["skip_bias"] = normal(case.c), normal(case.c)
        if case.c2:
            out["other"] = image(case.c2, case.mean)
    if case.v:
        out["v"] = normal(case.n, case.c)
    if case.adaptive:
        out["scale"], out["shift"] = 0.3 * normal(case.n, case.c), normal(case.n, case.c)
    return out


SCALE = 0.5**0.5


def formula(case: Case, args: dict[str, Tensor], compute: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients by autograd, computed in `compute`, rounded to the inputs' dtypes unless it is float64."""
    wide = compute == torch.float64
    leaves = {k: (a.to(compute) if wide else a).clone().requires_grad_(k not in ("dy", "dx")) for k, a in args.items()}
    t = {k: a.to(compute) for k, a in leaves.items()}
    x = t["x"]
    results = {}
    if case.residual:
        for name in ("bias", "skip_bias", "skip"):
            x = x + t[name] if name in t else x
        x = x * SCALE
        # The norm sees the rounded x, whose rounding has gradient 1.
        x = x if wide else x + (x.to(case.dtype).to(compute) - x).detach()
        results["x"] = x
        source = torch.cat([x, t["other"]], -1) if "other" in t else x
    else:
        source = x + t["v"][:, None, None] if "v" in t else x
    n, h, w, c = source.shape
    grouped = source.reshape(n, h * w, case.groups, -1)
    mean = grouped.mean((1, 3), keepdim=True)
    var = (grouped - mean).square().mean((1, 3), keepdim=True)
    rstd = (var + EPS).rsqrt()
    z = ((grouped - mean) * rstd).reshape(n, h, w, c) * t["gamma"] + t["beta"]
    if "scale" in t:
        z = z * (1 + t["scale"][:, None, None]) + t["shift"][:, None, None]
    y = silu(z) if case.act else z
    if case.p:
        y = philox.dropout(y.permute(0, 3, 1, 2), case.p, SEED, LAYER, N0).permute(0, 2, 3, 1)
    results |= {"y": y, "mean": mean.flatten(1), "rstd": rstd.flatten(1)}
    total = (y * t["dy"]).sum() + ((x * t["dx"]).sum() if case.residual else 0)
    names = [k for k in leaves if k not in ("dy", "dx")]
    grads = torch.autograd.grad(total, [leaves[k] for k in names])
    results = {k: a.detach() for k, a in results.items()}
    if not wide:
        results |= {k: results[k].to(case.dtype) for k in ("x", "y") if k in results}
    return results | {f"d{k}": g for k, g in zip(names, grads, strict=True)}


def launch(case: Case, args: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """The same results from the kernels. Every output starts as NaN, so that an unwritten element shows."""
    device = "cuda" if backend == "cuda" else "cpu"
    if case.offset:
        moved = {k: torch.empty(a.numel() + 16, dtype=a.dtype, device=device) for k, a in args.items()}
        a = {k: moved[k][case.offset : case.offset + v.numel()].view(v.shape).copy_(v) for k, v in args.items()}
    else:
        a = {k: v.to(device) for k, v in args.items()}

    def out(like: str | None, *shape: int) -> Tensor | None:
        if like is not None and like not in a:
            return None
        ref = a[like] if like else a["gamma"]
        return torch.full(shape or ref.shape, torch.nan, dtype=ref.dtype, device=device)

    c = case.c + case.c2
    random = [torch.tensor(SEED, device=device) if case.p else None, torch.tensor(N0, device=device)]
    threshold = round(65536 * case.p)
    inv_keep = 65536 / (65536 - threshold)
    hw = case.hw[0] * case.hw[1]
    y, mean, rstd = out("dy"), out(None, case.n, case.groups), out(None, case.n, case.groups)
    grads = {"dx": out("x")}
    rows = out(None, 3 if case.residual else 2, case.n, c)  # gradients of gamma, beta and the bias by sample
    assert rows is not None
    dtype = native.DTYPES[case.dtype]
    tail = (case.groups, dtype, case.act, threshold, LAYER)
    if not case.residual:
        vectors = [a.get(k) for k in ("gamma", "beta", "v", "scale", "shift")]
        native.launch(
            backend, "group_norm_silu_fwd", a["x"], *vectors, *random, y, mean, rstd, case.n, hw, c, *tail, c, c, EPS, inv_keep,
        )  # fmt: skip
        grads |= {f"d{k}": out(k) for k in ("v", "scale", "shift")}
        native.launch(
            backend, "group_norm_silu_bwd", a["dy"], a["x"], *vectors, *random, mean, rstd, *grads.values(), rows,
            case.n, hw, c, *tail, c, c, inv_keep,
        )  # fmt: skip
        results = {"y": y, "mean": mean, "rstd": rstd, **grads, "dgamma": rows[0].sum(0), "dbeta": rows[1].sum(0)}
        return {k: v for k, v in results.items() if v is not None}
    x = out("x")
    native.launch(
        backend, "residual_group_norm_silu_fwd", *(a.get(k) for k in ("x", "bias", "skip", "skip_bias", "other")),
        a["gamma"], a["beta"], *random, x, y, mean, rstd, case.n, hw, case.c, case.c2, dtype, *tail, SCALE, EPS, inv_keep,
    )  # fmt: skip
    grads |= {"dother": out("other")}
    native.launch(
        backend, "residual_group_norm_silu_bwd", a["dy"], a["dx"], None, x, a.get("other"), a["gamma"], a["beta"], *random,
        mean, rstd, *grads.values(), rows, case.n, hw, case.c, case.c2, dtype, *tail, SCALE, inv_keep,
    )  # fmt: skip
    sums = {"dgamma": rows[0].sum(0), "dbeta": rows[1].sum(0), "dbias": rows[2, :, : case.c].sum(0)}
    results = {"x": x, "y": y, "mean": mean, "rstd": rstd, **grads, **sums}
    return {k: v for k, v in results.items() if v is not None and (k != "dbias" or "bias" in a)}


def check(case: Case, backend: str) -> None:
    """Every tensor within 2 x the error of plain PyTorch + 4 eps of its dtype."""
    args = inputs(case)
    truth, plain = formula(case, args, torch.float64), formula(case, args, torch.float32)
    worst = (0.0, "")
    for name, got in launch(case, args, backend).items():
        want = truth[name]
        error = float((got.cpu().double() - want).abs().nan_to_num(nan=torch.inf).max())
        bar = 2 * float((plain[name].double() - want).abs().max())
        # An average is as exact as the numbers it averages, not as its own size.
        size = want.abs() + 1 / truth["rstd"] if name == "mean" else want.abs()
        bar += 4 * torch.finfo(got.dtype).eps * float(size.max())
        assert error <= bar, f"{case}: {name} error {error:.3g}, bar {bar:.3g}"
        worst = max(worst, (error / max(bar, 1e-30), name))
    print(f"{case} [{backend}]: worst error {worst[0]:.2f} of the bar, of {worst[1]}")


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "emulated":
        load_emulated("group_norm_silu")
        load_emulated("residual_group_norm_silu")
    elif not torch.cuda.is_available() or native.why_not_built(torch.device("cuda")):
        pytest.skip("no GPU, or the extension was not built for it")
    return str(request.param)


HALF, BF16 = torch.float16, torch.bfloat16
SIZES = [
    Case(1, (8, 8), 256, 32, BF16, v=True),
    Case(2, (8, 8), 512, 32, HALF),
    Case(1, (16, 16), 128, 32, HALF, v=True),
    Case(1, (16, 16), 128, 32, BF16, p=0.0),
    Case(1, (16, 16), 384, 32, BF16),
    Case(1, (8, 8), 256, 32, torch.float32, v=True),
    Case(1, (8, 8), 256, 32, BF16, p=0.0, act=False),
    Case(1, (32, 32), 48, 4, HALF, v=True),  # 12 channels a group: the backward reads twice
    Case(1, (32, 32), 16, 1, torch.float32, p=0.0),  # 64 KiB of floats: the backward reads twice
    Case(2, (8, 8), 192, 32, HALF, adaptive=True),  # ADM: 6 channels a group
    Case(1, (4, 4), 48, 1, BF16, adaptive=True, v=True, act=False),
    Case(3, (3, 5), 7, 7, torch.float32, v=True),
    Case(2, (5, 3), 30, 3, HALF, adaptive=True),
    Case(1, (1, 1), 20, 5, BF16),
    Case(2, (3, 3), 300, 1, torch.float32),  # more channels than threads, one group
    Case(1, (2, 2), 2400, 1, HALF),  # a slab of several rounds of columns
    Case(2, (4, 4), 32, 8, HALF, v=True, offset=1),  # sizes allow vectors, addresses do not
    Case(2, (4, 4), 24, 3, torch.float32, mean=1000.0, v=True),
    Case(1, (8, 8), 64, 8, HALF, mean=1000.0, p=0.0),
    Case(1, (8, 8), 128, 32, BF16, mean=1000.0, p=0.0, act=False),
    Case(1, (8, 8), 384, 32, BF16, mean=1000.0, p=0.0),
]
RESIDUAL = [
    Case(1, (8, 8), 256, 32, BF16, residual=True),
    Case(1, (16, 16), 256, 32, HALF, p=0.0, residual=True),
    Case(1, (8, 8), 256, 32, BF16, residual=True, c2=128),  # groups of 12, one of them in both sources
    Case(1, (8, 8), 256, 32, torch.float32, residual=True, c2=256),
    Case(1, (32, 32), 16, 2, HALF, residual=True, c2=8),
    Case(1, (32, 32), 32, 1, BF16, residual=True, c2=16, bias=False),  # nothing stays on chip
    Case(2, (3, 3), 7, 2, torch.float32, residual=True, c2=3),
    Case(2, (3, 5), 16, 3, HALF, residual=True, c2=5, skip=False),
    Case(2, (4, 4), 24, 2, BF16, residual=True, bias=False, skip=False, act=False, p=0.0),
    Case(2, (4, 4), 16, 2, HALF, residual=True, c2=16, offset=3),
    Case(1, (8, 8), 64, 8, HALF, residual=True, c2=32, mean=1000.0, p=0.0, act=False),
]


@pytest.mark.parametrize("case", SIZES + RESIDUAL, ids=str)
def test_against_fp64(case: Case, backend: str) -> None:
    check(case, backend)


@contextmanager
def order(name: str) -> Iterator[None]:
    before = os.environ.get("CUDA_HOST_ORDER")
    os.environ["CUDA_HOST_ORDER"] = name
    try:
        yield
    finally:
        os.environ.pop("CUDA_HOST_ORDER")
        if before is not None:
            os.environ["CUDA_HOST_ORDER"] = before


@pytest.mark.parametrize("case", [SIZES[0], SIZES[7], SIZES[12], RESIDUAL[2], RESIDUAL[5], RESIDUAL[7]], ids=str)
def test_equal_bits_in_any_order(case: Case, backend: str) -> None:
    args = inputs(case)
    first = launch(case, args, backend)
    for name in ("fwd", "rev", "rand:1", "rand:2"):
        with order(name):
            for key, value in launch(case, args, backend).items():
                assert torch.equal(value, first[key]), f"{key} differs in order {name}"


def test_zero_variance(backend: str) -> None:
    case = Case(1, (4, 4), 32, 8, p=0.0)
    args = inputs(case)
    args["x"] = torch.full_like(args["x"], 3.0)
    truth = formula(case, args, torch.float64)
    got = launch(case, args, backend)
    assert torch.equal(got["mean"].cpu(), torch.full((1, 8), 3.0))
    torch.testing.assert_close(got["y"].cpu().double(), truth["y"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got["dx"].cpu().double(), truth["dx"], rtol=1e-4, atol=1e-3)  # rstd is 1000 here


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_input_spoils_its_group_alone(backend: str, bad: float) -> None:
    case = Case(2, (4, 4), 32, 4, HALF, p=0.0)
    args = inputs(case)
    args["x"][1, 2, 3, 9] = bad
    got = launch(case, args, backend)
    expected = torch.zeros(2, 4, 4, 32, dtype=torch.bool)
    expected[1, ..., 8:16] = True
    assert torch.equal(got["y"].isnan().cpu(), expected)
    assert torch.equal(got["dx"].isnan().cpu(), expected)
    assert torch.equal(got["dgamma"].isnan().cpu(), expected[1, 0, 0])


def test_empty_batch_gives_zero_gradients(backend: str) -> None:
    for case in (Case(0, (4, 4), 16, 2), Case(0, (4, 4), 16, 2, residual=True)):
        got = launch(case, inputs(case), backend)
        assert got["dgamma"].eq(0).all() and got["dbeta"].eq(0).all()
        assert not case.residual or got["dbias"].eq(0).all()


def test_a_sample_does_not_depend_on_its_batch(backend: str) -> None:
    case = Case(3, (4, 4), 32, 4, HALF, p=0.5)
    args = inputs(case)
    whole = launch(case, args, backend)
    alone = launch(replace(case, n=1), {k: a[:1] if k in ("x", "dy") else a for k, a in args.items()}, backend)
    for name in ("y", "dx"):
        assert torch.equal(whole[name][:1], alone[name])


REFUSED = [(1, 4, 30, 4), (1, 0, 32, 4), (1, 4, 32, 0), (-1, 4, 32, 4), (1, 2**30, 32, 4), (1, 4, 8200, 2)]


@pytest.mark.parametrize("sizes", REFUSED)
def test_refuses_sizes(backend: str, sizes: tuple[int, ...]) -> None:
    n, hw, c, groups = sizes
    with pytest.raises(RuntimeError):
        native.launch(backend, "group_norm_silu_fwd", *[None] * 11, n, hw, c, groups, 0, 1, 0, 0, c, c, EPS, 1.0)


def test_refuses_an_unknown_dtype(backend: str) -> None:
    with pytest.raises(RuntimeError):
        native.launch(backend, "group_norm_silu_fwd", *[None] * 11, 1, 4, 32, 4, 9, 1, 0, 0, 32, 32, EPS, 1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_group_that_does_not_vary_has_no_gradient(dtype: torch.dtype) -> None:
    """There rstd is a thousand, and the terms that cancel in dx are far beyond what half precision holds."""
    load_emulated("group_norm_silu")
    x = torch.full((1, 32, 8, 8), 0.5, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = group_norm_silu(x, torch.ones(32), torch.zeros(32), 4, 1e-6, act=False, backend="emulated")
    (dx,) = torch.autograd.grad(y, x, torch.full_like(y, 100.0))
    assert (dx == 0).all()
