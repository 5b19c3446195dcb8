"""What a CudaDevice asks of torch's caching allocator, on a stand-in for torch.cuda."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import offload.cuda
from l2p_lowvram import streaming
from l2p_lowvram.estimates import CONTEXT_BYTES
from l2p_lowvram.streaming import MemoryOptions, PhaseDemand, Streamer
from offload.cuda import CudaDevice
from tests.test_offload_cuda import FakeCard, device_on

GIB = 1 << 30


class CardWithAllocator(FakeCard):
    """Of 8 GiB. `fraction`: what a process may take of it; `reserved`: bytes that it has taken, `idle` of them for
    nobody. current: the device that calls concern which name none."""

    def __init__(self) -> None:
        super().__init__()
        self.fraction = 0.9
        self.emptied = 0
        self.reserved = self.idle = 0
        self.current = 7

    def get_device_properties(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(total_memory=8 * GIB)

    def get_per_process_memory_fraction(self, device: torch.device) -> float:
        return self.fraction

    def set_per_process_memory_fraction(self, fraction: float, device: torch.device) -> None:
        self.fraction = fraction
        self.current = 0  # as torch leaves it

    def empty_cache(self) -> None:
        self.emptied += 1
        self.reserved, self.idle = self.reserved - self.idle, 0

    def memory_reserved(self, device: torch.device) -> int:
        return self.reserved

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before = self.current
        yield
        self.current = before


def test_the_allocator_is_limited_until_the_device_is_closed() -> None:
    card = CardWithAllocator()
    device = device_on(card, memory_limit=2 * GIB)

    limited = card.fraction
    device.close()
    card_after = card.fraction
    card.fraction = 0.5
    device.close()

    assert limited == 0.25
    assert card_after == 0.9
    assert card.fraction == 0.5, "closed once"


def test_a_limit_beyond_the_card_is_the_card() -> None:
    card = CardWithAllocator()

    device = device_on(card, memory_limit=9 * GIB)
    limited = card.fraction
    del device

    assert limited == 1.0
    assert card.fraction == 0.9, "a device that nobody closed takes its limit along"


def test_what_the_process_had_reserved_before_is_not_in_the_limit() -> None:
    card = CardWithAllocator()
    card.reserved, card.idle = 3 * GIB, GIB

    device = device_on(card, memory_limit=2 * GIB)

    assert card.fraction == 4 / 8
    device.close()
    assert card.current == 7, "and the current device is as before"


def test_a_device_that_becomes_garbage_while_limits_are_set_lifts_its_own() -> None:
    card = CardWithAllocator()
    garbage = [device_on(card, memory_limit=GIB)]
    look = card.memory_reserved
    card.memory_reserved = lambda device: (garbage.clear(), look(device))[1]  # as a collection there would
    other = CardWithAllocator()
    other.memory_reserved = card.memory_reserved

    kept = device_on(other, memory_limit=2 * GIB)

    assert (card.fraction, other.fraction) == (0.9, 0.25)
    kept.close()


@pytest.mark.parametrize("first", [0, 1])
def test_limits_of_several_devices_add_up_in_whatever_order_they_are_closed(first: int) -> None:
    card = CardWithAllocator()
    devices = [device_on(card, memory_limit=2 * GIB), device_on(card, memory_limit=GIB)]
    card.reserved = GIB  # their own, which is within their limits

    both = card.fraction
    devices[first].close()
    one = card.fraction
    devices[1 - first].close()

    assert (both, one, card.fraction) == (3 / 8, (1 if first == 0 else 2) / 8, 0.9)


def test_without_a_limit_nothing_is_set() -> None:
    card = CardWithAllocator()

    device_on(card).close()

    assert card.fraction == 0.9


def test_a_budget_limits_the_allocator_to_what_the_context_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(offload.cuda, "CudaDevice", lambda device, **options: asked.append(options))
    monkeypatch.setattr(streaming, "available_device_bytes", lambda device: 24 * GIB)

    for vram in (6 * GIB, None):
        Streamer(torch.device("cuda", 0), MemoryOptions(vram=vram)).ring_device()

    assert [options["memory_limit"] for options in asked] == [6 * GIB - CONTEXT_BYTES, None]


def test_segments_exist_together_and_are_free_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    card, alive, most = CardWithAllocator(), [], []
    device = device_on(card)
    allocate = CudaDevice._allocate

    def counted(self: CudaDevice, nbytes: int) -> torch.Tensor:
        buffer = allocate(self, nbytes)
        alive.append(nbytes)
        weakref.finalize(buffer, alive.remove, nbytes)
        most.append(list(alive))
        return buffer

    monkeypatch.setattr(CudaDevice, "_allocate", counted)
    device.reserve([3000, 1000, 2000])

    assert card.emptied == 1
    assert most[-1] == [3000, 1000, 2000]
    assert alive == []


def test_a_card_with_less_memory_than_was_planned_reserves_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    device, asked = device_on(CardWithAllocator()), []

    def run_out(self: CudaDevice, nbytes: int) -> torch.Tensor:
        asked.append(nbytes)
        if len(asked) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.empty(nbytes)

    monkeypatch.setattr(CudaDevice, "_allocate", run_out)
    device.reserve([3000, 1000, 2000])

    assert asked == [3000, 1000]


def test_more_than_is_free_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload.cuda, "CudaDevice", lambda device, **options: None)
    monkeypatch.setattr(streaming, "available_device_bytes", lambda device: 4 * GIB)
    streamers = [Streamer(torch.device("cuda", 0), MemoryOptions(vram=size * GIB)) for size in (4, 6)]

    for streamer in streamers:
        streamer.ring_device()

    assert streamers[0].notices == []
    assert streamers[1].notices == [
        "--vram 6.00 GiB is more than cuda:0 has free (4.50 GiB with this program's own share): memory may run out"
    ]


def test_what_is_free_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that the driver loads during the first picture do not change the plan of the second."""
    free = iter([8 * GIB, 7 * GIB])
    monkeypatch.setattr(streaming, "available_device_bytes", lambda device: next(free))
    streamer = Streamer(torch.device("cuda", 0), MemoryOptions(ram=GIB, pin=0))
    work = PhaseDemand("picture", [], {}, 0)

    first, again = (streamer._device_budget(work, ()).device for _ in range(2))
    streamer.close()
    anew = streamer._device_budget(work, ()).device

    assert (first, again, anew) == tuple(size * GIB // 20 * 19 + CONTEXT_BYTES for size in (8, 8, 7))
