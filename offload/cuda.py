"""The Device of CUDA cards, and of AMD's under ROCm, where torch.cuda is HIP.

Written against torch.cuda rather than the generic torch.accelerator: events on which a host thread sleeps
("blocking") do nothing there, and host memory cannot be registered through it. Other accelerators need a
Device of their own.

Order that the ring does not know of, because it begins before the ring's memory does: the caching
allocator hands out memory in the order of the stream that allocates, so the kernels of its last user may
still be queued on the compute stream when a buffer is ours. A copy stream, which waits for nothing by
itself, must not write to it before those are done. A slot's `free` event, recorded when the ring is made,
says so; blocks that stay on the device have none. Hence every `device_buffer` makes all copy streams wait
for the compute stream. At the other end memory goes back to the compute stream's pool; the ring has
synchronised both streams by then, so no `record_stream` is needed, which would hold memory back instead.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from offload.devices import (
    Counter,
    Courier,
    CourierThread,
    Event,
    HostCounter,
    NoTimer,
    Stream,
    VisitTimer,
    Wait,
    Worker,
)
from offload.owner import Owner
from offload.pinned import PinnedArena, cuda_registration, system_pin_limit
from offload.sizes import format_bytes
from offload.timeline import Timeline
from offload.visit_times import EventTimer

_SLOT_ALIGNMENT = 256
# The few kernels of a copy stream, casts, decide when a block is ready; copies know no priority.
_HIGH_PRIORITY = -1


class CudaDevice:
    """A card, its compute stream being the calling thread's current one.

    pin_limit: the most host bytes to page-lock; None asks the system. timing: time visits on the card,
    for a report. Copies from memory that is not pinned work, but block the courier
    and overlap nothing: `pageable_copies` and `pageable_bytes` count them, `fallbacks` says why.

    memory_limit: bytes that torch's caching allocator may reserve on the card until `close`, beside what this process
    had reserved there before; before it takes more it gives back what it holds for nobody, and then it fails. Limits
    of several devices add up. It knows no owners: what else the process reserves meanwhile counts. None: as it is set.

    Owns the pinned memory until `close`; device memory belongs to whoever holds the tensors.
    runtime: what is used of torch.cuda; another one, with its own arena, only in tests.
    Raises ValueError where there is no such card.
    """

    reads_into_device = False

    def __init__(
        self,
        device: torch.device | str = "cuda",
        *,
        pin_limit: int | None = None,
        memory_limit: int | None = None,
        timing: bool = False,
        arena: PinnedArena | None = None,
        runtime: Any = None,
    ) -> None:
        device = torch.device(device)
        if runtime is None:
            _require(device)
            runtime = torch.cuda
        index = runtime.current_device() if device.index is None else device.index
        self.device = torch.device(device.type, index)
        self.pageable_copies = 0
        self.pageable_bytes = 0
        self._runtime = runtime
        self._timing = timing
        self._arena = arena or PinnedArena(
            cuda_registration(self.device), limit=system_pin_limit() if pin_limit is None else pin_limit
        )
        self._owner = Owner()
        self._lift_limit: Callable[[], object] = lambda: None
        if memory_limit is not None:
            limit = _AllocatorLimit.of(runtime, self.device)
            # A device that nobody closes takes its limit along; a process that ends has no use for it.
            self._lift_limit = finalize = weakref.finalize(self, limit.remove, limit.add(memory_limit))
            finalize.atexit = False
        self._copy_streams: weakref.WeakSet[_CudaStream] = weakref.WeakSet()

    @property
    def pinned_bytes(self) -> int:
        """Host bytes that are page-locked now."""
        return self._arena.pinned_bytes

    @property
    def fallbacks(self) -> list[str]:
        """Why copies are slower than they could be, in words; empty in the good case."""
        reasons = list(self._arena.fallbacks)
        if self.pageable_copies:
            copies = f"{self.pageable_copies} copies ({format_bytes(self.pageable_bytes)})"
            reasons.append(f"{copies} came from pageable memory and blocked the courier")
        return reasons

    def compute_stream(self) -> Stream:
        return _CudaStream(self, self._runtime, self._runtime.current_stream(self.device))

    def new_stream(self, name: str) -> Stream:
        """A stream for copies; the card has 32, which torch hands out in turn, so ask once and keep it."""
        stream = _CudaStream(self, self._runtime, self._runtime.Stream(device=self.device, priority=_HIGH_PRIORITY))
        self._copy_streams.add(stream)
        self._order_after_compute(stream)
        return stream

    def new_event(self) -> Event:
        # Blocking: the courier sleeps while it waits for a copy, where spinning would take a core from the reads.
        event: Event = self._runtime.Event(blocking=True)
        return event

    def visit_timer(self, timeline: Timeline) -> VisitTimer:
        return EventTimer(self._runtime, timeline, self.device) if self._timing else NoTimer()

    def new_counter(self) -> Counter:
        return HostCounter()

    def device_buffer(self, nbytes: int) -> Tensor:
        # A tensor made in inference mode could not be written to by the courier, which is not in it.
        with torch.inference_mode(False):
            buffer = self._allocate(nbytes)
        for stream in self._copy_streams:
            self._order_after_compute(stream)
        return buffer

    def reserve(self, segments: Sequence[int]) -> None:
        """Let torch's caching allocator hold free segments of these bytes, and no other free ones.

        It cuts what is asked for later from the smallest segment that has the room, so that segments of the sizes
        of a whole cycle's work keep it from reserving one more for every size it meets. Where the card has less
        memory than that, fewer are made.
        """
        self.release_cached()
        held = []
        with contextlib.suppress(torch.OutOfMemoryError):
            for nbytes in segments:
                held.append(self._allocate(nbytes))

    def release_cached(self) -> None:
        """Give back what the caching allocator holds for nobody."""
        self._runtime.empty_cache()

    def pinned_buffer(self, nbytes: int) -> Tensor:
        return self._arena.buffer(nbytes)

    def start(self, courier: Courier) -> Worker:
        return CourierThread(self._on_this_device(courier))

    def close(self) -> None:
        """Give the pinned memory back, and lift the memory limit. Every ring on this device must be closed before.
        May be called twice."""
        if self._owner.is_another:
            return
        self._arena.close()
        self._lift_limit()

    def transfers(self, target: Tensor, source: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(target, source) pairs that make up one copy, cut where pinned memory ends; counts pageable ones."""
        runs = self._arena.runs(source) if source.device.type == "cpu" else None
        if runs is None:
            if source.device.type == "cpu" and self.device.type != "cpu" and not source.is_pinned():
                self._count_pageable(source.nbytes)
            yield target, source
            return
        self._count_pageable(*(run.nbytes for run in runs if not run.is_pinned))
        if len(runs) == 1:
            yield target, source
            return
        assert source.dtype == target.dtype == torch.uint8, "only bytes cross the link"
        for run in runs:
            window = slice(run.offset, run.offset + run.nbytes)
            yield target[window], source[window]

    def _count_pageable(self, *sizes: int) -> None:
        self.pageable_copies += len(sizes)
        self.pageable_bytes += sum(sizes)

    def _allocate(self, nbytes: int) -> Tensor:
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        if buffer.data_ptr() % _SLOT_ALIGNMENT == 0:
            return buffer
        # torch's own allocator aligns to 512; others that can be plugged in promise nothing.
        buffer = torch.empty(nbytes + _SLOT_ALIGNMENT, dtype=torch.uint8, device=self.device)
        skip = -buffer.data_ptr() % _SLOT_ALIGNMENT
        return buffer[skip : skip + nbytes]

    def _order_after_compute(self, stream: _CudaStream) -> None:
        event = self.new_event()
        self.compute_stream().record(event)
        stream.wait(event)

    def _on_this_device(self, courier: Courier) -> Iterator[Wait]:
        """Threads begin on device 0, where the first call that names no device would set up a context."""
        # If this fails so will the first copy, and there the courier can tell its caller.
        with contextlib.suppress(RuntimeError):
            self._runtime.set_device(self.device)
        yield from courier


