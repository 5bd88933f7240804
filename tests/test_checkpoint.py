"""Model files and checkpoints: bit-exact, atomic, verified, and clear about what is wrong."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import textwrap
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
from ect.files import checkpoint
from ect.files.checkpoint import (
    Checkpoints,
    load_model,
    load_weights,
    read_model,
    save_model,
)
from ect.files.edm_pickle import Snapshot
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


# --- model files ---


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
    with checkpoint.atomic(tmp_path / "cheap", durable=False) as temp:
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

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"net\.safetensors: cannot write it \(.*No space left"):
        saved(path)
    assert path.read_bytes() == before and files(tmp_path) == ["net.safetensors"]


# --- weights for tuning ---


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


# --- checkpoints ---

TENSORS = {
    "params": torch.arange(9.0).div(7),
    "rng": torch.tensor([255, 0, 7], dtype=torch.uint8),
    "step": torch.tensor(2**40 + 1),
    "order": torch.tensor([[3, 1], [2, 0]]),
    "half": torch.tensor([1.5, float("nan")], dtype=torch.float16),
}
META = {"nimg": 128, "scale": 0.1 + 0.2, "epoch": 3, "config": {"optim": {"betas": [0.9, 0.999]}}}


def save(run: Checkpoints, nimg: int) -> Path:
    state = build(spec()).state_dict()
    return run.save(
        nimg, state, spec(), {"nimg": nimg}, {**TENSORS, "nimg": torch.tensor(nimg)}, {**META, "nimg": nimg}
    )


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def three(stem: str) -> list[str]:
    return [f"checkpoint-{stem}.json", f"checkpoint-{stem}.safetensors", f"checkpoint-{stem}.state.safetensors"]


def test_a_checkpoint_gives_back_the_same_bits(tmp_path: Path) -> None:
    run = Checkpoints(tmp_path, keep=2)
    model = save(run, 128_001)
    assert model == tmp_path / "checkpoint-000128.001.safetensors"
    assert files(tmp_path) == [*three("000128.001"), "latest"]
    for path in [tmp_path, model, *(tmp_path / name for name in three("000128.001"))]:
        tensors, meta, found = run.load(path)
        assert meta == {**META, "nimg": 128_001} and found == model
        assert tensors.keys() == {*TENSORS, "nimg"} and int(tensors["nimg"]) == 128_001
        for key, tensor in TENSORS.items():
            assert tensors[key].dtype == tensor.dtype and tensors[key].shape == tensor.shape
            assert tensors[key].numpy().tobytes() == tensor.numpy().tobytes()
        assert read_model(path).info == {"nimg": 128_001}
    assert load_model(tmp_path)[1] == {"nimg": 128_001}


def test_names_are_unique_and_sorted_by_nimg(tmp_path: Path) -> None:
    run = Checkpoints(tmp_path, keep=9)
    names = [save(run, nimg).name for nimg in (0, 1, 999, 1000, 102_400_000)]
    assert names == sorted(set(names)) and len(names) == 5


@pytest.mark.parametrize("missing", [False, True], ids=["one byte changed", "file missing"])
@pytest.mark.parametrize("kind", [".safetensors", ".state.safetensors", ".json"])
def test_a_damaged_checkpoint_is_passed_over_and_refused_by_name(tmp_path: Path, kind: str, missing: bool) -> None:
    run = Checkpoints(tmp_path, keep=3)
    first, last = save(run, 1000), save(run, 2000)
    victim = tmp_path / f"checkpoint-000002.000{kind}"
    data = bytearray(victim.read_bytes())
    data[data.index(b'"sha256": "') + 12 if kind == ".json" else -5] ^= 1
    victim.unlink() if missing else victim.write_bytes(data)
    with pytest.raises(UserError, match=r"checkpoint-000002\.000"):
        run.load(last)
    with pytest.warns(UserWarning, match=r"checkpoint-000002\.000.*using the checkpoint before it"):
        assert run.load(tmp_path)[2] == first
    if kind == ".state.safetensors":  # sampling does not need the state
        assert read_model(tmp_path).info == read_model(last).info == {"nimg": 2000}
        return
    with pytest.warns(UserWarning, match="using the checkpoint before it"):
        assert read_model(tmp_path).info == {"nimg": 1000}
    if not (missing and kind == ".json"):  # alone, a model file is as good as any other
        with pytest.raises(UserError, match=r"checkpoint-000002\.000"):
            read_model(last)


def test_a_manifest_of_a_later_format_is_refused(tmp_path: Path) -> None:
    run = Checkpoints(tmp_path)
    last = save(run, 1000)
    manifest = tmp_path / "checkpoint-000001.000.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 2}))
    with pytest.raises(UserError, match="format 2, this version reads up to 1"):
        run.load(last)
    manifest.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        run.load(last)


@pytest.mark.parametrize("writes", range(4))
def test_a_failure_between_the_writes_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    run = Checkpoints(tmp_path, keep=1)
    save(run, 1000)
    replace, left = os.replace, iter(range(writes))

    def stopping(source: Path, target: Path) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopping)
        with pytest.raises(KeyboardInterrupt):
            save(run, 2000)
    assert not list(tmp_path.glob(".*"))
    if 0 < writes < 3:
        with pytest.warns(UserWarning, match=r"checkpoint-000002\.000: incomplete"):
            tensors, meta, _ = run.load(tmp_path)
    else:
        tensors, meta, _ = run.load(tmp_path)
    assert int(tensors["nimg"]) == meta["nimg"] == 1000
    save(run, 3000)
    assert files(tmp_path) == [*three("000003.000"), "latest"]  # what the failure left is gone


def test_a_killed_process_leaves_the_checkpoint_before_and_its_remains_go(tmp_path: Path) -> None:
    script = f"""
        import os, torch
        from pathlib import Path
        from ect.files.checkpoint import Checkpoints
        run = Checkpoints(Path({str(tmp_path)!r}))
        run.save(1000, {{}}, {{}}, {{}}, {{"x": torch.ones(1)}}, {{}})
        replace = os.replace
        def dying(source, target):
            if str(target).endswith("2.000.safetensors"):
                os._exit(9)
            replace(source, target)
        os.replace = dying
        run.save(2000, {{}}, {{}}, {{}}, {{"x": torch.zeros(1)}}, {{}})
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment).returncode == 9
    (tmp_path / ".tmpAbC123").touch()  # as safetensors leaves it when killed within save_file
    assert len(list(tmp_path.glob(".*.tmp"))) == 1 and (tmp_path / "checkpoint-000002.000.state.safetensors").exists()
    with pytest.warns(UserWarning, match="incomplete"):
        assert Checkpoints.load(tmp_path)[0]["x"] == 1
    save(Checkpoints(tmp_path), 3000)
    assert files(tmp_path) == [*three("000001.000"), *three("000003.000"), "latest"]


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-best.safetensors").write_text("the user's own")
    run = Checkpoints(tmp_path, keep=2)
    for nimg in (1000, 2000, 3000):
        save(run, nimg)
    assert files(tmp_path) == [*three("000002.000"), *three("000003.000"), "checkpoint-best.safetensors", "latest"]
    save(Checkpoints(tmp_path, keep=0), 4000)  # never the newest
    assert files(tmp_path) == [*three("000004.000"), "checkpoint-best.safetensors", "latest"]


