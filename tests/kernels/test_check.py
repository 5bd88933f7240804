"""The check of a backend against the reference: it finds each kind of fault in each op, and only those."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from ect_kernels import check, cpu, dispatch, native
from ect_kernels.__main__ import main
from ect_kernels.calls import ARENA, SAMPLES, Call, Recorder, Shape, default_calls
from ect_kernels.choice import OPS

from ect.assembly import network_spec
from ect.cost import memory
from ect.data import Dataset
from tests.kernels.conftest import load_emulated
from tests.planted import FAULTS, NAME, off_by_2_percent, plant, raises, sound
from tests.tiny import NET, config

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_refused():  # type: ignore[no-untyped-def]
    yield
    dispatch.clear_refused()


@pytest.fixture(scope="module")
def calls() -> list[Call]:
    """Those of a run of a small network on a GPU, in fp16."""
    dataset = Dataset("x", torch.zeros(16, 8, 8, 3, dtype=torch.uint8), None)
    cfg = config(precision="fp16", batch=16, net=replace(NET, model_channels=32, channel_mult=(1, 2)))
    with Recorder() as recorder:
        memory.predict(cfg, network_spec(cfg.net, "ECMPrecond", dataset, 0), dataset, torch.device("cuda"), 8)
    return recorder.calls


def of(calls: list[Call], op: str) -> list[Call]:
    return [call for call in calls if call.op == op]


@pytest.mark.slow
def test_the_calls_are_those_of_the_network_with_few_samples(calls: list[Call]) -> None:
    assert {call.op for call in calls} == set(OPS)
    assert {call.function for call in calls if call.function.endswith("_bwd")} == {
        "group_norm_silu_bwd", "residual_group_norm_silu_bwd",
    }  # fmt: skip
    assert len(calls) == len(set(calls)) < 60
    images = [v for call in calls for _, v in call.arguments if isinstance(v, Shape) and len(v.size) == 4]
    assert {image.size[0] for image in images} == {SAMPLES}
    assert {torch.float16, torch.float32, torch.uint8} == {image.dtype for image in images}
    norm = next(dict(call.arguments) for call in calls if call.op == "group_norm_silu" and dict(call.arguments)["v"])
    assert norm["v"].size[1] < norm["v"].stride[0]  # rows of all blocks' embeddings, as the network hands them over


def test_values_are_the_same_at_every_call_and_have_the_recorded_layout(calls: list[Call]) -> None:
    for call in calls:
        for (name, shape), a, b in zip(call.arguments, *(call.inputs(CPU).values() for _ in range(2)), strict=True):
            if isinstance(shape, Shape):
                assert a.shape == shape.size and a.stride() == shape.stride and a.dtype == shape.dtype, name
                assert torch.equal(a, b)


@pytest.mark.parametrize("op", OPS)
def test_a_sound_backend_passes(op: str, calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, op)
    report = check.check(calls, CPU)
    assert report.failed == {} == dispatch.refused(CPU) and report.skipped == []
    assert report.calls == {(op, NAME): len(of(calls, op))}
    assert dispatch.OPS[op].candidates(CPU) == [NAME, "reference"]


CASES = [(op, "forward", fault) for op in OPS for fault in FAULTS]
CASES += [(op, "backward", fault) for op in OPS[:2] for fault in FAULTS]
CASES.remove(("levels", "forward", "off_by_2_percent"))  # as one_wrong


@pytest.mark.parametrize(("op", "way", "fault"), CASES)
def test_a_fault_is_found_and_the_next_backend_runs(
    op: str, way: str, fault: str, calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, op, **{way: FAULTS[fault]})
    report = check.check(of(calls, op), CPU)
    assert list(report.failed) == [(op, NAME)]
    reason = report.failed[op, NAME]
    assert reason.startswith(f"{op}_bwd(" if way == "backward" else f"{op}(")
    said = {"raises": "RuntimeError: CUDA error: a planted failure", "one_nan": "not finite"}.get(fault, "error")
    assert said in reason and "and what follows" not in reason
    assert dispatch.refused(CPU) == {(op, NAME): reason} and dispatch.OPS[op].candidates(CPU) == ["reference"]


def _flip_one_bit(results: Any, arguments: Any) -> Any:
    """Drop one value more than the mask says."""
    norm = arguments[-1]
    if norm.seed is not None:
        y = results.y.permute(0, 2, 3, 1).reshape(-1)
        kept = y.abs().argmax()
        n, c, h, w = results.y.shape
        where = torch.unravel_index(kept, (n, h, w, c))
        results.y[where[0], where[3], where[1], where[2]] = 0
    return results


def test_one_wrong_bit_of_the_mask_is_named(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "group_norm_silu", forward=_flip_one_bit)
    report = check.check(of(calls, "group_norm_silu"), CPU)
    assert "dropout mask: 1 of " in report.failed["group_norm_silu", NAME]


@pytest.mark.unwritten
def test_what_is_left_unwritten_is_found(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(results: Any, arguments: Any) -> Any:
        image = torch.empty_like(results.y)
        image[:, 1:] = results.y[:, 1:]
        return results._replace(y=image)

    plant(monkeypatch, "group_norm_silu", forward=forget)
    assert "not finite" in check.check(of(calls, "group_norm_silu"), CPU).failed["group_norm_silu", NAME]
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_limit_is_no_failure_and_leaves_the_call_to_the_next(
    calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, "group_norm_silu", raises, limits=lambda *args: "anything")
    report = check.check(calls, CPU)
    assert report.failed == {} == report.calls
    assert dispatch.OPS["group_norm_silu"].candidates(CPU) == [NAME, "reference"]


def test_an_op_that_the_network_lacks_is_left_alone(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "skip_product", raises)
    assert check.check(of(calls, "levels"), CPU).failed == {}


def test_a_backend_asked_for_by_name_is_not_replaced(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "perturb", off_by_2_percent)
    monkeypatch.setattr(dispatch, "requested", lambda op: NAME if op == "perturb" else None)
    with pytest.raises(dispatch.BackendError, match=f"perturb: backend '{NAME}' failed its check: .*in_t: "):
        check.check(calls, CPU)
    assert dispatch.refused(CPU) == {}


def test_out_of_memory_is_no_verdict(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(results: Any, arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    plant(monkeypatch, "levels", full)
    report = check.check(calls, CPU)
    assert report.failed == {} and [line.split("(")[0] for line in report.skipped] == ["levels"]
    assert report.calls == {("levels", NAME): 0}


HANGS = """
import time, torch, pytest
from ect_kernels import check
from ect_kernels.calls import default_calls
from tests.planted import plant
calls = [call for call in default_calls() if call.op == "levels"]
plant(pytest.MonkeyPatch(), "levels", lambda results, arguments: time.sleep(60))
check.SECONDS = 0.5
check.check(calls, torch.device("cpu"))
"""


@pytest.mark.slow
def test_a_hang_ends_the_process_with_a_name_and_a_remedy() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", HANGS], env=environment, capture_output=True, text=True, timeout=100)
    said = "levels: backend planted did not return within 0.5 s; start again with --kernels levels=reference"
    assert (done.returncode, done.stderr) == (check.HUNG, f"error: {said}\n")


def test_so_does_a_fault_that_takes_the_device_with_it(
    calls: list[Call], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def leave(status: int) -> None:
        raise SystemExit(status)

    plant(monkeypatch, "levels", raises)
    monkeypatch.setattr(check, "alive", lambda device: False)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as end:
        check.check(calls, CPU)
    assert end.value.code == check.HUNG
    assert capsys.readouterr().err == (
        "error: levels: backend planted failed, and the device with it: RuntimeError: CUDA error: a planted failure; "
        "start again with --kernels levels=reference\n"
    )


def test_the_device_is_waited_for_and_asked_whether_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    gpu, ones = torch.device("cuda", 1), torch.ones
    monkeypatch.setattr(torch.cuda, "synchronize", seen.append)
    monkeypatch.setattr(torch, "ones", lambda n, device: seen.append(device) or ones(n))
    assert check.alive(gpu) and seen == [gpu, gpu] and check.alive(CPU)

    def lost(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert not check.alive(gpu)


def test_a_triton_kernel_is_compiled_apart(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def slow_at_first(results: Any, arguments: Any) -> Any:
        if not compiled:
            compiled.append(time.sleep(0.2))
        return results

    plant(monkeypatch, "levels", slow_at_first, name="triton")
    monkeypatch.setattr(native, "why_no_triton", lambda device: None)
    report = check.check(of(calls, "levels"), CPU)
    assert 0.2 < report.compiling < report.seconds and report.calls == {("levels", "triton"): 1}


@pytest.mark.slow
def test_the_emulated_kernels_pass_at_the_shapes_of_a_network(
    calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    for op in OPS:
        if op != "skip_product":
            load_emulated(op)
    monkeypatch.setitem(dispatch.AUTO, "cpu", ("emulated", "reference"))
    report = check.check([call for call in calls if call.op != "radam_ema"], CPU)
    assert report.failed == {} and report.calls[OPS[0], "emulated"] == len(of(calls, OPS[0]))


@pytest.mark.slow
def test_so_do_the_cpu_kernels(calls: list[Call]) -> None:
    if (reason := cpu.why_not_built()) is not None:
        pytest.skip(reason)
    report = check.check(calls, CPU)
    assert report.failed == {} and {op for op, _ in report.calls} == set(OPS) - {"skip_product"}
    assert report.calls[OPS[0], "native"] == len(of(calls, OPS[0]))


@pytest.mark.parametrize(
    ("fault", "named", "status", "said"),
    [
        (sound, False, 0, "check: perturb on planted: 3 calls agree with the reference\ncheck: all is well; "),
        (off_by_2_percent, False, 1, "check: perturb on planted FAILED: perturb(images"),
        (off_by_2_percent, True, 1, "check: FAILED: perturb: backend 'planted' failed its check: perturb(images"),
    ],
)
def test_the_command_checks_what_the_ops_would_use(
    fault: Any, named: bool, status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = of(default_calls(), "perturb")
    plant(monkeypatch, "perturb", fault)
    monkeypatch.setattr("ect_kernels.calls.default_calls", lambda: calls)
    if named:
        monkeypatch.setattr(dispatch, "requested", lambda op: NAME if op == "perturb" else None)
    assert main(["--check"]) == status
    out = capsys.readouterr().out
    assert said in out and ("1 backends failed" in out) == (status == 1 and not named)


@pytest.mark.usefixtures("pytorch_ops")
def test_the_command_says_where_there_is_nothing_to_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0 and "check: nothing but references runs here" in capsys.readouterr().out


@pytest.mark.slow
def test_so_do_the_triton_kernels(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available() or native.why_no_triton(CPU) is not None:
        pytest.skip("needs Triton's interpreter")
    monkeypatch.setitem(dispatch.AUTO, "cpu", ("triton", "reference"))
    one = {(call.function, dict(call.arguments).get("other") is None): call for call in calls if call.op != "radam_ema"}
    report = check.check(list(one.values()), CPU)
    assert report.failed == {} and sum(report.calls.values()) == len(one) > 8


def test_the_default_calls_have_every_op_both_ways_in_every_dtype() -> None:
    calls = default_calls()
    found = {(call.function, dict(call.arguments)[name].dtype) for call in calls for name in ("x", "a", "F_t", "shadow")
             if isinstance(dict(call.arguments).get(name), Shape)}  # fmt: skip
    halves, floats = (torch.float16, torch.bfloat16), (torch.float16, torch.bfloat16, torch.float32)
    norms = {(f"{op}{way}", dtype) for op in OPS[:2] for way in ("", "_bwd") for dtype in floats}
    assert found == norms | {("skip_product", dtype) for dtype in halves} | {
        ("radam_ema", dtype) for dtype in halves
    } | {("consistency_loss", dtype) for dtype in floats}
    assert {call.op for call in calls} == set(OPS)
    arena = next(dict(call.arguments)["params"] for call in calls if call.op == "radam_ema")
    assert arena.size == (ARENA,)
    assert sound(calls, None) is calls
