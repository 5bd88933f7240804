"""A network of one's own: written once as a subclass of UNet, it runs in both arithmetics, and in half precision."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace
from typing import Any, ClassVar, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from ect import models
from ect.assembly import flat_state, network_spec, train_step
from ect.config import DataConfig, NetConfig
from ect.data import ImageStream, load
from ect.errors import UserError
from ect.models import EDMPrecond, MaskKey, UNet, build
from ect.models.layers import BlockStyle, Conv2d, GroupNorm, Init, Linear, UNetBlock, default_mask
from tests.golden_data import rel_l2
from tests.tiny import NET, config

INIT = Init("xavier_uniform")
STYLE = BlockStyle(
    eps=1e-6, skip_scale=math.sqrt(0.5), adaptive_scale=False, resample_proj=True, channels_per_head=None,
    init=INIT, init_zero=INIT, init_attn=INIT,
)  # fmt: skip


class Two(UNet):
    """Two blocks at one resolution: the second takes the first's input as a skip connection."""

    architectures: ClassVar[dict[str, dict[str, Any]]] = {"two": {}, "attentive": {"attention": True}}
    keeps = True

    def __init__(
        self, img_resolution: int, in_channels: int, out_channels: int, label_dim: int = 0, augment_dim: int = 0,
        model_channels: int = 16, dropout: float = 0.2, attention: bool = False, **unused: Any,
    ) -> None:  # fmt: skip
        super().__init__(img_resolution, in_channels, out_channels, label_dim, augment_dim)
        width = model_channels
        self.map = Linear(1, 8, INIT)
        self.first = Conv2d(self.in_channels, width, 3, INIT)
        self.image = Conv2d(self.in_channels, width, 1, INIT)
        self.down = UNetBlock(width, width, 8, STYLE, layer=0, dropout=dropout)
        self.up = UNetBlock(2 * width, width, 8, STYLE, layer=1, dropout=dropout, attention=attention)
        self.norm, self.last = GroupNorm(width, 1e-6), Conv2d(width, self.out_channels, 3, INIT)

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None, mask: MaskKey | None = None,
    ) -> Tensor:  # fmt: skip
        mask = default_mask(self, mask, x.device)
        run = self.runner(x, self.map(noise_labels[:, None]), mask, [self.first, self.norm])
        skip = run.conv(self.first, x)
        h = run.block(self.down, run.keep(skip) if self.keeps else skip)
        h = run.wrap(run.value(h) + self.image(x))  # plain arithmetic between two layers
        h = run.block(self.up, h, skip)
        return self.last(run.norm_silu(self.norm, h))


def made(dtype: torch.dtype = torch.float64) -> Two:
    torch.manual_seed(0)
    net = Two(img_resolution=8, in_channels=3, out_channels=3, attention=True).train()
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    return net.to(dtype)


def results(net: UNet, on_ops: bool, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The output, and the gradients at the input and at every parameter."""
    net.on_ops = on_ops
    x, labels = torch.randn(4, 3, 8, 8, dtype=dtype, requires_grad=True), torch.linspace(-1, 1, 4, dtype=dtype)
    y: Any = net(x, labels, mask=MaskKey(torch.tensor(3), 0))
    return [y.detach(), *torch.autograd.grad((y * torch.randn(y.shape, dtype=dtype)).sum(), [x, *net.parameters()])]


def test_both_arithmetics_agree() -> None:
    net, found = made(), []
    for on_ops in (False, True):
        torch.manual_seed(1)
        found.append(results(net, on_ops))
    for plain, fused in zip(*found, strict=True):
        assert rel_l2(fused, plain) <= 1e-13


def test_an_activation_that_was_not_kept_is_not_read_again_with_its_gradient_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Two, "keeps", False)
    with pytest.raises(RuntimeError, match=r"read a second time: call keep\(\)"):
        results(made(), True)


class Odd(Two):
    """What no network of ours does: a sum with a skip connection is read in place, and as a skip connection that no norm has
    computed; a block runs twice, and its number is another one's too."""

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None, mask: MaskKey | None = None,
    ) -> Tensor:  # fmt: skip
        self.up.layer = self.down.layer
        run = self.runner(x, self.map(noise_labels[:, None]), mask, [self.first, self.norm])
        skip = run.keep(run.conv(self.first, x))
        total = run.keep(run.block(self.up, run.wrap(self.image(x)), skip))
        h = run.block(self.up, run.block(self.down, skip), total)
        return self.last(run.norm_silu(self.norm, run.wrap(run.value(h) + run.value(total))))


