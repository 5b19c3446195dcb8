"""Parallel reads: every way of reading gives the file's bytes; every fault is named and leaves nothing behind."""

import errno
import gc
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from offload import Block, Checkpoint, CheckpointError
from offload import reading as reading_module
from offload.blocks import Extent
from offload.memory import process_memory
from offload.paged import PagedBlocks
from offload.reading import DirectFile, IoProbe, Reader, SeekingFile, open_file, probe_io
from offload.residency import BlockCost, Budget, Rates, plan_residency

IO = ["read", "direct", "mmap"]
SIZE = 300_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.randint(0, 256, (SIZE,), dtype=torch.uint8)}, path)
    return path


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No thread and no descriptor outlives a test, faults and all."""
    gc.collect()  # what earlier tests left to it
    before = descriptors()
    yield
    assert [thread.name for thread in threading.enumerate() if "offload" in thread.name] == []
    assert descriptors() == before


def descriptors() -> list[str]:
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        return []
    links = []
    for entry in folder.iterdir():
        try:
            links.append(str(entry.readlink()))
        except OSError:  # the descriptor of this very listing
            continue
    return sorted(link for link in links if link.endswith(".safetensors"))


def supported(path: Path, io: str) -> bool:
    try:
        open_file(path, io).close()
    except OSError:
        return False
    return True


def read(reader: Reader, extents: list[Extent], nbytes: int) -> bytes:
    buffer = torch.full((nbytes,), 0xAA, dtype=torch.uint8)
    reader.submit("layers.3", extents, buffer).wait()
    return buffer.numpy().tobytes()


@pytest.mark.parametrize("io", IO)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    places=st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, 30_000)), min_size=1, max_size=3),
    piece_bytes=st.sampled_from([3000, 4096, 10_001, 1 << 20]),
    threads=st.integers(1, 4),
)
def test_reads_equal_the_file_whatever_the_ranges(
    path: Path, io: str, places: list[tuple[int, int]], piece_bytes: int, threads: int
) -> None:
    if not supported(path, io):
        pytest.skip(f"{io} is not available here")
    content = path.read_bytes()
    extents, target = [], 0
    for offset, nbytes in places:
        nbytes = min(nbytes, len(content) - offset)
        extents.append(Extent(path, offset, nbytes, target))
        target += nbytes + 3

    with (
        Checkpoint.open(path) as checkpoint,
        Reader(checkpoint, io=io, threads=threads, piece_bytes=piece_bytes) as reader,
    ):
        got = read(reader, extents, target)

    wanted = bytearray(b"\xaa" * target)
    for extent in extents:
        wanted[extent.target : extent.target + extent.nbytes] = content[extent.offset : extent.offset + extent.nbytes]
    assert got == bytes(wanted)


@pytest.mark.parametrize("kind", [SeekingFile, DirectFile])
def test_other_files_read_like_positional_ones(path: Path, kind: type) -> None:
    if kind is DirectFile and not supported(path, "direct"):
        pytest.skip("no direct reads here")
    content = path.read_bytes()
    file = kind(path)
    target = np.zeros(5000, np.uint8)

    inside = file.read_into(77, target)
    at_end = file.read_into(len(content) - 10, target.copy())
    past_end = file.read_into(len(content) + 10_000, target.copy())
    file.close()

    assert (inside, at_end, past_end) == (5000, 10, 0)
    assert target.tobytes() == content[77:5077]


def test_a_system_without_positional_reads_uses_a_handle_per_thread(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "preadv")
    content = path.read_bytes()

    with Checkpoint.open(path) as checkpoint, Reader(checkpoint, threads=3, piece_bytes=1000) as reader:
        got = read(reader, [Extent(path, 100, 200_000, 0)], 200_000)
        opened = descriptors()

    assert got == content[100:200_100]
    assert len(opened) > 1 or not opened


@pytest.mark.parametrize("most", [1, 7, 999])
def test_short_reads_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: whole(fd, [buffers[0][:most]], at))

    with Checkpoint.open(path) as checkpoint, Reader(checkpoint) as reader:
        assert read(reader, [Extent(path, 50, 3000, 0)], 3000) == path.read_bytes()[50:3050]


def test_an_io_error_names_block_file_and_offset(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv

    def fail_late(fd: int, buffers: list, at: int) -> int:
        if at >= 100_000:
            raise OSError(errno.EIO, "Input/output error")
        return whole(fd, buffers, at)

    monkeypatch.setattr(os, "preadv", fail_late)
    with Checkpoint.open(path) as checkpoint, Reader(checkpoint, piece_bytes=10_000) as reader:
        with pytest.raises(OSError, match=r"block layers\.3: 10000 bytes at byte 1\d0000 cannot be read") as caught:
            read(reader, [Extent(path, 0, 200_000, 0)], 200_000)
        monkeypatch.undo()
        after = read(reader, [Extent(path, 0, 200_000, 0)], 200_000)

    assert caught.value.errno == errno.EIO
    assert caught.value.filename == str(path)
    assert after == path.read_bytes()[:200_000]


@pytest.mark.parametrize("io", IO)
def test_a_file_cut_short_is_refused_before_it_is_read(path: Path, io: str) -> None:
    if not supported(path, io):
        pytest.skip(f"{io} is not available here")
    with Checkpoint.open(path) as checkpoint, Reader(checkpoint, io=io) as reader:
        os.truncate(path, 1000)
        with pytest.raises(CheckpointError, match=r"has 1000 bytes, it had \d+ .*before reading block layers\.3"):
            read(reader, [Extent(path, 0, 5000, 0)], 5000)


@pytest.mark.parametrize("io", ["read", "direct"])
def test_a_file_cut_short_while_it_is_read_ends_in_an_error(
    path: Path, monkeypatch: pytest.MonkeyPatch, io: str
) -> None:
    if not supported(path, io):
        pytest.skip(f"{io} is not available here")
    monkeypatch.setattr(reading_module, "check_before_read", lambda identity, path, label: None)

    with Checkpoint.open(path) as checkpoint, Reader(checkpoint, io=io) as reader:
        os.truncate(path, 100_000)
        with pytest.raises(CheckpointError, match=r"block layers\.3: .*only [0-9]+ bytes are there; the file was cut"):
            read(reader, [Extent(path, 50_000, 100_000, 0)], 100_000)


def test_a_replaced_file_is_refused(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    shutil.copy(path, other)

    with Checkpoint.open(path) as checkpoint, Reader(checkpoint) as reader:
        os.utime(other, ns=(1, 1))
        other.replace(path)
        with pytest.raises(CheckpointError, match="was modified since it was opened"):
            read(reader, [Extent(path, 0, 100, 0)], 100)
        path.unlink()
        with pytest.raises(CheckpointError, match=r"was removed before block layers\.3"):
            read(reader, [Extent(path, 0, 100, 0)], 100)
        with pytest.raises(CheckpointError, match="was removed since it was opened"):
            reader.verify()


def test_a_file_of_the_same_size_and_time_but_another_header_is_refused(path: Path) -> None:
    with Checkpoint.open(path) as checkpoint:
        status = path.stat()
        content = path.read_bytes()
        path.write_bytes(content.replace(b'"w"', b'"x"', 1))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(CheckpointError, match="another header"):
            Reader(checkpoint)


def test_an_unknown_way_of_reading_is_refused(path: Path) -> None:
    with Checkpoint.open(path) as checkpoint, pytest.raises(ValueError, match="io must be read, direct or mmap"):
        Reader(checkpoint, io="fast")


def test_cancel_waits_until_the_buffer_is_no_longer_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: (time.sleep(0.01), whole(fd, buffers, at))[1])
    buffer = torch.zeros(SIZE, dtype=torch.uint8)

    with Checkpoint.open(path) as checkpoint, Reader(checkpoint, threads=2, piece_bytes=1000) as reader:
        job = reader.submit("layers.3", [Extent(path, 0, SIZE, 0)], buffer)
        time.sleep(0.03)
        job.cancel()
        before = buffer.clone()
        time.sleep(0.05)

        assert torch.equal(buffer, before)
        assert before.count_nonzero() < SIZE // 2
        with pytest.raises(CancelledError):
            job.wait()


def test_close_ends_reads_under_way(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, begun = os.preadv, []

    def slow(descriptor: int, buffers: list, offset: int) -> int:
        begun.append(offset)
        time.sleep(0.01)
        return whole(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)

    with Checkpoint.open(path) as checkpoint:
        reader = Reader(checkpoint, threads=2, piece_bytes=1000)
        job = reader.submit("layers.3", [Extent(path, 0, SIZE, 0)], torch.zeros(SIZE, dtype=torch.uint8))
        reader.close()
        reader.close()

    assert len(begun) < SIZE // 1000  # pieces
    with pytest.raises(CancelledError):
        job.wait()


def test_a_closed_reader_takes_nothing_more(path: Path) -> None:
    with Checkpoint.open(path) as checkpoint:
        with Reader(checkpoint) as reader:
            pass
        with pytest.raises(ValueError, match=r"block layers\.3 cannot be read: the reader is closed"):
            read(reader, [Extent(path, 0, 100, 0)], 100)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's account of pages")
def test_a_mapping_lets_go_of_what_is_no_longer_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, whole = tmp_path / "large.safetensors", 96 << 20
    save_file({"w": torch.ones(whole, dtype=torch.uint8)}, path)
    monkeypatch.setattr(reading_module, "_DROPPED_BYTES", 8 << 20)
    buffer = torch.zeros(4 << 20, dtype=torch.uint8)

    with Checkpoint.open(path) as checkpoint, Reader(checkpoint, io="mmap") as reader:
        before = process_memory().file_backed
        for offset in range(0, whole, buffer.nbytes):
            reader.submit("w", [Extent(path, offset, buffer.nbytes, 0)], buffer, drop_cache=True).wait()
        held = process_memory().file_backed - before

    assert held < 32 << 20


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")
def test_advice_that_is_refused_fails_no_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    monkeypatch.setattr(reading_module, "_DROPPED_BYTES", 1)
    buffer = torch.zeros(5000, dtype=torch.uint8)
    with Checkpoint.open(path) as checkpoint, Reader(checkpoint) as reader:
        reader.submit("layers.3", [Extent(path, 10, 5000, 0)], buffer, drop_cache=True).wait()

    assert buffer.numpy().tobytes() == path.read_bytes()[10:5010]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")
def test_many_small_ranges_are_dropped_in_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all of them are gone through for each one."""
    advised: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, offset, nbytes, advice: advised.append((offset, nbytes)))
    file = open_file(path, "read")

    for offset in range(0, 4096, 2):
        file.drop_cache(offset, 1)

    assert len(advised) == 2048
    file.close()


