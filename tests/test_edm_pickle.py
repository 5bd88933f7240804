"""ect.edm_pickle: snapshots read bit for bit, and hostile ones refused by name with nothing executed."""

from __future__ import annotations

import builtins
import copyreg
import functools
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ect import models
from ect.edm_pickle import Snapshot, UnsafePickle, read
from ect.errors import UserError
from tests import edm_files as edm
from tests.golden_data import MANIFEST

SONG = dict(img_resolution=8, in_channels=3, out_channels=3, label_dim=0, model_channels=8, channel_mult=[1, 2])
SONG |= dict(num_blocks=1, attn_resolutions=[4], dropout=0.13)
NETS: dict[str, dict[str, Any]] = {
    "ddpmpp": {"precond": "EDMPrecond", "sigma_data": 0.5, "unet": "SongUNet", "kwargs": {**SONG, "augment_dim": 9}},
    "ncsnpp": {
        "precond": "EDMPrecond",
        "sigma_data": 0.5,
        "unet": "SongUNet",
        "kwargs": {
            **SONG, "label_dim": 10, "embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual",
            "resample_filter": [1, 3, 3, 1],
        },
    },
    "adm": {
        "precond": "ECMPrecond",
        "sigma_data": 0.6,
        "sigma_min": 0.002,
        "unet": "DhariwalUNet",
        "kwargs": {**SONG, "model_channels": 32, "label_dim": 5},
    },
}  # fmt: skip


def random_net(spec: dict[str, Any]) -> nn.Module:
    net = models.build(spec)
    for value in net.state_dict().values():
        value.normal_(0, 0.2)
    return net.eval()


def small_net(**state: Any) -> edm.Persistent:
    """The least that `read` takes for a network: one weight. `state` adds to, or replaces, attributes of the U-Net."""
    weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))
    unet_state = edm.module_state({"weight": weight}, {}, _init_args=(), _init_kwargs={**SONG, "num_blocks": 0})
    unet = edm.Persistent("SongUNet", {**unet_state, **state})
    return edm.Persistent("EDMPrecond", edm.module_state({}, {"model": unet}))


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def refusal(path: Path, data: bytes, **options: Any) -> str:
    """The message that `read` refuses the file with."""
    with pytest.raises(UnsafePickle) as caught:
        read(write(path, data), **options)
    assert isinstance(caught.value, UserError) and isinstance(caught.value, pickle.UnpicklingError)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.isprintable()
    return message


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "snapshot.pkl"


# --- what must load --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("file", [edm.edm_snapshot, edm.ect_snapshot])
def test_round_trip(path: Path, name: str, protocol: int, file: Callable[..., bytes]) -> None:
    spec = NETS[name]
    net = random_net(spec)
    snapshot = read(write(path, file(edm.from_net(net, spec["precond"], spec), protocol)))
    assert list(snapshot.state) == list(net.state_dict())
    for key, value in net.state_dict().items():
        got = snapshot.state[key]
        assert got.dtype == torch.float32 and got.is_contiguous() and torch.equal(got, value), key
    copy = models.build(snapshot.spec).eval()
    copy.load_state_dict(snapshot.state)
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 40.0])
    labels = torch.eye(2, net.label_dim) if net.label_dim else None
    assert torch.equal(copy(x, sigma, labels), net(x, sigma, labels))
    assert {key: snapshot.spec[key] for key in spec if key != "kwargs"} == {k: v for k, v in spec.items() if k != "kwargs"}
    assert snapshot.spec["kwargs"].items() >= spec["kwargs"].items()


def test_info(path: Path) -> None:
    source = "raise SystemError('never executed') # \ud800"
    net = small_net()
    net.source = source
    info = read(write(path, edm.edm_snapshot(net))).info
    digest = "f9cdd7ffe20ee4e1a8c2f1dd2a4a4c3a"
    assert info["class"] == "EDMPrecond" and info["key"] == "ema" and info["source"] == "snapshot.pkl"
    assert len(info["source_sha256"]) == 2 * len(digest) and "CC BY-NC-SA" in info["license"]


def test_another_key(path: Path) -> None:
    write(path, edm.dump({"ema": None, "net": small_net()}))
    assert torch.equal(read(path, key="net").state["model.weight"], torch.arange(6.0).reshape(2, 3))
