"""Parallel positional reads of file extents into host memory.

Faulting a large file in through a mapping is several times slower than reading it, so weights that are
streamed are read: in pieces of about 1 MiB, by several threads, straight to where they belong.

    read     positional reads through the page cache
    direct   positional reads past it (O_DIRECT), through an aligned buffer per thread; Linux only
    mmap     copies out of a mapping; a file cut short meanwhile ends the process, so only where it is asked for
"""

from __future__ import annotations

import errno
import mmap
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import MappingProxyType
from typing import BinaryIO, Protocol
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from offload.blocks import Extent
from offload.checkpoint import Checkpoint
from offload.errors import CheckpointError
from offload.identity import FileIdentity, check_before_read
from offload.owner import THREAD_PREFIX, Owner
from offload.paging import PageTable

PIECE_BYTES = 1 << 20
THREADS = 4
# Read, no longer wanted, and dropped from the page cache together.
_DROPPED_BYTES, _DROPPED_RANGES = 64 << 20, 1024
# What devices and file systems want offsets, lengths and addresses of direct reads to be multiples of.
DIRECT_ALIGNMENT = 4096

_Bytes = npt.NDArray[np.uint8]


class OpenFile(Protocol):
    """A file open for positional reads from several threads."""

    def read_into(self, offset: int, target: _Bytes) -> int:
        """Fill `target` from `offset` on. Returns the bytes read, fewer only at the end of the file."""

    def drop_cache(self, offset: int, nbytes: int) -> None:
        """Tell the system that this range need not stay in the page cache."""

    def close(self) -> None: ...


class _Unwanted:
    """Ranges of a file that need not stay in the page cache, told to the system many at a time: advice on pages just
    read makes the kernel flush lists on every processor, and given for each piece it takes longer than the reading.
    """

    def __init__(self, tell: Callable[[int, int], None]) -> None:
        """tell: is given offset and bytes of a range; what it raises as OSError is ignored, this being but advice."""
        self._tell = tell
        self._lock = threading.Lock()
        self._ranges: list[tuple[int, int]] = []
        self._bytes = 0

    def add(self, offset: int, nbytes: int) -> None:
        with self._lock:
            self._ranges.append((offset, nbytes))
            self._bytes += nbytes
            if self._bytes >= _DROPPED_BYTES or len(self._ranges) >= _DROPPED_RANGES:
                self._flush()

    def flush(self) -> None:
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        for offset, nbytes in _joined(self._ranges):
            with suppress(OSError):  # a file system that takes no advice
                self._tell(offset, nbytes)
        self._ranges.clear()
        self._bytes = 0


class PositionalFile:
    """One descriptor, read with preadv. read_ahead: whether the system may read on past what is asked for."""

    def __init__(self, path: Path, flags: int = 0, *, read_ahead: bool = True) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
        if not read_ahead and hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # a file system that takes no advice
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        self._unwanted = _Unwanted(self._let_go)

    def read_into(self, offset: int, target: _Bytes) -> int:
        done = 0
        while done < target.nbytes:
            count = self.read_some(offset + done, target[done:])
            if count == 0:
                break
            done += count
        return done

    def read_some(self, offset: int, target: _Bytes) -> int:
        """One system call, which may read fewer bytes than there are."""
        return os.preadv(self._descriptor, [target.data], offset)

    def drop_cache(self, offset: int, nbytes: int) -> None:
        self._unwanted.add(offset, nbytes)

    def _let_go(self, offset: int, nbytes: int) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        self._unwanted.flush()
        os.close(self._descriptor)


