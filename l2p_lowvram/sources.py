"""Parameters as stacks of file tensors, and what a scale tensor says about a linear layer.

The rules that models and text encoders share; `layout.py` and `encoder.py` know the names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from offload import CheckpointError, Part, TensorInfo, TensorSource
from offload.header import shown

from .linear import Rotation, scale_block
from .markers import LayerMarker
from .naming import SCALE

_FLOATS = frozenset({"F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
_SCALE_FLOATS = frozenset({"F32", "F16", "BF16"})


@dataclass(frozen=True)
class LinearQuantization:
    """How a linear layer's weight is stored: weight = stored * weight_scale, un-rotated.

    block: rows and columns of the weight that share a scale.
    """

    dtype: str
    block: tuple[int, int]
    shape: tuple[int, int]
    rotation: Rotation | None = None
    full_precision_matmul: bool = False

    @property
    def by_row(self) -> bool:
        """Whether every row has a single scale."""
        return self.block[1] == self.shape[1]

    @property
    def granularity(self) -> str:
        """What shares a scale: "tensor", "row" or "block N"."""
        if self.block == self.shape:
            return "tensor"
        return "row" if self.block[0] == 1 else f"block {self.block[0]}"


def total_bytes(sources: Iterable[TensorSource]) -> int:
    return sum(source.nbytes for source in sources)


def weight_source(name: str, shape: tuple[int, ...], tensors: list[TensorInfo], *, may_be_int8: bool) -> TensorSource:
    """A parameter from its file tensors; raises CheckpointError for wrong shapes and dtypes."""
    part_shape = (shape[0] // len(tensors), *shape[1:])
    allowed = _FLOATS | {"I8"} if may_be_int8 else _FLOATS
    for info in tensors:
        if info.shape != part_shape:
            got, wanted = list(info.shape), list(part_shape)
            raise CheckpointError(info.path, f"tensor {shown(info.name)} has shape {got}, expected {wanted}")
        if info.dtype not in allowed:
            what = "a linear layer's weight" if may_be_int8 else "this tensor"
            raise CheckpointError(info.path, f"tensor {shown(info.name)} is {info.dtype}, which {what} cannot be")
        if (info.dtype == "I8") != (tensors[0].dtype == "I8"):
            both = f"{info.dtype} but {shown(tensors[0].name)} is {tensors[0].dtype}"
            raise CheckpointError(info.path, f"tensor {shown(info.name)} is {both}; they cannot be fused")
    dtypes = {info.torch_dtype for info in tensors}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return TensorSource(name, shape, dtype, tuple(Part(info, part_shape) for info in tensors))


def linear_quantization(
    module: str, weight: TensorSource, scales: Sequence[TensorInfo | None], marker: LayerMarker
) -> tuple[TensorSource, LinearQuantization] | None:
    """The scale of a linear layer and how it is stored; None if it is a plain float layer.

    scales: one per part of the weight. FP8 without a scale is a plain float: ComfyUI casts such
    files as they are. Raises CheckpointError.
    """
    for part, scale in zip(weight.parts, scales, strict=True):
        tensor = part.tensor
        marker.check_dtype(tensor)
        marker.check_columns(tensor)
        if scale is None and (tensor.dtype == "I8" or marker.rotation or any(scales)):
            kind = "rotated" if marker.rotation else tensor.dtype
            reason = f"tensor {shown(tensor.name)} is {kind} but has no {SCALE}"
            raise CheckpointError(tensor.path, reason)
    pairs = [(part, scale) for part, scale in zip(weight.parts, scales, strict=True) if scale is not None]
    if not pairs:
        return None
    source, block = _scale_source(f"{module}.{SCALE}", weight, pairs)
    rows, columns = weight.shape
    dtype = weight.parts[0].tensor.dtype
    return source, LinearQuantization(dtype, block, (rows, columns), marker.rotation, marker.full_precision_matmul)


def _scale_source(
    name: str, weight: TensorSource, pairs: list[tuple[Part, TensorInfo]]
) -> tuple[TensorSource, tuple[int, int]]:
    """A layer's scale, and the rows and columns of the weight that each of its elements covers.

    Scales of several parts are stacked; a part with a single one repeats it as often as its
    neighbours' finer rule, or else per row, needs. Raises CheckpointError.
    """
    columns = weight.shape[1]
    blocks = [_scale_block(part, info) for part, info in pairs]
    whole = [block == part.shape for block, (part, _) in zip(blocks, pairs, strict=True)]
    if len(pairs) == 1:
        shape = () if whole[0] else _grid(weight.shape, blocks[0])
        return TensorSource(name, shape, torch.float32, (Part(pairs[0][1], shape),)), blocks[0]
    finer = {block for block, is_whole in zip(blocks, whole, strict=True) if not is_whole} or {(1, columns)}
    if len(finer) > 1:
        spelled = ", ".join(f"{shown(info.name)} {list(info.shape)}" for _, info in pairs)
        raise CheckpointError(pairs[0][1].path, f"scales {spelled} follow different rules and cannot be fused")
    block = finer.pop()
    parts = tuple(Part(info, _grid(part.shape, block)) for part, info in pairs)
    return TensorSource(name, _grid(weight.shape, block), torch.float32, parts), block


def _scale_block(part: Part, scale: TensorInfo) -> tuple[int, int]:
    if scale.dtype not in _SCALE_FLOATS:
        raise CheckpointError(scale.path, f"tensor {shown(scale.name)} is {scale.dtype}; a scale is F32, F16 or BF16")
    rows, columns = part.shape
    try:
        return scale_block(scale.shape, rows, columns)
    except ValueError as error:
        raise CheckpointError(scale.path, f"tensor {shown(scale.name)}: {error}") from None


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """How many blocks a weight has along rows and columns."""
    return shape[0] // block[0], shape[1] // block[1]
