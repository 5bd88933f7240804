"""Guidance: the formula, by a class that is left out or by another network; sampling with it, and distilling it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from rich.console import Console
from torch import Tensor

from ect import evaluate
from ect.assembly import frozen, network_spec
from ect.config import Config, DataConfig, ObjectiveConfig
from ect.cost.memory import predict
from ect.data import load
from ect.errors import UserError
from ect.files.checkpoint import load_model, read_spec
from ect.files.model_file import save_model
from ect.job import Job
from ect.models import EDMPrecond, build
from ect.models.guided import Guided
from ect.objectives.distillation import euler_step
from ect.options import parse
from ect.sampler import Heun, generate
from ect.trainer import Trainer
from tests.test_emas import MeanPixel
from tests.test_sample import images_of, refused, write_model
from tests.test_sample import run as sample
from tests.tiny import config
from tests.tiny import run as train

CLASSES, DROPPING = 4, {"label_dropout": 0.1}


def network(path: Path, label_dim: int = CLASSES, precond: str = "EDMPrecond", **kwargs: Any) -> Path:
    """A random network that was trained with label dropout, unless `kwargs` says otherwise."""
    return write_model(path, precond=precond, label_dim=label_dim, more={**DROPPING, **kwargs})


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """Two of classes and one of none, alike but for weights."""
    found = {name: network(tmp_path / f"{name}.safetensors") for name in ("good", "bad")}
    found["none"] = network(tmp_path / "none.safetensors", label_dim=0)
    net, _ = load_model(found["bad"])
    state = {key: value * 1.5 if value.is_floating_point() else value for key, value in net.state_dict().items()}
    save_model(found["bad"], state, read_spec(found["bad"]), {})
    return found


def inputs(net: EDMPrecond) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, net.img_channels, 8, 8, generator=g)
    return x, torch.tensor([0.1, 1.0, 30.0]), torch.eye(CLASSES)[[0, 3, 1]]


# ------------------------------------------------------------------------------------------------ the formula


@torch.no_grad()
def test_the_answer_is_moved_away_from_the_one_without_a_class(models: dict[str, Path]) -> None:
    net, _ = load_model(models["good"])
    x, sigma, labels = inputs(net)
    D, D_u = net(x, sigma, labels), net(x, sigma, torch.zeros_like(labels))
    assert not torch.allclose(D, D_u)
    for w in (0.5, 2.0, 7.0):
        torch.testing.assert_close(Guided(net, w)(x, sigma, labels), D_u + w * (D - D_u), rtol=1e-4, atol=1e-4)
    assert torch.equal(Guided(net, 1.0)(x, sigma, labels), D) and torch.equal(Guided(net, 0.0)(x, sigma, labels), D_u)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bad", "none"])
def test_the_answer_is_moved_away_from_another_networks(models: dict[str, Path], name: str) -> None:
    """Which has the same class, or knows none."""
    (net, _), (guide, _) = load_model(models["good"]), load_model(models[name])
    x, sigma, labels = inputs(net)
    D, weak = net(x, sigma, labels), guide(x, sigma, labels if guide.label_dim else None)
    torch.testing.assert_close(Guided(net, 3.0, guide)(x, sigma, labels), weak + 3 * (D - weak), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["ddpmpp", "ncsnpp", "adm"])
def test_every_network_has_an_answer_of_its_own_for_each_class_and_for_none(arch: str) -> None:
    data = load(DataConfig(labels=True))
    cfg = replace(config().net, arch=arch, model_channels=16, label_dropout=0.1)
    net = build(network_spec(cfg, "EDMPrecond", data, 0)).eval()
    generator = torch.Generator().manual_seed(3)
    for key, value in net.state_dict().items():
        if "resample" not in key:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    x = torch.randn(1, 1, 8, 8, generator=generator)
    with torch.no_grad():
        answers = [net(x, 1.0, torch.eye(10)[i : i + 1]) for i in range(10)] + [net(x, 1.0, torch.zeros(1, 10))]
        assert torch.equal(answers[-1], net(x, 1.0))
    assert all(not torch.allclose(a, b) for i, a in enumerate(answers) for b in answers[:i])
    images = list(generate(Guided(net, 2.0), range(3), Heun(2), class_idx=[1, 1, 2]))
    assert images[0].shape == (3, 8, 8, 1)


# ------------------------------------------------------------------------------------------------ sampling


@pytest.mark.slow
def test_the_command_samples_with_the_guided_denoiser(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, out = models["good"], tmp_path / "x.npz"
    nets = {name: load_model(path)[0] for name, path in models.items()}
    seeds = ["--seeds", "0-3", "--class", "2", "--heun", "3", "--out", out]
    for args, denoiser in [
        ([], nets["good"]),
        (["--guidance", "1"], nets["good"]),
        (["--guidance", "2.5"], Guided(nets["good"], 2.5)),
        (["--guidance", "2.5", "--guide", models["bad"]], Guided(nets["good"], 2.5, nets["bad"])),
        (["--guidance", "2.5", "--guide", models["none"]], Guided(nets["good"], 2.5, nets["none"])),
    ]:
        sample(good, *seeds, *args)
        assert ("each answer guided by" in capsys.readouterr().out) == bool(args)
        want = torch.cat(list(generate(denoiser, range(4), Heun(3), class_idx=2, batch=64)))
        assert np.array_equal(images_of(out), want.numpy())
    sample(models["none"], "--guidance", "2", "--guide", models["none"], "--count", "2", "--heun", "2", "--out", out)


def test_each_class_has_a_row_of_the_grid(models: dict[str, Path], tmp_path: Path) -> None:
    sample(models["good"], "--each-class", "--seeds", "5-7", "--heun", "2", "--out", tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays["class"].tolist() == [c for c in range(CLASSES) for _ in range(3)]
        assert arrays["seeds"].tolist() == [5, 6, 7] * CLASSES
        made = arrays["images"]
    for c in range(CLASSES):
        sample(models["good"], "--class", c, "--seeds", "5-7", "--heun", "2", "--out", tmp_path / "y.npz")
        assert np.abs(images_of(tmp_path / "y.npz").astype(int) - made[3 * c : 3 * c + 3].astype(int)).max() <= 1
    sample(models["good"], "--each-class", "--seeds", "5-7", "--heun", "2", "--batch", "5", "--out", tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        wide, high = picture.size
    assert abs(high / wide - CLASSES / 3) < 0.1  # three columns


@pytest.mark.parametrize(
    ("model", "args", "said"),
    [
        ("good", ["--guidance", "-1"], "--guidance -1.0: expected a weight from 0 to 100"),
        ("good", ["--guidance", "nan"], "--guidance nan: expected a weight"),
        ("good", ["--guide", "bad"], "also give its weight, such as --guidance 2"),
        ("none", ["--guidance", "2"], "--guidance 2: the model is unconditional"),
        ("kept", ["--guidance", "2"], "--guidance 2: the model was trained without --net.label-dropout"),
        ("ect", ["--guidance", "2"], "--guidance 2: guidance is of diffusion models, and this is a consistency model"),
        ("good", ["--guidance", "2", "--guide", "ect"], "and the guide is a consistency model"),
        ("good", ["--guidance", "2", "--guide", "grey"], "the guide makes 8x8 images of 1 channel(s) and 4 classes"),
        ("good", ["--guidance", "2", "--guide", "five"], "and 5 classes, the model 8x8 of 3 and 4"),
        ("none", ["--guidance", "2", "--guide", "good"], "and 4 classes, the model 8x8 of 3 and 0"),
        ("good", ["--guidance", "2", "--guide", "missing"], "missing.safetensors: no such file"),
        ("good", ["--class", "4"], "--class 4: expected 0 to 3, the classes of this model"),
        ("none", ["--each-class"], "--each-class: this model is unconditional"),
        ("good", ["--each-class", "--class", "1"], "--class 1: --each-class makes them all"),
        ("good", ["--each-class", "--out", "folder"], "--each-class: --out folder is a folder"),
        ("good", ["--each-class", "--count", "500000"], "--count 2000000: expected at most 1,000,000"),
        ("ect", ["--search-sigmas", "--guidance", "2"], "--guidance 2.0: --search-sigmas makes no images"),
    ],
)
def test_what_does_not_apply_is_refused_in_a_sentence(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    model: str, args: list[str], said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    network(tmp_path / "kept.safetensors", label_dropout=0.0)
    network(tmp_path / "ect.safetensors", precond="ECMPrecond")
    network(tmp_path / "grey.safetensors", in_channels=1, out_channels=1)
    network(tmp_path / "five.safetensors", label_dim=5)
    before = set(tmp_path.iterdir())
    places = [f"{arg}.safetensors" if i and args[i - 1] == "--guide" else arg for i, arg in enumerate(args)]
    assert said in refused(capsys, f"{model}.safetensors", *places)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_evaluation_rates_the_guided_denoiser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "make_evaluator", lambda *args, **kwargs: MeanPixel())
    grey = network(tmp_path / "grey.safetensors", label_dim=10, in_channels=1, out_channels=1)
    common = [str(grey), "--data", "digits", "--samples", "4", "--repeats", "1", "--heun", "2", "--device", "cpu"]
    found, records = [], []
    for args in ([], ["--guidance", "3"], ["--guidance", "3", "--guide", str(grey)]):
        (row, *_) = evaluate.evaluate(parsed([*common, *args]), Console(quiet=True))
        found.append(row.mean("mean"))
        (report,) = (tmp_path / "runs").glob("*/metrics.json")
        records.append(json.loads(report.read_text())["model"])
    assert found[0] != found[1] and found[0] == found[2]  # a guide of the same weights moves nothing
    assert "guidance" not in records[0] and records[1]["guidance"] == 3 and records[1]["guide"] is None
    assert records[2]["guide"] == str(grey)
    for args, said in [
        (["--guide", "x"], "--guide x: also give its weight"),
        (["--guidance", "101"], "--guidance 101.0"),
    ]:
        with pytest.raises(SystemExit) as stop:
            evaluate.main([*common, *args])
        assert stop.value.code == 2 and said in capsys.readouterr().err


def parsed(args: list[str]) -> evaluate.Options:
    return tyro.cli(evaluate.Options, args=args)


# ------------------------------------------------------------------------------------------------ distilling


GUIDED = ObjectiveConfig(n_stages=4, stage_kimg=0.024, target="teacher", guidance=2.0)
LABELLED = {"data": DataConfig(labels=True), "net": replace(config().net, label_dropout=0.2)}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional diffusion model after two steps; only to be read."""
    cfg = config(objective=ObjectiveConfig(kind="diffusion"), total_kimg=0.016, **LABELLED)
    return train(cfg, tmp_path_factory.mktemp("guidance") / "teacher").run_dir


