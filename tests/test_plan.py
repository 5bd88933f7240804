"""--plan: what it counts is what torch counts, what it predicts follows from data sheets, and nothing need be there."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from ect.assembly import network_spec
from ect.config import Config, DataConfig
from ect.cost import memory, plan
from ect.cost.flops import flops
from ect.cost.gpus import GPUS
from ect.data import Dataset, load
from ect.errors import UserError
from ect.models import build
from ect.options import parse
from ect.presets import PRESETS, SHAPES
from ect.train import main
from tests.tiny import config, run

GPU = GPUS[0]


def shown(cfg: Config) -> str:
    with (console := Console(width=200, no_color=True)).capture() as captured:
        plan.show(cfg, console)
    return captured.get()


def phase(cfg: Config) -> plan.Phase:
    (found,) = plan._phases(cfg, plan._dataset(cfg))
    return found


def test_the_flops_are_those_that_torch_counts() -> None:
    """An update is a forward and a backward pass at t, and a forward pass at r."""
    cfg = config()
    found = phase(cfg)
    with torch.device("meta"):
        net = build(network_spec(cfg.net, "ECMPrecond", load(cfg.data), 0))
        x = torch.empty(cfg.batch, 1, 8, 8)
    net.model.on_ops = True
    with FlopCounterMode(display=False) as counter:
        out = net(x, x[:, 0, 0, 0])
    assert found.forward * cfg.batch == counter.get_total_flops()
    with counter:
        out.sum().backward()
    passes = 2 * found.forward * cfg.batch + counter.get_total_flops()
    assert passes <= sum(map(flops, found.events)) <= 1.05 * passes
    assert found.steps == 10 and found.parameters == sum(p.numel() for p in net.parameters())


def test_hours_follow_from_the_data_sheet() -> None:
    found = phase(config(precision="fp16"))
    count = sum(map(flops, found.events))
    halves = sum(flops(e) for e in found.events if any(t.dtype == torch.float16 for t in e.inputs))
    assert 0 < halves < count
    seconds = (halves / (GPU.fp16 * 1e12) + (count - halves) / (GPU.fp32 * 1e12)) / 0.4
    assert found.hours(GPU, 0.4) == pytest.approx(seconds * 10 / 3600)
    # A small network is bound by memory traffic: the floor is above its FLOPs at the peak.
    assert found.hours(GPU) > found.hours(GPU, 1.0)
    faster = replace(GPU, bandwidth=1e9)
    assert found.hours(faster) == pytest.approx(found.hours(GPU, 1.0))


@pytest.mark.slow
def test_both_phases_of_a_run_are_planned_and_the_page_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--plan"]) == 0
    said = capsys.readouterr().out
    assert "digits: 1,797 images, 8x8 grey" in said
    for name in ("pretraining", "tuning", *(gpu.name for gpu in GPUS)):
        assert re.search(rf"│ {re.escape(name)} ", said)
    assert "Nothing of this is measured." in said.replace("\n", " ")


@pytest.mark.slow
def test_a_data_set_that_is_not_there_is_planned_as_if_it_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = {"batch": 8, "net": config().net}
    cfg = replace(PRESETS["fashion"], pretrain=None, **small)  # type: ignore[arg-type]
    absent = shown(cfg)
    assert "60,000 images of 28x28, grey; they are not there yet" in absent
    there = Dataset("fashion-mnist", torch.zeros((60_000, 28, 28, 1), dtype=torch.uint8), None)
    Path("datasets/fashion-mnist").mkdir(parents=True)
    monkeypatch.setattr(plan, "load", lambda data: there)
    assert shown(cfg).splitlines()[1:] == absent.splitlines()[1:]


@pytest.mark.parametrize("name", PRESETS)
def test_the_data_of_every_preset_are_known(name: str) -> None:
    data = PRESETS[name].data
    assert data.source == "digits" or plan._dataset(PRESETS[name]).resolution == (
        data.resolution or SHAPES[data.source].resolution
    )


@pytest.mark.slow
def test_the_network_and_the_drawn_images_are_those_of_a_teacher(tmp_path: Path) -> None:
    net = replace(config().net, model_channels=12)
    teacher = run(
        config(net=net, objective=replace(config().objective, kind="diffusion"), total_kimg=0.008), tmp_path / "t"
    )
    cfg = config(init_from=teacher.run_dir, data=DataConfig("teacher", teacher_samples=7))
    dataset = plan._dataset(cfg)
    assert tuple(dataset.images.shape) == (7, 8, 8, 1) and phase(cfg).parameters == phase(config(net=net)).parameters


def test_what_cannot_be_planned_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--plan", "--data.source", str(tmp_path / "none")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    with pytest.raises(UserError, match="no-such"):
        parse(["--preset", "no-such", "--plan"])


def test_a_network_that_fits_nowhere_says_none(monkeypatch: pytest.MonkeyPatch) -> None:
    large = memory.Prediction(1, 10**12, 0, 0, 0, False)
    monkeypatch.setattr(plan.memory, "predict", lambda *given: large)
    rows = [line.split("│") for line in shown(config()).splitlines() if line.startswith("│ A100")]
    assert [[cell.strip() for cell in row[-3:-1]] for row in rows] == [["1000.0", "none"]] * 2