def test_dropped_ranges_read_the_same_again(path: Path) -> None:
    buffer = torch.zeros(SIZE, dtype=torch.uint8)
    with Checkpoint.open(path) as checkpoint, Reader(checkpoint) as reader:
        for _ in range(2):
            reader.submit("layers.3", [Extent(path, 10, SIZE, 0)], buffer.zero_(), drop_cache=True).wait()
            assert buffer.numpy().tobytes() == path.read_bytes()[10 : SIZE + 10]

        assert reader.read_bytes == 2 * SIZE


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")
def test_ranges_are_dropped_many_at_a_time_and_none_is_forgotten(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advised: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, offset, nbytes, advice: advised.append((offset, nbytes)))
    monkeypatch.setattr(reading_module, "_DROPPED_BYTES", 300)
    file = open_file(path, "read")

    for offset in (200, 100, 0, 900, 1000):
        file.drop_cache(offset, 100)
    before = list(advised)
    file.close()

    assert before == [(0, 300)]
    assert advised == [(0, 300), (900, 200)]


def test_the_probe_tells_every_rate(path: Path) -> None:
    with Checkpoint.open(path) as checkpoint:
        probe = probe_io(checkpoint, rounds=3, round_bytes=20_000)

    assert probe.rates.keys() <= {"read", "direct"}  # never a mapping, which nobody asked for
    assert probe.io in probe.rates
    assert all(f"{io} {rate / 1e9:.2f} GB/s" in probe.reason for io, rate in probe.rates.items())


