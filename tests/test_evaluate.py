from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ect import evaluate, precision
from ect.config import DataConfig, EvalConfig
from ect.data import Dataset, load
from ect.files.model_file import save_model
from ect.metrics import (
    Column,
    QualityRow,
    choice,
    classifier,
    make_evaluator,
    quality_rows,
    quality_table,
)
from ect.metrics.evaluator import Evaluator, Several
from ect.metrics.features import FeatureEvaluator, distance
from ect.metrics.fidelity import FidelityEvaluator
from ect.models import EDMPrecond, build
from ect.sampler import Consistency, Heun, consistency_samplers, generate

DIGITS_FEATURES = classifier.SHIPPED / "digits_features.npz"


def model_file(path: Path, channels: int = 1, resolution: int = 8, **info: Any) -> tuple[Path, EDMPrecond]:
    spec = {
        "precond": "ECMPrecond",
        "sigma_data": 0.5,
        "sigma_min": 0.003,
        "unet": "SongUNet",
        "kwargs": {
            "img_resolution": resolution, "in_channels": channels, "out_channels": channels, "model_channels": 8,
            "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [],
        },
    }  # fmt: skip
    torch.manual_seed(0)
    net = build(spec).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    save_model(path, net.state_dict(), spec, info)
    return path, net


@pytest.fixture
def digits_model(tmp_path: Path) -> Path:
    return model_file(tmp_path / "model.safetensors", data="digits", mid_t=[0.821])[0]


class MeanPixel(Evaluator):
    """Figures that a test can compute by itself."""

    columns = (Column("mean"), Column("absent", missing="no reason"))
    used = {"what": "pixels"}  # noqa: RUF012

    def evaluate(self, images: Any) -> dict[str, float]:
        return {"mean": torch.cat(list(images)).double().mean().item()}