class Bare(UNet):
    """A network without residual blocks."""

    def __init__(self, img_resolution: int, in_channels: int, out_channels: int) -> None:
        super().__init__(img_resolution, in_channels, out_channels)
        self.first, self.norm = Conv2d(in_channels, 8, 3, INIT), GroupNorm(8, 1e-6)
        self.last = Conv2d(8, out_channels, 3, INIT)

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None, mask: MaskKey | None = None,
    ) -> Tensor:  # fmt: skip
        run = self.runner(x, noise_labels[:, None], mask, [self.first, self.norm])
        return self.last(run.norm_silu(self.norm, run.conv(self.first, x)))


@pytest.mark.parametrize("kind", [Odd, Bare])
def test_what_the_interface_allows_is_the_same_in_both_arithmetics(kind: type[UNet]) -> None:
    torch.manual_seed(0)
    net, found = kind(img_resolution=8, in_channels=3, out_channels=3).double(), []
    for on_ops in (False, True):
        torch.manual_seed(1)
        found.append(results(net, on_ops))
    for plain, fused in zip(*found, strict=True):
        assert rel_l2(fused, plain) <= 1e-13


def test_the_blocks_convolutions_are_what_a_half_precision_copy_holds_in_half() -> None:
    net = made(torch.float32)
    layers = ("down.conv0", "down.conv1", "up.conv0", "up.conv1", "up.skip", "up.qkv", "up.proj")
    names = {f"{layer}.weight" for layer in layers}
    assert net.half_weights() == names
    assert EDMPrecond(net).half_weights() == {f"model.{name}" for name in names}
    torch.manual_seed(1)
    want = results(net, True, torch.float32)[0]
    for name in names:
        net.get_parameter(name).data = net.get_parameter(name).data.half()
    torch.manual_seed(1)
    assert 1e-6 < rel_l2(results(net, True, torch.float32)[0], want) < 1e-2


def test_a_network_says_what_it_is_made_for() -> None:
    net = Two(img_resolution=8, in_channels=2, out_channels=3, label_dim=5, augment_dim=9)
    assert (net.img_resolution, net.in_channels, net.out_channels, net.label_dim, net.augment_dim) == (8, 2, 3, 5, 9)
    with pytest.raises(NotImplementedError, match="UNet has no forward pass"):
        UNet(8, 3, 3)(torch.zeros(1), torch.zeros(1))


@pytest.mark.slow
def test_a_registered_network_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """From its name in a configuration to an update, on the ops and in half precision."""
    cfg, data = config(net=replace(NET, arch="attentive"), precision="bf16"), load(DataConfig())  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"--net.arch attentive: .*known: ddpmpp, ncsnpp, adm"):
        network_spec(cfg.net, "ECMPrecond", data, 0)
    monkeypatch.setitem(models._UNETS, "Two", Two)
    net = build(network_spec(cfg.net, "ECMPrecond", data, 0))
    assert isinstance(net.model, Two) and net.model.up.num_heads == 1
    with closing(ImageStream(data, 0, torch.device("cpu"), cfg.batch)) as stream:
        step = train_step(replace(cfg, compile=False, graph=False), flat_state(cfg, net.train()), stream)
        before = step.state.params.clone()
        assert step(0, 2).isfinite() and not torch.equal(step.state.params, before)


def test_every_name_of_the_option_is_some_networks_configuration() -> None:
    assert get_args(get_type_hints(NetConfig)["arch"]) == tuple(models.known_architectures())
