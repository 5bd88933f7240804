"""A network of one's own, written once as a subclass of UNet: what tests/extending does not show of its interface."""

from __future__ import annotations

from typing import Any, ClassVar, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from ect import models
from ect.config import NetConfig
from ect.errors import UserError
from ect.models import EDMPrecond, MaskKey, UNet, describe
from ect.models.layers import Conv2d, GroupNorm, default_mask
from tests.extending.loaded import forgotten
from tests.golden_data import rel_l2

with forgotten():  # the class alone: no other test is to know its name
    from tests.extending.network import INIT, TwoBlocks


def made(kind: type[TwoBlocks] = TwoBlocks, dtype: torch.dtype = torch.float64) -> TwoBlocks:
    torch.manual_seed(0)
    net = kind(img_resolution=8, in_channels=3, out_channels=3, dropout=0.2, attention=True).train()
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    return net.to(dtype)


def results(net: UNet, on_ops: bool, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The output, and the gradients at the input and at every parameter."""
    net.on_ops = on_ops
    x, labels = torch.randn(4, 3, 8, 8, dtype=dtype, requires_grad=True), torch.linspace(-1, 1, 4, dtype=dtype)
    y: Any = net(x, labels, mask=MaskKey(torch.tensor(3), 0))
    return [y.detach(), *torch.autograd.grad((y * torch.randn(y.shape, dtype=dtype)).sum(), [x, *net.parameters()])]


class Forgetful(TwoBlocks):
    """It reads an activation twice, and has not said so."""

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None, mask: MaskKey | None = None,
    ) -> Tensor:  # fmt: skip
        mask = default_mask(self, mask, x.device)
        run = self.runner(x, self.map(noise_labels[:, None]), mask, [self.first, self.norm])
        skip = run.conv(self.first, x)
        return self.last(run.norm_silu(self.norm, run.block(self.up, run.block(self.down, skip), skip)))


def test_an_activation_that_was_not_kept_is_not_read_again_with_its_gradient_lost() -> None:
    with pytest.raises(RuntimeError, match=r"read a second time: call keep\(\)"):
        results(made(Forgetful), True)


class Odd(TwoBlocks):
    """What no network of ours does: a sum with a skip connection is read in place, and as a skip connection that no norm has
    computed; a block runs twice, and its number is another one's too."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, dropout=0.2)
        self.image = Conv2d(self.in_channels, 16, 1, INIT)

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
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    for on_ops in (False, True):
        torch.manual_seed(1)
        found.append(results(net, on_ops))
    for plain, fused in zip(*found, strict=True):
        assert rel_l2(fused, plain) <= 1e-13


def test_the_blocks_convolutions_are_what_a_half_precision_copy_holds_in_half() -> None:
    net = made(dtype=torch.float32)
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
    net = TwoBlocks(img_resolution=8, in_channels=2, out_channels=3, label_dim=5, augment_dim=9)
    assert (net.img_resolution, net.in_channels, net.out_channels, net.label_dim, net.augment_dim) == (8, 2, 3, 5, 9)
    with pytest.raises(NotImplementedError, match="UNet has no forward pass"):
        UNet(8, 3, 3)(torch.zeros(1), torch.zeros(1))


def test_an_architecture_that_no_network_has_is_refused() -> None:
    with pytest.raises(UserError, match=r"--net\.arch two: no network has .*known: ddpmpp, ncsnpp, adm"):
        describe("two", "ECMPrecond", 0.5, {})


def test_every_name_of_the_option_is_some_networks_configuration() -> None:
    assert get_args(get_type_hints(NetConfig)["arch"]) == tuple(models.known_architectures())


def test_a_name_that_is_taken_is_refused_and_nothing_is_registered() -> None:
    before = dict(models._UNETS)

    class SongUNet(TwoBlocks):
        architectures: ClassVar[dict[str, dict[str, Any]]] = {"mine": {}}

    class Mine(TwoBlocks):
        architectures: ClassVar[dict[str, dict[str, Any]]] = {"mine": {}, "adm": {}}

    with pytest.raises(ValueError, match=r"network 'SongUNet': ect\.models\.song_unet\.SongUNet has this name; choose"):
        models.register(SongUNet)
    with pytest.raises(ValueError, match=r"architecture 'adm': ect\.models\.adm_unet\.DhariwalUNet has this name"):
        models.register(Mine)
    assert before == models._UNETS and "mine" not in get_args(get_type_hints(NetConfig)["arch"])


def test_a_module_that_is_loaded_again_registers_its_network_anew() -> None:
    with forgotten():
        for _ in range(2):
            again = type("TwoBlocks", (TwoBlocks,), {"__module__": TwoBlocks.__module__, "__qualname__": "TwoBlocks"})
            assert models.register(again) is models._UNETS["TwoBlocks"] is models.known_architectures()["two"]
