"""The roofline: counted work against the literature and against hand counts, floors against their definition."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import roofline
import torch
import torch.nn.functional as F
from lib import instructions, work

from ect.cost.trace import trace

HALF = torch.float16
TOY = roofline.Gpu(
    "toy", fp16=2.0, tf32=1.0, fp32=0.5, bandwidth=1000, sheet="", pattern="", arch=80, sms=10, clock=2.0
)


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Instructions as if they had been counted: about what sm_80 takes, with no compiler."""
    of_op = dict.fromkeys(instructions.OPS, 200.0)
    for op, computes in (
        ("group_norm_silu", False),
        ("residual_group_norm_silu", False),
        ("residual_group_norm_silu", True),
    ):
        for drops in (False, True):
            of_op[instructions.norm(op, False, drops, computes)] = 300.0
            of_op[instructions.norm(op, True, drops)] = 500.0
    monkeypatch.setattr(instructions, "counts", lambda arch: {16: of_op, 32: of_op})
    return of_op


@pytest.fixture(scope="module")
def items() -> tuple[work.Work, ...]:
    return work.ddpmpp_step(roofline.BATCH, HALF)


def test_counted_flops_are_the_literatures(items: tuple[work.Work, ...]) -> None:
    """DDPM++ takes 42.38 GFLOP an image forward, 30.49 / 9.56 / 2.32 by level, and 21.70 TFLOP a step of 128."""
    forward = work.forward(work.network(work.ddpmpp_spec(), HALF), 2)
    assert sum(w.flops for w in forward) / 2 == pytest.approx(42.38e9, rel=2e-4)
    assert sum(w.flops for w in items) == pytest.approx(21.70e12, rel=2e-4)
    for level, expected in (("32x32", 30.49e9), ("16x16", 9.56e9), ("8x8", 2.32e9)):
        found = sum(w.flops for w in forward if w.level == level) / 2
        assert found == pytest.approx(expected, rel=3e-3), level


def test_a_step_is_two_passes_forward_and_the_arithmetic_of_two_backward(items: tuple[work.Work, ...]) -> None:
    student = sum(w.flops for w in items if not w.backward)
    assert sum(w.flops for w in items if w.backward) == pytest.approx(student, rel=1e-3)


@pytest.mark.slow
def test_work_does_not_depend_on_the_precision_but_its_bytes_do(items: tuple[work.Work, ...]) -> None:
    wide = work.ddpmpp_step(roofline.BATCH, None)
    assert sum(w.flops for w in wide) == pytest.approx(sum(w.flops for w in items), rel=1e-6)
    for kind in ("norm", "residual"):
        narrow, full = (sum(w.bytes for w in part if w.kind == kind) for part in (items, wide))
        assert 1.85 < full / narrow < 2.01, kind
    assert sum(w.flops for w in items if w.dtype == torch.float32) < 0.01 * sum(w.flops for w in items)


def test_a_convolution_by_hand() -> None:
    n, c, k, side = 4, 16, 8, 32
    x = torch.empty(n, c, side, side, device="meta", dtype=HALF, requires_grad=True)
    weight = torch.empty(k, c, 3, 3, device="meta", dtype=HALF, requires_grad=True)

    def run() -> None:
        y = F.conv2d(x, weight, padding=1)
        torch.autograd.grad(y, [x, weight], torch.empty_like(y))

    found = work.Counter(n, side).of(trace(run))
    x_bytes, w_bytes, y_bytes = 2 * n * c * side**2, 2 * k * c * 9, 2 * n * k * side**2
    assert [w.flops for w in found] == [2 * n * k * c * 9 * side**2] * 3
    assert [w.bytes for w in found] == [x_bytes + w_bytes + y_bytes] * 3
    assert {w.level for w in found} == {"32x32"}
    assert {w.kind for w in found} == {"conv"}


def test_norm_and_residual_bytes_by_hand() -> None:
    from ect_kernels.residual_group_norm_silu import residual_group_norm_silu

    n, c, side = 4, 32, 32
    a, skip = (torch.empty(n, side, side, c, device="meta", dtype=HALF).permute(0, 3, 1, 2) for _ in range(2))
    gamma, beta = torch.empty(2, c, device="meta")
    events = trace(lambda: residual_group_norm_silu(a, gamma, beta, 8, 1e-6, skip=skip, skip_scale=0.5))
    found = work.Counter(n, side).of(events)
    image = 2 * n * c * side**2
    assert {w.kind: w.bytes for w in found if w.kind == "norm"} == {"norm": 2 * image}
    (rest,) = [w.bytes for w in found if w.kind == "residual"]
    assert 2 * image <= rest < 2 * image + 4000  # a and skip, and vectors


