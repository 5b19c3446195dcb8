"""How much memory there is, and how much this process holds.

A container's limit is not the machine's: where the process runs in control groups, the tightest of them
counts. And resident memory is of two kinds. Anonymous pages are ours until we give them back; file-backed
ones the kernel takes away when it needs them, so a mapped checkpoint may make a process look large that is
not. Linux keeps a peak of their sum only, hence `MemoryWatch`.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import psutil
import torch

_STATUS = Path("/proc/self/status")
# glibc's names in malloc.h, and how much that is free may lie at the end of its heap.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_TRIM_BYTES = 32 << 20


def available_host_bytes(root: Path = Path("/")) -> int:
    """Bytes of RAM that may still be taken, page cache that can be dropped included.

    The machine's, or what the tightest control group leaves where that is less. root: of the file system
    that holds proc/ and sys/; another one only in tests.
    """
    return min([psutil.virtual_memory().available, *cgroup_available_bytes(root)])


def cgroup_available_bytes(root: Path = Path("/")) -> Iterator[int]:
    """What each limited control group around this process leaves, v1 and v2, from its own up to the root.

    File pages not used lately (`inactive_file`) count as left: the kernel drops them before it refuses
    memory. Groups without a limit, and files missing or unreadable, yield nothing.
    """
    mounts = root / "sys/fs/cgroup"
    for controllers, path in _memberships(root / "proc/self/cgroup"):
        if controllers == "":
            for mount in (mounts, mounts / "unified"):
                for group in _up_to_root(mount, path):
                    limits = (_number(group / "memory.max"), _number(group / "memory.high"))
                    used = _number(group / "memory.current")
                    yield from _left(limits, used, _stat(group, "inactive_file"))
        elif "memory" in controllers.split(","):
            for group in _up_to_root(mounts / "memory", path):
                limits = (_number(group / "memory.limit_in_bytes"), None)
                used = _number(group / "memory.usage_in_bytes")
                # The total is that of the groups below, too, as the usage is.
                yield from _left(limits, used, _stat(group, "total_inactive_file"))


def _memberships(listing: Path) -> Iterator[tuple[str, str]]:
    """(controllers, path) per line `number:controllers:path`; v2 has no controllers."""
    for line in _text(listing).splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            yield parts[1], parts[2]


def _up_to_root(mount: Path, path: str) -> Iterator[Path]:
    """The group and all those above it. In a container the path may lead outside the mount: never followed."""
    group = mount.joinpath(*(part for part in PurePosixPath(path).parts if part not in ("/", "..")))
    yield group
    while group != mount:
        group = group.parent
        yield group


def _left(limits: tuple[int | None, int | None], used: int | None, droppable: int | None) -> Iterator[int]:
    known = [limit for limit in limits if limit is not None]
    if known and used is not None:
        yield max(min(known) - used + min(droppable or 0, used), 0)


def _number(path: Path) -> int | None:
    """None where there is none to read; "max", too, means that there is no limit."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _stat(group: Path, key: str) -> int | None:
    for line in _text(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == key and value.isdecimal():
            return int(value)
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


@dataclass(frozen=True)
class ProcessMemory:
    """Resident bytes of this process by kind, and the most that their sum has been.

    anonymous: heap and private maps, pinned ones included. file_backed: mapped files, code included.
    shared: shared anonymous memory. Where the system tells no kinds apart, all of it counts as anonymous, mapped files
    too, and `kinds_told` is False.
    """

    anonymous: int
    file_backed: int
    shared: int
    peak: int
    kinds_told: bool = True

    @property
    def resident(self) -> int:
        return self.anonymous + self.file_backed + self.shared


def process_memory(status: Path = _STATUS) -> ProcessMemory:
    """What this process holds now. status: the kernel's account of it, another file only in tests."""
    fields = dict(_kibibytes(status))
    if {"RssAnon", "RssFile", "RssShmem", "VmHWM"} <= fields.keys():
        anonymous, file_backed, shared, peak = (fields[name] for name in ("RssAnon", "RssFile", "RssShmem", "VmHWM"))
        return ProcessMemory(anonymous, file_backed, shared, peak)
    info = psutil.Process().memory_info()
    return ProcessMemory(info.rss, 0, 0, max(info.rss, _peak_by_system(info)), kinds_told=False)


def _peak_by_system(info: Any) -> int:
    """The largest resident set in bytes, where the kernel's account cannot be read."""
    if hasattr(info, "peak_wset"):  # Windows
        return int(info.peak_wset)
    import resource

    # Only here: on Linux it is inherited from the process that started this one.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10  # kibibytes everywhere but on macOS


def _kibibytes(status: Path) -> Iterator[tuple[str, int]]:
    """Name and bytes of every line such as `RssAnon:  148 kB`."""
    for line in _text(status).splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[0].isdecimal() and words[1] == "kB":
            yield name, int(words[0]) << 10


class MemoryWatch:
    """Keeps the peaks of anonymous and of file-backed memory apart, while its `with` block runs.

    Samples every `interval` seconds on a thread of its own, and once at either end, so the peaks are lower
    bounds: what comes and goes between two samples is not seen. The peaks, in bytes, can be read at any
    time; the two need not have been reached at once. kinds_told: as `ProcessMemory` has it.
    """

    def __init__(self, interval: float = 0.02, *, sample: Callable[[], ProcessMemory] = process_memory) -> None:
        self.peak_anonymous = 0
        self.peak_file_backed = 0
        self.kinds_told = True
        self.samples = 0
        self._interval = interval
        self._sample = sample
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> MemoryWatch:
        self._take()
        self._done.clear()
        self._thread = threading.Thread(target=self._run, name="offload-memory-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        assert self._thread is not None, "entered before"
        self._done.set()
        self._thread.join()
        self._take()

    def _run(self) -> None:
        while not self._done.wait(self._interval):
            self._take()

    def _take(self) -> None:
        now = self._sample()
        self.peak_anonymous = max(self.peak_anonymous, now.anonymous)
        self.peak_file_backed = max(self.peak_file_backed, now.file_backed)
        self.kinds_told = now.kinds_told
        self.samples += 1


def available_device_bytes(device: torch.device | str) -> int | None:
    """Bytes free on a device as its driver tells it, and what torch's caching allocator holds there for nobody;
    None where the driver cannot be asked, as on MPS.

    On Windows other programs' memory may be missing from it. Of "cpu": `available_host_bytes`. Raises ValueError
    where there is no such device.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return available_host_bytes()
    module = torch.get_device_module(device.type)
    if not module.is_available():
        raise ValueError(f"there is no device {device} here; use cpu")
    if hasattr(module, "mem_get_info"):
        free, _total = module.mem_get_info(device)
        return int(free) + _idle_bytes(module, device)
    return None


def return_freed_memory(least: int) -> None:
    """Let glibc give blocks of at least so many bytes back to the system as soon as they are freed.

    By itself it keeps blocks of up to 32 MiB once it has seen them freed, and a process then holds a quarter more than
    its tensors take. Page faults cost time in exchange. For the whole process; nothing elsewhere.
    """
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, least)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)


def trim_heap() -> None:
    """Let glibc give back all that is free in its heap now; nothing elsewhere."""
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _libc() -> object:
    return ctypes.CDLL(None) if sys.platform.startswith("linux") else None


def _idle_bytes(module: Any, device: torch.device) -> int:
    """What the caching allocator would give back before it takes more."""
    if not hasattr(module, "memory_reserved"):
        return 0
    return max(int(module.memory_reserved(device)) - int(module.memory_allocated(device)), 0)


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