class _AllocatorLimit:
    """What torch's allocator may reserve on one card: one number, whatever number of devices asked for limits."""

    _known: ClassVar[dict[tuple[int, int], _AllocatorLimit]] = {}
    # One thread may come again: garbage is collected wherever memory is taken, and a device among it lifts its limit.
    _lock = threading.RLock()

    def __init__(self, runtime: Any, device: torch.device) -> None:
        self._runtime = runtime
        self._device = device
        self._parts: dict[object, int] = {}
        self._former = 1.0
        self._others = 0

    @classmethod
    def of(cls, runtime: Any, device: torch.device) -> _AllocatorLimit:
        with cls._lock:
            return cls._known.setdefault((id(runtime), device.index), cls(runtime, device))

    def add(self, nbytes: int) -> object:
        """Let so many bytes more be reserved, until `remove` is given what this returns."""
        part = object()
        with self._lock:
            if not self._parts:
                self._look()
            self._parts[part] = nbytes
            self._set()
        return part

    def remove(self, part: object) -> None:
        with self._lock:
            self._parts.pop(part)
            self._set()

    def _look(self) -> None:
        """At what there is before the first limit."""
        self._runtime.empty_cache()
        self._others = self._runtime.memory_reserved(self._device)
        # Older versions of torch tell no limit; nobody but us sets one in an ordinary program.
        former = getattr(self._runtime, "get_per_process_memory_fraction", None)
        self._former = 1.0 if former is None else former(self._device)

    def _set(self) -> None:
        total = self._runtime.get_device_properties(self._device).total_memory
        allowed = min((self._others + sum(self._parts.values())) / total, 1.0)
        with self._runtime.device(self._device):  # which the call makes the current one, and leaves so
            self._runtime.set_per_process_memory_fraction(allowed if self._parts else self._former, self._device)


class _CudaStream:
    """A torch.cuda.Stream. Copies and fills run with it as the current one; nothing waits but `synchronize`."""

    def __init__(self, device: CudaDevice, runtime: Any, stream: Any) -> None:
        self._device = device
        self._runtime = runtime
        self._stream = stream

    def record(self, event: Event) -> None:
        self._stream.record_event(event)

    def wait(self, event: Event) -> None:
        self._stream.wait_event(event)

    def copy(self, target: Tensor, source: Tensor) -> None:
        # Within the device a cast or an expanded source is one kernel, without temporaries to be given back.
        with self._runtime.stream(self._stream):
            for into, part in self._device.transfers(target, source):
                into.copy_(part, non_blocking=True)

    def fill(self, target: Tensor, value: int) -> None:
        with self._runtime.stream(self._stream):
            target.fill_(value)

    def synchronize(self) -> None:
        self._stream.synchronize()


def _require(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(f"a CudaDevice must be of type cuda, got {device}; use CpuDevice for the processor")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count <= (device.index or 0):
        raise ValueError(f"there is no device {device} here, only {count} of type cuda; use cpu")
