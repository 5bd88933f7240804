"""Which GPUs the extension serves, where its kernels run, and what is refused before a kernel sees it; on mocked devices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ect_kernels import dispatch, native, philox
from ect_kernels.consistency_loss import consistency_loss
from ect_kernels.group_norm_silu import group_norm_silu
from ect_kernels.levels import levels
from ect_kernels.perturb import perturb
from ect_kernels.radam_ema import F64, I64, new_state, radam_ema
from ect_kernels.residual_group_norm_silu import residual_group_norm_silu
from ect_kernels.skip_product import skip_product
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

GPU = torch.device("cuda", 0)


class Module:
    """Stands in for ect_kernels._C."""

    def __init__(self, archs: list[tuple[int, int]], error: str = "") -> None:
        self.archs, self.error, self.probes = lambda: archs, error, 0
        self.launched: list[tuple[Any, ...]] = []

    def probe(self) -> str:
        self.probes += 1
        return self.error

    def levels_fwd(self, *args: Any) -> None:
        self.launched.append(args)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """GPUs of a capability that a test sets; `current` is the device made current, as torch.cuda.device does it."""
    state = SimpleNamespace(capability=(8, 0), current=0)

    @contextlib.contextmanager
    def device(where: Any) -> Iterator[None]:
        before, state.current = state.current, where if isinstance(where, int) else where.index or 0
        yield
        state.current = before

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d=None: state.capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.current)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda d=None: SimpleNamespace(cuda_stream=100 + d.index))
    native._probe.cache_clear()
    yield state
    native._probe.cache_clear()


@pytest.mark.parametrize(
    ("archs", "serves", "not_these"),
    [
        ([(80, 0), (90, 90)], ["80", "86", "89", "90", "100", "120"], ["61", "70", "75"]),
        ([(86, 86)], ["86", "89", "90", "120"], ["75", "80"]),
        ([(80, 0)], ["80", "86", "89"], ["70", "75", "90", "100"]),
        ([(80, 0), (120, 120)], ["80", "120", "121"], ["75", "90", "100"]),
        ([(75, 75)], ["75", "80", "90"], ["70", "61"]),
        ([(90, 0)], ["90"], ["80", "89", "100"]),
    ],
)
def test_a_gpu_is_served_by_a_cubin_of_its_family_or_by_older_ptx(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, archs: list[tuple[int, int]], serves: list[str],
    not_these: list[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(native, "extension", lambda: Module(archs))
    for capability in (*serves, *not_these):
        gpu.capability = int(capability[:-1]), int(capability[-1])
        reason = native.why_not_built(GPU)
        assert (reason is None) == (capability in serves), (capability, reason)
        if reason is not None:
            remedy = f"ECT_CUDA_ARCHS={capability}" if int(capability) >= 80 else "it needs sm_80 or newer"
            assert f"not for sm_{capability}; " in reason and remedy in reason


@pytest.mark.parametrize(
    "error", ["CUDA error 35, CUDA driver version is insufficient", "CUDA error 209, no kernel image"]
)
def test_kernels_that_do_not_load_are_a_reason_and_triton_is_next(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    module = Module([(80, 80)], error)
    monkeypatch.setattr(native, "extension", lambda: module)
    assert error in str(native.why_not_built(GPU)) and "driver" in str(native.why_not_built(GPU))
    assert module.probes == 1, "one probe a device"
    assert dispatch.OPS["levels"].candidates(GPU)[0] == "triton"


def test_each_device_is_probed_as_the_current_one(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    module = Module([(80, 80)])
    module.probe = lambda: seen.append(gpu.current) or ""  # type: ignore[method-assign,func-returns-value]
    monkeypatch.setattr(native, "extension", lambda: module)
    for index in (1, 0, 1):
        assert native.why_not_built(torch.device("cuda", index)) is None
    assert seen == [1, 0]


class OnGpu(Tensor):
    """A tensor that says it is on a GPU; its memory is the CPU's."""

    where = torch.device("cuda", 1)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.where


def on_gpu(t: Tensor) -> OnGpu:
    return t.as_subclass(OnGpu)


