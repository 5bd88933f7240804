"""ect.files.torch_file: what torch.load(weights_only=True) gives, from the old form and the new; hostile files are refused."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ect.errors import UserError
from ect.files import torch_file
from ect.files.safe_pickle import UnsafePickle
from ect.metrics.weights import read_state
from tests import edm_files as edm

DEEP = 200_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.pth"


def refusal(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(UnsafePickle) as caught:
        torch_file.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.isprintable()
    return message


def with_pickle(pickled: bytes) -> bytes:
    """A file of torch.save's new form around a pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    return file.getvalue()


def state() -> dict[str, torch.Tensor]:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).half()
    shared = torch.arange(12.0).view(3, 4)
    extra = {"view": shared[1:, ::2], "again": shared, "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 2)}
    return {**net.state_dict(), **extra, "bf16": torch.ones(3, dtype=torch.bfloat16), "u1": torch.arange(4).byte()}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_weights_are_those_of_torch(path: Path, zipped: bool, plain: bool) -> None:
    torch.manual_seed(0)
    saved = dict(state()) if plain else nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).state_dict()
    path.write_bytes(edm.blob_of(saved, zipped))
    got, expected = torch_file.read(path), torch.load(path, weights_only=True)
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name
    assert read_state(path).keys() == expected.keys()


def test_statistics_of_numpy(path: Path) -> None:
    statistics = {"mu": np.arange(3, dtype=np.float32), "sigma": np.asfortranarray(np.arange(6.0).reshape(2, 3))}
    torch.save(statistics, path)
    got = torch_file.read(path)
    assert all(
        np.array_equal(got[name], value) and got[name].dtype == value.dtype for name, value in statistics.items()
    )
    torch.save(torch.ones(2), path)
    assert torch.equal(torch_file.read(path), torch.ones(2))


class Old:
    """Pickles as torch 0.1 pickled a parameter: an empty one, whose state has the values first."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    def __reduce__(self) -> tuple[Any, ...]:
        return nn.parameter.Parameter, (), (self.data, None, OrderedDict(), True, False)


def test_parameters_of_old_torch(path: Path) -> None:
    """VGG16's public file is of that time."""
    path.write_bytes(edm.blob_of({"weight": Old(torch.arange(3.0))}, zipped=False))
    assert torch.equal(read_state(path)["weight"], torch.arange(3.0))
    path.write_bytes(edm.blob_of({"weight": Old("text")}, zipped=False))  # type: ignore[arg-type]
    assert "a parameter without values" in refusal(path, path.read_bytes())


@pytest.mark.parametrize("zipped", [False, True])
def test_code_is_not_executed(path: Path, tmp_path: Path, zipped: bool) -> None:
    data = edm.blob_of({"a": edm.Call(os.mkdir, str(tmp_path / "executed"))}, zipped)
    assert f"asks for {os.mkdir.__module__}.mkdir, which no weight file needs" in refusal(path, data)
    assert not (tmp_path / "executed").exists()


BOMBS = {
    "deep key": b"}" + b")" + b"\x85" * DEEP + b"Ns",
    "deep": b")" + b"\x85" * DEEP + b"0N",
    "deep argument": b"ctorch._utils\n_rebuild_parameter\n)" + b"\x85" * DEEP + b"R",
    "hash": b"}("
    + b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(60_000))
    + b"u",
    "length": b"\x8e" + struct.pack("<Q", 1 << 62),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("old", [False, True])
def test_bombs(path: Path, name: str, old: bool) -> None:
    pickled = b"\x80\x04" + BOMBS[name] + b"."
    if old:
        pickled = pickle.dumps(torch_file.TORCH_MAGIC) + pickle.dumps(1001) + pickle.dumps({}) + pickled
    path.write_bytes(pickled if old else with_pickle(pickled))
    with pytest.raises(UserError, match=r"cannot be read safely|holds NoneType"):
        read_state(path)


def test_storages_beyond_the_file(path: Path) -> None:
    """A claim of 4 GB, and one storage under a thousand types, ask for no memory."""
    kind = b"ctorch\nFloatStorage\n"
    claim = b"(\x8c\x07storage" + kind + b"\x8c\x010\x8c\x03cpu\x8a\x05" + (1 << 30).to_bytes(5, "little") + b"tQ"
    assert "storages of more bytes than the file has" in refusal(path, with_pickle(b"\x80\x04" + claim + b"."))
    old = pickle.dumps(torch_file.TORCH_MAGIC) + pickle.dumps(1001) + pickle.dumps({})
    assert "storages of more bytes than the file has" in refusal(path, old + b"\x80\x04" + claim + b".")


def test_expanded_tensors_are_read_within_bounds(path: Path) -> None:
    torch.save({"a": torch.ones(()).expand(1 << 20)}, path)
    assert torch.equal(torch_file.read(path)["a"], torch.ones(1 << 20))
    for sizes in ([1 << 30], [1 << 28] * 3, [1 << 62]):
        data = edm.blob_of({f"a{i}": torch.ones(()).expand(size) for i, size in enumerate(sizes)}, zipped=True)
        assert " elements " in refusal(path, data)


@pytest.mark.parametrize("zipped", [False, True])
def test_every_truncation_is_reported(path: Path, zipped: bool) -> None:
    data = edm.blob_of({"a": torch.arange(4.0), "b": torch.ones(2, 2)}, zipped)
    for end in range(0, len(data), 7):
        assert refusal(path, data[:end])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a git-lfs pointer, not the file itself"),
        (b"\n<!DOCTYPE html><html>", "a web page, not the file itself"),
        (pickle.dumps([1, 2]), "torch.save has not written it"),
    ],
)
def test_other_files_are_named(path: Path, data: bytes, says: str) -> None:
    assert says in refusal(path, data)
