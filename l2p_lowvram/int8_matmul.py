"""W8A8: activations quantised per token as they come, multiplied with INT8 weights in integers.

    x W^T  ~  (q_x q_w^T) * scale_w * scale_x,    q_x = round(x / scale_x),  scale_x = absmax of the token / 127

Sums of products of int8 are integers, so every kernel that is right gives the same bits; they differ in speed
alone. A token's quantisation depends on no other token, so slices of tokens have the bits of the whole; rotated ones
up to rounding, since how a rotation rounds depends on how many rows are multiplied at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from .devices import is_card

# Of activations on their way to int8, and of one tile of sums, in fp32 or int32.
CPU_SLICE_BYTES = 8 << 20
DEVICE_SLICE_BYTES = 16 << 20
# Of what passes through several operations on a CPU, which should find it in its cache.
_CPU_CACHED_BYTES = 2 << 20
_LEVELS = 127
_SMALLEST_SCALE = 1e-30
# Sums of so many products of int8 stay below 2^24, where fp32 holds every integer (so do those of twice as many,
# whose factors would not fit in `working_bytes`).
_EXACT_COLUMNS = 512
# Fewest outputs of a tile while there are many rows: a kernel packs its weights anew for every tile of rows.
_LEAST_WIDTH, _WIDTH_MULTIPLE = 512, 64
# torch._int_mm on CUDA: more than 16 rows, columns and outputs in multiples of 8. On the CPU it takes anything.
_INT_MM_ROWS, _INT_MM_MULTIPLE = 17, 8
_PADDED_ROWS = 32


class Int8Matmul(Protocol):
    """What multiplies in integers."""

    def __call__(self, q: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
        """q (M, K), w (N, K), both int8 -> q w^T (M, N) in int32, or in fp32 rounded once. In `out`, (M, N) int32,
        where it is given and the kernel can: new memory for each tile costs more than the scaling of its sums."""


@runtime_checkable
class WritingMatmul(Int8Matmul, Protocol):
    """One whose kernel scales the outputs and rounds them as it writes them."""

    def write(self, out: Tensor, q: Tensor, row_scale: Tensor, w: Tensor, scale: Tensor) -> None:
        """out (M, N) := (q w^T) * scale * row_scale, in fp32 until it is written. scale (1, 1) or (N, 1), row_scale
        (M, 1)."""


class Rotates(Protocol):
    """A rotation of columns. Two that are equal rotate alike."""

    def apply(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x (M, K), rotated, in fp32; into `out` where given."""


def slice_bytes(device: torch.device) -> int:
    return CPU_SLICE_BYTES if device.type == "cpu" else DEVICE_SLICE_BYTES


def working_bytes(device: torch.device, tokens: int, widest: int) -> int:
    """Most bytes alive beside inputs, their int8 values and outputs, of layers with up to `widest` columns or
    outputs: four slices (`in_fp32` is the worst: both factors, a part of the sums, and their total)."""
    return 4 * min(slice_bytes(device), 4 * tokens * widest)


