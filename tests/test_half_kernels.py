"""Half precision on a CPU: weights may be multiplied where a file has them, if that changes no bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from l2p_lowvram import half_kernels
from l2p_lowvram.half_kernels import has_half_kernels, is_same_everywhere, minding_address

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    half_kernels._may_mind.cache_clear()
    yield
    half_kernels._may_mind.cache_clear()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("columns", "outputs"), [(48, 16), (64, 48), (256, 3840), (3840, 512), (2560, 96)])
def test_weights_that_are_used_as_a_file_has_them_give_the_bits_of_aligned_ones(
    dtype: torch.dtype, columns: int, outputs: int
) -> None:
    if minding_address({dtype}):
        pytest.skip("this CPU's kernels are given aligned weights")
    weight = torch.randn(outputs, columns).to(dtype)
    room = torch.empty(weight.nbytes + 512, dtype=torch.uint8)
    start = -room.data_ptr() % 256
    for rows in (1, 2, 17, 100):
        x = torch.randn(rows, columns).to(dtype)
        wanted = None
        for offset in (0, 2, 8, 24, 32, 56, 64, 130):
            moved = room[start + offset : start + offset + weight.nbytes].view(dtype).view_as(weight).copy_(weight)
            result = F.linear(x, moved)
            wanted = result if wanted is None else wanted
            assert torch.equal(result, wanted), (rows, offset)


def test_a_blas_is_given_aligned_weights() -> None:
    assert minding_address({torch.float32, torch.float64}) == {torch.float32, torch.float64}


@pytest.mark.parametrize("dtype", HALF)
def test_so_are_the_loops_of_a_cpu_without_half_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_kernels, "has_half_kernels", lambda dtype: False)

    assert minding_address({dtype, torch.float32}) == {dtype, torch.float32}


@pytest.mark.parametrize("unit", [4, 16, 32])
def test_and_kernels_that_turn_out_to_mind(unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """unit: bytes of which the kernel's vectors are."""
    whole = F.linear

    def minding(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        y = whole(x, weight, *rest)
        return y + (y.abs().max() * 0.01 if weight.data_ptr() % unit else 0)

    monkeypatch.setattr(half_kernels, "has_half_kernels", lambda dtype: True)
    monkeypatch.setattr(F, "linear", minding)

    assert minding_address({torch.bfloat16}) == {torch.bfloat16}


@pytest.mark.parametrize("surroundings", [torch.device("meta"), torch.autocast("cpu", torch.bfloat16)])
def test_a_programs_default_device_and_autocast_change_no_answer(surroundings: Any) -> None:
    expected = [minding_address({dtype}) for dtype in HALF]
    half_kernels._may_mind.cache_clear()

    with surroundings:
        assert [minding_address({dtype}) for dtype in HALF] == expected


@pytest.mark.parametrize("dtype", HALF)
def test_onednn_is_believed_where_it_multiplies(dtype: torch.dtype) -> None:
    if not has_half_kernels(dtype):
        pytest.skip("this CPU has no such kernels")

    assert is_same_everywhere(dtype)
    assert minding_address({dtype}) == frozenset()
