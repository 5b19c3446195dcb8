"""Byte counts printed, read and measured."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from offload import format_bytes, module_bytes, parse_bytes, tensor_bytes


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (7_187_907_602, "6.69 GiB"),
        ((1 << 30) - 1, "1.00 GiB"),
        (5 << 40, "5.00 TiB"),
        (3 << 50, "3072.00 TiB"),
        (-1536, "-1.50 KiB"),
    ],
)
def test_sizes_print_in_binary_units(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (0, 0),
        (123, 123),
        (4e9, 4_000_000_000),
        ("123", 123),
        ("512B", 512),
        ("6GiB", 6 << 30),
        (" 6 gib ", 6 << 30),
        ("4G", 4 << 30),
        ("4Gi", 4 << 30),
        ("512MiB", 512 << 20),
        ("1.5k", 1536),
        ("500MB", 500_000_000),
        ("2TB", 2 * 10**12),
        ("0.3 KiB", 307),
    ],
)
def test_sizes_are_read_with_their_unit(text: str | float, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "-1",
        "-1GiB",
        "6 Gibi",
        "1e9",
        "inf",
        "nan",
        "1_000",
        "0x10",
        "1,5G",
        "10i",
        "10iB",
        "٣G",
        "9" * 19,
    ],
)
def test_text_that_is_no_size_is_refused_by_value(text: str) -> None:
    with pytest.raises(ValueError, match=r"cannot read .* as a size; write 6GiB") as caught:
        parse_bytes(text)

    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(("value", "message"), [(-5, "negative, got -5 B"), (True, "got True")])
def test_numbers_that_are_no_size_are_refused(value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_bytes(value)


@given(st.integers(min_value=0, max_value=1 << 50))
def test_a_printed_size_reads_back_to_within_its_two_decimals(nbytes: int) -> None:
    assert parse_bytes(format_bytes(nbytes)) == pytest.approx(nbytes, rel=0.006, abs=0)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensor_bytes_count_elements_not_storage(device: str) -> None:
    tensor = torch.empty(10, 7, dtype=torch.bfloat16, device=device)

    assert tensor_bytes(tensor) == 140
    assert tensor_bytes(tensor[:3]) == 42


class Fused(nn.Module):
    """Two views of one weight, one tied linear and a buffer that is not saved."""

    def __init__(self, device: str) -> None:
        super().__init__()
        whole = torch.empty(30, 5, device=device)
        self.q = nn.Parameter(whole[:10])
        self.k = nn.Parameter(whole[10:])
        self.one = nn.Linear(3, 4, bias=False, device=device)
        self.two = nn.Linear(3, 4, bias=False, device=device)
        self.two.weight = self.one.weight
        self.register_buffer("table", torch.empty(11, dtype=torch.int8, device=device), persistent=False)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_module_bytes_count_shared_storage_once(device: str) -> None:
    assert module_bytes(Fused(device)) == 30 * 5 * 4 + 3 * 4 * 4 + 11
