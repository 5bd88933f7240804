"""residual_group_norm_silu: every backend against fp64, the fp64 reference against plain PyTorch, and the op's contract."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ect_kernels import philox
from ect_kernels.dispatch import BackendError
from ect_kernels.residual_group_norm_silu import OP, backward_op, forward_op, residual_group_norm_silu
from ect_kernels.testing.truth import Case, check, run
from torch import Tensor

from tests.kernels import conftest

torch.set_num_threads(1)
GRADS = ("a", "gamma", "beta", "bias", "skip", "skip_bias", "other")
TARGETS = [
    ("triton", "cpu"),
    ("native", "cpu"),
    ("emulated", "cpu"),
    pytest.param("triton", "cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", "cuda", marks=pytest.mark.gpu),
]
each_target = pytest.mark.parametrize(("backend", "device"), TARGETS)


need = functools.partial(conftest.need, OP)


def inputs(
    c: int, c2: int, groups: int, h: int, w: int, n: int = 2, dtype: torch.dtype = torch.float32, **changes: Any
) -> Callable[[torch.device], dict[str, Any]]:
    """Keyword arguments of the op on a device; `changes` override (a function gets the default value)."""

    def make(device: torch.device) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def image(channels: int) -> Tensor:
            return normal(n, channels, h, w).to(dtype).to(memory_format=torch.channels_last)

        kwargs: dict[str, Any] = {"a": image(c), "gamma": 1 + 0.2 * normal(c + c2), "beta": 0.2 * normal(c + c2)}
        kwargs |= {"groups": groups, "eps": 1e-6, "bias": normal(c), "skip": image(c), "skip_bias": normal(c)}
        kwargs |= {
            "skip_scale": 0.5**0.5,
            "other": image(c2) if c2 else None,
            "p": 0.2,
            "seed": torch.tensor(2**40 + 7),
        }
        kwargs |= {"layer": 5, "n0": 3}
        for name, value in changes.items():
            kwargs[name] = value(kwargs[name]) if callable(value) else value
        kwargs["dtype"] = kwargs.pop("dtype_of_x", None)
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in kwargs.items()}

    return make


def case(name: str, *shape: int, **options: Any) -> Case:
    return Case(name, inputs(*shape, **options), GRADS)


def one(value: float, at: tuple[int, ...] = (0, 3, 1, 1)) -> Callable[[Tensor], Tensor]:
    def change(a: Tensor) -> Tensor:
        a[at] = value
        return a

    return change


HALF, BF16 = torch.float16, torch.bfloat16
NOTHING: dict[str, Any] = dict(bias=None, skip=None, skip_bias=None, skip_scale=1.0)  # x is a itself
CASES = [
    case("C 128, groups of 4, half", 128, 0, 32, 4, 4, dtype=HALF),
    case("C 256, groups of 8, no dropout, no skip", 256, 0, 32, 4, 4, n=1, p=0.0, skip=None, skip_scale=1.0),
    case("256+256, groups of 16, half", 256, 256, 32, 8, 8, n=1, dtype=HALF),
    case("256+128, straddling group", 256, 128, 32, 4, 4),
    case("256+128, straddling group, half", 256, 128, 32, 4, 4, dtype=HALF, p=0.0),
    case("128+256, straddling group, half", 128, 256, 32, 4, 4, n=1, dtype=HALF),
    case("several chunks of rows, half", 64, 64, 8, 12, 12, dtype=HALF),
    case("16+0, no activation, only a", 16, 0, 4, 3, 3, act=False, bias=None, skip=None, skip_bias=None, p=0.0),
    case("12+3, groups of 3, nothing aligned", 12, 3, 5, 7, 5),
    case("24+24, groups of 6", 24, 24, 8, 5, 3, dtype=HALF),
    case("54+18, groups of 18, one pixel", 54, 18, 4, 1, 1),
    case("far sample", 16, 8, 8, 4, 4, n0=2**34 + 1),
    case("far sample, nothing aligned", 12, 3, 5, 3, 3, n0=2**34 + 1),
    case("one group", 40, 0, 1, 2, 2, n=3),
    case(
        "mean 1000 times the deviation", 32, 16, 8, 8, 8, a=lambda a: a + 1000, other=lambda o: o + 1000, skip_scale=1.0
    ),
    case("no variance", 16, 8, 8, 4, 4, a=torch.ones_like, other=torch.ones_like, bias=None, skip=None, skip_bias=None),
    case("vectors in half precision", 32, 0, 8, 3, 4, dtype=HALF, gamma=Tensor.half, bias=Tensor.half),
    case("nothing to sum, half", 64, 32, 8, 4, 4, dtype=HALF, **NOTHING),
    case("nothing to sum, several chunks of rows", 64, 64, 8, 12, 12, dtype=HALF, **NOTHING),
    case("nothing to sum, nothing aligned", 12, 3, 5, 7, 5, **NOTHING),
    case("NaN", 32, 0, 8, 4, 4, a=one(float("nan"))),
    case("inf in other", 16, 16, 8, 4, 4, other=one(float("inf"))),
]
BF16_CASES = [
    case("C 128, groups of 4", 128, 0, 32, 4, 4, dtype=BF16),
    case("256+128, straddling group", 256, 128, 32, 4, 4, dtype=BF16),
    case("256+256, no dropout", 256, 256, 32, 8, 8, n=1, dtype=BF16, p=0.0),
    case("12+3, nothing aligned", 12, 3, 5, 7, 5, dtype=BF16),
]


def report(backend: str, tested: Case, device: torch.device) -> None:
    rows = check(residual_group_norm_silu, backend, tested, device)
    worst = max(rows, key=lambda r: r.error / r.bar if r.bar else 0.0)
    print(f"{backend} on {tested}: worst is {worst.tensor}, error {worst.error:.2e}, bar {worst.bar:.2e}")


@each_target
@pytest.mark.parametrize("tested", CASES, ids=str)
def test_matches_fp64(backend: str, device: str, tested: Case) -> None:
    report(backend, tested, need(backend, device))


@pytest.mark.parametrize(("backend", "device"), TARGETS[1:])
@pytest.mark.parametrize("tested", BF16_CASES, ids=str)
def test_matches_fp64_in_bfloat16(backend: str, device: str, tested: Case) -> None:
    report(backend, tested, need(backend, device))


def plain(**k: Any) -> tuple[Tensor, Tensor]:
    """The formula in PyTorch's own words, differentiated by autograd."""
    x = k["a"]
    for name in ("bias", "skip_bias"):
        x = x if k[name] is None else x + k[name][:, None, None]
    x = (x if k["skip"] is None else x + k["skip"]) * k["skip_scale"]
    source = x if k["other"] is None else torch.cat([x, k["other"]], dim=1)
    y = F.group_norm(source, k["groups"], k["gamma"], k["beta"], k["eps"])
    y = F.silu(y) if k.get("act", True) else y
    return x, philox.dropout(y, k["p"], k["seed"], k["layer"], k["n0"])


