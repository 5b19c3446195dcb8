"""The ring on the CPU with real files and threads: streamed equals resident, and every fault ends cleanly."""

import errno
import gc
import os
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from offload import Block, BudgetError, Checkpoint, CheckpointError
from offload.blocks import Extent, Part, TensorSource
from offload.devices import CpuDevice, aligned_buffer
from offload.reading import Reader, ReadJob
from offload.residency import BlockCost, Budget, Rates, ResidencyPlan, Tier, plan_residency
from offload.ring import Ring, _Visit
from offload.simulator import SimulatedAccelerator, SimulatedReader

RATES = Rates(disk=1e9, cached=5e9, link=None)


pytestmark = pytest.mark.usefixtures("no_thread_is_left")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Seven blocks, the first two of twice the size, each with a fused qkv kept split and a BF16 scale."""
    tensors: dict[str, Tensor] = {}
    for index in range(7):
        width = 128 if index < 2 else 64
        for part in "qkv":
            tensors[f"{index}.{part}"] = torch.randint(-128, 128, (64, width), dtype=torch.int8)
        tensors[f"{index}.scale"] = torch.rand(192, 1).bfloat16()
        tensors[f"{index}.out"] = torch.randn(width, 64)
        tensors[f"{index}.bias"] = torch.randn(7)
    save_file(tensors, tmp_path / "model.safetensors")
    return Checkpoint.open(tmp_path / "model.safetensors")


@pytest.fixture
def blocks(checkpoint: Checkpoint) -> list[Block]:
    made = []
    for index in range(7):
        infos = {name.split(".")[1]: info for name, info in checkpoint.tensors.items() if name.startswith(f"{index}.")}
        width = infos["q"].shape[1]
        qkv = tuple(Part(infos[part], (64, width)) for part in "qkv")
        sources = (
            TensorSource("qkv", (192, width), torch.int8, qkv),
            TensorSource("scale", (192, 1), torch.float32, (Part(infos["scale"], (192, 1)),)),
            TensorSource.plain(infos["out"], "out"),
            TensorSource.plain(infos["bias"], "bias"),
        )
        made.append(Block(f"layers.{index}", sources))
    return made


def plan_for(blocks: Sequence[Block], device_bytes: int, slots: int | None = None) -> ResidencyPlan:
    costs = [BlockCost(block.name, block.nbytes, 1e-3) for block in blocks]
    return plan_residency(costs, RATES, Budget(device_bytes), slots=slots)


def whole(blocks: Sequence[Block]) -> int:
    return sum(block.nbytes for block in blocks)


def weights_of(checkpoint: Checkpoint, index: int) -> dict[str, Tensor]:
    """A block's tensors read the plain way."""
    part = {name: checkpoint.tensor(f"{index}.{name}") for name in ("q", "k", "v", "scale", "out", "bias")}
    qkv = torch.cat([part["q"], part["k"], part["v"]])
    return {"qkv": qkv, "scale": part["scale"].float(), "out": part["out"], "bias": part["bias"]}