def test_a_floor_is_the_longer_of_arithmetic_and_traffic() -> None:
    item = work.Work("8x8", "conv", flops=4e12, bytes=1e12, dtype=HALF, backward=False)
    assert roofline.milliseconds(item, TOY, "fp16") == pytest.approx(2000)
    fp32 = work.Work("8x8", "conv", flops=4e12, bytes=1e12, dtype=torch.float32, backward=False)
    assert roofline.milliseconds(fp32, TOY, "tf32") == pytest.approx(4000)
    assert roofline.milliseconds(fp32, TOY, "fp16") == pytest.approx(8000)
    bound = work.Work("8x8", "norm", flops=0, bytes=3e12, dtype=None, backward=False)
    assert roofline.milliseconds(bound, TOY, "fp16") == pytest.approx(3000)


def norm_of(gigabytes: float, rows: float) -> work.Work:
    kernel = instructions.norm("group_norm_silu", False, True)
    return work.Work("8x8", "norm", 0.0, gigabytes * 1e9, None, False, kernel, rows, 16)


def test_a_kernel_of_ours_takes_the_longer_of_traffic_and_issue(counted: dict[str, float]) -> None:
    item = norm_of(1.0, 3.2e8)  # 1 ms; 1e7 rows a lane of a warp's 32, 300 instructions each, 10 SMs x 4 slots x 2 GHz
    assert roofline.limits(item, TOY, "fp16") == pytest.approx({"arithmetic": 0, "DRAM": 1.0, "issue": 37.5})
    assert roofline.milliseconds(item, TOY, "fp16") == pytest.approx(37.5)
    assert roofline.milliseconds(norm_of(100.0, 3.2e8), TOY, "fp16") == pytest.approx(100)
    counted[item.kernel] *= 2
    assert roofline.milliseconds(item, TOY, "fp16") == pytest.approx(75)  # bound by its instructions
    assert roofline.milliseconds(norm_of(100.0, 3.2e8), TOY, "fp16") == pytest.approx(100)  # bound by DRAM


def test_more_instructions_never_shorten_a_step(counted: dict[str, float]) -> None:
    gpu = roofline.GPUS[3]
    before = roofline.floor(gpu)
    for kernel in counted:
        counted[kernel] *= 2
    after = roofline.floor(gpu)
    assert after["norm"] > 1.3 * before["norm"] and after["step"] > before["step"]
    assert {kind: after[kind] for kind in ("conv", "attention")} == {
        kind: before[kind] for kind in ("conv", "attention")
    }


def test_without_a_compiler_the_table_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_issue = roofline.floor(roofline.GPUS[3])["norm"]
    monkeypatch.setattr(instructions, "counts", lambda arch: None)
    assert roofline.limits(norm_of(1.0, 3.2e8), TOY, "fp16") == pytest.approx({"arithmetic": 0, "DRAM": 1.0})
    assert roofline.floor(roofline.GPUS[3])["norm"] < with_issue
    assert roofline.main([]) == 0
    printed = capsys.readouterr().out
    assert "NOT counted" in printed and "issue slots" not in printed


