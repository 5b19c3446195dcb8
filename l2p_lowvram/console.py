"""Results on standard output, one line at a time, and everything else on standard error.

Either may be closed, full, or read by a program that has gone away (`| head -1`): no reason to stop making pictures.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any, TextIO

_lost: list[str] = []


def print_line(text: str) -> None:
    """Print and flush on standard output."""
    if sys.stdout is None:
        return
    try:
        try:
            print(text, flush=True)
        except UnicodeEncodeError:  # a file name in bytes that are no text: hand them on as they are
            sys.stdout.buffer.write(os.fsencode(text) + b"\n")
            sys.stdout.buffer.flush()
    except BrokenPipeError:
        _silence(sys.stdout)
    except OSError as error:
        _silence(sys.stdout)
        _lost.append(error.strerror or str(error))
        say(f"standard output cannot be written to ({_lost[-1].lower()}); its lines are lost")


def lost_output() -> bool:
    """Whether results could not be printed, though somebody may wait for them. Told once."""
    was_lost = bool(_lost)
    _lost.clear()
    return was_lost


def say(text: str) -> None:
    """Print and flush on standard error, where there is one that can be written to."""
    if sys.stderr is None:
        return
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):  # gone, full, or closed
        _silence(sys.stderr)


class StandardError:
    """Standard error for those who write to it at length, such as progress bars; what it cannot take is dropped."""

    def write(self, text: str) -> int:
        if sys.stderr is not None:
            try:
                return sys.stderr.write(text)
            except (OSError, ValueError):
                _silence(sys.stderr)
        return len(text)

    def flush(self) -> None:
        if sys.stderr is not None:
            try:
                sys.stderr.flush()
            except (OSError, ValueError):
                _silence(sys.stderr)

    def isatty(self) -> bool:
        return sys.stderr is not None and sys.stderr.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def open_standard_descriptors() -> None:
    """Fill those of 0, 1 and 2 that are closed: the next file opened would get the number, and what C libraries
    print to it would be written into that file."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free


def _silence(stream: TextIO) -> None:
    # The descriptor, not the object: Python flushes once more as it ends, and must not fail then.
    with suppress(OSError, ValueError):
        target = stream.fileno()  # first: an object that is closed has none
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, target)
        finally:
            os.close(nowhere)
