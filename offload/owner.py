"""Whose threads they are: a forked child has its parent's memory, but none of its threads."""

from __future__ import annotations

import os
import threading

# Of the names of all threads that read and move blocks.
THREAD_PREFIX = "offload-"


class Owner:
    """The process in which something that has threads was made."""

    def __init__(self) -> None:
        self._process = os.getpid()

    @property
    def is_another(self) -> bool:
        """Whether this is a child of it: nobody there would answer, and what is held is the parent's."""
        return os.getpid() != self._process

    def require(self, what: str) -> None:
        """Raise RuntimeError in a child."""
        if self.is_another:
            raise RuntimeError(
                f"{what} was opened before a fork, and its threads are the parent's; open it anew in the child, "
                "or start the child with spawn"
            )


def is_worker() -> bool:
    """Whether this thread is one of those that read and move blocks."""
    return threading.current_thread().name.startswith(THREAD_PREFIX)
