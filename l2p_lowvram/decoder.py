"""The local decoder: from the noisy picture and the transformer's features to pixels.

A small convolutional U-Net without normalisation (L2P, MicroDiffusionModel).
One class for every family: the levels come from `DecoderConfig`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import IMAGE_CHANNELS, DecoderConfig
from .linear import Conv2d


def conv3(inputs: int, outputs: int) -> Conv2d:
    return Conv2d(inputs, outputs, 3, padding=1)


class LocalDecoder(nn.Module):
    """pixels (B, 3, H, W) and features (B, dim, H/patch, W/patch) -> (B, 3, H, W).

    H and W must be multiples of `config.pooling`. Module names are the
    checkpoint's: convolutions sit at index 0 (enc, dec, bottleneck) or 1 (up)
    of a sequence whose other member has no weights.
    """

    def __init__(self, config: DecoderConfig, feature_dim: int) -> None:
        super().__init__()
        self.config = config
        inputs = IMAGE_CHANNELS
        for level in config.levels:
            self.add_module(f"enc{level.name}", nn.Sequential(conv3(inputs, level.encoder), nn.SiLU()))
            inputs = level.encoder
        self.bottleneck = nn.Sequential(Conv2d(inputs + feature_dim, config.bottleneck, 1), nn.SiLU())
        inputs = config.bottleneck
        for level in reversed(config.levels):
            up = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), conv3(inputs, level.up))
            self.add_module(f"up{level.name}", up)
            dec = nn.Sequential(conv3(level.up + level.encoder, level.out), nn.SiLU())
            self.add_module(f"dec{level.name}", dec)
            inputs = level.out
        self.out_conv = Conv2d(inputs, IMAGE_CHANNELS, 1)

    def forward(self, pixels: Tensor, features: Tensor) -> Tensor:
        skips, x = [], pixels
        for level in self.config.levels:
            x = self.get_submodule(f"enc{level.name}")(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        features = nearest_resize(features, x.shape[-2:])
        x = self.bottleneck(torch.cat([x, features], dim=1))
        for level in reversed(self.config.levels):
            x = self.get_submodule(f"up{level.name}")(x)
            x = self.get_submodule(f"dec{level.name}")(torch.cat([x, skips.pop()], dim=1))
        return self.out_conv(x)


def nearest_resize(features: Tensor, size: torch.Size) -> Tensor:
    """(B, C, h, w) -> (B, C, *size) taking cell floor(i * h / size); a no-op for equal sizes.

    Only the 10K family needs it: its patch (160) is not its pooling (64).
    """
    if features.shape[-2:] == size:
        return features
    rows = torch.arange(size[0], device=features.device) * features.shape[-2] // size[0]
    columns = torch.arange(size[1], device=features.device) * features.shape[-1] // size[1]
    return features[:, :, rows][:, :, :, columns]
