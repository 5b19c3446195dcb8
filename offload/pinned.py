"""Page-locked host memory of exact size, which a device copies from without the host's help.

torch's own pinned allocator rounds every block up to a power of two (pytorch/pytorch#95823, #150517; seen
as 32 GiB for 20.4 GiB in sgl-project/sglang#36562), and keeps what is freed. So memory is mapped here and
registered with the driver, as sglang does.

A registration that fails is tried again at half its size, down to a floor; what is left stays pageable.
Copies from there still work, but make the host wait, so every step down is kept as a reason for a report.
One copy must not cross from registered to unregistered memory: the driver refuses it ("memory regions
spanning over allocations that are both registered and not registered with CUDA are not supported", CUDA
driver API, cuMemcpy). `PinnedArena.runs` says where to cut.
"""

from __future__ import annotations

import mmap
import platform
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor

from offload.sizes import format_bytes

# Below this a further try is not worth its time, nor its piece a copy of its own.
FLOOR_BYTES = 8 << 20
# The wall was met between 0.75 and 1 GiB on a WSL that had promised 25 GiB (FreeToken#233).
_WSL_BYTES = 512 << 20
# About half of RAM can be pinned on Windows (FreeToken#27), but not all of that half is ours;
# ComfyUI takes 40 % (its MAX_PINNED_MEMORY).
_WINDOWS_SHARE = 0.4
# Elsewhere there is no wall, but pinned memory cannot be swapped and a full machine kills processes.
_OTHER_SHARE = 0.5


def default_pin_limit(system: str, total_bytes: int, *, is_wsl: bool = False) -> int:
    """The most bytes to page-lock, given `platform.system()` and the bytes of RAM. Pure.

    A figure to start from, not a promise: registrations may still fail, and then fall back.
    """
    if system == "Darwin":
        return 0
    share = _WINDOWS_SHARE if system == "Windows" else _OTHER_SHARE
    limit = int(total_bytes * share)
    return min(limit, _WSL_BYTES) if is_wsl else limit


def system_pin_limit() -> int:
    """`default_pin_limit` of this machine."""
    is_wsl = runs_under_wsl(platform.release())
    return default_pin_limit(platform.system(), psutil.virtual_memory().total, is_wsl=is_wsl)


def runs_under_wsl(release: str) -> bool:
    """Whether a kernel release, as of `platform.release()`, is the Windows Subsystem's for Linux."""
    return "microsoft" in release.lower()


@dataclass(frozen=True)
class HostRegistration:
    """How a driver page-locks memory; errors are returned in words, None is success.

    register: address and bytes, both multiples of a page. unregister: the address of a registration.
    clear_error: forget the last failure, which would otherwise be raised by the next kernel that is queued.
    """

    register: Callable[[int, int], str | None]
    unregister: Callable[[int], str | None]
    clear_error: Callable[[], None]


def cuda_registration(device: torch.device) -> HostRegistration:
    """Registration with CUDA, or HIP on ROCm, where torch gives the functions the same names.

    Initialises CUDA. Both functions release the GIL and act on the calling thread's last error.
    """
    cudart = torch.cuda.cudart()

    def told(error: object) -> str | None:
        code = int(error)  # type: ignore[call-overload]
        return None if code == 0 else f"{cudart.cudaGetErrorString(error)} ({code})"

    def clear_error() -> None:
        # torch does not offer cudaGetLastError; a kernel launch asks it, raises what it finds, and so clears it.
        try:
            torch.ones(1, device=device).add_(1)
            torch.cuda.synchronize(device)
        except RuntimeError:
            pass

    # Registering makes a context on the current device, whichever that is; and any thread may unregister.
    def register(address: int, nbytes: int) -> str | None:
        with torch.cuda.device(device):
            return told(cudart.cudaHostRegister(address, nbytes, 0))

    def unregister(address: int) -> str | None:
        with torch.cuda.device(device):
            return told(cudart.cudaHostUnregister(address))

    return HostRegistration(register, unregister, clear_error)


@dataclass(frozen=True)
class Run:
    """`nbytes` of a tensor from byte `offset` on, all of one registration or all pageable."""

    offset: int
    nbytes: int
    is_pinned: bool


@dataclass(frozen=True)
class _Mapping:
    """One buffer: its pages, and (begin, end) of its registrations, counted from its address, in order."""

    address: int
    nbytes: int
    registered: list[tuple[int, int]]


