"""How often every kernel reads and writes each element of its tensors, counted, at the shapes of DDPM++/NCSN++ in fp16.

CUDA: the .cu files of csrc/, compiled so that every load and store is counted (tests/emulator/count_accesses.h). Triton: the
masked loads and stores of the interpreter. What is read once comes from DRAM once; what does not fit on chip is read a second
time, which costs DRAM traffic where L2 has lost it, and is counted here as if it always had.
"""

from __future__ import annotations

import ctypes
import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ect_kernels import consistency_loss, native
from ect_kernels.radam_ema import CHUNK, new_state
from ect_kernels.testing import emulator
from lib import launches
from torch import Tensor

from tests.kernels import conftest  # noqa: F401  (asks for Triton's interpreter)

HALF = torch.float16
OPS = ("group_norm_silu", "residual_group_norm_silu", "perturb", "consistency_loss", "radam_ema")
COUNT = ["-O1", "-fPIC", "-shared", "-fsanitize=thread", "-U__SANITIZE_THREAD__", "-fno-threadsafe-statics"]
COUNT += ["-include", "count_accesses.h", "-nodefaultlibs", "-Wl,--no-as-needed", "-lstdc++", "-lm", "-lgcc_s", "-lc"]

# Of each tensor of the data's size: r for each time that an element is read, w for each that it is written; where the samples'
# slabs (group norms) or the samples (loss) stay on chip, and where they do not.
ACCESSES = {
    "group_norm_silu forward": {"x": ("r", "rr"), "y": ("w", "w")},
    "group_norm_silu backward": {"dy": ("r", "rr"), "x": ("r", "rr"), "dx": ("w", "w")},
    "residual_group_norm_silu forward": {
        "a": ("r", "r"), "skip": ("r", "r"), "other": ("r", "rr"), "x": ("w", "rw"), "y": ("w", "w"),
    },
    "residual_group_norm_silu backward": {
        "dy": ("r", "rr"), "dx": ("r", "r"), "x": ("r", "rr"), "other": ("r", "rr"), "da": ("w", "w"), "dother": ("w", "w"),
    },
    "perturb forward": dict.fromkeys(("in_t", "in_r", "x_t", "x_r"), ("w", "w")) | {"images": ("r", "r")},
    "consistency_loss forward": dict.fromkeys(("F_t", "F_r", "x_t", "x_r"), ("r", "rr")) | {"dF": ("w", "w")},
    # The gradients are read by the finite check, then by the update.
    "radam_ema forward": {"grads": ("rr", "rr"), "shadow": ("w", "w")}
    | dict.fromkeys(("params", "exp_avg", "exp_avg_sq", "ema0", "ema1", "ema2", "ema3"), ("rw", "rw")),
}  # fmt: skip

# (bytes, element sizes s) for each element of the op's first tensor, then of the second source; on chip, and where it is not.
BYTES = {
    "group_norm_silu forward": ([(0, 2)], [(0, 3)]),
    "group_norm_silu backward": ([(0, 3)], [(0, 5)]),
    "residual_group_norm_silu forward": ([(0, 4), (0, 2)], [(0, 5), (0, 3)]),
    "residual_group_norm_silu backward": ([(0, 4), (0, 3)], [(0, 6), (0, 5)]),
    "perturb forward": ([(9, 2)], [(9, 2)]),
    "consistency_loss forward": ([(8, 3)], [(16, 5)]),
    "radam_ema forward": ([(4 + 28 + 4 * 8 + 2, 0)], [(4 + 28 + 4 * 8 + 2, 0)]),
}

# Cases that differ from others in arithmetic or width alone; of Triton's, which take seconds each, more.
LEFT_OUT = {
    "cuda": r" norm$|^(256|512)x32$",
    "triton": r" norm$|^(256|384|512)x32|^256\+(0|256)x32|^(256x16|512x16|256x8) v p",
}

# The CUDA forward takes each channel's first element as the origin of its sums: all threads of the channel read it when the
# block starts, so that it comes from DRAM once.
ORIGINS = {
    ("cuda", "group_norm_silu forward"): ("x",),
    ("cuda", "residual_group_norm_silu forward"): ("a", "skip", "other", "x"),
}
ALIASES = {"group_norm_silu": {"da": "dx"}, "radam_ema": {"weights": "params"}}  # of parameters of Triton kernels

