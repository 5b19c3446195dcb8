"""The local decoder: from the noisy picture and the transformer's features to pixels.

A small convolutional U-Net without normalisation (L2P, MicroDiffusionModel).
One class for every family: the levels come from `DecoderConfig`. It can run in
parts (some levels at a time, on a crop); `encoder_layers` and `decoder_layers`
say what such a part computes, as plain data, for whoever cuts it into tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import IMAGE_CHANNELS, DecoderConfig, DecoderLevel
from .devices import is_card
from .linear import Conv2d

KERNEL = 3  # of every convolution inside a level; the others are 1x1


def conv3(inputs: int, outputs: int) -> Conv2d:
    return Conv2d(inputs, outputs, KERNEL, padding=KERNEL // 2)


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
            self.add_module(f"enc{level.name}", nn.Sequential(conv3(inputs, level.encoder), nn.SiLU(inplace=True)))
            inputs = level.encoder
        self.bottleneck = nn.Sequential(Conv2d(inputs + feature_dim, config.bottleneck, 1), nn.SiLU(inplace=True))
        inputs = config.bottleneck
        for level in reversed(config.levels):
            up = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), conv3(inputs, level.up))
            self.add_module(f"up{level.name}", up)
            dec = nn.Sequential(conv3(level.up + level.encoder, level.out), nn.SiLU(inplace=True))
            self.add_module(f"dec{level.name}", dec)
            inputs = level.out
        self.out_conv = Conv2d(inputs, IMAGE_CHANNELS, 1)

    def forward(self, pixels: Tensor, features: Tensor) -> Tensor:
        levels = self.config.levels
        skips: list[Tensor] = []
        x = pixels
        for level in levels:
            # As the parts below have them: a kernel for another order sums in another one, too.
            x = self._part("enc", level)(x)
            skips.append(x.contiguous(memory_format=map_format(x.device, x.dtype)))
            x = F.max_pool2d(skips[-1], 2)
        x = self.bottleneck(_joined(x, nearest_resize(features, x.shape[-2:])))
        for level in reversed(levels):
            x = self._part("dec", level)(_joined(self._part("up", level)(x), skips.pop()))
        return self.out_conv(x)

    # What follows is the same in parts, without autograd, and for little memory.

    def encode(self, x: Tensor, levels: range, joins: list[Tensor] | None = None) -> Tensor:
        """The input of the first of `levels` (by index, shallow first) -> its pooled output after the last.

        joins collects what `decode` of the same levels takes: per level a buffer (B, up + encoder, h, w) whose
        second part is the skip. Each is made before the maps of its level and so lies below them in memory;
        `decode` gives them back in the opposite order, which leaves no holes.
        """
        for index in levels:
            level = self.config.levels[index]
            if joins is None:
                x = self._part("enc", level)(x)
            else:
                joins.append(empty_map(x, level.up + level.encoder, x.shape[-2:]))
                joins[-1][:, level.up :] = self._part("enc", level)(x)
                x = joins[-1][:, level.up :]
            x = halved(x)
        return x

    def merge(self, pooled: Tensor, features: Tensor) -> Tensor:
        """The bottleneck: pooled (B, C, h, w) and features (B, dim, h, w) -> (B, bottleneck, h, w)."""
        channels = pooled.shape[1]
        joined = empty_map(pooled, channels + features.shape[1], pooled.shape[-2:])
        joined[:, :channels], joined[:, channels:] = pooled, features
        return self.bottleneck(joined)

    def decode(self, x: Tensor, levels: range, joins: list[Tensor]) -> Tensor:
        """Back up from below the last of `levels` to the output of the first; empties `joins`."""
        for index in reversed(levels):
            level, joined = self.config.levels[index], joins.pop()
            joined[:, : level.up] = self._part("up", level)(x)
            x = self._part("dec", level)(joined)
        return x

    def _part(self, kind: str, level: DecoderLevel) -> nn.Module:
        return self.get_submodule(f"{kind}{level.name}")


@dataclass(frozen=True)
class DecoderLayer:
    """One layer as plain data. kind: "conv3", "conv1", "pool2", "up2", "skip" (set the map aside), "join"
    (concatenate it), "merge" (concatenate the features). inputs, outputs: channels."""

    kind: str
    inputs: int
    outputs: int


def encoder_layers(config: DecoderConfig, levels: range) -> list[DecoderLayer]:
    """What `LocalDecoder.encode` computes for `levels`, in order."""
    layers = []
    for index in levels:
        inputs, outputs = level_inputs(config, index), config.levels[index].encoder
        layers.append(DecoderLayer(f"conv{KERNEL}", inputs, outputs))
        layers += [DecoderLayer(kind, outputs, outputs) for kind in ("skip", "pool2")]
    return layers


def merge_layers(config: DecoderConfig, feature_dim: int) -> list[DecoderLayer]:
    """What `LocalDecoder.merge` computes."""
    pooled = level_inputs(config, len(config.levels))
    joined = pooled + feature_dim
    return [DecoderLayer("merge", pooled, joined), DecoderLayer("conv1", joined, config.bottleneck)]


def decoder_layers(config: DecoderConfig, levels: range) -> list[DecoderLayer]:
    """What `LocalDecoder.decode` computes for `levels`, and `out_conv` after level 0, in order."""
    layers = []
    for index in reversed(levels):
        level, inputs = config.levels[index], level_outputs(config, index + 1)
        layers += [
            DecoderLayer("up2", inputs, inputs),
            DecoderLayer(f"conv{KERNEL}", inputs, level.up),
            DecoderLayer("join", level.up, level.up + level.encoder),
            DecoderLayer(f"conv{KERNEL}", level.up + level.encoder, level.out),
        ]
    if levels.start == 0:
        layers.append(DecoderLayer("conv1", config.levels[0].out, IMAGE_CHANNELS))
    return layers


def level_inputs(config: DecoderConfig, index: int) -> int:
    """Channels that the encoder of level `index` reads; one past the last level: what the bottleneck gets."""
    return config.levels[index - 1].encoder if index else IMAGE_CHANNELS


def level_outputs(config: DecoderConfig, index: int) -> int:
    """Channels that level `index` hands upwards; one past the last level: the bottleneck's."""
    return config.levels[index].out if index < len(config.levels) else config.bottleneck


