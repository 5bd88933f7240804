"""The same maths on a CUDA device. The CPU twins are in test_step, test_objective, test_models and test_augment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ect.config import DataConfig
from ect.data import ImageStream, load
from ect.models import build
from ect.objective import ConsistencyObjective, DiffusionObjective, Objective
from ect.optim import FlatState
from ect.sampler import consistency_sample, heun_sample
from ect.step import TrainStep
from ect.trainer import network_spec
from tests.tiny import NET, config, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def train(device: str, objective: Objective) -> tuple[list[float], FlatState]:
    torch.manual_seed(0)
    data = load(DataConfig(labels=True))
    net = build(network_spec(replace(NET, label_dropout=0.2), "ECMPrecond", data, 9)).to(device).train()
    state = FlatState(net, lr=1e-3, ema_betas=[0.9])
    step = TrainStep(net, objective, state, ImageStream(data, 1, device), seed=1, batch=16, xflip=True, augment=0.3)
    return [float(step(16 * i, i)) for i in range(8)], state


@pytest.mark.parametrize("objective", [ConsistencyObjective(), DiffusionObjective()])
def test_training_follows_the_cpu(objective: Objective) -> None:
    (cpu, a), (gpu, b) = train("cpu", objective), train("cuda", objective)
    assert gpu == pytest.approx(cpu, rel=1e-3)
    torch.testing.assert_close(b.emas[0].cpu(), a.emas[0], rtol=1e-2, atol=1e-3)


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


def test_the_loss_shares_the_devices_dropout_mask() -> None:
    net = build(network_spec(replace(NET, dropout=0.4), "ECMPrecond", load(DataConfig()), 0)).cuda().train()
    y, t = torch.randn(4, 1, 8, 8, device="cuda"), torch.rand(4, device="cuda") + 0.1
    objective = ConsistencyObjective(weighting="uniform")
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    assert (objective.loss(net, y, t, t, torch.randn_like(y)) == 0).all()


def test_a_whole_job_runs(tmp_path: Path) -> None:
    run(config(device="cuda"), tmp_path / "run")
