"""How the local decoder is cut into stages and tiles, and what that costs; plain integers, no tensor.

The levels are grouped into stages. Going down, every stage but the deepest is
run a tile at a time for its pooled output alone. The deepest stage runs whole
or in tiles, down and up again. Going back up, every tile computes its stage's
encoder once more for the skips, and takes what lies below from the map that
the deeper stage left. So the maps that exist as a whole are those between two
stages, and halos are those of a stage: a few pixels for the shallow levels,
where the pixels are. `tiled_decoder` runs a plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations, product

from tiling import layers_from, reach, tiles
from tiling.conv import Reach, Tile

from .config import IMAGE_CHANNELS, DecoderConfig, ModelConfig
from .decoder import DecoderLayer, decoder_layers, encoder_layers, level_inputs, level_outputs, merge_layers

# Tile sides in pixels that plans are made of: few, so that most budgets share a plan and hence every bit.
TILE_SIDES = (256, 512, 1024, 2048)
MOST_STAGES = 3


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


def peak_bytes(job: DecoderJob, plan: DecoderPlan, itemsize: int) -> int:
    """Most activation bytes alive at once in one call, in a dtype of `itemsize` bytes.

    The whole maps between stages, and one tile's worth of layers: every layer's input and output, the skips,
    both parts of a concatenation and its result. Not counted: features, picture, result and weights, which
    are the caller's, and what a convolution kernel uses inside.
    """
    plan.check(job.config)
    between, peak = 0, 0
    for stage in plan.stages[:-1]:
        made = _map_elements(job, stage.stop, level_inputs(job.config, stage.stop))
        peak = max(peak, between + made + _tile_elements(job, stage, 0))
        between += made
    below = 0
    for stage in reversed(plan.stages):
        made = _map_elements(job, stage.first, level_outputs(job.config, stage.first)) if stage.first else 0
        # The output of a stage that is one tile is its map; other tiles are copied into it.
        _, rows, columns = _passes(job, stage)[-1]
        target = made if len(rows) * len(columns) > 1 else 0
        peak = max(peak, between + below + target + _tile_elements(job, stage, -1))
        between -= _map_elements(job, stage.first, level_inputs(job.config, stage.first)) if stage.first else 0
        below = made
    return peak * itemsize


def _map_elements(job: DecoderJob, level: int, channels: int) -> int:
    return (job.height >> level) * (job.width >> level) * channels


@lru_cache(maxsize=4096)
def _tile_elements(job: DecoderJob, stage: Stage, which: int) -> int:
    """Elements alive in the largest tile of a pass, at its worst layer."""
    layers, rows, columns = _passes(job, stage)[which]
    area = math.prod(max(tile.read.stop - tile.read.start for tile in axis) for axis in (rows, columns))
    crop = area * IMAGE_CHANNELS if stage.first == 0 else 0  # deeper stages read views of a whole map
    gathered = job.feature_dim if job.grid != job.cells else 0
    return _walk(layers, area, crop, gathered)


def _walk(layers: Iterable[DecoderLayer], area: int, crop: int, gathered: int) -> int:
    """Elements alive at the worst moment of `LocalDecoder`'s methods, on a crop of `area` positions.

    crop: elements of the input, kept on the way down. current: what the next layer reads. held: what a caller
    still refers to meanwhile. skips: what is set aside. gathered: channels of features copied to the grid.
    """
    current, held, peak = 0, 0, 0
    skips: list[int] = []
    for layer in layers:
        crop = 0 if layer.kind in ("inner", "merge") else crop
        if layer.kind in ("skip", "inner"):
            skips += [current] if layer.kind == "skip" else []
            current = 0  # the same tensor, or given up for a view of the map from below
            continue
        if layer.kind in ("merge", "up2"):
            held, current = current + (gathered * area if layer.kind == "merge" else 0), 0
        area = area // 4 if layer.kind == "pool2" else area * 4 if layer.kind == "up2" else area
        made = layer.outputs * area
        peak = max(peak, crop + sum(skips) + held + current + made)
        if layer.kind == "join":
            skips.pop()
        held = 0 if layer.kind in ("join", "conv1") else held
        current = made
    return peak


def plans(job: DecoderJob) -> Iterator[DecoderPlan]:
    """All plans of up to `MOST_STAGES` stages and tiles of the canonical sides."""
    depth = len(job.config.levels)
    for cuts in (c for count in range(MOST_STAGES) for c in combinations(range(1, depth), count)):
        bounds = list(zip((0, *cuts), (*cuts, depth), strict=True))
        sides = [[side for side in TILE_SIDES if not side % (1 << stop)] for _, stop in bounds]
        # A shallow stage as one tile would compute its encoder twice for nothing.
        for tile_sides in product(*sides[:-1], [0, *sides[-1]]):
            yield DecoderPlan(tuple(Stage(*bound, side) for bound, side in zip(bounds, tile_sides, strict=True)))


def choose_plan(job: DecoderJob, limit_bytes: int, itemsize: int) -> DecoderPlan:
    """The plan with the least arithmetic whose `peak_bytes` stay within the limit.

    Raises ValueError, naming the smallest that would do, where none does.
    """
    ranked = [(macs(job, plan), len(plan.stages), peak_bytes(job, plan, itemsize), plan) for plan in plans(job)]
    fitting = [entry for entry in ranked if entry[2] <= limit_bytes]
    if not fitting:
        least = min(entry[2] for entry in ranked)
        raise ValueError(
            f"the local decoder needs at least {least} bytes for {job.width}x{job.height}, got {limit_bytes}; "
            "allow more memory or make a smaller picture"
        )
    return min(fitting, key=lambda entry: entry[:3])[3]
