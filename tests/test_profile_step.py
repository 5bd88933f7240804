"""The profile of a step as a GPU would give it, and a row's figures there, without one: torch.cuda answers from a script."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import profile_step
import pytest
import roofline
import torch
from ect_kernels import dispatch
from lib import first_hour_report, instructions, measure, rounds, waterfall
from torch.autograd import DeviceType

GPU, CPU = torch.device("cuda"), torch.device("cpu")
KERNELS = {"sm80_xmma_fprop_implicit_gemm": 6.0, "group_norm_silu_fwd_kernel": 3.0, "Memcpy DtoD": 1.0}  # ms


class Machine:
    """A GPU of torch.cuda's answers; the time of a step, and what its first steps allocate, are given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.peaks, self.built, self.chosen = 0.0, [7_000_000_000], [], []
        self.step: Callable[[], None] = lambda: None
        self.synchronize: Callable[[], None] = lambda: None
        answers: dict[str, Any] = {
            "get_device_name": lambda device: "NVIDIA H100 80GB HBM3",
            "synchronize": lambda device: self.synchronize(),
            "empty_cache": lambda: None,
            "reset_peak_memory_stats": lambda device: None,
            "max_memory_allocated": lambda device: self.peaks.pop(0) if len(self.peaks) > 1 else self.peaks[0],
            "max_memory_reserved": lambda device: 8_000_000_000,
            "memory_allocated": lambda device: 500_000_000,
            "mem_get_info": lambda device: (71_000_000_000, 80_000_000_000),
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        machine = self

        class Runner:
            def __init__(self, row: waterfall.Row, case: waterfall.Case, device: torch.device) -> None:
                machine.built.append(row)
                machine.chosen.append({op: dispatch.requested(op) for op in dispatch.OPS})

            def __call__(self) -> None:
                machine.now += 0.02
                machine.step()

        monkeypatch.setattr(instructions, "counts", lambda arch: None)  # a minute of nvcc
        monkeypatch.setattr(waterfall, "Runner", Runner)
        monkeypatch.setattr(measure, "clock", lambda device: ("fake", lambda: self.now))
        monkeypatch.setattr(profile_step, "profile", self.profile)

    def profile(self, activities: Any) -> Any:
        assert torch.profiler.ProfilerActivity.CUDA in activities

        def event(name: str, ms: float, kind: DeviceType = DeviceType.CUDA, annotation: bool = False) -> Any:
            span = SimpleNamespace(elapsed_us=lambda: 1e3 * ms)
            return SimpleNamespace(name=name, device_type=kind, time_range=span, is_user_annotation=annotation)

        events = [event(name, ms / 2) for name, ms in KERNELS.items() for _ in range(2)]
        events += [event("aten::convolution", 50.0, DeviceType.CPU), event("whole step", 20.0, annotation=True)]

        class Trace:
            def __enter__(self) -> Trace:
                return self

            def __exit__(self, *error: Any) -> None: ...

            def events(self) -> Any:
                return events

        return Trace()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def run(out: Path) -> dict[str, dict[str, Any]]:
    result = profile_step.run(waterfall.case("ddpmpp", GPU), GPU, 3, out / "profile.json")
    assert json.loads((out / "profile.json").read_text()) == json.loads(json.dumps(result))
    assert all(table.rows for table in profile_step.table(result, 5))
    return {way["name"]: way for way in result["ways"]}


@pytest.mark.slow
def test_every_way_is_measured_against_what_was_predicted(machine: Machine, tmp_path: Path) -> None:
    ways = run(tmp_path)
    assert list(ways) == ["as the trainer runs it", "every op on Triton", "without the graph"]
    own = ways["as the trainer runs it"]
    assert own["ms"] == pytest.approx(20) and own["launches"] == 6
    assert own["by_kind"] == pytest.approx({"conv": 6.0, "norm": 3.0, "other": 1.0})
    assert own["kernels"][0] == {"name": "sm80_xmma_fprop_implicit_gemm", "count": 2, "ms": pytest.approx(6.0)}
    assert own["memory"]["tensors"] == 7_000_000_000 and own["memory"]["in_use"] == 9_000_000_000
    assert own["memory"]["predicted"]["graph"] and 0 < own["memory"]["predicted"]["launches"] < 1000
    assert not ways["without the graph"]["memory"]["predicted"]["graph"]
    assert [row.captured for row in machine.built] == [True, True, False]
    assert all(row.precision == "fp16" for row in machine.built)
    asked = [set(chosen.values()) for chosen in machine.chosen]
    assert asked[0] == asked[2] == {None} and asked[1] == {"triton"}
    assert dispatch.requested("levels") is None

    first_hour_report.write(tmp_path, [], [])
    text = (tmp_path / "report.md").read_text()
    floor = roofline.floor(roofline.GPUS[2])
    assert f"ms a step | 20.00 | {floor['step']:.2f} | {20 / floor['step']:.2f}" in text
    assert f"ms in kernels: norm | 3.00 | {floor['norm']:.2f}" in text
    assert "sm80_xmma_fprop_implicit_gemm | 2 | 6.000 | 60.0 %" in text


@pytest.mark.slow
def test_a_way_that_fails_costs_no_other_and_keeps_what_it_had(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bytes_ = {"predicted": {"state": 1, "update": 1, "allowance": 1}, "predicted_run": 3}
    monkeypatch.setattr(profile_step, "_memory", lambda *args: bytes_)

    def step() -> None:
        if len(machine.built) == 2:
            raise TypeError("got an unexpected argument\nand more")

    def profile(activities: Any) -> Any:
        raise RuntimeError("CUPTI is missing")

    machine.step = step
    ways = run(tmp_path)
    assert ways["every op on Triton"] == {
        "name": "every op on Triton", "ok": False, "why": "TypeError: got an unexpected argument"
    }  # fmt: skip
    assert ways["without the graph"]["ok"] and dispatch.requested("levels") is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile_step, "profile", profile)
        ways = run(tmp_path)
    own = ways["as the trainer runs it"]
    assert not own["ok"] and own["why"] == "RuntimeError: CUPTI is missing" and own["ms"] == pytest.approx(20)
    first_hour_report.write(tmp_path, [], [])
    assert "| as the trainer runs it | 20.00 |" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_after_a_lost_device_no_way_is_tried(machine: Machine, tmp_path: Path) -> None:
    def dead() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    def step() -> None:
        machine.synchronize = dead
        dead()

    machine.step = step
    ways = run(tmp_path)
    assert [way["ok"] for way in ways.values()] == [False] * 3 and len(machine.built) == 1
    assert "the device was lost before: CUDA error" in ways["without the graph"]["why"]


@pytest.mark.parametrize(("captured", "memory"), [(True, 6_000_000_000), (False, 4_000_000_000)])
def test_a_captured_row_holds_the_memory_of_its_capture(
    captured: bool, memory: int, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first call records it; later ones only replay."""
    machine.peaks = [6_500_000_000, 4_500_000_000]
    share = dict.fromkeys(rounds.categories.CATEGORIES, 1 / 7)
    taken = rounds.categories.Profile(share, 700, 0)
    monkeypatch.setattr(rounds.categories, "take", lambda *args: taken)
    row = waterfall.Row("any", "fp16", lambda *args: None, captured=captured)  # type: ignore[arg-type,return-value]
    _, found = rounds.prepared(row, waterfall.case("digits", CPU), GPU, 3)
    assert found["memory"] == memory and found["launches"] == 700 and found["start"] >= 0


def test_floors_of_a_gpu_are_its_data_sheets(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    case = waterfall.case("ddpmpp", GPU)
    found = rounds.floor(case, GPU)
    assert found["ms"] == pytest.approx(roofline.floor(roofline.GPUS[2])["step"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Toy")
    assert rounds.floor(case, GPU) == {"ms": None, "what": "none: no data sheet for this device and network"}


def test_rows_on_a_gpu_are_timed_before_a_floor_is_sought(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    news: list[str] = []

    def floor(*args: Any) -> dict[str, Any]:
        assert news[-1] == "round 2 of 2"
        raise OSError("nvcc")

    taken = {"start": 1.0, "launches": 1, "memory": 1, "share": {}}
    monkeypatch.setattr(
        rounds, "prepared", lambda row, case, device, profiled: (waterfall.Runner(row, case, device), taken)
    )
    monkeypatch.setattr(rounds, "floor", floor)
    case = waterfall.case("ddpmpp", GPU)
    found = rounds.Measurement(case, GPU, 2, 60, lambda known, said: news.append(said)).run(None)
    ran = [name for name, row in found["rows"].items() if row["ms"] is not None]
    assert ran == [row.name for row in waterfall.rows(GPU) if "cuda" not in row.not_on] and "+compile" in ran
    assert found["floor"] == {"ms": None, "what": "none: OSError: nvcc"} and found["rounds"] == 2
