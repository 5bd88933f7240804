"""The U-Nets on the fused ops: golden parity, equality with the plain forward, compilation without a graph break."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ect_kernels import dispatch
from torch import Tensor, nn

from ect.models import DhariwalUNet, SongUNet, fused
from ect.models.layers import MaskKey
from tests.golden_data import MANIFEST, load, part, rel_l2

CLASSES = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
NETS = [name for name, case in MANIFEST.items() if case["kind"] == "network"]
SMALL = dict(img_resolution=16, in_channels=3, out_channels=3, model_channels=16, channel_mult=[1, 2, 2], num_blocks=2)
VARIANTS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "ddpmpp": (SongUNet, {}),
    "ncsnpp": (SongUNet, dict(embedding_type="fourier", encoder_type="residual", resample_filter=[1, 3, 3, 1])),
    "skip": (SongUNet, dict(encoder_type="skip", decoder_type="skip")),
    "adm": (DhariwalUNet, {}),
}


@pytest.mark.parametrize("name", NETS)
def test_fused_network_matches_golden(name: str) -> None:
    case, g = MANIFEST[name], load(name)
    net = CLASSES[case["cls"]](**case["kwargs"])
    net.load_state_dict(part(g, "state."))
    net.fused = True
    x = g["x"].requires_grad_()
    y = net(x, g["noise_labels"], g.get("class_labels"), g.get("augment_labels"))
    assert rel_l2(y.detach(), g["y"]) <= 1e-5
    (y * g["grad_y"]).sum().backward()
    assert rel_l2(x.grad, g["grad_x"]) <= 1e-4
    grads = {k: p.grad for k, p in net.named_parameters()}
    for key, want in part(g, "grad.").items():
        assert rel_l2(grads[key], want) <= 1e-4, key


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    cls, kwargs = VARIANTS[name]
    net = cls(**{**SMALL, "attn_resolutions": [8], "dropout": 0.2, "label_dim": 3, "augment_dim": 9, **kwargs}).train()
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    return net


def run(net: nn.Module, use_ops: bool) -> tuple[Tensor, list[Tensor]]:
    net.fused = use_ops
    g = torch.Generator().manual_seed(1)
    x, labels = torch.randn(2, 3, 16, 16, generator=g), torch.eye(3)[:2]
    augment, key = torch.randn(2, 9, generator=g), MaskKey(torch.tensor(5), 3)
    y = net(x, torch.tensor([0.3, -1.0]), labels, augment, key)
    cotangent = torch.randn(y.shape, generator=g)
    return y.detach(), list(torch.autograd.grad((y * cotangent).sum(), list(net.parameters())))


@pytest.mark.parametrize("name", VARIANTS)
def test_fused_equals_plain_with_dropout_labels_and_gradients(name: str) -> None:
    net = build(name)
    (want, want_grads), (got, got_grads) = run(net, False), run(net, True)
    assert rel_l2(got, want) <= 1e-5
    for (key, _), a, b in zip(net.named_parameters(), got_grads, want_grads, strict=True):
        assert rel_l2(a, b) <= 1e-4, key


@pytest.mark.parametrize("name", ["ddpmpp", "adm"])
def test_compiles_without_a_graph_break(name: str) -> None:
    net = build(name)
    want, want_grads = run(net, True)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    g = torch.Generator().manual_seed(1)
    x, labels = torch.randn(2, 3, 16, 16, generator=g), torch.eye(3)[:2]
    augment, key = torch.randn(2, 9, generator=g), MaskKey(torch.tensor(5), 3)
    y = compiled(x, torch.tensor([0.3, -1.0]), labels, augment, key)
    torch.testing.assert_close(y.detach(), want, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn(y.shape, generator=g)
    grads = torch.autograd.grad((y * cotangent).sum(), list(net.parameters()))
    for a, b in zip(grads, want_grads, strict=True):
        assert rel_l2(a, b) <= 1e-5


def test_who_wants_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    monkeypatch.delenv("ECT_KERNELS", raising=False)
    assert not fused.wanted(None, x) and fused.wanted(True, x)
    monkeypatch.setenv("ECT_KERNELS", "*=reference")
    assert fused.wanted(None, x) and not fused.wanted(False, x)
    monkeypatch.delenv("ECT_KERNELS")
    dispatch.set_choice("group_norm_silu=reference")
    try:
        assert fused.wanted(None, x)
    finally:
        dispatch.set_choice(None)