def test_one_architecture_that_cannot_be_counted_costs_its_own_figures_alone(
    monkeypatch: pytest.MonkeyPatch, counted: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(instructions, "counts", lambda arch: None if arch == 100 else {16: counted, 32: counted})
    assert roofline.main([]) == 0
    printed = capsys.readouterr().out
    assert "> ?" in printed and "issue slots" in printed


def test_work_knows_the_kernels_and_their_rows(items: tuple[work.Work, ...], counted: dict[str, float]) -> None:
    """Every norm of a step has a count; a residual norm's rows, shared out over its two parts, are those of its tensor."""
    assert {w.kernel for w in items if w.kind in ("norm", "residual", "optimizer")} <= counted.keys()
    assert {"perturb", "consistency_loss"} <= {w.kernel for w in items}
    first = next(w for w in items if w.kernel == "group_norm_silu_fwd dropout")
    assert (first.rows, first.bits) == (128 * 256 * 32 * 32 / 8, 16)
    computed = [w for w in items if w.kernel == "residual_group_norm_silu_fwd computed"][:2]
    assert {w.kind for w in computed} == {"norm", "residual"}
    assert sum(w.rows for w in computed) == pytest.approx(first.rows / 2)  # the first block has 128 channels


@pytest.mark.parametrize("gpu", roofline.GPUS, ids=lambda gpu: gpu.name)
def test_floors_add_up_and_respect_the_arithmetic(gpu: roofline.Gpu, items: tuple[work.Work, ...]) -> None:
    floor = roofline.floor(gpu)
    step = floor.pop("step")
    assert step == pytest.approx(sum(floor.values()))
    assert set(floor) == set(roofline.KINDS) and all(ms > 0 for ms in floor.values())
    assert step > sum(w.flops for w in items) / gpu.fp16 / 1e9
    assert step > sum(w.bytes for w in items if not w.flops) / gpu.bandwidth / 1e6
    assert roofline.floor(gpu, "tf32")["conv"] > floor["conv"]


def test_devices_are_known_by_torchs_names() -> None:
    names = {
        "NVIDIA A100-SXM4-40GB": "A100-40", "NVIDIA A100-SXM4-80GB": "A100-80", "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA H200": "H200", "NVIDIA GeForce RTX 4090": "RTX 4090", "NVIDIA B200": "B200",
    }  # fmt: skip
    assert {name: gpu.name for name in names if (gpu := roofline.known(name))} == names
    assert roofline.known("NVIDIA H100 PCIe") is None  # slower than the data sheet used here
    assert roofline.known("NVIDIA GeForce RTX 4090 Laptop GPU") is None


@pytest.mark.parametrize(
    "name", ["NVIDIA H200 NVL", "NVIDIA GB200", "NVIDIA A100 80GB PCIe", "NVIDIA GeForce RTX 4090 D"]
)
def test_slower_and_faster_namesakes_have_no_sheet(name: str) -> None:
    assert roofline.known(name) is None


@pytest.mark.parametrize("gpu", roofline.GPUS, ids=lambda gpu: gpu.name)
def test_rates_are_dense(gpu: roofline.Gpu) -> None:
    """Twice as many half-precision products as TF32 ones, on every one of these; a figure with sparsity breaks the ratio."""
    assert gpu.fp16 == pytest.approx(2 * gpu.tf32)
    dense = {"A100-40": 312, "A100-80": 312, "H100": 989.4, "H200": 989.4, "RTX 4090": 165.2, "B200": 2250}
    assert gpu.fp16 == dense[gpu.name]


@pytest.mark.parametrize("gpu", roofline.GPUS, ids=lambda gpu: gpu.name)
def test_sms_and_clocks_agree_with_the_fp32_rate(gpu: roofline.Gpu) -> None:
    """Two FLOPs a lane and clock; A100 has 64 fp32 lanes an SM, the later ones 128."""
    lanes = 64 if gpu.arch == 80 else 128
    assert 2 * gpu.sms * lanes * gpu.clock / 1e3 == pytest.approx(gpu.fp32, rel=0.01)


def test_prints_measured_over_floor_of_a_results_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"plain": {"ms": 300.0}, "+graph": {"ms": 150.0}, "+fp16": {"ms": None, "why": "out of memory"}}
    line = {"benchmark": "step_time", "device": "toy", "net": "ddpmpp", "rows": rows}
    path = tmp_path / "toy.jsonl"
    path.write_text(json.dumps({**line, "floor": {"ms": 75.0, "what": "predicted"}}) + "\n")
    assert roofline.main(["--results", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "4.00" in printed and "2.00" in printed and "predicted" in printed
    with pytest.raises(SystemExit):
        roofline.main(["--results", str(tmp_path / "missing.jsonl")])
    assert "missing.jsonl" in capsys.readouterr().err


def test_the_table_labels_itself_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main([]) == 0
    printed = capsys.readouterr().out
    assert "predicted floor" in printed and "Predicted, not measured" in printed and "issue slots" in printed
    assert all(gpu.name in printed for gpu in roofline.GPUS)
