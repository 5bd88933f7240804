"""Memory predicted before a run, and the batch per device that follows from it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ect_kernels import dispatch

from ect.assembly import network_spec
from ect.config import Config, DataConfig
from ect.cost.memory import GB, Prediction, available, fit, predict
from ect.data import Dataset, load
from ect.data.readers import space
from ect.errors import UserError
from ect.models import build
from ect.presets import PRESETS
from tests.tiny import NET

CIFAR10 = Dataset("cifar10", torch.empty(50_000, 32, 32, 3, dtype=torch.uint8, device="meta"), None)
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def of(cfg: Config, images: int, device: torch.device = CUDA, dataset: Dataset = CIFAR10) -> Prediction:
    return predict(cfg, network_spec(cfg.net, "ECMPrecond", dataset, 0), dataset, device, images)


@pytest.mark.slow
def test_the_1_hour_recipe_fits_a_24_gb_card(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = PRESETS["cifar10-1h"]
    prediction = of(cfg, cfg.batch)
    with capsys.disabled():
        print(f"\ncifar10-1h, fp16: {prediction}")
    assert prediction.total < 24 * GB
    assert prediction.state > 6 * 4 * 55.7e6  # parameters, gradients, two moments, two averages


@pytest.mark.slow
def test_memory_grows_with_batch_precision_and_graph() -> None:
    cfg = PRESETS["cifar10-1h"]
    small, whole, wide = of(cfg, 32), of(cfg, 128), of(replace(cfg, precision="tf32"), 128)
    assert whole.state - small.state < 10_000  # the numbers of a batch's images
    assert 3 < whole.update / small.update < 4.2
    assert 1.7 < wide.update / whole.update < 2.1
    eager = of(replace(cfg, graph=False), 128)
    assert eager.total == whole.total - whole.between


@pytest.mark.slow
def test_auto_takes_the_largest_divisor_that_fits() -> None:
    data, cfg = load(DataConfig()), Config(batch=12, net=NET)
    spec = network_spec(cfg.net, "ECMPrecond", data, 0)
    needs = {n: predict(cfg, spec, data, CUDA, n).total for n in (1, 2, 3, 4, 6, 12)}
    assert sorted(set(needs.values())) == list(needs.values())
    for n, size in needs.items():
        assert fit(cfg, spec, data, CUDA, size).batch_per_device == n
    assert fit(cfg, spec, data, CUDA, needs[4], world_size=2).batch_per_device == 3
    with pytest.raises(UserError, match=r"--batch-per-device auto: .* one image at a time needs .*--device"):
        fit(cfg, spec, data, CUDA, needs[1] - 1)


def test_a_prediction_leaves_the_choice_of_kernels_as_it_was() -> None:
    dispatch.set_choice("perturb=reference")
    of(Config(batch=4, net=NET), 4, CPU, load(DataConfig()))
    assert dispatch.requested("perturb") == "reference" and dispatch.requested("radam_ema") is None
    dispatch.set_choice(None)


def test_free_memory_is_the_containers_where_that_is_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "CGROUP", tmp_path)
    monkeypatch.setattr(space, "MEMORY_INFO", tmp_path / "meminfo")
    with pytest.raises(UserError, match="give a number"):
        available(CPU)
    (tmp_path / "meminfo").write_text("MemTotal: 2000 kB\nMemAvailable:    1000 kB\n")
    assert available(CPU) == 1000 * 1024
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert available(CPU) == 1000 * 1024
    (tmp_path / "memory.max").write_text("5000\n")
    assert available(CPU) == 4000


TRAIN = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from ect.cost import memory
from ect.models import build
from ect.presets import PRESETS
from ect.data import load
from ect.show.log import RunLog
from ect.trainer import Trainer
from tests.tiny import NET
batch, compiled = int(sys.argv[1]), sys.argv[2] == "compiled"
cfg = replace(PRESETS["digits"], batch=batch, total_kimg=3 * batch / 1000, compile=compiled)
if compiled:
    cfg = replace(cfg, net=NET)  # compiles sooner
torch.set_num_threads(1)
trainer = Trainer(cfg, Path(), load(cfg.data), torch.device("cpu"))
with RunLog(Path(), trainer.total_img, quiet=True) as log:
    trainer.run(log)
print(memory.plan(cfg, trainer.spec, trainer.dataset, trainer.device).total)
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak of a process where Linux has it")
@pytest.mark.parametrize(("batch", "mode"), [(64, "eager"), (1024, "eager"), (64, "compiled")])
def test_a_process_on_a_cpu_takes_what_was_predicted(batch: int, mode: str, tmp_path: Path) -> None:
    """Not by ru_maxrss, in which a process inherits the peak of the one that started it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # processes beside this one, whose memory is not counted
    command = [sys.executable, "-c", TRAIN, str(batch), mode]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    predicted, peak = done.stdout.splitlines()[-2:]
    assert 0.85 < int(predicted) / (int(peak.split()[1]) * 1024) < 2  # torch without CUDA is smaller by half


def test_every_average_counts_in_the_state_and_in_a_checkpoint() -> None:
    """As many bytes as the parameters each; in a checkpoint twice, in its training state and in its model file."""
    data, cfg = load(DataConfig()), Config(batch=4, net=NET, eval=replace(Config().eval, samples=0))
    few, many = (
        of(replace(cfg, optim=replace(cfg.optim, emas=emas)), 4, CPU, data)
        for emas in ((".9",), (".9", "rel:.05", "rel:.1", "rel:.2"))
    )
    with torch.device("meta"):
        net = build(network_spec(cfg.net, "ECMPrecond", data, 0))
    size = sum(-(-p.numel() // 8) * 8 * 4 for p in net.parameters())
    assert many.state - few.state == pytest.approx(3 * size, rel=0.1)
    assert many.between >= 12 * size