def test_a_launch_makes_its_tensors_device_current_and_takes_that_ones_stream(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Module([(80, 80)])
    during: list[int] = []
    module.levels_fwd = lambda *args: (during.append(gpu.current), module.launched.append(args))  # type: ignore
    monkeypatch.setattr(native, "extension", lambda: module)
    native.launch("cuda", "levels_fwd", on_gpu(torch.zeros(1)), 5, None, 0.5)
    assert during == [1] and gpu.current == 0
    assert module.launched[0][1:] == (5, 0, 0.5, 101)


def test_a_triton_launch_too(gpu: SimpleNamespace) -> None:
    with native.current(torch.device("cuda", 3)):
        assert gpu.current == 3
    with native.current(torch.device("cpu")):
        assert gpu.current == 0


def test_a_launch_refuses_tensors_of_two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Module([(80, 80)])
    monkeypatch.setattr(native, "extension", lambda: module)
    with pytest.raises(ValueError, match=r"levels_fwd: 2 is on cpu but 0 is on cuda:1; move one of them"):
        native.launch("cuda", "levels_fwd", on_gpu(torch.zeros(1)), 5, torch.zeros(1))
    assert not module.launched


def mixed(name: str, elsewhere: str) -> None:
    """Call op `name` on fake GPU tensors, the argument `elsewhere` alone on the CPU."""

    def make(what: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cpu" if what == elsewhere else "cuda")

    scalar = {"dtype": torch.int64}
    match name:
        case "group_norm_silu":
            vectors = make("gamma", 8), make("beta", 8)
            seed, n0 = make("seed", **scalar), make("n0", **scalar)  # type: ignore[arg-type]
            group_norm_silu(make("x", 2, 8, 4, 4), *vectors, 2, 1e-5, p=0.5, seed=seed, n0=n0, v=make("v", 2, 8))
        case "residual_group_norm_silu":
            image = make("a", 2, 8, 4, 4), make("gamma", 8), make("beta", 8)
            residual_group_norm_silu(*image, 2, 1e-5, bias=make("bias", 8), skip=make("skip", 2, 8, 4, 4))
        case "skip_product":
            x, other = make("x", 2, 8, 4, 4), make("other", 2, 8, 4, 4)
            skip_product(make("a", 2, 8, 4, 4), make("weight", 8, 16), x, other, make("bias", 8))
        case "levels":
            levels(make("seed", **scalar), torch.empty((), dtype=torch.int64, device="cuda"), make("n0", **scalar), 2,
                   -1.1, 2.0, 2.0, 8.0, 1.0)  # type: ignore[arg-type]  # fmt: skip
        case "perturb":
            images = torch.empty(2, 4, 4, 3, dtype=torch.uint8, device="cuda")
            perturb(images, make("t", 2), make("r", 2), 0.5, make("seed", **scalar))  # type: ignore[arg-type]
        case "consistency_loss":
            images = (make(k, 2, 3, 4, 4) for k in ("F_t", "F_r", "x_t", "x_r"))
            consistency_loss(*images, make("t", 2), make("r", 2), make("weight", 2), 0.0, 0.5)
        case "radam_ema":
            with torch.device("cpu" if elsewhere == "state_f64" else "cuda"):
                f64, i64 = torch.empty(len(F64), dtype=torch.float64), torch.empty(len(I64), dtype=torch.int64)
            arenas = (make(k, 16) for k in ("params", "grads", "exp_avg", "exp_avg_sq"))
            radam_ema(*arenas, [make("emas", 16)], None, f64, i64.to("cuda"))


@pytest.mark.parametrize(
    ("name", "argument"),
    [(op, argument) for op, arguments in {
        "group_norm_silu": ("gamma", "seed", "n0", "v"), "residual_group_norm_silu": ("skip", "bias", "beta"),
        "skip_product": ("weight", "bias"), "levels": ("seed", "n0"), "perturb": ("seed", "r"),
        "consistency_loss": ("F_r", "weight"), "radam_ema": ("grads", "emas", "state_f64"),
    }.items() for argument in arguments],
)  # fmt: skip
def test_every_op_refuses_tensors_of_two_devices(name: str, argument: str) -> None:
    with FakeTensorMode():
        mixed(name, "none")
        with pytest.raises(ValueError, match=rf"{name}: .* on (cpu|cuda)"):
            mixed(name, argument)


def test_an_n0_that_no_kernel_could_read_is_refused() -> None:
    for n0 in (torch.zeros(2, dtype=torch.int64), torch.zeros((), dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"op: n0 is .*expected an int or a 0-d int64 tensor"):
            philox.first_sample("op", n0, torch.device("cpu"))
    assert philox.first_sample("op", 0, torch.device("cpu")) is None
    assert int(philox.first_sample("op", 2**40, torch.device("cpu"))) == 2**40  # type: ignore[arg-type]


def test_what_was_refused_is_passed_by_and_says_why() -> None:
    op, cpu = dispatch.OPS["levels"], torch.device("cpu")
    args = torch.tensor(5), torch.tensor(1), 0, 4, -1.1, 2.0, 2.0, 8.0, 1.0
    try:
        dispatch.refuse("levels", "emulated", cpu, "wrong values")
        assert op.why_not("emulated", cpu) == "wrong values"
        assert dispatch.refused(cpu) == {("levels", "emulated"): "wrong values"} and not dispatch.refused(GPU)
        with pytest.raises(dispatch.BackendError, match="'emulated' cannot run: wrong values"):
            levels(*args, backend="emulated")
        levels(*args)
        with pytest.raises(dispatch.BackendError, match="the reference failed on cpu"):
            dispatch.refuse("levels", "reference", cpu, "wrong values")
    finally:
        dispatch.clear_refused()
    assert not dispatch.refused(cpu)


def test_the_choice_is_made_when_the_op_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So no compiled graph holds it, and tensors without data need none."""
    monkeypatch.setattr(dispatch.Op, "pick", lambda *args: pytest.fail("picked"))
    with FakeTensorMode():
        mixed("group_norm_silu", "none")
        mixed("radam_ema", "none")
    state = new_state("radam", 1e-3, (0.9, 0.99), 1e-8, device="meta")
    radam_ema(*(torch.empty(16, device="meta") for _ in range(4)), [], None, *state)


def test_why_there_is_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert native.why_no_triton(torch.device("cpu")) == "it needs a GPU, or TRITON_INTERPRET=1"
    monkeypatch.setattr(native, "_has_triton", lambda: False)
    assert native.why_no_triton(GPU) == "triton is not installed (it exists for Linux)"


def test_a_sum_of_two_half_precisions_has_no_kernel() -> None:
    a, seam = torch.zeros(1, 8, 2, 2, dtype=torch.float16), SimpleNamespace(dtype=torch.bfloat16)
    limits = dispatch.OPS["residual_group_norm_silu"].backends["cuda"].limits
    assert limits(seam, SimpleNamespace(x=a)) == "a of torch.float16 with x of torch.bfloat16"
