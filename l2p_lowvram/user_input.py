"""Which errors are the user's: one line and exit 2 instead of a traceback.

A ValueError alone does not tell a bad option from a bug. So a command wraps the stages that deal with what
the user gave (options, files, sizes) in `user_input()`, and those that compute in `refusals()`; whatever
those turn into InputError is reported in one line, and everything else keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_OWN_PACKAGES = frozenset({"l2p_lowvram", "offload", "tiling"})
_PATH_ERRORS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line saying what and the way out."""


@contextmanager
def user_input() -> Iterator[None]:
    """Around a stage that checks or opens what the user gave.

    Turns into InputError: errors about paths, our own error types, and a ValueError whose innermost
    frame is our code. One that comes out of torch or another library is a bug of ours and passes.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and not isinstance(error, _PATH_ERRORS):
            raise
        raise InputError(describe_os_error(error)) from error
    except ValueError as error:
        if not (_is_own_type(error) or _raised_by_own_code(error)):
            raise
        raise InputError(one_line(error)) from error


@contextmanager
def refusals() -> Iterator[None]:
    """Around a stage that computes: only our own error types (CheckpointError, BudgetError) are input."""
    try:
        yield
    except ValueError as error:
        if not _is_own_type(error):
            raise
        raise InputError(one_line(error)) from error


def describe_os_error(error: OSError) -> str:
    """`x.png: permission denied`; an error of our own without a number speaks for itself."""
    if error.filename is None or error.strerror is None:
        return one_line(error)
    return printable(f"{error.filename}: {error.strerror.lower()}")


def one_line(error: BaseException) -> str:
    return printable(" ".join(str(error).split()))


def printable(text: str) -> str:
    """With what could steer a terminal spelled out, "\\x1b": names of files and of what is in them may hold that."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _is_own_type(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in _OWN_PACKAGES


def _raised_by_own_code(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return module.partition(".")[0] in _OWN_PACKAGES