# Cases that read again what the chip could not keep: CUDA's tiles over 82 KB; Triton's loops at 32x32; large samples' losses.
SECOND_READ = {
    ("cuda", "group_norm_silu backward"): r"^384x32",
    ("cuda", "residual_group_norm_silu backward"): r"^256\+128x32",
    ("cuda", "consistency_loss forward"): "x96",
    ("triton", "group_norm_silu forward"): "x32",
    ("triton", "group_norm_silu backward"): "x32",
    ("triton", "residual_group_norm_silu forward"): "x32",
    ("triton", "residual_group_norm_silu backward"): "x32",
    ("triton", "consistency_loss forward"): "x96",
}


class Meter:
    """Reads and writes of each byte of the tensors that are registered with `add`, which it keeps alive."""

    def __init__(self) -> None:
        self.tensors: dict[int, tuple[str, Tensor]] = {}
        self.counts: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by address: reads, writes

    def add(self, name: str, tensor: Tensor) -> int:
        """The tensor's address; the first name that it is given stays."""
        at, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        if at not in self.tensors:
            self.tensors[at] = name, tensor
            self.counts[at] = np.zeros(size, np.uint16), np.zeros(size, np.uint16)
        return at

    def load_or_store(self, addresses: np.ndarray, mask: np.ndarray, size: int, write: bool) -> None:
        """Count an access of the interpreter to elements of `size` bytes, all of one tensor."""
        touched = addresses[np.broadcast_to(mask, addresses.shape)].astype(np.int64)
        if touched.size == 0:
            return
        base = max(at for at in self.tensors if at <= touched.min())
        index, rest = np.divmod(touched - base, size)
        counter = self.counts[base][write].reshape(-1, size)
        assert not rest.any() and index.max() < len(counter), "access outside of the kernel's tensors"
        first = index.min()
        times = np.bincount(index - first).astype(np.uint16)
        counter[first : first + len(times)] += times[:, None]

    def accesses(self, origins: tuple[str, ...]) -> dict[str, str]:
        """{name: "r" for each read, "w" for each write} of the tensors of the data's size, the same for each of its elements.

        Fails where it is not, except that the first row of each sample of `origins` may be read more often.
        """
        largest = max(tensor.numel() for _, tensor in self.tensors.values())
        found = {}
        for at, (name, tensor) in self.tensors.items():
            if 8 * tensor.numel() < largest:
                continue
            times = []
            for kind, counter in zip(("read", "written"), self.counts[at], strict=True):
                counter = counter.astype(np.int64)
                first = counter[:0]
                if kind == "read" and name in origins:
                    by_row = counter.reshape(tensor.shape[0], tensor.shape[2] * tensor.shape[3], -1)
                    first, counter = by_row[:, 0], by_row[:, 1:]
                low, high = counter.min(), counter.max()
                assert low == high, f"{name}: elements are {kind} {low} to {high} times"
                assert first.size == 0 or first.min() >= low, (
                    f"{name}: first rows are {kind} {first.min()}, not {low} times"
                )
                times.append(int(low))
            found[name] = "r" * times[0] + "w" * times[1]
        return {name: text for name, text in found.items() if text}

    def bytes(self, accesses: dict[str, str]) -> int:
        """What `accesses` move."""
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in self.tensors.values()}
        return sum(len(text) * sizes[name] for name, text in accesses.items())

    def beside(self, accesses: dict[str, str]) -> int:
        """Bytes of the vectors by channel, sample and group that were read, plus those written."""
        small = [self.counts[at] for at, (name, _) in self.tensors.items() if name not in accesses]
        return sum(int((counter > 0).sum()) for counters in small for counter in counters)


