"""IDX files are read plain and compressed, padded to 32x32; those that do not fit are refused."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ect.config import DataConfig
from ect.data import Dataset, load
from ect.data.readers import idx
from ect.errors import UserError


def read(path: Path | str, **options: Any) -> Dataset:
    return load(DataConfig(source=str(path), **options))


def refusal(path: Path | str, **options: Any) -> str:
    """The message for a data set that must be refused."""
    with pytest.raises(UserError) as caught:
        read(path, **options)
    return str(caught.value)


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def idx_bytes(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_padded_to_32(tmp_path: Path, suffix: str) -> None:
    pack: Callable[[bytes], bytes] = gzip.compress if suffix else bytes
    y = noise(3, 28, 28)
    labels = np.array([2, 0, 1], np.uint8)
    files = {"train-images-idx3-ubyte": pack(idx_bytes(y)), "train-labels-idx1-ubyte": pack(idx_bytes(labels))}
    path = write_folder(tmp_path, {name + suffix: content for name, content in files.items()})
    found = read(path / f"train-images-idx3-ubyte{suffix}", labels=True)
    assert (found.name, tuple(found.images.shape)) == ("train-images-idx3-ubyte", (3, 32, 32, 1))
    assert np.array_equal(found.images[:, 2:30, 2:30, 0].numpy(), y)
    assert int(found.images.sum()) == int(y.sum())
    assert found.labels is not None and found.labels.argmax(1).tolist() == [2, 0, 1] and found.label_dim == 3


def test_idx_of_another_size_needs_a_resolution(tmp_path: Path) -> None:
    path = write_folder(tmp_path, {"a-images-idx3-ubyte": idx_bytes(noise(2, 18, 18))}) / "a-images-idx3-ubyte"
    message = refusal(path)
    assert "a-images-idx3-ubyte: 18x18 pixels" in message and "--data.resolution 16" in message
    assert read(path, resolution=16).images.shape == (2, 16, 16, 1)
    assert read(write_folder(tmp_path, {"b-images.idx3-ubyte": idx_bytes(noise(2, 16, 16))}) / "b-images.idx3-ubyte")


def test_idx_files_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t-images-idx3-ubyte"
    good = idx_bytes(noise(2, 28, 28))
    for content, part in (
        (good[:-1], "promises 1568 bytes of data, found 1567"),
        (good + b"x", "promises 1568 bytes of data, found more than 1568"),
        (good[:10], "not an IDX file of 3-dimensional uint8 data"),
        (idx_bytes(noise(2, 28)), "not an IDX file of 3-dimensional uint8 data"),
        (idx_bytes(noise(0, 28, 28)), "it holds no images"),
        (bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 0), "it holds no images"),
    ):
        path.write_bytes(content)
        assert f"{path}: " in refusal(path) and part in refusal(path)
    path.write_bytes(good)
    labels = tmp_path / "t-labels-idx1-ubyte"
    assert f"{labels}: no such file" in refusal(path, labels=True)
    labels.write_bytes(idx_bytes(np.zeros(3, np.uint8)))
    assert f"{labels}: 3 labels for 2 images in {path.name}" in refusal(path, labels=True)
    packed = tmp_path / "t-images-idx3-ubyte.gz"
    packed.write_bytes(gzip.compress(good)[:-20])
    assert f"{packed}: cannot be read" in refusal(packed)
    monkeypatch.setattr(idx, "MAX_BYTES", 10)
    assert "promises 1568 bytes of data, found 11" in refusal(path)


def test_a_folder_of_idx_files_as_published(tmp_path: Path) -> None:
    y, test = noise(3, 28, 28), noise(2, 28, 28)
    files = {
        "train-images-idx3-ubyte.gz": gzip.compress(idx_bytes(y)),
        "train-labels-idx1-ubyte.gz": gzip.compress(idx_bytes(np.array([2, 0, 1], np.uint8))),
        "t10k-images-idx3-ubyte.gz": gzip.compress(idx_bytes(test)),
        "t10k-labels-idx1-ubyte.gz": gzip.compress(idx_bytes(np.array([0, 1], np.uint8))),
    }
    folder = write_folder(tmp_path / "mnist", files)
    found = read(folder, labels=True, resolution=28)
    assert (found.name, len(found.images), found.label_dim) == ("mnist", 3, 3)
    assert np.array_equal(found.images[..., 0].numpy(), y)
    write_folder(folder, {"train-images-idx3-ubyte": idx_bytes(y)})  # unpacked beside it: the same set
    assert len(read(folder).images) == 3
    two = write_folder(tmp_path / "two", {"a-images-idx3-ubyte": idx_bytes(y), "b-images-idx3-ubyte": idx_bytes(y)})
    assert "several sets of images (a-images-idx3-ubyte, b-images-idx3-ubyte)" in refusal(two)


def test_a_small_file_that_unpacks_to_much_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idx, "_ALWAYS", 10)
    images = idx_bytes(np.zeros((100, 28, 28), np.uint8))
    files = {"a-images-idx3-ubyte.gz": gzip.compress(images), "b-images-idx3-ubyte": images}
    folder = write_folder(tmp_path, files)
    said = refusal(folder / "a-images-idx3-ubyte.gz")
    assert "promises 78,400 bytes of data, more than 16 for each of its own. Unpack it with gunzip" in said
    assert len(read(folder / "b-images-idx3-ubyte").images) == 100  # as it says
