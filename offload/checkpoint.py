"""Checkpoints as mappings: one safetensors file or a sharded set, opened by the header only.

Opening reads the headers and maps the files; no weight is read before someone touches it.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from offload.errors import CheckpointError
from offload.header import (
    MAX_HEADER_BYTES,
    PICKLE_REFUSED,
    PICKLE_SUFFIXES,
    Header,
    TensorInfo,
    parse_json_object,
    read_header,
    shown,
)
from offload.identity import FileIdentity
from offload.paging import PageTable
from offload.sizes import format_bytes

# Far more than any model has.
MAX_SHARDS = 1024
# Of all shards: what the largest index can list, with room. The tensors of a set are bounded by its index, but not
# the metadata of its shards.
MAX_SET_HEADER_BYTES = 2 * MAX_HEADER_BYTES
INDEX_SUFFIX = ".safetensors.index.json"

_Bytes = npt.NDArray[np.uint8]


class Checkpoint:
    """The tensors of one file or of a sharded set, by name. A context manager.

    metadata: the `__metadata__` of all files; where they disagree, the first file by name wins.
    tensors: every tensor's place, in file order (shards by name).
    files: the safetensors files, by name. nbytes: bytes of all tensors.
    identities: what each file was when its header was read, for whoever reads it later.

    Safe to read from several threads. The files must not change while open: touching a mapped page
    past the end of a file cut short meanwhile kills the process (SIGBUS).
    """

    def __init__(self, parts: Sequence[_Part]) -> None:
        """For `open`, which checks what this takes for granted."""
        metadata: dict[str, str] = {}
        for part in reversed(parts):
            metadata.update(part.header.metadata)
        self.metadata: Mapping[str, str] = MappingProxyType(metadata)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {info.name: info for part in parts for info in part.header.tensors}
        )
        self.files = tuple(part.path for part in parts)
        self.identities: Mapping[Path, FileIdentity] = MappingProxyType({part.path: part.identity for part in parts})
        self.nbytes = sum(info.nbytes for info in self.tensors.values())
        self._mapped: dict[Path, _Bytes] | None = {part.path: part.mapped for part in parts}
        self._mappings = {part.path: part.mapping for part in parts}

    @property
    def header_sha256(self) -> str:
        """Hash of all headers: tells checkpoints of different tensors apart. Fine-tunes in one layout have the same."""
        hashes = [identity.header_sha256 for identity in self.identities.values()]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Open a safetensors file, a `*.safetensors.index.json`, or a folder that holds one of them.

        Reads headers only: milliseconds, whatever the size. Raises CheckpointError for anything that is
        not a sound checkpoint, pickles among them.
        """
        path = Path(path)
        try:
            if path.is_dir():
                path = _find_in_folder(path)
            parts = _open_set(path) if path.name.endswith(INDEX_SUFFIX) else [_open_file(path)]
        except OSError as error:
            culprit = error.filename or path
            raise CheckpointError(culprit, f"cannot be read: {error.strerror or error}") from error
        return cls(parts)

    def tensor(self, name: str) -> Tensor:
        """The tensor on the CPU as a view of the mapped file, which pages in on first use.

        Read-only by convention and by the operating system: writing into it ends the process, so clone
        first. It keeps its file mapped, also after `close`. Copied instead of viewed only where the file
        does not align it to its element size. Raises KeyError for an unknown name, ValueError once closed.
        """
        mapped = self._mapped
        if mapped is None:
            raise ValueError(f"{self.files[0]}: the checkpoint is closed, tensor {shown(name)} cannot be read")
        info = self.tensors.get(name)
        if info is None:
            raise KeyError(f"no tensor {shown(name)} in {', '.join(file.name for file in self.files[:3])}")
        view = torch.from_numpy(mapped[info.path][info.offset : info.offset + info.nbytes])
        if info.offset % info.torch_dtype.itemsize:
            view = view.clone()
        return view.view(info.torch_dtype).reshape(info.shape)

    def pages(self, path: Path) -> PageTable:
        """To bring in and let go of the pages of one of `files`. Its owner closes it. Raises ValueError, OSError."""
        if self._mapped is None:
            raise ValueError(f"{path}: the checkpoint is closed, its pages cannot be brought in")
        return PageTable(path, self._mappings[path], self._mapped[path])

    def close(self) -> None:
        """Let go of the files. Each stays mapped until the last tensor taken from it is gone."""
        # mmap.close would raise while views live; dropping the references unmaps at the right moment.
        self._mapped = None
        self._mappings = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class _Part:
    """One open file: checked header, identity, and the mapping as it is and as an array."""

    path: Path
    header: Header
    identity: FileIdentity
    mapping: mmap.mmap = field(repr=False)
    mapped: _Bytes = field(repr=False)


class _WritableAlias:
    """Tells numpy that a read-only mapping is writable, because torch warns about arrays that are not.

    The mapping itself must stay read-only and shared. A private copy-on-write one (mmap.ACCESS_COPY, and
    what torch and safetensors map) is charged against the commit limit in full: Linux refuses it for a
    file larger than RAM + swap, Windows for one larger than RAM + page file.
    """

    def __init__(self, mapping: mmap.mmap) -> None:
        self._owner = np.frombuffer(mapping, np.uint8)  # keeps the mapping open
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "typestr": "|u1",
            "shape": self._owner.shape,
            "data": (self._owner.ctypes.data, False),
        }


