"""ect.files.edm_pickle: networks come out of a snapshot bit for bit, with the arguments to build them; others are refused."""

from __future__ import annotations

import hashlib
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ect import models
from ect.errors import UserError
from ect.files.edm_pickle import UnsafePickle, read
from tests import edm_files as edm
from tests.edm_files import SMALL, small_net

COND = {**SMALL, "label_dim": 10, "model_channels": 8}
NCSNPP = {**COND, "embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual"}
NCSNPP |= {"resample_filter": [1, 3, 3, 1]}
SPECS: dict[str, dict[str, Any]] = {
    "ddpmpp": {"precond": "EDMPrecond", "sigma_data": 0.5, "unet": "SongUNet", "kwargs": {**SMALL, "augment_dim": 9}},
    "ncsnpp": {"precond": "EDMPrecond", "sigma_data": 0.6, "unet": "SongUNet", "kwargs": NCSNPP},
    "adm": {"precond": "ECMPrecond", "sigma_data": 0.5, "sigma_min": 0.002, "unet": "DhariwalUNet", "kwargs": COND},
}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def refusal(path: Path, net: object) -> str:
    """The message with which a snapshot of `net` is refused."""
    return edm.refusal(path, edm.dump({"ema": net}))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "snapshot.pkl"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("snapshot_of", [edm.edm_snapshot, edm.ect_snapshot])
def test_round_trip(path: Path, snapshot_of: Callable[..., bytes], name: str, protocol: int) -> None:
    spec = SPECS[name]
    net = models.build(spec).eval()
    for value in net.state_dict().values():
        value.normal_(0, 0.2)
    snapshot = read(write(path, snapshot_of(edm.from_net(net, spec), protocol)))
    assert list(snapshot.state) == list(net.state_dict())
    for key, value in net.state_dict().items():
        got = snapshot.state[key]
        assert got.dtype == torch.float32 and got.is_contiguous() and torch.equal(got, value), key
    assert {**snapshot.spec, "kwargs": 0} == {**spec, "kwargs": 0}
    assert snapshot.spec["kwargs"].items() >= spec["kwargs"].items()
    again = models.build(snapshot.spec).eval()
    again.load_state_dict(snapshot.state)
    x, sigma, labels = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 40.0]), torch.eye(2, spec["kwargs"]["label_dim"])
    assert torch.equal(again(x, sigma, labels), net(x, sigma, labels))


def test_nothing_of_edm_is_imported(path: Path) -> None:
    read(write(path, edm.edm_snapshot(small_net())))
    assert not [name for name in sys.modules if name.startswith(("torch_utils", "dnnlib"))]


def test_info_names_the_source(path: Path) -> None:
    source = "raise SystemError  # \ud800"
    info = read(write(path, edm.edm_snapshot(small_net(source=source)))).info
    digest = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
    assert info["source_sha256"] == digest and info["class"] == "EDMPrecond" and info["source"] == "snapshot.pkl"
    assert "CC BY-NC-SA" in info["license"]


def test_another_key(path: Path) -> None:
    write(path, edm.dump({"ema": None, "net": small_net()}))
    assert torch.equal(read(path, key="net").state["model.weight"], edm.WEIGHT)


