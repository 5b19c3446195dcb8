"""The caller's side of blocks that a courier brings ahead of use: what `Ring` and `PagedBlocks` share."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from offload.devices import Cancelled, Counter, Worker
from offload.handover import Handover
from offload.owner import Owner
from offload.rounds import Rounds
from offload.timeline import Timeline

T = TypeVar("T")


class Visits(ABC, Generic[T]):
    """Blocks visited by one thread, in rounds, while one courier brings what comes next; any thread may close.

    T: what stands for one brought block. A courier begins at some block and brings, from there on, what `_is_settled`
    does not say to be there already; each is handed over in that order. A visit out of order ends it and starts
    another (`seeks` counts them). Counted in `_released` are the visits whose place may be used again.
    """

    def __init__(self, rounds: Rounds) -> None:
        self.seeks = 0
        self.visits = 0
        self.timeline = Timeline()
        self._rounds = rounds
        self._owner = Owner()
        self._worker: Worker | None = None
        self._stopping = False
        self._visiting: str | None = None
        self._closed = False
        # Held while a courier is started and while all ends for good: none may start after that.
        self._ending = threading.Lock()
        # Held by the caller while it uses what `close` lets go of.
        self._using = threading.Lock()

    @abstractmethod
    def _start(self, index: int) -> Worker:
        """A courier that begins at a block."""

    @abstractmethod
    def _new_counter(self) -> Counter: ...

    @abstractmethod
    def _begin_anew(self) -> None:
        """Before a courier starts: what was brought to stay is settled."""

    @abstractmethod
    def _is_settled(self, index: int) -> bool:
        """Whether the block is there for good, as far as the caller knows."""

    @abstractmethod
    def _index_of(self, brought: T) -> int: ...

    def _require_open(self, name: str) -> None:
        if self._closed or self._visiting is not None:
            raise ValueError(f"block {name} cannot be visited: {self._visiting or 'closed'}")

    def _take(self, index: int) -> T | None:
        """What was brought for a visit of the block at `index`, waited for; None where it is settled. Seeks where the
        courier is elsewhere."""
        if self._is_settled(index):
            return None  # and the courier is where it was
        expected = self._worker is not None and self._next_moving() == index
        brought = self._next_handed() if expected else None
        if brought is None or self._index_of(brought) != index:  # whatever was expected, what is brought decides
            self._seek(index)
            if self._is_settled(index):  # it had been brought to stay, and not been asked for yet
                return None
            brought = self._next_handed()
            assert brought is not None, "a courier begins with what was sought"
        self._cursor = index + 1
        return brought

    def _next_moving(self) -> int | None:
        """The block that the courier brings next; None after the last, where there are no rounds."""
        return self._rounds.next(self._cursor, lambda index: not self._is_settled(index))

    def _next_handed(self) -> T | None:
        """`Handover.next`. Where it raises, the courier is at an end."""
        try:
            return self._handed.next()
        except BaseException:
            self._stop()
            raise

    def _seek(self, index: int) -> None:
        """Let the courier start over at a block. Raises ValueError once closed."""
        if self._worker is not None:
            self.seeks += 1
        self._stop()
        with self._ending:
            if self._closed:  # meanwhile, by another thread
                raise ValueError("closed while a block was waited for")
            self._reset(index)
            self._worker = self._start(index)

    def _reset(self, index: int) -> None:
        self._cursor = index
        self._handed: Handover[T] = Handover(self._new_counter())
        self._released = self._new_counter()
        self._begin_anew()

    def _stop(self) -> None:
        """End the courier; returns once it touches nothing any more."""
        worker = self._worker  # another thread may be ending it, too
        if worker is not None:
            self._stopping = True
            self._released.fail(Cancelled())
            worker.join()
            self._worker = None
        self._stopping = False

    def _end(self) -> None:
        """The beginning of `close`: no courier is left, and none starts any more. Whoever waits for a block learns."""
        with self._ending:
            self._closed = True
        self._stop()
        self._handed.fail(ValueError("closed while a block was waited for"))  # by another thread
