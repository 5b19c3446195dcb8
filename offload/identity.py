"""What makes a file the one that was opened, so that a read never mixes two files into one model."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from offload.errors import CheckpointError
from offload.header import MAX_HEADER_BYTES


@dataclass(frozen=True)
class FileIdentity:
    """Size, modification time and a hash of the safetensors header of one file.

    The hash covers what every offset was computed from. Weights changed in place under an unchanged size
    and time go unnoticed: hashing gigabytes would cost more than the run.
    """

    size: int
    mtime_ns: int
    header_sha256: str

    @classmethod
    def of(cls, file: BinaryIO) -> FileIdentity:
        """The identity of an open safetensors file; moves its position. Raises OSError."""
        file.seek(0)
        prefix = file.read(8)
        # Bounded, because this also runs on whatever a file was replaced with.
        header = file.read(min(int.from_bytes(prefix, "little"), MAX_HEADER_BYTES))
        # Taken last: a change during the reads above is seen as a change later.
        status = os.fstat(file.fileno())
        return cls(status.st_size, status.st_mtime_ns, hashlib.sha256(prefix + header).hexdigest())

    def check(self, path: Path, status: os.stat_result) -> None:
        """Raise CheckpointError unless `status` still has this size and time."""
        if status.st_size != self.size:
            reason = f"has {status.st_size} bytes, it had {self.size} when it was opened"
            raise CheckpointError(path, f"{reason}; the file was replaced or cut short")
        if status.st_mtime_ns != self.mtime_ns:
            raise CheckpointError(path, "was modified since it was opened; load the model again")

    def check_header(self, path: Path) -> None:
        """`check`, and the header's hash, on whatever `path` names now. Raises CheckpointError, OSError."""
        with path.open("rb") as file:
            now = FileIdentity.of(file)
            self.check(path, os.fstat(file.fileno()))
        if now.header_sha256 != self.header_sha256:
            raise CheckpointError(path, "has another header than when it was opened; the file was replaced")


def check_before_read(identity: FileIdentity, path: Path, label: str) -> None:
    """Raise CheckpointError unless the file at `path` still is the one of `identity`, by size and time."""
    try:
        identity.check(path, path.stat())
    except FileNotFoundError as error:
        raise CheckpointError(path, f"was removed before block {label} was read") from error
    except CheckpointError as error:
        raise CheckpointError(path, f"{error.reason} (before reading block {label})") from None
