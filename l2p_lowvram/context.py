"""What a card's driver holds for a run beside its tensors, measured before the run is planned.

The driver loads kernels when they are first used, and gives each library memory of its own. So one of each kind is used
on a few numbers, which a run would pay for a moment later, and then the driver is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.nn.functional as F

from offload import driver_bytes

from .decoder import halved, map_format
from .devices import full_fp32, on_device, stream_dtype
from .errors import is_out_of_memory
from .estimates import CONTEXT_BYTES

# Measured bytes are rounded up to such steps, so that a second run plans the same, and what comes later has room.
_STEP = 32 << 20
_SPARE = 16 << 20
# Where the driver tells what all programs hold together, which another one may change meanwhile.
_LARGEST = 1 << 30


@lru_cache
def context_bytes(device: torch.device, dtype: torch.dtype) -> int:
    """Of a CUDA card, with the kernels that a run in `dtype` takes loaded. Measured once per process, in about a second
    that the run then does not take; of other devices the usual allowance. Where the driver does not tell of this
    process alone, the bare context counts with the usual allowance, too.

    Raises torch.OutOfMemoryError, or a RuntimeError that says so, where the card has not the room for it.
    """
    if device.type != "cuda":
        return CONTEXT_BYTES
    before, _ = driver_bytes(device)
    load_kernels(device, dtype)
    held, is_exact = driver_bytes(device)
    if not is_exact:
        # Of all programs together: what kernels added is ours, the bare context's share of the rest is not known.
        held = min(CONTEXT_BYTES - _SPARE + max(held - before, 0), _LARGEST)
    return -(-(held + _SPARE) // _STEP) * _STEP


def held_context_bytes(device: torch.device, planned: int) -> int:
    """What the driver holds now; where it does not tell that of this process alone, what was planned."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return planned
    held, is_exact = driver_bytes(device)
    return held if is_exact else planned


def load_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Use each kind of kernel once: what a device lacks, it will not load later, either. Leaves nothing in torch's
    allocator: what cuBLAS works in would be taken for another program's."""
    wide = stream_dtype(dtype)
    with torch.inference_mode(), on_device(device), full_fp32(device, wide):
        for kind in dict.fromkeys((dtype, wide)):
            with _lacking():
                _use_transformer_kernels(device, kind)
        with _lacking():
            _use_decoder_kernels(device, wide)
        with _lacking():
            ones = torch.ones(64, 64, dtype=torch.int8, device=device)
            torch._int_mm(ones, ones.t())
            del ones
        # The pool that copy streams come from is made as a whole.
        torch.cuda.Stream(device=device, priority=-1).synchronize()
        torch.cuda.synchronize(device)
        getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
        torch.cuda.empty_cache()


@contextmanager
def _lacking() -> Iterator[None]:
    """Around kernels that a device may lack; too little memory is another matter."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise


def _use_transformer_kernels(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.ones(1, 256, 256, dtype=dtype, device=device)
    weight = torch.ones(256, 256, dtype=torch.int8, device=device).mul(0.5).to(dtype)
    y = F.rms_norm(F.linear(x, weight), (256,), weight[0])
    heads = F.silu(y).view(1, 256, 2, 128).transpose(1, 2)
    F.scaled_dot_product_attention(heads, heads, heads)


def _use_decoder_kernels(device: torch.device, dtype: torch.dtype) -> None:
    pixels = torch.ones(1, 3, 64, 64, dtype=dtype, device=device)
    first, second = (torch.ones(64, count, 3, 3, dtype=dtype, device=device) for count in (3, 64))
    maps = F.conv2d(pixels, first, padding=1).contiguous(memory_format=map_format(device, dtype))
    maps = halved(F.conv2d(F.interpolate(maps, scale_factor=2, mode="nearest"), second, padding=1))
    F.linear(maps.permute(0, 2, 3, 1), torch.ones(3, 64, dtype=dtype, device=device))
