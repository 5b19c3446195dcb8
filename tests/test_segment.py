"""The placement that plans count with is that of the allocator's model, request by request."""

from __future__ import annotations

import random

import pytest
from allocator_model import CachingAllocator, Chunk

from l2p_lowvram.segment import Piece, Segment, reserved_bytes

MIB = 1 << 20


@pytest.mark.parametrize("seed", range(8))
def test_pieces_lie_where_the_allocator_puts_them_in_one_large_segment(seed: int) -> None:
    draw, segment, allocator = random.Random(seed), Segment(1 << 40), CachingAllocator()
    allocator.free(allocator.allocate(1 << 40))
    alive: list[tuple[Piece, Chunk]] = []

    for _ in range(400):
        if alive and draw.random() < 0.5:
            piece, chunk = alive.pop(draw.randrange(len(alive)))
            segment.give(piece)
            allocator.free(chunk)
        else:
            # Of few sizes, so that holes are met exactly, nearly and not at all.
            nbytes = draw.choice((2, 3, 4, 8, 13)) * MIB + draw.choice((0, 100, 600_000))
            alive.append((segment.take(nbytes), allocator.allocate(nbytes)))
        assert [(p.start, p.nbytes) for p, _ in alive] == [(c.address, c.nbytes) for _, c in alive]

    assert allocator.reserved == 1 << 40
    assert segment.live_bytes == allocator.allocated
    assert segment.live_peak_bytes <= segment.peak_bytes


def test_a_hole_too_small_for_the_next_request_costs_its_size() -> None:
    segment = Segment()
    first, second = segment.take(10 * MIB), segment.take(10 * MIB)
    segment.give(first)

    segment.take(11 * MIB)

    assert segment.peak_bytes == 31 * MIB
    assert segment.live_peak_bytes == 21 * MIB
    segment.give(second)
    assert segment.live_bytes == 11 * MIB


@pytest.mark.parametrize("nbytes", [1, 512, MIB, MIB + 1, 10 * MIB - 1, 10 * MIB, 31 * MIB + 5])
def test_a_segment_is_as_large_as_the_allocator_makes_it(nbytes: int) -> None:
    allocator = CachingAllocator()

    allocator.allocate(nbytes)

    assert reserved_bytes(nbytes) == allocator.reserved
