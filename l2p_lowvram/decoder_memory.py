"""What the local decoder takes by a plan, and the choice of a plan by it; plain integers, no tensor.

`_Walk` takes and gives memory as `tiled_decoder` and `LocalDecoder` do, line by line, so that the bytes are not
those of the tensors alone but those of the segment they lie in, with the holes that their order leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product

from tiling.conv import Tile

from .config import IMAGE_CHANNELS, DecoderConfig
from .decoder import level_inputs, level_outputs
from .decoder_plan import DecoderJob, DecoderPlan, Stage, decoder_tiles, encoder_tiles, macs
from .segment import Piece, Segment, reserved_bytes

# Tile sides in pixels that plans are made of: few, so that most budgets share a plan and hence every bit.
TILE_SIDES = (256, 512, 1024, 2048)
MOST_STAGES = 3
# Tiles of one axis: `encoder_tiles` or `decoder_tiles`.
_Cut = Callable[[DecoderConfig, Stage, int], Sequence[Tile]]


@dataclass(frozen=True)
class DecoderMemory:
    """Peak bytes of one call beyond what the caller holds (features, picture, result, weights), without a
    kernel's scratch. segment: of the memory that the tensors lie in. tensors: of the tensors alone."""

    segment: int
    tensors: int


@lru_cache(maxsize=4096)
def decoder_memory(job: DecoderJob, plan: DecoderPlan, itemsize: int, room: int = 0) -> DecoderMemory:
    """In a dtype of `itemsize` bytes. Counted: the whole maps between stages, and all that a tile makes.

    room: the least that the segment has, which then is one that torch's allocator would make; 0: just what it
    takes. Where tensors lie depends on where it ends.
    """
    plan.check(job.config)
    nbytes = reserved_bytes(room) if room else 0
    while True:
        walk = _Walk(job, itemsize, Segment(nbytes))
        walk.run(plan)
        if walk.segment.nbytes == nbytes:
            return DecoderMemory(nbytes, walk.segment.live_peak_bytes)
        nbytes = reserved_bytes(walk.segment.nbytes) if room else walk.segment.nbytes