def _joined(ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The same (offset, bytes), neighbours made one."""
    start = end = -1
    for offset, nbytes in sorted(ranges):
        if offset != end:
            if end > start:
                yield start, end - start
            start = offset
        end = offset + nbytes
    if end > start:
        yield start, end - start


class DirectFile:
    """Reads past the page cache, a window of whole pages at a time, through one aligned buffer per thread."""

    def __init__(self, path: Path, piece_bytes: int = PIECE_BYTES) -> None:
        if not hasattr(os, "O_DIRECT"):
            raise OSError(errno.EINVAL, "this system has no direct reads; use --io read", str(path))
        self._path = path
        with self._refusal_told():
            self._file = PositionalFile(path, os.O_DIRECT)
        self._window_bytes = (piece_bytes // DIRECT_ALIGNMENT + 2) * DIRECT_ALIGNMENT
        self._local = threading.local()

    def read_into(self, offset: int, target: _Bytes) -> int:
        window = self._window()
        done = 0
        while done < target.nbytes:
            position = offset + done
            skip = position % DIRECT_ALIGNMENT
            wanted = min(target.nbytes - done, window.nbytes - skip)
            pages = -(-(skip + wanted) // DIRECT_ALIGNMENT) * DIRECT_ALIGNMENT
            with self._refusal_told():
                # One call: going on after a short one would ask for an offset that is not aligned.
                got = min(self._file.read_some(position - skip, window[:pages]) - skip, wanted)
            if got <= 0:
                break
            # numpy lets other threads run while it copies; a memoryview would not.
            np.copyto(target[done : done + got], window[skip : skip + got])
            done += got
        return done

    @contextmanager
    def _refusal_told(self) -> Iterator[None]:
        """EINVAL, when opened or only when read, is how a file system says that it has no direct reads."""
        try:
            yield
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            told = "no direct reads on this file system; use --io read"
            raise OSError(errno.EINVAL, told, str(self._path)) from error

    def _window(self) -> _Bytes:
        if not hasattr(self._local, "window"):
            # Anonymous mappings begin on a page, which is the alignment that is needed.
            self._local.window = np.frombuffer(mmap.mmap(-1, self._window_bytes), np.uint8)
        window: _Bytes = self._local.window
        return window

    def drop_cache(self, offset: int, nbytes: int) -> None:
        """Nothing to drop: the page cache was passed by."""

    def close(self) -> None:
        self._file.close()
        self._local = threading.local()


class SeekingFile:
    """One handle per thread, for systems without positional reads (Windows)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._local = threading.local()
        self._handles: list[BinaryIO] = []
        self._handle()  # a file that cannot be opened is reported now

    def _handle(self) -> BinaryIO:
        if not hasattr(self._local, "handle"):
            self._local.handle = self._path.open("rb", buffering=0)
            self._handles.append(self._local.handle)  # append is atomic
        handle: BinaryIO = self._local.handle
        return handle

    def read_into(self, offset: int, target: _Bytes) -> int:
        handle = self._handle()
        handle.seek(offset)
        done = 0
        while done < target.nbytes:
            count = handle.readinto(target[done:].data)  # type: ignore[attr-defined]
            if not count:
                break
            done += count
        return done

    def drop_cache(self, offset: int, nbytes: int) -> None:
        """Windows has no such advice."""

    def close(self) -> None:
        for handle in self._handles:
            handle.close()


class MappedFile:
    """Copies out of a mapping of the whole file."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._mapped: _Bytes = np.frombuffer(mapping, np.uint8)
        self._pages = PageTable(path, mapping, self._mapped)
        self._unwanted = _Unwanted(self._pages.let_go)

    def read_into(self, offset: int, target: _Bytes) -> int:
        source = self._mapped[offset : offset + target.nbytes]
        np.copyto(target[: source.nbytes], source)
        return source.nbytes

    def drop_cache(self, offset: int, nbytes: int) -> None:
        self._unwanted.add(offset, nbytes)

    def close(self) -> None:
        self._unwanted.flush()
        self._pages.close()
        # Dropping the last reference unmaps; mmap.close would raise while the array lives.
        del self._mapped, self._pages, self._unwanted


def open_file(path: Path, io: str, piece_bytes: int = PIECE_BYTES, *, read_ahead: bool = True) -> OpenFile:
    """Open a file for reading by `io`: "read", "direct" or "mmap". Raises OSError, ValueError."""
    if io == "read":
        return PositionalFile(path, read_ahead=read_ahead) if hasattr(os, "preadv") else SeekingFile(path)
    if io == "direct":
        return DirectFile(path, piece_bytes)
    if io == "mmap":
        return MappedFile(path)
    raise ValueError(f"io must be read, direct or mmap, got {io!r}")


class ReadJob:
    """Reads of one block under way; they write into the caller's buffer until `wait` or `cancel` returns."""

    def __init__(self, pieces: int) -> None:
        self._left = pieces
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._started: float | None = None
        self._finished = 0.0

    @property
    def span(self) -> tuple[float, float] | None:
        """When the first piece was begun and the last one done, of `time.perf_counter`; None before that."""
        return None if self._started is None else (self._started, self._finished)

    def begin_piece(self) -> None:
        """For the reader: a piece is begun."""
        if self._started is None:  # threads that race here are within microseconds of each other
            self._started = time.perf_counter()

    @property
    def stopped(self) -> bool:
        """Whether it was cancelled or failed: pieces not begun are left out."""
        return self._error is not None

    def finish_piece(self, error: BaseException | None = None) -> None:
        """For the reader: a piece is done, or failed, or was left out."""
        with self._changed:
            self._left -= 1
            self._error = self._error or error
            self._finished = time.perf_counter()
            self._changed.notify_all()

    def wait(self) -> None:
        """Return once all bytes are there. Else raise the first error (CancelledError after `cancel`), once no
        thread touches the buffer any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._left == 0)
            if self._error is not None:
                raise self._error

    def cancel(self) -> None:
        """Give up; returns once no thread touches the buffer any more."""
        with self._changed:
            if self._left:
                self._error = self._error or CancelledError("the reads were cancelled")
            self._changed.wait_for(lambda: self._left == 0)


@dataclass(frozen=True)
class _Piece:
    """What one thread reads at a time."""

    job: ReadJob
    label: str
    path: Path
    offset: int
    target: _Bytes
    drop_cache: bool


class Reader:
    """Reads extents of a checkpoint's files with `threads` threads. A context manager.

    Owns one descriptor per file (on Windows one per file and thread) and the threads, until `close`.
    Safe to use from several threads.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        io: str = "read",
        threads: int = THREADS,
        piece_bytes: int = PIECE_BYTES,
        read_ahead: bool = True,
    ) -> None:
        """Opens the files. read_ahead: False for a few small ranges, far apart, which the system else takes for the
        beginning of more. Raises CheckpointError when a file is no longer what `checkpoint` opened, OSError."""
        self.io = io
        self.read_bytes = 0
        self._piece_bytes = piece_bytes
        self._identities: Mapping[Path, FileIdentity] = checkpoint.identities
        self._files: dict[Path, OpenFile] = {}
        self._pieces: SimpleQueue[_Piece | None] = SimpleQueue()
        self._jobs: WeakSet[ReadJob] = WeakSet()
        self._submitting = threading.Lock()
        self._owner = Owner()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{THREAD_PREFIX}read", daemon=True) for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()
        try:
            for path in self._identities:
                self._files[path] = open_file(path, io, piece_bytes, read_ahead=read_ahead)
            self.verify()
        except BaseException:
            self.close()
            raise

    def verify(self) -> None:
        """Raise CheckpointError unless every file is still the one opened, its header included."""
        for path, identity in self._identities.items():
            try:
                identity.check_header(path)
            except FileNotFoundError as error:
                raise CheckpointError(path, "was removed since it was opened") from error

    def submit(self, label: str, extents: Sequence[Extent], buffer: Tensor, *, drop_cache: bool = False) -> ReadJob:
        """Start reading `extents` to their targets in `buffer`, a contiguous uint8 CPU tensor.

        label: the block, for messages. drop_cache: the bytes will not be read again soon, and what holds
        them in the page cache is better used otherwise.
        Raises CheckpointError when a file changed, ValueError once closed; errors of the reads come from the job.
        """
        self._owner.require("the reader")
        for path in sorted({extent.path for extent in extents}):
            check_before_read(self._identities[path], path, label)
        target: _Bytes = buffer.numpy()
        spans = [
            (extent, start) for extent in extents for start in range(0, extent.nbytes, self._piece_bytes)
        ]  # one per piece
        job = ReadJob(len(spans))
        with self._submitting:
            if self._closed:
                raise ValueError(f"block {label} cannot be read: the reader is closed")
            self._jobs.add(job)
            for extent, start in spans:
                nbytes = min(self._piece_bytes, extent.nbytes - start)
                begin = extent.target + start
                view = target[begin : begin + nbytes]
                self._pieces.put(_Piece(job, label, extent.path, extent.offset + start, view, drop_cache))
        self.read_bytes += sum(extent.nbytes for extent in extents)
        return job

    def _work(self) -> None:
        """What each thread does until it meets a None."""
        while (piece := self._pieces.get()) is not None:
            self._finish(piece)
            del piece  # it would keep the caller's buffer until the next one comes

    def _finish(self, piece: _Piece) -> None:
        try:
            if not piece.job.stopped:
                piece.job.begin_piece()
                self._read(piece)
        except BaseException as error:  # goes to whoever waits for the job
            piece.job.finish_piece(error)
        else:
            piece.job.finish_piece()

    def _read(self, piece: _Piece) -> None:
        file = self._files[piece.path]
        what = f"block {piece.label}: {piece.target.nbytes} bytes at byte {piece.offset}"
        try:
            got = file.read_into(piece.offset, piece.target)
            if piece.drop_cache:
                file.drop_cache(piece.offset, got)
        except OSError as error:
            raise OSError(error.errno, f"{what} cannot be read: {error.strerror or error}", str(piece.path)) from error
        if got < piece.target.nbytes:
            reason = f"{what} cannot be read: only {got} bytes are there; the file was cut short"
            raise CheckpointError(piece.path, reason)

    def close(self) -> None:
        """Cancel what is under way, end the threads, close the files. May be called twice."""
        if self._owner.is_another:
            return
        with self._submitting:  # no piece may come after what ends the threads
            self._closed = True
        for job in list(self._jobs):
            job.cancel()
        for _ in self._threads:
            self._pieces.put(None)
        while self._threads:
            self._threads.pop().join()
        while self._files:
            self._files.popitem()[1].close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


