"""Pinned memory against a driver that fails on command: exact sizes, back-off, and nothing left registered."""

import gc
import mmap
import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from offload import PinnedArena, default_pin_limit, format_bytes
from offload.pinned import HostRegistration, cuda_registration, runs_under_wsl, system_pin_limit

PAGE = mmap.PAGESIZE
GIB = 1 << 30


class FakeDriver:
    """Registers up to `wall` bytes in pieces of at most `largest`, and fails the tries numbered in `failing`.

    Refuses what a driver refuses: overlaps, half pages, unknown addresses, and any call after an error that
    was not cleared.
    """

    def __init__(self, wall: int = 1 << 60, largest: int = 1 << 60, failing: tuple[int, ...] = ()) -> None:
        self.registered: dict[int, int] = {}
        self.tries: list[int] = []
        self.taken_back: list[int] = []
        self.cleared = 0
        self._wall = wall
        self._largest = largest
        self._failing = failing
        self._has_error = False

    @property
    def total(self) -> int:
        return sum(self.registered.values())

    @property
    def registration(self) -> HostRegistration:
        return HostRegistration(self._register, self._unregister, self._clear)

    def is_registered(self, address: int) -> bool:
        return any(begin <= address < begin + nbytes for begin, nbytes in self.registered.items())

    def _register(self, address: int, nbytes: int) -> str | None:
        assert not self._has_error, "the last error was not cleared"
        assert nbytes > 0
        assert address % PAGE == nbytes % PAGE == 0
        assert all(address + nbytes <= begin or begin + size <= address for begin, size in self.registered.items()), (
            "registered twice"
        )
        self.tries.append(nbytes)
        if len(self.tries) in self._failing or nbytes > self._largest or self.total + nbytes > self._wall:
            self._has_error = True
            return "out of memory (2)"
        self.registered[address] = nbytes
        return None

    def _unregister(self, address: int) -> str | None:
        self.taken_back.append(address)
        assert is_mapped(address), "the memory went first"
        return None if self.registered.pop(address, None) else "invalid value (1)"

    def _clear(self) -> None:
        self.cleared += 1
        self._has_error = False