@contextmanager
def cuda_meters(source: Path) -> Iterator[dict[str, Meter]]:
    """Counts of the launchers of a .cu file called in the block, as backend 'emulated' of an A100: {"forward": ...}."""
    meters: dict[str, Meter] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_HOST_DEVICE", "1")
        patch.setitem(emulator.FLAGS, "count", COUNT)
        try:
            path = emulator.build("count", source)
        except FileNotFoundError as error:
            pytest.skip(str(error))
        library = ctypes.CDLL(str(path))
        library.cuda_host_message.restype = ctypes.c_char_p
        original = native.launch

        def launch(backend: str, name: str, *args: native.Argument) -> None:
            meter = meters.setdefault("backward" if name.endswith("_bwd") else "forward", Meter())
            for key, value in zip(launches.arguments_of(name), args, strict=True):
                if isinstance(value, Tensor) and value.numel():
                    at = meter.add(key, value)
                    counters = [ctypes.c_void_p(counter.ctypes.data) for counter in meter.counts[at]]
                    size = ctypes.c_size_t(meter.counts[at][0].size)
                    assert library.count_tensor(ctypes.c_void_p(at), size, *counters) == 0
            try:
                original(backend, name, *args)
            finally:
                library.count_no_tensor()

        patch.setattr(native, "_emulated", [library])
        patch.setattr(native, "launch", launch)
        yield meters


@contextmanager
def triton_meters(op: str) -> Iterator[dict[str, Meter]]:
    """The same of Triton's kernels that are interpreted in the block."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if torch.cuda.is_available():
        pytest.skip("with a GPU, Triton's kernels are not interpreted")
    meters: dict[str, Meter] = {}
    running: list[Meter] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def counted_call(self: Any, *args: Any, **kwargs: Any) -> None:
        backward = "backward" in self.fn.__name__ or "backward" in meters  # the sums over n follow it
        meter = meters.setdefault("backward" if backward else "forward", Meter())
        for name, value in [*zip(self.arg_names, args, strict=False), *kwargs.items()]:
            if isinstance(value, Tensor) and value.numel():
                meter.add(ALIASES.get(op, {}).get(name, name), value)
        running[:] = [meter]
        call(self, *args, **kwargs)

    def counted_load(self: Any, ptrs: Any, mask: Any, *args: Any) -> Any:
        out = load(self, ptrs, mask, *args)
        running[0].load_or_store(ptrs.data, mask.data, out.data.itemsize, write=False)
        return out

    def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *args: Any) -> Any:
        running[0].load_or_store(ptrs.data, mask.data, value.data.itemsize, write=True)
        return store(self, ptrs, value, mask, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", counted_load)
        patch.setattr(builder, "create_masked_store", counted_store)
        patch.setattr(executor, "__call__", counted_call)
        yield meters


@dataclass
class Case:
    """A call of an op. changes: to ACCESSES; more: to BYTES, for each element of the first tensor."""

    name: str
    arguments: dict[str, Any]
    changes: dict[str, str] = field(default_factory=dict)
    more: int = 0


def cases(form: str, op: str) -> Iterator[Case]:
    """Those of launches.calls for one image, with numbers in them, and what else changes the traffic."""
    arguments: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launches, "N", 1)
        for name, arguments in launches.calls(op, HALF) if op != "radam_ema" else ():
            if form in LEFT_OUT and re.search(LEFT_OUT[form], name):
                continue
            for value in arguments.values():
                if (
                    isinstance(value, Tensor)
                    and (value.dim() == 4 or value.requires_grad)
                    and value.is_floating_point()
                ):
                    value.data.normal_()
            yield Case(name, arguments)
    if op == "perturb":
        yield Case("3x32 eps", {**arguments, "eps": torch.randn(1, 3, 32, 32)}, {"eps": "r"}, 4)
    elif op == "consistency_loss":
        yield Case("3x32 r=0", {**arguments, "r": torch.zeros(1)}, {"F_r": ""}, -2)
        large = {name: torch.randn(1, 3, 96, 96).to(arguments[name].dtype) for name in ("F_t", "F_r", "x_t", "x_r")}
        large["F_t"].requires_grad_()
        yield Case("3x96", arguments | large)
    elif op == "radam_ema":
        yield Case("arena", step(clip=None))
        yield Case("arena clipped", step(clip=1e-3), {"grads": "rrw"}, 4)


def step(clip: float | None) -> dict[str, Any]:
    """Arguments of radam_ema: two chunks, four averages, a shadow."""
    arenas = {name: torch.rand(2 * CHUNK) for name in ("params", "grads", "exp_avg", "exp_avg_sq")}
    f64, i64 = new_state("radam", 1e-4, (0.9, 0.99), 1e-8, clip, ema_betas=(0.9, 0.99, 0.999, 0.5))
    emas, shadow = [torch.rand(2 * CHUNK) for _ in range(4)], torch.zeros(2 * CHUNK, dtype=HALF)
    return {**arenas, "emas": emas, "shadow": shadow, "state_f64": f64, "state_i64": i64}


def run(op: str, arguments: dict[str, Any], backend: str) -> None:
    """Forward, and backward where there is one."""
    outputs = getattr(importlib.import_module(f"ect_kernels.{op}"), op)(**arguments, backend=backend)
    inputs = [value for value in arguments.values() if isinstance(value, Tensor) and value.requires_grad]
    if inputs:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(outputs, inputs, [torch.randn_like(out) for out in outputs])


@contextmanager
def counted(form: str, op: str, source: Path | None = None) -> Iterator[tuple[str, dict[str, Meter]]]:
    """(backend, counts) of what runs in the block; source: a .cu file in place of the op's own."""
    if form == "cuda":
        with cuda_meters(source or emulator.ROOT / "csrc" / f"{op}.cu") as meters:
            yield "emulated", meters
    else:
        with triton_meters(op) as meters:
            yield "triton", meters