def test_the_probe_says_why_a_way_is_not_available(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT", raising=False)

    with Checkpoint.open(path) as checkpoint:
        probe = probe_io(checkpoint, rounds=2, round_bytes=20_000)

    assert "direct" not in probe.rates
    assert "direct not available: this system has no direct reads" in probe.reason


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="there are no direct reads here")
@pytest.mark.parametrize("refusing", ["open", "preadv"])
def test_a_file_system_without_direct_reads_is_told_with_the_way_out(
    path: Path, monkeypatch: pytest.MonkeyPatch, refusing: str
) -> None:
    plain = os.open

    def refuse(*arguments: Any, **options: Any) -> int:
        if refusing == "open" and not arguments[1] & os.O_DIRECT:
            return plain(*arguments, **options)
        raise OSError(errno.EINVAL, "Invalid argument")

    if refusing == "preadv" and not supported(path, "direct"):
        pytest.skip("this file system refuses when the file is opened")
    monkeypatch.setattr(os, refusing, refuse)

    with (
        Checkpoint.open(path) as checkpoint,
        pytest.raises(OSError, match="no direct reads on this file system; use --io read") as caught,
        Reader(checkpoint, io="direct") as reader,
    ):
        read(reader, [Extent(path, 0, 200, 0)], 200)

    assert caught.value.errno == errno.EINVAL
    assert caught.value.filename == str(path)