def is_mapped(address: int) -> bool:
    """Whether the page at an address is there; taken for granted where the system does not tell."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return True
    ranges = (line.split()[0].split("-") for line in maps.read_text().splitlines())
    return any(int(begin, 16) <= address < int(end, 16) for begin, end in ranges)


def arena_of(driver: FakeDriver, limit: int = GIB, floor: int = PAGE) -> PinnedArena:
    return PinnedArena(driver.registration, limit=limit, floor=floor)


def runs_of(arena: PinnedArena, tensor: torch.Tensor) -> list[tuple[int, int, bool]]:
    runs = arena.runs(tensor)
    assert runs is not None
    return [(run.offset, run.nbytes, run.is_pinned) for run in runs]


@pytest.mark.parametrize("nbytes", [1, PAGE - 1, PAGE, 3 * PAGE + 5, 40 * PAGE])
def test_a_buffer_takes_whole_pages_and_not_a_power_of_two(nbytes: int) -> None:
    driver = FakeDriver()
    arena = arena_of(driver)

    buffer = arena.buffer(nbytes)

    pages = -(-nbytes // PAGE) * PAGE
    assert buffer.shape == (nbytes,)
    assert buffer.dtype == torch.uint8
    assert driver.registered == {buffer.data_ptr(): pages}
    assert arena.pinned_bytes == pages
    assert arena.fallbacks == []
    arena.close()


def test_a_buffer_can_be_written_and_read_to_its_last_byte() -> None:
    arena = arena_of(FakeDriver())
    buffer = arena.buffer(5 * PAGE + 3)
    values = torch.randint(0, 256, (5 * PAGE + 3,), dtype=torch.uint8)

    buffer.copy_(values)

    assert torch.equal(buffer, values)
    assert torch.equal(torch.from_numpy(buffer.numpy()), values)


def test_an_empty_buffer_is_a_buffer() -> None:
    arena = arena_of(FakeDriver())

    buffer = arena.buffer(0)

    assert buffer.shape == (0,)
    assert arena.runs(buffer) in (None, [])


def test_registrations_end_with_the_last_tensor_and_before_the_memory() -> None:
    driver = FakeDriver()
    arena = arena_of(driver)
    buffer = arena.buffer(10 * PAGE)
    address = buffer.data_ptr()
    view = buffer[PAGE:].view(torch.int32)

    del buffer
    gc.collect()
    held = dict(driver.registered)
    del view
    gc.collect()

    assert held == {address: 10 * PAGE}
    assert driver.registered == {}
    assert driver.taken_back == [address]
    assert arena.pinned_bytes == 0


def test_closing_unregisters_once_and_leaves_tensors_usable() -> None:
    driver = FakeDriver(largest=4 * PAGE)
    arena = arena_of(driver)
    buffer = arena.buffer(10 * PAGE)
    buffer.fill_(7)
    pieces = set(driver.registered)

    arena.close()
    arena.close()

    assert len(pieces) > 1
    assert int(buffer.sum()) == 70 * PAGE
    assert arena.runs(buffer) is None
    del buffer
    gc.collect()
    assert driver.registered == {}
    assert sorted(driver.taken_back) == sorted(pieces)
    with pytest.raises(ValueError, match=r"pinned buffer of 1 B is asked for, but the arena is closed"):
        arena.buffer(1)


def test_a_failure_is_cleared_told_and_tried_again_at_half_the_size() -> None:
    driver = FakeDriver(failing=(1,))
    arena = arena_of(driver)

    buffer = arena.buffer(8 * PAGE)

    assert driver.tries == [8 * PAGE, 4 * PAGE, 4 * PAGE]
    assert driver.cleared == 1
    assert arena.fallbacks == [f"pinning {format_bytes(8 * PAGE)} failed: out of memory (2); 0 B were pinned"]
    assert runs_of(arena, buffer) == [(0, 4 * PAGE, True), (4 * PAGE, 4 * PAGE, True)]
    arena.close()


def test_a_wall_in_the_middle_leaves_the_rest_pageable() -> None:
    driver = FakeDriver(wall=5 * PAGE)
    arena = arena_of(driver)

    buffer = arena.buffer(9 * PAGE)

    assert driver.total == arena.pinned_bytes == 5 * PAGE
    left, last = format_bytes(4 * PAGE), format_bytes(PAGE)
    assert arena.fallbacks[-1] == f"{left} of host memory stay pageable: pinning {last} failed: out of memory (2)"
    assert runs_of(arena, buffer)[-1] == (5 * PAGE, 4 * PAGE, False)
    arena.close()
    assert driver.registered == {}


def test_every_number_of_failures_ends_with_nothing_registered() -> None:
    """Whatever succeeds and fails on the way: covered to the byte while open, all taken back once at the end."""
    for first in range(1, 9):
        for count in range(9):
            driver = FakeDriver(failing=tuple(range(first, first + count)))
            arena = arena_of(driver, floor=2 * PAGE)
            buffers = [arena.buffer(nbytes * PAGE + 1) for nbytes in (12, 1, 5)]

            for buffer in buffers:
                runs = runs_of(arena, buffer)
                assert [offset for offset, _, _ in runs] == [
                    sum(nbytes for _, nbytes, _ in runs[:index]) for index in range(len(runs))
                ]
                assert sum(nbytes for _, nbytes, _ in runs) == buffer.nbytes
                for offset, nbytes, is_pinned in runs:
                    assert driver.is_registered(buffer.data_ptr() + offset) is is_pinned
                    assert driver.is_registered(buffer.data_ptr() + offset + nbytes - 1) is is_pinned
            assert driver.total == arena.pinned_bytes
            made = sorted(driver.registered)
            del buffers[1], buffer
            arena.close()
            assert driver.registered == {}
            assert sorted(driver.taken_back) == made


def test_nothing_below_the_floor_is_tried_twice() -> None:
    driver = FakeDriver(wall=0)
    arena = arena_of(driver, floor=3 * PAGE)

    arena.buffer(16 * PAGE)
    arena.buffer(PAGE)

    assert driver.tries == [16 * PAGE, 8 * PAGE, 4 * PAGE, PAGE]
    assert arena.pinned_bytes == 0


def test_the_limit_binds_over_all_buffers_and_is_given_as_the_reason() -> None:
    driver = FakeDriver()
    arena = arena_of(driver, limit=10 * PAGE + 100)
    first = arena.buffer(6 * PAGE)

    second = arena.buffer(6 * PAGE)

    assert driver.total == 10 * PAGE
    assert runs_of(arena, second) == [(0, 4 * PAGE, True), (4 * PAGE, 2 * PAGE, False)]
    left, limit = format_bytes(2 * PAGE), format_bytes(10 * PAGE)
    assert arena.fallbacks == [f"{left} of host memory stay pageable: the pin limit of {limit} is reached"]
    del first
    gc.collect()
    third = arena.buffer(6 * PAGE)
    assert runs_of(arena, third) == [(0, 6 * PAGE, True)]
    arena.close()


def test_a_limit_of_nothing_never_asks_the_driver() -> None:
    driver = FakeDriver()
    arena = arena_of(driver, limit=0)

    buffer = arena.buffer(6 * PAGE)

    assert driver.tries == []
    assert runs_of(arena, buffer) == [(0, 6 * PAGE, False)]


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative, got -1 B"):
        arena_of(FakeDriver(), limit=-1)


def test_runs_cut_any_range_at_the_edges_of_registrations() -> None:
    driver = FakeDriver(largest=2 * PAGE, wall=4 * PAGE)
    arena = arena_of(driver)
    buffer = arena.buffer(8 * PAGE)
    edges = {0, 2 * PAGE, 4 * PAGE, 8 * PAGE}
    assert [offset for offset, _, _ in runs_of(arena, buffer)] == [0, 2 * PAGE, 4 * PAGE]

    for begin in (0, 1, PAGE, 2 * PAGE - 1, 2 * PAGE, 4 * PAGE - 1, 5 * PAGE):
        for end in (begin + 1, begin + PAGE, 4 * PAGE, 8 * PAGE):
            if not begin < end <= 8 * PAGE:
                continue
            cuts = [begin + offset for offset, _, _ in runs_of(arena, buffer[begin:end])]
            assert cuts == sorted({begin} | {edge for edge in edges if begin < edge < end})


def test_memory_of_others_has_no_runs() -> None:
    arena = arena_of(FakeDriver())
    arena.buffer(PAGE)

    assert arena.runs(torch.empty(100, dtype=torch.uint8)) is None


def test_an_unregistration_that_fails_is_told_and_not_repeated() -> None:
    driver = FakeDriver()
    arena = arena_of(driver)
    buffer = arena.buffer(PAGE)
    driver.registered.clear()

    arena.close()
    del buffer
    gc.collect()

    assert arena.fallbacks == [f"{format_bytes(PAGE)} of host memory could not be unpinned: invalid value (1)"]
    assert len(driver.taken_back) == 1
    assert driver.cleared == 1


def test_an_exception_in_the_middle_leaves_nothing_registered() -> None:
    driver = FakeDriver(largest=2 * PAGE)

    def register(address: int, nbytes: int) -> str | None:
        if len(driver.registered) == 2:
            raise KeyboardInterrupt
        return driver.registration.register(address, nbytes)

    arena = PinnedArena(replace(driver.registration, register=register), limit=GIB, floor=PAGE)

    with pytest.raises(KeyboardInterrupt):
        arena.buffer(8 * PAGE)

    gc.collect()
    assert len(driver.taken_back) == 2
    assert driver.registered == {}
    assert arena.pinned_bytes == 0


def test_without_private_maps_the_pages_come_from_the_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows."""
    monkeypatch.delattr(mmap, "MAP_PRIVATE", raising=False)
    driver = FakeDriver()
    arena = arena_of(driver)

    buffer = arena.buffer(3 * PAGE + 1)
    buffer.fill_(3)

    assert driver.registered == {buffer.data_ptr(): 4 * PAGE}
    del buffer
    gc.collect()
    assert driver.registered == {}


