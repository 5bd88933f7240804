"""DINOv2's vision transformer (Oquab et al., 2023) as a torch-fidelity extractor that reads a local weight file.

torch-fidelity's own one can only fetch code and weights from a hub. Images are resized to 224 x 224 by an antialiased
bicubic filter, as the authors of FD-DINOv2 do (Stein et al., 2023); torch-fidelity's bilinear one gives other figures.
This module imports torch-fidelity: import it where that is known to be installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from ect.errors import UserError
from ect.metrics.weights import read_state

NAME = "ect-dinov2"
PATCH = 14
SIZE = 224
HEAD_CHANNELS = 64
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class _Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        heads = x.shape[-1] // HEAD_CHANNELS
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, heads, HEAD_CHANNELS).permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class _Scale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _MLP(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels, eps=1e-6), nn.LayerNorm(channels, eps=1e-6)
        self.attn, self.mlp = _Attention(channels), _MLP(channels)
        self.ls1, self.ls2 = _Scale(channels), _Scale(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


class VisionTransformer(nn.Module):
    """DINOv2 ViT-S/B/L without registers, under the public parameter names.

    channels: multiple of 64. depth: blocks. grid: patches a side in the position embedding (37 in the public weights,
    trained at 518 pixels). Call: normalised fp32 [N, 3, H, W], sides multiples of 14 -> fp32 [N, channels].
    """

    def __init__(self, channels: int, depth: int, grid: int = 37) -> None:
        super().__init__()
        self.grid = grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, channels))
        self.mask_token = nn.Parameter(torch.zeros(1, channels))  # in the files, used by the pretraining alone
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, channels))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, channels, PATCH, PATCH)})
        self.blocks = nn.ModuleList(_Block(channels) for _ in range(depth))
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed["proj"](x)
        position = self._position(x.shape[2], x.shape[3])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1) + position
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)[:, 0]
        return out

    def _position(self, height: int, width: int) -> Tensor:
        """Return the position embedding at height x width patches, by the bicubic filter of the public code.

        Its scale is (n + 0.1) / grid: the offset kept sizes from being rounded down, and the features depend on it.
        """
        if height == width == self.grid:
            return self.pos_embed
        table = self.pos_embed[:, 1:].reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        scale = ((height + 0.1) / self.grid, (width + 0.1) / self.grid)
        table = F.interpolate(table, scale_factor=scale, mode="bicubic", antialias=False)
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)], dim=1)


class LocalDinoV2(FeatureExtractorBase):
    """torch-fidelity's extractor interface: uint8 [N, 3, H, W] -> one feature, 'dinov2' [N, C] fp32."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_: Any) -> None:
        super().__init__(name, features_list)
        self.model = load_transformer(Path(feature_extractor_weights_path))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = F.interpolate(x.float(), (SIZE, SIZE), mode="bicubic", antialias=True).round().clamp(0, 255) / 255
        mean, std = x.new_tensor(MEAN).view(3, 1, 1), x.new_tensor(STD).view(3, 1, 1)
        return (self.model((x - mean) / std),)

    @staticmethod
    def get_provided_features_list() -> tuple[str]:
        return ("dinov2",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "dinov2"


def load_transformer(path: Path) -> VisionTransformer:
    """Return the network of a DINOv2 weight file (ViT-S, B or L). Raises UserError for any other file."""
    state = read_state(path)
    try:
        channels, depth = state["cls_token"].shape[-1], len({name.split(".")[1] for name in state if "blocks." in name})
        net = VisionTransformer(channels, depth, grid=int((state["pos_embed"].shape[1] - 1) ** 0.5))
        net.load_state_dict(state)
    except (KeyError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--dinov2 {path}: not a DINOv2 ViT-S, B or L without registers ({reason}); expected a file such as "
            "dinov2_vitl14_pretrain.pth"
        ) from error
    return net


def register() -> str:
    """Make torch-fidelity know the extractor; returns its name there."""
    if NAME not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(NAME, LocalDinoV2)
    return NAME