# What a short probe on a busy machine says is worth little more: by how much direct reads have to beat plain ones.
_DIRECT_MARGIN = 1.15
# Of the rate of the fastest reader and of its processor time: what pages brought in place must reach, and may take.
_PAGED_RATE, _PAGED_PROCESSOR = 0.5, 0.75


@dataclass(frozen=True)
class IoProbe:
    """What each way of reading a file does here, in bytes per second of each round, and why some are not available.

    processor: where "mmap" was tried, which is computing on the mapped file, on the processors that reading takes time
    of: seconds of processor time per byte, of each round. Else None.
    """

    rounds: Mapping[str, Sequence[float]]
    refused: Mapping[str, str]
    processor: Mapping[str, Sequence[float]] | None = None

    @property
    def rates(self) -> dict[str, float]:
        """The median of each way."""
        return {io: statistics.median(found) for io, found in self.rounds.items()}

    @property
    def io(self) -> str:
        """The best way: "mmap" where it clearly spares the processors and is not much slower; else `reader`."""
        return "mmap" if self._spares_processors else self.reader

    @property
    def reader(self) -> str:
        """Of the ways that read into buffers "direct" where it is clearly faster, in every round; else "read".

        Never copying out of a mapping: a file cut short meanwhile would end the process.
        """
        rates = self.rates
        if "direct" not in rates or "read" not in rates:
            return "direct" if "direct" in rates else "read"
        in_every_round = min(self.rounds["direct"]) > max(self.rounds["read"])
        return "direct" if in_every_round and rates["direct"] > _DIRECT_MARGIN * rates["read"] else "read"

    @property
    def _spares_processors(self) -> bool:
        if self.processor is None or "mmap" not in self.rounds or self.reader not in self.rounds:
            return False
        # Of each the least: what disturbs a round only ever adds to its processor time.
        mapped, read = min(self.processor["mmap"]), min(self.processor[self.reader])
        return self.rates["mmap"] >= _PAGED_RATE * self.rates[self.reader] and mapped <= _PAGED_PROCESSOR * read

    @property
    def reason(self) -> str:
        """Why, in a line."""
        return self.reason_of(self.io)

    def reason_of(self, chosen: str) -> str:
        """Why it is `chosen`, which is `io` or `reader`."""
        rates = self.rates
        measured = ", ".join(f"{io} {rate / 1e9:.2f} GB/s{self._told_processor(io)}" for io, rate in rates.items())
        readers = [rate for io, rate in rates.items() if io != "mmap"]
        is_plainer = chosen in rates and chosen == self.reader and rates[chosen] < max(readers)
        plainer = " (no other is clearly faster)" if is_plainer else ""
        unavailable = "".join(f"; {name} not available: {why}" for name, why in self.refused.items())
        return f"{chosen}{plainer}: {measured}{unavailable}"

    def _told_processor(self, io: str) -> str:
        if self.processor is None:
            return ""
        return f" at {min(self.processor[io]) * 1e9:.2f} s/GB of processor"