def check(form: str, op: str, case: Case, way: str, meter: Meter) -> str:
    """Hold what was counted to ACCESSES and BYTES; a line of the report."""
    again = re.search(SECOND_READ.get((form, f"{op} {way}"), "^$"), case.name) is not None
    found = meter.accesses(ORIGINS.get((form, f"{op} {way}"), ()))
    present = {name for name, _ in meter.tensors.values()}
    expected = {name: words[again] for name, words in ACCESSES[f"{op} {way}"].items() if name in present} | case.changes
    assert found == {name: words for name, words in expected.items() if words}, f"{op} {way} {case.name}"
    shapes = [value for value in case.arguments.values() if isinstance(value, Tensor) and value.dim() in (1, 4)]
    elements = [shapes[0].numel(), case.arguments["other"].numel() if "other" in case.arguments else 0]
    stated = [(more + s * HALF.itemsize) for more, s in BYTES[f"{op} {way}"][again]]
    stated[0] += case.more
    moved = meter.bytes(found)
    assert moved == sum(each * count for each, count in zip(stated, elements, strict=False)), f"{op} {way} {case.name}"
    by_tensor = " ".join(f"{name}:{words}" for name, words in found.items())
    where = "read again" if again else "on chip"
    return (
        f"{form} {op} {way} {case.name}: {moved / elements[0]:.4g} B an element ({where}; {by_tensor}), "
        f"vectors {100 * meter.beside(found) / moved:.1f} % beside"
    )


@pytest.mark.parametrize("form", ["cuda", "triton"])
@pytest.mark.parametrize("op", [pytest.param(op, marks=pytest.mark.slow if "norm" in op else ()) for op in OPS])
def test_every_tensor_is_read_and_written_as_often_as_stated(op: str, form: str) -> None:
    with counted(form, op) as (backend, meters):
        for case in cases(form, op):
            meters.clear()
            run(op, case.arguments, backend)
            assert {f"{op} {way}" for way in meters} == {key for key in ACCESSES if key.startswith(f"{op} ")}
            for way, meter in meters.items():
                print(check(form, op, case, way, meter))


@pytest.mark.parametrize("form", ["cuda", "triton"])
def test_a_gradient_that_is_not_finite_costs_little_more(form: str) -> None:
    """CUDA writes its vector of four anew; Triton reads its chunk once more and writes it."""
    arguments = step(clip=None)
    arguments["grads"][CHUNK + 5] = torch.nan
    with counted(form, "radam_ema") as (backend, meters):
        run("radam_ema", arguments, backend)
        reads, writes = (counter.reshape(-1, 4) for counter in meters["forward"].counts[arguments["grads"].data_ptr()])
    anew = slice(CHUNK + 4, CHUNK + 8) if form == "cuda" else slice(CHUNK, 2 * CHUNK)
    expected = np.zeros_like(writes)
    expected[anew] = 1
    assert (writes == expected).all()
    assert (reads == 2 + (expected if form == "triton" else 0)).all()


