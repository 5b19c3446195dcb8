"""Checkpoints: sound files read exactly, every other one refused by name, whatever its bytes."""

import gc
import json
import os
import pickle
import random
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from offload import Checkpoint, CheckpointError
from offload import checkpoint as checkpoint_module
from offload.header import DTYPES, MAX_HEADER_BYTES, MAX_TENSORS, shown
from offload.memory import process_memory


def file_bytes(header: object, data: bytes = b"") -> bytes:
    """A safetensors file from its header, an object or its raw text, and its data section."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def refusal(path: Path) -> str:
    """The message `path` is refused with, checked to name the file."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    assert str(caught.value) == f"{caught.value.path}: {caught.value.reason}"
    assert caught.value.path.name in {path.name, *(child.name for child in path.parent.iterdir())}
    return str(caught.value)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bits, so that every byte order or offset mistake shows."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8))


# Sound files


# Older releases of the library write fewer.
WRITTEN = {name for name, dtype in DTYPES.items() if dtype in safetensors.torch._SIZE} - {"F8_E8M0"}


@pytest.mark.parametrize("dtype", sorted(WRITTEN))
@pytest.mark.parametrize("shape", [(5, 3), (), (1,), (0, 4), (2, 1, 3, 2)])
def test_what_safetensors_wrote_reads_back_to_the_bit(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = {"x.weight": random_tensor(DTYPES[dtype], shape), "y": random_tensor(torch.uint8, (3,))}
    save_file(tensors, tmp_path / "m.safetensors", metadata={"l2p": "{}"})

    with Checkpoint.open(tmp_path / "m.safetensors") as checkpoint:
        assert checkpoint.tensors["x.weight"].dtype == dtype
        assert checkpoint.tensors["x.weight"].torch_dtype == DTYPES[dtype]
        assert checkpoint.metadata == {"l2p": "{}"}
        for name, tensor in load_file(tmp_path / "m.safetensors").items():
            assert same_bits(checkpoint.tensor(name), tensor)
            assert same_bits(checkpoint.tensor(name), tensors[name])


@pytest.mark.skipif("F8_E8M0" not in DTYPES, reason="torch has float8_e8m0fnu from 2.7 on")
def test_scales_in_e8m0_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, "m.safetensors", file_bytes({"s": entry(0, 3, dtype="F8_E8M0")}, b"\x7f\x80\x7e"))

    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.tensor("s").float().tolist() == [1.0, 2.0, 0.5]


@pytest.mark.parametrize("padding", range(8))
def test_tensors_off_their_alignment_are_still_right(padding: int, tmp_path: Path) -> None:
    values = torch.randn(7)
    header = json.dumps({"pad": entry(0, 1), "x": entry(1, 29, [7], "F32")}).encode() + b" " * padding
    path = write(tmp_path, "m.safetensors", file_bytes(header, b"\x01" + values.numpy().tobytes()))

    with Checkpoint.open(path) as checkpoint:
        tensor = checkpoint.tensor("x")

    assert torch.equal(tensor, values)
    assert tensor.data_ptr() % 4 == 0


def test_tensors_come_in_file_order_with_absolute_offsets(tmp_path: Path) -> None:
    header = {"last": entry(6, 10, [2], "I16"), "first": entry(0, 6), "empty": entry(6, 6, [0, 3], "F32")}
    content = file_bytes(header, bytes(range(10)))
    path = write(tmp_path, "m.safetensors", content)

    with Checkpoint.open(path) as checkpoint:
        assert list(checkpoint.tensors) == ["first", "empty", "last"]
        assert checkpoint.tensors["last"].offset == len(content) - 4
        assert checkpoint.nbytes == 10
        assert checkpoint.files == (path,)


def test_a_file_without_tensors_is_sound(tmp_path: Path) -> None:
    with Checkpoint.open(write(tmp_path, "m.safetensors", file_bytes({}))) as checkpoint:
        assert dict(checkpoint.tensors) == {}


