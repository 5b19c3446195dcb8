"""Attention in slices against torch's own, over the whole."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tiling import attention, has_fused_kernel, online_softmax


def random_qkv(*, queries: int = 67, keys: int = 131, heads: int = 3, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(7)
    shapes = [(2, heads, queries, 8), (2, heads, keys, 8), (2, heads, keys, 8)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return (4 * q).to(dtype), k.to(dtype), v.to(dtype)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        sizes = [leaf.untyped_storage().nbytes() // leaf.element_size() for leaf in made]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("key_tile", [None, 1, 32, 131, 500])
@pytest.mark.parametrize(("query_tile", "head_tile"), [(None, None), (1, 1), (64, 2), (67, 3), (1000, 9)])
def test_slices_change_memory_not_values(query_tile: int | None, head_tile: int | None, key_tile: int | None):
    q, k, v = random_qkv()

    sliced = attention(q, k, v, query_tile=query_tile, head_tile=head_tile, key_tile=key_tile)

    torch.testing.assert_close(sliced, F.scaled_dot_product_attention(q, k, v), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)]
)
def test_key_tiles_match_the_softmax_written_out(dtype: torch.dtype, tolerance: float):
    q, k, v = random_qkv(dtype=dtype)
    scores = q.double() @ k.double().transpose(-1, -2) / math.sqrt(8)

    tiled = online_softmax(q, k, v, key_tile=16)

    assert tiled.dtype == dtype
    torch.testing.assert_close(tiled.double(), scores.softmax(-1) @ v.double(), atol=tolerance, rtol=0)


def test_huge_scores_do_not_overflow_whatever_tile_they_are_in():
    q, k, v = random_qkv(dtype=torch.float32)
    k[:, :, 5], k[:, :, 100] = 300, 400

    tiled = online_softmax(q, k, v, key_tile=32)

    assert tiled.isfinite().all()
    torch.testing.assert_close(tiled, F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=0)


def test_forgetting_to_shrink_the_sum_would_be_seen(monkeypatch: pytest.MonkeyPatch):
    """The comparison above can fail: without the rescaling step the result is far away."""
    q, k, v = random_qkv()
    monkeypatch.setattr(Tensor, "exp_", lambda self: self.copy_(self.exp()) if self.shape[-1] > 1 else self.fill_(1))

    wrong = online_softmax(q, k, v, key_tile=16)

    assert (wrong - F.scaled_dot_product_attention(q, k, v)).abs().max() > 1e-2


def test_the_result_may_overwrite_the_queries_through_strided_views():
    q, k, v = random_qkv()
    expected = F.scaled_dot_product_attention(q, k, v)
    wide = torch.zeros(2, 67, 5, 8, dtype=torch.float64)  # (B, L, H, D) with heads of others beside these
    columns = wide[:, :, 1:4].transpose(1, 2)
    columns.copy_(q)

    attention(columns, k, v, query_tile=16, head_tile=1, key_tile=32, out=columns)

    torch.testing.assert_close(columns, expected, atol=1e-12, rtol=0)
    assert not wide[:, :, 0].any()
    assert not wide[:, :, 4].any()


@pytest.mark.parametrize("key_tile", [None, 64])
@torch.inference_mode()
def test_no_tensor_is_as_large_as_queries_times_keys(key_tile: int | None):
    q, k, v = (torch.randn(1, 2, 1024, 8) for _ in range(3))

    with LargestTensor() as largest:
        attention(q, k, v, query_tile=128, head_tile=1, key_tile=key_tile)

    assert largest.elements <= 2 * 1024 * 8


@torch.inference_mode()
def test_the_accounting_sees_a_score_matrix_where_there_is_one():
    q, k = torch.randn(1, 2, 1024, 8), torch.randn(1, 2, 1024, 8)

    with LargestTensor() as largest:
        (q @ k.transpose(-1, -2)).softmax(-1)

    assert largest.elements == 2 * 1024 * 1024


def test_the_cpu_has_a_tiled_kernel_and_unknown_devices_do_not():
    assert has_fused_kernel(torch.device("cpu"), torch.float32, 128)
    assert not has_fused_kernel(torch.device("meta"), torch.float32, 128)
