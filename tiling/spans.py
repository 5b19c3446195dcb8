"""Cuts one axis into tiles; pure integers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Span:
    """One tile along one axis: positions `read_start:read_stop` go in, `keep_start:keep_stop` are kept."""

    read_start: int
    read_stop: int
    keep_start: int
    keep_stop: int


def spans(length: int, tile: int, *, halo: int = 0, align: int = 1) -> list[Span]:
    """Cut an axis of `length` positions into tiles that keep up to `tile` positions each.

    The kept ranges are in order and cover the axis exactly once; each tile reads `halo` positions more on
    either side, clipped at the ends of the axis. Every edge is a multiple of `align`, except an end of the
    axis that is none itself. A length of 0 has no tiles.
    Raises ValueError for a negative length or halo, and where tile or halo would leave the grid.
    """
    if length < 0:
        raise ValueError(f"length must not be negative, got {length}")
    if align < 1:
        raise ValueError(f"align must be at least 1, got {align}")
    if tile < 1 or tile % align:
        legal = nearest_multiples(tile, align, lowest=align)
        raise ValueError(f"tile must be a positive multiple of {align} (align), got {tile}; nearest is {legal}")
    if halo < 0 or halo % align:
        legal = nearest_multiples(halo, align, lowest=0)
        raise ValueError(f"halo must be a multiple of {align} (align) from 0, got {halo}; nearest is {legal}")
    cuts = [*range(0, length, tile), length]
    return [Span(max(start - halo, 0), min(stop + halo, length), start, stop) for start, stop in pairwise(cuts)]


def nearest_multiples(value: int, align: int, *, lowest: int) -> str:
    """The multiples of `align` around `value`, none under `lowest`, in words for a message."""
    below = max(value // align * align, lowest)
    above = max(below, -(-value // align) * align)
    return str(below) if below == above else f"{below} or {above}"
