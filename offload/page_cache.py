"""How many pages of a file lie in the page cache: cachestat(2), since Linux 6.5."""

from __future__ import annotations

import ctypes
import errno
import os
import sys

# The same on all that torch runs on; glibc has no name for it.
_CACHESTAT = 451


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("nbytes", ctypes.c_uint64))


class _Counts(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("cached", "dirty", "in_writeback", "evicted", "recently_evicted")
    )


def cached_pages(descriptor: int, offset: int, nbytes: int) -> int:
    """Of the pages that `nbytes` (at least one) from `offset` on touch, those that lie in the page cache.

    Takes two or three microseconds for 2 MiB in a large page, twenty for as many small ones. Raises OSError where the
    system has no such call, or does not tell (newer ones ask that the file could be written or is one's own). On an
    overlay, whose pages lie under another file, the answer is 0.
    """
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, "there is no cachestat here")
    wanted, counts = _Range(offset, nbytes), _Counts()
    if _libc.syscall(_CACHESTAT, descriptor, ctypes.byref(wanted), ctypes.byref(counts), 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(counts.cached)


if sys.platform == "linux":
    _libc = ctypes.CDLL(None, use_errno=True)
