"""Writing safetensors files piece by piece, so that memory holds a few pieces at a time."""

from __future__ import annotations

import errno
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from offload.header import DTYPES

from .whole_file import whole_file

Buffer = bytes | memoryview

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to write.

    dtype: as safetensors spells it. data: called once, when its turn comes; yields its bytes,
    little-endian and row by row, in pieces of any size (buffers with one-byte items).
    ahead: the same pieces one by one, each made by a function that may be called before its turn and on
        another thread; empty where the data has to wait for its turn.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Callable[[], Iterable[Buffer]]
    ahead: tuple[Callable[[], Buffer], ...] = ()

    @classmethod
    def of(cls, name: str, dtype: torch.dtype, shape: tuple[int, ...], read: Callable[[], Tensor]) -> TensorEntry:
        """An entry whose bytes are those of the CPU tensor that `read` returns when they are needed."""
        return cls(name, _DTYPE_NAMES[dtype], shape, lambda: [tensor_buffer(read())])

    @classmethod
    def of_rows(
        cls,
        name: str,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        read: Callable[[int, int], Tensor],
        rows: int,
    ) -> TensorEntry:
        """An entry made of runs of `rows` rows; `read(start, stop)` returns one, on any thread."""

        def piece(start: int) -> Callable[[], Buffer]:
            return lambda: tensor_buffer(read(start, min(start + rows, shape[0])))

        pieces = tuple(piece(start) for start in range(0, shape[0], rows))
        return cls(name, _DTYPE_NAMES[dtype], shape, lambda: (make() for make in pieces), pieces)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


def tensor_buffer(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, row by row; a view where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def encode_header(entries: Sequence[TensorEntry], metadata: Mapping[str, str] | None = None) -> bytes:
    """Length and header of a file with these tensors in this order; the data section follows.

    Padded with spaces to a multiple of 8, so that the data section is aligned. Raises ValueError for a
    name used twice.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for entry in entries:
        if entry.name in header:
            raise ValueError(f"tensor {entry.name!r} is there twice")
        end = offset + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_bytes(entries: Sequence[TensorEntry], metadata: Mapping[str, str] | None = None) -> int:
    """The size that `write_safetensors` would give the file."""
    return len(encode_header(entries, metadata)) + sum(entry.nbytes for entry in entries)


def write_safetensors(
    path: str | os.PathLike[str],
    entries: Iterable[TensorEntry],
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
    durable: bool = False,
    threads: int = 0,
    progress: Callable[[int], object] | None = None,
    check: Callable[[Path], object] | None = None,
) -> int:
    """Write a safetensors file and return its size in bytes.

    The file appears under its name only when it is whole, and nothing is left when anything goes wrong,
    Ctrl-C included. threads: how many make pieces ahead while others are written, at most two each.
    durable, check: as for `whole_file`. `progress` is told the bytes of every piece written. Raises
    FileExistsError unless `overwrite`, ValueError for an entry whose data is not as long as its shape says.
    """
    path = Path(path)
    entries = list(entries)
    header = encode_header(entries, metadata)
    if os.path.lexists(path) and not overwrite:  # asked again at the end: the writing may take minutes
        raise FileExistsError(errno.EEXIST, "already exists", str(path))
    whole = whole_file(path, overwrite=overwrite, durable=durable, check=check)
    with whole as file, _Ahead(entries, threads) as ahead:
        file.write(header)
        for entry in entries:
            written = 0
            for piece in ahead.pieces(entry):
                file.write(piece)
                written += len(piece)
                if progress is not None:
                    progress(len(piece))
            if written != entry.nbytes:
                reason = f"{entry.dtype} {list(entry.shape)} takes {entry.nbytes} bytes"
                raise ValueError(f"tensor {entry.name!r}: {reason}, its data has {written}")
    return len(header) + sum(entry.nbytes for entry in entries)


class _Ahead:
    """The pieces of entries, each in its turn; those that may be made ahead are, across entries.

    Pieces of an entry that waits for its turn are asked for when all before them have been made.
    """

    def __init__(self, entries: Sequence[TensorEntry], threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "write-ahead") if threads else None
        self._limit = 2 * threads
        self._waiting = (make for entry in entries for make in entry.ahead)
        self._begun: deque[Future[Buffer]] = deque()

    def pieces(self, entry: TensorEntry) -> Iterable[Buffer]:
        """For every entry once, in order."""
        if self._pool is None or not entry.ahead:
            return entry.data()
        return self._made(self._pool, len(entry.ahead))

    def _made(self, pool: ThreadPoolExecutor, count: int) -> Iterator[Buffer]:
        for _ in range(count):
            while len(self._begun) < self._limit and (make := next(self._waiting, None)) is not None:
                self._begun.append(pool.submit(make))
            yield self._begun.popleft().result()

    def __enter__(self) -> _Ahead:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