def test_a_header_that_begins_like_a_pickle_is_no_pickle(tmp_path: Path) -> None:
    raw = json.dumps({"x": entry(0, 1)}).encode().ljust(0x280)
    path = write(tmp_path, "m.safetensors", file_bytes(raw, b"\x05"))
    assert path.read_bytes().startswith(b"\x80\x02")

    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.tensor("x").tolist() == [5]


def test_views_share_the_mapping_but_not_a_storage(tmp_path: Path) -> None:
    save_file({"a": torch.randn(4, 4), "b": torch.randn(4, 4)}, tmp_path / "m.safetensors")

    with Checkpoint.open(tmp_path / "m.safetensors") as checkpoint:
        a = checkpoint.tensor("a")

        assert a.data_ptr() == checkpoint.tensor("a").data_ptr()
        assert a.untyped_storage().nbytes() == 64


def test_opening_reads_only_the_header_of_a_huge_file(tmp_path: Path) -> None:
    count, nbytes = 777, 9_250_000
    path = write(
        tmp_path,
        "m.safetensors",
        file_bytes({f"layers.{i}.weight": entry(i * nbytes, (i + 1) * nbytes) for i in range(count)}),
    )
    os.truncate(path, path.stat().st_size + count * nbytes)  # sparse: 7.19 GB that take no disk

    before = process_memory().file_backed
    with Checkpoint.open(path) as checkpoint:
        touched = process_memory().file_backed - before

        assert checkpoint.nbytes == count * nbytes
        assert checkpoint.tensor("layers.776.weight")[-1] == 0
    assert touched < 64 << 20


# Resources


def mappings_of(path: Path) -> int:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("counts mappings through /proc")
    gc.collect()
    return sum(line.endswith(path.name) for line in maps.read_text().splitlines())


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_closing_gives_back_the_mapping_and_the_descriptor(tmp_path: Path) -> None:
    path = write(tmp_path, "gives-back.safetensors", file_bytes({"x": entry(0, 4)}, b"abcd"))
    assert mappings_of(path) == 0
    before = descriptors()

    with Checkpoint.open(path) as checkpoint:
        assert mappings_of(path) == 1

    assert mappings_of(path) == 0
    assert descriptors() == before
    with pytest.raises(ValueError, match=r"gives-back\.safetensors: the checkpoint is closed, tensor 'x'"):
        checkpoint.tensor("x")


def test_a_tensor_keeps_its_file_mapped_after_close(tmp_path: Path) -> None:
    path = write(tmp_path, "outlives.safetensors", file_bytes({"x": entry(0, 4)}, b"abcd"))

    with Checkpoint.open(path) as checkpoint:
        tensor = checkpoint.tensor("x")[1:]

    assert mappings_of(path) == 1
    assert tensor.tolist() == [98, 99, 100]
    del tensor
    assert mappings_of(path) == 0


def test_a_refused_set_leaves_nothing_open(tmp_path: Path) -> None:
    write(tmp_path, "a.safetensors", file_bytes({"x": entry(0, 4)}, b"abcd"))
    write(tmp_path, "b.safetensors", file_bytes({"y": entry(0, 9)}, b"abcd"))
    index = write_index(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"})
    assert mappings_of(tmp_path / "a.safetensors") == 0
    before = descriptors()

    refusal(index)

    assert mappings_of(tmp_path / "a.safetensors") == 0
    assert descriptors() == before


def test_an_unknown_tensor_is_a_key_error_with_its_name(tmp_path: Path) -> None:
    path = write(tmp_path, "m.safetensors", file_bytes({"x": entry(0, 1)}, b"a"))

    with Checkpoint.open(path) as checkpoint, pytest.raises(KeyError, match=r"'y.*m\.safetensors"):
        checkpoint.tensor("y")


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(CheckpointError("a/b.safetensors", "is odd")))

    assert (str(error), error.path.name) == (str(Path("a/b.safetensors")) + ": is odd", "b.safetensors")


