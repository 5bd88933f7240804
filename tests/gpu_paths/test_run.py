"""What a run does on a GPU beside its steps, on one that is not there: samples, evaluation, checkpoints, resume, notes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from ect_kernels import dispatch
from torch import Tensor

from ect.config import OptimConfig
from ect.cost.signal_noise import signal_noise
from ect.data import load
from ect.files.kept import averages
from ect.files.run_folder import resolved
from ect.metrics import Evaluator, quality_rows
from ect.metrics.evaluator import Column
from ect.sampler import Consistency, Heun, Sampler, consistency_samplers, generate
from ect.trainer import Trainer
from tests.gpu_paths import cases
from tests.gpu_paths.fake_gpu import GPUS, FakeGpu
from tests.gpu_paths.pairwise import Case, cover, name
from tests.tiny import config, run

pytestmark = pytest.mark.slow

SAMPLING = {
    "arch": ["ddpmpp", "ncsnpp", "adm", "edm2-narrow"],
    "labels": [False, True],
    "sampler": ["one step", "two steps", "heun"],
    "gpu": ["T4", "H100"],
}
SAMPLERS: dict[str, Sampler] = {
    "one step": Consistency((80.0,)),
    "two steps": Consistency((80.0, 0.8)),
    "heun": Heun(3),
}


@pytest.mark.parametrize("case", [pytest.param(case, id=name(case)) for case in cover(SAMPLING)])
def test_sampling_waits_for_the_device_once_a_batch(case: Case) -> None:
    with FakeGpu(GPUS[case["gpu"]], archs=cases.BUILT) as gpu:
        data = cases.dataset(case["labels"])
        net = cases.network(cases.configuration(**case), data).eval()
        with gpu.watch() as events:
            images = torch.cat(list(generate(net, range(5), SAMPLERS[case["sampler"]], batch=3, device="cuda")))
        assert images.shape == (5, 16, 16, 3) and images.dtype == torch.uint8 and (images == 1).all()
        found = {event.kind for event in events}
        assert found <= {"host work", "host copy", "host data"}, events  # latents and classes come from the host
        back = [e for e in events if e.kind == "host copy" and "cuda" in e.what]
        assert len(back) == 2, back  # of two batches


class Counting(Evaluator):
    """Rates by counting."""

    columns = (Column("images"),)

    def evaluate(self, images: Iterable[Tensor]) -> dict[str, float]:
        made = list(images)
        assert all(some.device.type == "cpu" for some in made)
        return {"images": float(sum(map(len, made)))}


def test_a_quality_table_is_made_on_the_device() -> None:
    with FakeGpu(GPUS["A100"], archs=cases.BUILT):
        net = cases.network(cases.configuration(), cases.dataset()).eval()
        samplers = [*consistency_samplers([0.8]), Heun(2)]
        rows = quality_rows(net, Counting(), samplers, samples=5, batch=4, device="cuda")
    assert [row.mean("images") for row in rows] == [5.0] * 3


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32", "fp32"])
def test_the_noise_on_the_signal_is_measured_on_the_device(precision: str, labels: bool) -> None:
    with FakeGpu(GPUS["RTX 3090"], archs=cases.BUILT) as gpu:
        data = cases.dataset(labels)
        net = cases.network(cases.configuration(precision=precision, labels=labels), data)
        images, classes = data.images.cuda(), None if data.labels is None else data.labels.cuda()
        with gpu.watch() as events:
            found = signal_noise(net, precision, images, classes, levels=(0.1, 3.0))
        assert list(found) == [0.1, 3.0]
        assert "mixed devices" not in {event.kind for event in events}, events


@pytest.fixture
def one_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise on the signal, which a run in half precision notes, at one level: the others would take the same way."""
    monkeypatch.setattr("ect.cost.signal_noise.signal_noise", partial(signal_noise, levels=(1.0,)))


@pytest.mark.slow
@pytest.mark.usefixtures("one_level")
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_run_writes_checkpoints_and_resumes(precision: str, tmp_path: Path) -> None:
    switches = {"compile": False, "self_check": False}  # no value can be compared here
    optim = OptimConfig(emas=(".9", "rel:.05", "rel:.1", "rel:.2"))
    log = replace(config().log, averages_kimg=0.016)
    cfg = config(device="cuda", precision=precision, total_kimg=0.024, optim=optim, log=log, **switches)

    with FakeGpu(GPUS["RTX 4090"], archs=cases.BUILT) as gpu:
        first = run(cfg, tmp_path / "run")
        assert gpu.launches["radam_ema_fwd"] >= 2
        gpu.launches.clear()
        run(replace(cfg, total_kimg=0.032, resume=tmp_path / "run"), tmp_path / "run")
        assert gpu.launches["radam_ema_fwd"] >= 1
        assert len(averages(tmp_path / "run")) == 3 * len({16, 24, 32})
        assert first is not None and "mixed devices" not in {event.kind for event in gpu.events}


@pytest.mark.slow
def test_a_run_goes_on_whatever_its_check_finds(tmp_path: Path) -> None:
    """Here every comparison fails, so that each op is left with its last backend: the others are tried, none is needed."""
    switches = {"compile": False, "graph": True, "total_kimg": 0.024, "optim": OptimConfig()}
    try:
        with FakeGpu(GPUS["H100"], archs=cases.BUILT) as gpu:
            job = run(config(device="cuda", precision="fp32", **switches), tmp_path / "run")
            ops = {"group_norm_silu", "residual_group_norm_silu", "levels", "perturb", "consistency_loss", "radam_ema"}
            assert gpu.launches == dict.fromkeys([f"{op}_fwd" for op in ops], 1)
    finally:
        dispatch.clear_refused()
    found = resolved(tmp_path / "run")
    assert {found["kernels"][op] for op in ops} == {"reference"}
    assert {f"{op}=cuda" for op in ops} <= found["refused"].keys()
    assert sum("cuda failed and is not used" in line for line in job.checked) == len(ops), job.checked


@pytest.mark.usefixtures("one_level")
def test_the_self_check_walks_every_op_and_the_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are what a fake device has not: the verdicts are given here, what leads to them is real."""
    cfg = config(device="cuda", precision="fp16", compile=False, total_kimg=0.008)
    judged: list[str] = []
    monkeypatch.setattr("ect_kernels.check._difference", lambda name, call, *results: judged.append(call.function))
    monkeypatch.setattr("ect_kernels.check.alive", lambda device: True)
    with FakeGpu(GPUS["RTX 4090"], archs=cases.BUILT) as gpu:
        trainer = Trainer(cfg, tmp_path, load(cfg.data), torch.device("cuda"))
        assert "mixed devices" not in {event.kind for event in gpu.events}
        assert trainer.step.wants_graph and len(trainer.step.graphs) == 1
    norms = {f"{op}{way}" for op in ("group_norm_silu", "residual_group_norm_silu") for way in ("", "_bwd")}
    assert set(judged) == norms | {"levels", "perturb", "consistency_loss", "radam_ema"}
    assert trainer.checked[1] == "self-check: the replayed step equals the launched one bit for bit"