def _open_file(path: Path) -> _Part:
    """Check the header of one safetensors file and map it. Raises CheckpointError, OSError."""
    _require_file(path)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise CheckpointError(path, PICKLE_REFUSED)
    with path.open("rb") as file:
        header = read_header(file, path)
        identity = FileIdentity.of(file)
        try:
            mapping = mmap.mmap(file.fileno(), header.file_bytes, access=mmap.ACCESS_READ)
        except ValueError as error:  # the file shrank since its size was read
            raise CheckpointError(path, f"cannot be mapped: {error}") from error
    return _Part(path, header, identity, mapping, np.asarray(_WritableAlias(mapping)))


def _require_file(path: Path) -> None:
    # Also keeps `open` from waiting for ever on a named pipe.
    if not path.exists():
        raise CheckpointError(path, "no such file or folder")
    if not path.is_file():
        raise CheckpointError(path, "is not a regular file")


def _find_in_folder(folder: Path) -> Path:
    """The index or the only safetensors file of a folder; raises CheckpointError when there is a choice."""
    names = sorted(entry.name for entry in folder.iterdir())
    found = [name for name in names if name.endswith(INDEX_SUFFIX) or name == "model.safetensors"]
    found = found or [name for name in names if name.endswith(".safetensors")]
    if len(found) == 1:
        return folder / found[0]
    if found:
        some = ", ".join(map(shown, found[:4])) + (", ..." if len(found) > 4 else "")
        raise CheckpointError(folder, f"holds {len(found)} candidates ({some}); name one of them")
    pickles = [name for name in names if Path(name).suffix.lower() in PICKLE_SUFFIXES]
    if pickles:
        raise CheckpointError(folder, f"holds only pickles ({shown(pickles[0])}), {PICKLE_REFUSED}")
    raise CheckpointError(folder, "holds neither a .safetensors file nor an index of them")


def _open_set(index: Path) -> list[_Part]:
    """Open every shard of an index, in order of their names, and compare them with it.

    Raises CheckpointError, OSError.
    """
    weight_map = _read_weight_map(index)
    shards = {name: index.parent / name for name in sorted(set(weight_map.values()))}
    missing = [name for name, path in shards.items() if not path.is_file()]
    if missing:
        raise CheckpointError(index, f"lacks {len(missing)} of {len(shards)} shards, first is {missing[0]}")
    if len(shards) > MAX_SHARDS:
        raise CheckpointError(index, f"index names {len(shards)} shards, the limit is {MAX_SHARDS}")
    listed: dict[str, list[str]] = {name: [] for name in shards}
    for tensor, shard in weight_map.items():
        listed[shard].append(tensor)
    parts: list[_Part] = []
    homes: dict[str, str] = {}
    header_bytes = 0
    for path in shards.values():
        parts.append(_open_file(path))
        header_bytes += parts[-1].header.nbytes
        if header_bytes > MAX_SET_HEADER_BYTES:
            reason = f"headers of {len(parts)} of {len(shards)} shards take {format_bytes(header_bytes)}"
            raise CheckpointError(index, f"{reason}, the limit is {format_bytes(MAX_SET_HEADER_BYTES)}")
        # At once: what a set may list in all is bounded by the index, however many shards it names.
        _check_part(index, weight_map, parts[-1], homes, listed[path.name])
    return parts


def _read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name → shard file name, each shard a plain name beside the index. Raises CheckpointError."""
    _require_file(index)
    with index.open("rb") as file:
        raw = file.read(MAX_HEADER_BYTES + 1)
    if len(raw) > MAX_HEADER_BYTES:
        raise CheckpointError(index, f"index is larger than the limit of {format_bytes(MAX_HEADER_BYTES)}")
    # Its own metadata only repeats sizes, at times as floats, and is not used.
    weight_map = parse_json_object(raw, index, "index", floats=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(index, "index needs a weight_map that maps tensor names to files")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            reason = (
                f"weight_map sends tensor {shown(tensor)} to {shown(str(shard))}; "
                "it must be a file name in the folder of the index"
            )
            raise CheckpointError(index, reason)
    return weight_map


def _is_plain_name(name: str) -> bool:
    """Whether `name` cannot leave its folder on any system.

    A link of that name may: the Hugging Face cache consists of such links, made by its owner.
    """
    return name.isprintable() and len(name) <= 255 and name not in {"", ".", ".."} and not set(name) & set("/\\:")


def _check_part(
    index: Path, weight_map: Mapping[str, str], part: _Part, homes: dict[str, str], listed: Sequence[str]
) -> None:
    """Require that a shard has the tensors `listed` for it, and none that the index does not list or that another shard
    has; adds them to `homes`, tensor name → shard file name. Raises CheckpointError."""
    extra = [info.name for info in part.header.tensors if info.name not in weight_map]
    if extra:
        place = f"{shown(extra[0])} in {part.path.name}"
        raise CheckpointError(index, f"index lacks {len(extra)} tensors of its shards, first is {place}")
    for info in part.header.tensors:
        if info.name in homes:
            both = f"{homes[info.name]} and in {part.path.name}"
            raise CheckpointError(index, f"tensor {shown(info.name)} is in {both}; it must be in one")
        homes[info.name] = part.path.name
    absent = [name for name in listed if homes.get(name) != part.path.name]
    if absent:
        place = f"{shown(absent[0])}, which is not in {part.path.name}"
        raise CheckpointError(index, f"index lists {len(absent)} absent tensors, first is {place}")