# Files that are something else


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".PT"])
def test_pickles_are_refused_by_suffix(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path, f"model{suffix}", file_bytes({"x": entry(0, 1)}, b"a"))

    assert "refused: a pickle can run code" in refusal(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_are_refused_by_content(protocol: int, tmp_path: Path) -> None:
    path = write(tmp_path, "model.safetensors", pickle.dumps({"x": list(range(300))}, protocol))

    assert "refused: a pickle can run code" in refusal(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves_is_refused_by_content(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save({"x": torch.randn(3)}, path, _use_new_zipfile_serialization=zipped)

    assert "convert it to safetensors" in refusal(path)


def test_gguf_is_refused_by_name(tmp_path: Path) -> None:
    assert "GGUF" in refusal(write(tmp_path, "model.safetensors", b"GGUF\x03\x00\x00\x00" + bytes(100)))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere.safetensors").endswith("nowhere.safetensors: no such file or folder")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.safetensors")

    assert "is not a regular file" in refusal(tmp_path / "m.safetensors")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "m.safetensors", file_bytes({}))

    def denied(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)

    assert refusal(path).endswith("m.safetensors: cannot be read: Permission denied")


# Hostile headers

SOUND = entry(0, 4, [1], "F32")


def one(**changes: object) -> dict[str, Any]:
    """A header with one tensor 'w' of four bytes, changed."""
    return {"w": {**SOUND, **changes}}


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "file has 0 bytes"),
    "short": (b"\x02\x00\x00", "file has 3 bytes"),
    "header past the end": (struct.pack("<Q", 300) + b"{}", "claims 300 bytes but the file has 2"),
    "header of 100 MB": (
        struct.pack("<Q", 100_000_000) + b"{}",
        "claims 100000000 bytes, the limit is 16.00 MiB",
    ),
    "header of 2**63": (struct.pack("<Q", 2**63) + b"{}", "claims 9223372036854775808 bytes"),
    "header of length 0": (file_bytes(b""), "header must start with '{'"),
    "html": (b"<!DOCTYPE html><html></html>", "is it a safetensors file?"),
    "no object": (file_bytes([]), "header must start with '{'"),
    "leading space": (file_bytes(b" {}"), "header must start with '{'"),
    "trailing text": (file_bytes(b"{}x"), "header is not valid: Extra data"),
    "cut json": (file_bytes(b'{"w": '), "header is not valid: Expecting value"),
    "not utf-8": (file_bytes(b'{"\xff": 1}'), "header is not UTF-8 at byte 2"),
    "lone surrogate": (file_bytes(b'{"\\ud800": {}}'), "lone surrogate"),
    "duplicate tensor": (
        file_bytes(b'{"w": %s, "w": %s}' % ((json.dumps(SOUND).encode(),) * 2), bytes(4)),
        "duplicate key 'w'",
    ),
    "duplicate field": (
        file_bytes(b'{"w": {"dtype": "U8", "dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}', bytes(4)),
        "duplicate key 'dtype'",
    ),
    "nested deeply": (file_bytes(b'{"w": ' + b"[" * 200_000), "nested too deeply"),
    "nested objects": (file_bytes(b'{"w":' * 100_000 + b"1" + b"}" * 100_000), "nested too deeply"),
    "huge integer": (
        file_bytes(b'{"w": ' + b"9" * 5000 + b"}"),
        "number '999999999999999999999999' is not allowed",
    ),
    "nan": (file_bytes(b'{"w": NaN}'), "number 'NaN' is not allowed"),
    "infinity": (file_bytes(b'{"w": -Infinity}'), "number '-Infinity' is not allowed"),
    "entry no object": (
        file_bytes({"w": 3}),
        "tensor 'w' needs exactly dtype, shape and data_offsets, got int",
    ),
    "entry null": (file_bytes({"w": None}), "tensor 'w' needs exactly"),
    "field missing": (file_bytes({"w": {"dtype": "U8", "shape": [4]}}, bytes(4)), "got ['dtype', 'shape']"),
    "field unknown": (file_bytes(one(order="C"), bytes(4)), "tensor 'w' needs exactly"),
    "dtype unknown": (file_bytes(one(dtype="F31"), bytes(4)), "tensor 'w' has the unknown dtype 'F31'"),
    "dtype lower case": (file_bytes(one(dtype="f32"), bytes(4)), "unknown dtype 'f32'; known are BOOL, U8"),
    "dtype number": (file_bytes(one(dtype=32), bytes(4)), "tensor 'w' has a dtype that is no string but int"),
    "dtype list": (file_bytes(one(dtype=["F32"]), bytes(4)), "no string but list"),
    "dtype F4": (
        file_bytes(one(dtype="F4", shape=[8]), bytes(4)),
        "tensor 'w' has dtype F4, which is not supported",
    ),
    "dtype F6": (file_bytes(one(dtype="F6_E2M3"), bytes(4)), "dtype F6_E2M3, which is not supported"),
    "dtype C64": (file_bytes(one(dtype="C64"), bytes(4)), "dtype C64, which is not supported"),
    "shape no list": (file_bytes(one(shape=1), bytes(4)), "tensor 'w' has the shape 1; it must be a list"),
    "dim negative": (file_bytes(one(shape=[-1, -1]), bytes(4)), "tensor 'w' has the shape [-1, -1]"),
    "dim bool": (file_bytes(one(shape=[True]), bytes(4)), "tensor 'w' has the shape [True]"),
    "dim string": (file_bytes(one(shape=["1"]), bytes(4)), "tensor 'w' has the shape ['1']"),
    "dim float": (file_bytes(one(shape=[1.0]), bytes(4)), "number '1.0' is not allowed"),
    "rank 9": (file_bytes(one(shape=[1] * 9), bytes(4)), "tensor 'w' has 9 dimensions, the limit is 8"),
    "shape overflows": (file_bytes(one(shape=[2**40, 2**40]), bytes(4)), "tensor 'w' has the absurd shape"),
    "shape wraps to 4 bytes": (file_bytes(one(shape=[2**62 + 1, 4]), bytes(4)), "do not fit into 63 bits"),
    "empty but absurd": (
        file_bytes(one(shape=[0, 2**62, 2**62], data_offsets=[0, 0]), b""),
        "tensor 'w' has the absurd shape",
    ),
    "offsets no list": (file_bytes(one(data_offsets="04"), bytes(4)), "tensor 'w' has the data_offsets '04'"),
    "offsets of one": (file_bytes(one(data_offsets=[4]), bytes(4)), "must be two integers"),
    "offsets of three": (file_bytes(one(data_offsets=[0, 4, 4]), bytes(4)), "must be two integers"),
    "offsets bool": (file_bytes(one(data_offsets=[False, 4]), bytes(4)), "has the data_offsets [False, 4]"),
    "offsets negative": (file_bytes(one(data_offsets=[-4, 0]), bytes(4)), "has the data_offsets [-4, 0]"),
    "offsets reversed": (
        file_bytes(one(data_offsets=[4, 0]), bytes(4)),
        "tensor 'w' begins at byte 4, after its end at byte 0",
    ),
    "too few bytes": (
        file_bytes(one(shape=[2]), bytes(4)),
        "tensor 'w' F32 of shape [2] takes 8 bytes but its data_offsets span 4",
    ),
    "scalar of no bytes": (file_bytes(one(shape=[], data_offsets=[0, 0])), "takes 4 bytes"),
    "past the end": (
        file_bytes(one(shape=[2], data_offsets=[0, 8]), bytes(4)),
        "tensor 'w' ends at byte 8 but the data section has 4; the file looks truncated",
    ),
    "far past the end": (
        file_bytes(one(shape=[2**40], data_offsets=[0, 2**42]), bytes(4)),
        "ends at byte 4398046511104 but the data section has 4",
    ),
    "overlap": (
        file_bytes({"v": entry(0, 4), "w": entry(3, 7)}, bytes(7)),
        "tensor 'w' begins at byte 3 of the data section and overlaps tensor 'v'",
    ),
    "same bytes": (file_bytes({"v": entry(0, 4), "w": entry(0, 4)}, bytes(4)), "tensor 'w' begins at byte 0"),
    "inside": (file_bytes({"v": entry(0, 9), "w": entry(2, 4)}, bytes(9)), "overlaps tensor 'v'"),
    "empty inside": (file_bytes({"v": entry(0, 9), "w": entry(4, 4)}, bytes(9)), "overlaps tensor 'v'"),
    "hole": (
        file_bytes({"v": entry(0, 4), "w": entry(6, 8)}, bytes(8)),
        "tensor 'w' begins at byte 6 of the data section, leaving a hole of 2 bytes after tensor 'v'",
    ),
    "hole at the start": (file_bytes({"w": entry(2, 4)}, bytes(4)), "a hole of 2 bytes after the header"),
    "tail": (file_bytes(one(), bytes(7)), "3 unexplained bytes follow tensor 'w'"),
    "only a tail": (file_bytes({}, bytes(7)), "7 unexplained bytes follow the header"),
    "metadata no object": (
        file_bytes({"__metadata__": []}),
        "__metadata__ must map strings to strings, got list",
    ),
    "metadata number": (
        file_bytes({"__metadata__": {"l2p": 1}}),
        "__metadata__ entry 'l2p' must be a string, got int",
    ),
    "metadata nested": (file_bytes({"__metadata__": {"l2p": {}}}), "entry 'l2p' must be a string, got dict"),
    "metadata surrogate": (file_bytes(b'{"__metadata__": {"l2p": "\\udfff"}}'), "entry 'l2p': string"),
    "long name": (file_bytes({"w" * 10**6: 3}), "w...' needs exactly"),
    "name that steers a terminal": (file_bytes({"\x1b[2J": 3}), r"tensor '\x1b[2J' needs exactly"),
    "too many tensors": (
        file_bytes(b"{%s}" % b",".join(b'"%d":{}' % i for i in range(MAX_TENSORS + 2))),
        f"more than {MAX_TENSORS} entries",
    ),
    "too many numbers": (
        file_bytes(b"{%s}" % b",".join(b'"%d":0' % i for i in range(MAX_TENSORS + 1))),
        f"header lists {MAX_TENSORS + 1} tensors, the limit is {MAX_TENSORS}",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_by_name(case: str, tmp_path: Path) -> None:
    content, message = HOSTILE[case]
    path = write(tmp_path, "model.safetensors", content)

    refused = refusal(path)

    assert refused.startswith(str(path) + ": ")
    assert message in refused
    assert len(refused) < len(str(path)) + 400


@pytest.mark.parametrize("claim", [100_000_000, MAX_HEADER_BYTES + 1, 2**64 - 1])
def test_a_header_claim_allocates_nothing(claim: int, tmp_path: Path) -> None:
    path = write(tmp_path, "model.safetensors", struct.pack("<Q", claim))
    os.truncate(path, 200_000_000)  # sparse, so that the claim fits into the file
    tracemalloc.start()

    try:
        refusal(path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak_bytes < 1 << 20


@pytest.mark.parametrize("piece", [b"[],", b"[[]],", b"{},", b'"ab",', b"1234,", b'{"a":[]},'])
def test_parsing_a_header_takes_a_bounded_multiple_of_its_bytes(piece: bytes, tmp_path: Path) -> None:
    header = b'{"w":[' + piece * (300_000 // len(piece)) + b"0]}"
    path = write(tmp_path, "model.safetensors", file_bytes(header))
    tracemalloc.start()

    try:
        assert "needs exactly" in refusal(path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak_bytes < 64 * len(header)


def test_nesting_near_the_recursion_limit_is_refused_like_any_other(tmp_path: Path) -> None:
    limit = sys.getrecursionlimit()

    for depth in range(limit - 120, limit + 5):
        shape = b"[" * depth + b"]" * depth
        header = b'{"w": {"dtype": "U8", "shape": %s, "data_offsets": [0, 0]}}' % shape
        refusal(write(tmp_path, "model.safetensors", file_bytes(header)))


# Fuzzing

FUZZ_BASE = file_bytes(
    {
        "__metadata__": {"l2p": "{}"},
        "a": entry(0, 12, [3], "F32"),
        "b.weight": entry(12, 20, [2, 2], "BF16"),
        "c": entry(20, 20, [0], "I8"),
        "d": entry(20, 21, [], "I8"),
    },
    bytes(range(21)),
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """The small sound file with some bytes replaced and some cut off, doubled or added."""
    content = bytearray(FUZZ_BASE)
    for position, value in draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=4)):
        content[position] = value
    start = draw(st.integers(0, len(content)))
    stop = draw(st.integers(start, len(content)))
    change = draw(st.sampled_from(["keep", "truncate", "cut", "double", "append"]))
    if change == "truncate":
        del content[start:]
    elif change == "cut":
        del content[start:stop]
    elif change == "double":
        content[start:start] = content[start:stop]
    elif change == "append":
        content += draw(st.binary(max_size=8))
    return bytes(content)


def assert_sound_or_refused(path: Path) -> None:
    try:
        checkpoint = Checkpoint.open(path)
    except CheckpointError:
        return
    with checkpoint:
        for name, info in checkpoint.tensors.items():
            assert checkpoint.tensor(name).shape == info.shape
            checkpoint.tensor(name).clone()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=damaged())
def test_damaged_files_open_soundly_or_are_refused(content: bytes, tmp_path: Path) -> None:
    assert_sound_or_refused(write(tmp_path, "model.safetensors", content))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=64))
