"""What a courier has brought, handed to the thread that visits blocks, in order."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

from offload.devices import Counter

T = TypeVar("T")


class Handover(Generic[T]):
    """A queue of one courier and one caller, on a Counter of their device. A new courier gets a new one."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._brought: deque[T] = deque()
        self._taken = 0

    def put(self, item: T) -> None:
        """By the courier: one more is there."""
        self._brought.append(item)
        self._counter.advance()

    def end(self) -> None:
        """By the courier: there will be no more."""
        self._counter.fail(_Ended())

    def fail(self, error: BaseException) -> None:
        """Whoever waits for more than there is gets `error`; the first one counts."""
        self._counter.fail(error)

    def next(self) -> T | None:
        """By the caller: the next item, waited for; None where the courier has nothing more to bring."""
        try:
            self._counter.wait(self._taken + 1)
        except _Ended:
            return None
        self._taken += 1
        return self._brought.popleft()


class _Ended(Exception):
    pass
