from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tiling import tokenwise


@pytest.mark.parametrize("tile", [1, 7, 32, 65, 100])
def test_slices_give_what_the_whole_gives(tile: int):
    x, weight = torch.randn(2, 65, 8, dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64)
    out = torch.empty(2, 65, 6, dtype=torch.float64)

    tokenwise(lambda rows: (rows @ weight).tanh(), [x], [out], tile=tile)

    torch.testing.assert_close(out, (x @ weight).tanh(), atol=1e-13, rtol=0)


def test_a_residual_stream_is_updated_in_place_from_several_inputs():
    x, other, angle = torch.randn(1, 65, 4), torch.randn(1, 65, 4), torch.randn(65, 1)
    before, expected = x.clone(), x + other * angle
    second = torch.empty(1, 65, 4)

    tokenwise(lambda a, b, c: (a + b * c, a.clone()), [x, other, angle], [x, second], tile=16)

    assert torch.equal(x, expected)
    assert torch.equal(second, before)


def test_a_function_that_looks_at_its_neighbours_is_not_tokenwise():
    """The comparison can fail: a running sum differs as soon as there is a second slice."""
    x = torch.randn(65, 4)
    out = torch.empty_like(x)

    tokenwise(lambda rows: rows.cumsum(0), [x], [out], tile=64)

    assert torch.equal(out[:64], x.cumsum(0)[:64])
    assert not torch.allclose(out, x.cumsum(0))


def test_no_slice_is_longer_than_the_tile():
    seen: list[int] = []

    def note(rows: Tensor) -> Tensor:
        seen.append(rows.shape[0])
        return rows

    tokenwise(note, [torch.zeros(65, 2)], [torch.zeros(65, 2)], tile=32)

    assert seen == [32, 32, 1]


def test_streams_of_different_length_are_refused():
    with pytest.raises(ValueError, match=r"equally long along axis -2, got \[64, 65\]"):
        tokenwise(lambda a: a, [torch.zeros(65, 2)], [torch.zeros(64, 2)], tile=8)


def test_a_missing_result_is_refused():
    with pytest.raises(ValueError, match="zip"):
        tokenwise(lambda a: a, [torch.zeros(4, 2)], [torch.zeros(4, 2), torch.zeros(4, 2)], tile=8)