@pytest.mark.parametrize("tested", [*CASES[6:12], CASES[3]], ids=str)
def test_reference_is_the_formula(tested: Case) -> None:
    kwargs = tested.make(torch.device("cpu"))
    want = run(plain, kwargs, GRADS, torch.float64)
    got = run(residual_group_norm_silu, kwargs, GRADS, torch.float64)
    assert want.keys() == got.keys() and len(want) >= 5
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-9, msg=name)


@each_target
def test_statistics_are_of_the_rounded_x(backend: str, device: str) -> None:
    k = inputs(16, 8, 8, 2, 2, dtype=HALF)(need(backend, device))
    seam = (k["bias"], k["skip"], k["skip_bias"], k["skip_scale"], k["other"], HALF)
    vectors = (k["gamma"], k["beta"], *[None] * 5)
    x, _, mean, rstd = forward_op(*seam, k["a"], *vectors, 8, 1e-6, True, 0.0, 0, backend)
    groups = torch.cat([x, k["other"]], dim=1).double().reshape(2, 8, -1)
    torch.testing.assert_close(mean.double(), groups.mean(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(rstd.double(), groups.var(2, correction=0).add(1e-6).rsqrt(), rtol=1e-6, atol=0)


@each_target
def test_deterministic(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal bits in two runs; the emulator also turns the order of blocks and threads around."""
    kwargs = inputs(48, 16, 8, 9, 9, dtype=HALF)(need(backend, device))
    results = []
    for order in ("fwd", "fwd", "rev", "rand:1") if backend == "emulated" else ("fwd", "fwd"):
        monkeypatch.setenv("CUDA_HOST_ORDER", order)
        results.append(run(lambda **k: residual_group_norm_silu(**k, backend=backend), kwargs, GRADS))
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


@each_target
def test_samples_do_not_depend_on_their_batch(backend: str, device: str) -> None:
    """Mask and result follow from the global index n0 + n."""
    kwargs = inputs(32, 16, 8, 5, 5, n=4)(need(backend, device))
    whole = residual_group_norm_silu(**kwargs, backend=backend)
    part = {name: kwargs[name][2:] for name in ("a", "skip", "other")} | {"n0": kwargs["n0"] + 2}
    for one_way, other_way in zip(whole, residual_group_norm_silu(**(kwargs | part), backend=backend), strict=True):
        assert torch.equal(one_way[2:], other_way)
    dropped = (whole[1] == 0).float().mean().item()
    assert 0.15 < dropped < 0.25


@pytest.mark.parametrize(("backend", "device"), [("reference", "cpu"), *TARGETS])
def test_one_output_alone(backend: str, device: str) -> None:
    """The gradient of x alone, or of y alone, is that of both with zeros for the other."""
    kwargs = inputs(16, 8, 8, 4, 4)(need(backend, device))
    kwargs |= {name: kwargs[name].requires_grad_() for name in GRADS}
    outputs = residual_group_norm_silu(**kwargs, backend=backend)
    generator = torch.Generator().manual_seed(2)
    cotangents = [torch.randn(out.shape, generator=generator).to(out.device) for out in outputs]
    leaves = [kwargs[name] for name in GRADS]

    def grads(*used: int) -> list[Tensor | None]:
        chosen = [outputs[i] for i in used], leaves, [cotangents[i] for i in used]
        return list(torch.autograd.grad(*chosen, retain_graph=True, allow_unused=True))

    for name, both, first, second in zip(GRADS, grads(0, 1), grads(0), grads(1), strict=True):
        torch.testing.assert_close(first + second, both, rtol=1e-5, atol=1e-5, msg=name)
    assert torch.equal(grads(0)[0], kwargs["skip_scale"] * cotangents[0])


def into(*changes: Any) -> dict[str, Any]:
    """Options of a case whose named tensors have the dtype that comes last, and x the one of the other images."""
    *names, dtype = changes
    other = torch.float32 if dtype == HALF else HALF
    return {**dict.fromkeys(names, lambda t: t.to(dtype)), "dtype_of_x": other}


JOINED = [
    case("two sources, straddling group, half", 256, 128, 32, 4, 4, dtype=HALF),
    case("two sources, nothing aligned", 12, 3, 5, 7, 5),
    case("two sources, several chunks of rows", 64, 64, 8, 12, 12),
    case("one source, half", 32, 0, 8, 5, 4, dtype=HALF),
    case("half a, fp32 x", 32, 0, 8, 5, 4, **into("a", "skip", HALF)),
    case("half a, fp32 x, two sources, nothing aligned", 12, 3, 5, 7, 5, **into("a", "skip", HALF)),
    case("fp32 a, half x", 128, 64, 32, 4, 4, dtype=HALF, **into("a", "skip", torch.float32)),
]


@pytest.mark.parametrize(("backend", "device"), [("reference", "cpu"), *TARGETS])
@pytest.mark.parametrize("tested", JOINED, ids=str)
def test_gradient_of_the_joined_sources(backend: str, device: str, tested: Case) -> None:
    """`joined` stands for cat(x, other): with a gradient of its own the inputs get those of the formula."""
    kwargs = tested.make(need(backend, device))
    wanted = [name for name in GRADS if kwargs[name] is not None]

    def gradients(function: Callable[..., Any], dtype: torch.dtype | None) -> list[Tensor]:
        k = {
            n: v.to(dtype) if dtype and isinstance(v, Tensor) and v.is_floating_point() else v
            for n, v in kwargs.items()
        }
        k |= {name: k[name].detach().requires_grad_() for name in wanted}
        generator = torch.Generator().manual_seed(2)
        outputs = function(**k)
        cotangents = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
        return list(torch.autograd.grad(outputs, [k[name] for name in wanted], cotangents))

    def formula(**k: Any) -> tuple[Tensor, ...]:
        x, y = plain(**k)
        return x, y, x.clone() if k["other"] is None else torch.cat([x, k["other"]], dim=1)

    got = gradients(functools.partial(residual_group_norm_silu, joined=True, backend=backend), None)
    bar = 2e-3 if HALF in (kwargs["a"].dtype, kwargs["dtype"]) else 1e-5
    for name, a, b in zip(wanted, got, gradients(formula, torch.float64), strict=True):
        error = float((a.double() - b).norm() / b.norm())
        print(f"{backend} on {tested}: d{name} {error:.1e}, bar {bar:.0e}")
        assert error <= bar, name


@pytest.mark.parametrize("c2", [0, 8])
def test_joined_is_the_sources_without_a_copy(c2: int) -> None:
    x, _, joined = residual_group_norm_silu(**inputs(16, c2, 8, 4, 4)(torch.device("cpu")), joined=True)
    assert joined.shape == (2, 16 + c2, 4, 4)
    if c2:
        assert joined.untyped_storage().nbytes() == x.element_size()
    else:
        assert joined.data_ptr() == x.data_ptr()


@pytest.mark.parametrize(("backend", "device"), [("reference", "cpu"), *TARGETS])
def test_layouts(backend: str, device: str) -> None:
    """NCHW inputs and gradients are converted: same bits, channels-last results."""
    kwargs = inputs(16, 8, 8, 4, 4)(need(backend, device))
    results = []
    for layout in (torch.channels_last, torch.contiguous_format):
        moved = {n: kwargs[n].contiguous(memory_format=layout).requires_grad_() for n in ("a", "skip", "other")}
        outputs = residual_group_norm_silu(**(kwargs | moved), backend=backend)
        assert all(out.is_contiguous(memory_format=torch.channels_last) for out in outputs)
        cotangents = [out.detach().contiguous(memory_format=layout) for out in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, list(moved.values()), cotangents)])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize(("backend", "device"), [("reference", "cpu"), *TARGETS])
def test_empty_batch(backend: str, device: str) -> None:
    kwargs = inputs(16, 8, 8, 4, 4, n=0)(need(backend, device))
    result = run(lambda **k: residual_group_norm_silu(**k, backend=backend), kwargs, GRADS)
    assert result["out0"].shape == (0, 16, 4, 4) and result["out1"].shape == (0, 24, 4, 4)
    assert torch.equal(result["dgamma"].cpu(), torch.zeros(24)) and torch.equal(result["dbias"].cpu(), torch.zeros(16))


def test_saves_only_inputs_of_the_norm() -> None:
    """For backward: x (an output), other, gamma, beta, mean, rstd, seed, n0. No mask, no activation of the op's own."""
    kwargs = inputs(16, 8, 8, 4, 4)(torch.device("cpu"))
    kwargs |= {name: kwargs[name].requires_grad_() for name in GRADS}
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        residual_group_norm_silu(**kwargs)
    assert sorted(saved) == sorted([(2, 16, 4, 4), (2, 8, 4, 4), (24,), (24,), (2, 8), (2, 8), (), ()])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("absent", [(), ("bias", "skip_bias"), ("skip", "other")])
def test_opcheck(absent: tuple[str, ...], backend: str) -> None:
    kwargs = inputs(16, 0 if "other" in absent else 8, 8, 4, 4)(need(backend, "cpu"))
    k = kwargs | dict.fromkeys(absent)
    seam = (k["bias"], k["skip"], k["skip_bias"], 0.5, k["other"], torch.float32)
    vectors = (k["gamma"], k["beta"], None, None, None, k["seed"], torch.tensor(3))
    rest = (8, 1e-6, True, 0.2, 5, backend)
    torch.library.opcheck(forward_op, (*seam, k["a"], *vectors, *rest))
    x, y, mean, rstd = forward_op(*seam, k["a"], *vectors, *rest)
    for djoined in (None, y.clone()):
        torch.library.opcheck(
            backward_op, (x, djoined, y, mean, rstd, 0.5, k["other"], torch.float32, x.clone(), *vectors, *rest)
        )


@pytest.mark.parametrize(("backend", "device"), [("reference", "cpu"), *TARGETS])
def test_compiles_without_a_graph_break(backend: str, device: str) -> None:
    kwargs = inputs(16, 8, 8, 4, 4)(need(backend, device))
    eager = functools.partial(residual_group_norm_silu, backend=backend)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    want, got = run(eager, kwargs, GRADS), run(compiled, kwargs, GRADS)
    assert all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 7}, "24 channels do not divide into 7 groups"),
        ({"gamma": torch.ones(16)}, r"gamma is \(16,\), expected \(24,\)"),
        ({"skip": torch.ones(2, 8, 4, 4)}, r"skip is \(2, 8, 4, 4\), expected \(2, 16, 4, 4\)"),
        ({"other": torch.ones(2, 8, 4, 4).half()}, "other is torch.float16 but x is torch.float32"),
        ({"seed": None}, "seed"),
        ({"p": 1.0}, "p < 1"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        residual_group_norm_silu(**(inputs(16, 8, 8, 4, 4)(torch.device("cpu")) | changes))


@each_target
def test_refuses_fp64_by_name(backend: str, device: str) -> None:
    kwargs = inputs(16, 8, 8, 4, 4, dtype=torch.float64)(need(backend, device))
    with pytest.raises(BackendError, match="float64"):
        residual_group_norm_silu(**kwargs, backend=backend)
