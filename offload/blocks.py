"""Blocks of tensors, each laid out in one contiguous slot.

A block is what one visit needs, usually a transformer layer or half of one. Its slot looks like this:

    | tensor | tensor | fused q k v | ... | raw | raw |
    0        256-byte aligned, in file order    nbytes

Every tensor begins on a 256-byte boundary, the parts of a fused one follow each other without a gap, and
tensors lie in file order, so that neighbours in the file are neighbours in the slot and are read at once.

Bytes land where the block computes on them, with one exception: what cannot be had by moving bytes (a
scale cast to fp32, a scalar repeated per row) is read into the raw area at the end of the slot and cast
into its place on the copy stream. So a slot is all there is of a block, and a block that stays on the
device has the same layout, alignment and bits as one that is streamed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from offload.checkpoint import Checkpoint
from offload.header import TensorInfo, shown

ALIGNMENT = 256


@dataclass(frozen=True)
class Part:
    """One file tensor as it stands in a parameter.

    shape: its shape there. It holds the same number of elements as the file's, reshaped, or the file
    holds a single one, to be repeated.
    """

    tensor: TensorInfo
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorSource:
    """A tensor of a block: its parts stacked along rows, cast to `dtype`.

    Raises ValueError when the parts do not make up the shape.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(part.tensor.nbytes for part in self.parts)

    @property
    def is_view(self) -> bool:
        """Whether the tensor is one run of the file's bytes, usable without a copy."""
        part = self.parts[0]
        return len(self.parts) == 1 and part.tensor.torch_dtype == self.dtype

    def __post_init__(self) -> None:
        for part in self.parts:
            stored = math.prod(part.tensor.shape)
            if stored not in (1, math.prod(part.shape)):
                raise ValueError(f"{self.name}: {shown(part.tensor.name)} has {stored} elements for {part.shape}")
        elements = sum(math.prod(part.shape) for part in self.parts)
        if elements != math.prod(self.shape):
            raise ValueError(
                f"{self.name}: its parts have {elements} elements, {self.shape} takes {math.prod(self.shape)}"
            )

    @classmethod
    def plain(cls, info: TensorInfo, name: str | None = None) -> TensorSource:
        """A file tensor as it is stored, under its own or another name."""
        return cls(info.name if name is None else name, info.shape, info.torch_dtype, (Part(info, info.shape),))


@dataclass(frozen=True)
class Block:
    """A named unit of streaming and the tensors one visit to it needs."""

    name: str
    sources: tuple[TensorSource, ...]

    @classmethod
    def under(cls, checkpoint: Checkpoint, prefix: str) -> Block:
        """All tensors whose names start with `prefix`, as they are stored, named by what follows it.

        The block is named after the prefix without its last dot. Raises KeyError when there are none.
        """
        infos = [info for name, info in checkpoint.tensors.items() if name.startswith(prefix)]
        if not infos:
            raise KeyError(f"no tensor of {checkpoint.files[0]} starts with {shown(prefix)}")
        sources = tuple(TensorSource.plain(info, info.name.removeprefix(prefix)) for info in infos)
        return cls(prefix.removesuffix("."), sources)

    @cached_property
    def layout(self) -> SlotLayout:
        return lay_out(self.sources)

    @property
    def nbytes(self) -> int:
        """Bytes of its slot, alignment included: a multiple of 256."""
        return self.layout.nbytes


@dataclass(frozen=True)
class Extent:
    """`nbytes` of a file at `offset`, and where they belong in a buffer."""

    path: Path
    offset: int
    nbytes: int
    target: int