def step(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """A layer of sorts, (rows, 64) -> (rows, 64), that any wrong byte disturbs."""
    weight = weights["qkv"].float() * weights["scale"]
    hidden = torch.nn.functional.linear(x, weights["out"]) @ weight.T
    return torch.tanh(hidden[:, :64] - hidden[:, 64:128] + hidden[:, 128:] + weights["bias"].sum()) + x


def walk(ring: Ring, blocks: Sequence[Block], x: Tensor, steps: int, delays: Random | None = None) -> Tensor:
    for _ in range(steps):
        for block in blocks:
            with ring.visit(block.name) as weights:
                if delays is not None:
                    time.sleep(delays.random() * 2e-3)
                x = step(dict(weights), x)
    return x


class SlowReader:
    """Passes reads on after a random while, from a thread, so that they end in any order."""

    def __init__(self, reader: Reader, seed: int) -> None:
        self._reader = reader
        self._random = Random(seed)

    def submit(self, label: str, extents: Sequence[Extent], buffer: Tensor, *, drop_cache: bool = False) -> ReadJob:
        job = ReadJob(1)
        delay = self._random.random() * 4e-3

        def read() -> None:
            time.sleep(delay)
            self._reader.submit(label, extents, buffer, drop_cache=drop_cache).wait()
            job.finish_piece()

        threading.Thread(target=read, name="slow reader", daemon=True).start()
        return job


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("share", [0.35, 0.6, 0.8, 1.0])
def test_streamed_equals_resident_bit_for_bit_with_poisoned_slots(
    checkpoint: Checkpoint, blocks: list[Block], share: float, rows: int
) -> None:
    x = torch.randn(rows, 64)
    plan = plan_for(blocks, int(whole(blocks) * share))
    everything = plan_for(blocks, whole(blocks))

    with Reader(checkpoint, piece_bytes=4096) as reader:
        with Ring(blocks, plan, CpuDevice(), reader, poison=True) as ring:
            streamed = walk(ring, blocks, x, steps=3)
        with Ring(blocks, everything, CpuDevice(), reader) as ring:
            resident = walk(ring, blocks, x, steps=3)

    assert plan.count(Tier.DEVICE) < 7 or share == 1.0
    assert everything.count(Tier.DEVICE) == 7
    assert resident.isfinite().all()
    assert torch.equal(streamed, resident)


def test_every_tensor_of_every_visit_is_the_files(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    with Reader(checkpoint) as reader, Ring(blocks, plan_for(blocks, whole(blocks) // 2), CpuDevice(), reader) as ring:
        for _ in range(3):
            for index, block in enumerate(blocks):
                with ring.visit(block.name) as weights:
                    for name, expected in weights_of(checkpoint, index).items():
                        assert torch.equal(weights[name], expected), (block.name, name)
                        assert weights[name].data_ptr() % 256 == 0


def test_a_visit_that_outlives_its_slot_sees_the_poison(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    """The poison works: without it, a wrong tensor could look right by luck."""
    plan = plan_for(blocks, 3 * blocks[-1].nbytes)
    index = next(index for index, block in enumerate(blocks) if plan.tiers[block.name] is Tier.DISK)
    with Reader(checkpoint) as reader, Ring(blocks, plan, CpuDevice(), reader, poison=True) as ring:
        with ring.visit(f"layers.{index}") as weights:
            bias = weights["bias"]
        after = bias.clone()

    assert not torch.equal(after, weights_of(checkpoint, index)["bias"])


@pytest.mark.parametrize("seed", range(4))
def test_random_delays_change_nothing_and_never_block(checkpoint: Checkpoint, blocks: list[Block], seed: int) -> None:
    x = torch.randn(2, 64)
    plan = plan_for(blocks, whole(blocks) // 2)
    expected = x
    for _ in range(3):
        for index in range(len(blocks)):
            expected = step({name: tensor.clone() for name, tensor in weights_of(checkpoint, index).items()}, expected)

    with Reader(checkpoint, piece_bytes=1000) as reader:
        slow = SlowReader(reader, seed)
        with Ring(blocks, plan, CpuDevice(), slow, poison=True) as ring:
            got = walk(ring, blocks, x, 3, Random(seed))

    assert torch.equal(got, expected)


class DoesNotWaitForRelease(Ring):
    """Refills slots without asking whether they are still in use."""

    def _needed(self, visit: _Visit) -> int:
        return 0


def test_without_its_wait_the_ring_overwrites_what_is_in_use(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    """The tests above can fail: this is what they would see."""
    plan = plan_for(blocks, 2 * blocks[-1].nbytes)
    bias = weights_of(checkpoint, 3)["bias"]
    with (
        Reader(checkpoint) as reader,
        DoesNotWaitForRelease(blocks, plan, CpuDevice(), reader) as ring,
        ring.visit("layers.3") as weights,
    ):
        deadline = time.monotonic() + 10
        while torch.equal(weights["bias"], bias) and time.monotonic() < deadline:
            time.sleep(1e-3)
        overwritten = not torch.equal(weights["bias"], bias)

    assert plan.count(Tier.DISK) == 7
    assert overwritten


def test_prefetch_runs_across_the_end_of_a_step(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    plan = plan_for(blocks, 3 * blocks[-1].nbytes, slots=3)
    with Reader(checkpoint) as reader, Ring(blocks, plan, CpuDevice(), reader) as ring:
        for block in blocks:
            with ring.visit(block.name):
                pass
        once = sum(block.layout.read_bytes for block in blocks)
        deadline = time.monotonic() + 10
        while reader.read_bytes == once and time.monotonic() < deadline:
            time.sleep(0.01)

        assert reader.read_bytes == once + blocks[0].layout.read_bytes


def test_blocks_can_be_visited_in_any_order(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    order = [3, 4, 0, 0, 6, 1, 2, 5, 5]
    with Reader(checkpoint) as reader, Ring(blocks, plan_for(blocks, whole(blocks) // 2), CpuDevice(), reader) as ring:
        for index in order:
            with ring.visit(f"layers.{index}") as weights:
                assert torch.equal(weights["bias"], weights_of(checkpoint, index)["bias"])

        assert ring.seeks > 0


@pytest.mark.parametrize("once", [[], ["layers.0", "layers.4"]], ids=["plain", "with blocks visited once"])
@pytest.mark.parametrize("seed", range(4))
def test_blocks_that_stay_can_be_visited_out_of_turn(
    checkpoint: Checkpoint, blocks: list[Block], once: list[str], seed: int
) -> None:
    """They come from where they are, while the courier goes on with what it was at."""
    plan = plan_for(blocks, whole(blocks) * 6 // 10, slots=2)
    staying = [index for index, block in enumerate(blocks) if plan.tiers[block.name] is Tier.DEVICE]
    assert 0 < len(staying) < len(blocks) - 2
    after = (staying[0] + 1) % len(blocks)
    order = [*range(len(blocks)), staying[0], after, staying[0], after]
    order += Random(seed).choices(range(len(blocks)), k=30)
    with Reader(checkpoint) as reader, Ring(blocks, plan, CpuDevice(), reader, once=once) as ring:
        for index in order:
            with ring.visit(f"layers.{index}") as weights:
                expected = weights_of(checkpoint, index)
                assert all(torch.equal(weights[name], expected[name]) for name in expected), index


@pytest.mark.parametrize("order", [(0, 3, 4), (6,)], ids=["past one that stays", "to one that stays"])
def test_what_stays_and_what_streams_is_told_apart_in_any_order(
    checkpoint: Checkpoint, blocks: list[Block], order: tuple[int, ...]
) -> None:
    """A block brought to stay, but not asked for yet, is itself when it is visited out of turn."""
    plan = plan_for(blocks, int(whole(blocks) * 0.7))
    plan = replace(
        plan, tiers={block.name: Tier.DEVICE if index in (3, 6) else Tier.DISK for index, block in enumerate(blocks)}
    )
    with Reader(checkpoint) as reader, Ring(blocks, plan, CpuDevice(), reader) as ring:
        with ring.visit("layers.2"):
            deadline = time.monotonic() + 10
            while "layers.6" not in {span.what for span in ring.timeline.lane("disk")}:
                assert time.monotonic() < deadline
                time.sleep(1e-3)
        for index in order:
            with ring.visit(f"layers.{index}") as weights:
                for name, expected in weights_of(checkpoint, index).items():
                    assert torch.equal(weights[name], expected), (index, name)


@pytest.mark.parametrize("share", [0.35, 0.55, 0.7, 0.85, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_runs_from_any_block_on_lend_the_right_weights(
    checkpoint: Checkpoint, blocks: list[Block], share: float, seed: int
) -> None:
    """Whatever stays, whatever is ahead, and wherever the run before ended."""
    random = Random(seed)
    plan = plan_for(blocks, int(whole(blocks) * share))
    once = random.choice([(), ("layers.0", "layers.1"), ("layers.1", "layers.4")])
    with Reader(checkpoint) as reader, Ring(blocks, plan, CpuDevice(), reader, once=once, poison=True) as ring:
        for _ in range(40):
            start = random.randrange(7)
            for index in range(start, min(start + random.choice([1, 2, 7]), 7)):
                with ring.visit(f"layers.{index}") as weights:
                    for name, expected in weights_of(checkpoint, index).items():
                        assert torch.equal(weights[name], expected), (index, name)
                    time.sleep(random.random() * 1e-3)


def test_a_block_visited_once_is_brought_again_after_others_that_stay(
    checkpoint: Checkpoint, blocks: list[Block]
) -> None:
    """The courier ends where all that repeats stays, with one that does not still to come."""
    plan = plan_for(blocks, 9 * whole(blocks))
    resident = {name: Tier.DISK if name in ("layers.1", "layers.4") else Tier.DEVICE for name in plan.tiers}
    tight = plan_for(blocks, whole(blocks) // 2, slots=2)
    plan = replace(tight, tiers=resident)
    with Reader(checkpoint) as reader, Ring(blocks, plan, CpuDevice(), reader, once=["layers.1", "layers.4"]) as ring:
        for index in [*range(7), 1, 4, 1, 2, 4]:
            with ring.visit(f"layers.{index}") as weights:
                assert torch.equal(weights["bias"], weights_of(checkpoint, index)["bias"]), index


def test_an_exception_inside_a_block_leaves_the_ring_usable(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    x = torch.randn(2, 64)
    with Reader(checkpoint) as reader, Ring(blocks, plan_for(blocks, whole(blocks) // 2), CpuDevice(), reader) as ring:
        expected = walk(ring, blocks, x, 1)
        with pytest.raises(ZeroDivisionError), ring.visit("layers.0"):
            _ = 1 / 0
        after = walk(ring, blocks, x, 1)

    assert torch.equal(expected, after)


def test_a_read_error_reaches_the_caller_with_block_and_offset_and_the_next_run_works(
    checkpoint: Checkpoint, blocks: list[Block], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 64)
    bad = blocks[5].layout.extents[0].offset
    whole_read = os.preadv

    def fail(descriptor: int, buffers: list, offset: int) -> int:
        if offset == bad:
            raise OSError(errno.EIO, "Input/output error")
        return whole_read(descriptor, buffers, offset)

    with Reader(checkpoint) as reader, Ring(blocks, plan_for(blocks, whole(blocks) // 2), CpuDevice(), reader) as ring:
        expected = walk(ring, blocks, x, 2)
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(OSError, match=rf"block layers\.5: \d+ bytes at byte {bad} cannot be read") as caught:
            walk(ring, blocks, x, 4)
        monkeypatch.undo()
        after = walk(ring, blocks, x, 2)

    assert caught.value.errno == errno.EIO
    assert torch.equal(after, expected)


def test_a_file_cut_short_under_way_is_reported_not_computed_on(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    with Reader(checkpoint) as reader, Ring(blocks, plan_for(blocks, whole(blocks) // 2), CpuDevice(), reader) as ring:
        walk(ring, blocks, torch.randn(1, 64), 1)
        os.truncate(checkpoint.files[0], 5000)
        # Noticed before a read begins or within one, as the courier happens to stand.
        with pytest.raises(
            CheckpointError, match=r"has 5000 bytes.*before reading block layers|block layers.*cut short"
        ):
            walk(ring, blocks, torch.randn(1, 64), 3)


def test_closing_in_the_middle_ends_the_courier(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    with Reader(checkpoint) as reader:
        ring = Ring(blocks, plan_for(blocks, whole(blocks) // 2), CpuDevice(), SlowReader(reader, 0))
        with ring.visit("layers.2"):
            pass
        ring.close()
        ring.close()

        with pytest.raises(ValueError, match=r"layers\.0 cannot be visited: closed"):
            ring.visit("layers.0").__enter__()


class StuckReader:
    """Whose reads after the first two take a while and fill nothing. asked: set once such a one was submitted."""

    def __init__(self, reader: Reader) -> None:
        self.asked = threading.Event()
        self._reader = reader
        self._count = 0

    def submit(self, label: str, extents: Sequence[Extent], buffer: Tensor, *, drop_cache: bool = False) -> ReadJob:
        self._count += 1
        if self._count <= 2:
            return self._reader.submit(label, extents, buffer, drop_cache=drop_cache)
        self.asked.set()
        threading.Timer(0.2, (job := ReadJob(1)).finish_piece).start()
        return job


def test_closing_from_another_thread_ends_the_wait_for_a_block(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    ended: list[str] = []

    def run() -> None:
        try:
            walk(ring, blocks, torch.randn(1, 64), 1)
        except ValueError as error:
            ended.append(str(error))

    with Reader(checkpoint) as reader:
        stuck = StuckReader(reader)
        ring = Ring(blocks, plan_for(blocks, whole(blocks) // 2), CpuDevice(), stuck)
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        assert stuck.asked.wait(30)
        ring.close()
        thread.join(30)

    assert not thread.is_alive()
    assert len(ended) == 1
    assert "closed" in ended[0]


def test_closing_inside_a_visit_does_not_hide_the_callers_own_error(
    checkpoint: Checkpoint, blocks: list[Block]
) -> None:
    def visit_and_fail() -> None:
        with ring.visit("layers.0"):
            ring.close()
            raise RuntimeError("the caller's")

    with Reader(checkpoint) as reader, Ring(blocks, plan_for(blocks, whole(blocks) // 2), CpuDevice(), reader) as ring:
        with pytest.raises(RuntimeError, match="the caller's"):
            visit_and_fail()
        with pytest.raises(ValueError, match="cannot be visited: closed"):
            ring.visit("layers.1").__enter__()


class WatchedDevice(CpuDevice):
    """Knows which of its buffers are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[weakref.ref[torch.UntypedStorage]] = []

    def device_buffer(self, nbytes: int) -> Tensor:
        buffer = super().device_buffer(nbytes)
        self.storages.append(weakref.ref(buffer.untyped_storage()))
        return buffer

    @property
    def alive(self) -> int:
        return sum(storage() is not None for storage in self.storages)


def test_closing_lets_go_of_all_memory(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    device, plan = WatchedDevice(), plan_for(blocks, whole(blocks) * 3 // 4)
    with Reader(checkpoint) as reader, Ring(blocks, plan, device, reader) as ring:
        walk(ring, blocks, torch.randn(1, 64), 2)
        held = device.alive

    assert device.alive == 0  # a reader's thread lets go of its last piece a moment after it is told
    assert plan.slots
    assert plan.count(Tier.DEVICE)
    assert held == len(device.storages) == 2  # what stays, and the slots: nothing more, ever


def test_closing_after_an_error_lets_go_of_all_memory(
    checkpoint: Checkpoint, blocks: list[Block], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int, buffers: list, offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    device = WatchedDevice()
    with Reader(checkpoint) as reader:
        monkeypatch.setattr(os, "preadv", fail)
        with Ring(blocks, plan_for(blocks, whole(blocks) // 2), device, reader) as ring:
            try:
                walk(ring, blocks, torch.randn(1, 64), 1)
            except OSError as error:
                message = str(error)

        gc.collect()  # tracebacks lead back to their errors
        assert "block layers.0" in message
        assert device.alive == 0


def test_two_rings_in_one_process_do_not_disturb_each_other(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    x = torch.randn(2, 64)
    plan = plan_for(blocks, whole(blocks) // 2)
    with (
        Reader(checkpoint) as reader,
        Ring(blocks, plan, CpuDevice(), reader, poison=True) as one,
        Ring(blocks, plan, CpuDevice(), reader, poison=True) as two,
    ):
        first = second = x
        for block in blocks * 2:
            with one.visit(block.name) as weights, two.visit(block.name) as others:
                first, second = step(dict(weights), first), step(dict(others), second)

    assert torch.equal(first, second)


def test_a_visit_inside_a_visit_is_refused(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    with (
        Reader(checkpoint) as reader,
        Ring(blocks, plan_for(blocks, whole(blocks)), CpuDevice(), reader) as ring,
        ring.visit("layers.0"),
        pytest.raises(ValueError, match=r"layers\.1 cannot be visited: block layers\.0 is being visited"),
    ):
        ring.visit("layers.1").__enter__()


def test_an_unknown_block_is_named(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    with (
        Reader(checkpoint) as reader,
        Ring(blocks, plan_for(blocks, whole(blocks)), CpuDevice(), reader) as ring,
        pytest.raises(KeyError, match=r"layers\.9"),
    ):
        ring.visit("layers.9").__enter__()


def test_a_budget_below_a_slot_pair_is_refused_before_anything_starts(blocks: list[Block]) -> None:
    with pytest.raises(BudgetError, match="a ring of 2 slots"):
        plan_for(blocks, blocks[-1].nbytes)


def test_buffers_are_aligned_and_of_the_size_asked_for() -> None:
    for nbytes in (0, 1, 255, 10_000):
        buffer = aligned_buffer(nbytes)

        assert buffer.shape == (nbytes,)
        assert nbytes == 0 or buffer.data_ptr() % 4096 == 0


def test_an_accelerator_without_a_staging_ring_is_refused(blocks: list[Block]) -> None:
    device = SimulatedAccelerator()
    plan = replace(plan_for(blocks, whole(blocks) // 2), staging_bytes=0)

    with pytest.raises(ValueError, match="a staging ring of 0 bytes is too small"):
        Ring(blocks, plan, device, SimulatedReader(device))


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_blocks_visited_once_are_prefetched_before_the_rounds_and_skipped_by_them(
    checkpoint: Checkpoint, blocks: list[Block], share: float
) -> None:
    x = torch.randn(2, 64)
    plan = plan_for(blocks, int(whole(blocks) * share))
    with Reader(checkpoint) as reader:
        with Ring(blocks, plan, CpuDevice(), reader) as plain:
            expected = walk(plain, blocks, walk(plain, blocks[2:], walk(plain, blocks, x, 1), 3), 1)
        begun = reader.read_bytes
        with Ring(blocks, plan, CpuDevice(), reader, once=[blocks[0].name, blocks[1].name], poison=True) as ring:
            first = walk(ring, blocks, x, 1)
            rounds = walk(ring, blocks[2:], first, 3)
            seeks = ring.seeks
            again = walk(ring, blocks, rounds, 1)  # visited anew: the courier has to come back

    assert torch.equal(again, expected)
    assert seeks == 0
    assert share == 1.0 or reader.read_bytes > begun


def test_blocks_that_are_all_visited_once_are_read_once(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    names = [block.name for block in blocks]
    with Reader(checkpoint) as reader, Ring(blocks, plan_for(blocks, whole(blocks) // 2), CpuDevice(), reader) as ring:
        expected = walk(ring, blocks, torch.ones(1, 64), 1)
    with (
        Reader(checkpoint) as reader,
        Ring(blocks, plan_for(blocks, whole(blocks) // 2), CpuDevice(), reader, once=names) as ring,
    ):
        found = walk(ring, blocks, torch.ones(1, 64), 1)

        assert reader.read_bytes == sum(block.layout.read_bytes for block in blocks)
        assert torch.equal(walk(ring, blocks, torch.ones(1, 64), 1), found)
    assert torch.equal(found, expected)


def test_the_timeline_tells_reads_waits_and_visits_of_every_block(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    plan = plan_for(blocks, whole(blocks) // 2, slots=2)
    with Reader(checkpoint) as reader, Ring(blocks, plan, CpuDevice(), reader) as ring:
        walk(ring, blocks, torch.randn(1, 64), 2)

    visited = [block.name for block in blocks] * 2
    assert [span.what for span in ring.timeline.lane("compute")] == visited
    assert [span.what for span in ring.timeline.lane("wait")] == visited
    assert {span.what for span in ring.timeline.lane("disk")} == set(visited)
    assert all(span.start <= span.end for span in ring.timeline)
    assert ring.visits == len(visited)
