"""A simulated accelerator: the ring runs on it unchanged, and every missing wait is reported, every time.

Nothing depends on timing. Each stream, disk read and host thread is an actor with a vector clock; events,
counters and host waits join clocks; every access is a byte range of a slot or of a host buffer. Two
accesses of the same bytes, one of them a write, that no chain of waits puts in order are a hazard,
whichever of them came first in this run.

A virtual clock runs beside: disk, link and compute are lanes with a speed, so that makespan, stall and
overlap of a full-size model come out in milliseconds, to the digit. Buffers are meta tensors and take no
memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from offload.blocks import Extent
from offload.devices import Cancelled, Counter, Courier, Event, NoTimer, Stream, VisitTimer, Worker
from offload.timeline import Span, Timeline

# Accesses are looked up by where they lie: buffers are gigabytes, accesses some 10 MB.
_BUCKET_BYTES = 64 << 20


@dataclass(frozen=True)
class Hazard:
    """kind: "race", "wait for nothing", "unpinned copy" or "freed in use"."""

    kind: str
    message: str


class _Actor:
    """A stream, a disk read or a host thread: how far it got, and what it knows of the others."""

    def __init__(self, name: str, key: int) -> None:
        self.name = name
        self.key = key
        self.clock: dict[int, int] = {}
        self.time = 0.0

    def join(self, point: _Point | _Actor) -> None:
        """Be after that point, or after all the other actor did."""
        for actor, tick in point.clock.items():
            self.clock[actor] = max(self.clock.get(actor, 0), tick)
        self.time = max(self.time, point.time)

    def point(self) -> _Point:
        return _Point(dict(self.clock), self.time)


@dataclass(frozen=True)
class _Point:
    clock: dict[int, int]
    time: float


@dataclass(frozen=True, eq=False)
class _Access:
    begin: int
    end: int
    actor: _Actor
    tick: int
    what: str
    is_write: bool

    def is_after(self, earlier: _Access) -> bool:
        return earlier.actor is self.actor or self.actor.clock.get(earlier.actor.key, 0) >= earlier.tick

    def conflicts_with(self, earlier: _Access) -> bool:
        """Whether both touch the same bytes, one of them writes, and nothing orders them."""
        overlap = earlier.begin < self.end and self.begin < earlier.end
        return overlap and (self.is_write or earlier.is_write) and not self.is_after(earlier)

    def stands_for(self, earlier: _Access) -> bool:
        """Whether all that can ever conflict with the earlier one will conflict with this one too."""
        if self.begin > earlier.begin or earlier.end > self.end or not self.is_after(earlier):
            return False
        return self.is_write or (self.actor is earlier.actor and not earlier.is_write)

    def told(self) -> str:
        verb = "writes" if self.is_write else "reads"
        return f"{self.what} on {self.actor.name}, which {verb} bytes {self.begin} to {self.end}"


@dataclass
class _Memory:
    """One buffer, and the accesses to it that a later one may still conflict with, by where they lie."""

    name: str
    kind: str  # "device", "pinned" or "pageable"
    tensor: Tensor  # keeps the storage, and with it the key
    owner: _Actor | None = None
    buckets: dict[int, list[_Access]] = field(default_factory=dict)


class SimulatedAccelerator:
    """A Device with one link and one disk. Compute is simulated by `compute`.

    link_rate, disk_rate: bytes per second. hazards: what was found. spans: who worked when.
    allocations: buffers handed out. host_syncs: waits of host threads for the device, by thread.
    stall_seconds: time that the compute stream stood still between kernels.
    """

    reads_into_device = False

    def __init__(self, *, link_rate: float = 12e9, disk_rate: float = 3e9) -> None:
        self.link_rate = link_rate
        self.disk_rate = disk_rate
        self.hazards: list[Hazard] = []
        self.spans: list[Span] = []
        self.allocations = 0
        self.host_syncs: dict[str, int] = {}
        self.stall_seconds = 0.0
        self._memories: dict[int, _Memory] = {}
        self._ticks = 0
        self._actors = 0
        self._caller = self.new_actor("caller")
        self._host = self._caller
        self._compute = _SimulatedStream(self, "compute")
        self._workers: list[_SimulatedWorker] = []
        # Far more than reads can be under way: the readers are as good as one per read, in bounded clocks.
        self._readers = [self.new_actor("the disk") for _ in range(16)]
        self._reads = 0
        self._disk_time = 0.0
        self._compute_end: float | None = None

    # Device

    def compute_stream(self) -> Stream:
        return self._compute

    def new_stream(self, name: str) -> Stream:
        return _SimulatedStream(self, name)

    def new_event(self) -> Event:
        return _SimulatedEvent(self)

    def visit_timer(self, timeline: Timeline) -> VisitTimer:
        return NoTimer()  # the virtual clock has a timeline of its own

    def new_counter(self) -> Counter:
        return _SimulatedCounter(self)

    def device_buffer(self, nbytes: int) -> Tensor:
        return self._allocate(nbytes, "device")

    def pinned_buffer(self, nbytes: int) -> Tensor:
        return self._allocate(nbytes, "pinned")

    def start(self, courier: Courier) -> Worker:
        worker = _SimulatedWorker(self, courier)
        self._workers.append(worker)
        return worker

    # What only a test or a benchmark calls

    def compute(
        self, what: str, seconds: float, *, reads: Sequence[Tensor] = (), writes: Sequence[Tensor] = ()
    ) -> None:
        """Queue a kernel on the compute stream."""
        started = self._compute.run("compute", what, seconds, reads=reads, writes=writes)
        if self._compute_end is not None:
            self.stall_seconds += started - self._compute_end
        self._compute_end = started + seconds

    def temporary(self, nbytes: int, stream: Stream) -> Tensor:
        """A device buffer of a caching allocator, which gives it away on `stream` once it is freed."""
        assert isinstance(stream, _SimulatedStream)
        tensor = self._allocate(nbytes, "device")
        self._memory(tensor).owner = stream.actor
        return tensor

    def free(self, tensor: Tensor) -> None:
        """Give a temporary back: a hazard unless its stream is ordered after every use."""
        memory = self._memories.pop(tensor.untyped_storage()._cdata)
        owner = memory.owner
        assert owner is not None, "only temporaries are freed"
        accesses = dict.fromkeys(access for bucket in memory.buckets.values() for access in bucket)
        for access in accesses:
            if access.actor is not owner and owner.clock.get(access.actor.key, 0) < access.tick:
                use = f"{access.what} on {access.actor.name}"
                message = f"{memory.name} of stream {owner.name} is given away while {use} may still use it"
                self.hazards.append(Hazard("freed in use", message))

    # What its parts share

    def new_actor(self, name: str) -> _Actor:
        self._actors += 1
        return _Actor(name, self._actors)

    @property
    def host(self) -> _Actor:
        """The host thread that runs now."""
        return self._host

    @contextmanager
    def acting_as(self, host: _Actor) -> Iterator[None]:
        before, self._host = self._host, host
        try:
            yield
        finally:
            self._host = before

    def sync(self, point: _Point | _Actor) -> None:
        """The running host thread waits for a point of the device."""
        self.host_syncs[self._host.name] = self.host_syncs.get(self._host.name, 0) + 1
        self._host.join(point)

    def run_couriers(self) -> None:
        for worker in self._workers:
            worker.advance()

    def report(self, kind: str, message: str) -> None:
        self.hazards.append(Hazard(kind, message))

    def is_pinned(self, tensor: Tensor) -> bool:
        return self._memory(tensor).kind != "pageable"

    def is_host_memory(self, tensor: Tensor) -> bool:
        return self._memory(tensor).kind != "device"

    def read_disk(self, what: str, targets: Sequence[Tensor]) -> _Point:
        """Begin a disk read from the running host thread; returns its end. Reads take turns on the disk, but
        nothing orders the bytes of one after those of another."""
        self._reads += 1
        reading = self._readers[self._reads % len(self._readers)]
        reading.join(self._host)
        for target in targets:
            self.access(reading, target, f"reading {what}", is_write=True)
        start = max(self._disk_time, reading.time)
        self._disk_time = reading.time = start + sum(target.nbytes for target in targets) / self.disk_rate
        self.spans.append(Span("disk", what, start, reading.time))
        return reading.point()

    def access(self, actor: _Actor, tensor: Tensor, what: str, *, is_write: bool) -> None:
        """Note an access, and report every earlier one it conflicts with."""
        begin, end = _byte_range(tensor)
        if begin == end:
            return
        self._ticks += 1
        actor.clock[actor.key] = self._ticks
        memory = self._memory(tensor)
        access = _Access(begin, end, actor, self._ticks, what, is_write)
        conflicts: dict[_Access, None] = {}  # a set in order: buckets may hold the same access
        for bucket in range(begin // _BUCKET_BYTES, (end - 1) // _BUCKET_BYTES + 1):
            earlier_ones = memory.buckets.get(bucket, [])
            conflicts |= dict.fromkeys(earlier for earlier in earlier_ones if access.conflicts_with(earlier))
            memory.buckets[bucket] = [earlier for earlier in earlier_ones if not access.stands_for(earlier)]
            memory.buckets[bucket].append(access)
        for earlier in conflicts:
            self.report("race", f"{access.told()} of {memory.name}, not ordered after {earlier.told()}")

    def _allocate(self, nbytes: int, kind: str) -> Tensor:
        self.allocations += 1
        tensor = torch.empty(nbytes, dtype=torch.uint8, device="meta")
        name = f"{kind} buffer {self.allocations}"
        self._memories[tensor.untyped_storage()._cdata] = _Memory(name, kind, tensor)
        return tensor

    def _memory(self, tensor: Tensor) -> _Memory:
        key = tensor.untyped_storage()._cdata
        if key not in self._memories:
            self._memories[key] = _Memory("memory of unknown origin", "pageable", tensor)
        return self._memories[key]


class SimulatedReader:
    """The disk of a SimulatedAccelerator, as the ring reads it."""

    def __init__(self, device: SimulatedAccelerator) -> None:
        self.read_bytes = 0
        self._device = device

    def submit(
        self, label: str, extents: Sequence[Extent], buffer: Tensor, *, drop_cache: bool = False
    ) -> _SimulatedJob:
        targets = [buffer[extent.target : extent.target + extent.nbytes] for extent in extents]
        self.read_bytes += sum(extent.nbytes for extent in extents)
        return _SimulatedJob(self._device, self._device.read_disk(label, targets))


@dataclass(frozen=True)
class _SimulatedJob:
    device: SimulatedAccelerator
    end: _Point
    span = None  # the accelerator keeps its own

    def wait(self) -> None:
        self.device.host.join(self.end)

    def cancel(self) -> None:
        self.wait()


class _SimulatedEvent:
    def __init__(self, device: SimulatedAccelerator) -> None:
        self._device = device
        self.point: _Point | None = None

    def synchronize(self) -> None:
        if self.point is None:
            self._device.report("wait for nothing", "a host thread waits for an event that was never recorded")
        else:
            self._device.sync(self.point)


class _SimulatedStream:
    def __init__(self, device: SimulatedAccelerator, name: str) -> None:
        self._device = device
        self.actor = device.new_actor(f"stream {name}")

    def record(self, event: Event) -> None:
        assert isinstance(event, _SimulatedEvent)
        self._queue()
        event.point = self.actor.point()

    def wait(self, event: Event) -> None:
        assert isinstance(event, _SimulatedEvent)
        self._queue()
        if event.point is None:
            self._device.report("wait for nothing", f"{self.actor.name} waits for an event that was never recorded")
        else:
            self.actor.join(event.point)

    def copy(self, target: Tensor, source: Tensor) -> None:
        from_host = self._device.is_host_memory(source)
        if from_host and not self._device.is_pinned(source):
            self._device.report("unpinned copy", "a copy from pageable memory makes the host wait for the device")
        seconds = source.nbytes / self._device.link_rate if from_host else 0.0
        self.run("copy", "copy", seconds, reads=[source], writes=[target])

    def fill(self, target: Tensor, value: int) -> None:
        self.run("compute", "fill", 0.0, writes=[target])

    def synchronize(self) -> None:
        self._device.sync(self.actor)

    def run(
        self, lane: str, what: str, seconds: float, *, reads: Sequence[Tensor] = (), writes: Sequence[Tensor] = ()
    ) -> float:
        """Queue work; returns the virtual time it starts at."""
        self._queue()
        for tensor in reads:
            self._device.access(self.actor, tensor, what, is_write=False)
        for tensor in writes:
            self._device.access(self.actor, tensor, what, is_write=True)
        start = self.actor.time
        self.actor.time += seconds
        if seconds:
            self._device.spans.append(Span(lane, what, start, self.actor.time))
        return start

    def _queue(self) -> None:
        """Queued work comes after everything its host thread knows of."""
        self.actor.join(self._device.host)


class _SimulatedCounter:
    """Runs the couriers while it waits, so no thread is needed and every run is the same."""

    def __init__(self, device: SimulatedAccelerator) -> None:
        self._device = device
        self._points: list[_Point] = []
        self._error: BaseException | None = None

    @property
    def value(self) -> int:
        return len(self._points)

    @property
    def failed(self) -> bool:
        return self._error is not None

    def advance(self) -> None:
        self._points.append(self._device.host.point())

    def wait(self, value: int) -> None:
        if self.value < value and self._error is None:
            self._device.run_couriers()
        if self.value < value:
            raise self._error or RuntimeError(
                f"deadlock: nobody counts up to {value}, the count stands at {self.value}"
            )
        if value:
            self._device.host.join(self._points[value - 1])

    def fail(self, error: BaseException) -> None:
        self._error = self._error or error


class _SimulatedWorker:
    """A courier as a host thread of its own, run whenever the caller waits for it."""

    def __init__(self, device: SimulatedAccelerator, courier: Courier) -> None:
        self._device = device
        self._courier: Courier | None = courier
        self._waits: tuple[Counter, int] | None = None
        self._host = device.new_actor("courier")
        self._host.join(device.host)

    def advance(self) -> None:
        """Run until it has to wait for the caller, or has ended."""
        with self._device.acting_as(self._host):
            while self._courier is not None:
                if self._waits is not None:
                    counter, value = self._waits
                    assert isinstance(counter, _SimulatedCounter)
                    if counter.value < value and not counter.failed:
                        return
                    try:
                        counter.wait(value)
                    except Cancelled:
                        self._end()
                        return
                self._waits = next(self._courier, None)
                if self._waits is None:
                    self._courier = None

    def _end(self) -> None:
        if self._courier is not None:
            self._courier.close()  # type: ignore[attr-defined]
            self._courier = None

    def join(self) -> None:
        with self._device.acting_as(self._host):
            self._end()
        self._device.host.join(self._host)


def _byte_range(tensor: Tensor) -> tuple[int, int]:
    """First byte in its storage and the one after the last; of a strided view, all it spans."""
    if tensor.numel() == 0:
        return 0, 0
    begin = int(tensor.storage_offset()) * tensor.element_size()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (int(last) + 1) * tensor.element_size()
