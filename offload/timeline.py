"""Who worked when: disk, link, compute and waits of a run as spans on lanes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

# Of the newest spans: enough for the steps of a picture, and no run grows for ever.
KEPT_SPANS = 50_000


@dataclass(frozen=True)
class Span:
    """One piece of work on a lane ("disk", "copy", "compute", "wait"): what, and its start and end in seconds."""

    lane: str
    what: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Timeline:
    """The newest spans of a run, in the order they ended. Several threads may add."""

    def __init__(self, limit: int = KEPT_SPANS) -> None:
        self._spans: deque[Span] = deque(maxlen=limit)  # append is atomic

    def add(self, lane: str, what: str, start: float, end: float) -> None:
        self._spans.append(Span(lane, what, start, end))

    def __iter__(self) -> Iterator[Span]:
        return iter(list(self._spans))

    def lane(self, name: str) -> list[Span]:
        return [span for span in self if span.lane == name]

    def busy_seconds(self, lane: str) -> float:
        """Time in which the lane did anything: overlapping spans count once."""
        busy = end = 0.0
        for span in sorted(self.lane(lane), key=lambda span: span.start):
            busy += max(0.0, span.end - max(span.start, end))
            end = max(end, span.end)
        return busy
