"""Making INT8 weights: symmetric, absmax / 127, per row, per tensor or per block, rotated or not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .linear import REGULAR, SYLVESTER, Rotation

INT8_MAX = 127.0
# An all-zero row would divide by zero; any positive scale gives its zeros back.
SMALLEST_SCALE = 1e-30
_FLOAT8_MAX = 448.0
_CACHED_ELEMENTS = 1 << 17


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

    def fitting(self, columns: int) -> Scheme:
        """Without its rotation where the group does not divide so many columns."""
        if self.rotation is None or columns % self.rotation.group == 0:
            return self
        return replace(self, rotation=None)

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
    """weight (N, K) -> int8 (N, K) and one fp32 scale a row (N, 1).

    Rows never interact: any run of them gives what it gives within the whole.
    """
    stored = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(weight.shape[0], 1)
    for values, rounded, scales in _few_rows(weight, stored, scale):
        values = values.float()
        scales.copy_(_scale(absmax(values, 1)))
        rounded.copy_(_rounded(values / scales))
    return stored, scale


def quantize_tensor(weight: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """weight (N, K) -> int8 (N, K) and a single fp32 scale ().

    scale: `tensor_scale` of the whole, where `weight` is some of its rows.
    """
    scale = tensor_scale(absmax(weight)) if scale is None else scale
    stored = torch.empty(weight.shape, dtype=torch.int8)
    for values, rounded in _few_rows(weight, stored):
        rounded.copy_(_rounded(values.float() / scale))
    return stored, scale


def tensor_scale(largest: Tensor) -> Tensor:
    """The scale () of a weight whose values are at most `largest` () in magnitude."""
    return _scale(largest.float())


def absmax(values: Tensor, dim: int | None = None) -> Tensor:
    """The largest magnitude, along `dim` (kept) or of all; NaN where there is one."""
    # Not abs().amax(), which writes a copy, nor vector_norm, whose kernel is ten times slower.
    if dim is None:
        return torch.maximum(values.amax(), -values.amin())
    return torch.maximum(values.amax(dim, keepdim=True), -values.amin(dim, keepdim=True))


def quantize_blocks(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """weight (N, K) -> int8 (N, K) and one fp32 scale a block (N/block, K/block)."""
    rows, columns = weight.shape
    if block < 1 or rows % block or columns % block:
        raise ValueError(f"a weight of shape {list(weight.shape)} has no whole number of blocks of {block}")
    grid = weight.float().unflatten(0, (-1, block)).unflatten(2, (-1, block))  # (N/b, b, K/b, b)
    scale = _scale(grid.abs().amax((1, 3)))
    return _rounded(grid / scale[:, None, :, None]).to(torch.int8).reshape(rows, columns), scale


def quantize_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (N, K) -> float8 E4M3 (N, K) and a single fp32 scale ()."""
    scale = (weight.float().abs().amax() / _FLOAT8_MAX).clamp_min(SMALLEST_SCALE)
    return (weight.float() / scale).to(torch.float8_e4m3fn), scale


def _few_rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same run of rows of each, short enough to stay in the processor's cache through several operations."""
    rows = max(_CACHED_ELEMENTS // max(tensors[0].shape[1], 1), 1)
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _scale(largest: Tensor) -> Tensor:
    return (largest / INT8_MAX).clamp_min(SMALLEST_SCALE)


def _rounded(values: Tensor) -> Tensor:
    """In place."""
    return values.round_().clamp_(-INT8_MAX, INT8_MAX)
