"""Exact splits of tensor work into tiles; knows no file, no weight and no model.

A tile reads a little more than it keeps, so every kept value is computed from the same inputs as without
tiling; nothing is blended. `spans` cuts one axis, `tokenwise` and `attention` cut token streams, `conv` cuts
convolutional nets by what their layers look at.
"""

from tiling.attention import attention, has_fused_kernel, online_softmax
from tiling.conv import (
    INNER,
    JOIN,
    SKIP,
    Conv,
    Layer,
    Reach,
    Tile,
    Up,
    layers_from,
    layers_of,
    pool,
    reach,
    run_tiled,
    tiled,
    tiles,
)
from tiling.spans import Span, spans
from tiling.tokenwise import tokenwise

__all__ = [
    "INNER",
    "JOIN",
    "SKIP",
    "Conv",
    "Layer",
    "Reach",
    "Span",
    "Tile",
    "Up",
    "attention",
    "has_fused_kernel",
    "layers_from",
    "layers_of",
    "online_softmax",
    "pool",
    "reach",
    "run_tiled",
    "spans",
    "tiled",
    "tiles",
    "tokenwise",
]
