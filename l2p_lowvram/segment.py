"""Where a best-fit allocator puts tensors in one stretch of memory; plain integers, no tensor.

A large segment of torch's CUDA allocator is cut up like this: of the free pieces that hold a request the
smallest, the lowest of equals; what it leaves is split off unless that is little; neighbours merge when freed.
`benchmarks/allocator_model.py` models the rest of it (several segments, pools, limits).
"""

from __future__ import annotations

from dataclasses import dataclass

ROUNDING = 512
# Requests above this leave no rest of up to this: torch's large and small requests.
_LEAST_REST = 1 << 20


@dataclass(frozen=True, order=True)
class Piece:
    """Bytes `start` to `stop` of the segment."""

    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class Segment:
    """A segment without an end. peak_bytes: the end of the highest piece ever taken. live_bytes, live_peak_bytes:
    what the pieces take by themselves, now and at most: less, by what lies free between them."""

    def __init__(self) -> None:
        self.peak_bytes = self.live_bytes = self.live_peak_bytes = 0
        self._free: list[Piece] = []  # by address; what lies behind `_end` is free too
        self._end = 0

    def take(self, nbytes: int) -> Piece:
        size = -(-nbytes // ROUNDING) * ROUNDING
        found = min((piece for piece in self._free if piece.nbytes >= size), key=_best, default=None)
        if found is None:
            found = self._at_the_end(size)
        else:
            self._free.remove(found)
        rest = found.nbytes - size
        if rest > (_LEAST_REST if size > _LEAST_REST else 0):
            self._free = sorted([*self._free, Piece(found.start + size, found.stop)])
            found = Piece(found.start, found.start + size)
        self.live_bytes += found.nbytes
        self.live_peak_bytes = max(self.live_peak_bytes, self.live_bytes)
        return found

    def give(self, piece: Piece) -> None:
        """Free what `take` gave."""
        self.live_bytes -= piece.nbytes
        merged: list[Piece] = []
        for free in sorted([*self._free, piece]):
            if merged and merged[-1].stop == free.start:
                free = Piece(merged.pop().start, free.stop)
            merged.append(free)
        if merged[-1].stop == self._end:
            self._end = merged.pop().start
        self._free = merged

    def state(self) -> tuple[object, ...]:
        """Equal states answer the same requests alike."""
        return self._end, *self._free

    def _at_the_end(self, size: int) -> Piece:
        start, self._end = self._end, self._end + size
        self.peak_bytes = max(self.peak_bytes, self._end)
        return Piece(start, self._end)


def _best(piece: Piece) -> tuple[int, int]:
    return piece.nbytes, piece.start
