"""The U-Nets on the fused ops: golden parity, equality with the plain forward by network and by block, compilation without a
graph break."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from ect_kernels import cpu, dispatch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from ect.models import DhariwalUNet, SongUNet, UNet
from ect.models.fused import Fused, Pending, wanted
from ect.models.layers import BlockStyle, GroupNorm, MaskKey, UNetBlock
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


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """The ops run on this backend, as with --kernels."""
    dispatch.set_choice(request.param)
    try:
        dispatch.check_named(torch.device("cpu"))
    except dispatch.BackendError as error:
        pytest.skip(str(error))
    yield
    dispatch.set_choice(None)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["reference", "native"], indirect=True)
@pytest.mark.parametrize("name", NETS)
def test_fused_network_matches_golden(name: str, kernels: None) -> None:
    case, g = MANIFEST[name], load(name)
    net = CLASSES[case["cls"]](**case["kwargs"])
    net.load_state_dict(part(g, "state."))
    net.on_ops = True
    x = g["x"].requires_grad_()
    y = net(x, g["noise_labels"], g.get("class_labels"), g.get("augment_labels"))
    assert rel_l2(y.detach(), g["y"]) <= 1e-5
    (y * g["grad_y"]).sum().backward()
    assert rel_l2(x.grad, g["grad_x"]) <= 1e-4
    grads = {k: p.grad for k, p in net.named_parameters()}
    for key, want in part(g, "grad.").items():
        assert rel_l2(grads[key], want) <= 1e-4, key


def build(name: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    cls, kwargs = VARIANTS[name]
    options = {"attn_resolutions": [8], "dropout": 0.2, "label_dim": 3, "augment_dim": 9, **kwargs, **changes}
    net = cls(**{**SMALL, **options}).train()
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    return net


def run(net: nn.Module, use_ops: bool) -> tuple[Tensor, list[Tensor]]:
    net.on_ops = use_ops
    g = torch.Generator().manual_seed(1)
    x, labels = torch.randn(2, 3, 16, 16, generator=g), torch.eye(3)[:2]
    augment, key = torch.randn(2, 9, generator=g), MaskKey(torch.tensor(5), 3)
    y = net(x, torch.tensor([0.3, -1.0]), labels, augment, key)
    cotangent = torch.randn(y.shape, generator=g)
    return y.detach(), list(torch.autograd.grad((y * cotangent).sum(), list(net.parameters())))


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_fused_equals_plain_with_dropout_labels_and_gradients(name: str) -> None:
    net = build(name)
    (want, want_grads), (got, got_grads) = run(net, False), run(net, True)
    assert rel_l2(got, want) <= 1e-5
    for (key, _), a, b in zip(net.named_parameters(), got_grads, want_grads, strict=True):
        assert rel_l2(a, b) <= 1e-4, key


@dataclass(frozen=True)
class Block:
    """A residual block and what comes into it: `channels` of a first source, `other` of a second (0: none), then `out`."""

    channels: int
    out: int
    other: int = 0
    pending: bool = True  # the first source is a sum that is not computed yet
    options: dict[str, bool] = field(default_factory=dict)


BLOCKS = {
    "plain": Block(32, 32),
    "plain, input computed": Block(32, 32, pending=False),
    "attention": Block(128, 128, options=dict(attention=True)),
    "up": Block(32, 32, options=dict(up=True)),
    "down": Block(32, 32, options=dict(down=True)),
    "down and wider": Block(32, 64, options=dict(down=True)),
    "wider": Block(32, 64),
    "two sources": Block(32, 32, other=32),
    "two sources, a group in both": Block(256, 256, other=128),  # 12 channels a group, as at 32x32 of DDPM++
    "two sources, as wide as their sum": Block(32, 64, other=32),
    "two sources, narrower, attention": Block(96, 128, other=160, options=dict(attention=True)),
}
BLOCK_BARS = {torch.float32: (1e-6, 5e-6), torch.float64: (1e-14, 5e-14)}  # relative errors of outputs and of gradients


@cache
def block_style(name: str) -> BlockStyle:
    """That of the network's own blocks."""
    return next(m for m in build(name).modules() if isinstance(m, UNetBlock)).style


def block_parts(block: Block, style: BlockStyle, dtype: torch.dtype) -> tuple[UNetBlock, dict[str, Tensor]]:
    """The block with random parameters, and the tensors it is called with: emb, other, and the parts of the pending sum."""
    layer = UNetBlock(block.channels + block.other, block.out, 24, style, layer=5, dropout=0.3, **block.options)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.1)
    c, image = block.channels, (3, block.channels, 4, 4)
    parts = {"a": torch.randn(image), "emb": torch.randn(3, 24)}
    if block.pending:
        parts |= {"bias": torch.randn(c), "skip": torch.randn(image), "skip_bias": torch.randn(c)}
    if block.other:
        parts["other"] = torch.randn(3, block.other, 4, 4)
    return layer.to(dtype), {name: part.to(dtype).requires_grad_() for name, part in parts.items()}


