"""The most memory a run has held so far."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import psutil
import torch


def peak_rss_bytes() -> int:
    """The process's largest resident set, in bytes. Pages of mapped files count while they are resident."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":
        # Not getrusage: its maximum is inherited from the process that started this one.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kibibytes everywhere but on macOS


def start_device_peak(device: torch.device) -> None:
    """Count the device's peak from here on."""
    backend: Any = getattr(torch, device.type, None)
    if hasattr(backend, "reset_peak_memory_stats"):
        backend.reset_peak_memory_stats(device)


def peak_device_bytes(device: torch.device) -> int | None:
    """The most torch has reserved on `device`, in bytes; None where torch does not count it (CPU, MPS)."""
    backend: Any = getattr(torch, device.type, None)
    if not hasattr(backend, "max_memory_reserved"):
        return None
    return int(backend.max_memory_reserved(device))