@pytest.mark.parametrize(
    ("rates", "io"),
    [
        ({"read": [9e9, 8e9, 9e9], "direct": [10e9, 10e9, 10e9]}, "read"),
        ({"read": [9e9, 8e9, 9e9], "direct": [11e9, 10e9, 11e9]}, "direct"),
        ({"read": [9e9, 8e9, 12e9], "direct": [11e9, 11e9, 11e9]}, "read"),
        ({"direct": [1e9, 1e9, 1e9]}, "direct"),
        ({"read": [1e9, 1e9, 1e9]}, "read"),
        ({}, "read"),
    ],
)
def test_the_plainest_way_wins_unless_another_is_clearly_faster(rates: dict[str, list[float]], io: str) -> None:
    probe = IoProbe(rates, {})

    assert probe.io == io
    assert probe.reason.startswith(io)


@pytest.mark.parametrize("user", ["a new reader", "an open reader", "mapped pages"])
def test_of_a_block_in_several_files_each_one_is_checked(tmp_path: Path, user: str) -> None:
    for number, name in ((1, "w.a"), (2, "w.b")):
        save_file({name: torch.rand(50, 50)}, tmp_path / f"model-{number}.safetensors")
    index = {"weight_map": {"w.a": "model-1.safetensors", "w.b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    with Checkpoint.open(tmp_path) as checkpoint:
        block = Block.under(checkpoint, "w.")
        plan = plan_residency([BlockCost("w", block.nbytes, 1e-3)], Rates(disk=1e9), Budget(1 << 20))
        buffer = torch.zeros(block.nbytes, dtype=torch.uint8)
        with Reader(checkpoint) as reader:

            def use() -> None:
                if user == "a new reader":
                    Reader(checkpoint)
                elif user == "an open reader":
                    reader.submit("w", block.layout.extents, buffer)
                else:
                    with PagedBlocks(checkpoint, [block], plan) as paged, paged.visit("w"):
                        pass

            os.utime(checkpoint.files[1], ns=(1, 1))
            with pytest.raises(CheckpointError, match=r"model-2\.safetensors: was modified since it was opened"):
                use()


def test_an_error_is_told_when_nothing_is_written_any_more(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is told may use the buffer for something else."""
    whole, is_reading = os.preadv, threading.Event()

    def fail_first(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset == 0:
            assert is_reading.wait(10)
            raise OSError(errno.EIO, "Input/output error")
        is_reading.set()
        time.sleep(0.2)
        return whole(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", fail_first)
    buffer = torch.zeros(SIZE, dtype=torch.uint8)
    with Checkpoint.open(path) as checkpoint, Reader(checkpoint, threads=2, piece_bytes=SIZE // 2) as reader:
        job = reader.submit("layers.3", [Extent(path, 0, SIZE, 0)], buffer)
        with pytest.raises(OSError, match="Input/output error"):
            job.wait()
        then = buffer.clone()
        time.sleep(0.4)

        assert torch.equal(buffer, then)
