"""Where a best-fit allocator puts tensors in one stretch of memory; plain integers, no tensor.

A large segment of torch's CUDA allocator is cut up like this: of the free pieces that hold a request the
smallest, the lowest of equals; what it leaves is split off unless that is little; neighbours merge when freed.
`benchmarks/allocator_model.py` models the rest of it (several segments, pools, limits).
"""

from __future__ import annotations

from typing import NamedTuple

ROUNDING = 512
# Smaller requests share segments.
LEAST_OWN_SEGMENT = 10 << 20
_SEGMENT_STEP, _SHARED_SEGMENT = 2 << 20, 20 << 20
# Requests above this leave no rest of up to this: torch's large and small requests.
_LEAST_REST = 1 << 20


def reserved_bytes(nbytes: int) -> int:
    """What is asked of the driver for a request that nothing free can hold."""
    if nbytes <= _LEAST_REST:
        return _SEGMENT_STEP
    if -(-nbytes // ROUNDING) * ROUNDING < LEAST_OWN_SEGMENT:
        return _SHARED_SEGMENT
    return -(-nbytes // _SEGMENT_STEP) * _SEGMENT_STEP


class Piece(NamedTuple):
    """Bytes `start` to `stop` of the segment."""

    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class Segment:
    """A segment of `nbytes`, which grows at its end where nothing in it is free for a request.

    peak_bytes: the end of the highest piece ever taken. live_bytes, live_peak_bytes: what the pieces take by
    themselves, now and at most: less, by what lies free between them.
    """

    def __init__(self, nbytes: int = 0) -> None:
        self.nbytes = nbytes
        self.peak_bytes = self.live_bytes = self.live_peak_bytes = 0
        self._free = [Piece(0, nbytes)] if nbytes else []  # by address

    def take(self, nbytes: int) -> Piece:
        size = -(-nbytes // ROUNDING) * ROUNDING
        found = min((piece for piece in self._free if piece.nbytes >= size), key=_best, default=None)
        if found is None:
            found = self._grown(size)
        else:
            self._free.remove(found)
        rest = found.nbytes - size
        if rest > (_LEAST_REST if size > _LEAST_REST else 0):
            self._free = sorted([*self._free, Piece(found.start + size, found.stop)])
            found = Piece(found.start, found.start + size)
        self.peak_bytes = max(self.peak_bytes, found.stop)
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
        self._free = merged

    def state(self) -> tuple[object, ...]:
        """Equal states answer the same requests alike."""
        return self.nbytes, *self._free

    def _grown(self, size: int) -> Piece:
        at_end = self._free and self._free[-1].stop == self.nbytes
        start = self._free.pop().start if at_end else self.nbytes
        self.nbytes = start + size
        return Piece(start, self.nbytes)


def _best(piece: Piece) -> tuple[int, int]:
    return piece.nbytes, piece.start