def map_format(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """How maps lie: channels last on CPUs, and on cards in half precision.

    cuDNN's kernels for matrix units want them so, those for full fp32 want them first. Given the other order cuDNN
    copies inputs and outputs in a workspace as large as both (384 MiB at 1024 x 1024 in bf16), or where that does
    not fit takes another algorithm, with other last bits. oneDNN copies maps whose channels come first as well: the
    decoder then takes 2.3 times as long in bf16 with AMX, and 1.1 to 1.4 times in fp32.
    """
    is_last = device.type == "cpu" or (is_card(device) and dtype.itemsize == 2)
    return torch.channels_last if is_last else torch.contiguous_format


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """Their channels together, as maps lie; for autograd."""
    together = torch.cat([first, second], dim=1)
    return together.contiguous(memory_format=map_format(first.device, first.dtype))


def empty_map(like: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    """(B, channels, *size), with the batch, dtype and device of `like`."""
    shape = (like.shape[0], channels, *size)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=map_format(like.device, like.dtype))


def halved(x: Tensor) -> Tensor:
    """`F.max_pool2d(x, 2)` to the bit, without the indices that it writes down, and from any view of x without a copy.
    On CPUs in a tenth to a third of its time."""
    y = empty_map(x, x.shape[1], [side // 2 for side in x.shape[-2:]])
    first, *others = (x[..., row::2, column::2] for row in range(2) for column in range(2))
    torch.maximum(first, others[0], out=y)
    for part in others[1:]:
        torch.maximum(y, part, out=y)
    return y


def nearest_resize(
    features: Tensor, size: tuple[int, ...], rows: slice = slice(None), columns: slice = slice(None)
) -> Tensor:
    """(B, C, h, w) -> (B, C, *size)[..., rows, columns], taking cell floor(i * h / size) for every index i.

    A view for equal sizes. Only the 10K family needs more: its patch (160) is not its pooling (64).
    rows and columns count on the resized grid, so that a crop takes the same cells as the whole.
    """
    if features.shape[-2:] == size:
        return features[:, :, rows, columns]
    y = torch.arange(size[0], device=features.device)[rows] * features.shape[-2] // size[0]
    x = torch.arange(size[1], device=features.device)[columns] * features.shape[-1] // size[1]
    return features[:, :, y[:, None], x]
