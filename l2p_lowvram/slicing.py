"""Slice sizes as numbers, and the `Slices` that the transformer runs by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tiling import attention, has_fused_kernel, tokenwise

from .config import ModelConfig
from .model import Slices

# Keys per tile where torch has no attention kernel without a score matrix.
KEY_TILE = 1024


@dataclass(frozen=True)
class SliceSizes:
    """What exists together inside a block; the whole token stream does anyway.

    tokens: per-token work (projections, norms, feed-forward). queries: attention. heads: whose keys and
    values exist together. keys: per tile of the online softmax, or None for torch's own attention kernel.
    patch_rows: rows of patches that the prelude embeds together.
    """

    tokens: int = 2048
    queries: int = 4096
    heads: int = 6
    keys: int | None = None
    patch_rows: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def slices(self) -> Slices:
        """These sizes as what `Block.visit` and `L2PTransformer.prelude` take."""

        def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
            attention(q, k, v, query_tile=self.queries, key_tile=self.keys, out=out)

        return Slices(partial(tokenwise, tile=self.tokens), attend, self.heads, self.patch_rows)


def key_tile_for(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> int | None:
    """`SliceSizes.keys` for a device: None where torch's attention keeps no score matrix there."""
    return None if has_fused_kernel(device, dtype, config.head_dim) else KEY_TILE
