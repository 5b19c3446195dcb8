"""Blocks computed on where they are mapped: brought in time, let go of after use, every fault an error."""

import errno
import mmap
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from offload import Block, Checkpoint, CheckpointError, IoProbe, MappedBlocks, probe_io
from offload import paging as paging_module
from offload.page_cache import cached_pages
from offload.paged import PagedBlocks, copied_bytes
from offload.paging import FEW, HUGE_PAGE, LONG_RANGE, POPULATES_SAFELY, PageTable, populate_by_touch
from offload.residency import BlockCost, Budget, Rates, ResidencyPlan, Tier, plan_residency
from tests.file_systems import require_page_cache

MIB = 1 << 20
# (rows, columns) of the INT8 weight in each block: a first one of twice the size, as refiners are.
ROWS = [4096, 2048, 2048, 2048, 2048]


pytestmark = pytest.mark.usefixtures("no_thread_is_left")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tensors: dict[str, Tensor] = {}
    for index, rows in enumerate(ROWS):
        tensors[f"{index}.weight"] = torch.randint(-128, 128, (rows, 1024), dtype=torch.int8)
        tensors[f"{index}.scale"] = torch.rand(rows)
        tensors[f"{index}.norm"] = torch.randn(7, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def checkpoint(path: Path) -> Iterator[Checkpoint]:
    with Checkpoint.open(path) as checkpoint:
        yield checkpoint


@pytest.fixture
def blocks(checkpoint: Checkpoint) -> list[Block]:
    return [Block.under(checkpoint, f"{index}.") for index in range(len(ROWS))]


def plan_for(blocks: Sequence[Block], device_bytes: int, slots: int | None = 2) -> ResidencyPlan:
    costs = [BlockCost(block.name, block.nbytes, 1e-3) for block in blocks]
    return plan_residency(costs, Rates(disk=1e9), Budget(device_bytes), slots=slots)


def tight(blocks: Sequence[Block]) -> ResidencyPlan:
    """A pair of small blocks, which the large one fills alone."""
    return plan_for(blocks, 2 * blocks[1].nbytes + blocks[0].nbytes // 8)


def walk(paged: PagedBlocks, blocks: Sequence[Block], steps: int, delays: Random | None = None) -> list[int]:
    found = []
    for _ in range(steps):
        for block in blocks:
            with paged.visit(block.name) as weights:
                if delays is not None:
                    time.sleep(delays.random() * 2e-3)
                found.append(int(weights["weight"].sum(dtype=torch.int64)))
    return found


def sums(checkpoint: Checkpoint, steps: int) -> list[int]:
    return steps * [int(checkpoint.tensor(f"{index}.weight").sum(dtype=torch.int64)) for index in range(len(ROWS))]


class Pages:
    """What of each file has been brought and not let go of, by whoever goes through a PageTable."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, delays: Random | None = None) -> None:
        self.present: set[int] = set()  # pages
        self.most = 0
        whole_populate, whole_let_go = PageTable.populate, PageTable.let_go

        def populate(table: PageTable, offset: int, nbytes: int) -> None:
            if delays is not None:
                time.sleep(delays.random() * 2e-3)
            whole_populate(table, offset, nbytes)
            self.present |= set(range(offset // mmap.PAGESIZE, -(-(offset + nbytes) // mmap.PAGESIZE)))
            self.most = max(self.most, len(self.present))

        def let_go(table: PageTable, offset: int, nbytes: int, *, drop_cache: bool = True) -> None:
            whole_let_go(table, offset, nbytes, drop_cache=drop_cache)
            self.present -= set(range(-(-offset // mmap.PAGESIZE), (offset + nbytes) // mmap.PAGESIZE))

        monkeypatch.setattr(PageTable, "populate", populate)
        monkeypatch.setattr(PageTable, "let_go", let_go)

    def has(self, block: Block) -> bool:
        return all(
            set(range(extent.offset // mmap.PAGESIZE, -(-(extent.offset + extent.nbytes) // mmap.PAGESIZE)))
            <= self.present
            for extent in block.layout.extents
        )


def shared_pages(blocks: Sequence[Block]) -> int:
    """At either end of each extent there may be one that belongs to a neighbour, too."""
    return 2 * sum(len(block.layout.extents) for block in blocks)


def test_a_visit_lends_views_of_the_file_and_copies_only_what_kernels_need_aligned(
    checkpoint: Checkpoint, blocks: list[Block]
) -> None:
    block, norm = blocks[2], checkpoint.tensor("2.norm")
    assert norm.data_ptr() % 256

    for to_align, is_copied in ((None, True), ({torch.bfloat16}, True), ({torch.float32}, False)):
        with (
            PagedBlocks(checkpoint, blocks, tight(blocks), to_align=to_align) as paged,
            paged.visit(block.name) as weights,
        ):
            assert weights["weight"].data_ptr() == checkpoint.tensor("2.weight").data_ptr()
            assert torch.equal(weights["norm"], norm)
            assert (weights["norm"].data_ptr() != norm.data_ptr()) == is_copied
            assert is_copied == (weights["norm"].data_ptr() % 256 == 0)
            # The scales are fp32.
            scale = checkpoint.tensor("2.scale").nbytes if to_align != {torch.bfloat16} else 0
            assert copied_bytes(block, to_align) == scale + is_copied * 256


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_every_block_is_there_when_it_is_lent_and_never_more_than_planned(
    checkpoint: Checkpoint, blocks: list[Block], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = plan_for(blocks, 1 << 40, slots=2)
    plan = tight(blocks) if share == 0 else plan_for(blocks, int(sum(block.nbytes for block in blocks) * share))
    pages = Pages(monkeypatch, Random(0))
    with PagedBlocks(checkpoint, blocks, plan) as paged:
        for _ in range(3):
            for block in blocks:
                with paged.visit(block.name):
                    assert pages.has(block)
        seeks = paged.seeks

    assert paged.mapped_bytes <= pages.most * mmap.PAGESIZE
    assert share < 1.0 or paged.mapped_bytes == sum(block.layout.read_bytes for block in blocks)
    held = plan.ring_bytes + sum(block.nbytes for block in blocks if plan.tiers[block.name] is Tier.DEVICE)
    assert pages.most * mmap.PAGESIZE <= held + shared_pages(blocks) * mmap.PAGESIZE
    assert len(pages.present) <= shared_pages(blocks)
    assert seeks == 0
    assert share < 1.0 or plan.count(Tier.DEVICE) == least.count(Tier.DEVICE) == len(blocks)


def test_without_its_wait_a_block_is_lent_before_it_is_there(
    checkpoint: Checkpoint, blocks: list[Block], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hasty(PagedBlocks):
        def _take(self, index: int) -> None:
            self._seek(index)

    pages = Pages(monkeypatch, Random(0))
    with Hasty(checkpoint, blocks, tight(blocks)) as paged, paged.visit(blocks[0].name):
        assert not pages.has(blocks[0])


@pytest.mark.parametrize("seed", range(4))
def test_random_delays_change_nothing_and_never_block(
    checkpoint: Checkpoint, blocks: list[Block], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    Pages(monkeypatch, Random(seed))
    with PagedBlocks(checkpoint, blocks, tight(blocks)) as paged:
        found = walk(paged, blocks, 4, Random(seed))
        assert paged.seeks == 0
        assert paged.read_bytes >= 4 * sum(block.layout.read_bytes for block in blocks)
    assert found == sums(checkpoint, 4)


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of mappings")
def test_the_system_holds_no_more_of_the_file_than_planned(
    checkpoint: Checkpoint, blocks: list[Block], path: Path
) -> None:
    plan = tight(blocks)
    most = 0
    with PagedBlocks(checkpoint, blocks, plan) as paged:
        for block in 2 * blocks:
            with paged.visit(block.name) as weights:
                weights["weight"].sum(dtype=torch.int64)
                most = max(most, mapped_bytes(path))
    # The kernel maps some pages around the one that is touched; large ones at the ends of a block.
    assert blocks[0].nbytes <= most <= plan.ring_bytes + 2 * 2 * MIB
    assert mapped_bytes(path) <= 2 * len(blocks) * 65536


def mapped_bytes(path: Path) -> int:
    """Of the mappings of a file, what is in this process's resident set."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0] and not line.split(" ", 1)[0].endswith(":"):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def test_what_stays_is_brought_once(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    plan = plan_for(blocks, 1 << 40)
    assert plan.count(Tier.DEVICE) == len(blocks)
    with PagedBlocks(checkpoint, blocks, plan) as paged:
        assert walk(paged, blocks, 3) == sums(checkpoint, 3)
        assert paged.read_bytes == sum(block.layout.read_bytes for block in blocks)


def test_blocks_visited_once_are_skipped_by_the_rounds(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    for plan in (tight(blocks), plan_for(blocks, 1 << 40)):
        with PagedBlocks(checkpoint, blocks, plan, once=[blocks[0].name]) as paged:
            found = walk(paged, blocks, 1) + walk(paged, blocks[1:], 3)
            assert paged.seeks == 0
            assert walk(paged, blocks, 1) == sums(checkpoint, 1)  # the courier comes back for it
        assert found == sums(checkpoint, 1) + 3 * sums(checkpoint, 1)[1:]


def test_blocks_can_be_visited_in_any_order(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    expected = sums(checkpoint, 1)
    with PagedBlocks(checkpoint, blocks, tight(blocks)) as paged:
        for index in (3, 1, 1, 4, 0, 2):
            with paged.visit(blocks[index].name) as weights:
                assert int(weights["weight"].sum(dtype=torch.int64)) == expected[index]
        assert paged.seeks > 0


def test_an_exception_inside_a_block_leaves_the_rest_usable(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    with PagedBlocks(checkpoint, blocks, tight(blocks)) as paged:
        with pytest.raises(ZeroDivisionError), paged.visit(blocks[0].name):
            _ = 1 / 0
        assert walk(paged, blocks, 2) == sums(checkpoint, 2)


def test_an_error_reaches_the_caller_with_block_and_offset_and_the_next_run_works(
    checkpoint: Checkpoint, blocks: list[Block], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, descriptors = blocks[3].layout.extents[0].offset, psutil.Process().num_fds()

    def fail(table: PageTable, offset: int, nbytes: int) -> None:
        if offset == bad:
            raise OSError(errno.EIO, "Input/output error")

    with PagedBlocks(checkpoint, blocks, tight(blocks)) as paged:
        with monkeypatch.context() as patched:
            patched.setattr(PageTable, "populate", fail)
            with pytest.raises(OSError, match=rf"block 3: \d+ bytes at byte {bad} cannot be read") as caught:
                walk(paged, blocks, 2)
        assert walk(paged, blocks, 2) == sums(checkpoint, 2)
    assert caught.value.errno == errno.EIO
    assert psutil.Process().num_fds() <= descriptors


@pytest.mark.skipif(not POPULATES_SAFELY, reason="the system cannot bring pages without touching them")
def test_a_file_cut_short_under_way_is_an_error_and_not_the_end(
    checkpoint: Checkpoint, blocks: list[Block], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_populate = PageTable.populate
    end = max(extent.offset for extent in blocks[3].layout.extents)

    def cut_first(table: PageTable, offset: int, nbytes: int) -> None:
        os.truncate(path, end)  # after the check, before its pages are there
        whole_populate(table, offset, nbytes)

    monkeypatch.setattr(PageTable, "populate", cut_first)
    with (
        PagedBlocks(checkpoint, blocks, tight(blocks)) as paged,
        pytest.raises(CheckpointError, match=rf"has {end} bytes.*cut short \(before reading block 3\)"),
    ):
        paged.visit(blocks[3].name).__enter__()


def test_a_file_modified_under_way_is_refused(checkpoint: Checkpoint, blocks: list[Block], path: Path) -> None:
    with PagedBlocks(checkpoint, blocks, tight(blocks)) as paged:
        walk(paged, blocks, 1)
        os.utime(path, ns=(1, 1))
        with pytest.raises(CheckpointError, match=r"was modified since it was opened.*before reading block"):
            walk(paged, blocks, 2)


def test_closing_in_the_middle_ends_the_courier(
    checkpoint: Checkpoint, blocks: list[Block], monkeypatch: pytest.MonkeyPatch
) -> None:
    pages, descriptors = Pages(monkeypatch, Random(1)), psutil.Process().num_fds()
    paged = PagedBlocks(checkpoint, blocks, tight(blocks))
    with paged.visit(blocks[1].name):
        pass
    paged.close()
    paged.close()

    assert psutil.Process().num_fds() <= descriptors
    assert len(pages.present) <= shared_pages(blocks)
    with pytest.raises(ValueError, match="block 0 cannot be visited: closed"):
        paged.visit(blocks[0].name).__enter__()


def test_a_block_that_was_to_stay_is_let_go_of_where_bringing_it_fails(
    checkpoint: Checkpoint, blocks: list[Block], monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = Pages(monkeypatch)
    counted, end = PageTable.populate, max(extent.offset for extent in blocks[3].layout.extents)

    def fail_late(table: PageTable, offset: int, nbytes: int) -> None:
        if offset > end:  # within the last part of the block
            raise OSError(errno.EIO, "Input/output error")
        counted(table, offset, nbytes)

    monkeypatch.setattr(PageTable, "populate", fail_late)
    with PagedBlocks(checkpoint, blocks, plan_for(blocks, 1 << 40)) as paged, pytest.raises(OSError, match="block 3"):
        paged.visit(blocks[3].name).__enter__()

    assert len(pages.present) <= shared_pages(blocks)


def test_a_removed_file_is_reported(checkpoint: Checkpoint, blocks: list[Block], path: Path) -> None:
    descriptors = psutil.Process().num_fds()
    path.unlink()
    with pytest.raises(FileNotFoundError):
        PagedBlocks(checkpoint, blocks, tight(blocks))
    assert psutil.Process().num_fds() <= descriptors


def test_two_in_one_process_do_not_disturb_each_other(path: Path, blocks: list[Block], checkpoint: Checkpoint) -> None:
    with (
        Checkpoint.open(path) as other,
        PagedBlocks(checkpoint, blocks, tight(blocks)) as one,
        PagedBlocks(other, blocks, tight(blocks)) as two,
    ):
        for expected, block in zip(sums(checkpoint, 1), blocks, strict=True):
            with one.visit(block.name) as weights, two.visit(block.name) as others:
                assert int(weights["weight"].sum(dtype=torch.int64)) == expected
                assert torch.equal(weights["weight"], others["weight"])


def test_a_visit_inside_a_visit_is_refused(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    with (
        PagedBlocks(checkpoint, blocks, tight(blocks)) as paged,
        paged.visit(blocks[0].name),
        pytest.raises(ValueError, match="block 1 cannot be visited: block 0 is being visited"),
    ):
        paged.visit(blocks[1].name).__enter__()


def test_the_timeline_tells_reads_waits_and_visits_of_every_block(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    with PagedBlocks(checkpoint, blocks, tight(blocks)) as paged:
        walk(paged, blocks, 2)
    visited = [block.name for block in blocks] * 2
    assert [span.what for span in paged.timeline.lane("compute")] == visited
    assert [span.what for span in paged.timeline.lane("wait")] == visited
    assert {span.what for span in paged.timeline.lane("disk")} == set(visited)
    assert all(span.start <= span.end for span in paged.timeline)


def test_pages_are_brought_by_touching_where_the_system_has_no_call(
    checkpoint: Checkpoint, blocks: list[Block], monkeypatch: pytest.MonkeyPatch
) -> None:
    touched = []

    def touch(pages: np.ndarray) -> None:
        touched.append(pages.nbytes)
        populate_by_touch(pages)

    monkeypatch.setattr(paging_module, "_populate", touch)
    with PagedBlocks(checkpoint, blocks, tight(blocks)) as paged:
        assert walk(paged, blocks, 1) == sums(checkpoint, 1)
    assert sum(touched) >= sum(block.layout.read_bytes for block in blocks)


def test_the_probe_weighs_processor_time_where_pages_are_used_in_place(checkpoint: Checkpoint) -> None:
    probe = probe_io(checkpoint, rounds=2, round_bytes=MIB, in_place=True)

    assert probe.processor is not None
    assert probe.processor.keys() == probe.rates.keys()
    assert "GB/s at" in probe.reason
    assert probe.io in ("mmap", probe.reader)


RATE = {"read": [2e9, 2e9], "direct": [1e9, 1e9], "mmap": [1.5e9, 1.5e9]}
COST = {"read": [4e-10, 5e-10], "direct": [3e-10, 3e-10], "mmap": [0.2e-10, 0.3e-10]}


@pytest.mark.parametrize(
    ("rates", "costs", "io"),
    [
        (RATE, COST, "mmap"),
        (RATE | {"mmap": [9e9, 9e9]}, COST | {"mmap": [4e-10, 4e-10]}, "read"),  # faster, but spares nothing
        (RATE | {"mmap": [0.5e9, 0.5e9]}, COST, "read"),  # far slower
        (RATE, COST | {"mmap": [9e-10, 0.2e-10]}, "mmap"),  # a round was disturbed
        (RATE, COST | {"mmap": [3.1e-10, 4.5e-10]}, "read"),  # spares too little
        (RATE, None, "read"),  # not in place
    ],
)
def test_pages_in_place_win_where_they_clearly_spare_the_processors(
    rates: dict[str, list[float]], costs: dict[str, list[float]] | None, io: str
) -> None:
    probe = IoProbe(rates, {}, costs)

    assert probe.io == io
    assert probe.reason.startswith(io)
    assert probe.reason_of(probe.reader).startswith("read")


def test_blocks_that_stay_can_be_visited_out_of_turn(
    checkpoint: Checkpoint, blocks: list[Block], monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = Pages(monkeypatch, Random(0))
    plan = plan_for(blocks, 5 * blocks[1].nbytes)
    staying = [index for index, block in enumerate(blocks) if plan.tiers[block.name] is Tier.DEVICE]
    assert 0 < len(staying) < len(blocks) - 1
    with PagedBlocks(checkpoint, blocks, plan) as paged:
        for index in [*range(len(blocks)), staying[0], staying[0] + 1, *Random(0).choices(range(len(blocks)), k=20)]:
            with paged.visit(blocks[index % len(blocks)].name):
                assert pages.has(blocks[index % len(blocks)])


def test_what_stays_is_passed_by_in_any_order(
    checkpoint: Checkpoint, blocks: list[Block], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(blocks, int(sum(block.nbytes for block in blocks) * 0.85))
    assert [index for index, block in enumerate(blocks) if plan.tiers[block.name] is Tier.DEVICE] == [0, 4]
    pages = Pages(monkeypatch)
    with PagedBlocks(checkpoint, blocks, plan) as paged:
        with paged.visit("2"):
            deadline = time.monotonic() + 10
            while "4" not in {span.what for span in paged.timeline.lane("disk")}:
                assert time.monotonic() < deadline
                time.sleep(1e-3)
        for index in (4, 1, 2):
            with paged.visit(f"{index}"):
                time.sleep(0.05)  # for the courier to let go of what is not in use
                assert pages.has(blocks[index])


def test_closing_from_another_thread_ends_the_wait_for_a_block(
    checkpoint: Checkpoint, blocks: list[Block], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, whole_populate, ended = threading.Event(), PageTable.populate, []

    def populate(table: PageTable, offset: int, nbytes: int) -> None:
        if offset >= blocks[2].layout.extents[0].offset:
            asked.set()
            time.sleep(0.1)
        whole_populate(table, offset, nbytes)

    def run() -> None:
        try:
            walk(paged, blocks, 1)
        except ValueError as error:
            ended.append(str(error))

    monkeypatch.setattr(PageTable, "populate", populate)
    paged = PagedBlocks(checkpoint, blocks, tight(blocks))
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert asked.wait(30)
    paged.close()
    thread.join(30)

    assert not thread.is_alive()
    assert len(ended) == 1
    assert "closed" in ended[0]


@pytest.mark.parametrize("keep", [True, False])
def test_what_is_let_go_of_leaves_the_page_cache_unless_it_may_stay(
    checkpoint: Checkpoint, blocks: list[Block], monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    """With a budget cached pages count, too."""
    dropped: list[bool] = []
    let_go = PageTable.let_go

    def noted(table: PageTable, offset: int, nbytes: int, *, drop_cache: bool = True) -> None:
        dropped.append(drop_cache)
        let_go(table, offset, nbytes, drop_cache=drop_cache)

    monkeypatch.setattr(PageTable, "let_go", noted)
    with PagedBlocks(checkpoint, blocks, tight(blocks), keep_cache=keep) as paged:
        walk(paged, blocks, 2)

    assert set(dropped) == {not keep}


class Advice:
    """What of the page cache was dropped, and what was advised about the mapping, as (name or None, offset, bytes)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: list[tuple[str | None, int, int]] = []
        advise = PageTable._advise

        def noted(table: PageTable, name: str, start: int, stop: int) -> bool:
            self.given.append((name, start, stop - start))
            return advise(table, name, start, stop)

        def dropped(descriptor: int, offset: int, nbytes: int, advice: int) -> None:
            assert advice == os.POSIX_FADV_DONTNEED
            self.given.append((None, offset, nbytes))

        monkeypatch.setattr(PageTable, "_advise", noted)
        monkeypatch.setattr(os, "posix_fadvise", dropped)

    def of(self, *names: str | None) -> list[tuple[str | None, int, int]]:
        return [given for given in self.given if given[0] in names]


needs_advice = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="a system that takes no such advice")
FEW_PAGES = int(HUGE_PAGE // mmap.PAGESIZE * FEW)
SHARED = HUGE_PAGE - 2 * mmap.PAGESIZE  # where a range begins that shares a large page


@needs_advice
@pytest.mark.parametrize(
    ("cached", "dropped"),
    [
        ({"large": 0, "wanted": 0}, False),  # nothing there
        ({"large": 1, "wanted": 0}, True),
        ({"large": FEW_PAGES - 1, "wanted": 1}, True),
        ({"large": FEW_PAGES, "wanted": 1}, False),  # much would have to be read again
        ({"large": 2, "wanted": 2}, False),  # nothing is to be read
        ({"large": HUGE_PAGE // mmap.PAGESIZE, "wanted": 2}, False),
    ],
)
def test_few_pages_in_the_cache_are_dropped_so_that_a_large_one_can_be_read(
    checkpoint: Checkpoint, path: Path, monkeypatch: pytest.MonkeyPatch, cached: dict[str, int], dropped: bool
) -> None:
    def told(descriptor: int, offset: int, nbytes: int) -> int:
        if (offset, nbytes) == (0, 1):
            return 1  # asked whether it is told at all
        if offset >= HUGE_PAGE:
            return 0  # the next large page, of which the range has some, too
        assert (offset, nbytes) in ((0, HUGE_PAGE), (SHARED, 2 * mmap.PAGESIZE))
        return cached["large" if offset == 0 else "wanted"]

    monkeypatch.setattr(paging_module, "cached_pages", told)
    table = checkpoint.pages(path)
    advice = Advice(monkeypatch)
    table.populate(SHARED, 3 * mmap.PAGESIZE)
    table.close()

    # Unmapped first, or it would stay.
    assert advice.given == ([("MADV_DONTNEED", 0, HUGE_PAGE), (None, 0, HUGE_PAGE)] if dropped else [])


@needs_advice
@pytest.mark.skipif(mmap.PAGESIZE != 4096, reason="of larger pages the end of this file has too few")
def test_at_the_end_of_a_file_less_is_much(checkpoint: Checkpoint, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = path.stat().st_size
    last, pages = size // HUGE_PAGE * HUGE_PAGE, -(-(size % HUGE_PAGE) // mmap.PAGESIZE)
    assert 2 < pages < FEW_PAGES, "it ends with part of a large page"
    advice = Advice(monkeypatch)
    for cached in (-(-pages // 2), pages // 2 - 1):
        monkeypatch.setattr(paging_module, "cached_pages", lambda *asked, cached=cached: cached)
        table = checkpoint.pages(path)
        table.forget(size - 1, 1)
        table.close()

    assert advice.of(None) == [(None, last, size - last)]


@needs_advice
@pytest.mark.parametrize(("cached", "dropped"), [(0, False), (2, True), (FEW_PAGES, False)])
def test_what_was_read_in_passing_is_forgotten_where_little_else_is_cached(
    checkpoint: Checkpoint, blocks: list[Block], monkeypatch: pytest.MonkeyPatch, cached: int, dropped: bool
) -> None:
    monkeypatch.setattr(paging_module, "cached_pages", lambda descriptor, offset, nbytes: cached)
    with MappedBlocks(checkpoint, blocks[1:2]) as mapped:
        advice = Advice(monkeypatch)
        mapped.forget(blocks[1].name)

    extents = blocks[1].layout.extents
    large = {
        start // HUGE_PAGE * HUGE_PAGE
        for extent in extents
        for start in (
            *range(extent.offset, extent.offset + extent.nbytes, HUGE_PAGE),
            extent.offset + extent.nbytes - 1,
        )
    }
    assert {offset for name, offset, _ in advice.given if name is None} == (large if dropped else set())


@needs_advice
def test_a_system_that_does_not_tell_what_is_cached_is_asked_once(
    checkpoint: Checkpoint, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refused(descriptor: int, offset: int, nbytes: int) -> int:
        asked.append(offset)
        raise OSError(errno.ENOSYS, "no such call")

    monkeypatch.setattr(paging_module, "cached_pages", refused)
    table = checkpoint.pages(path)
    advice = Advice(monkeypatch)
    table.populate(0, 3 * HUGE_PAGE)
    table.close()

    assert asked == [0]
    assert advice.given == []


@needs_advice
def test_what_is_cached_is_not_asked_for_again_once_it_is_not_told(
    checkpoint: Checkpoint, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refused(descriptor: int, offset: int, nbytes: int) -> int:
        asked.append((offset, nbytes))
        if nbytes > 1:
            raise OSError(errno.EPERM, "not any more")
        return 1

    monkeypatch.setattr(paging_module, "cached_pages", refused)
    table = checkpoint.pages(path)
    table.populate(0, 3 * HUGE_PAGE)
    table.close()

    assert asked == [(0, 1), (0, HUGE_PAGE)]


def test_what_is_dropped_from_the_cache_is_read_again(
    checkpoint: Checkpoint, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that was read lies in the middle of a large one which a block wants."""
    require_page_cache(path)
    _settle(path)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        read = os.pread(file.fileno(), 1, HUGE_PAGE + 100)
    if (before := _cached(path, HUGE_PAGE, HUGE_PAGE)) is None:
        pytest.skip("this system does not tell what is cached")
    assert 0 < before < FEW_PAGES // 2
    dropped = []

    def drop(descriptor: int, offset: int, nbytes: int, advice: int) -> None:
        given(descriptor, offset, nbytes, advice)
        dropped.append(_cached(path, HUGE_PAGE, HUGE_PAGE))

    given = os.posix_fadvise
    monkeypatch.setattr(os, "posix_fadvise", drop)
    table = checkpoint.pages(path)
    table.expect(HUGE_PAGE, HUGE_PAGE)
    table.populate(HUGE_PAGE + 3 * mmap.PAGESIZE, HUGE_PAGE // 2)
    table.close()

    assert dropped == [0]
    assert _cached(path, HUGE_PAGE + 3 * mmap.PAGESIZE, HUGE_PAGE // 2) == HUGE_PAGE // 2 // mmap.PAGESIZE
    with path.open("rb") as file:
        assert os.pread(file.fileno(), 1, HUGE_PAGE + 100) == read


def test_the_page_cache_is_counted(path: Path) -> None:
    require_page_cache(path)
    _settle(path)
    with path.open("rb") as file:
        os.pread(file.fileno(), 8 * mmap.PAGESIZE, HUGE_PAGE)

    assert _cached(path, HUGE_PAGE, 8 * mmap.PAGESIZE) in (8, None)
    assert _cached(path, HUGE_PAGE + 1, 2 * mmap.PAGESIZE) in (3, None)  # pages that are touched


def _settle(path: Path) -> None:
    """Written, and out of the page cache where the system drops it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _cached(path: Path, offset: int, nbytes: int) -> int | None:
    with path.open("rb") as file:
        try:
            return cached_pages(file.fileno(), offset, nbytes)
        except OSError:
            return None


@needs_advice
@pytest.mark.parametrize(
    ("has_large_pages", "is_new", "page", "given"),
    [(True, True, 4096, True), (True, False, 4096, False), (False, True, 4096, False), (True, True, 16384, False)],
)
def test_only_short_ranges_are_read_without_what_comes_after_them(
    checkpoint: Checkpoint,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    has_large_pages: bool,
    is_new: bool,
    page: int,
    given: bool,
) -> None:
    """And only where the kernel is new enough and its large pages have 2 MiB, or every small one would be read by
    itself."""
    monkeypatch.setattr(paging_module, "RANDOM_KEEPS_LARGE", is_new)
    advice = Advice(monkeypatch)
    noted = PageTable._advise

    def taken(table: PageTable, name: str, start: int, stop: int) -> bool:
        noted(table, name, start, stop)
        return has_large_pages

    monkeypatch.setattr(PageTable, "_advise", taken)
    monkeypatch.setattr(mmap, "PAGESIZE", page)
    table = checkpoint.pages(path)
    table.expect(HUGE_PAGE + 5, 10)
    table.expect(0, LONG_RANGE)
    table.close()

    assert advice.of("MADV_RANDOM") == ([("MADV_RANDOM", HUGE_PAGE, HUGE_PAGE)] if given else [])
    assert [nbytes for _, _, nbytes in advice.of("MADV_HUGEPAGE")] == [
        HUGE_PAGE,
        path.stat().st_size // page * page + page,
    ]


@pytest.mark.parametrize(
    ("release", "keeps"),
    [
        ("5.15.167.4-microsoft-standard-WSL2", False),
        ("5.17.15", False),
        ("5.18.0", True),
        ("6.1.0-28-amd64", True),
        ("4.18.0-553.el8_10.x86_64", False),
        ("unknown", False),
    ],
)
def test_since_when_random_reads_keep_large_pages(release: str, keeps: bool) -> None:
    assert paging_module._random_keeps_large(release) is keeps
