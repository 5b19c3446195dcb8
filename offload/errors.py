"""The errors a caller may want to catch.

ValueError
├── CheckpointError    a file is not what a checkpoint has to be; `path` names it
└── BudgetError        the work does not fit into the bytes it was given
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint cannot be used: missing, damaged, hostile or of another kind.

    `path` is the file (or folder) at fault, `reason` the message without it.
    """

    def __init__(self, path: str | PathLike[str], reason: str) -> None:
        # Both go into args: the error must survive pickling between processes.
        super().__init__(path, reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class BudgetError(ValueError):
    """A byte budget is too small; the message says what would fit.

    needed: the smallest budget that would do, in bytes. of: which memory's budget, "device" or "host"; where a CPU
    computes there is only the one.
    """

    def __init__(self, message: str, needed: int = 0, of: str = "device") -> None:
        super().__init__(message, needed, of)
        self.needed = needed
        self.of = of

    def __str__(self) -> str:
        return str(self.args[0])
