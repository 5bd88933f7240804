"""Digits, zips and folders give uint8 arrays, and whatever is wrong with a data set is told in one message."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ect.config import DataConfig
from ect.data import Dataset, load
from ect.data.readers import image_files
from ect.errors import UserError


def read(path: Path | str, **options: Any) -> Dataset:
    return load(DataConfig(source=str(path), **options))


def refusal(path: Path | str, **options: Any) -> str:
    """The message for a data set that must be refused."""
    with pytest.raises(UserError) as caught:
        read(path, **options)
    return str(caught.value)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels).save(file, "PNG")
    return file.getvalue()


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def edm_files(images: np.ndarray, labels: Any) -> dict[str, bytes]:
    """EDM's tree: 1000 images a folder, then dataset.json with labels in the order of the images."""
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(len(images))]
    pairs = None if labels is None else [[name, label] for name, label in zip(names, labels, strict=True)]
    files = {name: png(y) for name, y in zip(names, images, strict=True)}
    return files | {"dataset.json": json.dumps({"labels": pairs}).encode()}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


# What each format gives.


@pytest.mark.slow
def test_digits_equal_those_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    ours = read("digits", labels=True)
    levels = (ours.images[..., 0].double() * 16 / 255).round()
    assert torch.equal(levels, torch.from_numpy(digits.images))
    assert ours.labels is not None and torch.equal(ours.labels.argmax(1), torch.from_numpy(digits.target))


def test_digits_are_uint8_nhwc_with_17_levels() -> None:
    digits = read("digits")
    assert (digits.name, digits.resolution, digits.channels, digits.label_dim) == ("digits", 8, 1, 0)
    assert digits.images.shape == (1797, 8, 8, 1) and digits.images.dtype == torch.uint8
    assert digits.images.unique().tolist() == [round(level * 255 / 16) for level in range(17)]
    assert digits.labels is None
    assert Path(image_files.__file__).parents[1].joinpath("digits.npz").stat().st_size < 50_000


def test_classes_of_json_are_zero_to_the_largest(tmp_path: Path) -> None:
    found = read(write_zip(tmp_path / "a.zip", edm_files(noise(3, 8, 8, 3), [4, 0, 4])), labels=True)
    assert found.labels is not None and found.labels.tolist() == [[0, 0, 0, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]


def test_vector_labels(tmp_path: Path) -> None:
    vectors = [[0.5, -1.0], [2, 3.25]]
    found = read(write_folder(tmp_path / "a", edm_files(noise(2, 8, 8, 3), vectors)), labels=True)
    assert found.labels is not None and found.labels.dtype == torch.float32
    assert found.labels.tolist() == vectors


def test_folder_of_images_in_sorted_order_with_folders_as_classes(tmp_path: Path) -> None:
    y = noise(4, 16, 16, 3)
    bmp = io.BytesIO()
    Image.fromarray(y[3]).save(bmp, "BMP")
    files = {"dog/x/2.PNG": png(y[2]), "cat/1.png": png(y[1]), "cat/0.png": png(y[0]), "dog/y/0.bmp": bmp.getvalue()}
    extra = {"README.txt": b"text", "cat/._0.png": b"macOS", ".DS_Store": b"macOS"}
    found = read(write_folder(tmp_path / "pets", files | extra), labels=True)
    assert np.array_equal(found.images.numpy(), y)
    assert found.labels is not None and found.labels.tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]


def test_grey_images_keep_one_channel(tmp_path: Path) -> None:
    y = noise(2, 8, 8)
    found = read(write_folder(tmp_path / "grey", {f"{i}.png": png(y[i]) for i in range(2)}))
    assert np.array_equal(found.images.numpy(), y[..., None])


def test_source_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    write_folder(tmp_path / "mine", {"0.png": png(noise(8, 8, 3))})
    assert read("~/mine").name == "mine"


def test_resolution_crops_the_centre_and_resizes(tmp_path: Path) -> None:
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = (200, 100, 50)
    tall = np.ascontiguousarray(wide.transpose(1, 0, 2))
    exact = noise(8, 8, 3)
    path = write_folder(tmp_path / "a", {"0.png": png(wide), "1.png": png(tall), "2.png": png(exact)})
    images = read(path, resolution=8).images
    assert images.shape == (3, 8, 8, 3)
    assert bool((images[:2] == torch.tensor([200, 100, 50], dtype=torch.uint8)).all())
    assert np.array_equal(images[2].numpy(), exact)


