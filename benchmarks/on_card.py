"""What benchmarks ask of a CUDA card: the most that is used on it, and how fast its link is."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import torch


class CardWatch:
    """The most that is used on a card while its `with` block runs, as the driver tells it, every 10 ms: all programs'
    memory, contexts too. Reading it takes a thread of its own."""

    def __init__(self, device: torch.device) -> None:
        self.peak_bytes = 0
        self._device = device
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="card-watch", daemon=True)

    def __enter__(self) -> CardWatch:
        self._take()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self._take()

    def _run(self) -> None:
        while not self._done.wait(0.01):
            self._take()

    def _take(self) -> None:
        free, total = torch.cuda.mem_get_info(self._device)
        self.peak_bytes = max(self.peak_bytes, total - free)


def copying_seconds(device: torch.device, sizes: Sequence[int]) -> float:
    """Seconds of copying blocks of so many bytes to a card from one pinned buffer; a pass before warms up."""
    source = torch.empty(max(sizes), dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)

    def copy_all() -> None:
        for nbytes in sizes:
            target[:nbytes].copy_(source[:nbytes], non_blocking=True)
        torch.cuda.synchronize(device)

    copy_all()
    began = time.perf_counter()
    copy_all()
    return time.perf_counter() - began
