"""Spans keep each position exactly once and read what they need, whatever the numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiling import Span, spans


@st.composite
def cuttings(draw: st.DrawFn) -> tuple[int, int, int, int]:
    align = draw(st.sampled_from([1, 2, 3, 16]))
    tile = align * draw(st.integers(1, 12))
    halo = align * draw(st.integers(0, 5))
    return draw(st.integers(0, 400)), tile, halo, align


@given(cuttings())
def test_every_position_is_kept_exactly_once_and_in_order(cutting: tuple[int, int, int, int]) -> None:
    length, tile, halo, align = cutting

    kept = [
        position
        for span in spans(length, tile, halo=halo, align=align)
        for position in range(span.keep_start, span.keep_stop)
    ]

    assert kept == list(range(length))


@given(cuttings())
def test_a_tile_reads_its_halo_clipped_at_the_border(cutting: tuple[int, int, int, int]) -> None:
    length, tile, halo, align = cutting

    for span in spans(length, tile, halo=halo, align=align):
        assert 0 < span.keep_stop - span.keep_start <= tile
        assert span.read_start == max(0, span.keep_start - halo)
        assert span.read_stop == min(length, span.keep_stop + halo)


@given(cuttings())
def test_every_edge_lies_on_the_grid_or_at_the_end(cutting: tuple[int, int, int, int]) -> None:
    length, tile, halo, align = cutting

    for span in spans(length, tile, halo=halo, align=align):
        for edge in (span.read_start, span.read_stop, span.keep_start, span.keep_stop):
            assert edge % align == 0 or edge == length


def test_length_65_by_tile_64_leaves_a_tile_of_one() -> None:
    assert spans(65, 64, halo=16, align=16) == [Span(0, 65, 0, 64), Span(48, 65, 64, 65)]


def test_a_tile_larger_than_the_axis_is_the_axis() -> None:
    assert spans(30, 64, halo=32, align=16) == [Span(0, 30, 0, 30)]


def test_an_empty_axis_has_no_tiles() -> None:
    assert spans(0, 8) == []


@pytest.mark.parametrize(
    ("length", "tile", "halo", "align", "message"),
    [
        (-1, 8, 0, 1, "length must not be negative, got -1"),
        (8, 8, 0, 0, "align must be at least 1, got 0"),
        (8, 0, 0, 1, r"tile must be a positive multiple of 1 \(align\), got 0; nearest is 1"),
        (8, -5, 0, 4, r"tile must be a positive multiple of 4 \(align\), got -5; nearest is 4"),
        (99, 40, 0, 16, r"tile must be a positive multiple of 16 \(align\), got 40; nearest is 32 or 48"),
        (99, 9, 0, 16, r"tile must be a positive multiple of 16 \(align\), got 9; nearest is 16"),
        (99, 32, 9, 16, r"halo must be a multiple of 16 \(align\) from 0, got 9; nearest is 0 or 16"),
        (99, 32, -16, 16, r"halo must be a multiple of 16 \(align\) from 0, got -16; nearest is 0"),
    ],
)
def test_numbers_off_the_grid_are_refused_with_the_nearest_legal(
    length: int, tile: int, halo: int, align: int, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        spans(length, tile, halo=halo, align=align)
