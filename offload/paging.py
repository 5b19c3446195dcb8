"""Pages of mapped files: brought in before they are used, let go of afterwards.

A page that is there is used where it lies, so nothing is copied; bringing it takes a processor next to no time
where the file system has large folios and many milliseconds a gigabyte where it does not. A short probe tells.

What each call does on Linux (madvise(2), posix_fadvise(2)); elsewhere pages are brought by touching them.

    expect      MADV_HUGEPAGE: the kernel reads 2 MiB at a time and maps them in one piece
    populate    MADV_POPULATE_READ (Linux 5.14): unlike a touch, it fails with an error where a file was cut short
    let_go      MADV_DONTNEED, then POSIX_FADV_DONTNEED: unmapped first, since mapped pages stay

A large page can only be read where none of its 512 small ones is in the page cache. Else the kernel reads the others
as small ones, at several times the processor time; and as neighbours share pages, not all of them are let go of, so the
next round meets some again. Two things begin it:

    - somebody read a few bytes of it before. `populate` drops what little is there, and who reads a little here and
      there calls `forget`. Both ask cachestat (Linux 6.5); where it does not tell, those bytes stay. On file systems
      without large folios it gains nothing, and up to 1 MiB where two ranges meet is read again
    - the kernel reads ahead beyond the end of a short range, and where it meets pages that are there, goes on with
      small ones. `expect` tells it not to: MADV_RANDOM, which leaves MADV_HUGEPAGE its 2 MiB from Linux 5.18 on; older
      ones would read page by page. Long ranges keep it: while one waits for a large page, the next are under way. The
      advice is not taken back: a page that a short and a long range share is read by itself
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from offload.page_cache import cached_pages

# Linux's number; the mmap module has no name for it.
_MADV_POPULATE_READ = 22
HUGE_PAGE = 2 << 20
# From here on a range is long: two of the steps that the kernel reads ahead in where it is set to read far (8 MiB).
LONG_RANGE = 16 << 20
# Of a large page, the share in the cache below which it is dropped.
FEW = 0.5

_Bytes = npt.NDArray[np.uint8]


class PageTable:
    """The pages of one mapped file, `mapped` being its bytes. Owns a descriptor until `close`. Raises OSError."""

    def __init__(self, path: str | os.PathLike[str], mapping: mmap.mmap, mapped: _Bytes) -> None:
        self._mapping = mapping
        self._mapped = mapped
        self._descriptor: int | None = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._tells_cached = _tells_cached(self._descriptor)

    def expect(self, offset: int, nbytes: int) -> None:
        """This range will be brought in, whole: large pages are welcome."""
        # Rounded outwards: what the first page of a range is read with decides how those after it are.
        start = offset // HUGE_PAGE * HUGE_PAGE
        stop = -(-(offset + nbytes) // HUGE_PAGE) * HUGE_PAGE
        stop = min(stop, -(-self._mapped.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
        takes_large = self._advise("MADV_HUGEPAGE", start, stop) and mmap.PAGESIZE == 4096
        # Elsewhere MADV_RANDOM would have every small one read by itself.
        if takes_large and RANDOM_KEEPS_LARGE and nbytes < LONG_RANGE:
            self._advise("MADV_RANDOM", start, stop)

    def populate(self, offset: int, nbytes: int) -> None:
        """Bring a range into memory and map it; other Python threads run meanwhile.

        Raises OSError where the system can tell that bytes cannot be had; else touching them ends the process.
        """
        for large in range(offset // HUGE_PAGE * HUGE_PAGE, offset + nbytes, HUGE_PAGE):
            self._drop_few(large, (max(offset, large), min(offset + nbytes, large + HUGE_PAGE)))
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        _populate(self._mapped[start : offset + nbytes])

    def forget(self, offset: int, nbytes: int) -> None:
        """After a range was read in passing: drop its large pages of which little is in the page cache, if that can be
        told."""
        for large in range(offset // HUGE_PAGE * HUGE_PAGE, offset + nbytes, HUGE_PAGE):
            self._drop_few(large)

    def _drop_few(self, large: int, wanted: tuple[int, int] | None = None) -> None:
        """Drop what little is cached of the large page at `large`, unless all that is wanted of it, from and to, is."""
        if self._descriptor is None or not self._tells_cached:
            return
        try:
            nbytes = min(HUGE_PAGE, self._mapped.nbytes - large)
            if not 0 < cached_pages(self._descriptor, large, nbytes) < -(-nbytes // mmap.PAGESIZE) * FEW:
                return
            if wanted is not None and self._is_cached(self._descriptor, *wanted):
                return
            # Mapped ones stay where they are. Who is using them gets them anew.
            self._advise("MADV_DONTNEED", large, large + nbytes)
            os.posix_fadvise(self._descriptor, large, nbytes, os.POSIX_FADV_DONTNEED)
        except OSError:
            self._tells_cached = False  # it only saves time

    @staticmethod
    def _is_cached(descriptor: int, start: int, stop: int) -> bool:
        pages = -(-stop // mmap.PAGESIZE) - start // mmap.PAGESIZE
        return cached_pages(descriptor, start, stop - start) == pages

    def let_go(self, offset: int, nbytes: int, *, drop_cache: bool = True) -> None:
        """Unmap a range but for pages that it shares with its neighbours; if `drop_cache` also put it out of the
        page cache. What is still mapped by anyone stays there."""
        pages = (-(-offset // mmap.PAGESIZE) * mmap.PAGESIZE, (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE)
        self._advise("MADV_DONTNEED", *pages)
        if drop_cache and self._descriptor is not None and hasattr(os, "posix_fadvise"):
            # A large page that the block before shares was kept for this one.
            start = offset // HUGE_PAGE * HUGE_PAGE
            with suppress(OSError):  # a file system that takes no advice
                os.posix_fadvise(self._descriptor, start, offset + nbytes - start, os.POSIX_FADV_DONTNEED)

    def _advise(self, name: str, start: int, stop: int) -> bool:
        """Of whole pages. Whether it was taken: a kernel may not know it, and it is only advice."""
        if start < stop and hasattr(mmap, name):
            with suppress(OSError):
                self._mapping.madvise(getattr(mmap, name), start, stop - start)
                return True
        return False

    def close(self) -> None:
        """Close the descriptor; the mapping is its owner's. May be called twice."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _tells_cached(descriptor: int) -> bool:
    try:
        cached_pages(descriptor, 0, 1)
    except OSError:
        return False
    return True


