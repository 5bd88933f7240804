"""CIFAR-10 is read from tarball and folder, whichever Python packed it; damaged or hostile files are refused."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
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
from ect.data.readers import cifar10
from ect.errors import UserError

COUNT = 24  # images that are not all zeros, so that the archive is small


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


def cifar_arrays() -> tuple[np.ndarray, list[int]]:
    data = np.zeros((50_000, 3072), np.uint8)
    data[:COUNT] = np.random.default_rng(0).integers(0, 256, (COUNT, 3072), np.uint8)
    data[10_000, 0] = 7  # the first value of the second batch
    return data, [(i * 7 + i // 10) % 10 for i in range(50_000)]


def python2_string(content: bytes) -> bytes:
    return b"T" + struct.pack("<I", len(content)) + content


def python2_batch(data: np.ndarray, labels: list[int]) -> bytes:
    """The bytes that Python 2's cPickle wrote: byte strings, numpy's names of that time."""
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + python2_string(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n(" + python2_string(b"u1") + b"K\x00K\x01tR"
    dtype += b"(K\x03" + python2_string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"(" + b"".join(b"J" + struct.pack("<i", n) for n in data.shape) + b"t"
    array += b"(K\x01" + shape + dtype + b"I00\n" + python2_string(data.tobytes()) + b"tb"
    items = python2_string(b"batch_label") + python2_string(b"training batch")
    items += python2_string(b"data") + array
    items += python2_string(b"labels") + b"](" + b"".join(b"K" + bytes([v]) for v in labels) + b"e"
    return b"\x80\x02}(" + items + b"u."


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode, **({"compresslevel": 1} if mode == "w:gz" else {})) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def cifar_tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data, labels = cifar_arrays()
    files = {"cifar-10-batches-py/batches.meta": b"not read"}
    for i in (4, 0, 1, 2, 3):  # not in order, as in the public archive
        rows = slice(10_000 * i, 10_000 * (i + 1))
        files[f"cifar-10-batches-py/data_batch_{i + 1}"] = python2_batch(data[rows], labels[rows])
    files["cifar-10-batches-py/test_batch"] = b"not read"
    return write_tar(tmp_path_factory.mktemp("cifar") / "cifar-10-python.tar.gz", files)


@pytest.fixture(scope="module")
def cifar(cifar_tar: Path) -> Dataset:
    return read(cifar_tar, labels=True)


def write_batches(root: Path, first: bytes) -> Path:
    """An extracted folder whose first batch is `first`; the others are never reached."""
    return write_folder(root, {name: first if name == "data_batch_1" else b"" for name in cifar10.BATCHES})


@pytest.mark.slow
def test_cifar_tarball(cifar: Dataset) -> None:
    data, labels = cifar_arrays()
    assert (cifar.name, cifar.resolution, cifar.channels, cifar.label_dim) == ("cifar10", 32, 3, 10)
    assert cifar.images.shape == (50_000, 32, 32, 3) and cifar.images.is_contiguous()
    assert np.array_equal(cifar.images[:COUNT].numpy(), data[:COUNT].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    assert cifar.images[10_000].flatten().nonzero().tolist() == [[0]]
    assert cifar.labels is not None and cifar.labels.dtype == torch.float32
    assert cifar.labels.argmax(1).tolist() == labels and bool((cifar.labels.sum(1) == 1).all())


@pytest.mark.slow
@pytest.mark.parametrize(("protocol", "order"), [(2, "C"), (4, "F")])
def test_cifar_folder_written_by_python_3(tmp_path: Path, cifar: Dataset, protocol: int, order: Any) -> None:
    """The extracted folder, found from its parent too, with numpy 2's names and either memory order."""
    data, labels = cifar_arrays()
    files = {}
    for i, name in enumerate(cifar10.BATCHES):
        rows = slice(10_000 * i, 10_000 * (i + 1))
        batch: dict[Any, Any] = {"data": np.array(data[rows], order=order), "labels": labels[rows]}
        if i > 0:  # one batch of the kind is enough
            batch = {b"data": data[rows], b"labels": labels[rows]}
        files[f"cifar-10-batches-py/{name}"] = pickle.dumps(batch, protocol if i == 0 else 4)
    root = write_folder(tmp_path, files)
    found = read(root if protocol == 4 else root / "cifar-10-batches-py")
    assert found.name == "cifar10" and found.labels is None
    assert torch.equal(found.images, cifar.images)