@pytest.mark.parametrize("dtype", BLOCK_BARS, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("style", ["ddpmpp", "ncsnpp", "adm"])
def test_fused_block_equals_plain(style: str, name: str, dtype: torch.dtype) -> None:
    """Outputs, and the gradients of every parameter and input, of a block alone, with dropout."""
    block = BLOCKS[name]
    layer, parts = block_parts(block, block_style(style), dtype)
    leaves = {**dict(layer.named_parameters()), **parts}
    emb, other, mask = parts["emb"], parts.get("other"), MaskKey(torch.tensor(-5), 2)
    x = Pending(**{k: parts.get(k) for k in ("a", "bias", "skip", "skip_bias")}, scale=0.6 if "skip" in parts else 1.0)

    plain_x = x.value()
    plain = layer(plain_x if other is None else torch.cat([plain_x, other], 1), emb, mask)
    norm = GroupNorm(block.out, 1e-6).to(dtype)
    fused = Fused([layer], [norm], parts["a"], emb, mask)
    h = fused.block(layer, fused.keep(x), None if other is None else Pending(other))
    fused_x = x.value()
    assert rel_l2(fused_x.detach(), plain_x.detach()) <= BLOCK_BARS[dtype][0]
    fused.norm_silu(norm, fused.keep(h))  # its own output is not used
    out = h.value()
    assert rel_l2(out.detach(), plain.detach()) <= BLOCK_BARS[dtype][0]
    cotangent, cotangent_x = torch.randn_like(plain), torch.randn_like(plain_x)  # x itself goes to the decoder

    def gradients(out: Tensor, out_x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((out * cotangent).sum() + (out_x * cotangent_x).sum(), list(leaves.values()))

    errors = map(rel_l2, gradients(out, fused_x), gradients(plain, plain_x))
    worst, leaf = max(zip(errors, leaves, strict=True))
    print(f"{style} {name} {dtype}: worst gradient error {worst:.1e}, of {leaf}")
    assert worst <= BLOCK_BARS[dtype][1], leaf


# Every kind of block and of connection once: plain, wider, down, up, with attention, of two sources. torch.compile follows
# each block by itself, so more of a kind would be followed in the same way.
ONCE_EACH = dict(channel_mult=[1, 2], num_blocks=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpmpp", "skip", "adm"])
def test_compiles_without_a_graph_break_and_fills_no_image_with_zeros(name: str) -> None:
    """A gradient that does not come is said beforehand; torch.compile makes zeros for any other. tests/gpu_paths has the
    other networks, for a GPU."""
    net, graphs = build(name, **ONCE_EACH), []
    want, want_grads = run(net, True)

    def backward(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward), bw_compiler=backward)
    net.compile(fullgraph=True, backend=backend)
    got, grads = run(net, True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, want_grads, strict=True):
        assert rel_l2(a, b) <= 1e-5
    (graph,) = graphs
    assert sum("residual_group_norm_silu_bwd" in str(node.target) for node in graph.graph.nodes) > 5
    filled = [n for n in graph.graph.nodes if re.search("zeros|full|ones", str(n.target)) and n.meta["val"].dim() == 4]
    assert not filled, [(n, n.users) for n in filled]


@pytest.fixture(params=[True, False], ids=["compiled", "not compiled"])
def has_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether this CPU has the norms in C++."""
    monkeypatch.delenv("ECT_KERNELS", raising=False)
    monkeypatch.setattr(cpu, "why_not_built", lambda: None if request.param else "nothing has built them")
    return request.param


@pytest.mark.parametrize("choice", ["", "residual_group_norm_silu=reference"])
def test_the_choice_of_arithmetic_compiles_too(choice: str, has_kernels: bool) -> None:
    net = UNet(8, 3, 3)
    net.forward = lambda x: x * wanted(net.on_ops, x)
    dispatch.set_choice(choice)
    try:
        assert wanted(None, torch.ones(1)) == (has_kernels or bool(choice))
        assert torch.compile(net, fullgraph=True, backend="eager")(torch.ones(1)) == bool(choice)
    finally:
        dispatch.set_choice(None)


def test_who_wants_the_ops(monkeypatch: pytest.MonkeyPatch, has_kernels: bool) -> None:
    x = torch.zeros(1)
    assert wanted(None, x) == has_kernels and wanted(True, x) and not wanted(False, x)
    assert not wanted(None, torch.zeros(1, device="meta"))
    monkeypatch.setenv("ECT_KERNELS", "*=reference")
    assert wanted(None, x) and not wanted(False, x)
    monkeypatch.delenv("ECT_KERNELS")
    dispatch.set_choice("residual_group_norm_silu=reference")
    try:
        assert wanted(None, x)
    finally:
        dispatch.set_choice(None)


def test_norms_that_were_refused_are_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "why_not_built", lambda: None)
    try:
        dispatch.refuse("group_norm_silu", "native", torch.device("cpu"), "wrong values")
        assert not wanted(None, torch.zeros(1))
    finally:
        dispatch.clear_refused()
