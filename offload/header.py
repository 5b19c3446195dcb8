"""The header of one safetensors file, hostile until checked.

    8 bytes    length n of the header, unsigned, little endian
    n bytes    JSON object: {"name": {"dtype": ..., "shape": [...], "data_offsets": [begin, end]}, ...}
               and optionally "__metadata__": {str: str}
    the rest   the data section; offsets count from its start and tile it without hole or overlap

Whatever the bytes, `read_header` costs bounded memory and time, and either returns a header in which
every tensor lies inside the file or raises CheckpointError. It never reads the data section.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch

from offload.errors import CheckpointError
from offload.sizes import format_bytes

# A header takes about 130 bytes per tensor: 100 kB for 777 tensors, so this holds over 100,000.
# Parsed JSON can take some 30 times its text, which is why the format's own 100 MB is too generous.
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 200_000
MAX_RANK = 8
# What torch can index: element counts, strides and byte counts are signed 64-bit.
_MAX_TENSOR_BYTES = 2**63 - 1

PICKLE_SUFFIXES = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle"})
PICKLE_REFUSED = "refused: a pickle can run code when it is loaded; convert it to safetensors"

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    # Added in torch 2.7.
    **({"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {}),
}
# Part of the format, but no torch tensor can be a view of the packed ones, and no model here uses the rest.
_UNSUPPORTED_DTYPES = frozenset(
    {"F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "C64"} - DTYPES.keys()
)


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `offset` is in bytes from the start of the file, not of its data section."""

    name: str
    dtype: str  # as safetensors spells it: "I8", "BF16", "F8_E4M3"
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Header:
    """A checked header; `tensors` in file order. nbytes: of its JSON."""

    metadata: dict[str, str]
    tensors: tuple[TensorInfo, ...]
    file_bytes: int
    nbytes: int


def shown(name: str) -> str:
    """A name from a file, quoted and cut: it may be a megabyte long or steer a terminal."""
    return repr(name if len(name) <= 120 else name[:117] + "...")