def test_zip_folder_and_cifar_pickle_give_the_same_bytes(tmp_path: Path, cifar: Dataset) -> None:
    assert cifar.labels is not None
    images, labels = cifar.images[:COUNT], cifar.labels[:COUNT]
    names = [f"{i // 10:05d}/img{i:08d}.png" for i in range(COUNT)]
    for name, y in zip(names, images.numpy(), strict=True):
        (tmp_path / "faces" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(y).save(tmp_path / "faces" / name)
    pairs = {"labels": list(zip(names, labels.argmax(1).tolist(), strict=True))}
    (tmp_path / "faces" / "dataset.json").write_text(json.dumps(pairs))
    with zipfile.ZipFile(tmp_path / "faces-32x32.zip", "w", zipfile.ZIP_STORED) as archive:
        for name in [*names, "dataset.json"]:
            archive.write(tmp_path / "faces" / name, name)
    zipped = read(tmp_path / "faces-32x32.zip", labels=True)
    folder = read(tmp_path / "faces", labels=True)
    assert (zipped.name, folder.name) == ("faces-32x32", "faces")
    for found in (zipped, folder):
        assert torch.equal(found.images, images) and found.images.is_contiguous()
        assert found.labels is not None and torch.equal(found.labels, labels)
    assert read(tmp_path / "faces").labels is None


def test_missing_cifar_says_where_to_get_it_and_where_to_put_it(tmp_path: Path) -> None:
    for name in ("cifar-10-python.tar.gz", "cifar-10-batches-py"):
        message = refusal(tmp_path / name)
        for part in (str(tmp_path / name), cifar10.URL, cifar10.MD5, "put it there", "--data.source"):
            assert part in message


def test_truncated_cifar(tmp_path: Path, cifar_tar: Path) -> None:
    content = cifar_tar.read_bytes()
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(content[: len(content) // 2])
    assert "truncated" in refusal(path) and cifar10.MD5 in refusal(path)
    path.write_bytes(b"<html>404</html>")
    assert "no tar archive" in refusal(path)


def test_cifar_without_a_batch(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "c.tar", {"data_batch_1": b"", "data_batch_3": b""}, "w")
    message = refusal(path)
    assert "c.tar: data_batch_2 is missing; expected data_batch_1 to data_batch_5" in message
    assert "data_batch_1 is missing" in refusal(write_folder(tmp_path / "cifar-10-batches-py", {"data_batch_2": b""}))


ROW = np.zeros((1, 3072), np.uint8)


@pytest.mark.parametrize(
    ("batch", "part"),
    [
        ([], "expected a dict with data and labels, found list"),
        ({"labels": []}, "found NoneType"),
        ({"data": ROW, "labels": [1]}, "shape (10000, 3072), found shape (1, 3072)"),
        ({"data": ROW.astype(np.int16), "labels": [1]}, "must be a uint8 array"),
        ({"data": np.zeros((10_000, 3072), np.uint8), "labels": [1]}, "a list of 10000 integers in 0..9"),
        ({"data": np.zeros((10_000, 3072), np.uint8), "labels": [0] * 9_999 + [10]}, "10000 integers in 0..9"),
    ],
)
def test_cifar_batch_of_another_form(tmp_path: Path, batch: Any, part: str) -> None:
    message = refusal(write_batches(tmp_path, pickle.dumps(batch, 4)))
    assert str(tmp_path / "data_batch_1") in message and part in message and cifar10.URL in message


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def test_hostile_cifar_pickles_are_refused_by_name_and_run_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    hostile = {
        b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR.": "os.system",
        pickle.dumps({"data": Call(eval, f"open({str(mark)!r}, 'w')")}, 2): "builtins.eval",
        pickle.dumps({"data": Call(getattr, b"", "hex")}, 4): "builtins.getattr",
        pickle.dumps(np.float64(1), 4): ".scalar",
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.": "_codecs.encode: another encoding",
    }
    for content, name in hostile.items():
        message = refusal(write_batches(tmp_path, content))
        assert name in message and "refused" in message and str(tmp_path / "data_batch_1") in message
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02}",
        b"garbage",
        b"\x80\x02}r\xf0\xff\xff\xff",
    ],
)
def test_damaged_cifar_pickles(tmp_path: Path, content: bytes) -> None:
    assert "data_batch_1: truncated or damaged" in refusal(write_batches(tmp_path, content))


def test_oversized_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "MAX_BYTES", 10)
    assert "data_batch_1: 11 bytes" in refusal(write_batches(tmp_path, b"x" * 11))
    assert "data_batch_1: 11 bytes" in refusal(write_tar(tmp_path / "c.tgz", {"data_batch_1": b"x" * 11}))


def test_an_archive_of_something_else_is_not_taken_for_cifar(tmp_path: Path) -> None:
    message = refusal(write_tar(tmp_path / "images.tar", {"images/0.png": b"png"}, "w"))
    assert "an archive without any of CIFAR-10's files" in message and "unpack it, and pass --data.source" in message
