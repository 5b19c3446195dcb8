"""How torch's CUDA caching allocator cuts up device memory, as plain integers.

Modelled: requests rounded up to 512 bytes; segments of 2 MiB for requests up to 1 MiB, of 20 MiB below 10 MiB, of
whole 2 MiB from there on; best fit, lowest address first; the rest of a chunk split off from 512 bytes (small pool)
or more than 1 MiB (large pool); neighbours merged when freed; free segments given back, and the request tried
once more, before it fails. With `expandable_segments` there is one segment per pool, which grows at its end by whole
pages of 2 or 20 MiB. Not modelled: several streams, other settings, what the driver rounds up, and pages in the
middle of an expandable segment, which torch gives back when memory is short.
Source: c10/cuda/CUDACachingAllocator.cpp.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import torch

KIB, MIB = 1 << 10, 1 << 20
ROUNDING = 512
_SMALL_REQUEST, _SMALL_SEGMENT = MIB, 2 * MIB
_LARGE_REQUEST, _LARGE_SEGMENT = 10 * MIB, 20 * MIB


def rounded(nbytes: int) -> int:
    """What a request of `nbytes` takes."""
    return max(-(-nbytes // ROUNDING), 1) * ROUNDING


def segment_bytes(nbytes: int) -> int:
    """What is asked of the driver for a rounded request that nothing free can hold."""
    if nbytes <= _SMALL_REQUEST:
        return _SMALL_SEGMENT
    if nbytes < _LARGE_REQUEST:
        return _LARGE_SEGMENT
    return -(-nbytes // _SMALL_SEGMENT) * _SMALL_SEGMENT


@dataclass(eq=False)
class Chunk:
    """A part of a segment, allocated or free, and its neighbours in it."""

    address: int
    nbytes: int
    is_small: bool
    is_free: bool = False
    before: Chunk | None = None
    behind: Chunk | None = None

    @property
    def is_segment(self) -> bool:
        return self.before is None and self.behind is None


_Entry = tuple[int, int, Chunk]  # bytes, address: the order in which chunks are tried


class CachingAllocator:
    """One device's memory on one stream. limit_bytes: what may be reserved in all; None: no limit.

    expandable: as by PYTORCH_ALLOC_CONF=expandable_segments:True.
    allocated, reserved: bytes now; peak_reserved: the most so far. flushes: how often all free segments had to be
    given back.
    """

    def __init__(self, limit_bytes: int | None = None, *, expandable: bool = False) -> None:
        self.limit_bytes = limit_bytes
        self.expandable = expandable
        self.allocated = self.reserved = self.peak_reserved = self.flushes = 0
        self._free: dict[bool, list[_Entry]] = {True: [], False: []}
        self._next_address = 0
        self._last: dict[bool, Chunk | None] = {True: None, False: None}  # of expandable segments

    def allocate(self, nbytes: int) -> Chunk:
        """Raises torch.OutOfMemoryError beyond the limit."""
        size = rounded(nbytes)
        is_small = size <= _SMALL_REQUEST
        chunk = self._best_fit(size, is_small)
        if chunk is None:
            chunk = self._grown(size, is_small) if self.expandable else self._new_segment(size, is_small)
        rest = chunk.nbytes - size
        if rest >= ROUNDING if is_small else rest > _SMALL_REQUEST:
            self._split(chunk, size)
        chunk.is_free = False
        self.allocated += chunk.nbytes
        return chunk

    def free(self, chunk: Chunk) -> None:
        self.allocated -= chunk.nbytes
        chunk.is_free = True
        before, behind = chunk.before, chunk.behind
        if behind is not None and behind.is_free:
            self._forget(behind)
            self._merge(chunk, behind)
        if before is not None and before.is_free:
            self._forget(before)
            self._merge(before, chunk)
            chunk = before
        self._remember(chunk)

    def empty_cache(self) -> None:
        """Give every segment back in which nothing is allocated."""
        if self.expandable:
            return
        for pool in self._free.values():
            for entry in [entry for entry in pool if entry[2].is_segment]:
                pool.remove(entry)
                self.reserved -= entry[2].nbytes

    def state(self) -> tuple[object, ...]:
        """Equal states answer the same requests alike."""
        free = tuple((nbytes, address) for pool in self._free.values() for nbytes, address, _ in pool)
        return self.allocated, self.reserved, free

    def _best_fit(self, size: int, is_small: bool) -> Chunk | None:
        pool = self._free[is_small]
        index = bisect_left(pool, (size, 0), key=_order)
        return pool.pop(index)[2] if index < len(pool) else None

    def _new_segment(self, size: int, is_small: bool) -> Chunk:
        nbytes = segment_bytes(size)
        self._reserve(nbytes, size)
        address, self._next_address = self._next_address, self._next_address + nbytes
        return Chunk(address, nbytes, is_small)

    def _grown(self, size: int, is_small: bool) -> Chunk:
        """The free end of the pool's one segment, made large enough."""
        last, page = self._last[is_small], _SMALL_SEGMENT if is_small else _LARGE_SEGMENT
        end = last if last is not None and last.is_free else None
        nbytes = -(-(size - (0 if end is None else end.nbytes)) // page) * page
        self._reserve(nbytes, size)
        if end is not None:
            self._forget(end)
            end.nbytes += nbytes
            return end
        # Pools lie far apart, so that neither grows into the other.
        start = last.address + last.nbytes if last is not None else (0 if is_small else 1 << 60)
        grown = Chunk(start, nbytes, is_small, False, last)
        if last is not None:
            last.behind = grown
        self._last[is_small] = grown
        return grown

    def _reserve(self, nbytes: int, size: int) -> None:
        if self._exceeds(nbytes):
            self.flushes += 1
            self.empty_cache()
        if self._exceeds(nbytes):
            raise torch.OutOfMemoryError(
                f"modelled device out of memory: {size} bytes asked for, {self.allocated} allocated, "
                f"{self.reserved} reserved of {self.limit_bytes}"
            )
        self.reserved += nbytes
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _exceeds(self, nbytes: int) -> bool:
        return self.limit_bytes is not None and self.reserved + nbytes > self.limit_bytes

    def _split(self, chunk: Chunk, size: int) -> None:
        rest = Chunk(chunk.address + size, chunk.nbytes - size, chunk.is_small, True, chunk, chunk.behind)
        if chunk.behind is not None:
            chunk.behind.before = rest
        chunk.behind, chunk.nbytes = rest, size
        if self._last[chunk.is_small] is chunk:
            self._last[chunk.is_small] = rest
        self._remember(rest)

    def _merge(self, chunk: Chunk, behind: Chunk) -> None:
        """chunk := both; `behind` is no more."""
        chunk.nbytes += behind.nbytes
        chunk.behind = behind.behind
        if behind.behind is not None:
            behind.behind.before = chunk
        if self._last[chunk.is_small] is behind:
            self._last[chunk.is_small] = chunk

    def _remember(self, chunk: Chunk) -> None:
        insort(self._free[chunk.is_small], (chunk.nbytes, chunk.address, chunk), key=_order)

    def _forget(self, chunk: Chunk) -> None:
        pool = self._free[chunk.is_small]
        del pool[bisect_left(pool, (chunk.nbytes, chunk.address), key=_order)]


def _order(entry: tuple[int, int, Chunk] | tuple[int, int]) -> tuple[int, int]:
    return entry[0], entry[1]
