"""Processes of their own for measurements: a cold file before, a memory limit around, JSON from the last line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2p_lowvram.library_settings import settings

_MOUNT = Path("/sys/fs/cgroup")
# When the parent started the process, on the clock of time.perf_counter (one for all processes on Linux).
STARTED = "BENCHMARK_STARTED"


def as_command_line() -> None:
    """Start this script anew, unless its libraries were told what the command line tells them."""
    missing = settings(os.environ)
    if missing:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing})


def drop_cache(files: Iterable[Path]) -> None:
    """Put files out of the page cache ("cold"), as far as the system lets itself be told."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class Group:
    """A control group with a limit, of memory or else, or why there is none (`folder` None)."""

    folder: Path | None
    note: str

    def enter(self) -> None:
        """Put the calling process into the group."""
        if self.folder is not None:
            (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def peak_bytes(self) -> int | None:
        """Most that the group held, page cache included."""
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            if self.folder is not None and (self.folder / name).exists():
                return int((self.folder / name).read_text())
        return None


@contextmanager
def memory_group(limit: int | None) -> Iterator[Group]:
    """A fresh group limited to `limit` bytes, v1 or v2, gone afterwards. None: no group."""
    if limit is None:
        yield Group(None, "no limit")
        return
    try:
        folder = _make_group(limit)
    except OSError as error:
        yield Group(None, f"no limit: control groups cannot be made here ({error.strerror})")
        return
    try:
        yield Group(folder, f"memory group of {limit} bytes")
    finally:
        folder.rmdir()


@contextmanager
def disk_group(rate: int | None, path: Path) -> Iterator[Group]:
    """A fresh group that reads from the disk under `path` at `rate` bytes per second at most (control groups v1, as
    root). None: no group. Raises SystemExit where it cannot be made."""
    if rate is None:
        yield Group(None, "the disk as it is")
        return
    folder = _MOUNT / "blkio" / f"benchmark-{os.getpid()}-{time.monotonic_ns()}"
    try:
        folder.mkdir()
        (folder / "blkio.throttle.read_bps_device").write_text(f"{_disk_of(path)} {rate}")
    except OSError as error:
        raise SystemExit(f"the disk cannot be slowed down here: {error}") from error
    try:
        yield Group(folder, f"disk at {rate / 1e6:.0f} MB/s")
    finally:
        folder.rmdir()


@contextmanager
def read_ahead(nbytes: int | None, path: Path) -> Iterator[None]:
    """Linux reads ahead by `nbytes` at most on the disk under `path` meanwhile (as root). None: as it is set.

    Raises SystemExit where that cannot be changed.
    """
    if nbytes is None:
        yield
        return
    setting = _disk_folder(path) / "queue" / "read_ahead_kb"
    try:
        before = setting.read_text()
        setting.write_text(str(nbytes >> 10))
    except OSError as error:
        raise SystemExit(f"read-ahead cannot be set here: {error}") from error
    try:
        yield
    finally:
        setting.write_text(before)


def _disk_of(path: Path) -> str:
    """major:minor of the whole disk that holds a file; limits are not for partitions."""
    return (_disk_folder(path) / "dev").read_text().strip()


def _disk_folder(path: Path) -> Path:
    """Where Linux tells of the whole disk that holds a file."""
    device = path.stat().st_dev
    folder = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    return folder.parent if (folder / "partition").exists() else folder


def _make_group(limit: int) -> Path:
    v1 = _MOUNT / "memory"
    base, name = (v1, "memory.limit_in_bytes") if v1.is_dir() else (_MOUNT, "memory.max")
    folder = base / _own_group(base is v1) / f"benchmark-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    try:
        (folder / name).write_text(str(limit))
    except OSError:
        folder.rmdir()
        raise
    return folder


def _own_group(is_v1: bool) -> str:
    """Path of this process's group below the mount. With v2 its parent: groups with processes have no limits below."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if is_v1 and "memory" in controllers.split(","):
            return path.strip("/")
        if not is_v1 and not controllers:
            return str(Path(path).parent).strip("/")
    return ""


def measured(
    arguments: Sequence[str],
    *,
    limit: int | None = None,
    python: str = sys.executable,
    environment: Mapping[str, str] | None = None,
    disk: tuple[int | None, Path] | None = None,
) -> dict[str, Any]:
    """Run a Python script and return the JSON object of its last line, with "group" and "group_peak_bytes" added.

    OpenMP and torch are told what the command line tells them. Modules are compiled once, as those of an installed
    package are, also where Python is told to leave nothing behind. disk: for `disk_group`.
    """
    with memory_group(limit) as group, disk_group(*(disk or (None, Path()))) as slowed:

        def enter() -> None:
            group.enter()
            slowed.enter()

        variables = {
            **os.environ,
            **settings(os.environ),
            **(environment or {}),
            STARTED: str(time.perf_counter()),
        }
        variables.pop("PYTHONDONTWRITEBYTECODE", None)
        done = subprocess.run([python, *arguments], stdout=subprocess.PIPE, text=True, env=variables, preexec_fn=enter)
        if done.returncode:
            raise RuntimeError(f"{Path(arguments[0]).name} ended with {done.returncode} ({group.note})")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return {**found, "group": group.note, "group_peak_bytes": group.peak_bytes}
