from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ect.config import DataConfig
from ect.data import Dataset, load
from ect.errors import UserError
from ect.metrics import classifier, features
from ect.metrics.features import FeatureEvaluator
from tests.test_idx import idx_bytes, noise, write_folder

WEIGHTS = classifier.SHIPPED / "digits_features.npz"
FASHION = [classifier.SHIPPED / f"fashion{side}_features.npz" for side in (16, 28)]


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load(DataConfig("digits", labels=True))


def classes(data: Dataset) -> np.ndarray:
    assert data.labels is not None
    return data.labels.argmax(1).numpy()


@functools.cache
def shipped() -> classifier.Classifier:
    return classifier.load(WEIGHTS)


def pixel_features(images: Any) -> np.ndarray:
    """The pixels on the 17 levels, float64 [N, 64]; images are uint8 [N, 8, 8, 1]."""
    return shipped().pixels(images)


def digit_features(images: Any) -> np.ndarray:
    """The penultimate features of the network, float64 [N, 64]; images are uint8 [N, 8, 8, 1]."""
    return shipped()(pixel_features(images))[0]


def digits_distance(samples: Any, reference: Any) -> tuple[float, float]:
    """(FDc, FDp) of two sets of digits, uint8 [N, 8, 8, 1]."""
    return features.distance(shipped().statistics(samples), shipped().statistics(reference))


def rounded_to_uint8(pixels: np.ndarray) -> np.ndarray:
    return np.round((pixels.clip(-1, 1) + 1) * 127.5).astype(np.uint8).reshape(-1, 8, 8, 1)


def test_shipped_weights_recognise_held_out_digits(data: Dataset) -> None:
    torch.manual_seed(0)  # the order of random numbers in `train`: weights first, then the split
    classifier.build_network(8, 1, 10)
    held_out = torch.randperm(len(data.images))[: features.held_out(1797)]
    assert len(held_out) == 360
    predicted = shipped()(pixel_features(data.images[held_out]))[1]
    assert (predicted == classes(data)[held_out]).mean() >= 0.97


def test_shipped_files_are_small() -> None:
    assert {path.name for path in classifier.SHIPPED.glob("*_features.npz")} >= {WEIGHTS.name}
    for path in classifier.SHIPPED.glob("*_features.npz"):
        assert path.stat().st_size < 300_000


@pytest.mark.slow
def test_training_is_deterministic_by_seed_and_learns(data: Dataset) -> None:
    labels = classes(data)
    before = torch.random.get_rng_state()
    first, accuracy = features.train(data.images, labels, seed=1, epochs=3)
    again, _ = features.train(data.images, labels, seed=1, epochs=3)
    other, _ = features.train(data.images, labels, seed=2, epochs=3)
    assert accuracy > 0.6  # chance is 0.1
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first[0].weight, other[0].weight)
    assert torch.equal(before, torch.random.get_rng_state())


def test_command_writes_the_weights_and_what_they_belong_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: Dataset
) -> None:
    net = classifier.build_network(8, 1, 10)
    monkeypatch.setattr(features, "train", lambda images, labels, seed, epochs: (net, 0.5 + seed))
    features.main(["--out", str(tmp_path / "weights.npz"), "--seed", "0"])
    with np.load(tmp_path / "weights.npz") as file, np.load(WEIGHTS) as there:
        assert {name: file[name].shape for name in file} == {name: there[name].shape for name in there}
        np.testing.assert_array_equal(file["0.weight"], net[0].weight.detach().numpy().astype(np.float16))
        assert file["data"] == there["data"]
    assert "50.00% of 360 held-out images" in capsys.readouterr().out
    made = classifier.load(tmp_path / "weights.npz")
    computed = made.statistics(data.images).features  # with the weights that the file holds, not those of training
    assert made.features is not None and made.features.count == computed.count == 1797
    np.testing.assert_allclose(made.features.scatter, computed.scatter, rtol=1e-9, atol=1e-9)


