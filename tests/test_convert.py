"""python -m ect.convert: snapshot in, model file out, and one clear message where that cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from ect import models
from ect.convert.__main__ import Options, convert, main
from ect.errors import UserError
from ect.files.checkpoint import load_model
from ect.files.edm_pickle import Snapshot, UnsafePickle
from ect.files.model_file import check_fits
from tests import edm_files as edm
from tests.edm_files import SMALL, Call

SPEC: dict[str, Any] = {
    "precond": "EDMPrecond",
    "sigma_data": 0.5,
    "unet": "SongUNet",
    "kwargs": {**SMALL, "augment_dim": 9},
}


@pytest.fixture
def net() -> nn.Module:
    net = models.build(SPEC).eval()
    for value in net.state_dict().values():
        value.normal_(0, 0.2)
    return net


@pytest.fixture
def source(tmp_path: Path, net: nn.Module) -> Path:
    path = tmp_path / "model.pkl"
    path.write_bytes(edm.edm_snapshot(edm.from_net(net, SPEC)))
    return path


def test_conversion(source: Path, net: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    target = source.with_suffix(".safetensors")
    main([str(source), str(target)])
    report = capsys.readouterr().out
    numel = sum(value.numel() for value in net.state_dict().values())
    for part in ("EDMPrecond around SongUNet(img_resolution=8, ", f"{numel:,} weights", "all finite: yes", str(target)):
        assert part in report
    with safe_open(target, "pt") as file:
        header = json.loads(file.metadata()["ect"])
    assert header["spec"]["kwargs"].items() >= SPEC["kwargs"].items()
    assert header["info"]["source_sha256"] in report and header["info"]["license"] in report
    loaded, info = load_model(target)
    assert info == header["info"]
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded(x, 3.0), net(x, 3.0))


@pytest.mark.slow
def test_command_line_in_a_process_of_its_own(source: Path) -> None:
    source.write_bytes(edm.dump({"ema": Call(eval, "1")}))
    command = [sys.executable, "-m", "ect.convert", str(source), str(source.with_suffix(".safetensors"))]
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {source}: asks for builtins.eval") and "Traceback" not in done.stderr
    assert done.stdout == "" and not source.with_suffix(".safetensors").exists()


def test_another_key(source: Path, net: nn.Module) -> None:
    source.write_bytes(edm.dump({"net": edm.from_net(net, SPEC)}))
    target = source.with_suffix(".safetensors")
    with pytest.raises(UnsafePickle, match="has no 'ema'; it holds net"):
        convert(Options(source, target))
    assert convert(Options(source, target, key="net")).info["key"] == "net"


@pytest.mark.parametrize("target", ["model.pkl", "model"])
def test_the_target_is_a_safetensors_file(source: Path, target: str) -> None:
    before = source.read_bytes()
    with pytest.raises(UserError, match="must be named"):
        convert(Options(source, source.with_name(target)))
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    "value", [float("nan"), float("-inf"), 1e39]
)  # the last is beyond fp32, as an fp64 weight may be
@pytest.mark.parametrize("name", ["weight", "norm0.weight"])
def test_numbers_that_are_not_finite_are_refused_by_name(
    source: Path, net: nn.Module, name: str, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model file of them would be refused by each command that reads one."""
    name = f"model.enc.8x8_{'conv' if name == 'weight' else 'block0'}.{name}"
    net.to(torch.float64).state_dict()[name].view(-1)[0] = value
    source.write_bytes(edm.edm_snapshot(edm.from_net(net, SPEC)))
    target = source.with_suffix(".safetensors")
    with pytest.raises(SystemExit) as caught:
        main([str(source), str(target)])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and f"error: {source}: {name} holds NaN or infinite values" in err
    assert out == "" and len(err.splitlines()) == 1 and not target.exists()


def test_mismatch_is_named(source: Path, net: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = edm.from_net(net, SPEC)
    wrong.state["_modules"]["model"].state["_init_kwargs"]["model_channels"] = 16
    source.write_bytes(edm.edm_snapshot(wrong))
    target = source.with_suffix(".safetensors")
    with pytest.raises(SystemExit) as caught:
        main([str(source), str(target)])
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.startswith(f"error: {source}: the weights do not fit the network: ")
    assert "model.map_layer0.weight is 32x8 instead of 64x16" in message and " more" in message
    assert not target.exists()


def test_missing_and_unknown_weights_are_named(net: nn.Module) -> None:
    state = dict(net.state_dict())
    check_fits(Snapshot(SPEC, state, {}), "file")
    state["model.extra"] = state.pop("model.map_layer0.bias")
    with pytest.raises(UserError, match=r"missing model.map_layer0.bias; unexpected model.extra"):
        check_fits(Snapshot(SPEC, state, {}), "file")


def test_the_check_allocates_nothing(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    built, build = [], models.build
    monkeypatch.setattr("ect.files.model_file.build", lambda spec: built.append(build(spec)) or built[0])
    check_fits(Snapshot(SPEC, dict(net.state_dict()), {}), "file")
    assert built and all(value.is_meta for value in built[0].state_dict().values())


COUNTS = ["img_resolution", "in_channels", "out_channels", "model_channels", "channel_mult_emb", "channel_mult_noise"]
IMPOSSIBLE = [{name: value} for name in COUNTS for value in (0, 3, 65535)]
IMPOSSIBLE += [{"channel_mult": value} for value in ([], [0], [0, 1], [65535] * 15, [1] * 15)]
IMPOSSIBLE += [{"resample_filter": value} for value in ([], [0], [1] * 15)]
IMPOSSIBLE += [
    {"label_dim": 65535},
    {"augment_dim": 1},
    {"encoder_type": "other"},
    {"num_blocks": 0},
    {"attn_resolutions": []},
]


@pytest.mark.parametrize("kwargs", IMPOSSIBLE)
@pytest.mark.parametrize("unet", ["SongUNet", "DhariwalUNet"])
def test_impossible_descriptions(net: nn.Module, unet: str, kwargs: dict[str, Any]) -> None:
    spec = {**SPEC, "unet": unet, "kwargs": {**SMALL, **kwargs}}
    with pytest.raises(
        UserError, match=r"^file: (the weights do not fit the network|its description makes no network)"
    ):
        check_fits(Snapshot(spec, dict(net.state_dict()), {}), "file")