class _Walk:
    """One call of the decoder. Pieces are named after the tensors that lie there."""

    def __init__(self, job: DecoderJob, itemsize: int, segment: Segment) -> None:
        self.segment = segment
        self._job = job
        self._levels = job.config.levels
        self._itemsize = itemsize

    def run(self, plan: DecoderPlan) -> None:
        maps: list[Piece] = []
        for stage in plan.stages[:-1]:
            maps.append(self._encode_stage(stage))
        below: Piece | None = None
        for stage in reversed(plan.stages):
            output = self._decode_stage(stage)
            for done in (maps.pop() if maps else None, below):
                self._give(done)
            below = output

    def _encode_stage(self, stage: Stage) -> Piece:
        pooled = self._map(level_inputs(self._job.config, stage.stop), self._positions(stage.stop))
        areas = self._areas(stage, encoder_tiles)
        for area in self._changing(areas):
            crop = self._crop(stage, area)
            part = self._encode(stage, area, is_view=stage.first > 0 and len(areas) > 1)
            self._give(crop, part)
        return pooled

    def _decode_stage(self, stage: Stage) -> Piece | None:
        """Its output; None after level 0."""
        areas, output = self._areas(stage, decoder_tiles), None
        if stage.first and len(areas) > 1:
            output = self._map(level_outputs(self._job.config, stage.first), self._positions(stage.first))
        for area in self._changing(areas):
            part = self._decode_tile(stage, area, is_view=len(areas) > 1)
            if stage.first == 0:
                # Strided, so that it passes through a contiguous copy on its way to the host.
                self._give(part, self._map(IMAGE_CHANNELS, area))
            elif len(areas) == 1:
                output = part
            else:
                self._give(part)
        return output

    def _decode_tile(self, stage: Stage, area: int, *, is_view: bool) -> Piece:
        joins: list[Piece] = []
        crop = self._crop(stage, area)
        pooled = self._encode(stage, area, joins, is_view=stage.first > 0 and is_view)
        self._give(crop)
        area >>= 2 * len(stage.levels)
        x: Piece | None
        if stage.stop == len(self._levels):
            x = self._merge(pooled, area)
            is_view = False
        else:
            self._give(pooled)
            x = None
        return self._decode(stage, area, x, joins, is_view=is_view)

    def _encode(self, stage: Stage, area: int, joins: list[Piece] | None = None, *, is_view: bool) -> Piece:
        """is_view: of a larger map, so that the first convolution copies it."""
        x: Piece | None = None
        for index in stage.levels:
            level = self._levels[index]
            joined = None if joins is None else self._map(level.up + level.encoder, area)
            copied = self._map(level_inputs(self._job.config, index), area) if is_view else None
            is_view, skip = False, self._map(level.encoder, area)
            self._give(copied)
            if joins is not None and joined is not None:
                joins.append(joined)
                self._give(skip)
            self._give(x)
            area //= 4
            x = self._map(level.encoder, area)
            self._give(None if joins is not None else skip)
        assert x is not None
        return x

    def _merge(self, pooled: Piece, area: int) -> Piece:
        job = self._job
        gathered = self._map(job.feature_dim, area) if job.grid != job.cells else None
        joined = self._map(level_inputs(job.config, len(self._levels)) + job.feature_dim, area)
        bottleneck = self._map(job.config.bottleneck, area)
        self._give(joined, gathered, pooled)
        return bottleneck

    def _decode(self, stage: Stage, area: int, x: Piece | None, joins: list[Piece], *, is_view: bool) -> Piece:
        """x: None for a crop of the map from below, is_view whether it is less than all of it."""
        for index in reversed(stage.levels):
            level, inputs = self._levels[index], level_outputs(self._job.config, index + 1)
            copied = self._map(inputs, area) if is_view else None
            is_view, area = False, area * 4
            upsampled = self._map(inputs, area)
            self._give(copied)
            up = self._map(level.up, area)
            self._give(upsampled, up)
            out = self._map(level.out, area)
            self._give(x, joins.pop())
            x = out
        assert x is not None
        if stage.first:
            return x
        pixels = self._map(IMAGE_CHANNELS, area)
        self._give(x)
        return pixels

    def _map(self, channels: int, area: int) -> Piece:
        return self.segment.take(channels * area * self._itemsize)

    def _crop(self, stage: Stage, area: int) -> Piece | None:
        """Of the picture; deeper stages read views of a whole map."""
        return None if stage.first else self._map(IMAGE_CHANNELS, area)

    def _give(self, *pieces: Piece | None) -> None:
        for piece in pieces:
            if piece is not None:
                self.segment.give(piece)

    def _positions(self, level: int) -> int:
        return (self._job.height >> level) * (self._job.width >> level)

    def _areas(self, stage: Stage, cut: _Cut) -> list[int]:
        """Positions that each tile reads, in the order they run."""
        rows, columns = (cut(self._job.config, stage, side) for side in (self._job.height, self._job.width))
        lengths = [_length(column) for column in columns]
        return [height * width for height in map(_length, rows) for width in lengths]

    def _changing(self, areas: Sequence[int]) -> Iterator[int]:
        """Without tiles that repeat an earlier one from an equal state."""
        seen: dict[object, set[int]] = {}
        done = seen.setdefault(self.segment.state(), set())
        for area in areas:
            if area not in done:
                done.add(area)
                yield area
                done = seen.setdefault(self.segment.state(), set())


def _length(tile: Tile) -> int:
    return tile.read.stop - tile.read.start


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
    """The plan with the least arithmetic whose segment stays within the limit.

    Raises ValueError, naming what no plan can do without, where none does.
    """
    ranked = sorted(plans(job), key=lambda plan: (macs(job, plan), len(plan.stages)))
    bounds = [_least_bytes(job, plan, itemsize) for plan in ranked]
    for plan, bound in zip(ranked, bounds, strict=True):
        if bound <= limit_bytes and decoder_memory(job, plan, itemsize).segment <= limit_bytes:
            return plan
    raise ValueError(
        f"the local decoder needs at least {min(bounds)} bytes for {job.width}x{job.height}, got {limit_bytes}; "
        "allow more memory or make a smaller picture"
    )


def _least_bytes(job: DecoderJob, plan: DecoderPlan, itemsize: int) -> int:
    """Less than a call takes, and quickly told: the first level's join in its largest tile, and what is joined."""
    stage, level = plan.stages[0], job.config.levels[0]
    sides = (decoder_tiles(job.config, stage, side) for side in (job.height, job.width))
    area = math.prod(max(_length(tile) for tile in side) for side in sides)
    return (2 * level.up + level.encoder + level_outputs(job.config, 1)) * area * itemsize
