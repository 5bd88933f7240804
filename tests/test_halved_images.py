"""Fashion-MNIST in a quarter of the pixels, as IDX files that the reader takes."""

from __future__ import annotations

from pathlib import Path

import halved_images
import numpy as np
import pytest

from ect.config import DataConfig
from ect.data import Dataset, load
from tests.test_idx import idx_bytes, noise, write_folder


def test_a_folder_as_published_becomes_means_of_2x2(tmp_path: Path) -> None:
    y, labels = noise(5, 28, 28), np.array([2, 0, 1, 1, 2], np.uint8)
    files = {"train-images-idx3-ubyte": idx_bytes(y), "train-labels-idx1-ubyte": idx_bytes(labels)}
    source = write_folder(tmp_path / "published", {**files, "t10k-images-idx3-ubyte": idx_bytes(noise(2, 28, 28))})
    assert halved_images.main([str(source), str(tmp_path / "deep" / "fashion16")]) == 0
    found = load(DataConfig(str(tmp_path / "deep" / "fashion16"), labels=True))
    assert (found.name, tuple(found.images.shape)) == ("fashion16", (5, 16, 16, 1))
    padded = np.zeros((5, 32, 32))
    padded[:, 2:30, 2:30] = y
    means = padded.reshape(5, 16, 2, 16, 2).mean((2, 4))
    assert np.abs(found.images[..., 0].numpy() - means).max() <= 0.5
    assert found.labels is not None and found.labels.argmax(1).tolist() == labels.tolist()


def test_halves_round_up() -> None:
    assert halved_images.halved(np.array([[[0, 0], [1, 1]]], np.uint8)).tolist() == [[[1]]]
    assert halved_images.halved(np.full((1, 2, 2), 255, np.uint8)).tolist() == [[[255]]]


def test_colour_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    images = load(DataConfig("digits")).images
    monkeypatch.setattr(halved_images, "load", lambda cfg: Dataset("a set", images, None))
    assert halved_images.main(["digits", str(tmp_path / "out")]) == 2
    assert "digits: expected grey images with classes, found a set" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
