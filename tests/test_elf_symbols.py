"""Functions found in a library's symbol table: by hand-made files, and in torch's own library."""

from __future__ import annotations

import ctypes
import io
import struct
import sys
from pathlib import Path

import pytest
import torch

from l2p_lowvram import elf_symbols
from l2p_lowvram.elf_symbols import _Function, _functions, function_addresses

CODE = bytes(range(64))
CODE_OFFSET, CODE_ADDRESS = 64, 0x1000
KIND = {"function": 2, "object": 1}


def elf(symbols: list[tuple[str, str, int]], *, table: bool = True) -> bytes:
    """A library with CODE and these symbols: name, kind, address."""
    strings, rows = b"\0", bytes(24)
    for name, kind, address in symbols:
        rows += struct.pack("<IBBHQQ", len(strings), KIND[kind], 0, 1, address, 16)
        strings += name.encode() + b"\0"
    rows_at = CODE_OFFSET + len(CODE)
    strings_at = rows_at + len(rows)

    def section(kind: int, address: int, offset: int, size: int, link: int = 0) -> bytes:
        return struct.pack("<IIQQQQIIQQ", 0, kind, 0, address, offset, size, link, 0, 1, 0)

    sections = [
        section(0, 0, 0, 0),
        section(1, 0, CODE_OFFSET, 32),  # a comment, which is not loaded
        section(1, CODE_ADDRESS, CODE_OFFSET, len(CODE)),
        section(2 if table else 11, 0, rows_at, len(rows), 4),
        section(3, 0, strings_at, len(strings)),
    ]
    begin = strings_at + len(strings)
    head = b"\x7fELF\x02\x01" + bytes(34) + struct.pack("<Q", begin) + bytes(10)
    head += struct.pack("<HHH", 64, len(sections), 0)
    return head + CODE + rows + strings + b"".join(sections)


GOOD = [("lib_one", "function", 0x1000), ("lib_other", "function", 0x1020), ("alone", "function", 0x1008)]


def found(data: bytes, *names: str) -> dict[str, _Function]:
    return _functions(io.BytesIO(data), names)


def test_functions_are_found_with_their_code():
    assert found(elf(GOOD), "lib_other", "lib_one") == {
        "lib_one": _Function(0x1000, CODE[:16]),
        "lib_other": _Function(0x1020, CODE[32:48]),
    }
    assert found(elf(GOOD), "alone", "lib_one")["alone"].beginning == CODE[8:24]


@pytest.mark.parametrize("size", [24, 48, 24 * 7])
def test_tables_are_read_in_pieces(size: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(elf_symbols, "_PIECE_BYTES", size)
    many = [(f"lib_{number:03}", "function", 0x1000 + number % 48) for number in range(100)]

    functions = found(elf(many), *(name for name, *_ in many))

    assert {name: function.address for name, function in functions.items()} == {name: at for name, _, at in many}


@pytest.mark.parametrize(
    ("symbols", "message"),
    [
        ([], "0 functions lib_one"),
        ([("lib_one2", "function", 0x1000), ("xlib_one", "function", 0x1000)], "0 functions lib_one"),
        ([("lib_one", "object", 0x1000)], "0 functions lib_one"),
        ([("lib_one", "function", 0x1000), ("lib_one", "function", 0x1010)], "2 functions lib_one"),
        ([("lib_one", "function", 0x2000)], "outside of all code"),
        ([("lib_one", "function", 0)], "outside of all code"),
    ],
)
def test_what_is_not_one_function_is_refused(symbols: list[tuple[str, str, int]], message: str):
    with pytest.raises(ValueError, match=message):
        found(elf(symbols), "lib_one")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ends within"),
        (b"MZ" + elf(GOOD)[2:], "not a 64-bit"),
        (elf(GOOD)[:-1], "ends within"),
        (elf(GOOD, table=False), "no symbol table"),
        (elf(GOOD)[:58] + b"\x20\0" + elf(GOOD)[60:], "entries of 32 bytes"),
    ],
)
def test_other_files_are_refused(data: bytes, message: str):
    with pytest.raises(ValueError, match=message):
        found(data, "lib_one")


LIBRARY = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
EXPORTED = ("aoti_torch_dtype_int8", "aoti_torch_dtype_float32")


def torch_has_a_symbol_table() -> bool:
    try:
        with LIBRARY.open("rb") as file:
            _functions(file, EXPORTED)
    except (OSError, ValueError):
        return False
    return True


needs_table = pytest.mark.skipif(
    sys.platform != "linux" or not torch_has_a_symbol_table(), reason="torch's library has no symbol table"
)


@needs_table
def test_addresses_are_those_that_the_system_knows():
    library = ctypes.CDLL(str(LIBRARY))
    known = {name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in EXPORTED}

    assert function_addresses(library.aoti_torch_dtype_int8, EXPORTED) == known


@needs_table
@pytest.mark.parametrize("changed", ["header", "code"])
def test_a_file_that_is_not_what_was_loaded_is_refused(changed: str, monkeypatch: pytest.MonkeyPatch):
    read, wanted = elf_symbols._read, 64 if changed == "header" else 16

    def replaced(file: io.BytesIO, offset: int, size: int) -> bytes:
        data = read(file, offset, size)
        return data[:-1] + bytes([data[-1] ^ 1]) if size == wanted else data

    monkeypatch.setattr(elf_symbols, "_read", replaced)

    with pytest.raises(ValueError, match="not the one that was loaded" if changed == "header" else "does not lie"):
        function_addresses(ctypes.CDLL(str(LIBRARY)).aoti_torch_dtype_int8, EXPORTED)
