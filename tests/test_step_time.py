"""The step-time benchmark: its baseline computes the same update, its rows take turns, its lines and verdicts are right."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import plots
import pytest
import step_time
import torch
from lib import baseline, categories, history, measure, waterfall
from lib.products import Products
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from ect import precision
from ect.assembly import train_step
from ect.config import DataConfig
from ect.config.emas import beta_of
from ect.data import load
from ect.models import EDMPrecond
from ect.objective import ConsistencyObjective
from ect.optim import FlatState
from ect.presets import PRESETS
from tests.tiny import NET

CPU = torch.device("cpu")


def tiny(batch: int = 4) -> waterfall.Case:
    cfg = replace(PRESETS["digits"], batch=batch, net=NET)
    return waterfall.Case("digits", cfg, load(DataConfig()))


def test_the_baselines_updates_are_the_flat_optimizers() -> None:
    """torch.optim.RAdam with cleaned gradients and averaged weights, across the step at which RAdam begins to rectify."""
    nets = [tiny().network(CPU) for _ in range(2)]
    updates = baseline.Updates(list(nets[0].parameters()), lr=1e-2, betas=(0.9, 0.99), ema_beta=0.9)
    state = FlatState(nets[1], "radam", 1e-2, (0.9, 0.99), ema_betas=[0.9])
    generator = torch.Generator().manual_seed(0)
    for i in range(8):
        grads = [torch.randn(p.shape, generator=generator) for p in nets[0].parameters()]
        grads[0].view(-1)[i] = (float("nan"), float("inf"), -float("inf"))[i % 3]
        for p, grad in zip(nets[0].parameters(), grads, strict=True):
            p.grad = grad.clone()
        updates.step()
        state.load_grads(grads)
        state.step()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    for average, q in zip(updates.ema, state.views(state.emas[0]), strict=True):
        torch.testing.assert_close(average, q, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_the_per_parameter_state_trains_as_the_flat_one(name: str) -> None:
    case, half = tiny(), precision.PRECISIONS[name].half
    cfg = replace(case.cfg, precision=name, compile=False, graph=False)  # type: ignore[arg-type]
    nets = [case.network(CPU) for _ in range(2)]
    core = nets[0].half_weights() if half else set()
    optim = cfg.optim
    scale = baseline.LOSS_SCALE if half else None
    state = FlatState(
        nets[0],
        lr=optim.lr,
        betas=optim.betas,
        ema_betas=[beta_of(optim.emas[0])],
        loss_scale=scale,
        half=half,
        core=core,
    )
    state.compute.model.on_ops = True
    own: Any = baseline.ParameterState(
        nets[1], lr=optim.lr, betas=optim.betas, ema_beta=beta_of(optim.emas[0]), half=half, core=core
    )
    steps = [train_step(cfg, s, waterfall._stream(case, CPU)) for s in (state, own)]
    for nimg in (0, 4, 8):
        losses = [float(step(nimg, 0)) for step in steps]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    moved = [p.detach() for p in nets[0].parameters()]
    for p, q, start in zip(moved, nets[1].parameters(), case.network(CPU).parameters(), strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=0, atol=1e-2 * float((p - start.detach()).abs().max()) + 1e-7)


def test_the_plain_steps_teacher_repeats_the_students_dropout() -> None:
    net = baseline.torch_dropout(tiny().network(CPU))
    y, t = torch.randn(4, 1, 8, 8), torch.ones(4)
    with torch.no_grad():
        assert not torch.equal(net(y, t), net(y, t))
        loss = ConsistencyObjective(weighting="uniform").loss(net, y, t, t, torch.zeros_like(y))
    assert torch.equal(loss, torch.zeros(4))


@pytest.mark.slow
def test_the_plain_step_learns() -> None:
    """On one batch with the same draws again and again; fp16 begins at the same loss."""
    losses: dict[bool, list[float]] = {}
    for half in (False, True):
        case = tiny(8)
        step = baseline.PlainStep(
            case.network(CPU), case.objective(), case.dataset.images, batch=8, lr=3e-3, betas=(0.9, 0.99),
            ema_beta=0.9, half=half,
        )  # fmt: skip
        losses[half] = []
        for _ in range(25):
            torch.manual_seed(0)
            losses[half].append(float(step(0, 0)))
        assert losses[half][-1] < 0.7 * losses[half][0]
    assert losses[True][0] == pytest.approx(losses[False][0], rel=1e-3)


NAMES = {
    "void cudnn::ops::nchwToNhwcKernel<__half, __half, float>": "conv",
    "sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x32": "conv",
    "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_f16_s16816wgrad_optimized_f16_128x64>": "conv",
    "ampere_fp16_s16816gemm_fp16_128x64_ldg8_f2f_stages_64x3_nn": "conv",
    "void at::native::RowwiseMomentsCUDAKernel<float>": "norm",
    "group_norm_silu_fwd_kernel<__half, 8>": "norm",
    "residual_group_norm_silu_bwd_kernel": "norm",
    "void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel": "norm",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>": "residual",
    "void at::native::CatArrayBatchedCopy_aligned16_contig<float>": "residual",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>": "attention",
    "fmha_cutlassF_f32_aligned_64x64_rf_sm80": "attention",
    "void at::native::multi_tensor_apply_kernel<TensorListMetadata<2>>": "optimizer",
    "radam_ema_update_kernel": "optimizer",
    "void at::native::vectorized_elementwise_kernel<4, at::native::nan_to_num_kernel_cuda": "optimizer",
    "triton_poi_fused_add_convolution_mul_5": "residual",
    "triton_red_fused_native_group_norm_silu_2": "norm",
    "graph_0_cpp_fused_add_convolution_mul_native_group_norm_silu_21": "norm",
    "aten::mkldnn_convolution": "conv",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
    "aten::native_group_norm_backward": "norm",
    "Memcpy DtoD (Device -> Device)": None,
    "aten::bitwise_and": None,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_kernels_and_operations_have_their_category(name: str) -> None:
    assert categories.category(name) == NAMES[name]


def test_a_profile_puts_time_where_it_is_spent() -> None:
    x, weight = torch.randn(4, 32, 32, 32), torch.randn(32, 32, 3, 3)

    def step() -> None:
        torch.conv2d(x, weight)
        with torch.profiler.record_function("optimizer"):
            for _ in range(300):
                x.add(x)

    step()
    taken = categories.take(step, CPU)
    assert sum(taken.share.values()) == pytest.approx(1)
    assert taken.share["optimizer"] > 0.2 and taken.share["conv"] > 0.01
    assert taken.share["residual"] == 0  # the additions are the optimizer's
    assert 301 <= taken.launches <= 305
    assert 4 * x.numel() <= taken.transient <= 12 * x.numel()


def test_on_a_gpu_kernels_are_classified_and_ranges_are_not_kernels() -> None:
    def event(name: str, microseconds: float, device: DeviceType, annotation: bool = False) -> Any:
        span = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, device_type=device, time_range=span, is_user_annotation=annotation)

    gpu = DeviceType.CUDA
    events = [
        event("aten::convolution", 900.0, DeviceType.CPU), event("whole step", 800.0, gpu, annotation=True),
        event("sm80_xmma_fprop_implicit_gemm", 30.0, gpu), event("Memcpy DtoD", 5.0, gpu),
    ]  # fmt: skip
    assert dict(categories._gpu(events)) == {"conv": 30.0, "other": 5.0}
    assert categories._launches(events, gpu=True) == 2


@pytest.mark.slow
def test_every_row_of_a_gpu_but_compile_and_graph_also_runs_here() -> None:
    """fp16 emulated: what a GPU would run is at least code that runs."""
    names = []
    for row in waterfall.rows(torch.device("cuda")):
        if row.name in ("+compile", "+graph", "trainer's default"):
            continue
        runner = waterfall.Runner(row, tiny(), CPU)
        before = [t.detach().clone() for t in runner.step.tensors()[:1]]
        assert torch.isfinite(runner()) and torch.isfinite(runner())
        assert not torch.equal(before[0], runner.step.tensors()[0].detach())
        assert runner.resident() > 0
        names.append(row.name)
    assert names == ["public", "plain", "+tf32", "+channels-last", "+fp16", "+fused ops", "+flat optimizer"]


def test_products_alone_are_the_steps_arithmetic() -> None:
    runner = waterfall.Runner(waterfall.rows(CPU)[0], tiny(), CPU)
    with FlopCounterMode(display=False) as whole:
        runner()
    products = Products(runner)
    with FlopCounterMode(display=False) as alone:
        products()
    assert alone.get_total_flops() == whole.get_total_flops() > 0


def test_rows_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    now = [0.0]

    def function(name: str, seconds: float) -> Any:
        def run() -> None:
            called.append(name)
            now[0] += seconds

        return run

    monkeypatch.setattr(measure, "clock", lambda device: ("fake", lambda: now[0]))
    times = measure.interleaved({"a": function("a", 0.5), "b": function("b", 0.125)}, CPU, rounds=4, least=0.25)
    assert times["a"] == pytest.approx([0.5] * 4) and times["b"] == pytest.approx([0.125] * 4)
    assert "".join(called[2:]) == "abb" + "bba" + "abb" + "bba"


def line(device: str = "cpu toy", **ms: float) -> dict[str, Any]:
    first = next(iter(ms.values()))
    rows = {name: {"ms": value, "ratio": value / first} for name, value in ms.items()}
    return {"benchmark": "step_time", "device": device, "net": "digits", "batch": 4, "threads": 1, "rows": rows}


def test_regressions_are_ratios_on_a_cpu_and_times_on_a_gpu() -> None:
    old = line(plain=100, best=50)
    assert not list(history.regressions(old, line(plain=200, best=104)))  # a slower machine, a ratio 4 % up
    (found,) = history.regressions(old, line(plain=100, best=54))
    assert "best" in found and "+8 %" in found
    gpu = line("NVIDIA toy", plain=100, best=50)
    assert [text.split(":")[0] for text in history.regressions(gpu, line("NVIDIA toy", plain=110, best=52))] == [
        "digits, plain"
    ]
    absent = copy.deepcopy(old)
    absent["rows"]["best"] = {"ms": None, "why": "not on cpu"}
    assert not list(history.regressions(absent, old)) and not list(history.regressions(old, absent))


def test_the_last_line_of_the_same_case_counts(tmp_path: Path) -> None:
    path = tmp_path / "toy.jsonl"
    assert history.last(path, line(plain=1)) is None
    for value, threads in ((1, 1), (2, 1), (3, 2)):
        history.append(path, {**line(plain=value), "threads": threads})
    history.append(path, {"benchmark": "something else"})
    found = history.last(path, line(plain=9))
    assert found is not None and found["rows"]["plain"]["ms"] == 2
    assert history.last(path, line(public=9, plain=9)) is None  # its ratios are to another row
    history.append(path, line(public=7, plain=3))
    found = history.last(path, line(public=9, plain=9))
    assert found is not None and found["rows"]["public"]["ms"] == 7


def run(tmp_path: Path, *options: str) -> int:
    return step_time.main(
        [
            "--device",
            "cpu",
            "--net",
            "digits",
            "--rounds",
            "1",
            "--rows",
            "+flat optimizer",
            "--results",
            str(tmp_path),
            *options,
        ]
    )


@pytest.mark.slow
def test_records_compares_checks_and_renders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waterfall, "case", lambda net, device, batch: tiny(batch or 4))
    assert run(tmp_path) == 0
    (path,) = tmp_path.iterdir()
    (first,) = history.read(path)
    assert first["rows"]["+graph"] == {"ms": None, "why": "not on cpu"}
    for row in (first["rows"]["public"], first["rows"]["+flat optimizer"]):
        assert row["ms"] > 0 and row["launches"] > 50 and sum(row["share"].values()) == pytest.approx(1)
        assert row["images_per_second"] == pytest.approx(4000 / row["ms"])
        assert row["predicted_minutes"] == pytest.approx(row["sec_per_kimg"] * PRESETS["digits"].total_kimg / 60)
        assert row["memory"] > 4 * 4 * sum(p.numel() for p in tiny().network(CPU).parameters())
    assert first["rows"]["public"]["ratio"] == 1 and "plain" not in first["rows"] and first["floor"]["ms"] > 0
    assert len(first["load"]) == 2 and all(load >= 0 for load in first["load"])
    assert first["commit"] and first["torch"] == torch.__version__ and first["clocks"]

    fast = copy.deepcopy(first)
    fast["rows"]["+flat optimizer"]["ratio"] /= 100
    history.append(path, fast)
    assert run(tmp_path, "--check") == 1
    assert len(history.read(path)) == 2  # what failed the check is not what the next run is compared with
    assert "not on cpu" in capsys.readouterr().out

    text = plots.render(tmp_path).read_text()
    last = history.read(path)[-1]["rows"]
    assert all(f"{last[name]['ms']:.2f}" in text for name in ("public", "+flat optimizer"))
    assert "python benchmarks/step_time.py --net digits" in text
    assert "load average {} before and {} after".format(*history.read(path)[-1]["load"]) in text
    pictures = [tmp_path / name for name in (f"{path.stem}-digits-4.png", f"{path.stem}-digits-4-course.png")]
    assert all(picture.name in text and picture.stat().st_size > 5000 for picture in pictures)


def test_the_legend_hides_no_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plots.plt, "close", figures.append)
    share = dict.fromkeys(categories.CATEGORIES, 1 / len(categories.CATEGORIES))
    row = {"ms": 100.0, "iqr": [90.0, 110.0], "ratio": 1.0, "share": share}
    recorded = {
        **line(plain=1), "rows": dict.fromkeys(("plain", "+compile", "trainer's default"), row), "clock": "CPU time",
        "floor": {"ms": 40.0}, "commit": "abc", "time": "2000-01-01",
    }  # fmt: skip
    plots.waterfall(recorded, tmp_path / "bars.png")
    plots.course([recorded, {**recorded, "commit": "abc-dirty"}], tmp_path / "course.png")
    assert [label.get_text() for label in figures[1].axes[0].get_xticklabels()] == [
        "abc\n2000-01-01", "abc\nchanged\n2000-01-01"
    ]  # fmt: skip
    for figure in figures:
        figure.canvas.draw()
        ((legend,), (axes,)) = figure.legends, figure.axes
        assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    assert len(figures) == 2


def test_an_unknown_row_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step_time.main(["--device", "cpu", "--rows", "+magic"])
    assert "'+magic'" in capsys.readouterr().err


def test_lines_are_json_and_slugs_are_file_names() -> None:
    assert json.loads(json.dumps(measure.machine(CPU)))["device"].startswith("cpu")
    assert measure.slug("cpu Intel(R) Xeon(R) Processor") == "cpu-intel-xeon-processor"
    assert measure.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


@pytest.mark.slow
@pytest.mark.usefixtures("pytorch_ops")  # on the ops a step calls the U-Net itself
def test_the_teachers_cost_compares_its_two_passes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    passes = set()
    forward = EDMPrecond.forward

    def spy(net: EDMPrecond, *args: Any, **options: Any) -> Tensor:
        passes.add((net, torch.is_grad_enabled()))
        return forward(net, *args, **options)

    monkeypatch.setattr(EDMPrecond, "forward", spy)
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: None)  # a minute each
    assert step_time.main(["--device", "cpu", "--net", "digits", "--batch", "2", "--rounds", "2", "--teacher"]) == 0
    assert "ms under no_grad;" in capsys.readouterr().out.replace("\n", " ")
    grad = {net: {g for n, g in passes if n is net} for net, _ in passes}
    assert sorted(map(len, grad.values())) == [1, 2]  # one network ran under no_grad too