@pytest.mark.unwritten
def test_the_backward_of_the_loss_is_one_product() -> None:
    """2s: dF read and the gradient written, by PyTorch. (Half precision a GPU converts inside the product, a CPU before it.)"""
    dF, dloss = torch.randn(2, 3, 8, 8), torch.randn(2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        consistency_loss._backward_op(dF, dloss)
    free = {"aten::view", "aten::empty_like", "aten::empty_strided", "aten::empty"}
    assert [e.name for e in profile.events() if e.name.startswith("aten") and e.name not in free] == ["aten::mul"]


def test_counts_find_a_cuda_kernel_that_reads_once_more(tmp_path: Path) -> None:
    text = (emulator.ROOT / "csrc" / "consistency_loss.cu").read_text(encoding="utf-8")
    fits = "4 * m + STATIC <= half_shared()"
    assert text.count(fits) == 1
    planted = tmp_path / "consistency_loss.cu"
    planted.write_text(text.replace(fits, "false"), encoding="utf-8")
    case = next(cases("cuda", "consistency_loss"))
    with counted("cuda", "consistency_loss", planted) as (backend, meters):
        run("consistency_loss", case.arguments, backend)
    with pytest.raises(AssertionError, match="consistency_loss forward 3x32"):
        check("cuda", "consistency_loss", case, "forward", meters["forward"])


def test_counts_find_a_triton_kernel_that_reads_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(cases("triton", "consistency_loss"))
    with counted("triton", "consistency_loss") as (backend, meters):
        monkeypatch.setattr("ect_kernels.consistency_loss_triton.RESIDENT", 0)
        run("consistency_loss", case.arguments, backend)
    with pytest.raises(AssertionError, match="consistency_loss forward 3x32"):
        check("triton", "consistency_loss", case, "forward", meters["forward"])


def test_uneven_and_large_scratch_accesses_are_found() -> None:
    """One element read twice; a workspace of the data's size, which no table names."""
    x, y, scratch = (torch.zeros(64, dtype=HALF) for _ in range(3))
    meter = Meter()
    for name, tensor, write in (("x", x, False), ("y", y, True), ("scratch", scratch, True)):
        every = meter.add(name, tensor) + 2 * np.arange(64, dtype=np.uint64)
        meter.load_or_store(every, np.ones(64, bool), 2, write)
    assert meter.accesses(()) == {"x": "r", "y": "w", "scratch": "w"}
    meter.load_or_store(np.array([x.data_ptr() + 6], np.uint64), np.ones(1, bool), 2, False)
    with pytest.raises(AssertionError, match="x: elements are read 1 to 2 times"):
        meter.accesses(())


def test_the_modules_declare_these_figures() -> None:
    """DRAM of each op's module, which the kernel report prints."""

    def declared(op: str, key: str) -> list[str]:
        text = importlib.import_module(f"ect_kernels.{op}").DRAM[key]
        return re.findall(r"\b(\d+ ?[sB])\b", text)

    for op in ("group_norm_silu", "residual_group_norm_silu"):
        for way in ("forward", "backward"):
            figures = [f"{s}s" for row in BYTES[f"{op} {way}"] for _, s in row]
            for form in ("cuda", "triton"):
                assert declared(op, f"{form} {way}") == figures, f"{form} {op} {way}"
    assert declared("perturb", "forward") == ["9 B", "2s", "4 B"]
    assert declared("consistency_loss", "forward")[:2] == ["3s", "8 B"]
    assert declared("consistency_loss", "backward") == ["2s"]
    assert declared("radam_ema", "check")[0] == "4 B"
    assert declared("radam_ema", "update") == ["28 B", "8 B", "2 B", "4 B"]