def test_resolution_of_arrays_equals_that_of_files(tmp_path: Path) -> None:
    digits = read("digits").images[:5].numpy()
    folder = write_folder(tmp_path / "a", {f"{i}.png": png(y) for i, y in enumerate(digits)})
    large = read("digits", resolution=16).images
    assert large.shape == (1797, 16, 16, 1)
    assert torch.equal(large[:5], read(folder, resolution=16).images)
    assert torch.equal(read("digits", resolution=8).images, read("digits").images)


def test_photos_are_turned_upright(tmp_path: Path) -> None:
    y = noise(8, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated clockwise by 90 degrees
    file = io.BytesIO()
    Image.fromarray(y).save(file, "PNG", exif=exif)
    images = read(write_folder(tmp_path / "a", {"0.png": file.getvalue()})).images
    assert np.array_equal(images[0].numpy(), np.rot90(y, -1))


def test_dataset_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        read("digits").name = "other"  # type: ignore[misc]


# What is refused, and in which words.


def test_sources_that_are_not_data_sets(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere")
    assert f"--data.source {tmp_path / 'nowhere'}: no such file or folder" in message and "'digits'" in message
    (tmp_path / "model.pkl").write_bytes(b"x")
    assert "model.pkl: not a data set file" in refusal(tmp_path / "model.pkl")
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'}: no images in it" in refusal(tmp_path / "empty")
    assert "e.zip: no images in it" in refusal(write_zip(tmp_path / "e.zip", {"a.txt": b"text"}))


@pytest.mark.parametrize("resolution", [0, -8, 2, 26])
def test_resolution_must_be_a_multiple_of_four(resolution: int) -> None:
    assert f"--data.resolution {resolution}: expected a multiple of 4" in refusal("digits", resolution=resolution)


@pytest.mark.parametrize("write", [write_folder, write_zip])
def test_sizes_that_do_not_fit(tmp_path: Path, write: Callable[[Path, dict[str, bytes]], Path]) -> None:
    good = png(noise(32, 32, 3))
    mixed = write(tmp_path / "mixed.zip", {"a.png": good, "b.png": png(noise(64, 64, 3))})
    message = refusal(mixed)
    assert str(mixed / "b.png") in message and "64x64 pixels, but a.png has 32x32" in message
    assert "--data.resolution 32" in message
    for size, found, remedy in (((32, 64), "64x32", 32), ((30, 30), "30x30", 32), ((100, 90), "90x100", 64)):
        path = write(tmp_path / f"{found}.zip", {"a.png": png(noise(*size, 3)), "b.png": good})
        message = refusal(path)
        assert f"{path / 'a.png'}: {found} pixels" in message and f"--data.resolution {remedy}" in message
        assert read(path, resolution=32).images.shape == (2, 32, 32, 3)


def test_colour_modes_that_do_not_fit(tmp_path: Path) -> None:
    good = png(noise(8, 8, 3))
    for mode in ("RGBA", "P", "1", "LA", "I;16"):
        file = io.BytesIO()
        Image.new(mode, (8, 8)).save(file, "PNG")
        message = refusal(write_folder(tmp_path / "a", {"a.png": good, "b.png": file.getvalue()}), resolution=8)
        assert f"{tmp_path / 'a' / 'b.png'}: colour mode {mode}. Expected 8-bit grey (L) or RGB" in message
        assert "convert" in message
    message = refusal(write_folder(tmp_path / "a", {"b.png": png(noise(8, 8))}))
    assert f"{tmp_path / 'a' / 'b.png'}: grey, but a.png is RGB" in message and "convert" in message


def test_damaged_images_and_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = png(noise(32, 32, 3))
    for damaged in (b"", b"text", good[:-500], good[:40]):
        files = {"a.png": good, "b.png": damaged}
        for path in (write_folder(tmp_path / "f", files), write_zip(tmp_path / "z.zip", files)):
            assert f"{path / 'b.png'}: cannot be read as an image" in refusal(path)
    whole = (tmp_path / "z.zip").read_bytes()
    (tmp_path / "z.zip").write_bytes(whole[: len(whole) // 2])
    assert "z.zip: damaged, truncated" in refusal(tmp_path / "z.zip")
    flipped = write_zip(tmp_path / "c.zip", {"a.png": good}).read_bytes().replace(good[60:70], bytes(10))
    (tmp_path / "c.zip").write_bytes(flipped)
    assert "c.zip: damaged" in refusal(tmp_path / "c.zip") and "a.png" in refusal(tmp_path / "c.zip")
    monkeypatch.setattr(image_files, "MAX_BYTES", 10)
    assert "0.png: 11 bytes unpacked" in refusal(write_zip(tmp_path / "a.zip", {"0.png": b"x" * 11}))


def images_with_json(content: Any) -> dict[str, bytes]:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return {"0/a.png": png(noise(8, 8, 3)), "1/b.png": png(noise(8, 8, 3)), "dataset.json": text}


@pytest.mark.parametrize("write", [write_folder, write_zip])
@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        ([], 'has no "labels" (or null)'),
        ({}, 'has no "labels" (or null)'),
        ({"labels": None}, 'has no "labels" (or null)'),
        ({"labels": {}}, '"labels" must be a list of [file name, label] pairs, not dict'),
        ({"labels": [["0/a.png"]]}, '"labels"[0] must be a [file name, label] pair'),
        ({"labels": [["0/a.png", 0]]}, "no label for 1/b.png (1 of 2 images have none)"),
        ({"labels": [["0/a.png", 0], ["0/a.png", 1]]}, "0/a.png is labelled twice"),
        ({"labels": [["0/a.png", 0], ["1/b.png", 1], ["c.png", 1]]}, "it labels c.png, which is not there (3 labels"),
        ({"labels": [["0/a.png", 0], ["1/b.png", -1]]}, "label -1 of 1/b.png: expected a class index in 0.."),
        ({"labels": [["0/a.png", 0], ["1/b.png", 10**9]]}, "label 1000000000 of 1/b.png"),
        ({"labels": [["0/a.png", 0], ["1/b.png", [0.5]]]}, "label [0.5] of 1/b.png: expected a class index"),
        ({"labels": [["0/a.png", [0.5]], ["1/b.png", 0]]}, "label 0 of 1/b.png: expected class indices"),
        ({"labels": [["0/a.png", [0.5]], ["1/b.png", [1, 2]]]}, "label [1, 2] of 1/b.png"),
        ({"labels": [["0/a.png", [0.5]], ["1/b.png", [float("nan")]]]}, "label [nan] of 1/b.png"),
        ({"labels": [["0/a.png", []], ["1/b.png", []]]}, "label [] of 0/a.png"),
        ({"labels": [["0/a.png", "cat"], ["1/b.png", "dog"]]}, "label cat of 0/a.png"),
        ({"labels": [["0/a.png", True], ["1/b.png", False]]}, "label True of 0/a.png"),
    ],
)
def test_labels_that_do_not_fit(
    tmp_path: Path, write: Callable[[Path, dict[str, bytes]], Path], content: Any, part: str
) -> None:
    path = write(tmp_path / "a.zip", images_with_json(content))
    message = refusal(path, labels=True)
    assert message.startswith(str(path / "dataset.json")) and part in message
    assert read(path).labels is None  # not asked for, hence not read


def test_labels_asked_for_but_absent(tmp_path: Path) -> None:
    y = png(noise(8, 8, 3))
    zipped = write_zip(tmp_path / "a.zip", {"0/a.png": y, "1/b.png": y})
    assert "a.zip: --data.labels was given, but the zip holds no dataset.json" in refusal(zipped, labels=True)
    message = refusal(write_folder(tmp_path / "one", {"cat/a.png": y}), labels=True)
    assert "only one class folder (cat)" in message and "without --data.labels" in message
    message = refusal(write_folder(tmp_path / "two", {"cat/a.png": y, "b.png": y}), labels=True)
    assert str(tmp_path / "two" / "b.png") in message and "no class folder" in message
