"""Making INT8 weights: symmetric, absmax / 127, per row, per tensor or per block, rotated or not."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from .linear import REGULAR, SYLVESTER, Rotation

INT8_MAX = 127.0
# An all-zero row would divide by zero; any positive scale gives its zeros back.
_SMALLEST_SCALE = 1e-30
_FLOAT8_MAX = 448.0


@dataclass(frozen=True)
class Scheme:
    """How a weight is quantised.

    block: side of the square that shares a scale; 0 stands for a row, None for the whole weight.
    float8: store E4M3 floats instead of integers (per tensor only).
    """

    block: int | None = 0
    rotation: Rotation | None = None
    float8: bool = False

    @classmethod
    def parse(cls, name: str) -> Scheme:
        """Read "row", "tensor", "blockN", "convrotN", "quarotN" (Sylvester) or "fp8". Raises ValueError."""
        match = re.fullmatch(r"(row|tensor|fp8)|(block|convrot|quarot)([1-9]\d{0,4})", name)
        if match is None:
            known = "row, tensor, block128, convrot256, quarot128 or fp8"
            raise ValueError(f"unknown quantisation scheme {name!r}; it must be like {known}")
        kind, number = match[1] or match[2], match[3]
        if kind in ("convrot", "quarot"):
            return cls(0, Rotation(int(number), REGULAR if kind == "convrot" else SYLVESTER))
        if kind == "block":
            return cls(int(number))
        return cls(0 if kind == "row" else None, float8=kind == "fp8")

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """weight (N, K) -> stored values and fp32 scale.

        A rotation whose group does not divide K raises ValueError, as does such a block.
        """
        if self.rotation is not None:
            if weight.shape[1] % self.rotation.group:
                reason = f"no multiple of the rotation group {self.rotation.group}"
                raise ValueError(f"the weight has {weight.shape[1]} columns, {reason}")
            weight = self.rotation.apply(weight)
        if self.float8:
            return quantize_float8(weight)
        if self.block is None:
            return quantize_tensor(weight)
        return quantize_blocks(weight, self.block) if self.block else quantize_rows(weight)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (N, K) -> int8 (N, K) and one fp32 scale a row (N, 1)."""
    weight = weight.float()
    scale = _scale(weight.abs().amax(1, keepdim=True))
    return _round(weight / scale), scale


def quantize_tensor(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (N, K) -> int8 (N, K) and a single fp32 scale ()."""
    weight = weight.float()
    scale = _scale(weight.abs().amax())
    return _round(weight / scale), scale


def quantize_blocks(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """weight (N, K) -> int8 (N, K) and one fp32 scale a block (N/block, K/block)."""
    rows, columns = weight.shape
    if block < 1 or rows % block or columns % block:
        raise ValueError(f"a weight of shape {list(weight.shape)} has no whole number of blocks of {block}")
    grid = weight.float().unflatten(0, (-1, block)).unflatten(2, (-1, block))  # (N/b, b, K/b, b)
    scale = _scale(grid.abs().amax((1, 3)))
    return _round(grid / scale[:, None, :, None]).reshape(rows, columns), scale


def quantize_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (N, K) -> float8 E4M3 (N, K) and a single fp32 scale ()."""
    scale = (weight.float().abs().amax() / _FLOAT8_MAX).clamp_min(_SMALLEST_SCALE)
    return (weight.float() / scale).to(torch.float8_e4m3fn), scale


def _scale(absmax: Tensor) -> Tensor:
    return (absmax / INT8_MAX).clamp_min(_SMALLEST_SCALE)


def _round(values: Tensor) -> Tensor:
    return values.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
