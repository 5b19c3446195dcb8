"""Blocks computed on where the file is mapped, their pages brought in ahead of the compute.

For computing on a CPU, whose kernels read a mapped page like any other: the bytes go from the disk to where they are
multiplied without being copied, which leaves the processors to the compute. `Ring` does the same with slots of its
own, for devices and for files whose tensors would have to be copied after all.

                courier                    caller
    file --populate--> mapped pages ==> compute ==> let go

The courier keeps at most the plan's ring of bytes mapped: the block at hand and what is ahead of it. Blocks that the
plan keeps on the device are brought once. Ordered by two counters: the caller waits until a block has been brought,
the courier until so many visits have been released that the next piece fits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from offload.blocks import Block, Extent, aligned
from offload.checkpoint import Checkpoint
from offload.devices import Counter, CourierThread, HostCounter, Wait, Worker, aligned_buffer
from offload.identity import check_before_read
from offload.mapped import copy_source, is_used_in_place, read_source
from offload.paging import HUGE_PAGE, PageTable
from offload.residency import ResidencyPlan, Tier
from offload.rounds import Rounds
from offload.visits import Visits

# Ahead of the compute, beyond the next block, no more than this is mapped: pages let go of and soon taken again are
# still warm, in the caches and in a virtual machine's tables, and reading needs no longer a run.
AHEAD_BYTES = 256 << 20


class PagedBlocks(Visits[int]):
    """The weights of `blocks`, one block at a time, as `Ring` lends them. A context manager.

    with paged.visit("layers.3") as weights: name -> tensor on the CPU, valid until the visit ends

    Tensors are read-only views of the mapped file; copied are those put together from parts, and floats of a dtype in
    `to_align` (None: any) that the file does not align, so that kernels which mind give them the bits of a slot. See
    `copied_bytes`. plan: made with those bytes set aside; its tiers say what stays, its ring how much is mapped
    besides. `once`, `keep_cache` and the order of visits are those of `Ring`.

    A file that changed is refused before each block, and one cut short while its pages are brought is an error on
    Linux; cut short between that and the compute it ends the process (SIGBUS), as with any mapping.
    Owns one thread and one descriptor per file until `close`. For one thread at a time.
    """

    copied_bytes = 0  # over a link: there is none

    def __init__(
        self,
        checkpoint: Checkpoint,
        blocks: Sequence[Block],
        plan: ResidencyPlan,
        *,
        once: Collection[str] = (),
        keep_cache: bool = False,
        to_align: Collection[torch.dtype] | None = None,
    ) -> None:
        """Raises OSError where a file cannot be opened again."""
        super().__init__(Rounds([block.name for block in blocks], once))
        self.read_bytes = 0
        self.mapped_bytes = 0  # the most at once
        self._checkpoint = checkpoint
        self._blocks = list(blocks)
        self._keep_cache = keep_cache
        self._to_align = to_align
        self._window = plan.ring_bytes
        self._copies = aligned_buffer(max((copied_bytes(block, to_align) for block in blocks), default=0))
        self._staying = {self._rounds.index[name] for name, tier in plan.tiers.items() if tier is Tier.DEVICE}
        self._brought: set[int] = set()  # of those that stay
        self._reading_since: float | None = None
        self._settled: set[int] = set()  # of those brought, no longer counted
        self._reset(0)
        self._tables: dict[Path, PageTable] = {}
        with ExitStack() as stack:
            for path in {extent.path for block in blocks for extent in block.layout.extents}:
                self._tables[path] = checkpoint.pages(path)
                stack.callback(self._tables[path].close)
            for block in blocks:
                for extent in block.layout.extents:
                    self._tables[extent.path].expect(extent.offset, extent.nbytes)
            stack.pop_all()
        # What comes before the first visit takes a while: the first block may be there by then.
        self._worker = self._start(0) if self._blocks else None

    # The caller's side

    @contextmanager
    def visit(self, name: str) -> Iterator[Mapping[str, Tensor]]:
        """Lend the weights of a block. Raises ValueError inside another visit and once closed, KeyError."""
        self._owner.require("the mapped file")
        asked = time.perf_counter()
        with self._using:
            self._require_open(name)
            index = self._rounds.index[name]
            is_passing = self._take(index) is not None
            weights = self._weights(self._blocks[index])
            self._visiting = f"block {name} is being visited"
        self.visits += 1
        lent = time.perf_counter()
        self.timeline.add("wait", name, asked, lent)
        try:
            yield weights
        finally:
            self._visiting = None
            self.timeline.add("compute", name, lent, time.perf_counter())
            if index in self._staying:
                self._settled.add(index)
            if is_passing:
                self._released.advance()

    def _weights(self, block: Block) -> dict[str, Tensor]:
        """Views, and in the room for them the copies."""
        weights, used = {}, 0
        for source in block.sources:
            if is_used_in_place(source, self._to_align):
                weights[source.name] = read_source(self._checkpoint, source)
                continue
            nbytes = block.layout.tensors[source.name].nbytes
            room = self._copies[used : used + nbytes].view(source.dtype).reshape(source.shape)
            weights[source.name] = copy_source(self._checkpoint, source, room)
            used += aligned(nbytes)
        return weights

    def _start(self, index: int) -> Worker:
        return CourierThread(self._courier(index))

    def _new_counter(self) -> Counter:
        return HostCounter()

    def _begin_anew(self) -> None:
        # Brought to stay, but perhaps never asked for: the courier will not bring it again.
        self._settled = set(self._brought)

    def _is_settled(self, index: int) -> bool:
        return index in self._settled

    def _index_of(self, brought: int) -> int:
        return brought

    def close(self) -> None:
        """End the courier and let go of all pages. May be called twice. Tensors of visits stay readable, slowly."""
        if self._owner.is_another:
            return
        self._end()
        with self._using:
            for index in self._brought:
                self._let_go(index)
            self._brought.clear()
            self._copies = torch.empty(0, dtype=torch.uint8)
            while self._tables:
                self._tables.popitem()[1].close()

    def __enter__(self) -> PagedBlocks:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # The courier's side

    def _courier(self, start: int) -> Iterator[Wait]:
        """Bring blocks from the one at `start` on, round and round, until stopped or all that repeat stay."""
        passing: deque[tuple[int, int]] = deque()  # (visit, block) brought or being brought, to be let go of
        mapped = 0  # bytes of them
        staying = sum(self._blocks[index].layout.read_bytes for index in self._brought)
        unfinished: int | None = None  # of those that stay
        try:
            for visit, index in enumerate(self._to_bring(start)):
                block, stays = self._blocks[index], index in self._staying
                if stays:
                    unfinished = index
                else:
                    passing.append((visit, index))
                self._check(block)
                for piece in _pieces(block):
                    while not stays and self._is_far_ahead(mapped + piece.nbytes, len(passing)):
                        self._note_reading(block)
                        yield self._released, passing[0][0] + 1
                        mapped -= self._let_go(passing.popleft()[1])
                    if self._stopping:
                        return
                    self._bring(block, piece)
                    if stays:
                        staying += piece.nbytes
                    else:
                        mapped += piece.nbytes
                    self.mapped_bytes = max(self.mapped_bytes, mapped + staying)
                self._note_reading(block)
                if stays:
                    self._brought.add(index)
                    unfinished = None
                self._handed.put(index)
            self._handed.end()
            while passing:
                yield self._released, passing[0][0] + 1
                self._let_go(passing.popleft()[1])
        except Exception as error:
            self._handed.fail(error)
        finally:
            for _, index in passing:
                self._let_go(index)
            if unfinished is not None:
                self._let_go(unfinished)

    def _is_far_ahead(self, nbytes: int, blocks: int) -> bool:
        """Whether so much is too much to be mapped of blocks that pass. One alone always fits: the ring was planned
        for the largest."""
        return blocks > 1 and (nbytes > self._window or (blocks > 2 and nbytes > AHEAD_BYTES))

    def _to_bring(self, start: int) -> Iterator[int]:
        for index in self._rounds.order(start):
            if index in self._rounds.repeated and self._brought.issuperset(self._rounds.repeated):
                return
            if index not in self._brought:
                yield index

    def _check(self, block: Block) -> None:
        for path in sorted({extent.path for extent in block.layout.extents}):
            check_before_read(self._checkpoint.identities[path], path, block.name)

    def _bring(self, block: Block, piece: Extent) -> None:
        if self._reading_since is None:
            self._reading_since = time.perf_counter()
        try:
            self._tables[piece.path].populate(piece.offset, piece.nbytes)
        except OSError as error:
            self._check(block)  # has the better message where the file was cut short
            what = f"block {block.name}: {piece.nbytes} bytes at byte {piece.offset}"
            raise OSError(error.errno, f"{what} cannot be read: {error.strerror or error}", str(piece.path)) from error
        self.read_bytes += piece.nbytes

    def _note_reading(self, block: Block) -> None:
        """End a span of reading, if there is one."""
        if self._reading_since is not None:
            self.timeline.add("disk", block.name, self._reading_since, time.perf_counter())
            self._reading_since = None

    def _let_go(self, index: int) -> int:
        """Returns the block's bytes."""
        layout = self._blocks[index].layout
        for extent in layout.extents:
            self._tables[extent.path].let_go(extent.offset, extent.nbytes, drop_cache=not self._keep_cache)
        return layout.read_bytes


def _pieces(block: Block) -> Iterator[Extent]:
    """What is brought at a time: extents cut where large pages begin."""
    for extent in block.layout.extents:
        offset, end = extent.offset, extent.offset + extent.nbytes
        while offset < end:
            stop = min((offset // HUGE_PAGE + 1) * HUGE_PAGE, end)
            yield Extent(extent.path, offset, stop - offset, extent.target + offset - extent.offset)
            offset = stop


def copied_bytes(block: Block, to_align: Collection[torch.dtype] | None = None) -> int:
    """Room that a visit of a mapped block takes for copies, alignment included."""
    return sum(
        aligned(block.layout.tensors[source.name].nbytes)
        for source in block.sources
        if not is_used_in_place(source, to_align)
    )