def tile_shape(rows: int, nbytes: int) -> tuple[int, int]:
    """Rows and outputs of a tile of sums of at most `nbytes`: as many rows as leave it `_LEAST_WIDTH` outputs."""
    height = max(min(rows, nbytes // (4 * _LEAST_WIDTH)), 1)
    return height, max(nbytes // (4 * height) // _WIDTH_MULTIPLE, 1) * _WIDTH_MULTIPLE


def rows_at_a_time(x: Tensor) -> int:
    """Rows of x (M, K) that a chain of operations in fp32 should take together: all on a card."""
    return max(_CPU_CACHED_BYTES // (4 * x.shape[1]), 1) if x.device.type == "cpu" else max(x.shape[0], 1)


@dataclass(frozen=True)
class QuantizedRows:
    """values (M, K) int8, scale (M, 1) fp32: together the rows of `source` (..., K), rotated by `rotation`."""

    values: Tensor
    scale: Tensor
    source: Tensor
    rotation: Rotates | None


def quantize_rows(x: Tensor, rotation: Rotates | None = None) -> QuantizedRows:
    """x (..., K) as int8, a scale per row: absmax / 127, rounded half to even. A row that is not finite has a
    scale that is not, and makes outputs that are not.
    """
    rows = x.reshape(-1, x.shape[-1])
    values = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows.shape[0], 1, dtype=torch.float32, device=x.device)
    most = max(slice_bytes(x.device) // (4 * rows.shape[1]), 1)
    step = max(min(rows_at_a_time(rows), most, rows.shape[0]), 1)
    buffer = torch.empty(step, rows.shape[1], dtype=torch.float32, device=x.device)
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        piece = rows[part]
        floats = buffer[: piece.shape[0]]
        if rotation is not None:
            piece = rotation.apply(piece, floats)
        elif x.device.type == "cpu":
            piece = floats.copy_(piece)
        factor = _largest_into(scale[part], piece).div_(_LEVELS).clamp_(min=_SMALLEST_SCALE)
        values[part] = torch.div(piece, factor, out=floats).round_()
    return QuantizedRows(values, scale, x, rotation)


def _largest_into(out: Tensor, rows: Tensor) -> Tensor:
    """out (M, 1) fp32 := of each row the largest magnitude."""
    if is_card(rows.device):  # one kernel, where a CPU takes several times as long as two reductions
        return torch.linalg.vector_norm(rows, math.inf, dim=-1, keepdim=True, dtype=torch.float32, out=out)
    low, high = rows.amin(dim=-1, keepdim=True), rows.amax(dim=-1, keepdim=True)
    return torch.maximum(high.float(), low.float().neg_(), out=out)


def multiply(matmul: Int8Matmul, x: QuantizedRows, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in the dtype of x's source, (..., N); scales and bias are applied in fp32.

    weight (N, K) int8; scale (1, 1) or (N, 1) fp32. A tile of outputs at a time, so that sums and their scaled
    values stay within `working_bytes`, and on a CPU in the cache.
    """
    count, outputs = x.values.shape[0], weight.shape[0]
    result = torch.empty(count, outputs, dtype=x.source.dtype, device=weight.device)
    if isinstance(matmul, WritingMatmul) and bias is None:
        matmul.write(result, x.values, x.scale, weight, scale)
    else:
        _multiply_in_tiles(matmul, result, x, weight, scale, bias)
    return result.view(*x.source.shape[:-1], outputs)


def _multiply_in_tiles(
    matmul: Int8Matmul, result: Tensor, x: QuantizedRows, weight: Tensor, scale: Tensor, bias: Tensor | None
) -> None:
    count, outputs = result.shape
    height, width = tile_shape(count, slice_bytes(weight.device))
    scale_into = _scale_in_cache if weight.device.type == "cpu" else _scale_at_once
    buffer = torch.empty(height * min(width, outputs), dtype=torch.int32, device=weight.device)
    for start in range(0, outputs, width):
        columns = slice(start, start + width)
        factor = (scale if scale.shape[0] == 1 else scale[columns]).T
        added = None if bias is None else bias[columns].float()
        for top in range(0, count, height):
            rows = slice(top, top + height)
            tile = result[rows, columns]
            sums = matmul(x.values[rows], weight[columns], buffer[: tile.numel()].view(tile.shape))
            scale_into(tile, sums, x.scale[rows], factor, added)
            del sums  # where they are not the buffer: before the next tile's exist


def _scale_at_once(out: Tensor, sums: Tensor, row_scale: Tensor, factor: Tensor, bias: Tensor | None) -> None:
    """out := sums * factor * row_scale + bias, in fp32 until it is written; sums are lost.

    For cards, in as few kernels as there can be: each converts what it reads and rounds what it writes.
    """
    scaled = torch.mul(sums, factor, out=sums.view(torch.float32))
    if bias is None:
        torch.mul(scaled, row_scale, out=out)
    else:
        out.copy_(scaled.mul_(row_scale).add_(bias))


def _scale_in_cache(out: Tensor, sums: Tensor, row_scale: Tensor, factor: Tensor, bias: Tensor | None) -> None:
    """`_scale_at_once` for CPUs, to the same bits.

    One plain operation after the other, since torch copies the operands of one that mixes dtypes there; and a few
    rows at a time, which stay in the cache.
    """
    step = rows_at_a_time(sums)
    for start in range(0, sums.shape[0], step):
        part = sums[start : start + step]
        scaled = part if part.dtype == torch.float32 else part.view(torch.float32).copy_(part)
        scaled.mul_(factor).mul_(row_scale[start : start + step])
        out[start : start + step] = scaled if bias is None else scaled.add_(bias)


def in_fp32(q: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """The reference, for every device: sums of 512 columns in fp32, which are exact, added in int32."""

    def part(start: int) -> Tensor:
        columns = slice(start, start + _EXACT_COLUMNS)
        return F.linear(q[:, columns].float(), w[:, columns].float())

    total = part(0).int() if out is None else out.copy_(part(0))
    for start in range(_EXACT_COLUMNS, q.shape[1], _EXACT_COLUMNS):
        total.add_(part(start).int())
    return total


def int_mm_fits(rows: int, columns: int, outputs: int) -> bool:
    """Whether `torch._int_mm` takes (rows, columns) times (columns, outputs) on CUDA."""
    return rows >= _INT_MM_ROWS and columns % _INT_MM_MULTIPLE == 0 and outputs % _INT_MM_MULTIPLE == 0


def by_int_mm(q: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """cuBLASLt's int8 kernel, on CPUs oneDNN's. Too few rows are padded; sizes it does not take go through fp32."""
    rows = q.shape[0]
    if rows < _INT_MM_ROWS:
        q, out = F.pad(q, (0, 0, 0, _PADDED_ROWS - rows)), None
    if not int_mm_fits(q.shape[0], *w.T.shape):
        return in_fp32(q[:rows], w)
    # A view: the kernel wants the second factor column by column, which is how the weight lies.
    if out is None:
        return torch._int_mm(q, w.t())[:rows]
    return torch._int_mm(q, w.t(), out=out)
