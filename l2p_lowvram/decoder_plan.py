"""How the local decoder is cut into stages and tiles, and the arithmetic of that; plain integers, no tensor.

The levels are grouped into stages. Going down, every stage but the deepest is
run a tile at a time for its pooled output alone. The deepest stage runs whole
or in tiles, down and up again. Going back up, every tile computes its stage's
encoder once more for the skips, and takes what lies below from the map that
the deeper stage left. So the maps that exist as a whole are those between two
stages, and halos are those of a stage: a few pixels for the shallow levels,
where the pixels are. `tiled_decoder` runs a plan, `decoder_memory` tells its bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from tiling import layers_from, reach, tiles
from tiling.conv import Reach, Tile

from .config import DecoderConfig, ModelConfig
from .decoder import DecoderLayer, decoder_layers, encoder_layers, merge_layers


@dataclass(frozen=True)
class Stage:
    """Levels `first` to `stop - 1`, in tiles that own `tile` x `tile` pixels of the picture (0: one tile)."""

    first: int
    stop: int
    tile: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.stop:
            raise ValueError(f"a stage needs at least one level, got {self.first} to {self.stop}")
        if self.tile < 0 or self.tile % (1 << self.stop):
            raise ValueError(
                f"the tile of levels {self.first} to {self.stop - 1} must be 0 or a multiple of "
                f"{1 << self.stop} pixels, got {self.tile}"
            )

    @property
    def levels(self) -> range:
        return range(self.first, self.stop)


@dataclass(frozen=True)
class DecoderPlan:
    """Stages from full resolution downwards that take every level once."""

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a decoder plan needs at least one stage")
        for stage, first in zip(self.stages, [0, *(stage.stop for stage in self.stages)], strict=False):
            if stage.first != first:
                raise ValueError(f"{stage} should start at level {first}")

    def check(self, config: DecoderConfig) -> None:
        """Raise ValueError unless the stages are the levels of `config`."""
        if self.stages[-1].stop != len(config.levels):
            raise ValueError(
                f"the plan covers {self.stages[-1].stop} levels, the decoder has {len(config.levels)}; "
                "make the plan for this decoder"
            )


@dataclass(frozen=True)
class DecoderJob:
    """One call of the decoder: a picture of `height` x `width` pixels, features on a grid of `grid` cells."""

    config: DecoderConfig
    feature_dim: int
    height: int
    width: int
    grid: tuple[int, int]

    @classmethod
    def of(cls, config: ModelConfig, width: int, height: int) -> DecoderJob:
        config.check_size(width, height)
        grid = (height // config.patch_size, width // config.patch_size)
        return cls(config.decoder, config.dim, height, width, grid)

    @property
    def cells(self) -> tuple[int, int]:
        """The bottleneck's grid."""
        return self.height // self.config.pooling, self.width // self.config.pooling


def whole_plan(config: DecoderConfig) -> DecoderPlan:
    """Everything at once: the same operations as `LocalDecoder.forward`."""
    return DecoderPlan((Stage(0, len(config.levels)),))


def encoder_tiles(config: DecoderConfig, stage: Stage, side: int) -> tuple[Tile, ...]:
    """One axis of the pass that makes the pooled output of a stage, in positions of the stage's resolution."""
    return _axis(_encode_reach(config, stage.levels), stage, side)


def decoder_tiles(config: DecoderConfig, stage: Stage, side: int) -> tuple[Tile, ...]:
    """One axis of the pass down and up a stage; `inner` counts on the map that comes from below."""
    deepest = stage.stop == len(config.levels)
    return _axis((_deepest_reach if deepest else _decode_reach)(config, stage.levels), stage, side)


@lru_cache(maxsize=4096)
def _axis(reached: Reach, stage: Stage, side: int) -> tuple[Tile, ...]:
    if side < 1 or side % (1 << stage.stop):
        raise ValueError(f"height and width must be multiples of {1 << stage.stop} pixels, got {side}")
    length = side >> stage.first
    return tuple(tiles(reached, length, (stage.tile >> stage.first) or length))


@lru_cache
def _encode_reach(config: DecoderConfig, levels: range) -> Reach:
    return reach(layers_from(_kinds(_without_skips(encoder_layers(config, levels)))))


@lru_cache
def _decode_reach(config: DecoderConfig, levels: range) -> Reach:
    """One crop serves the levels' input and the map from below, so the halo covers what either needs."""
    down, up = encoder_layers(config, levels), decoder_layers(config, levels)
    return reach(layers_from([*_kinds(down), "inner", *_kinds(up)]))


@lru_cache
def _deepest_reach(config: DecoderConfig, levels: range) -> Reach:
    """The features join at the bottleneck, where the input arrives too: a cell needs no more than it."""
    layers = [*encoder_layers(config, levels), *merge_layers(config, 0), *decoder_layers(config, levels)]
    return replace(reach(layers_from(_kinds(layers))), inner=1)


def _kinds(layers: Iterable[DecoderLayer]) -> Iterator[str]:
    return (layer.kind for layer in layers if layer.kind != "merge")


def _without_skips(layers: Iterable[DecoderLayer]) -> list[DecoderLayer]:
    return [layer for layer in layers if layer.kind != "skip"]


# Layers of one run over a stage, tiles of the rows, tiles of the columns.
Pass = tuple[list[DecoderLayer], tuple[Tile, ...], tuple[Tile, ...]]


@lru_cache(maxsize=4096)
def _passes(job: DecoderJob, stage: Stage) -> tuple[Pass, ...]:
    """The runs over a stage: for its pooled output (not the deepest), then down and up."""
    config = job.config
    down, up = encoder_layers(config, stage.levels), decoder_layers(config, stage.levels)
    deepest = stage.stop == len(config.levels)
    middle = merge_layers(config, job.feature_dim) if deepest else [DecoderLayer("inner", 0, 0)]
    sides = (job.height, job.width)
    rows, columns = (decoder_tiles(config, stage, side) for side in sides)
    last = ([*down, *middle, *up], rows, columns)
    if deepest:
        return (last,)
    rows, columns = (encoder_tiles(config, stage, side) for side in sides)
    return (_without_skips(down), rows, columns), last


def macs(job: DecoderJob, plan: DecoderPlan) -> int:
    """Multiply-accumulate operations of one call."""
    plan.check(job.config)
    return sum(_stage_macs(job, stage) for stage in plan.stages)


@lru_cache(maxsize=4096)
def _stage_macs(job: DecoderJob, stage: Stage) -> int:
    pooling = 1 << (stage.stop - stage.first)
    return sum(
        _macs_per_cell(layers, pooling) * (_read(rows) // pooling) * (_read(columns) // pooling)
        for layers, rows, columns in _passes(job, stage)
    )


def _read(axis: Sequence[Tile]) -> int:
    """Positions that the tiles of one axis read together."""
    return sum(tile.read.stop - tile.read.start for tile in axis)


def _macs_per_cell(layers: Iterable[DecoderLayer], pooling: int) -> int:
    """Per pooling x pooling positions of the first layer's input."""
    total, area = 0, pooling**2
    for layer in layers:
        if layer.kind.startswith("conv"):
            total += area * int(layer.kind[4:]) ** 2 * layer.inputs * layer.outputs
        area = area // 4 if layer.kind == "pool2" else area * 4 if layer.kind == "up2" else area
    return total


def overhead(job: DecoderJob, plan: DecoderPlan) -> float:
    """Arithmetic of the plan relative to the untiled decoder: 1.0 or more."""
    return macs(job, plan) / macs(job, whole_plan(job.config))
