"""When a card itself waited for blocks and computed on them: the host, which only queues work, does not see it."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from offload.timeline import Timeline

WAIT_LANE, COMPUTE_LANE = "device wait", "device compute"
# Visits whose events have not been reached yet; a host further ahead leaves visits out rather than wait.
_MOST_PENDING = 256


@dataclass
class _Visit:
    """Events of one visit: the compute stream reached it, had its weights, was done with it."""

    name: str
    events: tuple[Any, Any, Any]


class EventTimer:
    """Times visits with events on the compute stream; spans go to `timeline`, on the host's clock.

    Never waits: what has not happened yet is read at a later visit, or by `finish` once the device is idle.
    Events are used again, so that the steady state makes none. runtime: what is used of torch.cuda. The
    compute stream is synchronised once, when the timer is made, to relate the clocks.
    """

    def __init__(self, runtime: Any, timeline: Timeline, device: torch.device) -> None:
        self._runtime = runtime
        self._device = device
        self._timeline = timeline
        self._spare: list[tuple[Any, Any, Any]] = []
        self._pending: deque[_Visit] = deque()
        self._current: _Visit | None = None
        self._base = self._event()
        self._record(self._base)
        runtime.current_stream(device).synchronize()
        self._base_seconds = time.perf_counter()

    def asked(self, name: str) -> None:
        """The compute has come to the visit of block `name`."""
        self._collect()
        self._current = None
        if len(self._pending) < _MOST_PENDING:
            events = self._spare.pop() if self._spare else (self._event(), self._event(), self._event())
            self._current = _Visit(name, events)
            self._record(events[0])

    def begun(self) -> None:
        """It has the weights."""
        if self._current is not None:
            self._record(self._current.events[1])

    def done(self) -> None:
        """It needs them no longer."""
        if self._current is not None:
            self._record(self._current.events[2])
            self._pending.append(self._current)
            self._current = None

    def finish(self) -> None:
        """Read what is left. The device must be idle."""
        self._collect()

    def _event(self) -> Any:
        return self._runtime.Event(enable_timing=True)

    def _record(self, event: Any) -> None:
        self._runtime.current_stream(self._device).record_event(event)

    def _collect(self) -> None:
        while self._pending and self._pending[0].events[2].query():
            visit = self._pending.popleft()
            # Float32 milliseconds: of hours since the base they would leave no more than a quarter of one.
            first, second, third = visit.events
            asked = self._base_seconds + self._base.elapsed_time(first) / 1e3
            begun = asked + first.elapsed_time(second) / 1e3
            done = begun + second.elapsed_time(third) / 1e3
            self._timeline.add(WAIT_LANE, visit.name, asked, begun)
            self._timeline.add(COMPUTE_LANE, visit.name, begun, done)
            self._spare.append(visit.events)
