"""SongUNet: the DDPM++ and NCSN++ architectures of Song et al. (2021), as EDM reimplements them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ect.models.layers import (
    BlockStyle,
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Init,
    Linear,
    MaskKey,
    PositionalEmbedding,
    UNetBlock,
    default_mask,
    drop_labels,
)  # fmt: skip
from ect.models.unet import UNet


class SongUNet(UNet):
    """DDPM++'s and NCSN++'s U-Net: F_x(x, noise_labels), [N, in_channels, R, R] -> [N, out_channels, R, R], R = img_resolution.

    Keyword arguments, parameter names and values are those of the public EDM checkpoints.
    """

    architectures: ClassVar[dict[str, dict[str, Any]]] = {
        "ddpmpp": {},
        "ncsnpp": {
            "embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual",
            "resample_filter": [1, 3, 3, 1],
        },
    }  # fmt: skip

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[int] = (1, 1),
    ) -> None:
        super().__init__(img_resolution, in_channels, out_channels, label_dim, augment_dim)
        self.label_dropout = label_dropout
        for name, value, known in [
            ("embedding_type", embedding_type, ("positional", "fourier")),
            ("encoder_type", encoder_type, ("standard", "skip", "residual")),
            ("decoder_type", decoder_type, ("standard", "skip")),
        ]:
            if value not in known:
                raise ValueError(f"{name} is {value!r}; known: {', '.join(known)}")
        emb_channels, noise_channels = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        init, init_zero = Init("xavier_uniform"), Init("xavier_uniform", weight=1e-5)
        self.style = BlockStyle(
            eps=1e-6, skip_scale=math.sqrt(0.5), adaptive_scale=False, resample_proj=True, channels_per_head=None,
            init=init, init_zero=init_zero, init_attn=Init("xavier_uniform", weight=math.sqrt(0.2)),
            resample_filter=tuple(resample_filter),
        )  # fmt: skip
        self.map_noise: nn.Module = (
            PositionalEmbedding(noise_channels, endpoint=True, sines_first=True)
            if embedding_type == "positional"
            else FourierEmbedding(noise_channels, sines_first=True)
        )
        self.map_label = Linear(label_dim, noise_channels, init) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, init, bias=False) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init)

        self._layers = 0

        def block(c_in: int, c_out: int, **options: bool) -> UNetBlock:
            self._layers += 1
            return UNetBlock(c_in, c_out, emb_channels, self.style, layer=self._layers - 1, dropout=dropout, **options)

        widths = [model_channels * mult for mult in channel_mult]
        self.enc, skips = self._encoder(block, widths, model_channels, num_blocks, attn_resolutions, encoder_type)
        self.dec = self._decoder(block, widths, skips, num_blocks, attn_resolutions, decoder_type)

    def _encoder(
        self, block: Callable[..., UNetBlock], widths: list[int], model_channels: int, num_blocks: int,
        attn_resolutions: Sequence[int], encoder_type: str,
    ) -> tuple[nn.ModuleDict, list[int]]:  # fmt: skip
        enc, c, c_aux = nn.ModuleDict(), model_channels, self.in_channels
        skips: list[int] = []
        init, taps = self.style.init, self.style.resample_filter
        for level, width in enumerate(widths):
            size = f"{self.img_resolution >> level}x{self.img_resolution >> level}"
            if level == 0:
                enc[f"{size}_conv"] = Conv2d(self.in_channels, c, 3, init)
            else:
                enc[f"{size}_down"] = block(c, c, down=True)
                if encoder_type == "skip":
                    enc[f"{size}_aux_down"] = Conv2d(c_aux, c_aux, 0, down=True, resample_filter=taps)
                    enc[f"{size}_aux_skip"] = Conv2d(c_aux, c, 1, init)
                if encoder_type == "residual":
                    enc[f"{size}_aux_residual"] = Conv2d(
                        c_aux, c, 3, init, down=True, resample_filter=taps, filter_last=True
                    )
                    c_aux = c
            skips.append(c)
            for i in range(num_blocks):
                attention = self.img_resolution >> level in attn_resolutions
                enc[f"{size}_block{i}"] = block(c, width, attention=attention)
                c = width
                skips.append(c)
        return enc, skips

    def _decoder(
        self, block: Callable[..., UNetBlock], widths: list[int], skips: list[int], num_blocks: int,
        attn_resolutions: Sequence[int], decoder_type: str,
    ) -> nn.ModuleDict:  # fmt: skip
        dec, c, lowest = nn.ModuleDict(), widths[-1], len(widths) - 1
        for level in range(lowest, -1, -1):
            resolution = self.img_resolution >> level
            size = f"{resolution}x{resolution}"
            if level == lowest:
                dec[f"{size}_in0"] = block(c, c, attention=True)
                dec[f"{size}_in1"] = block(c, c)
            else:
                dec[f"{size}_up"] = block(c, c, up=True)
            for i in range(num_blocks + 1):
                attention = i == num_blocks and resolution in attn_resolutions
                dec[f"{size}_block{i}"] = block(c + skips.pop(), widths[level], attention=attention)
                c = widths[level]
            if decoder_type == "skip" and level < lowest:
                dec[f"{size}_aux_up"] = Conv2d(
                    self.out_channels, self.out_channels, 0, up=True, resample_filter=self.style.resample_filter
                )
            if decoder_type == "skip" or level == 0:
                dec[f"{size}_aux_norm"] = GroupNorm(c, eps=1e-6)
                dec[f"{size}_aux_conv"] = Conv2d(c, self.out_channels, 3, self.style.init_zero)
        return dec

    def embed(
        self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None, mask: MaskKey | None
    ) -> Tensor:
        """Return the conditioning vector of noise level, class and augmentation: [N, emb_channels], or [1, emb_channels].

        Raises ValueError where a class-conditional network gets no class labels.
        """
        emb = self.map_noise(noise_labels)
        if self.map_label is not None:
            if class_labels is None:
                raise ValueError("this network is class-conditional: class_labels [N, label_dim] are required")
            labels = drop_labels(class_labels, self.label_dropout, mask)
            emb = emb + self.map_label(labels * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        mask: MaskKey | None = None,
    ) -> Tensor:
        """Return F_x as UNet.forward says."""
        mask = default_mask(self, mask, x.device)
        emb = self.embed(noise_labels, class_labels, augment_labels, mask)
        first = self.enc[f"{self.img_resolution}x{self.img_resolution}_conv"]
        norms = [layer for layer in self.dec.values() if isinstance(layer, GroupNorm)]
        assert isinstance(first, Conv2d)
        run = self.runner(x, emb, mask, [first, *norms])
        h, aux = run.conv(first, x), x
        skips = [run.keep(h)]
        for name, layer in list(self.enc.items())[1:]:
            if isinstance(layer, UNetBlock):
                h = run.block(layer, h)
                skips.append(run.keep(h))
            elif name.endswith("aux_down"):
                aux = layer(aux)
            elif name.endswith("aux_skip"):
                h = skips[-1] = run.keep(run.wrap(run.value(h) + layer(aux)))
            elif name.endswith("aux_residual"):
                aux = (run.value(h) + layer(aux)) / math.sqrt(2)
                h = skips[-1] = run.keep(run.wrap(aux))
        out, normed = None, x
        for name, layer in self.dec.items():
            if isinstance(layer, UNetBlock):
                h = run.block(layer, h, skips.pop() if h.shape[1] != layer.in_channels else None)
            elif isinstance(layer, GroupNorm):
                last = layer is norms[-1]  # else the next level reads h again
                normed = run.norm_silu(layer, h if last else run.keep(h))
            elif name.endswith("aux_up"):
                out = layer(out)
            elif name.endswith("aux_conv"):
                image = layer(normed)
                out = image if out is None else out + image
        assert out is not None
        return out