def test_arbitrary_headers_open_soundly_or_are_refused(content: bytes, tmp_path: Path) -> None:
    assert_sound_or_refused(write(tmp_path, "model.safetensors", file_bytes(b"{" + content)))


def test_every_single_flipped_bit_opens_soundly_or_is_refused(tmp_path: Path) -> None:
    header_bits = (len(FUZZ_BASE) - 21) * 8

    for bit in random.Random(0).sample(range(header_bits), 600):
        content = bytearray(FUZZ_BASE)
        content[bit // 8] ^= 1 << bit % 8
        assert_sound_or_refused(write(tmp_path, "model.safetensors", bytes(content)))


# Sharded sets and folders


def write_index(folder: Path, weight_map: object, name: str = "model.safetensors.index.json") -> Path:
    return write(folder, name, json.dumps({"metadata": {"total_size": 8.0}, "weight_map": weight_map}).encode())


def write_shards(folder: Path) -> Path:
    """Two shards with one tensor each and their index; returns the index."""
    metadata = {"who": "first", "one": "1"}, {"who": "second", "two": "2"}
    for tensor, shard, texts in zip("xy", ("a", "b"), metadata, strict=True):
        header = {"__metadata__": texts, tensor: entry(0, 4)}
        write(folder, f"{shard}.safetensors", file_bytes(header, (tensor * 4).encode()))
    return write_index(folder, {"y": "b.safetensors", "x": "a.safetensors"})


@pytest.mark.parametrize("by_folder", [True, False])
def test_a_sharded_set_reads_as_one(by_folder: bool, tmp_path: Path) -> None:
    index = write_shards(tmp_path)

    with Checkpoint.open(str(tmp_path) if by_folder else index) as checkpoint:
        assert list(checkpoint.tensors) == ["x", "y"]
        assert [path.name for path in checkpoint.files] == ["a.safetensors", "b.safetensors"]
        assert checkpoint.tensors["y"].path == tmp_path / "b.safetensors"
        assert bytes(checkpoint.tensor("x").tolist()) + bytes(checkpoint.tensor("y").tolist()) == b"xxxxyyyy"
        assert checkpoint.metadata == {"who": "first", "one": "1", "two": "2"}
        assert checkpoint.nbytes == 8


def test_many_names_for_one_shard_are_refused_at_the_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a few kilobytes of links would cost as many headers."""
    opened: list[str] = []
    read_header = checkpoint_module.read_header
    monkeypatch.setattr(
        checkpoint_module, "read_header", lambda file, path: (opened.append(path.name), read_header(file, path))[1]
    )
    blob = write(tmp_path, "blob", file_bytes({"x": entry(0, 4)}, b"abcd"))
    names = [f"{number:03}.safetensors" for number in range(50)]
    for name in names:
        (tmp_path / name).hardlink_to(blob)
    index = write_index(tmp_path, {"x": names[0], **{f"y{number}": name for number, name in enumerate(names[1:])}})

    with pytest.raises(CheckpointError, match=r"tensor 'x' is in 000\.safetensors and in 001\.safetensors"):
        Checkpoint.open(index)

    assert opened == names[:2]
    opened.clear()
    with pytest.raises(CheckpointError, match=r"first is 'y', which is not in 000\.safetensors"):
        Checkpoint.open(write_index(tmp_path, {"x": names[0], "y": names[0], "z": names[1]}))
    assert opened == names[:1]


def test_an_index_of_more_shards_than_any_model_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "MAX_SHARDS", 1)

    with pytest.raises(CheckpointError, match="index names 2 shards, the limit is 1"):
        Checkpoint.open(write_shards(tmp_path))


def test_headers_of_a_set_have_a_limit_together(tmp_path: Path) -> None:
    """What they list is in the index, which has one; their metadata is not."""
    shards = {f"t{number}": f"{number}.safetensors" for number in range(9)}
    for tensor, shard in shards.items():
        header = {"__metadata__": {tensor: "x" * (5 << 20)}, tensor: entry(0, 4)}
        write(tmp_path, shard, file_bytes(header, b"abcd"))

    with pytest.raises(CheckpointError, match=r"headers of 7 of 9 shards take 35.00 MiB, the limit is 32.00 MiB"):
        Checkpoint.open(write_index(tmp_path, shards))
    with Checkpoint.open(write_index(tmp_path, dict(list(shards.items())[:6]))) as checkpoint:
        assert len(checkpoint.metadata) == 6


def test_shards_may_be_links_as_in_the_hugging_face_cache(tmp_path: Path) -> None:
    folder = tmp_path / "snapshot"
    folder.mkdir()
    write(tmp_path, "blob", file_bytes({"x": entry(0, 4)}, b"abcd"))
    (folder / "a.safetensors").symlink_to(tmp_path / "blob")
    write_index(folder, {"x": "a.safetensors"})

    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.tensor("x").tolist() == [97, 98, 99, 100]


@pytest.mark.parametrize(
    "shard",
    [
        "../a.safetensors",
        "a" * 100_000,
        "sub/a.safetensors",
        "/a.safetensors",
        "..",
        "",
        ".",
        "..\\a",
        "C:a",
        "a\0b",
        3,
        None,
    ],
)
def test_an_index_may_name_only_files_beside_it(shard: object, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for folder in (tmp_path, tmp_path / "sub"):
        write(folder, "a.safetensors", file_bytes({"x": entry(0, 4)}, b"abcd"))

    message = refusal(write_index(tmp_path / "sub", {"x": shard}))

    assert f"weight_map sends tensor 'x' to {shown(str(shard))}; it must be a file name in the folder" in message
    assert len(message) < 500


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_an_index_needs_a_weight_map(weight_map: object, tmp_path: Path) -> None:
    assert "index needs a weight_map" in refusal(write_index(tmp_path, weight_map))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "index must be a JSON object, got list"),
        (b"{", "index is not valid"),
        (b'{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}', "duplicate key 'x'"),
        (b"\xff\xfe", "index is not UTF-8 at byte 0"),
        (b" " * (MAX_HEADER_BYTES + 1), "index is larger than the limit of 16.00 MiB"),
    ],
)
def test_an_unreadable_index_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    assert message in refusal(write(tmp_path, "m.safetensors.index.json", content))


def lose_shard(folder: Path) -> None:
    (folder / "b.safetensors").unlink()


def truncate_shard(folder: Path) -> None:
    os.truncate(folder / "b.safetensors", (folder / "b.safetensors").stat().st_size - 1)


def list_absent_tensor(folder: Path) -> None:
    write_index(folder, {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"})


def swap_shards(folder: Path) -> None:
    write_index(folder, {"x": "b.safetensors", "y": "a.safetensors"})


def leave_out_tensor(folder: Path) -> None:
    write(folder, "b.safetensors", file_bytes({"y": entry(0, 4), "extra": entry(4, 5)}, b"yyyy!"))


def repeat_tensor(folder: Path) -> None:
    write(folder, "b.safetensors", file_bytes({"y": entry(0, 4), "x": entry(4, 5)}, b"yyyy!"))


def point_at_pickle(folder: Path) -> None:
    write(folder, "pytorch_model.bin", b"PK\x03\x04")
    write_index(folder, {"x": "a.safetensors", "y": "pytorch_model.bin"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_shard, "lacks 1 of 2 shards, first is b.safetensors"),
        (truncate_shard, "b.safetensors: tensor 'y' ends at byte 4 but the data section has 3"),
        (list_absent_tensor, "index lists 1 absent tensors, first is 'z', which is not in b.safetensors"),
        (swap_shards, "index lists 1 absent tensors, first is 'y', which is not in a.safetensors"),
        (leave_out_tensor, "index lacks 1 tensors of its shards, first is 'extra' in b.safetensors"),
        (repeat_tensor, "tensor 'x' is in a.safetensors and in b.safetensors; it must be in one"),
        (point_at_pickle, "pytorch_model.bin: refused: a pickle can run code"),
    ],
)
def test_an_index_and_its_shards_must_agree(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    index = write_shards(tmp_path)

    damage(tmp_path)

    assert message in refusal(index)


@pytest.mark.parametrize("name", ["model.safetensors", "Any Name.safetensors"])
def test_a_folder_stands_for_its_only_file(name: str, tmp_path: Path) -> None:
    write(tmp_path, name, file_bytes({"x": entry(0, 4)}, b"abcd"))
    write(tmp_path, "config.json", b"{}")

    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.files == (tmp_path / name,)


def test_a_folder_stands_for_its_model_file_among_others(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.fp16.safetensors"):
        write(tmp_path, name, file_bytes({}))

    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.files == (tmp_path / "model.safetensors",)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds neither a .safetensors file nor an index of them"),
        (["pytorch_model.bin"], "holds only pickles ('pytorch_model.bin'), refused: a pickle can run code"),
        (
            ["b.safetensors", "a.safetensors"],
            "holds 2 candidates ('a.safetensors', 'b.safetensors'); name one of them",
        ),
        (
            ["model.safetensors", "model.safetensors.index.json"],
            "holds 2 candidates ('model.safetensors', 'model.s",
        ),
        ([f"{i}.safetensors" for i in range(9)], "holds 9 candidates ('0.safetensors', '1.safetensors', "),
        (["a\x1b[31m.safetensors", "b.safetensors"], r"holds 2 candidates ('a\x1b[31m.safetensors', 'b"),
        (["a\x1b[31m.pt"], r"holds only pickles ('a\x1b[31m.pt'), refused"),
    ],
)
def test_a_folder_that_leaves_a_choice_is_refused(names: list[str], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in names:
        write(folder, name, file_bytes({}))

    assert message in refusal(folder)
