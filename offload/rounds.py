"""In which order blocks are visited: each once, then round and round, some of them never again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import cycle


class Rounds:
    """Of blocks by name. `once` names those that only the first round visits.

    index: of each name in the first round. repeated: indices of the other rounds, in order.
    """

    def __init__(self, names: Sequence[str], once: Collection[str] = ()) -> None:
        self.index = {name: index for index, name in enumerate(names)}
        self.repeated = [index for index, name in enumerate(names) if name not in once]
        self._count = len(names)

    def order(self, start: int) -> Iterator[int]:
        """Indices from `start` on, without end unless nothing is repeated."""
        yield from range(start, self._count)
        yield from cycle(self.repeated)

    def next(self, start: int, is_moving: Callable[[int], bool]) -> int | None:
        """The first index from `start` on for which `is_moving`, within one round; None where there is none."""
        return next((index for index in [*range(start, self._count), *self.repeated] if is_moving(index)), None)