@pytest.mark.parametrize("numpy_module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
@pytest.mark.parametrize("scalar", [np.int64(8), np.uint8(8)])
def test_numpy_numbers_are_read(path: Path, numpy_module: bytes, scalar: Any) -> None:
    data = edm.dump({"ema": small_net({**SMALL, "model_channels": scalar})}, protocol=2)
    for written in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        data = data.replace(b"c%s\nscalar\n" % written, b"c%s\nscalar\n" % numpy_module)
    assert b"c%s\nscalar\n" % numpy_module in data
    assert read(write(path, data)).spec["kwargs"]["model_channels"] == 8


def test_numpy_byte_order(path: Path) -> None:
    dtype = np.dtype(">i4")
    scalar = edm.Call(np.int32(8).__reduce__()[0], dtype, np.array(8, dtype).tobytes())
    write(path, edm.dump({"ema": small_net({**SMALL, "model_channels": scalar})}))
    assert read(path).spec["kwargs"]["model_channels"] == 8


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_storages_old_and_new(path: Path, dtype: torch.dtype, zipped: bool) -> None:
    values = torch.arange(24).to(dtype)
    storage = edm.Storage(edm.blob_of(edm.storage_of(values), zipped))
    write(path, edm.dump({"ema": small_net(weight=edm.View(storage, 2, (3, 2), (1, 4)))}))
    got = read(path).state["model.weight"]
    assert got.dtype == torch.float32 and got.is_contiguous()
    assert torch.equal(got, values.float().as_strided((3, 2), (1, 4), 2))


def test_strides_of_single_rows_do_not_matter(path: Path) -> None:
    storage = edm.Storage(edm.blob_of(edm.storage_of(torch.arange(3.0))))
    write(path, edm.dump({"ema": small_net(weight=edm.View(storage, 0, (1, 3), (999, 1)))}))
    assert torch.equal(read(path).state["model.weight"], torch.arange(3.0)[None])


def test_buffers(path: Path) -> None:
    buffers = {"kept": torch.ones(2), "transient": torch.ones(3), "absent": None}
    net = small_net(_buffers=buffers, _non_persistent_buffers_set={"transient"})
    assert list(read(write(path, edm.edm_snapshot(net))).state) == ["model.weight", "model.kept"]


# --- the description -------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_edm(path: Path) -> None:
    given = dict(img_resolution=64, in_channels=3, out_channels=3)
    common = dict(label_dim=0, augment_dim=0, channel_mult_emb=4, dropout=0.1, label_dropout=0.0)
    song = dict(model_channels=128, channel_mult=[1, 2, 2, 2], num_blocks=4, attn_resolutions=[16])
    song |= dict(embedding_type="positional", channel_mult_noise=1, encoder_type="standard", decoder_type="standard")
    song |= dict(resample_filter=[1, 1])
    adm = dict(model_channels=192, channel_mult=[1, 2, 3, 4], num_blocks=3, attn_resolutions=[32, 16, 8])
    for name, defaults in [("SongUNet", song), ("DhariwalUNet", adm)]:
        net = small_net(given, unet=name)
        assert read(write(path, edm.dump({"ema": net}))).spec["kwargs"] == {**given, **common, **defaults}


def test_the_preconditioner_may_be_the_only_one_to_know(path: Path) -> None:
    net = small_net({})
    net.state["_init_args"] = (8, 3, 5)
    net.state["_init_kwargs"] = dict(sigma_data=0.25, model_type="SongUNet", model_channels=8, num_blocks=0)
    spec = read(write(path, edm.dump({"ema": net}))).spec
    assert spec["sigma_data"] == 0.25
    expected = dict(img_resolution=8, in_channels=3, out_channels=3, label_dim=5, model_channels=8, num_blocks=0)
    assert spec["kwargs"].items() >= expected.items()


def test_attributes_win_over_arguments(path: Path) -> None:
    net = small_net(precond="ECMPrecond")
    net.state |= {"_init_kwargs": {"sigma_data": 0.25, "sigma_min": 0.1}, "sigma_data": 0.75}
    spec = read(write(path, edm.dump({"ema": net}))).spec
    assert (spec["sigma_data"], spec["sigma_min"]) == (0.75, 0.1)


def test_ecm_has_its_own_default(path: Path) -> None:
    assert read(write(path, edm.dump({"ema": small_net(precond="ECMPrecond")}))).spec["sigma_min"] == 0.003


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("VPPrecond", "VPPrecond.*edm-cifar10-32x32-uncond-vp.pkl"),
        ("VEPrecond", "VEPrecond.*parametrisation"),
        ("iDDPMPrecond", "iDDPMPrecond.*parametrisation"),
        ("Generator\x1b[31m", r"Generator\\x1b.*expected EDMPrecond, ECMPrecond or EDM2"),
    ],
)
def test_other_networks_are_refused_by_name(path: Path, name: str, says: str) -> None:
    write(path, edm.dump({"ema": small_net(precond=name)}))
    with pytest.raises(UnsafePickle, match=says):
        read(path)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({**SMALL, "window": 7}, "unknown argument window"),
        ({"img_resolution": 8}, "in_channels is missing"),
        ({**SMALL, "model_channels": -1}, "model_channels is missing or impossible; expected int"),
        ({**SMALL, "model_channels": 1 << 40}, "model_channels"),
        ({**SMALL, "model_channels": True}, "model_channels"),
        ({**SMALL, "channel_mult": 2}, "channel_mult"),
        ({**SMALL, "channel_mult": [1, "2"]}, "channel_mult"),
        ({**SMALL, "channel_mult": [1] * 99}, "channel_mult"),
        ({**SMALL, "dropout": float("nan")}, "dropout"),
        ({**SMALL, "encoder_type": "x" * 99}, "encoder_type"),
        ({**SMALL, "num_blocks": 30_000}, "num_blocks"),
    ],
)
def test_impossible_arguments_are_refused(path: Path, kwargs: dict[str, Any], says: str) -> None:
    assert says in refusal(path, small_net(kwargs))


def test_too_many_arguments(path: Path) -> None:
    assert "EDMPrecond was made with 9 arguments" in refusal(path, edm.with_state(small_net(), _init_args=(0,) * 9))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0, "0.5"])
def test_impossible_sigma_data(path: Path, value: object) -> None:
    assert "sigma_data" in refusal(path, edm.with_state(small_net(), sigma_data=value))


# --- the modules -----------------------------------------------------------------------------------------------------


def test_cyclic_modules(path: Path) -> None:
    net = small_net()
    net.state["_modules"]["model"].state["_modules"]["again"] = nn.ModuleList()
    net.state["_modules"]["model"].state["_modules"]["again"]._modules["0"] = net.state["_modules"]["model"]
    assert "contains itself" in refusal(path, net)