class PinnedArena:
    """Hands out page-aligned host buffers, page-locked up to `limit` bytes and as far as the driver plays along.

    A buffer lives as long as any tensor on it. When the last one goes, or at `close`, its registrations are
    taken back, each exactly once and always before the memory goes: no copy from it may be under way then.
    Tensors outlive `close` as plain pageable memory. fallbacks: why something is not pinned, in order.
    """

    def __init__(self, registration: HostRegistration, *, limit: int, floor: int = FLOOR_BYTES) -> None:
        if limit < 0:
            raise ValueError(f"the pin limit must not be negative, got {limit} B; 0 pins nothing")
        self.fallbacks: list[str] = []
        self.pinned_bytes = 0  # now, whole pages
        self._registration = registration
        self._limit = limit // mmap.PAGESIZE * mmap.PAGESIZE
        self._floor = max(floor, mmap.PAGESIZE)
        self._mappings: dict[int, _Mapping] = {}
        self._closed = False

    def buffer(self, nbytes: int) -> Tensor:
        """uint8, uninitialised, its start aligned to a page. Raises ValueError once closed, MemoryError, OSError."""
        if self._closed:
            raise ValueError(f"a pinned buffer of {format_bytes(nbytes)} is asked for, but the arena is closed")
        pages, memory = _pages(nbytes)
        address = int(pages.ctypes.data)
        mapping = self._mappings[address] = _Mapping(address, pages.nbytes, [])
        # Holds on to the memory, which numpy may let go of before its weak references (from 2.5 on it does).
        finalizer = weakref.finalize(pages, self._release, address, memory)
        # The end of the process gives everything back; a courier that nobody stopped may still copy then.
        finalizer.atexit = False
        self._register(mapping)
        with torch.inference_mode(False):
            return torch.from_numpy(pages)[:nbytes]

    def runs(self, tensor: Tensor) -> list[Run] | None:
        """How to cut a contiguous tensor so that no part crosses a registration's edge; None if it is not ours."""
        start = tensor.data_ptr()
        for mapping in list(self._mappings.values()):
            begin = start - mapping.address
            if begin >= 0 and begin + tensor.nbytes <= mapping.nbytes:
                return _cut(mapping.registered, begin, begin + tensor.nbytes)
        return None

    def close(self) -> None:
        """Take back all registrations. May be called twice."""
        self._closed = True
        for address in list(self._mappings):
            self._release(address)

    def _register(self, mapping: _Mapping) -> None:
        """Register from the start of a buffer on, as much as possible."""
        begin, most = 0, mapping.nbytes
        error = f"the pin limit of {format_bytes(self._limit)} is reached"
        while begin < mapping.nbytes:
            left = mapping.nbytes - begin
            size = min(most, left, self._limit - self.pinned_bytes)
            if size < min(self._floor, left):
                self.fallbacks.append(f"{format_bytes(left)} of host memory stay pageable: {error}")
                break
            failure = self._registration.register(mapping.address + begin, size)
            if failure is None:
                mapping.registered.append((begin, begin + size))
                self.pinned_bytes += size
                begin += size
                continue
            self._registration.clear_error()
            error = f"pinning {format_bytes(size)} failed: {failure}"
            self.fallbacks.append(f"{error}; {format_bytes(self.pinned_bytes)} were pinned")
            most = size // 2 // mmap.PAGESIZE * mmap.PAGESIZE

    def _release(self, address: int, memory: object = None) -> None:
        """memory: what must not go before this has returned."""
        # Popped first: whoever comes second, a finalizer or `close`, finds nothing left to do.
        mapping = self._mappings.pop(address, None)
        for begin, end in mapping.registered if mapping else ():
            failure = self._registration.unregister(address + begin)
            self.pinned_bytes -= end - begin
            if failure is not None:
                self._registration.clear_error()
                self.fallbacks.append(f"{format_bytes(end - begin)} of host memory could not be unpinned: {failure}")


def _cut(registered: Sequence[tuple[int, int]], begin: int, end: int) -> list[Run]:
    """Runs of [begin, end), their offsets counted from `begin`."""
    runs: list[Run] = []
    done = begin
    for first, last in registered:
        if first < end and done < last:
            runs.append(Run(done - begin, min(last, end) - done, True))
            done = min(last, end)
    if done < end:
        runs.append(Run(done - begin, end - done, False))
    return runs


def _pages(nbytes: int) -> tuple[npt.NDArray[np.uint8], object]:
    """Whole private pages of our own, at least one, and what they are given back with when nobody holds it."""
    whole = max(-(-nbytes // mmap.PAGESIZE), 1) * mmap.PAGESIZE
    if not hasattr(mmap, "MAP_PRIVATE"):
        # Windows: a map without a file is shared memory there, so the pages come from the heap.
        memory = np.empty(whole + mmap.PAGESIZE, np.uint8)
        skip = -int(memory.ctypes.data) % mmap.PAGESIZE
        return memory[skip : skip + whole], memory
    pages = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_DONTFORK"):
        # A fork would let this process write to copies of pages that the device goes on reading.
        pages.madvise(mmap.MADV_DONTFORK)
    return np.frombuffer(pages, np.uint8), pages