def test_shipped_statistics_are_those_of_the_digits(data: Dataset) -> None:
    computed, known = shipped().statistics(data.images[:]).features, shipped().features
    assert known is not None and known.count == 1797
    np.testing.assert_allclose(known.mean, computed.mean, rtol=1e-9)
    np.testing.assert_allclose(known.scatter, computed.scatter, rtol=1e-9, atol=1e-9)


def test_a_features_file_belongs_to_its_images_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any data set with classes gets a file of its own in torch's cache, in which evaluation finds it."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    assert classifier.find(data.images) == WEIGHTS
    y = noise(130, 12, 12)
    labels = np.arange(130, dtype=np.uint8) % 3
    files = {"train-images-idx3-ubyte": idx_bytes(y), "train-labels-idx1-ubyte": idx_bytes(labels)}
    source = write_folder(tmp_path / "set", files)
    mine = load(DataConfig(str(source))).images
    assert classifier.find(mine) is None
    features.main(["--data", str(source), "--epochs", "1"])
    found = classifier.find(mine)
    assert (
        found is not None and found.parent == tmp_path / "hub" / "checkpoints" and str(found) in capsys.readouterr().out
    )
    figures = FeatureEvaluator(found, mine).evaluate(mine.split(50))
    assert figures["FDc"] == pytest.approx(0, abs=1e-6) and figures["FDp"] == pytest.approx(0, abs=1e-6)
    other = mine.clone()
    other[0, 0, 0, 0] ^= 1
    assert classifier.find(other) is None and classifier.find(mine[:-1]) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--epochs", "0"], "--epochs 0: expected at least 1"),
        (["--data", "{folder}"], "130 images are too few"),
        (["--data", "{folder}/train-images-idx3-ubyte", "--resolution", "15"], "expected a multiple of 4"),
    ],
)
def test_data_that_give_no_classifier(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(features, "BATCH", 128)
    files = {"train-images-idx3-ubyte": noise(130, 8, 8), "train-labels-idx1-ubyte": np.arange(130, dtype=np.uint8) % 3}
    folder = write_folder(tmp_path / "set", {name: idx_bytes(values) for name, values in files.items()})
    out = tmp_path / "out.npz"
    with pytest.raises(SystemExit) as end:
        features.main([*(word.format(folder=folder) for word in options), "--out", str(out)])
    assert end.value.code == 2 and said in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("content", [b"", b"PK", WEIGHTS.read_bytes()[:5000]])
def test_a_damaged_features_file_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "some_features.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"some_features\.npz: not a features file .* make it anew"):
        classifier.load(path)
    assert classifier.of(path) == ""


@pytest.mark.parametrize("path", FASHION, ids=lambda path: path.stem)
def test_fashion_files_fit_their_images(path: Path) -> None:
    found, side = classifier.load(path), int(path.stem[7:9])
    assert (found.shape, found.levels, found.classes) == ((side, side, 1), 255, 10)
    assert found.features is not None and found.features.count == 60_000


@pytest.mark.parametrize("side", [8, 16, 28, 32])
def test_a_network_of_any_side(side: int) -> None:
    net = classifier.build_network(side, 3, 7)
    assert net(torch.zeros(2, 3, side, side)).shape == (2, 7) and net[-1].in_features == classifier.WIDTH


def test_colours_are_planes_of_pixels() -> None:
    images = noise(2, 4, 4, 3)
    planes = classifier.pixel_features(images, 255).reshape(2, 3, 4, 4)
    np.testing.assert_allclose(planes, images.transpose(0, 3, 1, 2) / 127.5 - 1)


def test_levels_are_those_of_the_data(data: Dataset) -> None:
    assert classifier.levels_of(data.images) == 16
    assert classifier.levels_of(np.array([0, 255], np.uint8).reshape(2, 1, 1, 1)) == 1
    assert classifier.levels_of(np.array([0, 17, 255], np.uint8).reshape(3, 1, 1, 1)) == 255
    assert classifier.levels_of(np.zeros((3, 1, 1, 1), np.uint8)) == 255


def test_pixels_are_rounded_to_the_17_levels(data: Dataset) -> None:
    levels = (pixel_features(data.images) + 1) * 8
    assert set(np.unique(levels)) == set(range(17))
    jitter = np.random.default_rng(0).integers(-7, 8, data.images.shape)  # less than half of a step of 15.9
    near = (data.images.numpy() + jitter).clip(0, 255).astype(np.uint8)
    np.testing.assert_array_equal(pixel_features(near), pixel_features(data.images))
    np.testing.assert_array_equal(digit_features(near[:20]), digit_features(data.images[:20]))


def test_features_tell_images_apart_and_do_not_depend_on_the_chunk(data: Dataset) -> None:
    images = data.images[:200]
    all_at_once = digit_features(images)
    assert all_at_once.shape == (200, 64)
    assert all_at_once.dtype == np.float64
    one_by_one = np.concatenate([digit_features(images[i : i + 1]) for i in range(0, 200, 20)])
    np.testing.assert_allclose(one_by_one, all_at_once[::20], rtol=1e-10, atol=1e-12)
    assert all_at_once.std(0).min() > 0.1  # no dead feature


@pytest.mark.slow
def test_the_data_are_at_distance_zero_from_themselves(data: Dataset) -> None:
    fdc, fdp = digits_distance(data.images, data.images)
    assert abs(fdc) < 1e-8
    assert abs(fdp) < 1e-8


@pytest.mark.slow
def test_distances_of_known_sets(data: Dataset) -> None:
    """Floors of real digits (small-sample bias), and sets that a good metric must push away; figures are printed."""
    rng = np.random.default_rng(0)
    images = data.images.numpy()
    order = rng.permutation(len(images))
    pixels = pixel_features(images)
    gauss = rng.multivariate_normal(pixels.mean(0), np.cov(pixels, rowvar=False), 3000)
    sets = {
        "half against half": (images[order[:898]], images[order[898:]]),
        "resampled to 3000": (images[rng.integers(len(images), size=3000)], images),
        "Gaussian of the data": (rounded_to_uint8(gauss), images),
        "one class missing": (images[classes(data) != 3], images),
        "uniform noise": (rng.integers(0, 256, (1000, 8, 8, 1)).astype(np.uint8), images),
    }
    found = {name: digits_distance(*pair) for name, pair in sets.items()}
    for name, (fdc, fdp) in found.items():
        print(f"{name:24s} FDc {fdc:8.3f}  FDp {fdp:7.4f}")
    assert 7 < found["half against half"][0] < 20
    assert found["half against half"][1] == pytest.approx(0.30, rel=0.3)
    assert 0.5 < found["resampled to 3000"][0] < 5
    assert found["resampled to 3000"][1] == pytest.approx(0.048, rel=0.4)
    assert 150 < found["Gaussian of the data"][0] < 350
    assert 0.5 < found["Gaussian of the data"][1] < 1.2  # FDp is nearly blind to it: two halves of the data have 0.3
    assert found["one class missing"][0] > 5 * found["resampled to 3000"][0]
    assert found["uniform noise"][0] > 500
    assert found["uniform noise"][1] > 20


@pytest.mark.slow
def test_imbalance_of_predicted_classes(data: Dataset) -> None:
    assert shipped().statistics(data.images).imbalance < 0.02
    assert shipped().statistics(data.images[classes(data) == 7]).imbalance == pytest.approx(0.9, abs=0.02)


@pytest.mark.slow
def test_evaluator_rates_batches_like_the_whole_set(data: Dataset) -> None:
    evaluator = FeatureEvaluator(WEIGHTS, data.images)
    images = data.images[:300]
    found = evaluator.evaluate(iter(images.split([128, 1, 171])))
    fdc, fdp = digits_distance(images, data.images)
    assert found["FDc"] == pytest.approx(fdc, rel=1e-9)
    assert found["FDp"] == pytest.approx(fdp, rel=1e-9)
    assert found["imbalance"] == pytest.approx(shipped().statistics(images).imbalance)
    assert list(found) == [column.name for column in evaluator.available]
    assert evaluator.notes == []
    assert evaluator.used["reference"] == {"images": 1797}


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 8, 8, 1), torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8, dtype=torch.uint8)],
)
def test_other_images_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"uint8"):
        pixel_features(images)
