"""EDM2's snapshots, and ECT's for ImageNet, come out of the safe reader bit for bit: fp16 weights, an encoder beside them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from ect import models
from ect.convert.__main__ import main
from ect.files.checkpoint import load_model
from ect.files.edm_pickle import read
from ect.models import ECM2Precond, EDM2Precond
from tests import edm_files as edm

KWARGS: dict[str, Any] = dict(img_resolution=8, in_channels=3, out_channels=3, label_dim=10, model_channels=16)
KWARGS |= dict(channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], channels_per_head=16, dropout=0.1)
SPEC: dict[str, Any] = {"precond": "EDM2Precond", "sigma_data": 0.4, "unet": "EDM2UNet", "kwargs": KWARGS}
INPUTS = torch.randn(3, 3, 8, 8), torch.tensor([0.02, 0.7, 40.0]), torch.eye(3, 10)


@pytest.fixture
def net() -> EDM2Precond:
    torch.manual_seed(0)
    net = models.build(SPEC).eval()
    for value in net.state_dict().values():
        value.normal_()
    assert isinstance(net, EDM2Precond)
    return net.half().float()  # values that a file in fp16 can hold


def pickled(net: EDM2Precond, spec: dict[str, Any] = SPEC, logvar: int = 0, **options: Any) -> bytes:
    return edm.edm2_snapshot(edm.edm2_from_net(copy.deepcopy(net), spec, logvar), **options)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("loss", ["EDM2Loss", "ECMLoss"])
def test_round_trip(tmp_path: Path, net: EDM2Precond, protocol: int, loss: str) -> None:
    path = tmp_path / "edm2-img64-s.pkl"
    path.write_bytes(pickled(net, logvar=8, protocol=protocol, loss=loss))
    snapshot = read(path)
    assert list(snapshot.state) == list(net.state_dict())  # without the head that weighs EDM2's loss
    for key, value in net.state_dict().items():
        assert snapshot.state[key].dtype == torch.float32 and torch.equal(snapshot.state[key], value), key
    assert snapshot.spec["precond"] == {"EDM2Loss": "EDM2Precond", "ECMLoss": "ECM2Precond"}[loss]
    assert (snapshot.spec["unet"], snapshot.spec["sigma_data"]) == ("EDM2UNet", 0.4)
    assert snapshot.spec["kwargs"].items() >= KWARGS.items()
    again, _ = load_model(path)
    assert torch.equal(again(*INPUTS), net(*INPUTS)) and again.is_consistency == (loss == "ECMLoss")


def test_a_diffusion_model_becomes_the_start_of_a_consistency_model(tmp_path: Path, net: EDM2Precond) -> None:
    path, target = tmp_path / "model.pkl", tmp_path / "model.safetensors"
    path.write_bytes(pickled(net, logvar=8))
    main([str(path), str(target)])
    tuned, _ = load_model(target, precond="ECMPrecond")
    assert type(tuned) is ECM2Precond and torch.equal(tuned(*INPUTS), net(*INPUTS))


def test_arguments_that_only_the_preconditioner_has(tmp_path: Path, net: EDM2Precond) -> None:
    given = edm.edm2_from_net(copy.deepcopy(net), SPEC)
    given.state["_modules"]["unet"].state.update(_init_args=(), _init_kwargs={})
    path = tmp_path / "model.pkl"
    path.write_bytes(edm.edm2_snapshot(given))
    assert read(path).spec["kwargs"].items() >= KWARGS.items()


def test_arguments_at_their_defaults(tmp_path: Path, net: EDM2Precond) -> None:
    given = edm.edm2_from_net(copy.deepcopy(net), SPEC)
    more = {"channel_mult_noise": None, "channel_mult_emb": None, "resample_filter": [1, 1], "res_balance": 0.25}
    given.state["_modules"]["unet"].state["_init_kwargs"] |= more
    path = tmp_path / "model.pkl"
    path.write_bytes(edm.edm2_snapshot(given))
    kwargs = read(path).spec["kwargs"]
    assert (kwargs["channel_mult_noise"], kwargs["res_balance"]) == (0, 0.25)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another filter": ({"resample_filter": [1, 3, 3, 1]}, "unknown argument resample_filter"),
    "no width": ({"model_channels": -1}, "model_channels is missing or impossible"),
    "a strange argument": ({"window": 7}, "EDM2's UNet was made with the unknown argument window"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_arguments_are_refused(tmp_path: Path, net: EDM2Precond, case: str) -> None:
    more, says = REFUSED[case]
    given = edm.edm2_from_net(net, SPEC)
    given.state["_modules"]["unet"].state["_init_kwargs"] |= more
    assert says in edm.refusal(tmp_path / "model.pkl", edm.edm2_snapshot(given))


def test_a_network_of_latents_is_refused(tmp_path: Path, net: EDM2Precond) -> None:
    """Its encoder holds arrays, which are read, and the message is about the encoder."""
    says = edm.refusal(tmp_path / "model.pkl", pickled(net, encoder="StabilityVAEEncoder"))
    assert "StabilityVAEEncoder" in says


def test_a_file_without_the_network_of_edm2_is_refused(tmp_path: Path, net: EDM2Precond) -> None:
    given = edm.edm2_from_net(net, SPEC)
    given.state["_modules"]["unet"].class_name = "Transformer"
    assert "'unet' is Transformer; expected EDM2's UNet" in edm.refusal(tmp_path / "m.pkl", edm.edm2_snapshot(given))
    del given.state["_modules"]["unet"]
    assert "'unet' is a value of type NoneType" in edm.refusal(tmp_path / "m.pkl", edm.edm2_snapshot(given))
