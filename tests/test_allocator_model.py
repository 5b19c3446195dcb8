"""The model of torch's caching allocator, on figures that were published or are worked out here."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from allocator_model import MIB, CachingAllocator, rounded, segment_bytes


def test_requests_take_whole_units_of_512_bytes() -> None:
    assert [rounded(nbytes) for nbytes in (1, 512, 513, 1_000_000)] == [512, 512, 1024, 1_000_448]


def test_segments_have_the_published_sizes() -> None:
    requests = (512, MIB, MIB + 512, 10 * MIB - 512, 10 * MIB, 10 * MIB + 512)

    assert [segment_bytes(n) // MIB for n in requests] == [2, 2, 20, 20, 10, 12]


def test_cublas_workspace_leaves_the_remainder_of_a_published_snapshot() -> None:
    allocator = CachingAllocator()

    workspace = allocator.allocate(8_519_680)

    assert allocator.reserved == 20 * MIB
    assert workspace.behind is not None
    assert workspace.behind.nbytes == 12_451_840
    assert allocator.allocate(12_451_840).address == workspace.nbytes
    assert allocator.reserved == 20 * MIB


def test_the_rest_of_a_large_chunk_stays_with_it_up_to_one_mebibyte() -> None:
    allocator = CachingAllocator()

    kept, split = allocator.allocate(21 * MIB), allocator.allocate(21 * MIB - 512)

    assert (kept.nbytes, kept.behind) == (22 * MIB, None)
    assert split.nbytes == 21 * MIB - 512
    assert split.behind is not None
    assert split.behind.nbytes == MIB + 512


def test_small_requests_share_a_segment_and_large_ones_never_use_it() -> None:
    allocator = CachingAllocator()

    small = [allocator.allocate(1024) for _ in range(4)]
    large = allocator.allocate(MIB + 1)

    assert [chunk.address for chunk in small] == [0, 1024, 2048, 3072]
    assert large.address >= 2 * MIB
    assert allocator.reserved == 22 * MIB


def test_freed_neighbours_become_one_chunk() -> None:
    allocator = CachingAllocator()
    chunks = [allocator.allocate(4 * MIB) for _ in range(5)]

    for index in (1, 3, 2):
        allocator.free(chunks[index])

    assert allocator.allocate(12 * MIB).address == 4 * MIB
    assert allocator.reserved == 20 * MIB


def test_the_smallest_free_chunk_that_fits_is_taken() -> None:
    allocator = CachingAllocator()
    big, _, little = (allocator.allocate(size * MIB) for size in (40, 12, 24))

    allocator.free(big)
    allocator.free(little)

    assert allocator.allocate(20 * MIB).address == 52 * MIB


def test_free_segments_are_given_back_before_a_request_fails() -> None:
    allocator = CachingAllocator(64 * MIB)
    allocator.free(allocator.allocate(40 * MIB))

    kept = allocator.allocate(60 * MIB)

    assert allocator.flushes == 1
    assert allocator.reserved == 60 * MIB
    with pytest.raises(torch.OutOfMemoryError, match="6291456 bytes asked for"):
        allocator.allocate(6 * MIB)
    allocator.free(kept)
    allocator.empty_cache()
    assert allocator.reserved == 0


@pytest.mark.parametrize(("expandable", "reserved"), [(False, 40 + 60), (True, 60)])
def test_growing_sizes_cost_a_segment_each_unless_segments_grow(expandable: bool, reserved: int) -> None:
    allocator = CachingAllocator(expandable=expandable)

    allocator.free(allocator.allocate(40 * MIB))
    allocator.free(allocator.allocate(60 * MIB))

    assert allocator.reserved == reserved * MIB


@pytest.mark.parametrize("expandable", [False, True])
def test_chunks_never_overlap_and_everything_comes_back(expandable: bool) -> None:
    allocator, chance = CachingAllocator(expandable=expandable), random.Random(3)
    held = []

    for _ in range(3000):
        if held and chance.random() < 0.5:
            allocator.free(held.pop(chance.randrange(len(held))))
        else:
            held.append(allocator.allocate(int(10 ** chance.uniform(1, 8))))
        if len(held) > 1:
            ordered = sorted(held, key=lambda chunk: chunk.address)
            assert all(a.address + a.nbytes <= b.address for a, b in pairwise(ordered))
        assert allocator.allocated == sum(chunk.nbytes for chunk in held) <= allocator.reserved
    for chunk in held:
        allocator.free(chunk)

    assert allocator.allocated == 0
    if not expandable:
        allocator.empty_cache()
        assert allocator.reserved == 0