def run(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    evaluate.main([*map(str, args), "--device", "cpu"])
    return capsys.readouterr().out


def fails(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    with pytest.raises(SystemExit) as error:
        evaluate.main([*map(str, args), "--device", "cpu"])
    assert error.value.code == 2
    return capsys.readouterr().err


def test_samplers_count_their_evaluations() -> None:
    few = consistency_samplers([0.821, 0.2])
    assert [sampler.sigmas for sampler in few] == [(80.0,), (80.0, 0.821), (80.0, 0.821, 0.2)]
    assert [sampler.nfe for sampler in [*few, Heun(18), Heun(2)]] == [1, 2, 3, 35, 3]


def test_rows_rate_the_images_of_their_seeds(tmp_path: Path) -> None:
    _, net = model_file(tmp_path / "model.safetensors")
    seen: list[int] = []
    rows = quality_rows(
        net, MeanPixel(), consistency_samplers([0.821]), samples=5, repeats=2, seed=7, batch=3, on_images=seen.append
    )
    assert [row.first_seeds for row in rows] == [(7, 12), (7, 12)]
    assert seen == [3, 2] * 4
    for row, sigmas in zip(rows, ((80.0,), (80.0, 0.821)), strict=True):
        for first, values in zip(row.first_seeds, row.values, strict=True):
            images = torch.cat(list(generate(net, range(first, first + 5), Consistency(sigmas), batch=5)))
            assert values["mean"] == pytest.approx(images.double().mean().item(), abs=0.01)
    assert rows[0].values[0] != rows[0].values[1]  # each repeat has seeds of its own


def test_nothing_is_sampled_where_nothing_can_be_rated(tmp_path: Path) -> None:
    class Blind(MeanPixel):
        columns = (Column("absent", missing="no reason"),)

    _, net = model_file(tmp_path / "model.safetensors")
    assert quality_rows(net, Blind(), consistency_samplers([]), samples=5, on_images=pytest.fail) == []


def test_table_has_mean_and_minimum_and_a_dash() -> None:
    (sampler,) = consistency_samplers([])
    row = QualityRow(sampler, 10, (0, 10, 20), ({"mean": 3.0}, {"mean": 1.0}, {"mean": 2.0}), 1.0)
    headers, cells = quality_table([row], MeanPixel.columns)
    assert headers == ["sampler", "NFE", "mean", "absent"]
    assert cells == [["consistency, 1 step", "1", "2 (1)", "-"]]
    once = QualityRow(sampler, 10, (0,), ({"mean": 3.14159},), 1.0)
    assert quality_table([once], MeanPixel.columns)[1] == [["consistency, 1 step", "1", "3.142", "-"]]
    assert row.as_json() | {"sampler": None} == {
        "sampler": None,
        "samples": 10,
        "first_seeds": (0, 10, 20),
        "values": ({"mean": 3.0}, {"mean": 1.0}, {"mean": 2.0}),
        "seconds": 1.0,
        "mean": {"mean": 2.0},
        "minimum": {"mean": 1.0},
    }
    assert MeanPixel().notes == ["absent: no reason"]


@pytest.mark.slow
def test_one_and_two_evaluations_of_a_random_net_differ(
    digits_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(
        capsys, digits_model, "--samples", "40", "--repeats", "2", "--seed", "3", "--heun", "2", "--run-dir", tmp_path / "r"
    )  # fmt: skip
    report = json.loads((tmp_path / "r" / "metrics.json").read_text())
    one, two, heun = report["rows"]
    assert [row["sampler"]["nfe"] for row in report["rows"]] == [1, 2, 3]
    assert one["first_seeds"] == two["first_seeds"] == heun["first_seeds"] == [3, 43]
    for name in ("FDc", "FDp"):
        figures = {row["values"][0][name] for row in report["rows"]}
        assert len(figures) == 3
        assert one["minimum"][name] == min(value[name] for value in one["values"])
        assert one["minimum"][name] < one["mean"][name]
        assert f"{two['mean'][name]:.4g} ({two['minimum'][name]:.4g})" in out
    assert report["model"]["info"]["data"] == "digits"
    assert report["missing"] == {}
    assert report["products"] == "fp32" and "samples, products in fp32\n" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tf32", "fp32"])
def test_the_products_are_as_asked_and_torch_is_left_as_it_was(
    name: str, digits_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = evaluate.quality_rows, []
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    def rows(*args: Any, **kwargs: Any) -> Any:
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return original(*args, **kwargs)

    monkeypatch.setattr(evaluate, "quality_rows", rows)
    options = ["--samples", "4", "--repeats", "1", "--precision", name, "--run-dir", tmp_path / "r"]
    run(capsys, digits_model, *options)  # type: ignore[arg-type]
    assert seen == [(name == "tf32",) * 2]
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


def test_a_gpu_is_said_to_use_tf32_where_it_has_it_and_may(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with precision.sampling(precision.PRECISIONS["fp16"]):
        assert precision.products(gpu) == "TF32" and precision.products(torch.device("cpu")) == "fp32"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert precision.products(gpu) == "fp32"
    with precision.sampling(precision.PRECISIONS["fp32"]):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert precision.products(gpu) == "fp32"


@pytest.mark.slow
def test_digits_figures_are_those_of_the_generated_images(
    digits_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, digits_model, "--samples", "30", "--repeats", "1", "--mid-t", "1.5", "--run-dir", tmp_path / "r")
    _, two = json.loads((tmp_path / "r" / "metrics.json").read_text())["rows"]
    assert two["sampler"]["sigmas"] == [80.0, 1.5]
    _, net = model_file(tmp_path / "again.safetensors")
    images = torch.cat(list(generate(net, range(30), Consistency((80.0, 1.5)))))
    digits = load(DataConfig("digits")).images
    known = classifier.load(DIGITS_FEATURES)
    fdc, fdp = distance(known.statistics(images), known.statistics(digits))
    assert two["mean"]["FDc"] == pytest.approx(fdc, rel=1e-6)
    assert two["mean"]["FDp"] == pytest.approx(fdp, rel=1e-6)


@pytest.mark.slow
def test_report_names_the_weights(digits_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hashes = []
    other, net = model_file(tmp_path / "other.safetensors", data="digits")
    with torch.no_grad():
        next(net.parameters()).add_(1)
    changed = tmp_path / "changed.safetensors"
    save_model(changed, net.state_dict(), json.loads(_metadata(other))["spec"], {"data": "digits"})
    for path in (digits_model, other, changed):
        run(capsys, path, "--samples", "4", "--repeats", "1", "--mid-t", "--run-dir", tmp_path / "r")
        hashes.append(json.loads((tmp_path / "r" / "metrics.json").read_text())["model"]["weights_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


def _metadata(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()["ect"]


@pytest.mark.slow
def test_default_folder_and_sample_counts(
    digits_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "_DIGITS_SAMPLES", 6)
    run(capsys, digits_model, "--repeats", "1")
    (report,) = (tmp_path / "runs").glob("evaluation-*-model/metrics.json")
    assert json.loads(report.read_text())["rows"][0]["samples"] == 6
    assert report.parent.name == f"evaluation-{tmp_path.name}-model"


def test_missing_weights_give_dashes_notes_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch-home"))
    path, _ = model_file(tmp_path / "model.safetensors", data="digits")
    photos = Dataset("photos", torch.zeros(8, 8, 8, 1, dtype=torch.uint8), None)
    monkeypatch.setattr(choice, "load", lambda cfg: photos)
    with pytest.raises(SystemExit):
        evaluate.main(
            [str(path), "--data", "photos", "--no-download", "--run-dir", str(tmp_path / "r"), "--device", "cpu"]
        )
    printed = capsys.readouterr()
    out = " ".join(printed.out.split())
    assert "FID, KID, IS: Inception weights not found: pass --weights PATH" in out
    assert "precision, recall: VGG16 weights not found: pass --vgg PATH" in out
    assert [line.split("│")[2].strip() for line in printed.out.splitlines() if "consistency" in line] == ["1", "2"]
    assert all(line.count(" - ") == 5 for line in printed.out.splitlines() if "consistency" in line)
    assert "no metric can be computed" in printed.err
    assert not (tmp_path / "r" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--repeats", "0"], "--repeats 0: expected at least 1"),
        (["--batch", "0"], "--batch 0: expected at least 1"),
        (["--seed", "-1"], "--seed -1: expected at least 0"),
        (["--seed", str(2**63)], "below 2^32"),
        (["--samples", "1"], "1 generated images cannot be rated; expected at least 2"),
        (["--heun", "5", "0"], "--heun 5 0: expected at least 1 step"),
        (["--heun", "1000000"], "and at most 1,000"),
        (["--threads", "0"], "--threads 0: expected at least 1"),
        (["--threads", "100000"], "--threads 100000: expected at most 1,024"),
        (["--batch", "100000000000"], "expected at most 1,048,576"),
        (["--samples", "1000000000000"], "expected at most 10,000,000"),
        (["--weights", "nope.pth"], "--weights nope.pth: no such file"),
        (["--mid-t", "0.5", "0.8"], "--mid-t 0.5 0.8: expected strictly decreasing levels between 0 and 80"),
        (["--mid-t", "90"], "--mid-t 90: expected strictly decreasing"),
        (["--data", "digits", "--reference", "stats.npz"], "--reference replaces the images of --data"),
        (["--reference", "nothing.npz"], "--reference nothing.npz: cannot be read"),
    ],
)
def test_impossible_options_are_named(
    args: list[str], message: str, digits_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, digits_model, "--run-dir", tmp_path / "r", *args)


def test_a_backend_asked_for_by_name_that_cannot_run_is_refused(
    digits_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ECT_KERNELS", "skip_product=apex")
    said = fails(capsys, digits_model, "--run-dir", tmp_path / "r")
    assert "ECT_KERNELS: skip_product: backend 'apex' cannot run" in said and not (tmp_path / "r").exists()


def test_run_dir_that_cannot_be_made(digits_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot make this folder" in fails(capsys, digits_model, "--run-dir", tmp_path / "file" / "r")


def test_data_must_be_named_and_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unknown, _ = model_file(tmp_path / "unknown.safetensors", channels=3, resolution=16)
    assert "does not say what it was trained on; give those images, --data PATH" in fails(capsys, unknown)
    cifar, _ = model_file(tmp_path / "cifar.safetensors", channels=3, resolution=16, data="cifar10")
    assert "it was trained on 'cifar10'; give those images, --data PATH" in fails(capsys, cifar)
    message = fails(capsys, cifar, "--data", "digits")
    assert "images are 8x8 with 1 channels, the model's are 16x16 with 3 channels" in message
    assert "--resolution 16" in message
    message = fails(capsys, cifar, "--data", tmp_path / "nowhere", "--resolution", "15")
    assert "--resolution 15: expected a multiple of 4" in message and "--data." not in message
    message = fails(capsys, cifar, "--data", tmp_path / "nowhere")
    assert f"--data {tmp_path / 'nowhere'}: no such file or folder" in message and "--data." not in message


def test_a_model_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file" in fails(capsys, tmp_path / "nothing.safetensors")


def test_choice_of_metrics(tmp_path: Path) -> None:
    cfg, digits = EvalConfig(samples=10), load(DataConfig("digits")).images
    assert isinstance(make_evaluator(Dataset("of any name", digits, None), cfg, tmp_path), FeatureEvaluator)
    for other in (torch.zeros(9, 16, 16, 3, dtype=torch.uint8), digits[1:]):  # folders of that name
        assert isinstance(make_evaluator(Dataset("digits", other, None), cfg, tmp_path), FidelityEvaluator)


@pytest.mark.slow
def test_a_further_metric_stands_beside_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(choice, "EXTRA", [lambda dataset: MeanPixel(), lambda dataset: None])
    data = load(DataConfig("digits"))
    evaluator = make_evaluator(data, EvalConfig(samples=8), tmp_path)
    assert [column.name for column in evaluator.columns] == ["FDc", "FDp", "imbalance", "mean", "absent"]
    assert evaluator.notes == ["absent: no reason"] and evaluator.used["mean, absent"] == {"what": "pixels"}
    figures = evaluator.evaluate(iter(data.images[:8].split(4)))
    assert figures.keys() == {"FDc", "FDp", "imbalance", "mean"}
    assert figures["FDc"] == FeatureEvaluator(DIGITS_FEATURES, data.images).evaluate(data.images[:8].split(4))["FDc"]
    with pytest.raises(ValueError, match="two evaluators have a column named absent, mean"):
        Several([MeanPixel(), MeanPixel()])
