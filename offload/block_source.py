"""What every way of bringing blocks has in common."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from offload.timeline import Timeline


class BlockSource(Protocol):
    """`Ring` (slots filled from disk or host memory), `PagedBlocks` (the mapped file, its pages brought ahead) and
    `MappedBlocks` (the mapped file, copied to a device where it is not computed on).

    visit(name): the block's tensors by name, valid while the context is open. copied_bytes: over a link. read_bytes:
    from files, but for what a `Reader` counts. mapped_bytes: of files, the most that was brought into memory and
    mapped at once.
    """

    timeline: Timeline
    visits: int

    @property
    def copied_bytes(self) -> int: ...

    @property
    def read_bytes(self) -> int: ...

    @property
    def mapped_bytes(self) -> int: ...

    def visit(self, name: str) -> AbstractContextManager[Mapping[str, Tensor]]: ...
