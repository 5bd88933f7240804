"""--log.weights-kimg: raw weights in fp16 beside the checkpoints, of which no stop, kill or resume loses or doubles one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from ect.errors import UserError
from ect.files import kept, model_file
from ect.files.checkpoint import load_model, read_model
from ect.job import Job
from ect.models import build
from tests.test_job import interrupt_after
from tests.test_model_file import spec
from tests.tiny import config, run

LOG = replace(config().log, sample_kimg=0.0, weights_kimg=0.024, checkpoint_kimg=0.032, keep=1)
NAMES = [f"weights-000000.{nimg:03}.safetensors" for nimg in (24, 48, 72)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps, which keep the weights of three; only to be read."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    run(config(log=LOG), folder)
    return folder


def contents(folder: Path) -> dict[str, Any]:
    """All that the files say; the order of their metadata is as safetensors likes."""
    found = {path.name: read_model(path) for path in (folder / "weights").iterdir()}
    return {
        name: (model.spec, model.info, {key: tensor.tolist() for key, tensor in model.state.items()})
        for name, model in found.items()
    }


@pytest.mark.slow  # the run that it needs is
def test_every_interval_has_its_file_whatever_becomes_of_checkpoints(trained: Path) -> None:
    assert sorted(contents(trained)) == NAMES
    assert [path.name for path in trained.glob("checkpoint-*.json")] == ["checkpoint-000000.080.json"]
    assert [(one.nimg, one.path.name) for one in kept.listed(trained)] == list(zip((24, 48, 72), NAMES, strict=True))


def test_they_are_the_weights_and_no_average_in_half_precision(trained: Path, tmp_path: Path) -> None:
    log = replace(LOG, checkpoint_kimg=0.024, keep=9)
    folder = run(config(log=log), tmp_path / "run").run_dir
    assert contents(folder) == contents(trained)
    state = load_file(folder / "checkpoint-000000.048.state.safetensors")
    raw = load_file(folder / "weights" / NAMES[1])
    net, info = load_model(folder / "weights" / NAMES[1])
    assert raw.keys() == net.state_dict().keys() and info["nimg"] == 48 and "ema" not in info
    for name, parameter in net.named_parameters():
        assert raw[name].dtype == torch.float16 and torch.equal(raw[name], state[f"params.{name}"].half())
        assert torch.equal(parameter, raw[name].float())
    assert any(not torch.equal(raw[name], state[f"ema0.{name}"].half()) for name, _ in net.named_parameters())


@pytest.mark.parametrize("steps", [3, 5])
def test_a_stop_and_a_resume_lose_and_double_none(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, steps)
        assert not Job(replace(config(log=LOG), run_dir=folder), Console(quiet=True)).run()
    assert sorted(contents(folder)) == NAMES[:1]
    run(config(log=LOG, resume=folder), folder)
    assert contents(folder) == contents(trained)


def test_a_kill_leaves_nothing_half_written_after_the_resume(trained: Path, tmp_path: Path) -> None:
    """Killed while it wrote the weights of 72 images, after the checkpoint of 64."""
    folder = tmp_path / "run"
    run(config(log=replace(LOG, keep=9)), folder)
    for path in folder.glob("checkpoint-000000.080*"):
        path.unlink()
    (folder / "latest").write_text("checkpoint-000000.064\n")
    (folder / "weights" / NAMES[2]).rename(folder / "weights" / f".{NAMES[2]}.123.tmp")
    run(config(log=LOG, resume=folder), folder)
    assert contents(folder) == contents(trained)


def test_without_the_option_there_is_no_folder(tmp_path: Path) -> None:
    folder = run(config(log=replace(LOG, weights_kimg=0.0), total_kimg=0.008), tmp_path / "run").run_dir
    assert not (folder / "weights").exists()
    with pytest.raises(UserError, match=r"run: no raw weights in its folder 'weights'.*--log\.weights-kimg"):
        kept.listed(folder)


def test_a_write_that_fails_leaves_the_files_before(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, net = shutil.copytree(trained, tmp_path / "run"), build(spec())
    (folder / "weights" / f".{NAMES[0]}.7.tmp").touch()
    before = contents(trained)

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_file, "save_file", full)
    with pytest.raises(UserError, match=r"weights-000000\.072\.safetensors: cannot write it \(No space left"):
        kept.keep(folder, 72, net, spec(), {})
    assert contents(folder) == before


def test_a_folder_that_is_there_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system refused it, for want of room, Python would keep that to itself: the folder is there."""
    net = build(spec())
    assert kept.keep(tmp_path, 8, net, spec(), {}) is not None
    monkeypatch.setattr(Path, "mkdir", lambda *args, **options: pytest.fail("there is a folder"))
    assert kept.keep(tmp_path, 16, net, spec(), {}) is not None
    assert [found.nimg for found in kept.listed(tmp_path)] == [8, 16]


def test_buffers_are_as_they_are_and_the_network_is_built_again(tmp_path: Path) -> None:
    net = build(spec(channel_mult=[1, 2]))
    path = kept.keep(tmp_path, 8, net, spec(channel_mult=[1, 2]), {})
    raw, parameters = read_model(path).state, dict(net.named_parameters())
    assert raw.keys() - parameters.keys() and load_model(path)[0].img_resolution == 8
    assert all(torch.equal(raw[name], tensor) for name, tensor in net.state_dict().items() if name not in parameters)


def test_weights_that_fp16_does_not_hold_are_not_kept(tmp_path: Path) -> None:
    for value in (1e5, float("nan")):
        net = build(spec())
        next(net.parameters()).data.flatten()[0] = value
        assert kept.keep(tmp_path, 8, net, spec(), {}) is None
    assert list(tmp_path.iterdir()) == []
