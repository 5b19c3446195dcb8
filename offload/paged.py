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
from offload.devices import Cancelled, CourierThread, HostCounter, Wait, aligned_buffer
from offload.handover import Handover
from offload.identity import check_before_read
from offload.mapped import copy_source, is_used_in_place, read_source
from offload.paging import HUGE_PAGE, PageTable
from offload.residency import ResidencyPlan, Tier
from offload.rounds import Rounds
from offload.timeline import Timeline

# Ahead of the compute, beyond the next block, no more than this is mapped: pages let go of and soon taken again are
# still warm, in the caches and in a virtual machine's tables, and reading needs no longer a run.
AHEAD_BYTES = 256 << 20


class PagedBlocks:
    """The weights of `blocks`, one block at a time, as `Ring` lends them. A context manager.

    with paged.visit("layers.3") as weights: name -> tensor on the CPU, valid until the visit ends

    Tensors are read-only views of the mapped file; copied are those put together from parts, and floats of a dtype in
    `computed` (None: any) that the file does not align, so that kernels give them the bits of a slot. See
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
        computed: Collection[torch.dtype] | None = None,
    ) -> None:
        """Raises OSError where a file cannot be opened again."""
        self.seeks = 0
        self.visits = 0
        self.read_bytes = 0
        self.mapped_bytes = 0  # the most at once
        self.timeline = Timeline()
        self._checkpoint = checkpoint
        self._blocks = list(blocks)
        self._keep_cache = keep_cache
        self._computed = computed
        self._window = plan.ring_bytes
        self._copies = aligned_buffer(max((copied_bytes(block, computed) for block in blocks), default=0))
        self._rounds = Rounds([block.name for block in blocks], once)
        self._staying = {self._rounds.index[name] for name, tier in plan.tiers.items() if tier is Tier.DEVICE}
        self._brought: set[int] = set()  # of those that stay
        self._reading_since: float | None = None
        self._worker: CourierThread | None
        self._stopping = False
        self._visiting: str | None = None
        self._closed = False
        self._cursor = 0
        self._handed, self._released = Handover[int](HostCounter()), HostCounter()
        self._settled: set[int] = set()  # of those brought, no longer counted
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
        self._worker = CourierThread(self._courier(0)) if self._blocks else None

    # The caller's side

    @contextmanager
    def visit(self, name: str) -> Iterator[Mapping[str, Tensor]]:
        """Lend the weights of a block. Raises ValueError inside another visit and once closed, KeyError."""
        if self._closed or self._visiting is not None:
            raise ValueError(f"block {name} cannot be visited: {self._visiting or 'closed'}")
        asked = time.perf_counter()
        index = self._rounds.index[name]
        was_handed = self._take(index)
        self._visiting = f"block {name} is being visited"
        self.visits += 1
        lent = time.perf_counter()
        self.timeline.add("wait", name, asked, lent)
        try:
            yield self._weights(self._blocks[index])
        finally:
            self._visiting = None
            self.timeline.add("compute", name, lent, time.perf_counter())
            if index in self._staying:
                self._settled.add(index)
            if was_handed:
                self._released.advance()

    def _weights(self, block: Block) -> dict[str, Tensor]:
        """Views, and in the room for them the copies."""
        weights, used = {}, 0
        for source in block.sources:
            if is_used_in_place(source, self._computed):
                weights[source.name] = read_source(self._checkpoint, source)
                continue
            nbytes = block.layout.tensors[source.name].nbytes
            room = self._copies[used : used + nbytes].view(source.dtype).reshape(source.shape)
            weights[source.name] = copy_source(self._checkpoint, source, room)
            used += aligned(nbytes)
        return weights

    def _take(self, index: int) -> bool:
        """Return once the pages of the block are there, whether they were brought for this visit; seeks where the
        courier is elsewhere."""
        if index in self._settled:
            return False  # and the courier is where it was
        expected = self._worker is not None and self._rounds.next(self._cursor, self._is_moving) == index
        if not expected or self._next_handed() != index:  # whatever was expected, what is brought decides
            self._seek(index)
            if index in self._settled:  # it had been brought to stay, and not been asked for yet
                return False
            found = self._next_handed()
            assert found == index, "a courier begins with what was sought"
        self._cursor = index + 1
        return True

    def _next_handed(self) -> int | None:
        """`Handover.next`, of indices. Where it raises, the courier is at an end."""
        try:
            return self._handed.next()
        except BaseException:
            self._stop()
            raise

    def _is_moving(self, index: int) -> bool:
        return index not in self._settled

    def _seek(self, index: int) -> None:
        """Let the courier start over at a block."""
        if self._worker is not None:
            self.seeks += 1
        self._stop()
        self._reset(index)
        self._worker = CourierThread(self._courier(index))

    def _reset(self, index: int) -> None:
        self._cursor = index
        self._handed, self._released = Handover[int](HostCounter()), HostCounter()
        # Brought to stay, but perhaps never asked for: the courier will not bring it again.
        self._settled = set(self._brought)

    def _stop(self) -> None:
        """End the courier; returns once it touches nothing any more and has let go of what was ahead."""
        if self._worker is not None:
            self._stopping = True
            self._released.fail(Cancelled())
            self._worker.join()
            self._worker = None
        self._stopping = False

    def close(self) -> None:
        """End the courier and let go of all pages. May be called twice. Tensors of visits stay readable, slowly."""
        self._closed = True
        self._stop()
        self._handed.fail(ValueError("closed while a block was waited for"))  # by another thread
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


def copied_bytes(block: Block, computed: Collection[torch.dtype] | None = None) -> int:
    """Room that a visit of a mapped block takes for copies, alignment included."""
    return sum(
        aligned(block.layout.tensors[source.name].nbytes)
        for source in block.sources
        if not is_used_in_place(source, computed)
    )