def test_module_that_is_there_twice(path: Path) -> None:
    child = edm.Persistent("Linear", edm.module_state({"weight": edm.WEIGHT}, {}))
    assert "twice" in refusal(path, small_net(_modules={"a": child, "b": child}))


def test_deep_modules(path: Path) -> None:
    child = edm.Persistent("Linear", edm.module_state({"weight": edm.WEIGHT}, {}))
    for _ in range(40):
        child = edm.Persistent("Block", edm.module_state({}, {"x": child}))
    assert "nested deeper" in refusal(path, small_net(_modules={"a": child}))


def test_weights_that_share_memory_cannot_fill_it(path: Path) -> None:
    parameters = {f"p{i}": edm.WEIGHT for i in range(1000)}
    assert "model.p1 shares its memory" in refusal(path, small_net(_parameters=parameters))


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"_parameters": {"weight": 1.0}}, "model.weight is no tensor of real numbers"),
        ({"_parameters": {"weight": torch.zeros(2, dtype=torch.int64)}}, "model.weight is no tensor of real numbers"),
        ({"_parameters": {"a.b": edm.WEIGHT}}, "impossible name"),
        ({"_parameters": {"a" * 101: edm.WEIGHT}}, "impossible name"),
        ({"_parameters": {7: edm.WEIGHT}}, "impossible name"),
        ({"_buffers": {"weight": torch.zeros(2)}}, "model.weight is no tensor of real numbers, or is there twice"),
        ({"_modules": {"a": "text"}}, "model.a. is a value of type str instead of a module"),
        ({"_modules": {"a": nn.Identity}}, "asks for torch.nn.modules.linear.Identity"),
        ({"_modules": [1]}, "impossible name"),
        ({"_parameters": {}}, "no weights"),
    ],
)
def test_modules_that_are_none(path: Path, state: dict[str, Any], says: str) -> None:
    assert says in refusal(path, small_net(**state))


@pytest.mark.parametrize(
    "meta", [{"version": 7}, {"type": "function"}, {"class_name": 1}, {"module_src": b""}, {"state": []}]
)
def test_other_persistent_objects(path: Path, meta: dict[str, Any]) -> None:
    net = small_net()
    net.meta = meta
    assert "_reconstruct_persistent_obj: " in refusal(path, net) and "persistent object" in refusal(path, net)


def test_network_without_unet(path: Path) -> None:
    assert "'model' is a value of type NoneType" in refusal(path, edm.Persistent("EDMPrecond", {}))
    assert "'model' is UNet" in refusal(path, small_net(unet="UNet"))


# --- files that are something else -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"net": 1, "loss_fn": 2}, "has no 'ema'; it holds net, loss_fn"),
        ({"ema": {"weight": 1}}, "'ema' is a value of type dict; expected a network"),
        ([1, 2], "holds a value of type list"),
        (OrderedDict(a=torch.ones(2)), "weights by name .*without the description.*network-snapshot"),
        ({"ema": Path("x")}, r"asks for pathlib.*Nothing was executed; it is another file than a snapshot$"),
        (np.ones(2), "holds a value of type Array; expected a dictionary"),
        (np.ones(2)[None].view(np.matrix), r"asks for numpy.*it is another file than a snapshot$"),
        (Fraction(1), r"asks for fractions.*do not open this file with other programs unless you trust its source$"),
        (0x1950A86A20F9469CFC6C, "training-state"),
    ],
)
def test_other_pickles(path: Path, value: object, says: str) -> None:
    write(path, pickle.dumps(value, 4))
    with pytest.raises(UnsafePickle, match=says):
        read(path)


@pytest.mark.parametrize("zipped", [False, True])
def test_training_state_is_refused_with_a_hint(path: Path, zipped: bool) -> None:
    write(path, edm.blob_of({"net": nn.Linear(2, 2), "optimizer_state": {}}, zipped))
    with pytest.raises(UnsafePickle, match=r"training-state-\*.pt is; give the network-snapshot-\*.pkl"):
        read(path)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1", "git-lfs pointer.*git lfs pull"),
        (b"", "empty"),
        (b"<!DOCTYPE html>", "no EDM/ECT snapshot.*<!DOCTYPE"),
        (b"a b c", "no EDM"),
    ],
)
def test_files_that_are_no_pickle(path: Path, data: bytes, says: str) -> None:
    write(path, data)
    with pytest.raises(UnsafePickle, match=says):
        read(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for missing in (tmp_path, tmp_path / "none.pkl"):
        with pytest.raises(UserError, match="no such file"):
            read(missing)


def test_unreadable_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    write(path, b"x")
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(UserError, match=r"cannot be read.*Permission denied"):
        read(path)


def test_size_limit(path: Path) -> None:
    data = edm.edm_snapshot(small_net())
    write(path, data)
    read(path, max_bytes=len(data))
    with pytest.raises(UnsafePickle, match=f"max_bytes = {len(data) - 1}"):
        read(path, max_bytes=len(data) - 1)
