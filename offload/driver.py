"""What a card's driver holds for this process beside torch's allocator: context, kernels that were loaded, streams.

No budget is honoured without it: 0.7 GiB on an H200, of which torch tells nothing. NVIDIA's management library (NVML,
part of the driver) tells what each process holds; where it cannot be asked (ROCm, Windows, a container that hides
process numbers), all that is used on the card and not torch's is an upper bound, other programs included.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_LIBRARY = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
_SUCCESS, _TOO_SMALL = 0, 7
_UNKNOWN = ctypes.c_ulonglong(-1).value
_FIRST_GUESS = 32


class _Process(ctypes.Structure):
    """nvmlProcessInfo_t of nvml.h, second version."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


def driver_bytes(device: torch.device, runtime: Any = None, library: Any = None) -> tuple[int, bool]:
    """(bytes on a CUDA card that are this process's and not torch's allocator's, whether that is exact).

    Not exact, it may have other programs' in it. runtime, library: instead of torch.cuda and NVML, in tests.
    """
    runtime = torch.cuda if runtime is None else runtime
    reserved = int(runtime.memory_reserved(device))
    free, total = runtime.mem_get_info(device)
    most = max(int(total) - int(free) - reserved, 0)
    held = _held_by_this_process(str(getattr(runtime.get_device_properties(device), "uuid", "")), library)
    # What belongs to no process, a few MiB, is told in `most` alone; a number that cannot be is another process's.
    if held is None or not reserved < held <= most + reserved:
        return most, False
    return held - reserved, True


def _held_by_this_process(uuid: str, library: Any) -> int | None:
    """Bytes on the card of that name, by NVML; None where it does not tell."""
    try:
        library = ctypes.CDLL(_LIBRARY) if library is None else library
        with _started(library):
            card = ctypes.c_void_p()
            if library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(), ctypes.byref(card)) != _SUCCESS:
                return None
            held = [entry.used for entry in _processes(library, card) if entry.pid == os.getpid()]
    except (OSError, AttributeError):  # no such library, or an older one
        return None
    return held[0] if held and held[0] != _UNKNOWN else None


@contextmanager
def _started(library: Any) -> Iterator[None]:
    if library.nvmlInit_v2() != _SUCCESS:
        raise OSError("NVML cannot be used")
    try:
        yield
    finally:
        library.nvmlShutdown()


def _processes(library: Any, card: ctypes.c_void_p) -> list[_Process]:
    room = _FIRST_GUESS
    while True:
        count, entries = ctypes.c_uint(room), (_Process * room)()
        code = library.nvmlDeviceGetComputeRunningProcesses_v3(card, ctypes.byref(count), entries)
        if code == _TOO_SMALL and count.value > room:
            room = count.value + _FIRST_GUESS
            continue
        return list(entries[: min(count.value, room)]) if code == _SUCCESS else []
