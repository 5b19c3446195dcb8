"""Functions that a shared library has without exporting them, found by name in its symbol table.

Format: System V ABI (gABI), chapter 4, "Object Files": the section table of an ELF file, and its sections .symtab and
.strtab. Only 64-bit little-endian files are read, which is what x86 has. A few MiB are held at a time, of a table that
may have a hundred.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

_MAGIC = b"\x7fELF\x02\x01"  # 64 bits, little-endian
_HEADER = struct.Struct("<40xQ10xHH2x")  # where the section table begins; size and number of its entries
_HEADER_BYTES = 64
_SECTION = struct.Struct("<4xI8xQQQI4x8x8x")  # kind, address, offset, size, the section it belongs with
_CODE, _SYMBOLS = 1, 2  # kinds
_SYMBOL_BYTES = 24
_FUNCTION = 2  # a symbol's kind
_PIECE_BYTES = 24 << 17  # a multiple of a symbol's size
# Of a function's code, compared with what is in memory.
_BEGINNING_BYTES = 16


@dataclass(frozen=True)
class _Section:
    kind: int
    address: int
    offset: int
    size: int
    link: int


@dataclass(frozen=True)
class _Function:
    """Where a function lies, relative to where its library is loaded to, and the first bytes of its code."""

    address: int
    beginning: bytes


class _Loaded(ctypes.Structure):
    """What dladdr(3) tells of an address: the file it was loaded from, and to where."""

    _fields_ = (
        ("path", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def function_addresses(exported: Any, names: Collection[str]) -> dict[str, int]:
    """Where the functions `names` lie in memory, of the library that exports the function `exported` (of ctypes).

    Raises ValueError for a file of another format, without a symbol table or one of the functions, or which is no
    longer the one that was loaded; OSError where it cannot be read, AttributeError on systems without dladdr.
    """
    loaded = _Loaded()
    if not ctypes.CDLL(None).dladdr(ctypes.cast(exported, ctypes.c_void_p), ctypes.byref(loaded)):
        raise ValueError("not a function of a library")
    assert loaded.base is not None
    with Path(os.fsdecode(loaded.path)).open("rb") as file:
        if ctypes.string_at(loaded.base, _HEADER_BYTES) != _read(file, 0, _HEADER_BYTES):
            raise ValueError("the file is not the one that was loaded")
        functions = _functions(file, names)
    for name, function in functions.items():
        if ctypes.string_at(loaded.base + function.address, len(function.beginning)) != function.beginning:
            raise ValueError(f"{name} does not lie in memory where its file has it")
    return {name: loaded.base + function.address for name, function in functions.items()}


def _functions(file: BinaryIO, names: Collection[str]) -> dict[str, _Function]:
    sections = _sections(file)
    table = next((section for section in sections if section.kind == _SYMBOLS), None)
    if table is None or table.link >= len(sections):
        raise ValueError("no symbol table")
    places = _places(file, sections[table.link], names)
    addresses = _addresses(file, table, places)
    return {name: _function(file, sections, name, addresses.get(name, [])) for name in names}


def _sections(file: BinaryIO) -> list[_Section]:
    head = _read(file, 0, _HEADER_BYTES)
    if not head.startswith(_MAGIC):
        raise ValueError("not a 64-bit little-endian ELF file")
    begin, size, count = _HEADER.unpack(head)
    if size != _SECTION.size:
        raise ValueError(f"entries of {size} bytes in the section table")
    table = _read(file, begin, size * count)
    return [_Section(*fields) for fields in _SECTION.iter_unpack(table)]


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise ValueError("the file ends within a table")
    return data


def _pieces(file: BinaryIO, section: _Section, overlap: int = 0) -> Iterator[tuple[int, bytes]]:
    """(offset in the section, its bytes from there), in pieces of which neighbours share `overlap` bytes."""
    for start in range(0, section.size, _PIECE_BYTES):
        yield start, _read(file, section.offset + start, min(_PIECE_BYTES + overlap, section.size - start))


def _places(file: BinaryIO, strings: _Section, names: Collection[str]) -> dict[int, str]:
    """Where in the section of strings each name stands, as many times as it does."""
    # What all begin with is searched for as a whole, several times as fast as alternatives.
    prefix = _common_prefix(names)
    rests = (re.escape(name.removeprefix(prefix)) for name in names)
    wanted = re.compile(f"\0({re.escape(prefix)}(?:{'|'.join(rests)}))(?=\0)".encode())
    overlap = max(map(len, names)) + 2
    return {
        start + match.start(1): match[1].decode()
        for start, piece in _pieces(file, strings, overlap)
        for match in wanted.finditer(piece)
    }


def _common_prefix(names: Collection[str]) -> str:
    first, last = min(names), max(names)
    return next((first[:end] for end, letter in enumerate(first) if letter != last[end]), first)


def _addresses(file: BinaryIO, table: _Section, places: Mapping[int, str]) -> dict[str, list[int]]:
    """Of each name the functions that have it."""
    found: dict[str, list[int]] = {}
    for _, piece in _pieces(file, table):
        if len(piece) % _SYMBOL_BYTES:
            raise ValueError("a symbol table of broken length")
        # A symbol is name (4 bytes), kind (the low half of the next one), three bytes, address and size.
        words = torch.frombuffer(bytearray(piece), dtype=torch.int64).view(-1, 3)
        heads = words[:, 0].bitwise_and(0xF_FFFF_FFFF)
        for place, name in places.items():
            for row in (heads == (_FUNCTION << 32 | place)).nonzero().flatten().tolist():
                found.setdefault(name, []).append(int(words[row, 1]))
    return found


def _function(file: BinaryIO, sections: list[_Section], name: str, addresses: list[int]) -> _Function:
    if len(addresses) != 1:
        raise ValueError(f"{len(addresses)} functions {name}")
    address = addresses[0]
    for section in sections:
        # What another library is to provide has the address 0, where only sections lie that are not loaded.
        if section.kind == _CODE and 0 < section.address <= address < section.address + section.size:
            return _Function(address, _read(file, section.offset + address - section.address, _BEGINNING_BYTES))
    raise ValueError(f"{name} lies outside of all code")
