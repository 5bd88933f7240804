"""The same maths on a CUDA device. Each test names its twin, which runs without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ect.assembly import flat_state, network_spec
from ect.config import Config, DataConfig, OptimConfig
from ect.data import ImageStream, load
from ect.models import build
from ect.objective import ConsistencyObjective, DiffusionObjective, Objective
from ect.optim import FlatState
from ect.precision import PRECISIONS, apply, products
from ect.sampler import consistency_sample, heun_sample
from ect.step import TrainStep
from tests.tiny import NET, config, run

STEP, CAPTURE = "tests/test_step.py::", "tests/test_capture.py::"


def train(device: str, objective: Objective, precision: str = "fp32", **options: Any) -> tuple[list[float], FlatState]:
    torch.manual_seed(0)
    apply(PRECISIONS[precision])
    data = load(DataConfig(labels=True))
    net = build(network_spec(replace(NET, label_dropout=0.2), "ECMPrecond", data, 9)).to(device).train()
    cfg = Config(precision=precision, batch=16, optim=OptimConfig(lr=1e-3, emas=(".9",)))  # type: ignore[arg-type]
    state = flat_state(cfg, net)
    stream = ImageStream(data, 1, device, 16)
    step = TrainStep(objective, state, stream, **{"seed": 1, "batch": 16, "xflip": True, "augment": 0.3, **options})
    return [float(step(16 * i, i)) for i in range(8)], state


@pytest.mark.gpu(twin=CAPTURE + "test_an_update_can_be_captured")
@pytest.mark.parametrize("options", [{"compiled": True}, {"graph": True}, {"compiled": True, "graph": True}])
@pytest.mark.parametrize("augment", [0.0, 0.3])
@pytest.mark.parametrize("objective", [ConsistencyObjective(), DiffusionObjective()])
def test_compiled_and_captured_steps_equal_the_eager_one(objective: Objective, augment: float, options: dict) -> None:
    (want, a), (got, b) = (train("cuda", objective, augment=augment, **o) for o in ({}, options))
    assert got == pytest.approx(want, rel=1e-5 if "compiled" in options else 0)
    torch.testing.assert_close(b.params, a.params, rtol=1e-3, atol=1e-4 if "compiled" in options else 0)


@pytest.mark.gpu(twin=STEP + "test_a_half_precision_step_follows_fp32")
@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16"])
def test_every_precision_follows_fp32(precision: str) -> None:
    (want, _), (got, state) = (train("cuda", ConsistencyObjective(), p, augment=0.0) for p in ("fp32", precision))
    assert got == pytest.approx(want, rel=0.05)
    assert got != want or (precision == "tf32" and products(torch.device("cuda")) == "fp32")  # too old a GPU for TF32
    assert int(state.skipped) < 8 and state.params.isfinite().all()


@pytest.mark.gpu(twin=CAPTURE + "test_an_update_can_be_captured")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_captured_step_moves_with_stage_learning_rate_and_data(dtype: torch.dtype) -> None:
    name = "fp16" if dtype == torch.float16 else "fp32"
    _, state = train("cuda", ConsistencyObjective(), name, augment=0.0, graph=True)
    _, want = train("cuda", ConsistencyObjective(), name, augment=0.0)
    assert torch.equal(state.params, want.params) and torch.equal(state.emas[0], want.emas[0])


@pytest.mark.gpu(twin=STEP + "test_the_fused_step_equals_the_readable_one")
@pytest.mark.parametrize("objective", [ConsistencyObjective(), DiffusionObjective()])
def test_training_follows_the_cpu(objective: Objective) -> None:
    (cpu, a), (gpu, b) = train("cpu", objective), train("cuda", objective)
    assert gpu == pytest.approx(cpu, rel=1e-3)
    torch.testing.assert_close(b.emas[0].cpu(), a.emas[0], rtol=1e-2, atol=1e-3)


@pytest.mark.gpu(twin="tests/test_sampler.py::test_consistency_sampler_matches_golden")
def test_samplers_follow_the_cpu() -> None:
    net = build(network_spec(NET, "ECMPrecond", load(DataConfig()), 0)).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    z, noise = torch.randn(4, 1, 8, 8), torch.randn(1, 4, 1, 8, 8)
    want = consistency_sample(net, z, [80, 0.8], noise), heun_sample(net, z, 5)
    net.cuda()
    got = consistency_sample(net, z.cuda(), [80, 0.8], noise.cuda()), heun_sample(net, z.cuda(), 5)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu(twin=STEP + "test_student_and_teacher_share_the_mask_and_agree_at_r_equal_t")
def test_the_loss_shares_the_devices_dropout_mask() -> None:
    net = build(network_spec(replace(NET, dropout=0.4), "ECMPrecond", load(DataConfig()), 0)).cuda().train()
    y, t = torch.randn(4, 1, 8, 8, device="cuda"), torch.rand(4, device="cuda") + 0.1
    objective = ConsistencyObjective(weighting="uniform")
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    assert (objective.loss(net, y, t, t, torch.randn_like(y)) == 0).all()


@pytest.mark.gpu(twin="tests/test_job.py::test_a_run_leaves_its_files")
def test_a_whole_job_runs(tmp_path: Path) -> None:
    pytest.importorskip("tyro")  # the command line, which a job reads and writes its configuration with
    run(config(device="cuda"), tmp_path / "run")
