"""Byte counts: of tensors and modules, read from text, printed for people."""

from __future__ import annotations

import re
from fractions import Fraction

from torch import Tensor, nn

_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}
# At most 18 digits on either side: no budget needs more, and longer ones only cost time.
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*(?:([kmgt])(i?b?)|b?)", re.ASCII | re.IGNORECASE)


def format_bytes(nbytes: int) -> str:
    """Print a byte count in binary units with two decimals: `"6.69 GiB"`, `"512 B"`."""
    if abs(nbytes) < 1024:
        return f"{nbytes} B"
    value = float(nbytes)
    for unit in _BINARY_UNITS:
        # Rounded first: 1 byte short of a GiB is "1.00 GiB", not "1024.00 MiB".
        if abs(round(value, 2)) < 1024:
            return f"{value:.2f} {unit}"
        value /= 1024
    return f"{value * 1024:.2f} {_BINARY_UNITS[-1]}"


def parse_bytes(size: str | float) -> int:
    """Read a byte count: `"6GiB"`, `"1.5 GiB"`, `"4G"`, `"500MB"`, `"1048576"`, or a whole number as it is.

    `K`, `M`, `G`, `T` alone mean powers of 1024, as `KiB` … `TiB` do; `KB` … `TB` are powers of 1000.
    Fractions of a byte are dropped. Raises ValueError for anything else, negative numbers included.
    """
    if isinstance(size, bool):
        raise ValueError(f"size must be a number of bytes, got {size}; try 6GiB")
    if isinstance(size, float) and size.is_integer():
        size = int(size)  # 4e9
    if isinstance(size, int):
        if size < 0:
            raise ValueError(f"size must not be negative, got {size} B")
        return size
    if not isinstance(size, str):
        raise ValueError(f"size must be a whole number of bytes, or text such as 6GiB, got {size!r}")
    match = _SIZE.fullmatch(size.strip())
    if match is None:
        raise ValueError(f"cannot read {size!r} as a size; write 6GiB, 512MiB, 4G or a number of bytes")
    number, power, suffix = match.groups()
    if power is None:
        return int(Fraction(number))
    base = 1000 if suffix.lower() == "b" else 1024
    return int(Fraction(number) * base ** _POWERS[power.lower()])


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of the elements of `tensor`, whatever storage they lie in. Works on the meta device."""
    return tensor.numel() * tensor.element_size()


def module_bytes(module: nn.Module) -> int:
    """Bytes of the storages behind all parameters and buffers, each storage counted once.

    Tied weights and views of one fused tensor therefore count once. Works on the meta device.
    """
    storages = [tensor.untyped_storage() for tensor in (*module.parameters(), *module.buffers())]
    # Told apart by the storage object: on the meta device every data pointer is 0.
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
