"""Files that appear complete or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PureWindowsPath
from typing import BinaryIO

from .paths import destination

_REFUSED_BY_WINDOWS = frozenset('<>:"|?*')
_WINDOWS_PORTS = frozenset(port + number for port in ("COM", "LPT") for number in "123456789¹²³")
_WINDOWS_DEVICES = _WINDOWS_PORTS | {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"}


@contextmanager
def whole_file(
    path: Path, *, overwrite: bool, durable: bool = False, check: Callable[[Path], object] | None = None
) -> Iterator[BinaryIO]:
    """A file to write to that stands under `path` once the block ends, and nowhere if it raises.

    It is written under a hidden name in the same folder and then moved, so a reader of `path` never
    sees half of it; an exception, Ctrl-C included, removes it. Without `overwrite`, FileExistsError if
    the name is taken, also when it was taken meanwhile. OSErrors about it name `path`.
    durable: on the disk before it gets its name, so that a power cut leaves no half of it either.
    check: is given the whole file, under its hidden name, and raises where it must not get the other.
    What `overwrite` replaces is a regular file, or what a link leads to; for anything else FileExistsError.
    """
    require_replaceable(path)
    asked, path = path, destination(path) if overwrite else path
    hidden = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        # Not tempfile: that makes files only their owner can read.
        with hidden.open("xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if check is not None:
            check(hidden)
        if overwrite:
            hidden.replace(path)
        else:
            _move_to_free_name(hidden, path)
        if durable:
            _sync_folder(path.parent)
    except OSError as error:
        if error.filename is not None and Path(error.filename) != hidden:
            raise  # about another file that the block uses
        raise OSError(error.errno, error.strerror or str(error), str(asked)) from error
    finally:
        with suppress(OSError):  # a folder that cannot be written to
            hidden.unlink(missing_ok=True)


def require_replaceable(path: Path) -> None:
    """Raise OSError where the system takes no such name, or there is something other than a file at `path`: a folder, a
    device, a pipe."""
    require_name(path)
    if destination(path).is_symlink():
        raise FileExistsError(errno.EEXIST, "is a link that leads round in circles", str(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; name a file in it", str(path))
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "is no regular file; name another", str(path))


def require_name(path: Path) -> None:
    """Raise OSError for a name the system refuses, as far as that can be told without making a file."""
    reason = refused_by_windows(str(path)) if sys.platform == "win32" else None
    if reason is not None:
        raise OSError(errno.EINVAL, f"is a name that is refused here: {reason}; give another", str(path))
    # Not what pathlib asks: on Windows, and from Python 3.14 on, that takes a refused name for a free one.
    with suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(path)


def refused_by_windows(path: str) -> str | None:
    """What Windows has against the last part of `path`; None for nothing. Some of it would open a device, or make a
    file of another name, without an error."""
    name = PureWindowsPath(path).name
    refused = sorted(c for c in set(name) if c in _REFUSED_BY_WINDOWS or ord(c) < 32)
    if refused:
        return f"it holds {' '.join(refused)}"
    if name.endswith((".", " ")) and name != "..":
        return "it ends in a dot or a space"
    device = name.partition(".")[0].rstrip(" ")
    return f"{device} is a device" if device.upper() in _WINDOWS_DEVICES else None


def _move_to_free_name(source: Path, target: Path) -> None:
    """Move `source` unless `target` exists; no other process can slip in between."""
    try:
        # Fails if the name is taken, where rename would replace. The caller unlinks the old name.
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        # No hard links here (FAT, some network shares): claim the name with an empty file instead.
        target.open("xb").close()
        try:
            source.replace(target)
        except BaseException:
            target.unlink(missing_ok=True)
            raise


def _sync_folder(folder: Path) -> None:
    """Make names in `folder` as lasting as the files; nothing where the system opens no folders (Windows)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
