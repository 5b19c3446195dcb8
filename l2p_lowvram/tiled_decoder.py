"""Runs the local decoder by a `DecoderPlan`: exact tiles, and never a full-resolution feature map.

Picture and result may live anywhere: they are read and written a tile at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from tiling.conv import Tile

from .decoder import LocalDecoder, empty_map, level_inputs, level_outputs, nearest_resize
from .decoder_plan import DecoderPlan, Stage, decoder_tiles, encoder_tiles

# (rows, columns) of the picture -> pixels (B, 3, rows, columns) on the device, in the decoder's dtype
ReadPixels = Callable[[slice, slice], Tensor]
# (rows, columns, decoder output (B, 3, rows, columns)): called once for every part of the picture
WriteOutput = Callable[[slice, slice, Tensor], None]


def reading(pixels: Tensor, device: torch.device, dtype: torch.dtype) -> ReadPixels:
    """Crops of a picture (B, 3, H, W) that lives anywhere, in any dtype."""
    return lambda rows, columns: pixels[..., rows, columns].to(device, dtype)


def writing_velocity(out: Tensor) -> WriteOutput:
    """out := the velocity, which is the decoder's output negated; out (B, 3, H, W), anywhere, any float dtype."""

    def write(rows: slice, columns: slice, values: Tensor) -> None:
        out[..., rows, columns] = values.neg_()

    return write


def decode_tiled(
    decoder: LocalDecoder,
    plan: DecoderPlan,
    size: tuple[int, int],
    read: ReadPixels,
    features: Tensor,
    write: WriteOutput,
) -> None:
    """LocalDecoder.forward for a picture of `size` (height, width), tile by tile.

    features (B, dim, h, w) may be any view. read is called several times for a pixel; what write gets is its
    to change, and gone afterwards. Exact: a tile is computed from the same inputs as the whole, up to the
    order in which a kernel sums. The device holds `decoder_memory` beyond what the caller gave.
    Raises ValueError for a size off the decoder's grid, or a plan for another decoder.
    """
    plan.check(decoder.config)
    inputs = [read]  # of every stage
    for stage in plan.stages[:-1]:
        inputs.append(_crops_of(_encode_stage(decoder, stage, size, inputs[-1], features)))
    below = features
    for stage in reversed(plan.stages):
        below = _decode_stage(decoder, stage, size, inputs.pop(), below, write)


def _crops_of(whole: Tensor) -> ReadPixels:
    return lambda rows, columns: whole[..., rows, columns]


def _encode_stage(decoder: LocalDecoder, stage: Stage, size: tuple[int, int], read: ReadPixels, like: Tensor) -> Tensor:
    """The pooled output (B, C, h, w) of a stage, as a whole, with the batch, dtype and device of `like`."""
    # Before the first tile: what lives longer lies below.
    channels = level_inputs(decoder.config, stage.stop)
    pooled = empty_map(like, channels, [side >> stage.stop for side in size])
    for rows, columns in product(*(encoder_tiles(decoder.config, stage, side) for side in size)):
        crop = read(rows.read, columns.read)  # alive until its tile is done, in any version of Python
        part = decoder.encode(crop, stage.levels)
        pooled[..., rows.keep, columns.keep] = part[..., rows.local, columns.local]
        del crop, part
    return pooled


def _decode_stage(
    decoder: LocalDecoder, stage: Stage, size: tuple[int, int], read: ReadPixels, below: Tensor, write: WriteOutput
) -> Tensor:
    """Down and up a stage. below: the deeper stage's output or, for the deepest, the features.

    Returns the stage's output (B, C, h, w) as a whole; nothing after level 0, whose output goes to `write`.
    """
    grid = list(product(*(decoder_tiles(decoder.config, stage, side) for side in size)))
    output = below.new_empty(0)
    if stage.first and len(grid) > 1:
        channels = level_outputs(decoder.config, stage.first)
        output = empty_map(below, channels, [side >> stage.first for side in size])
    for tile in grid:
        rows, columns = tile
        part = _decode_tile(decoder, stage, size, read(rows.read, columns.read), below, tile)
        part = part[..., rows.local, columns.local]
        if stage.first == 0:
            write(rows.keep, columns.keep, part)
        elif len(grid) == 1:
            output = part  # the only tile is the map
        else:
            output[..., rows.keep, columns.keep] = part
        del part  # before the next tile needs the room
    return output


def _decode_tile(
    decoder: LocalDecoder,
    stage: Stage,
    size: tuple[int, int],
    crop: Tensor,
    below: Tensor,
    tile: tuple[Tile, ...],
) -> Tensor:
    """A stage on one crop -> its output on the whole crop, halo included."""
    joins: list[Tensor] = []
    pooled = decoder.encode(crop, stage.levels, joins)
    del crop
    lower = [_from_below(decoder, stage, size, pooled, below, tile)]
    del pooled, below
    x = decoder.decode(lower.pop(), stage.levels, joins)
    return decoder.out_conv(x) if stage.first == 0 else x


def _from_below(
    decoder: LocalDecoder, stage: Stage, size: tuple[int, int], pooled: Tensor, below: Tensor, tile: tuple[Tile, ...]
) -> Tensor:
    rows, columns = (axis.inner for axis in tile)
    if stage.stop < len(decoder.config.levels):
        return below[..., rows, columns]
    cells = (size[0] >> stage.stop, size[1] >> stage.stop)
    return decoder.merge(pooled, nearest_resize(below, cells, rows, columns))
