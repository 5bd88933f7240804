"""radam_ema in every written form against nan-guard, clip, torch.optim and lerp in fp64, and its rules for bad gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from ect_kernels import dispatch
from ect_kernels.radam_ema import F64, I64, OP, new_state, radam_ema, reference
from torch import Tensor

from ect.cost.trace import trace
from tests.kernels.conftest import load_emulated, need

INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
HERE = [
    pytest.param(("cpu", "reference"), id="reference"),
    pytest.param(("cpu", "native"), id="native"),
    pytest.param(("cpu", "triton"), id="triton", marks=INTERPRETED),
    pytest.param(("cpu", "emulated"), id="emulated"),
]
THERE = [
    pytest.param(("cuda", name), id=f"gpu-{name}", marks=pytest.mark.gpu) for name in ("reference", "triton", "cuda")
]
BETAS, EPS, LR = (0.9, 0.99), 1e-8, 1e-2
EMA_BETAS = (0.9, 0.5, 0.0, 0.999)


@pytest.fixture(params=HERE + THERE)
def where(request: pytest.FixtureRequest) -> tuple[str, str]:
    need(OP, request.param[1], request.param[0])
    return request.param


@dataclass
class Run:
    """One optimizer's arenas and scalars on a device, stepped by one backend."""

    where: tuple[str, str]
    n: int
    settings: dict[str, Any] = field(default_factory=dict)
    emas: int = 1
    half: torch.dtype | None = torch.float16

    def __post_init__(self) -> None:
        device = self.where[0]
        self.params = start(self.n).to(device)
        self.grads, self.exp_avg, self.exp_avg_sq = (torch.zeros_like(self.params) for _ in range(3))
        self.averages = [self.params.clone() for _ in range(self.emas)]
        self.shadow = None if self.half is None else torch.full_like(self.params, math.nan, dtype=self.half)
        options = {"optimizer": "radam", "lr": LR, "betas": BETAS, "eps": EPS, **self.settings}
        self.f64, self.i64 = new_state(**options, ema_betas=EMA_BETAS[: self.emas], device=device)

    def step(self, grads: Tensor) -> Run:
        self.grads.copy_(grads)
        radam_ema(
            self.params, self.grads, self.exp_avg, self.exp_avg_sq, self.averages, self.shadow, self.f64, self.i64,
            backend=self.where[1],
        )  # fmt: skip
        return self

    def steps(self, gradients: Sequence[Tensor]) -> Run:
        for grads in gradients:
            self.step(grads)
        return self

    def results(self) -> dict[str, Tensor]:
        named = {"params": self.params, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        named |= {f"ema{i}": ema for i, ema in enumerate(self.averages)}
        named |= {} if self.shadow is None else {"shadow": self.shadow}
        return {name: tensor.detach().cpu().clone() for name, tensor in named.items()}


def start(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n))


def gradients(n: int, steps: int, bad: bool = False) -> list[Tensor]:
    """Seeded, of changing size; bad: with nan and inf among them."""
    generator = torch.Generator().manual_seed(1)
    found = [torch.randn(n, generator=generator) * 10 ** (k % 3 - 1) for k in range(steps)]
    if bad:
        for k, grads in enumerate(found):
            grads[k % n], grads[(3 * k + 1) % n], grads[n - 1 - k % n] = math.nan, math.inf, -math.inf
    return found


