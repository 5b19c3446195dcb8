"""What is known of the kernels by which a CPU multiplies half precision."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache

import torch
import torch.nn.functional as F

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
# Of the product that is tried: more than the 4096 multiplications under which torch takes loops of its own.
_ROWS, _COLUMNS, _OUTPUTS = 40, 160, 48
# Of weights from a boundary that all kernels like, up to the length of a cache line.
_BOUNDARY = 64


@lru_cache
def has_half_kernels(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies `dtype`, bf16 or fp16, on this CPU."""
    # Names torch keeps private; without them fp32 is always right.
    return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{_NAMES[dtype]}_supported", lambda: False)())


def minding_address(dtypes: Collection[torch.dtype]) -> frozenset[torch.dtype]:
    """Those of `dtypes` whose products on this CPU may round by where in memory the weights lie.

    A BLAS's may (fp32, fp64). oneDNN's, for half precision, are made from shapes and strides before any address is
    known, so weights may lie as a file has them; a small product is tried all the same.
    """
    return frozenset(dtype for dtype in dtypes if _may_mind(dtype))


@lru_cache
def _may_mind(dtype: torch.dtype) -> bool:
    return dtype not in _NAMES or not has_half_kernels(dtype) or not is_same_everywhere(dtype)


def is_same_everywhere(dtype: torch.dtype) -> bool:
    """Whether products with a weight have the same bits wherever between two cache lines it begins."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_OUTPUTS, _COLUMNS, generator=generator, device="cpu").to(dtype)
    room = torch.empty(weight.nbytes + 2 * _BOUNDARY, dtype=torch.uint8, device="cpu")
    first = -room.data_ptr() % _BOUNDARY
    for count in (1, _ROWS):
        x = torch.randn(count, _COLUMNS, generator=generator, device="cpu").to(dtype)
        products = set()
        for offset in range(first, first + _BOUNDARY, dtype.itemsize):
            moved = room[offset : offset + weight.nbytes].view(dtype).view_as(weight).copy_(weight)
            products.add(F.linear(x, moved).view(torch.uint8).numpy().tobytes())
        if len(products) > 1:
            return False
    return True
