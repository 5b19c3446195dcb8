"""Names of files as people give them."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def expanded(path: str | os.PathLike[str]) -> Path:
    """With ~ filled in. Raises FileNotFoundError for a user there is not."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(errno.ENOENT, "there is no such user", str(path)) from error


def same_file_key(path: Path) -> str:
    """Equal for two names of one place, whether there is a file yet or not."""
    return os.path.normcase(path.parent.resolve() / path.name)


def are_same_file(path: Path, other: Path) -> bool:
    """Whether both are there and the same file, by whatever names."""
    return path.exists() and other.exists() and path.samefile(other)
