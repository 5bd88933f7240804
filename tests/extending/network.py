"""Two blocks at one resolution; the second takes the first's input as a skip connection."""

import math
from typing import Any, ClassVar

from torch import Tensor

from ect.models import MaskKey, UNet, register
from ect.models.layers import BlockStyle, Conv2d, GroupNorm, Init, Linear, UNetBlock, default_mask

INIT = Init("xavier_uniform")
STYLE = BlockStyle(
    eps=1e-6, skip_scale=math.sqrt(0.5), adaptive_scale=False, resample_proj=True, channels_per_head=None,
    init=INIT, init_zero=Init("xavier_uniform", weight=1e-5), init_attn=INIT,
)  # fmt: skip


@register
class TwoBlocks(UNet):
    """F_x = conv(silu(norm(up(down(conv(x)), conv(x))))), the blocks conditioned on the noise level."""

    architectures: ClassVar[dict[str, dict[str, Any]]] = {"two": {}, "two-attentive": {"attention": True}}

    def __init__(
        self, img_resolution: int, in_channels: int, out_channels: int, label_dim: int = 0, augment_dim: int = 0,
        model_channels: int = 16, dropout: float = 0.0, attention: bool = False, **unused: Any,
    ) -> None:  # fmt: skip
        super().__init__(img_resolution, in_channels, out_channels, label_dim, augment_dim)
        width = model_channels
        self.map = Linear(1, 8, INIT)
        self.first = Conv2d(in_channels, width, 3, INIT)
        self.down = UNetBlock(width, width, 8, STYLE, layer=0, dropout=dropout)
        self.up = UNetBlock(2 * width, width, 8, STYLE, layer=1, dropout=dropout, attention=attention)
        self.norm, self.last = GroupNorm(width, 1e-6), Conv2d(width, out_channels, 3, INIT)

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None, mask: MaskKey | None = None,
    ) -> Tensor:  # fmt: skip
        """Return F_x [N, out_channels, R, R]; written once, it runs in PyTorch and on the ops of ect_kernels."""
        mask = default_mask(self, mask, x.device)
        run = self.runner(x, self.map(noise_labels[:, None]), mask, [self.first, self.norm])
        skip = run.keep(run.conv(self.first, x))  # kept, since `up` reads it again
        h = run.block(self.up, run.block(self.down, skip), skip)
        return self.last(run.norm_silu(self.norm, h))
