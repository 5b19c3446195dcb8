"""Progress bars on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from .console import StandardError

# Always seconds per step: tqdm's own choice would flip to steps per second.
_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}{postfix}]"
# Into a log file a line now and then will do.
_TERMINAL_SECONDS, _LOG_SECONDS = 0.1, 10.0


def _interval() -> float:
    return _TERMINAL_SECONDS if StandardError().isatty() else _LOG_SECONDS


@contextmanager
def byte_bar(label: str, total: int, *, quiet: bool) -> Iterator[Callable[[int], object]]:
    """A bar over `total` bytes with rate and remaining time; what it yields is told the bytes done since last time."""
    with tqdm(
        file=StandardError(),
        desc=label,
        total=total,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        mininterval=_interval(),
        dynamic_ncols=True,
        disable=quiet,
    ) as bar:
        yield bar.update


class Progress:
    """One bar at a time: over the encoder's blocks, then over the steps of each picture.

    `report` is the pipeline's `on_progress`; `step_done` is for its step callback. seconds and steps add
    up over all pictures. quiet: draws nothing, counts all the same.
    """

    def __init__(self, *, quiet: bool) -> None:
        self.steps = 0
        self._quiet = quiet
        self._interval = _interval()
        self._bar: Any = None
        self._drawn = 0.0

    @contextmanager
    def picture(self, label: str, steps: int) -> Iterator[None]:
        """The bar of one picture, closed when the block ends, however it ends."""
        self._open(label, steps, unit="step", leave=True)
        try:
            yield
        finally:
            self.close()

    def report(self, phase: str, done: int, total: int) -> None:
        if phase == "text encoder":
            if self._bar is None:
                self._open(phase, total, unit="block", leave=False)
            self._bar.n = done
        elif self._bar is not None:
            self._bar.set_postfix_str(f"block {done}/{total}", refresh=False)
        if self._bar is not None and time.monotonic() - self._drawn >= self._interval:
            self._drawn = time.monotonic()
            self._bar.refresh()
        if phase == "text encoder" and done == total:
            self.close()

    def step_done(self) -> None:
        self.steps += 1
        if self._bar is not None:
            if self._bar.n + 1 == self._bar.total:
                self._bar.set_postfix_str("", refresh=False)
            self._bar.update(1)

    def close(self) -> None:
        """Idempotent."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()

    def _open(self, label: str, total: int, *, unit: str, leave: bool) -> None:
        self.close()
        self._bar = tqdm(
            file=StandardError(),
            desc=label,
            total=total,
            unit=unit,
            leave=leave,
            bar_format=_FORMAT,
            mininterval=self._interval,
            dynamic_ncols=True,
            disable=self._quiet,
        )
