"""The interface of a network: `UNet`, which every architecture derives from, and `Runner`, which its forward pass calls.

Read the networks in this order: this file, an architecture (`song_unet.py`, `adm_unet.py`), its layers (`layers.py`), then the
two runners: `plain.py`, and `fused.py`, which computes the same with fewer passes over memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ect.models.fused import Fused, wanted
from ect.models.layers import Conv2d, GroupNorm, MaskKey, UNetBlock, blocks_of
from ect.models.plain import Plain

H = TypeVar("H")


class Runner(Protocol[H]):
    """The arithmetic of a forward pass.

    H is what stands for an activation between two layers: for `Plain` the tensor, for `Fused` a sum that the next norm
    computes. Either has the activation's `shape`, [N, C, H, W].
    """

    def conv(self, layer: Conv2d, x: Tensor) -> H:
        """Apply a convolution to an image."""

    def block(self, layer: UNetBlock, x: H, skip: H | None = None) -> H:
        """Apply a residual block to x, or to x and a skip connection side by side: cat(x, skip) on channels."""

    def norm_silu(self, norm: GroupNorm, x: H) -> Tensor:
        """Return silu(norm(x))."""

    def keep(self, x: H) -> H:
        """Say that x is read again after the layer that comes next, as a skip connection is, and return it."""

    def value(self, x: H) -> Tensor:
        """Return the activation as a tensor, in the dtype of the network's input, for arithmetic written in place."""

    def wrap(self, x: Tensor) -> H:
        """Return what stands for this tensor between two layers."""


class UNet(nn.Module):
    """A network F_x(x, noise_labels): [N, in_channels, R, R] -> [N, out_channels, R, R], R = img_resolution, in fp32.

    A network of one's own is a subclass: __init__ makes the layers, forward() is written once with the calls of a `Runner`. Its
    keyword arguments are JSON-able values, kept in model files.
    """

    architectures: ClassVar[dict[str, dict[str, Any]]] = {}
    """The named configurations (--net.arch): keyword arguments beside those of sizes, widths and dropout that a run gives."""

    on_ops: bool | None = None
    """Run on the ops of ect_kernels? None: on a GPU, or where a backend of any op was asked for by name."""

    half_dtype: torch.dtype | None = None
    """The dtype of the blocks' activations, where `run_in` has put them in half precision."""

    preconds: ClassVar[dict[str, str]] = {}
    """The preconditionings that this network has in the place of EDMPrecond and ECMPrecond, by these names."""

    takes_augment_labels: ClassVar[bool] = True
    """False where the network cannot be told how an image was augmented."""

    def __init__(
        self, img_resolution: int, in_channels: int, out_channels: int, label_dim: int = 0, augment_dim: int = 0
    ) -> None:
        super().__init__()
        self.img_resolution, self.in_channels, self.out_channels = img_resolution, in_channels, out_channels
        self.label_dim, self.augment_dim = label_dim, augment_dim

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        mask: MaskKey | None = None,
    ) -> Tensor:
        """Return F_x [N, out_channels, R, R] of x [N, in_channels, R, R], both fp32.

        noise_labels: [N] or [1]. class_labels: [N, label_dim], required where label_dim > 0. augment_labels: [N, augment_dim].
        mask: what dropout is a function of in train mode; without one, a seed is drawn from torch's global generator.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward pass")

    def begin_step(self) -> None:
        """Do to the weights, in place, what an update does before its passes; it is called once an update. Here nothing."""

    def run_in(self, half: torch.dtype) -> None:
        """Compute the blocks in half precision, on the ops, which sum in fp32; `half_weights` are in it already."""
        self.on_ops, self.half_dtype = True, half

    def half_weights(self) -> set[str]:
        """Name the parameters that a half-precision copy holds in half: the weights of the blocks' convolutions."""
        return {
            f"{block}.{name}.weight"
            for block, module in self.named_modules()
            if isinstance(module, UNetBlock)
            for name, layer in module.named_children()
            if isinstance(layer, Conv2d) and layer.weight is not None
        }

    def runner(self, x: Tensor, emb: Tensor, mask: MaskKey | None, layers: Sequence[Conv2d | GroupNorm]) -> Runner[Any]:
        """Choose the arithmetic of one forward pass.

        x: the network's input. emb: the blocks' conditioning vector, [N, emb_channels] or [1, emb_channels]. layers: what the
        pass gives to conv() and norm_silu().
        """
        if not wanted(self.on_ops, x):
            return Plain(emb, mask)
        return Fused(blocks_of(self), layers, x, emb, mask)
