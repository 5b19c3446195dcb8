"""What the driver says a process holds on a card: by a library that answers as NVML does, and by the real one."""

from __future__ import annotations

import ctypes
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offload import driver, driver_bytes

MIB = 1 << 20
CARD = torch.device("cuda", 0)
NOT_AVAILABLE = (1 << 64) - 1


class Library:
    """NVML with these (process, bytes) on one card."""

    def __init__(self, processes: list[tuple[int, int]], uuid: str = "GPU-a1", started: int = 0) -> None:
        self.processes, self.uuid, self.started = processes, uuid.encode(), started
        self.open = 0

    def nvmlInit_v2(self) -> int:
        self.open += self.started == 0
        return self.started

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, card: Any) -> int:
        return 0 if uuid == self.uuid else 6

    def nvmlDeviceGetComputeRunningProcesses_v3(self, card: Any, count: Any, entries: Any) -> int:
        room, count._obj.value = count._obj.value, len(self.processes)
        if room < len(self.processes):
            return 7
        for entry, (pid, used) in zip(entries, self.processes, strict=False):
            entry.pid, entry.used = pid, used
        return 0


def runtime(used: int, reserved: int, uuid: str = "a1") -> Any:
    """A card of 8000 MiB of which so much is used by all programs, and reserved by torch's allocator."""
    return SimpleNamespace(
        memory_reserved=lambda device: reserved * MIB,
        mem_get_info=lambda device: ((8000 - used) * MIB, 8000 * MIB),
        get_device_properties=lambda device: SimpleNamespace(uuid=uuid),
    )


def test_what_is_beside_torch_is_told_exactly_among_other_programs() -> None:
    library = Library([(1, 3000 * MIB), (os.getpid(), 1500 * MIB)])

    assert driver_bytes(CARD, runtime(4508, 1000), library) == (500 * MIB, True)
    assert library.open == 0


def test_a_long_list_of_processes_is_asked_for_again() -> None:
    library = Library([*((pid, MIB) for pid in range(2, 90)), (os.getpid(), 1500 * MIB)])

    assert driver_bytes(CARD, runtime(4508, 1000), library) == (500 * MIB, True)


@pytest.mark.parametrize(
    "library",
    [
        Library([(1, 3000 * MIB)]),
        Library([(os.getpid(), NOT_AVAILABLE)]),
        Library([(os.getpid(), 400 * MIB)]),
        Library([(os.getpid(), 5000 * MIB)]),
        Library([(os.getpid(), 1500 * MIB)], uuid="GPU-b2"),
        Library([(os.getpid(), 1500 * MIB)], started=9),
        SimpleNamespace(),
    ],
    ids=["not listed", "not told", "less than torch has", "more than is used", "another card", "no start", "too old"],
)
def test_where_the_driver_does_not_tell_all_that_is_used_is_the_bound(library: Any) -> None:
    assert driver_bytes(CARD, runtime(4508, 1000), library) == (3508 * MIB, False)


def test_a_machine_without_the_library_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(driver.ctypes, "CDLL", missing)

    assert driver_bytes(CARD, runtime(4508, 1000)) == (3508 * MIB, False)


def test_an_entry_is_laid_out_as_in_the_library() -> None:
    assert ctypes.sizeof(driver._Process) == 24
    assert driver._Process.used.offset == 8


@pytest.mark.cuda  # asks the real driver
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: asks its driver")
def test_on_a_card_torch_s_tensors_are_not_among_what_the_driver_holds() -> None:
    torch.ones(1, device="cuda").add_(1)
    before, _ = driver_bytes(CARD)
    tensor = torch.ones(64 * MIB, device="cuda")
    after, _ = driver_bytes(CARD)

    assert 64 * MIB < before < 2048 * MIB
    assert abs(after - before) <= 16 * MIB
    del tensor