def probe_io(
    checkpoint: Checkpoint,
    *,
    rounds: int = 5,
    round_bytes: int = 16 << 20,
    in_place: bool = False,
) -> IoProbe:
    """Time each way of reading on ranges of the largest file that it alone touches, in turns.

    in_place: try "mmap", too: computing on the mapped file where it lies, on the processors that reading takes time of.
    Reads at most 3 * rounds * round_bytes, spread over the file. What is in the page cache stays there
    and counts: a file that is cached is read fastest through the cache.
    """
    path = max(checkpoint.files, key=lambda file: checkpoint.identities[file].size)
    rates: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}
    refused: dict[str, str] = {}
    with ExitStack() as stack:
        ways: dict[str, Callable[[Extent], None]] = {}
        # Written to: a ring's memory is new to the process once, not with every read.
        buffer = torch.from_numpy(np.full(round_bytes, 1, np.uint8))
        for io in ("read", "direct", *(["mmap"] if in_place else [])):
            try:
                if io == "mmap":
                    ways[io] = _paging(stack.enter_context(closing(checkpoint.pages(path))))
                else:
                    ways[io] = _reading(stack.enter_context(Reader(checkpoint, io=io)), buffer)
            except OSError as error:
                refused[io] = error.strerror or str(error)
        places = _places(checkpoint.identities[path].size, rounds * len(ways), round_bytes)
        for turn, (offset, nbytes) in enumerate(places):
            io = list(ways)[turn % len(ways)]
            try:
                seconds, of_processor = _timed(ways[io], Extent(path, offset, nbytes, 0))
                rates.setdefault(io, []).append(nbytes / seconds)
                processor.setdefault(io, []).append(of_processor / nbytes)
            except OSError as error:  # some file systems refuse direct reads only now
                refused[io] = error.strerror or str(error)
    kept = {io: found for io, found in rates.items() if io not in refused}
    return IoProbe(MappingProxyType(kept), MappingProxyType(refused), MappingProxyType(processor) if in_place else None)


def _reading(reader: Reader, buffer: Tensor) -> Callable[[Extent], None]:
    return lambda extent: reader.submit("probe", [extent], buffer).wait()


def _paging(pages: PageTable) -> Callable[[Extent], None]:
    def bring(extent: Extent) -> None:
        pages.expect(extent.offset, extent.nbytes)
        pages.populate(extent.offset, extent.nbytes)
        pages.let_go(extent.offset, extent.nbytes, drop_cache=False)

    return bring


def _timed(way: Callable[[Extent], None], extent: Extent) -> tuple[float, float]:
    """Seconds, and of them those of the processors, all threads of the process together."""
    started, used = time.perf_counter(), time.process_time()
    way(extent)
    return max(time.perf_counter() - started, 1e-9), time.process_time() - used


def _places(size: int, count: int, nbytes: int) -> list[tuple[int, int]]:
    """`count` ranges (offset, length) of at most `nbytes` spread over `size` bytes; disjoint where they fit."""
    nbytes = max(1, min(nbytes, size // count))
    return [(index * (size - nbytes) // max(count - 1, 1), nbytes) for index in range(count)]