def torch_optim(
    n: int, grads: list[Tensor], optimizer: str, clip: float | None, emas: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The same by torch.optim, clip_grad_norm_ and lerp."""
    p = torch.nn.Parameter(start(n).to(dtype))
    averages = [p.detach().clone() for _ in range(emas)]
    kind = {"radam": torch.optim.RAdam, "adam": torch.optim.Adam}[optimizer]
    theirs = kind([p], lr=LR, betas=BETAS, eps=EPS)
    for g in grads:
        p.grad = g.to(dtype).nan_to_num(nan=0.0, posinf=1e5, neginf=-1e5)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([p], clip)
        theirs.step()
        for average, beta in zip(averages, EMA_BETAS, strict=False):
            average.lerp_(p.detach(), 1 - beta)
    state = theirs.state[p]
    moments = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
    return {"params": p.detach(), **moments, **{f"ema{i}": ema for i, ema in enumerate(averages)}}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["radam", "adam"])
@pytest.mark.parametrize(
    ("n", "clip", "emas", "bad"),
    [(8, None, 1, False), (1000, None, 4, False), (2056, 20.0, 2, True), (4096, None, 1, True), (16392, 1e9, 0, False)],
)
def test_equals_torch_over_30_steps(
    where: tuple[str, str], optimizer: str, n: int, clip: float | None, emas: int, bad: bool
) -> None:
    grads = gradients(n, 30, bad)  # RAdam starts to rectify on the way
    run = Run(where, n, {"optimizer": optimizer, "clip": clip}, emas).steps(grads)
    truth, plain = (torch_optim(n, grads, optimizer, clip, emas, d) for d in (torch.float64, torch.float32))
    for name, want in truth.items():
        error = float((run.results()[name].double() - want).abs().max())
        bar = 2 * float((plain[name].double() - want).abs().max()) + 4 * 2.0**-23 * float(want.abs().max())
        print(f"{where[1]} {optimizer} n={n} {name}: error {error:.2e}, bar {bar:.2e}")
        assert error <= bar, name
    assert torch.equal(run.shadow, run.params.half())
    assert emas < 3 or torch.equal(run.averages[2], run.params)  # beta 0 is exact
    assert int(run.i64[I64.STEPS]) == 30
    assert int(run.i64[I64.NONFINITE]) == sum(int((~g.isfinite()).sum()) for g in grads)
    cleaned = grads[-1].nan_to_num(nan=0.0, posinf=1e5, neginf=-1e5)
    assert float(run.f64[F64.GRAD_NORM]) == pytest.approx(float(cleaned.double().norm()), rel=1e-5)
    factor = 1.0 if clip is None else min(1.0, clip / float(cleaned.double().norm()))
    torch.testing.assert_close(run.grads.cpu(), cleaned * factor, rtol=1e-5, atol=0)


def test_loss_scale_and_skipped_steps_leave_no_trace(where: tuple[str, str]) -> None:
    n, scale = 2056, 1024.0
    grads = gradients(n, 9)
    want = Run(where, n, {"clip": 5.0}, 4).steps(grads)
    got = Run(where, n, {"clip": 5.0, "loss_scale": scale}, 4)
    for k, g in enumerate(grads):
        if k in (0, 3, 4, 7):
            before = got.results()
            overflow = g.clone()
            overflow[(37 * k) % n] = (math.nan, math.inf, -math.inf)[k % 3]
            got.step(overflow)
            scale /= 2
            assert float(got.f64[F64.LOSS_SCALE]) == scale and math.isinf(float(got.f64[F64.GRAD_NORM]))
            after = got.results()
            assert all(torch.equal(before[name], after[name]) for name in before if name != "shadow")
            assert k == 0 or torch.equal(before["shadow"], after["shadow"])  # before the first step it holds nothing
        got.step(g * scale)
        assert int(got.i64[I64.STEPS]) == k + 1
    for name, tensor in want.results().items():
        assert torch.equal(got.results()[name], tensor), name
    assert float(got.f64[F64.GRAD_NORM]) == pytest.approx(float(want.f64[F64.GRAD_NORM]), rel=1e-12)
    torch.testing.assert_close(got.grads, want.grads * scale, rtol=1e-6, atol=0)
    assert got.i64.tolist()[: I64.SKIPPED + 1] == [9, 4, 2, 4]
    assert want.i64.tolist()[: I64.SKIPPED + 1] == [9, 0, 0, 0]


def test_loss_scale_grows_after_good_steps_in_a_row_and_stays_in_range(where: tuple[str, str]) -> None:
    run = Run(where, 8, {"loss_scale": 4.0, "growth_interval": 3})
    good, bad = torch.ones(8), torch.full((8,), math.nan)
    seen = []
    for grads in [good, good, bad, good, good, good, good, good, good, good]:
        seen.append(float(run.step(grads).f64[F64.LOSS_SCALE]))
    assert seen == [4, 4, 2, 2, 2, 4, 4, 4, 8, 8]
    run.f64[F64.LOSS_SCALE] = 2.0**-32
    assert float(run.step(bad).f64[F64.LOSS_SCALE]) == 2.0**-32
    run.f64[F64.LOSS_SCALE] = 2.0**32
    assert float(run.steps([good] * 3).f64[F64.LOSS_SCALE]) == 2.0**32


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16, None])
def test_shadow_is_the_parameters_rounded(where: tuple[str, str], half: torch.dtype | None) -> None:
    if where == ("cpu", "triton") and half == torch.bfloat16:
        pytest.skip("the interpreter truncates bfloat16")
    for n in (8, 248, 256, 264, 2048 + 136):
        run = Run(where, n, half=half)
        run.step(gradients(n, 1)[0])
        assert run.shadow is None or torch.equal(run.shadow, run.params.to(half))


def test_settings_are_read_from_the_device_at_every_step(where: tuple[str, str]) -> None:
    a, b = (Run(where, 264, {"optimizer": "adam", "lr": lr}) for lr in (LR, 0.0))
    g = gradients(264, 2)
    b.f64[F64.LR].fill_(LR)
    for run in (a, b):
        run.step(g[0])
    assert torch.equal(a.params, b.params)
    b.f64[F64.LR] = 0.0
    b.f64[F64.EMA_BETA0] = 0.0
    before = b.params.clone()
    b.step(g[1])
    assert torch.equal(b.params, before) and torch.equal(b.averages[0], before)
    assert not torch.equal(a.step(g[1]).params, before)


def test_every_average_follows_decays_that_change_with_each_step(where: tuple[str, str]) -> None:
    """As those of power profiles do: 0 first, so that the average begins as the weights after that step."""
    n, device = 2056, where[0]
    run, truth = Run(where, n, emas=4), [start(n).double() for _ in range(4)]
    for k, grads in enumerate(gradients(n, 6)):
        betas = [(k / (k + 1)) ** power for power in (98.0, 18.0, 8.0, 1.0)]
        run.f64[F64.EMA_BETA0 : F64.EMA_BETA3 + 1] = torch.tensor(betas, dtype=torch.float64, device=device)
        run.step(grads)
        for average, want, beta in zip(run.averages, truth, betas, strict=True):
            want.lerp_(run.params.cpu().double(), 1 - beta)
            torch.testing.assert_close(average.cpu().double(), want, rtol=1e-6, atol=1e-6)
            assert k > 0 or torch.equal(average, run.params)


def test_arena_of_nothing_counts_the_step(where: tuple[str, str]) -> None:
    assert Run(where, 0).step(torch.zeros(0)).i64.tolist()[:4] == [1, 0, 0, 0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is numpy
def test_huge_gradient_does_not_break_the_step(where: tuple[str, str]) -> None:
    """Its square is inf in fp32: plain momentum steps must not see it, later ones stand still, the clip makes it 0."""
    huge = torch.full((264,), 1e25)
    for clip in (None, 1.0):
        run = Run(where, 264, {"clip": clip}).steps([huge, huge, *gradients(264, 6)])
        assert run.params.isfinite().all() and not run.exp_avg_sq.isnan().any()
        truth = torch_optim(264, [huge, huge, *gradients(264, 6)], "radam", clip, 1, torch.float32)
        torch.testing.assert_close(run.params.cpu(), truth["params"])


@pytest.mark.slow
@pytest.mark.parametrize("bad", [False, True])
def test_bits_do_not_depend_on_order(where: tuple[str, str], bad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 16392 if where[1] == "triton" else 40008
    grads = gradients(n, 6, bad)
    runs = []
    for order in ("fwd", "fwd", "rev", "rand:1", "rand:7") if where[1] == "emulated" else ("fwd", "fwd"):
        monkeypatch.setenv("CUDA_HOST_ORDER", order)
        runs.append(Run(where, n, {"clip": 30.0}, 4).steps(grads))
    for other in runs[1:]:
        for name, tensor in runs[0].results().items():
            assert torch.equal(other.results()[name], tensor), name
        assert torch.equal(other.f64, runs[0].f64) and torch.equal(other.i64, runs[0].i64)


def test_opcheck_and_compile() -> None:
    run = Run(("cpu", "reference"), 16, emas=2)
    run.grads.fill_(0.5)
    args = (run.params, run.grads, run.exp_avg, run.exp_avg_sq, run.averages, run.shadow, run.f64, run.i64)
    for backend in ("reference", "native"):
        torch.library.opcheck(torch.ops.ect.radam_ema.default, (*args, backend))
    torch.library.opcheck(torch.ops.ect.radam_ema.default, (*args[:4], [], None, *args[6:], "reference"))
    eager, compiled = (Run(("cpu", "reference"), 16, emas=2) for _ in range(2))

    def step(run: Run, grads: Tensor) -> None:
        run.step(grads)

    function = torch.compile(step, fullgraph=True, backend="aot_eager")
    for g in gradients(16, 3):
        step(eager, g)
        function(compiled, g)
    assert int(compiled.i64[I64.STEPS]) == 3
    assert all(torch.equal(compiled.results()[name], tensor) for name, tensor in eager.results().items())


def test_reference_reads_nothing_on_the_host() -> None:
    run = Run(("cpu", "reference"), 16, {"clip": 1.0, "loss_scale": 8.0})
    arenas = (run.params, run.grads, run.exp_avg, run.exp_avg_sq, run.averages, run.shadow)
    names = {event.name for event in trace(lambda: reference(*arenas, run.f64, run.i64))}
    assert "lerp_" in names and not names & {"_local_scalar_dense", "item", "equal", "nonzero"}


def test_launcher_refuses_a_misaligned_arena() -> None:
    load_emulated("radam_ema")
    run = Run(("cpu", "emulated"), 16)
    run.exp_avg = torch.zeros(17)[1:]
    with pytest.raises(RuntimeError, match="radam_ema_fwd: error 1"):
        run.step(torch.ones(16))
    assert torch.equal(run.params, start(16))


def test_fp64_arenas_take_the_reference() -> None:
    run = Run(("cpu", "reference"), 8, emas=1)
    for name in ("params", "grads", "exp_avg", "exp_avg_sq"):
        setattr(run, name, getattr(run, name).double())
    run.averages = [run.params.clone()]
    grads = gradients(8, 10)
    want = torch_optim(8, grads, "radam", None, 1, torch.float64)
    for name, tensor in run.steps(grads).results().items():
        if name != "shadow":
            torch.testing.assert_close(tensor, want[name], rtol=1e-12, atol=1e-14)
    run.where = ("cpu", "emulated")
    load_emulated("radam_ema")
    with pytest.raises(dispatch.BackendError, match="float64"):
        run.step(grads[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": torch.zeros(24)}, "grads is"), ({"params": torch.zeros(12)}, "params is"),
        ({"exp_avg": torch.zeros(16).double()}, "exp_avg is"), ({"shadow": torch.zeros(16)}, "shadow is"),
        ({"exp_avg_sq": torch.zeros(32)[::2]}, "exp_avg_sq is"), ({"averages": [torch.zeros(8)]}, r"emas\[0\] is"),
        ({"averages": [torch.zeros(16)] * 5}, "5 EMAs"), ({"f64": torch.zeros(3).double()}, "new_state"),
    ],
)  # fmt: skip
def test_arenas_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    run = Run(("cpu", "reference"), 16)
    for name, value in change.items():
        setattr(run, name, value)
    with pytest.raises(ValueError, match=message):
        radam_ema(run.params, run.grads, run.exp_avg, run.exp_avg_sq, run.averages, run.shadow, run.f64, run.i64)


@pytest.mark.gpu(twin="tests/test_capture.py::test_an_update_can_be_captured")
@pytest.mark.parametrize("where", THERE)
def test_captured_in_a_cuda_graph(where: tuple[str, str]) -> None:
    n, grads = 40008, [g.cuda() for g in gradients(40008, 12)] if torch.cuda.is_available() else []
    eager, replayed = (Run(where, n, {"loss_scale": 2.0}, 4) for _ in range(2))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        replayed.steps(grads[:2])
    torch.cuda.current_stream().wait_stream(side)
    static, graph = grads[2].clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed.step(static)
    eager.steps(grads[:2])
    for k, g in enumerate(grads[2:]):
        static.copy_(g)
        for run in (eager, replayed):
            run.f64[F64.LR].fill_(LR / (k + 1))
            run.f64[F64.EMA_BETA0 : F64.EMA_BETA3 + 1].fill_((k / (k + 1)) ** 8)
        graph.replay()
        eager.step(g)
    assert all(torch.equal(replayed.results()[name], tensor) for name, tensor in eager.results().items())
    assert torch.equal(replayed.i64, eager.i64)


def test_the_parts_that_a_cpu_takes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for cached in (64, 1 << 20):
        monkeypatch.setattr("ect_kernels.radam_ema.CACHED", cached)
        run = Run(("cpu", "reference"), 1000, emas=2, settings={"clip": 0.5})
        for i in range(8):
            grads = torch.randn(1000, generator=torch.Generator().manual_seed(i))
            grads[7 * i] = math.nan
            run.step(grads)
        runs.append(run)
    for name, value in runs[0].results().items():
        assert torch.equal(value, runs[1].results()[name]), name
    assert torch.equal(runs[0].i64, runs[1].i64) and torch.equal(runs[0].f64, runs[1].f64)
