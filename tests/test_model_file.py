"""Model files: bit-exact, atomic, and clear about what is wrong; and whether weights fit a network."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ect.errors import UserError
from ect.files import checkpoint, model_file
from ect.files.atomic import atomic
from ect.files.checkpoint import load_model, read_model
from ect.files.edm_pickle import Snapshot
from ect.files.model_file import load_weights, save_model
from ect.models import ECMPrecond, EDMPrecond, build

INFO = {"preset": "digits", "nimg": 3, "mid_t": [0.5]}


def spec(precond: str = "ECMPrecond", **kwargs: Any) -> dict[str, Any]:
    unet = {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 8, "channel_mult": [1]}
    return {
        "precond": precond,
        "sigma_data": 0.5,
        "unet": "SongUNet",
        "kwargs": {**unet, "num_blocks": 1, "attn_resolutions": [], **kwargs},
    }


def saved(path: Path, **kwargs: Any) -> EDMPrecond:
    net = build(spec(**kwargs))
    save_model(path, net.state_dict(), spec(**kwargs), INFO)
    return net


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_a_model_file_gives_back_the_same_bits(tmp_path: Path) -> None:
    net = saved(tmp_path / "net.safetensors")
    snapshot = read_model(tmp_path / "net.safetensors")
    assert same(snapshot.state, net.state_dict())
    assert (snapshot.spec, snapshot.info) == (spec(), INFO)
    loaded, info = load_model(tmp_path / "net.safetensors")
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 7.0])
    assert torch.equal(loaded(x, sigma), net.eval()(x, sigma))
    assert isinstance(loaded, ECMPrecond) and not loaded.training and info == INFO


def test_channels_last_weights_in_one_arena_are_written_as_plain_tensors(tmp_path: Path) -> None:
    arena = torch.randn(2 * 3 * 2 * 2 + 5)
    state = {"conv": arena[:24].view(2, 2, 2, 3).permute(0, 3, 1, 2), "bias": arena[24:], "tied": arena[24:]}
    save_model(tmp_path / "a.safetensors", state, {}, {})
    assert same(read_model(tmp_path / "a.safetensors").state, state)


def test_a_model_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    saved(tmp_path / "net.safetensors")
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "net.safetensors").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "plain").stat().st_mode
    )


def test_preconditioning_can_be_replaced(tmp_path: Path) -> None:
    saved(tmp_path / "teacher.safetensors", precond="EDMPrecond")
    assert not isinstance(load_model(tmp_path / "teacher.safetensors")[0], ECMPrecond)
    net, _ = load_model(tmp_path / "teacher.safetensors", precond="ECMPrecond")
    x = torch.randn(1, 1, 8, 8)
    assert torch.equal(net(x, 0.003), x)  # only ECM's boundary condition gives this


def test_pickles_go_to_their_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "edm.pkl").write_bytes(b"pickle")
    answer = Snapshot(spec(), {}, {})
    monkeypatch.setattr(checkpoint.edm_pickle, "read", {tmp_path / "edm.pkl": answer}.__getitem__)
    assert read_model(tmp_path / "edm.pkl") is answer


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    saved(path)
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")

    def refused(content: bytes, message: str) -> None:
        path.write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            read_model(path)
        assert str(path) in str(error.value)

    refused(whole[:-3], "truncated")
    refused(whole[: header // 2], "truncated")
    refused(b"", "truncated")
    refused(b"\xff" * 8 + whole[8:], "damaged")
    save_file({"x": torch.zeros(1)}, path)
    refused(path.read_bytes(), "not a model file of ours: it has no 'ect' metadata")
    save_file({"x": torch.zeros(1)}, path, {"ect_state": "{}"})
    refused(path.read_bytes(), "training state")
    for text, message in [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"format": 1, "spec": {}}', "damaged .*info"),
        ('{"format": 1, "spec": 3, "info": {}}', "must be objects"),
        ('{"format": 2, "spec": {}, "info": {}}', "format 2, this version reads up to 1; update"),
    ]:
        save_file({"x": torch.zeros(1)}, path, {"ect": text})
        refused(path.read_bytes(), message)
    path.unlink()
    with pytest.raises(UserError, match=r"net\.safetensors: no such file; expected a model"):
        read_model(path)


def test_every_bit_of_the_description_counts_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    saved(path)
    whole, before = path.read_bytes(), read_model(path)
    begin = whole.index(b'"ect":')
    noticed = 0
    for place in range(begin, begin + 400):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            found = read_model(path)
        except UserError:
            noticed += 1
        else:
            assert found.spec == before.spec and found.info == before.info
    assert noticed > 380  # the rest is the name of the checksum


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    net = saved(path)
    state = net.state_dict()
    name = "model.map_layer0.bias"
    save_model(path, {**state, name: torch.zeros(3), "extra": torch.zeros(1)}, spec(), {})
    with pytest.raises(
        UserError, match=r"net\.safetensors.*unexpected extra; model\.map_layer0\.bias is 3 instead of 32"
    ):
        load_model(path)
    save_model(path, {key: state[key] for key in state if key != name}, spec(), {})
    with pytest.raises(UserError, match=r"missing model\.map_layer0\.bias$"):
        load_model(path)
    save_model(path, {}, spec(), {})
    with pytest.raises(UserError, match=f"and {len(state) - 6} more"):
        load_model(path)


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def record(name: str, real: Callable[..., None], *args: Any) -> None:
        calls.append(name)
        real(*args)

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, partial(record, name, getattr(os, name)))
    saved(tmp_path / "net.safetensors")
    assert calls == (["fsync", "replace"] if os.name == "nt" else ["fsync", "replace", "fsync"])
    with atomic(tmp_path / "cheap", durable=False) as temp:
        temp.write_text("x")
    assert calls[-1] == "replace" and (tmp_path / "cheap").read_text() == "x"


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing.x\.safetensors: cannot write it \(No such file"):
        save_model(tmp_path / "missing" / "x.safetensors", {}, {}, {})


def test_a_full_disk_is_reported_and_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.safetensors"
    saved(path)
    before = path.read_bytes()

    def full(tensors: object, temp: Path, metadata: object) -> None:
        temp.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(model_file, "save_file", full)
    with pytest.raises(UserError, match=r"net\.safetensors: cannot write it \(.*No space left"):
        saved(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


def snapshot_of(**kwargs: Any) -> Snapshot:
    return Snapshot(spec(**kwargs), build(spec(**kwargs)).state_dict(), {})


def test_the_teachers_augmentation_head_is_left_out_and_reported() -> None:
    teacher, net = snapshot_of(augment_dim=9), build(spec())
    notes = load_weights(net, teacher)
    assert len(notes) == 1 and "model.map_augment.weight" in notes[0]
    assert same(net.state_dict(), {key: teacher.state[key] for key in net.state_dict()})
    assert "model.map_augment.weight" in teacher.state  # the snapshot is not touched
    net = build(spec(augment_dim=9))
    assert load_weights(net, teacher) == [] and same(net.state_dict(), teacher.state)


@pytest.mark.parametrize(
    ("teacher", "ours", "message"),
    [
        ({}, {"augment_dim": 9}, "--data.augment 0"),
        ({"label_dim": 10}, {}, r"map_label: the pretrained network knows 10 classes, this run 0 .*--data\.labels"),
        ({}, {"label_dim": 10}, "knows 0 classes, this run 10 .*--data.labels"),
        ({"label_dim": 10}, {"label_dim": 7}, "knows 10 classes, this run 7"),
        ({"label_dim": 10, "model_channels": 16}, {"label_dim": 10}, r"map_label\.weight is 16x10 instead of 8x10"),
        ({"model_channels": 16}, {}, "is 64x16 instead of 32x8"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(teacher: dict[str, Any], ours: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_weights(build(spec(**ours)), snapshot_of(**teacher))