def _random_keeps_large(release: str) -> bool:
    """Whether MADV_RANDOM leaves MADV_HUGEPAGE its large pages, on a Linux of this release ("6.8.0-45-generic")."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return found is not None and (int(found[1]), int(found[2])) >= (5, 18)


# By the release, not by cachestat: that may be refused where the kernel has it, and in a container where it has not.
RANDOM_KEEPS_LARGE = sys.platform == "linux" and _random_keeps_large(os.uname().release)


def populate_by_touch(pages: _Bytes) -> None:
    """Read one byte of each page, of bytes that begin on a page."""
    pages[:: mmap.PAGESIZE].max(initial=0)


def _kernel_call() -> Callable[[_Bytes], None] | None:
    """MADV_POPULATE_READ through libc (mmap.madvise would keep other Python threads from running); None without it."""
    if sys.platform != "linux":
        return None
    try:
        madvise = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError):
        return None
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def call(pages: _Bytes) -> None:
        if madvise(pages.ctypes.data, pages.nbytes, _MADV_POPULATE_READ) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    try:
        call(np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.uint8))
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise
    return call


_by_kernel = _kernel_call()
# Whether a file cut short is an error rather than the end of the process.
POPULATES_SAFELY = _by_kernel is not None
_populate: Callable[[_Bytes], None] = _by_kernel or populate_by_touch
