"""Work in pieces that a CPU's threads take as they come free, OpenMP's "dynamic" schedule.

torch gives each thread the same share of a product, and all wait for the last. A core that is slower than others (an
efficiency core), or taken away for a while (by whoever reads weights, by the host of a virtual machine), then holds up
all of them. Here each piece is computed by one thread alone, which takes the next one when it is done.

Threads are Python's, made anew each time: less than a millisecond for all pieces, and nothing is left. That what a
thread asks of torch stays in that thread is told to OpenMP and to MKL, which have a setting per thread for it; torch's
own is for the process.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch

Piece = TypeVar("Piece")

# Each needs room for a piece, which is planned.
MOST_WORKERS = 8


class _Libraries:
    """The OpenMP and the MKL that torch computes with."""

    def __init__(self) -> None:
        """Raises OSError or AttributeError where they are not to be found: other systems, other libraries."""
        # Functions of what it depends on are found by it, too.
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        self._set_openmp = library.omp_set_num_threads
        self._openmp = library.omp_get_max_threads
        self._set_mkl = library.MKL_Set_Num_Threads_Local
        self._mkl = library.MKL_Get_Max_Threads

    @contextmanager
    def alone(self) -> Iterator[None]:
        """What this thread asks of torch inside is computed by this thread."""
        torch.get_num_threads()  # the first question of a thread sets it up, once
        before, mkl_before = self._openmp(), self._set_mkl(1)
        try:
            self._set_openmp(1)
            yield
        finally:
            try:
                self._set_openmp(before)
            finally:
                self._set_mkl(mkl_before)

    def is_alone(self) -> bool:
        return bool(torch.get_num_threads() == 1 and self._mkl() == 1)


@lru_cache
def _libraries() -> _Libraries | None:
    """None where threads cannot be told apart."""
    try:
        libraries = _Libraries()
    except (OSError, AttributeError):
        return None
    with libraries.alone():
        return libraries if libraries.is_alone() else None


def worker_count() -> int:
    """How many threads `share` takes: as many as torch does. This one alone where others cannot be told to work alone,
    or are so many that a piece for each would be much memory."""
    threads = torch.get_num_threads()
    return threads if threads <= MOST_WORKERS and _libraries() is not None else 1


def share(pieces: Sequence[Piece], work: Callable[[int, Piece], object], workers: int) -> None:
    """Call work(worker, piece) once for each of `pieces`, by so many `workers`, of which the caller's thread is 0.

    One worker computes as torch does, with all its threads; of several each computes alone. Without gradients. Each
    piece has the same bits whoever computes it. After an error no further piece is begun; it is raised when
    all threads have ended.
    """
    libraries = _libraries()
    if workers == 1 or len(pieces) < 2 or libraries is None:
        for piece in pieces:
            work(0, piece)
        return
    waiting, errors = deque(pieces), list[BaseException]()
    is_inference = torch.is_inference_mode_enabled()

    def take_part(worker: int) -> None:
        try:
            with torch.inference_mode(is_inference), torch.no_grad(), libraries.alone():
                for piece in _taken_from(waiting):
                    work(worker, piece)
        except BaseException as error:
            waiting.clear()
            errors.append(error)

    threads = [threading.Thread(target=take_part, args=(worker,)) for worker in range(1, min(workers, len(pieces)))]
    try:
        with suppress(RuntimeError):  # the system has no more threads: those that run do the work
            for thread in threads:
                thread.start()
        take_part(0)
    finally:
        _end(waiting, threads)
    if errors:
        try:
            raise next((error for error in errors if not isinstance(error, Exception)), errors[0])
        finally:
            errors.clear()  # it holds this frame, which would hold it


def _taken_from(waiting: deque[Piece]) -> Iterator[Piece]:
    """Until none is left, of what several threads take from."""
    while True:
        try:
            piece = waiting.popleft()
        except IndexError:
            return
        yield piece


def _end(waiting: deque[Piece], threads: Collection[threading.Thread]) -> None:
    """Returns, or raises what interrupted it, when all have ended: they use what the caller is about to give back."""
    try:
        waiting.clear()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    except BaseException:
        _end(waiting, threads)
        raise
