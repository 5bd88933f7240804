"""Tensors in a pickle: no view leaves its storage, and no storage is more than the bytes that are there."""

from __future__ import annotations

import io
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests import edm_files as edm
from tests.edm_files import Call, Storage, View, refusal, small_net


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "snapshot.pkl"


FLOATS = Storage(edm.blob_of(edm.storage_of(torch.arange(6.0))))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((FLOATS, 0, (1 << 40,), (0,)), "a tensor of 1099511627776 elements on a storage of 6"),
        ((FLOATS, 0, (4, 3), (0, 1)), "a tensor of 12 elements on a storage of 6"),
        ((FLOATS, 1, (2, 3), (3, 1)), "outside its storage of 6"),
        ((FLOATS, 6, (), ()), "outside its storage of 6"),
        ((FLOATS, 0, (2, 2), (5, 1)), "outside its storage of 6"),
        ((FLOATS, 0, (2,), (1 << 62,)), "outside its storage of 6"),
        ((FLOATS, -1, (2,), (1,)), "no counts"),
        ((FLOATS, 0, (-2,), (1,)), "no counts"),
        ((FLOATS, 5, (2,), (-1,)), "no counts"),
        ((FLOATS, 0, (1 << 70,), (0,)), "no counts"),
        ((FLOATS, 0, (True,), (1,)), "no counts"),
        ((FLOATS, 0.0, (2,), (1,)), "no counts"),
        ((FLOATS, 0, (2.0,), (1,)), "no counts"),
        ((FLOATS, 0, (2, 3), (1,)), "2 sizes and 1 strides"),
        ((FLOATS, 0, (1,) * 100, (1,) * 100), "100 sizes"),
        ((FLOATS, 0, 6, 1), "where a list is expected"),
        ((FLOATS, 0, (6,), (1,), False, {"hook": 1}), "hooks"),
        ((FLOATS, 0, (6,), (1,), False, {}, {"conj": True}), "metadata"),
        ((b"abc", 0, (6,), (1,)), "without storage"),
        ((torch.zeros(6), 0, (6,), (1,)), "without storage"),
    ],
)
def test_tensors_stay_in_their_storage(path: Path, arguments: tuple[Any, ...], says: str) -> None:
    message = refusal(path, edm.dump({"ema": small_net(weight=View(*arguments))}))
    assert re.search(says, message) and "_rebuild_tensor_v2" in message


def zip_with(changes: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The new form of a storage of 6 floats, with other contents in some members (b"" leaves one out)."""
    source, target = zipfile.ZipFile(io.BytesIO(edm.blob_of(edm.storage_of(torch.arange(6.0)), True))), io.BytesIO()
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name in source.namelist():
            data = changes.get(name.partition("/")[2], source.read(name))
            if data:
                archive.writestr(name, data)
    return target.getvalue()


LEGACY = edm.blob_of(edm.storage_of(torch.arange(6.0)))
SIX = struct.pack("<q", 6)
STORAGE_PICKLE = b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu%stQ."


@pytest.mark.parametrize(
    ("blob", "says"),
    [
        (b"", "do not fit"),
        (b"abc", "do not fit"),
        (pickle.dumps([1, 2], 2), "do not fit"),
        (pickle.dumps(5, 2) * 2, "torch.save has not written"),
        (LEGACY[:-1], "a storage of 24 bytes, of which 23 are there"),
        (LEGACY + b"x", "a storage of 24 bytes, of which 25 are there"),
        (LEGACY.replace(SIX, struct.pack("<q", 1 << 40)), "two different sizes"),
        (LEGACY.replace(SIX, struct.pack("<q", -6)), "two different sizes"),
        (edm.blob_of({"a": 1}), "a value of type dict instead of a storage"),
        (edm.blob_of(nn.Linear(1, 1)), "asks for torch.nn.modules.linear.Linear,"),
        (edm.blob_of(torch.zeros(2)), "asks for torch._utils._rebuild_tensor_v2,"),
        (edm.blob_of(edm.storage_of(torch.zeros(2, dtype=torch.complex64))), "asks for torch.ComplexFloatStorage,"),
        (edm.blob_of([1], True), "a value of type list instead of a storage"),
        (zip_with({}, zipfile.ZIP_DEFLATED), "compressed data"),
        (zip_with({"data/0": bytes(23)}), "a storage of 24 bytes, of which 23 are there"),
        (zip_with({"data/0": b""}), "do not fit"),
        (zip_with({"data.pkl": b""}), "do not fit"),
        (zip_with({"data.pkl": STORAGE_PICKLE % b"\x8a\x06\xff\xff\xff\xff\xff\x7f"}), "bytes, of which 24 are there"),
        (zip_with({"data.pkl": STORAGE_PICKLE % b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f"}), "no known type or size"),
        (zip_with({"data.pkl": STORAGE_PICKLE % b"\x8a\x01\xff"}), "no known type or size"),
        (
            zip_with({"data.pkl": STORAGE_PICKLE.replace(b"torch\nFloatStorage", b"os\nsystem") % b"K\x06"}),
            "asks for os.system,",
        ),
        (zip_with({"data.pkl": b"\x80\x02)Q."}), "unknown persistent id"),
        (zip_with({"data.pkl": STORAGE_PICKLE % b"K\x06K\x01"}), "unknown persistent id"),
        (b"PK\x03\x04" + bytes(100), "do not fit"),
        ("text", "a storage given as a value of type str"),
    ],
)
def test_damaged_and_hostile_storages(path: Path, blob: Any, says: str) -> None:
    message = refusal(path, edm.dump({"ema": small_net(weight=View(Storage(blob), 0, (6,), (1,)))}))
    assert says in message and "torch.storage._load_from_bytes" in message


def test_parameters_hold_tensors(path: Path) -> None:
    weight = Call(torch._utils._rebuild_parameter, [1.0], True, OrderedDict())
    assert "_rebuild_parameter: a parameter without tensor" in refusal(
        path, edm.dump({"ema": small_net(weight=weight)})
    )