@pytest.mark.skipif(platform.system() != "Linux", reason="reads the kernel's account of pages")
def test_buffers_are_private_memory_not_shared() -> None:
    """Shared pages would count as such, and outlive a fork."""
    arena = arena_of(FakeDriver())
    buffer = arena.buffer(PAGE)

    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [(*(int(end, 16) for end in line.split()[0].split("-")), line.split()[1]) for line in lines]
    flags = [flags for begin, end, flags in ranges if begin <= buffer.data_ptr() < end]

    assert flags == ["rw-p"]


@pytest.mark.parametrize(
    ("system", "total", "is_wsl", "limit"),
    [
        ("Linux", 32 * GIB, False, 16 * GIB),
        ("Linux", 32 * GIB, True, GIB // 2),
        ("Linux", GIB // 2, True, GIB // 4),
        ("Windows", 40 * GIB, False, 16 * GIB),
        ("Darwin", 32 * GIB, False, 0),
        ("Linux", 0, False, 0),
    ],
)
def test_the_default_limit_follows_the_system(system: str, total: int, is_wsl: bool, limit: int) -> None:
    assert default_pin_limit(system, total, is_wsl=is_wsl) == pytest.approx(limit, abs=1)


def test_the_default_limit_is_a_whole_number_below_half_of_ram_everywhere() -> None:
    for system in ("Linux", "Windows", "Darwin", "FreeBSD", ""):
        for total in (0, 1, 12_345_678_901, 64 * GIB):
            for is_wsl in (False, True):
                limit = default_pin_limit(system, total, is_wsl=is_wsl)
                assert isinstance(limit, int)
                assert 0 <= limit <= total / 2


def test_wsl_is_known_by_its_kernel() -> None:
    assert runs_under_wsl("5.15.153.1-microsoft-standard-WSL2")
    assert runs_under_wsl("4.4.0-19041-Microsoft")
    assert not runs_under_wsl("6.8.0-45-generic")


def test_this_machine_has_a_limit() -> None:
    assert system_pin_limit() >= 0


@pytest.mark.cuda  # registers memory with the driver
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: registers memory with its driver")
def test_the_driver_takes_registered_memory_for_pinned_and_forgets_a_failure() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    registration = cuda_registration(device)
    arena = PinnedArena(registration, limit=GIB)
    buffer = arena.buffer(20 * (1 << 20) + 17)

    assert arena.fallbacks == []
    assert buffer.is_pinned()
    assert buffer[PAGE + 3 :].is_pinned()
    assert registration.register(buffer.data_ptr(), PAGE) is not None  # registered already
    registration.clear_error()
    assert torch.equal(torch.ones(5, device=device).cpu(), torch.ones(5))
    arena.close()
    assert not buffer.is_pinned()
