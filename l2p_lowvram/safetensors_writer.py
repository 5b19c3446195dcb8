"""Writing safetensors files tensor by tensor, so that memory holds one at a time."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from offload.header import DTYPES

from .whole_file import whole_file

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to write.

    dtype: as safetensors spells it. data: called once, when its turn comes; yields its bytes,
    little-endian and row by row, in pieces of any size (buffers with one-byte items).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Callable[[], Iterable[bytes | memoryview]]

    @classmethod
    def of(cls, name: str, dtype: torch.dtype, shape: tuple[int, ...], read: Callable[[], Tensor]) -> TensorEntry:
        """An entry whose bytes are those of the CPU tensor that `read` returns when they are needed."""
        return cls(name, _DTYPE_NAMES[dtype], shape, lambda: [tensor_buffer(read())])

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
    progress: Callable[[int], object] | None = None,
) -> int:
    """Write a safetensors file and return its size in bytes.

    The file appears under its name only when it is whole, and nothing is left when anything goes wrong,
    Ctrl-C included. `progress` is told the bytes of every piece written. Raises FileExistsError unless
    `overwrite`, ValueError for an entry whose data is not as long as its shape says.
    """
    path = Path(path)
    entries = list(entries)
    header = encode_header(entries, metadata)
    if path.exists() and not overwrite:  # asked again at the end: the writing may take minutes
        raise FileExistsError(errno.EEXIST, "already exists", str(path))
    with whole_file(path, overwrite=overwrite) as file:
        file.write(header)
        for entry in entries:
            written = 0
            for piece in entry.data():
                file.write(piece)
                written += len(piece)
                if progress is not None:
                    progress(len(piece))
            if written != entry.nbytes:
                reason = f"{entry.dtype} {list(entry.shape)} takes {entry.nbytes} bytes"
                raise ValueError(f"tensor {entry.name!r}: {reason}, its data has {written}")
    return len(header) + sum(entry.nbytes for entry in entries)