def test_a_run_continued_from_further_back_leaves_the_later_checkpoints_alone(tmp_path: Path) -> None:
    run = Checkpoints(tmp_path, keep=2)
    for nimg in (1000, 2000, 3000):
        save(run, nimg)
    branch = save(run, 2500)
    assert files(tmp_path) == [*three("000002.000"), *three("000002.500"), *three("000003.000"), "latest"]
    assert run.load(tmp_path)[2] == branch  # not 3000, which belongs to another course of the run


def test_without_a_pointer_the_newest_complete_one_is_loaded(tmp_path: Path) -> None:
    run = Checkpoints(tmp_path)
    save(run, 1000)
    last = save(run, 2000)
    (tmp_path / "latest").unlink()
    assert run.load(tmp_path)[2] == last


def test_folders_and_files_that_hold_no_checkpoint_are_refused(tmp_path: Path) -> None:
    for read in (Checkpoints.load, read_model):
        with pytest.raises(UserError, match="no complete checkpoint in this folder"):
            read(tmp_path)
    saved(tmp_path / "net.safetensors")
    for name in ("net.safetensors", "checkpoint-000001.000.safetensors"):
        with pytest.raises(UserError, match=f"{name}: no such checkpoint; expected a run folder"):
            Checkpoints.load(tmp_path / name)


def test_a_model_file_of_a_checkpoint_reads_alone_elsewhere(tmp_path: Path) -> None:
    model = save(Checkpoints(tmp_path), 1000)
    (tmp_path / "elsewhere").mkdir()
    copy = model.rename(tmp_path / "elsewhere" / model.name)
    assert read_model(copy).info == {"nimg": 1000}