@dataclass(frozen=True)
class SlotTensor:
    """A typed range of a slot. A count of 1 in `elements` under a larger shape means: repeated."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    elements: int

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize

    def view(self, slot: Tensor) -> Tensor:
        flat = slot[self.offset : self.offset + self.nbytes].view(self.dtype)
        return flat.reshape(self.shape) if self.elements == math.prod(self.shape) else flat.expand(self.shape)


@dataclass(frozen=True)
class Chunk:
    """A window of a slot: its range, and what to read into a buffer of that size."""

    offset: int
    nbytes: int
    extents: tuple[Extent, ...]


@dataclass(frozen=True)
class SlotLayout:
    """Where the tensors of a block lie in its slot of `nbytes` bytes, and what to read to fill it.

    extents: in file order, merged where they touch in the file and in the slot.
    casts: (raw, place) pairs; `raw` is read from the file, `place` lies inside a tensor.
    """

    nbytes: int
    tensors: Mapping[str, SlotTensor]
    extents: tuple[Extent, ...]
    casts: tuple[tuple[SlotTensor, SlotTensor], ...]

    @property
    def read_bytes(self) -> int:
        """Bytes read from files to fill the slot once."""
        return sum(extent.nbytes for extent in self.extents)

    def views(self, slot: Tensor) -> dict[str, Tensor]:
        """The tensors by name as views of `slot`, uint8 and at least `nbytes` long, on any device."""
        return {name: tensor.view(slot) for name, tensor in self.tensors.items()}

    def cast_views(self, slot: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(target, source) pairs: copying each completes a slot whose extents were read."""
        return [(place.view(slot), raw.view(slot)) for raw, place in self.casts]

    def chunks(self, chunk_bytes: int) -> Iterator[Chunk]:
        """The slot cut into windows of `chunk_bytes`, the last one shorter; extent targets count from their start."""
        for start in range(0, self.nbytes, chunk_bytes):
            end = min(start + chunk_bytes, self.nbytes)
            cut = (_intersection(extent, start, end) for extent in self.extents)
            yield Chunk(start, end - start, tuple(extent for extent in cut if extent.nbytes > 0))


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to a multiple of ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def lay_out(sources: Sequence[TensorSource]) -> SlotLayout:
    """Place the tensors of a block in a slot. Raises ValueError for two tensors of one name."""
    tensors: dict[str, SlotTensor] = {}
    extents: list[Extent] = []
    to_cast: list[tuple[TensorInfo, SlotTensor]] = []
    end = 0
    for source in sorted(sources, key=lambda source: _file_order(source.parts[0].tensor)):
        if source.name in tensors:
            raise ValueError(f"a block has two tensors named {shown(source.name)}")
        elements = math.prod(source.shape)
        tensors[source.name] = SlotTensor(aligned(end), source.dtype, source.shape, elements)
        end = aligned(end)
        for part in source.parts:
            place = SlotTensor(end, source.dtype, part.shape, math.prod(part.shape))
            if part.tensor.torch_dtype == source.dtype and part.tensor.nbytes == place.nbytes:
                extents.append(Extent(part.tensor.path, part.tensor.offset, place.nbytes, end))
            else:
                to_cast.append((part.tensor, place))
            end += place.nbytes
    casts: list[tuple[SlotTensor, SlotTensor]] = []
    for info, place in sorted(to_cast, key=lambda cast: _file_order(cast[0])):
        raw = SlotTensor(aligned(end), info.torch_dtype, place.shape, math.prod(info.shape))
        extents.append(Extent(info.path, info.offset, raw.nbytes, raw.offset))
        casts.append((raw, place))
        end = raw.offset + raw.nbytes
    # A slot of no bytes would be no place at all; a multiple of the alignment keeps the next slot aligned.
    return SlotLayout(max(aligned(end), ALIGNMENT), tensors, _merged(extents), tuple(casts))


def _file_order(info: TensorInfo) -> tuple[Path, int]:
    return info.path, info.offset


def _merged(extents: Sequence[Extent]) -> tuple[Extent, ...]:
    """Extents in file order; neighbours in both file and slot become one."""
    merged: list[Extent] = []
    for extent in sorted(extents, key=lambda extent: (extent.path, extent.offset, extent.target)):
        if extent.nbytes == 0:
            continue
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.path == extent.path
            and last.offset + last.nbytes == extent.offset
            and last.target + last.nbytes == extent.target
        ):
            merged[-1] = Extent(last.path, last.offset, last.nbytes + extent.nbytes, last.target)
        else:
            merged.append(extent)
    return tuple(merged)


def _intersection(extent: Extent, start: int, end: int) -> Extent:
    """What of `extent` lands in [start, end) of the slot, its target counted from `start`."""
    first = max(extent.target, start)
    last = min(extent.target + extent.nbytes, end)
    return Extent(extent.path, extent.offset + first - extent.target, last - first, first - start)
