"""What the ring needs of a device: streams, events, buffers, and a way to run its courier.

The same executor runs on every implementation. `CpuDevice` computes in host memory, where the order of
calls is the order of effects; `offload.simulator` checks the order instead of relying on it.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from offload.owner import THREAD_PREFIX
from offload.timeline import Timeline

# Slots are aligned for every kernel, staging buffers for direct reads.
BUFFER_ALIGNMENT = 4096
_HUGE_PAGE = 2 << 20


class Cancelled(Exception):
    """The work was stopped by its owner; never reaches the caller."""


class Counter(Protocol):
    """A number that only grows, by which host threads wait for each other."""

    @property
    def value(self) -> int: ...

    def advance(self) -> None: ...

    def wait(self, value: int) -> None:
        """Return once `value` is reached. Raises what `fail` was given, where it is not."""

    def fail(self, error: BaseException) -> None:
        """Let every present and future wait for a value not reached raise `error`."""


# A courier yields what it has to wait for, and whoever runs it does the waiting.
Wait = tuple[Counter, int]
Courier = Iterator[Wait]


class Event(Protocol):
    """A point in a stream."""

    def synchronize(self) -> None:
        """Block the calling host thread until the recorded point is reached."""


class Stream(Protocol):
    """A queue of device work; each call returns once the work is queued."""

    def record(self, event: Event) -> None: ...

    def wait(self, event: Event) -> None:
        """Order what is queued from now on after the point `event` was last recorded at."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """target[...] = source, cast and repeated as needed."""

    def fill(self, target: Tensor, value: int) -> None: ...

    def synchronize(self) -> None:
        """Block the calling host thread until all queued work is done."""


class Worker(Protocol):
    """A courier under way."""

    def join(self) -> None:
        """Return once the courier has ended. It must have been told to, by failing what it waits for."""


class VisitTimer(Protocol):
    """Times what the device does, where the host only queues it."""

    def asked(self, name: str) -> None:
        """The compute has come to the visit of block `name`."""

    def begun(self) -> None:
        """It has the weights."""

    def done(self) -> None:
        """It needs them no longer."""

    def finish(self) -> None:
        """Tell all; the device is idle."""


class Device(Protocol):
    """`reads_into_device`: device buffers are host memory, so files are read into them without staging."""

    reads_into_device: bool

    def compute_stream(self) -> Stream:
        """The stream the calling thread computes on."""

    def new_stream(self, name: str) -> Stream: ...

    def new_event(self) -> Event: ...

    def new_counter(self) -> Counter: ...

    def visit_timer(self, timeline: Timeline) -> VisitTimer:
        """Adds spans to `timeline`; a NoTimer where what the host sees is all there is."""

    def device_buffer(self, nbytes: int) -> Tensor:
        """uint8, its start aligned to at least 256 bytes.

        Copies queued from now on come after all compute queued so far: the memory may have been another's.
        """

    def pinned_buffer(self, nbytes: int) -> Tensor:
        """uint8 in host memory that the device copies from without the host's help."""

    def start(self, courier: Courier) -> Worker:
        """Run `courier` beside the caller. Its errors are its own business."""


class OwnedDevice(Device, Protocol):
    """A Device and what its owner, who keeps several rings on it one after the other, asks of it besides."""

    @property
    def fallbacks(self) -> Sequence[str]:
        """Why copies are slower than they could be, in words; empty in the good case."""

    def reserve(self, segments: Sequence[int]) -> None:
        """Let torch's caching allocator hold free segments of these bytes, and no other free ones."""

    def release_cached(self) -> None:
        """Give back what the caching allocator holds for nobody."""

    def close(self) -> None:
        """Give everything back, after every ring on this device was closed. May be called twice."""


class HostCounter:
    """A Counter between threads."""

    def __init__(self) -> None:
        self._value = 0
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    @property
    def value(self) -> int:
        return self._value

    def advance(self) -> None:
        with self._changed:
            self._value += 1
            self._changed.notify_all()

    def wait(self, value: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._value >= value or self._error is not None)
            if self._value < value:
                assert self._error is not None
                raise self._error

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()


class CourierThread:
    """A Worker on a thread of its own. A wait that fails ends the courier, which cleans up as it is closed."""

    def __init__(self, courier: Courier) -> None:
        # A daemon: a caller who never closes the ring must still be able to end the program.
        name = f"{THREAD_PREFIX}courier"
        self._thread = threading.Thread(target=self._run, args=(courier,), name=name, daemon=True)
        self._thread.start()

    @staticmethod
    def _run(courier: Courier) -> None:
        try:
            for counter, value in courier:
                counter.wait(value)
        except Cancelled:
            pass
        finally:
            courier.close()  # type: ignore[attr-defined]

    def join(self) -> None:
        self._thread.join()


class NoTimer:
    """A VisitTimer that has nothing to tell."""

    def asked(self, name: str) -> None: ...

    def begun(self) -> None: ...

    def done(self) -> None: ...

    def finish(self) -> None: ...


class _CpuEvent:
    def synchronize(self) -> None:
        """The work was done when it was queued."""


class _CpuStream:
    """Does the work at once, on the calling thread."""

    def record(self, event: Event) -> None: ...

    def wait(self, event: Event) -> None: ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def fill(self, target: Tensor, value: int) -> None:
        target.fill_(value)

    def synchronize(self) -> None: ...


class CpuDevice:
    """Computes in host memory; the courier reads the next blocks while the caller computes."""

    reads_into_device = True
    fallbacks: Sequence[str] = ()

    def __init__(self) -> None:
        self._stream = _CpuStream()

    def compute_stream(self) -> Stream:
        return self._stream

    def new_stream(self, name: str) -> Stream:
        return self._stream

    def new_event(self) -> Event:
        return _CpuEvent()

    def new_counter(self) -> Counter:
        return HostCounter()

    def visit_timer(self, timeline: Timeline) -> VisitTimer:
        return NoTimer()

    def device_buffer(self, nbytes: int) -> Tensor:
        return aligned_buffer(nbytes)

    def pinned_buffer(self, nbytes: int) -> Tensor:
        return aligned_buffer(nbytes)

    def start(self, courier: Courier) -> Worker:
        return CourierThread(courier)

    def reserve(self, segments: Sequence[int]) -> None:
        """Nothing to do: torch caches no host memory."""

    def release_cached(self) -> None: ...

    def close(self) -> None: ...


def aligned_buffer(nbytes: int) -> Tensor:
    """Uninitialised uint8 host memory that begins on a multiple of BUFFER_ALIGNMENT.

    Alignment is more than speed: some CPU kernels round differently on weights that are not aligned.
    """
    # A tensor made in inference mode could not be written to by the courier, which is not in it.
    with torch.inference_mode(False):
        is_huge = nbytes >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE")
        alignment = _HUGE_PAGE if is_huge else BUFFER_ALIGNMENT
        storage = _huge_pages(nbytes + alignment) if is_huge else torch.empty(nbytes + alignment, dtype=torch.uint8)
        skip = -storage.data_ptr() % alignment
        return storage[skip : skip + nbytes]


def _huge_pages(nbytes: int) -> Tensor:
    """Memory that the system may back with huge pages: the first read into it is spared a fault every 4 KiB."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
