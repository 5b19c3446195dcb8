"""Blocks visited in a cycle, their weights moved into place ahead of the compute.

                      courier                                     caller
    file --read--> staging --copy stream--> slots ==ready==> compute stream ==free==> slots

One courier owns disk and copies; the caller computes. Between them lie a ring of device slots and, where
the device cannot be read into directly, a ring of pinned staging buffers. All of it is allocated once.
What orders it:

    read into a staging buffer    after the copy out of it (the courier waits for the `copied` event)
    copy out of it                after the read (the courier waits for the job)
    copy into a slot              after the compute that used it (the copy stream waits for `free`)
    compute on a slot             after the copy into it (the compute stream waits for `ready`)

An event must be recorded before it is waited for, so the two host threads also count: the courier's
`submitted` visits, the caller's `released` ones. In the steady state nothing is allocated and the caller
never waits for the device, only for the courier where the disk is too slow.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from torch import Tensor

from offload.blocks import ALIGNMENT, Block, Extent
from offload.devices import Counter, Device, Event, Stream, Wait, Worker
from offload.residency import ResidencyPlan, SlotCycle, Tier
from offload.rounds import Rounds
from offload.visits import Visits

STAGING_BUFFERS = 4
# Where no staging ring says how much is read at a time.
CHUNK_BYTES = 32 << 20
# Poison: NaN in every float format, -1 in every integer.
_GARBAGE = 0xFF


class Job(Protocol):
    @property
    def span(self) -> tuple[float, float] | None:
        """When the reading began and ended, in seconds, once `wait` has returned; None if nobody measured."""

    def wait(self) -> None: ...

    def cancel(self) -> None: ...


class BlockReader(Protocol):
    """What the ring needs of `offload.reading.Reader`."""

    def submit(self, label: str, extents: Sequence[Extent], buffer: Tensor, *, drop_cache: bool = False) -> Job: ...


class Ring(Visits["_Visit"]):
    """The weights of `blocks`, one block at a time. A context manager.

    with ring.visit("layers.3") as weights: name -> tensor on the device, valid until the visit ends

    Blocks are expected in their order, round and round, and prefetched in it across the end of a round;
    any other block may be visited too, but throws away what was prefetched (`seeks` counts that).
    A visit raises what went wrong while the block was read; the next one starts afresh.

    Owns the device and pinned memory of `plan`, one stream and one courier until `close`. The reader is
    the caller's, and so is `cached_reader`, for blocks that stay in the page cache, which direct reads pass by
    (None: the same). For one thread at a time. `poison` fills every slot with garbage the moment it is free.
    `once` names blocks visited before the rounds only: prefetched when the courier starts among them,
    skipped by the rounds. `keep_cache`: what was read may stay in the page cache, whatever its tier.

    Each wait and each record is a method of its own: tests take one out, and the simulator must report it.

    timeline: when the disk read ("disk"), the caller waited for the courier ("wait") and held a block ("compute");
    on a device that times visits also when it waited ("device wait") and computed ("device compute").
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        plan: ResidencyPlan,
        device: Device,
        reader: BlockReader,
        *,
        once: Collection[str] = (),
        keep_cache: bool = False,
        poison: bool = False,
        cached_reader: BlockReader | None = None,
    ) -> None:
        super().__init__(Rounds([block.name for block in blocks], once))
        self.copied_bytes = 0
        self.read_bytes = 0  # the reader counts
        self.mapped_bytes = 0
        self._keep_cache = keep_cache
        self._device = device
        self._reader = reader
        self._cached_reader = reader if cached_reader is None else cached_reader
        self._poison = poison
        self._copies = device.new_stream("copy")
        self._computed_on = device.compute_stream()
        self._timer = device.visit_timer(self.timeline)
        # Before the homes: where pins run short, the buffers that every streamed byte passes come first.
        self._staging = _staging(plan, device)
        self._homes = _homes(blocks, plan, device)
        self._slots = _slots(plan, device)
        self._cycle = SlotCycle(len(self._slots)) if self._slots else None
        self._chunk_bytes = self._staging[0].buffer.nbytes if self._staging else CHUNK_BYTES
        # Recorded once, so that waiting for them is always defined.
        for slot in self._slots:
            device.compute_stream().record(slot.free)
        for staging in self._staging:
            self._copies.record(staging.copied)
        self._views: dict[tuple[int, int], _Views] = {}
        self._reset(0)

    # The caller's side

    @contextmanager
    def visit(self, name: str) -> Iterator[Mapping[str, Tensor]]:
        """Lend the weights of a block. Raises ValueError inside another visit and once closed, KeyError, RuntimeError
        in a forked child."""
        self._owner.require("the ring")
        asked = time.perf_counter()
        with self._using:
            self._require_open(name)
            self._timer.asked(name)
            index = self._rounds.index[name]
            visit = self._take(index) or self._homes[index].settled
            assert visit is not None, "what is settled has a place"
            compute = self._computed_on = self._device.compute_stream()
            self._await_ready(visit, compute)
            self._timer.begun()
            self._visiting = f"block {name} is being visited"
        self.visits += 1
        lent = time.perf_counter()
        self.timeline.add("wait", name, asked, lent)
        try:
            yield visit.views.tensors
        finally:
            self._visiting = None
            self.timeline.add("compute", name, lent, time.perf_counter())
            with self._using:
                self._timer.done()
                self._release(visit, compute)

    def _await_ready(self, visit: _Visit, compute: Stream) -> None:
        compute.wait(visit.ready)

    def _release(self, visit: _Visit, compute: Stream) -> None:
        """Give the slots back: the copy stream may overwrite them once the compute queued so far is done."""
        if self._closed:  # inside the visit
            return
        home = self._homes[visit.index]
        if home.settled is not None:
            return
        if home.tier is Tier.DEVICE:
            home.settled = visit
        for slot in visit.slots:
            if self._poison:
                compute.fill(self._slots[slot].buffer, _GARBAGE)
            self._record_free(slot, compute)
        self._released.advance()

    def _record_free(self, slot: int, compute: Stream) -> None:
        compute.record(self._slots[slot].free)

    def _start(self, index: int) -> Worker:
        return self._device.start(self._courier(index))

    def _new_counter(self) -> Counter:
        return self._device.new_counter()

    def _begin_anew(self) -> None:
        self._last_use = [0] * len(self._slots)  # visits that must be released before a slot is free
        for home in self._homes:
            # Loaded to stay, but perhaps never asked for: the courier will not bring it again.
            if home.loaded is not None:
                home.settled = home.loaded

    def _is_settled(self, index: int) -> bool:
        return self._homes[index].settled is not None

    def _index_of(self, brought: _Visit) -> int:
        return brought.index

    def close(self) -> None:
        """End the courier and let go of all memory. May be called twice. Tensors of visits become garbage."""
        if self._owner.is_another:
            return
        self._end()
        with self._using:
            # Other streams may still use what is freed here; visits ran on the one they left in `_computed_on`.
            self._computed_on.synchronize()
            self._timer.finish()
            self._reset(0)
            self._homes, self._slots, self._staging = [], [], []
            self._views.clear()

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # The courier's side

    def _courier(self, start: int) -> Iterator[Wait]:
        """Move blocks from the one at `start` on, round and round, until stopped or all are on the device."""
        pending: deque[_Transfer] = deque()  # reads begun, not delivered
        try:
            for transfer in self._transfers(start):
                if self._stopping:
                    return
                if len(pending) == STAGING_BUFFERS:
                    yield from self._deliver(pending.popleft())
                if transfer.first and self._device.reads_into_device:
                    # What the caller is to release first may be waiting in `pending`.
                    while pending and self._released.value < self._needed(transfer.visit):
                        yield from self._deliver(pending.popleft())
                    yield from self._claim(transfer.visit)
                self._begin(transfer)
                pending.append(transfer)
            while pending:
                yield from self._deliver(pending.popleft())
            self._handed.end()
        except Exception as error:
            self._handed.fail(error)
        finally:
            for transfer in pending:
                if transfer.job is not None:
                    transfer.job.cancel()
            # The error that brought us here may have come from between two copies.
            self._copies.synchronize()

    def _transfers(self, start: int) -> Iterator[_Transfer]:
        """Every move, in order. Blocks that stay are moved once, pinned ones read once."""
        done = {index for index, home in enumerate(self._homes) if home.loaded is not None}
        read = {index for index, home in enumerate(self._homes) if home.image_filled}
        staging = count()
        number = 0
        for index in self._rounds.order(start):
            if index in self._rounds.repeated and done.issuperset(self._rounds.repeated):
                return
            if index in done:
                continue
            home = self._homes[index]
            visit = self._new_visit(number, index)
            number += 1
            for chunk in home.block.layout.chunks(self._chunk_bytes):
                window = slice(chunk.offset, chunk.offset + chunk.nbytes)
                transfer = _Transfer(visit, visit.place[window], chunk.extents)
                transfer.first = chunk.offset == 0
                transfer.last = chunk.offset + chunk.nbytes == home.block.nbytes
                if home.image is not None:
                    transfer.source = home.image[window]
                    transfer.extents = () if index in read else chunk.extents
                elif self._staging:
                    transfer.staging = self._staging[next(staging) % len(self._staging)]
                    transfer.source = transfer.staging.buffer[: chunk.nbytes]
                yield transfer
            if home.tier is Tier.DEVICE:
                done.add(index)
            if home.image is not None:
                read.add(index)

    def _new_visit(self, number: int, index: int) -> _Visit:
        home = self._homes[index]
        if home.resident is not None:
            assert home.ready is not None
            return _Visit(number, index, home.resident, range(0), home.ready, self._views_of(index, -1, home.resident))
        assert self._cycle is not None
        slot_bytes = self._slots[0].buffer.nbytes
        slots = self._cycle.take(-(-home.block.nbytes // slot_bytes))
        first = self._slots[slots[0]]
        place = first.onwards[: home.block.nbytes]
        return _Visit(number, index, place, slots, first.ready, self._views_of(index, slots[0], place))

    def _views_of(self, index: int, slot: int, place: Tensor) -> _Views:
        """Made once per block and slot."""
        if (index, slot) not in self._views:
            layout = self._homes[index].block.layout
            self._views[index, slot] = _Views(layout.views(place), layout.cast_views(place))
        return self._views[index, slot]

    def _begin(self, transfer: _Transfer) -> None:
        """Start reading."""
        if transfer.staging is not None:
            self._await_refill(transfer.staging)
        if transfer.extents:
            home = self._homes[transfer.visit.index]
            buffer = transfer.target if transfer.source is None else transfer.source
            is_cached = home.tier is Tier.CACHED
            reader = self._cached_reader if is_cached else self._reader
            drop = not (is_cached or self._keep_cache)
            transfer.job = reader.submit(home.block.name, transfer.extents, buffer, drop_cache=drop)

    def _await_refill(self, staging: _Staging) -> None:
        staging.copied.synchronize()

    def _deliver(self, transfer: _Transfer) -> Iterator[Wait]:
        """Queue the copy of what was read, and hand the block over after its last part."""
        if transfer.job is not None:
            self._await_read(transfer.job)
            if transfer.job.span is not None:
                self.timeline.add("disk", self._homes[transfer.visit.index].block.name, *transfer.job.span)
        if transfer.first and not self._device.reads_into_device:
            yield from self._claim(transfer.visit)
        if transfer.source is not None:
            self._copies.copy(transfer.target, transfer.source)
            self.copied_bytes += transfer.source.nbytes
        if transfer.staging is not None:
            self._record_copied(transfer.staging)
        if transfer.last:
            self._finish(transfer.visit)

    def _await_read(self, job: Job) -> None:
        job.wait()

    def _record_copied(self, staging: _Staging) -> None:
        self._copies.record(staging.copied)

    def _needed(self, visit: _Visit) -> int:
        """How many visits must be released before the slots of this one are free."""
        return max((self._last_use[slot] for slot in visit.slots), default=0)

    def _claim(self, visit: _Visit) -> Iterator[Wait]:
        """Wait until the slots' last users have queued their work, and let the copies wait for it."""
        yield self._released, self._needed(visit)
        for slot in visit.slots:
            self._await_free(slot)
            self._last_use[slot] = visit.number + 1

    def _await_free(self, slot: int) -> None:
        self._copies.wait(self._slots[slot].free)

    def _finish(self, visit: _Visit) -> None:
        for place, raw in visit.views.casts:
            self._copies.copy(place, raw)
        self._record_ready(visit)
        home = self._homes[visit.index]
        home.image_filled = home.image is not None
        if home.tier is Tier.DEVICE:
            home.loaded = visit
        self._handed.put(visit)

    def _record_ready(self, visit: _Visit) -> None:
        self._copies.record(visit.ready)


@dataclass
class _Home:
    """Where a block lives. `loaded` is set by the courier, `settled` by the caller, for a block that stays."""

    block: Block
    tier: Tier
    resident: Tensor | None = None
    ready: Event | None = None
    image: Tensor | None = None
    image_filled: bool = False
    loaded: _Visit | None = None
    settled: _Visit | None = None


@dataclass(frozen=True)
class _Slot:
    """`onwards` runs from this slot to the end of the ring: a large block takes its neighbours too."""

    buffer: Tensor
    onwards: Tensor
    ready: Event
    free: Event


@dataclass(frozen=True)
class _Staging:
    buffer: Tensor
    copied: Event


@dataclass(frozen=True)
class _Views:
    """A block in one place: its tensors, and the casts that complete them."""

    tensors: Mapping[str, Tensor]
    casts: Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Visit:
    """One stay of a block on the device, the `number`-th that the courier brought."""

    number: int
    index: int
    place: Tensor
    slots: range
    ready: Event
    views: _Views


@dataclass
class _Transfer:
    """One part of a block on its way: read into `source`, or straight into `target` where there is none."""

    visit: _Visit
    target: Tensor
    extents: Sequence[Extent]
    source: Tensor | None = None
    staging: _Staging | None = None
    first: bool = False
    last: bool = False
    job: Job | None = None


def _homes(blocks: Sequence[Block], plan: ResidencyPlan, device: Device) -> list[_Home]:
    """Every block with the memory that is its own: one device and one pinned allocation, cut up."""
    homes = [_Home(block, plan.tiers[block.name]) for block in blocks]
    for tier, allocate in ((Tier.DEVICE, device.device_buffer), (Tier.PINNED, device.pinned_buffer)):
        kept = [home for home in homes if home.tier is tier]
        if not kept:
            continue
        arena = allocate(sum(home.block.nbytes for home in kept))
        for home in kept:
            own, arena = arena[: home.block.nbytes], arena[home.block.nbytes :]
            if tier is Tier.DEVICE:
                home.resident, home.ready = own, device.new_event()
            else:
                home.image = own
    return homes


def _slots(plan: ResidencyPlan, device: Device) -> list[_Slot]:
    if not plan.slots:
        return []
    arena = device.device_buffer(plan.ring_bytes)
    starts = range(0, plan.ring_bytes, plan.slot_bytes)
    return [
        _Slot(arena[start : start + plan.slot_bytes], arena[start:], device.new_event(), device.new_event())
        for start in starts
    ]


def _staging(plan: ResidencyPlan, device: Device) -> list[_Staging]:
    if device.reads_into_device:
        return []
    nbytes = plan.staging_bytes // STAGING_BUFFERS // ALIGNMENT * ALIGNMENT
    if not nbytes:
        raise ValueError(f"a staging ring of {plan.staging_bytes} bytes is too small; give it at least 1 MiB")
    arena = device.pinned_buffer(nbytes * STAGING_BUFFERS)
    return [
        _Staging(arena[start : start + nbytes], device.new_event())
        for start in range(0, nbytes * STAGING_BUFFERS, nbytes)
    ]
