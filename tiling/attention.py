"""Exact attention in slices of queries, groups of heads and, where no fused kernel exists, tiles of keys."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tiling.spans import Span, spans


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_tile: int | None = None,
    head_tile: int | None = None,
    key_tile: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v without mask. q (B, H, L, D), k and v (B, H, S, D) -> (B, H, L, D).

    query_tile, head_tile: queries and heads per kernel call; None: all. Query rows and heads never interact,
    so both change memory, not values (beyond the last bits a kernel owes to its shapes).
    key_tile: None runs torch's own kernel; a number runs `online_softmax` with that many keys at a time.
    out: where the result goes, any strides; it may be q itself, since a query is read before it is written.
    """
    out = torch.empty_like(q) if out is None else out
    for heads in _cuts(q.shape[1], head_tile):
        here = slice(heads.keep_start, heads.keep_stop)
        keys, values = k[:, here], v[:, here]
        for queries in _cuts(q.shape[2], query_tile):
            rows = slice(queries.keep_start, queries.keep_stop)
            if key_tile is None:
                result = F.scaled_dot_product_attention(q[:, here, rows], keys, values)
            else:
                result = online_softmax(q[:, here, rows], keys, values, key_tile=key_tile)
            out[:, here, rows] = result
    return out


def online_softmax(q: Tensor, k: Tensor, v: Tensor, *, key_tile: int) -> Tensor:
    """Attention of q (B, H, L, D) over k, v (B, H, S, D), `key_tile` keys at a time -> (B, H, L, D) like q.

    Keeps a running maximum and sum per query (the FlashAttention recurrence), so that the largest tensor is
    (B, H, L, key_tile). Arithmetic is fp32, or fp64 for fp64 inputs: exact up to the order of summation.
    """
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries = q.to(kind) / math.sqrt(q.shape[-1])
    total = torch.zeros_like(queries)
    highest = queries.new_full((*q.shape[:-1], 1), -math.inf)
    weight = torch.zeros_like(highest)
    for keys in _cuts(k.shape[2], key_tile):
        here = slice(keys.keep_start, keys.keep_stop)
        scores = queries @ k[:, :, here].to(kind).transpose(-1, -2)
        raised = torch.maximum(highest, scores.amax(-1, keepdim=True))
        scores.sub_(raised).exp_()
        # What was summed so far was relative to the old maximum.
        shrink = highest.sub_(raised).exp_()
        weight.mul_(shrink).add_(scores.sum(-1, keepdim=True))
        total.mul_(shrink).add_(scores @ v[:, :, here].to(kind))
        highest = raised
        del scores  # before the next tile needs the room
    return total.div_(weight).to(q.dtype)


def has_fused_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch's attention runs there without an L x S score matrix (unmasked, inference).

    False means: give a key_tile. The CPU's own kernel is tiled for every float dtype. On CUDA torch is asked,
    since that depends on the card (bfloat16 has no such kernel before compute capability 8.0) and on the build.
    """
    if device.type == "cpu":
        return dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    probe = torch.empty(1, 1, 64, head_dim, device=device, dtype=dtype)
    with torch.no_grad(), torch.cuda.device(device):  # the answer is the current device's
        asked = torch.backends.cuda.SDPAParams(probe, probe, probe, None, 0.0, False, False)
        return torch.backends.cuda.can_use_flash_attention(asked) or torch.backends.cuda.can_use_efficient_attention(
            asked
        )


def _cuts(length: int, tile: int | None) -> list[Span]:
    return spans(length, tile or max(length, 1))