def read_header(file: BinaryIO, path: Path) -> Header:
    """Read and check the header of an open file; `path` is for messages and the returned tensors.

    Raises CheckpointError naming the file, the tensor and the value at fault.
    """
    file_bytes = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    if len(prefix) < 8:
        raise CheckpointError(path, f"file has {len(prefix)} bytes, a safetensors file has at least 10")
    header_bytes = int.from_bytes(prefix, "little")
    data_start = 8 + header_bytes
    if header_bytes > MAX_HEADER_BYTES or data_start > file_bytes:
        _refuse_length(path, prefix, file_bytes)
    raw = file.read(header_bytes)
    if len(raw) < header_bytes:
        raise CheckpointError(path, f"header has {len(raw)} of {header_bytes} bytes; the file shrank meanwhile")
    if not raw.startswith(b"{"):
        raise CheckpointError(path, f"header must start with '{{', got {raw[:8]!r}; is it a safetensors file?")
    entries = parse_json_object(raw, path, "header")
    metadata = _metadata(entries.pop("__metadata__", {}), path)
    if len(entries) > MAX_TENSORS:
        raise CheckpointError(path, f"header lists {len(entries)} tensors, the limit is {MAX_TENSORS}")
    data_bytes = file_bytes - data_start
    infos = [_tensor(name, entry, path, data_start, data_bytes) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    _check_tiling(infos, path, data_start, file_bytes)
    return Header(metadata, tuple(infos), file_bytes, header_bytes)


def _refuse_length(path: Path, prefix: bytes, file_bytes: int) -> NoReturn:
    """Say what the file is instead, as far as its first 8 bytes tell.

    Only asked when the length makes no sense: b"\\x80\\x02" also starts an honest header of 640 bytes.
    """
    header_bytes = int.from_bytes(prefix, "little")
    if prefix.startswith(b"PK") or (prefix[0] == 0x80 and 2 <= prefix[1] <= 5):
        raise CheckpointError(path, PICKLE_REFUSED)
    if prefix.startswith(b"GGUF"):
        raise CheckpointError(path, "refused: this is a GGUF file; a safetensors file is needed")
    if header_bytes > MAX_HEADER_BYTES:
        reason = (
            f"header claims {header_bytes} bytes, the limit is {format_bytes(MAX_HEADER_BYTES)}; "
            "is it a safetensors file?"
        )
        raise CheckpointError(path, reason)
    reason = (
        f"header claims {header_bytes} bytes but the file has {file_bytes - 8} after the length; "
        "the file looks truncated"
    )
    raise CheckpointError(path, reason)


def parse_json_object(raw: bytes, path: Path, what: str, *, floats: bool = False) -> dict[str, Any]:
    """Parse UTF-8 JSON that must be one object, strictly; `what` names it in messages.

    Refuses duplicate keys at any depth, NaN and infinities, integers past 20 characters, lone
    surrogates, more objects than a header has tensors and, unless `floats`, fractions.
    Raises CheckpointError.
    """

    def refuse(text: str) -> NoReturn:
        raise ValueError(f"number {text[:24]!r} is not allowed")

    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_object_builder(),
            parse_int=lambda text: int(text) if len(text) <= 20 else refuse(text),
            parse_float=float if floats else refuse,
            parse_constant=refuse,
        )
    except RecursionError:
        raise CheckpointError(path, f"{what} is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(path, f"{what} is not UTF-8 at byte {error.start}") from None
    except ValueError as error:
        raise CheckpointError(path, f"{what} is not valid: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(path, f"{what} must be a JSON object, got {type(value).__name__}")
    return value


def _object_builder() -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """A `json` object hook for one document: unique keys, a bounded number of objects."""
    left = MAX_TENSORS + 2  # one per tensor, the metadata and the document itself

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"more than {MAX_TENSORS} entries")
        built: dict[str, Any] = {}
        for key, value in pairs:
            if key in built:
                raise ValueError(f"duplicate key {shown(key)}")
            _require_encodable(key)
            built[key] = value
        return built

    return build


def _require_encodable(text: str) -> None:
    """JSON escapes can spell half a character, on which printing and saving would fail much later."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"string {shown(text)} holds a lone surrogate") from None


def _metadata(value: object, path: Path) -> dict[str, str]:
    if not isinstance(value, dict):
        raise CheckpointError(path, f"__metadata__ must map strings to strings, got {type(value).__name__}")
    for key, text in value.items():
        if not isinstance(text, str):
            reason = f"__metadata__ entry {shown(key)} must be a string, got {type(text).__name__}"
            raise CheckpointError(path, reason)
        try:
            _require_encodable(text)
        except ValueError as error:
            raise CheckpointError(path, f"__metadata__ entry {shown(key)}: {error}") from None
    return value


def _tensor(name: str, entry: object, path: Path, data_start: int, data_bytes: int) -> TensorInfo:
    """Check one header entry on its own; raises CheckpointError."""
    try:
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            got = reprlib.repr(sorted(entry)) if isinstance(entry, dict) else type(entry).__name__
            raise ValueError(f"needs exactly dtype, shape and data_offsets, got {got}")
        dtype = _checked_dtype(entry["dtype"])
        shape, nbytes = _checked_shape(entry["shape"], dtype)
        begin, end = _checked_offsets(entry["data_offsets"])
        if end - begin != nbytes:
            raise ValueError(
                f"{dtype} of shape {list(shape)} takes {nbytes} bytes but its data_offsets span {end - begin}"
            )
        if end > data_bytes:
            raise ValueError(f"ends at byte {end} but the data section has {data_bytes}; the file looks truncated")
    except ValueError as error:
        raise CheckpointError(path, f"tensor {shown(name)} {error}") from None
    return TensorInfo(name, dtype, shape, path, data_start + begin, nbytes)


def _checked_dtype(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"has a dtype that is no string but {type(value).__name__}")
    if value in _UNSUPPORTED_DTYPES:
        raise ValueError(f"has dtype {value}, which is not supported; convert it to F16, BF16 or F32")
    if value not in DTYPES:
        raise ValueError(f"has the unknown dtype {shown(value)}; known are {', '.join(DTYPES)}")
    return value


def _checked_shape(value: object, dtype: str) -> tuple[tuple[int, ...], int]:
    """Returns the shape and the bytes it takes."""
    if not isinstance(value, list) or not all(_is_size(dim) for dim in value):
        raise ValueError(f"has the shape {reprlib.repr(value)}; it must be a list of integers >= 0")
    if len(value) > MAX_RANK:
        raise ValueError(f"has {len(value)} dimensions, the limit is {MAX_RANK}")
    itemsize = DTYPES[dtype].itemsize
    # A zero counts as one here: torch computes strides of an empty tensor from the other sizes.
    if math.prod(max(dim, 1) for dim in value) * itemsize > _MAX_TENSOR_BYTES:
        raise ValueError(f"has the absurd shape {value}: its bytes do not fit into 63 bits")
    return tuple(value), math.prod(value) * itemsize


def _checked_offsets(value: object) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(_is_size(offset) for offset in value):
        raise ValueError(f"has the data_offsets {reprlib.repr(value)}; they must be two integers >= 0")
    begin, end = value
    if begin > end:
        raise ValueError(f"begins at byte {begin}, after its end at byte {end}")
    return begin, end


def _is_size(value: object) -> bool:
    # bool is an int to Python, but `true` is no size in a header.
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_tiling(infos: list[TensorInfo], path: Path, data_start: int, file_bytes: int) -> None:
    """Require tensors sorted by offset to cover the data section exactly once; raises CheckpointError.

    Overlaps would alias two weights, holes and tails could smuggle other content: the format forbids all.
    """
    expected, previous = data_start, "the header"
    for info in infos:
        if info.offset != expected:
            where = f"tensor {shown(info.name)} begins at byte {info.offset - data_start} of the data section"
            if info.offset < expected:
                raise CheckpointError(path, f"{where} and overlaps {previous}")
            hole_bytes = info.offset - expected
            raise CheckpointError(path, f"{where}, leaving a hole of {hole_bytes} bytes after {previous}")
        expected, previous = info.offset + info.nbytes, f"tensor {shown(info.name)}"
    if expected != file_bytes:
        raise CheckpointError(path, f"{file_bytes - expected} unexplained bytes follow {previous}")
