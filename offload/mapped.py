"""Blocks used where the file is mapped: nothing is read ahead of use but pages, nothing is copied but what must be.

The plain way of visiting blocks, for computing on a CPU out of the page cache and for devices that the
ring has no implementation for. A file cut short while it is mapped ends the process (SIGBUS), which is
why streaming reads instead.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from offload.blocks import ALIGNMENT, Block, Extent, TensorSource
from offload.checkpoint import Checkpoint
from offload.devices import aligned_buffer
from offload.timeline import Timeline


class MappedBlocks:
    """`visit`s blocks of an open checkpoint as `Ring` does, one at a time. A context manager.

    On the CPU the tensors are views of the mapping, but for those that have to be put together from
    parts, and floats that the file does not align (kernels round by address: these bits are those of the
    ring's slots); elsewhere they are copies on `device`, gone with the visit. While one block is computed on, the
    system is asked to bring the pages of the next one, in the order of `blocks`, round and round.
    keep_bytes: of the file's pages, what may stay in memory between visits; None for all. The first blocks
    stay, always the same ones, and the pages of the others are let go of after each visit.
    Owns one descriptor per file until `close`; the checkpoint is the caller's.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        blocks: Sequence[Block],
        device: torch.device | None = None,
        *,
        keep_bytes: int | None = None,
    ) -> None:
        self.copied_bytes = 0
        self.visits = 0
        self.timeline = Timeline()
        self._checkpoint = checkpoint
        self._blocks = {block.name: block for block in blocks}
        self._next = dict(zip(self._blocks, [*list(blocks)[1:], *list(blocks)[:1]], strict=True))
        self._device = torch.device("cpu") if device is None else device
        self._passing = frozenset() if keep_bytes is None else _beyond(blocks, keep_bytes)
        self._descriptors: dict[Path, int] = {}
        if hasattr(os, "posix_fadvise"):
            try:
                for path in checkpoint.files:
                    self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                self.close()
                raise

    @contextmanager
    def visit(self, name: str) -> Iterator[Mapping[str, Tensor]]:
        """Lend the weights of a block. Raises KeyError."""
        asked = time.perf_counter()
        weights = {source.name: self._tensor(source) for source in self._blocks[name].sources}
        self.prefetch(self._next[name].name)
        self.visits += 1
        lent = time.perf_counter()
        self.timeline.add("wait", name, asked, lent)
        try:
            yield weights
        finally:
            self.timeline.add("compute", name, lent, time.perf_counter())
            if name in self._passing:
                self._let_go(self._blocks[name])

    def _let_go(self, block: Block) -> None:
        for extent in block.layout.extents:
            self._checkpoint.release(extent.path, extent.offset, extent.nbytes)
            self._advise(extent, "POSIX_FADV_DONTNEED")

    def _tensor(self, source: TensorSource) -> Tensor:
        if self._device.type == "cpu":
            return read_aligned(self._checkpoint, source)
        tensor = read_source(self._checkpoint, source)
        self.copied_bytes += tensor.nbytes
        return tensor.to(self._device)

    def prefetch(self, name: str) -> None:
        """Ask the system to bring the pages of a block; returns at once."""
        for extent in self._blocks[name].layout.extents:
            self._advise(extent, "POSIX_FADV_WILLNEED")

    def _advise(self, extent: Extent, advice: str) -> None:
        if extent.path in self._descriptors:
            os.posix_fadvise(self._descriptors[extent.path], extent.offset, extent.nbytes, getattr(os, advice))

    def close(self) -> None:
        """Close the descriptors. May be called twice."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> MappedBlocks:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _beyond(blocks: Sequence[Block], keep_bytes: int) -> frozenset[str]:
    """The blocks that do not fit into `keep_bytes` after those before them."""
    ends = accumulate(block.nbytes for block in blocks)
    return frozenset(block.name for block, end in zip(blocks, ends, strict=True) if end > keep_bytes)


def read_aligned(checkpoint: Checkpoint, source: TensorSource) -> Tensor:
    """`read_source`, floats that the file does not align copied to where a slot would align them.

    CPU kernels round by address: so the same arithmetic has the same bits here and in a slot. Integers
    are never computed on as they lie.
    """
    tensor = read_source(checkpoint, source)
    if not tensor.dtype.is_floating_point or tensor.data_ptr() % ALIGNMENT == 0 or tensor.numel() == 0:
        return tensor
    copy = aligned_buffer(tensor.nbytes).view(tensor.dtype).reshape(tensor.shape)
    return copy.copy_(tensor)


def read_source(checkpoint: Checkpoint, source: TensorSource) -> Tensor:
    """One tensor of a block on the CPU: a view of the mapped file where `source.is_view`, else a copy."""
    if source.is_view:
        return checkpoint.tensor(source.parts[0].tensor.name).reshape(source.shape)
    result = torch.empty(source.shape, dtype=source.dtype)
    start = 0
    for part in source.parts:
        stored = checkpoint.tensor(part.tensor.name)
        rows = result.narrow(0, start, part.shape[0]) if part.shape else result
        rows.copy_(stored.reshape(part.shape) if stored.numel() == rows.numel() else stored.reshape(()))
        start += rows.shape[0] if part.shape else 0
    return result
