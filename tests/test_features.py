from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ect.config import DataConfig
from ect.data import Dataset, load
from ect.metrics import features
from ect.metrics.features import DigitsEvaluator, DigitsStatistics, pixel_features


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load(DataConfig("digits", labels=True))


def classes(data: Dataset) -> np.ndarray:
    assert data.labels is not None
    return data.labels.argmax(1).numpy()


def digit_features(images: Any) -> np.ndarray:
    """The penultimate features of the network, float64 [N, 64]; images are uint8 [N, 8, 8, 1]."""
    return features._features(pixel_features(images))


def digits_distance(samples: Any, reference: Any) -> tuple[float, float]:
    """(FDc, FDp) of two sets of digits, uint8 [N, 8, 8, 1]."""
    return DigitsStatistics.of(samples).distance(DigitsStatistics.of(reference))


def rounded_to_uint8(pixels: np.ndarray) -> np.ndarray:
    return np.round((pixels.clip(-1, 1) + 1) * 127.5).astype(np.uint8).reshape(-1, 8, 8, 1)


def test_shipped_weights_recognise_held_out_digits(data: Dataset) -> None:
    torch.manual_seed(0)  # the order of random numbers in `train`: weights first, then the split
    features.build_network()
    held_out = torch.randperm(len(data.images))[: features.HELD_OUT]
    logits = features._network()[-1](torch.from_numpy(digit_features(data.images[held_out])))
    assert (logits.argmax(1).numpy() == classes(data)[held_out]).mean() >= 0.97


def test_shipped_weights_are_small() -> None:
    assert features.WEIGHTS.stat().st_size < 200_000


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


def test_command_writes_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net = features.build_network()
    monkeypatch.setattr(features, "train", lambda images, labels, seed: (net, 0.5 + seed))
    features.make(features.TrainOptions(tmp_path / "weights.npz", seed=0))
    with np.load(tmp_path / "weights.npz") as file, np.load(features.WEIGHTS) as shipped:
        assert {name: file[name].shape for name in file} == {name: shipped[name].shape for name in shipped}
        np.testing.assert_array_equal(file["0.weight"], net[0].weight.detach().numpy().astype(np.float16))
    assert "50.00% of 360 held-out digits" in capsys.readouterr().out


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
    assert DigitsStatistics.of(data.images).imbalance < 0.02
    assert DigitsStatistics.of(data.images[classes(data) == 7]).imbalance == pytest.approx(0.9, abs=0.02)


@pytest.mark.slow
def test_evaluator_rates_batches_like_the_whole_set(data: Dataset) -> None:
    evaluator = DigitsEvaluator(data.images)
    images = data.images[:300]
    found = evaluator.evaluate(iter(images.split([128, 1, 171])))
    fdc, fdp = digits_distance(images, data.images)
    assert found["FDc"] == pytest.approx(fdc, rel=1e-9)
    assert found["FDp"] == pytest.approx(fdp, rel=1e-9)
    assert found["imbalance"] == pytest.approx(DigitsStatistics.of(images).imbalance)
    assert list(found) == [column.name for column in evaluator.available]
    assert evaluator.notes == []
    assert evaluator.used["reference"] == {"images": 1797}


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 8, 8, 1), torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8, dtype=torch.uint8)],
)
def test_other_images_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[N, 8, 8, 1\]"):
        pixel_features(images)