@pytest.mark.slow  # the run that it needs is
def test_the_target_is_a_step_of_the_guided_teacher(teacher: Path, tmp_path: Path) -> None:
    cfg = config(objective=GUIDED, init_from=teacher, **LABELLED)
    step = Trainer(cfg, tmp_path, load(cfg.data), torch.device("cpu")).step
    net, generator = step.teacher.net, torch.Generator().manual_seed(2)  # type: ignore[union-attr]
    for p in net.parameters():  # two steps teach no difference that shows
        p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    seen: list[tuple[Tensor, ...]] = []

    def compare(denoiser: Any, *args: Tensor) -> Tensor:
        seen.append(args)
        return denoiser(*args[::2][:2]).flatten(1).sum(1)

    step.stream.seek(0)
    object.__setattr__(step.objective, "compare", compare)
    step.loss(0)
    x_t, x_r, t, r, _ = seen[0]
    _, labels = step.stream.batch(0, 8)
    assert labels is not None

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        D, D_u = net(x, sigma, labels), net(x, sigma, torch.zeros_like(labels))
        return D_u + 2 * (D - D_u)

    with torch.no_grad():
        torch.testing.assert_close(x_r, euler_step(guided, x_t, t, r), rtol=1e-4, atol=1e-4)
        plain = euler_step(lambda x, sigma: net(x, sigma, labels), x_t, t, r)
    assert not torch.allclose(x_r, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_run_trains_its_teacher_and_distils_it_guided(tmp_path: Path) -> None:
    """The teacher drops labels; the student, whose answers are guided, is for classes alone."""
    cfg = config(objective=GUIDED, pretrain="digits-diffusion", pretrain_kimg=0.016, total_kimg=0.016, **LABELLED)
    folder = train(cfg, tmp_path / "run").run_dir
    student, first = load_model(folder)[0], load_model(folder / "pretrain")[0]
    assert first.model.label_dropout == 0.2 and student.model.label_dropout == 0.0 and student.label_dim == 10
    other = replace(cfg, objective=replace(GUIDED, guidance=3.0), resume=folder)
    with pytest.raises(UserError, match=r"--objective\.guidance: checkpoint has 2\.0, command line says 3\.0"):
        Job(other, Console(quiet=True))


@pytest.mark.slow
def test_a_teacher_that_cannot_be_guided_is_refused_before_the_run(teacher: Path, tmp_path: Path) -> None:
    cfg = config(objective=ObjectiveConfig(kind="diffusion"), total_kimg=0.008, data=DataConfig(labels=True))
    never = train(cfg, tmp_path / "never").run_dir
    with pytest.raises(UserError, match=r"--objective\.guidance 2: the model was trained without --net\.label-dropout"):
        train(config(objective=GUIDED, init_from=never, **LABELLED), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("--objective.guidance 2", "--objective.guidance 2.0: expected None without --objective.target teacher"),
        (
            "--objective.target teacher --objective.guidance 2",
            "--objective.guidance 2.0: expected None without --data.labels",
        ),
        (
            "--objective.target teacher --objective.guidance 2 --data.labels",
            "--net.label-dropout 0.0: expected greater than 0 with --objective.guidance and --pretrain",
        ),
        ("--objective.guidance 101", "--objective.guidance 101.0: expected a weight from 0 to 100"),
    ],
)
def test_guidance_without_what_it_needs_is_refused_by_the_option(args: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        parse(["--preset", "digits", *args.split()])
    assert said in str(error.value)


def test_options_that_fit_are_taken() -> None:
    args = "--objective.target teacher --objective.guidance 2 --data.labels --net.label-dropout .1"
    assert parse(["--preset", "digits", *args.split()]).objective.guidance == 2
    init = "--objective.target teacher --objective.guidance 2 --data.labels --init-from teacher"
    assert parse(["--preset", "digits", *init.split()]).objective.guidance == 2


@pytest.mark.slow
def test_memory_counts_a_guided_teacher_once() -> None:
    cfg = config(objective=replace(GUIDED, guidance=None), **LABELLED)
    data = load(cfg.data)
    spec = network_spec(cfg.net, "ECMPrecond", data, 0)
    plain, guided = (predict(c, spec, data, torch.device("cpu"), 8) for c in (cfg, replace(cfg, objective=GUIDED)))
    assert guided.state == plain.state and guided.launches > plain.launches


def test_a_frozen_teacher_comes_back_guided() -> None:
    net = build(
        {
            "precond": "EDMPrecond",
            "sigma_data": 0.5,
            "unet": "SongUNet",
            "kwargs": {
                "img_resolution": 8, "in_channels": 1, "out_channels": 1, "label_dim": 10, "model_channels": 8,
                "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [],
            },
        }
    )  # fmt: skip
    assert frozen(Config(), net) is net
    found = frozen(Config(objective=GUIDED), net)
    assert isinstance(found, Guided) and found.net is net and found.weight == 2
