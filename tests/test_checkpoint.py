"""Checkpoints: bit-exact, atomic, verified, and clear about what is wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ect.errors import UserError
from ect.files import checkpoint
from ect.files.checkpoint import Checkpoints, load_model, read_model
from ect.files.kept import keep
from ect.models import build
from tests.test_model_file import saved, spec

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


def test_a_run_of_more_than_a_billion_images_has_its_checkpoints_in_order(tmp_path: Path) -> None:
    run = Checkpoints(tmp_path, keep=2)
    for nimg in (999_999_000, 999_999_999, 1_000_000_000):
        save(run, nimg)
    assert [path.name for path in sorted(tmp_path.glob("*.json"))] == [
        "checkpoint-1000000.000.json", "checkpoint-999999.999.json"
    ]  # fmt: skip
    assert run.load(tmp_path)[1]["nimg"] == 1_000_000_000 and run.back().name == "checkpoint-1000000.000.safetensors"
    (tmp_path / "checkpoint-1000000.000.state.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"checkpoint-1000000\.000.*using the checkpoint before it"):
        assert run.load(tmp_path)[1]["nimg"] == 999_999_999


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


def test_a_checkpoint_on_a_bad_sector_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Checkpoints(tmp_path, keep=3)
    first, last = save(run, 1000), save(run, 2000)
    fingerprint = checkpoint._fingerprint

    def failing(path: Path) -> dict[str, Any]:
        if path == last:
            raise OSError(5, "Input/output error")
        return fingerprint(path)

    monkeypatch.setattr(checkpoint, "_fingerprint", failing)
    with pytest.raises(UserError, match=r"checkpoint-000002\.000\.safetensors: cannot be read \(Input/output error\)"):
        run.load(last)
    with pytest.warns(UserWarning, match="using the checkpoint before it"):
        assert run.load(tmp_path)[2] == first


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


def test_what_a_kill_left_goes_with_the_next_save(tmp_path: Path) -> None:
    for name in (".latest.12.tmp", ".tmpAbC123"):  # ours, and that of safetensors
        (tmp_path / name).touch()
    save(Checkpoints(tmp_path), 3000)
    assert files(tmp_path) == [*three("000003.000"), "latest"]


def foreign(folder: Path) -> list[Path]:
    """Files that others may put beside ours, in a folder of a run and in such that have nothing to do with it."""
    names = ".notes.tmp .tmp .tmp-notes .tmpAbC .tmpAbC1234 .latest.12.tmp.txt .latest.x.tmp a.1.tmp .tmpfolder/x"
    return [folder / name for name in [*names.split(), "mine/.latest.1.tmp", "checkpoint-backup.old.state.safetensors"]]


@pytest.mark.parametrize("place", ["", "weights"])
def test_a_save_removes_no_file_of_others(place: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    kept, link = foreign(tmp_path / place), tmp_path / place / ".latest.7.tmp"
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    link.symlink_to(kept[0])
    save(Checkpoints(tmp_path, keep=1), 3000)
    keep(tmp_path, 3000, build(spec()), spec(), {})
    assert all(path.exists() for path in [*kept, link]) and not recwarn.list


def test_files_that_cannot_be_removed_end_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Checkpoints(tmp_path, keep=1)
    save(run, 1000)

    def refused(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.warns(UserWarning, match=r"000001.*cannot be removed \(Permission denied\)"):
        save(run, 2000)
    assert run.load(tmp_path)[1]["nimg"] == 2000


@pytest.mark.filterwarnings("ignore:.*using the checkpoint before it")
def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    run = Checkpoints(tmp_path)
    last = save(run, 1000)
    manifest = tmp_path / "checkpoint-000001.000.json"
    whole = manifest.read_bytes()
    for place in range(len(whole)):
        for changed in (bytes([whole[place] ^ 1 << place % 8]), b""):
            manifest.write_bytes(whole[:place] + changed + (whole[place + 1 :] if changed else b""))
            with pytest.raises(UserError, match=r"checkpoint-000001\.000"):
                run.load(last)


def test_a_damaged_manifest_of_an_older_checkpoint_ends_no_run(tmp_path: Path) -> None:
    run, state = Checkpoints(tmp_path, keep=2), build(spec()).state_dict()
    save(run, 1000)
    run.save(2000, state, spec(), {}, TENSORS, META, healthy=False)
    (tmp_path / "checkpoint-000001.000.json").write_text("{")
    last = run.save(3000, state, spec(), {}, TENSORS, META, healthy=False)  # looks for the last healthy one
    assert files(tmp_path) == [*three("000002.000"), *three("000003.000"), "latest"] and run.back() == last


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


@pytest.mark.filterwarnings("ignore:.*checkpoint")  # the damaged one too
@pytest.mark.parametrize(
    "pointer", [b"", b"\n", b"\xff\xfe\x00", b"nonsense", b"../../etc/passwd", b"checkpoint-000000.500"]
)
def test_a_pointer_that_names_nothing_is_passed_over_with_a_word(pointer: bytes, tmp_path: Path) -> None:
    run = Checkpoints(tmp_path)
    first, last = save(run, 1000), save(run, 2000)
    (tmp_path / "latest").write_bytes(pointer)
    with pytest.warns(
        UserWarning, match=r"latest: it names (no checkpoint; using|checkpoint-.*which is not here; using)"
    ):
        assert run.load(tmp_path)[2] == last
    last.unlink()
    with pytest.warns(UserWarning, match=r"checkpoint-000002\.000.*missing"):
        assert run.load(tmp_path)[2] == first
    with pytest.warns(UserWarning, match="latest"):
        assert read_model(tmp_path).info == {"nimg": 1000}


def test_the_last_healthy_checkpoint_stays_and_can_be_gone_back_to(tmp_path: Path) -> None:
    run, state = Checkpoints(tmp_path, keep=1), build(spec()).state_dict()
    for nimg, healthy in [(1000, True), (2000, True), (3000, False), (4000, False)]:
        run.save(nimg, state, spec(), {}, TENSORS, {**META, "nimg": nimg}, healthy=healthy)
    assert files(tmp_path) == [*three("000002.000"), *three("000004.000"), "latest"]
    assert run.load(tmp_path)[1]["nimg"] == 4000
    assert run.back() == tmp_path / "checkpoint-000002.000.safetensors"
    assert run.load(tmp_path)[1]["nimg"] == 2000
    run.save(5000, state, spec(), {}, TENSORS, META)
    assert files(tmp_path) == [*three("000005.000"), "latest"]


def test_a_checkpoint_of_version_0_1_counts_as_healthy(tmp_path: Path) -> None:
    run, state = Checkpoints(tmp_path, keep=1), build(spec()).state_dict()
    old = save(run, 1000)
    manifest = tmp_path / "checkpoint-000001.000.json"
    without = json.loads(manifest.read_text())
    del without["healthy"], without["sha256"]
    manifest.write_text(json.dumps(without))
    run.save(2000, state, spec(), {}, TENSORS, META, healthy=False)
    assert run.back() == old
