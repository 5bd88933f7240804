"""A network of one's own: both arithmetics agree, a command line names it, a run trains it, and its file is read back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ect import models, sample
from ect.checkpoint import load_model
from ect.errors import UserError
from ect.models import MaskKey
from ect.options import parse
from tests.extending.loaded import added
from tests.golden_data import rel_l2
from tests.tiny import NET, config, run


@pytest.fixture(autouse=True)
def own() -> Iterator[Any]:
    with added("network") as names:
        yield names


@pytest.mark.parametrize("attention", [False, True])
def test_plain_and_fused_agree_with_dropout(own: Any, attention: bool) -> None:
    """Output, and gradients at the input and at every parameter, in fp64."""
    net = own.TwoBlocks(8, 1, 1, dropout=0.3, attention=attention).double().train()
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    found = []
    for net.on_ops in (False, True):
        out = net(x, torch.linspace(-1, 1, 4).double(), mask=MaskKey(torch.tensor(3), 0))
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *net.parameters()])])
    assert found[0][0].abs().max() > 0
    for plain, fused in zip(*found, strict=True):
        assert rel_l2(fused.detach(), plain.detach()) <= 1e-13


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_trains_it_and_its_file_is_read_back(precision: Any, tmp_path: Path) -> None:
    """bf16 trains on the ops, fp32 in plain PyTorch."""
    cfg = config(net=replace(NET, arch="two", model_channels=16), precision=precision)  # type: ignore[arg-type]
    job = run(cfg, tmp_path / "run")
    net, _ = load_model(job.run_dir)
    assert type(net.model).__name__ == "TwoBlocks" and all(p.isfinite().all() for p in net.parameters())
    sample.main([str(job.run_dir), "--device", "cpu", "--seeds", "0-2", "--out", str(tmp_path / "images.png")])
    assert (tmp_path / "images.png").is_file()


def test_a_command_line_names_it() -> None:
    assert parse(["--net.arch", "two-attentive"]).net.arch == "two-attentive"


@pytest.mark.slow
def test_a_file_of_a_network_that_is_not_known_says_so(tmp_path: Path) -> None:
    run(config(net=replace(NET, arch="two", model_channels=16)), tmp_path)  # type: ignore[arg-type]
    del models._UNETS["TwoBlocks"]
    with pytest.raises(UserError, match="unknown network 'TwoBlocks'"):
        load_model(tmp_path)
