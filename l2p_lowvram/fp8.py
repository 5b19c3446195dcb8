"""FP8 weights on a CPU, E4M3, widened by shifts: torch converts these one at a time.

E4M3 (Micikevicius et al., "FP8 Formats for Deep Learning", 2022) is fp16's sign, exponent and mantissa with bits left
out. Put back as zeros they are an fp16 of a 256th of the value: E4M3's exponent counts from 7, fp16's from 15.
Subnormals of the one are subnormals of the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

# From E4M3's last mantissa bit to fp16's; sign extension leaves its mark on fp16's highest exponent bit.
_SHIFT, _WITHOUT_HIGHEST_EXPONENT_BIT = 7, ~0x4000
_FACTOR, _MOST = 256, 448
# Widened together: in 16 bits they stay in a core's cache.
_VALUES = 1 << 17


def widen_into(out: Tensor, stored: Tensor) -> Tensor:
    """out := stored, exactly, NaNs included. stored: torch.float8_e4m3fn, contiguous. out: of its shape, contiguous,
    fp32, bf16 or fp16."""
    source, target = stored.view(-1).view(torch.int8), out.view(-1)
    for start in range(0, source.numel(), _VALUES):
        part = slice(start, start + _VALUES)
        _widen(target[part], source[part].to(torch.int16))
    return out


def _widen(out: Tensor, codes: Tensor) -> None:
    """codes: int16, sign extended, which are lost."""
    codes.bitwise_left_shift_(_SHIFT).bitwise_and_(_WITHOUT_HIGHEST_EXPONENT_BIT)
    out.copy_(codes.view(torch.float16)).mul_(_FACTOR)
    low, high = out.aminmax()
    if high > _MOST or low < -_MOST:
        # Its only codes for NaN come out as what would be the next larger value.
        out.masked_fill_(out.abs() > _MOST, torch.nan)
