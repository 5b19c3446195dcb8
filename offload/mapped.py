"""Blocks taken out of the mapped file when they are visited: the plain way, without a budget or a thread.

For devices that the ring has no implementation for. A file cut short while it is mapped ends the process (SIGBUS).
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from offload.blocks import ALIGNMENT, Block, Extent, TensorSource
from offload.checkpoint import Checkpoint
from offload.devices import aligned_buffer
from offload.timeline import Timeline


class MappedBlocks:
    """`visit`s blocks of an open checkpoint as `Ring` does, one at a time. A context manager.

    On the CPU the tensors are those of `read_aligned`; elsewhere they are copies on `device`, gone with the visit.
    While one block is computed on, the system is asked to bring the pages of the next one, in the order of
    `blocks`, round and round. `PagedBlocks` brings them itself, and keeps within a budget.
    Owns one descriptor per file until `close`; the checkpoint is the caller's.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        blocks: Sequence[Block],
        device: torch.device | None = None,
    ) -> None:
        self.copied_bytes = 0
        self.read_bytes = self.mapped_bytes = 0  # nobody counts pages here
        self.visits = 0
        self.timeline = Timeline()
        self._checkpoint = checkpoint
        self._blocks = {block.name: block for block in blocks}
        self._next = dict(zip(self._blocks, [*list(blocks)[1:], *list(blocks)[:1]], strict=True))
        self._device = torch.device("cpu") if device is None else device
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

    def _tensor(self, source: TensorSource) -> Tensor:
        if self._device.type == "cpu":
            return read_aligned(self._checkpoint, source)
        tensor = read_source(self._checkpoint, source)
        self.copied_bytes += tensor.nbytes
        return tensor.to(self._device)

    def prefetch(self, name: str) -> None:
        """Ask the system to bring the pages of a block; returns at once."""
        for extent in self._blocks[name].layout.extents:
            if extent.path in self._descriptors:
                descriptor = self._descriptors[extent.path]
                os.posix_fadvise(descriptor, extent.offset, extent.nbytes, os.POSIX_FADV_WILLNEED)

    def forget(self, name: str) -> None:
        """Of a block that was read in passing, leave no pages in the page cache that would be in the way of large ones.

        Where a file cannot be opened again they stay, which costs time and nothing else.
        """
        by_file: dict[Path, list[Extent]] = {}
        for extent in self._blocks[name].layout.extents:
            by_file.setdefault(extent.path, []).append(extent)
        # One at a time: of many files, not all may be open twice.
        for path in by_file.keys() & self._descriptors.keys():
            with suppress(OSError), closing(self._checkpoint.pages(path)) as pages:
                for extent in by_file[path]:
                    pages.forget(extent.offset, extent.nbytes)

    def close(self) -> None:
        """Close the descriptors. May be called twice."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> MappedBlocks:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def is_used_in_place(source: TensorSource, to_align: Collection[torch.dtype] | None = None) -> bool:
    """Whether `read_aligned` gives a view of the mapped file."""
    info = source.parts[0].tensor
    must_align = info.torch_dtype.is_floating_point and (to_align is None or info.torch_dtype in to_align)
    return source.is_view and info.offset % (ALIGNMENT if must_align else info.torch_dtype.itemsize) == 0


def read_aligned(
    checkpoint: Checkpoint, source: TensorSource, to_align: Collection[torch.dtype] | None = None
) -> Tensor:
    """`read_source`, floats that the file does not align copied to where a slot would align them.

    CPU kernels may round by address: so the same arithmetic has the same bits here and in a slot. Products of
    integers are exact; floats of a dtype that is not in `to_align` (None: all are) are converted first, or multiplied
    by kernels that do not mind.
    """
    tensor = read_source(checkpoint, source)
    if is_used_in_place(source, to_align) or not tensor.dtype.is_floating_point or tensor.numel() == 0:
        return tensor
    if tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    copy = aligned_buffer(tensor.nbytes).view(tensor.dtype).reshape(tensor.shape)
    return copy.copy_(tensor)


def read_source(checkpoint: Checkpoint, source: TensorSource) -> Tensor:
    """One tensor of a block on the CPU: a view of the mapped file where `source.is_view`, else a copy."""
    if source.is_view:
        return checkpoint.tensor(source.parts[0].tensor.name).reshape(source.shape)
    return copy_source(checkpoint, source, torch.empty(source.shape, dtype=source.dtype))


def copy_source(checkpoint: Checkpoint, source: TensorSource, result: Tensor) -> Tensor:
    """Put a tensor of a block together in `result`, of its shape and dtype."""
    start = 0
    for part in source.parts:
        stored = checkpoint.tensor(part.tensor.name)
        rows = result.narrow(0, start, part.shape[0]) if part.shape else result
        rows.copy_(stored.reshape(part.shape) if stored.numel() == rows.numel() else stored.reshape(()))
        start += rows.shape[0] if part.shape else 0
    return result
