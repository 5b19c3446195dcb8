"""Results on standard output, one line at a time."""

from __future__ import annotations

import os
import sys


def print_line(text: str) -> None:
    """Print and flush. A reader that has gone away (`| head -1`) is no reason to stop making pictures."""
    try:
        try:
            print(text, flush=True)
        except UnicodeEncodeError:  # a file name in bytes that are no text: hand them on as they are
            sys.stdout.buffer.write(os.fsencode(text) + b"\n")
            sys.stdout.buffer.flush()
    except BrokenPipeError:
        # The descriptor, not the object: Python flushes once more as it ends, and must not fail then.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
