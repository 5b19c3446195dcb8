"""The ring on the simulated accelerator, at full model size: no hazard as it is, one for every wait taken out."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offload import Block, TensorInfo
from offload.blocks import Part, TensorSource
from offload.devices import Stream, Wait
from offload.residency import BlockCost, Budget, Rates, ResidencyPlan, Tier, plan_residency
from offload.ring import Job, Ring, _Staging, _Transfer, _Visit
from offload.simulator import SimulatedAccelerator, SimulatedReader

LINK, DISK = 12e9, 3e9
STAGING = 128 << 20
GIB = 1 << 30
# Seconds of compute per byte of weights, as a multiple of what the disk takes for it.
REGIMES = {"disk-bound": 0.1, "balanced": 1.0, "compute-bound": 3.0}


def tensor_sources(
    dtype: str, dim: int = 3840, hidden: int = 10_240
) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """(name, dtype, shape, parts) of a transformer block of the published model; parts > 1: split in the file."""
    linears = {"qkv": (3 * dim, dim), "out": (dim, dim), "w1": (hidden, dim), "w2": (dim, hidden), "w3": (hidden, dim)}
    for name, shape in (linears | {"adaln": (4 * dim, 256)}).items():
        yield f"{name}.weight", dtype, shape, 3 if name == "qkv" else 1
        if dtype == "I8":
            # The split scales are BF16 here, so that some tensors have to be cast.
            yield f"{name}.weight_scale", "BF16" if name == "qkv" else "F32", (shape[0], 1), 3 if name == "qkv" else 1
    for name in ("norm1", "norm2", "norm3", "norm4"):
        yield name, "BF16", (dim,), 1
    yield "adaln.bias", "BF16", (4 * dim,), 1


@cache
def published_blocks() -> tuple[Block, ...]:
    """34 blocks: two noise and two context refiners in BF16, 30 layers in INT8; 7 GB of file that is not there."""
    offset, blocks = 100_000, []
    names = [f"noise.{i}" for i in range(2)] + [f"context.{i}" for i in range(2)] + [f"layers.{i}" for i in range(30)]
    for name in names:
        sources = []
        for leaf, dtype, shape, parts in tensor_sources("I8" if name.startswith("layers") else "BF16"):
            placed = []
            for index in range(parts):
                info = TensorInfo(
                    f"{name}.{leaf}.{index}", dtype, (shape[0] // parts, *shape[1:]), Path("model"), offset, 0
                )
                nbytes = torch.Size(info.shape).numel() * info.torch_dtype.itemsize
                info = TensorInfo(info.name, dtype, info.shape, info.path, offset, nbytes)
                offset += nbytes
                placed.append(Part(info, info.shape))
            kind = torch.float32 if leaf.endswith("scale") else placed[0].tensor.torch_dtype
            sources.append(TensorSource(leaf, shape, kind, tuple(placed)))
        blocks.append(Block(name, tuple(sources)))
    return tuple(blocks)


def plan_of(kind: str, seconds_per_byte: float) -> ResidencyPlan:
    costs = [BlockCost(block.name, block.nbytes, block.nbytes * seconds_per_byte) for block in published_blocks()]
    layer = costs[-1].nbytes
    budget = {
        "disk": Budget(3 * layer, host=STAGING, staging=STAGING),
        "ample": Budget(GIB, host=STAGING, staging=STAGING),
        "tight": Budget(2 * layer, host=STAGING, staging=STAGING),
        "mixed": Budget(3 * GIB, host=3 * GIB, pinned=GIB, staging=STAGING),
        "pinned": Budget(GIB, host=8 * GIB, pinned=8 * GIB, staging=STAGING),
        "resident": Budget(8 * GIB, host=STAGING, staging=STAGING),
    }[kind]
    return plan_residency(costs, Rates(disk=DISK, cached=8e9, link=LINK), budget)


def run(
    ring_type: type[Ring],
    plan: ResidencyPlan,
    seconds_per_byte: float,
    *,
    steps: int = 2,
    device: SimulatedAccelerator | None = None,
) -> SimulatedAccelerator:
    """`steps` rounds over all blocks; every tensor of a block is read by its kernel."""
    device = device or SimulatedAccelerator(link_rate=LINK, disk_rate=DISK)
    with ring_type(published_blocks(), plan, device, SimulatedReader(device)) as ring:
        for _ in range(steps):
            for block in published_blocks():
                with ring.visit(block.name) as weights:
                    seconds = block.nbytes * seconds_per_byte
                    device.compute(block.name, seconds, reads=tuple(weights.values()))
    return device


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("kind", ["disk", "tight", "ample", "mixed", "pinned", "resident"])
def test_the_ring_has_no_hazard_at_full_size(kind: str, regime: str) -> None:
    rate = REGIMES[regime] / DISK

    device = run(Ring, plan_of(kind, rate), rate)

    assert device.hazards == []


# Each of these takes one ordering out, or puts it in the wrong place.


class NoWaitForReady(Ring):
    def _await_ready(self, visit: _Visit, compute: Stream) -> None:
        pass


class ReadyRecordedBeforeTheCopy(Ring):
    def _claim(self, visit: _Visit) -> Iterator[Wait]:
        yield from super()._claim(visit)
        self._copies.record(visit.ready)

    def _record_ready(self, visit: _Visit) -> None:
        pass


class ReadyNeverRecorded(Ring):
    def _record_ready(self, visit: _Visit) -> None:
        pass


class ReadyOfAnotherSlot(Ring):
    def _await_ready(self, visit: _Visit, compute: Stream) -> None:
        compute.wait(self._slots[visit.slots[0] - 1].ready)


class SlotRefilledInUse(Ring):
    def _await_free(self, slot: int) -> None:
        pass


class FreeOfAnotherSlot(Ring):
    def _await_free(self, slot: int) -> None:
        self._copies.wait(self._slots[slot - 1].free)


class FreeRecordedBeforeTheCompute(Ring):
    def _await_ready(self, visit: _Visit, compute: Stream) -> None:
        super()._await_ready(visit, compute)
        for slot in visit.slots:
            compute.record(self._slots[slot].free)

    def _record_free(self, slot: int, compute: Stream) -> None:
        pass


class FreeForgottenAtTheWrapAround(Ring):
    def _claim(self, visit: _Visit) -> Iterator[Wait]:
        self._first_of_round = visit.index == 0
        yield from super()._claim(visit)

    def _await_free(self, slot: int) -> None:
        if not self._first_of_round:
            super()._await_free(slot)


class OnlyTheFirstSlotOfALargeBlockFreed(Ring):
    def _claim(self, visit: _Visit) -> Iterator[Wait]:
        self._first_slot = visit.slots[0]
        yield from super()._claim(visit)

    def _await_free(self, slot: int) -> None:
        if slot == self._first_slot:
            super()._await_free(slot)


class StagingRefilledBeforeItsCopy(Ring):
    def _await_refill(self, staging: _Staging) -> None:
        pass


class CopiedRecordedBeforeTheCopy(Ring):
    def _begin(self, transfer: _Transfer) -> None:
        super()._begin(transfer)
        if transfer.staging is not None:
            self._copies.record(transfer.staging.copied)

    def _record_copied(self, staging: _Staging) -> None:
        pass


class CopyBeforeItsRead(Ring):
    def _await_read(self, job: Job) -> None:
        pass


class TemporaryFreedAcrossStreams(Ring):
    """Scratch memory of the copy stream, read by the compute and given back at once."""

    def _finish(self, visit: _Visit) -> None:
        temporary = self._device.temporary(1 << 20, self._copies)  # type: ignore[attr-defined]
        self._copies.fill(temporary, 0)
        vars(self).setdefault("temporaries", {})[visit.number] = temporary
        super()._finish(visit)

    def _release(self, visit: _Visit, compute: Stream) -> None:
        temporary: Tensor = vars(self)["temporaries"].pop(visit.number)
        self._device.compute("use", 1e-3, reads=[temporary])  # type: ignore[attr-defined]
        self._device.free(temporary)  # type: ignore[attr-defined]
        super()._release(visit, compute)


FAULTS = {
    NoWaitForReady: "race",
    ReadyRecordedBeforeTheCopy: "race",
    ReadyNeverRecorded: "wait for nothing",
    ReadyOfAnotherSlot: "race",
    SlotRefilledInUse: "race",
    FreeOfAnotherSlot: "race",
    FreeRecordedBeforeTheCompute: "race",
    FreeForgottenAtTheWrapAround: "race",
    OnlyTheFirstSlotOfALargeBlockFreed: "race",
    StagingRefilledBeforeItsCopy: "race",
    CopiedRecordedBeforeTheCopy: "race",
    CopyBeforeItsRead: "race",
    TemporaryFreedAcrossStreams: "freed in use",
}


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_every_injected_fault_is_reported_whatever_the_timing(fault: type[Ring], regime: str) -> None:
    rate = REGIMES[regime] / DISK

    device = run(fault, plan_of("tight" if "Large" in fault.__name__ else "disk", rate), rate)

    assert FAULTS[fault] in {hazard.kind for hazard in device.hazards}


def test_a_copy_from_unpinned_memory_is_reported() -> None:
    class Pageable(SimulatedAccelerator):
        def pinned_buffer(self, nbytes: int) -> Tensor:
            return torch.empty(nbytes, dtype=torch.uint8, device="meta")

    device = run(Ring, plan_of("disk", 1 / DISK), 1 / DISK, steps=1, device=Pageable())

    assert {hazard.kind for hazard in device.hazards} == {"unpinned copy"}


def test_a_hazard_names_both_sides_and_their_bytes() -> None:
    device = run(SlotRefilledInUse, plan_of("disk", 1 / DISK), 1 / DISK, steps=1)

    message = device.hazards[0].message
    assert message.startswith("copy on stream copy, which writes bytes ")
    assert "of device buffer 2, not ordered after noise.0 on stream compute, which reads bytes " in message


def test_reports_are_the_same_every_time() -> None:
    rate = 1 / DISK
    one, two = (run(SlotRefilledInUse, plan_of("disk", rate), rate, steps=2) for _ in range(2))

    assert one.hazards == two.hazards
    assert one.spans == two.spans


@pytest.mark.parametrize("factor", [0.9, 1.1, 3.0])
def test_a_run_takes_hardly_longer_than_the_slower_of_disk_and_compute(factor: float) -> None:
    """Over 4 steps, from an empty ring on: at most 3 % above max(reading, computing) with an ideal pipeline."""
    layers = published_blocks()[4:] + published_blocks()[4:8]
    layers = tuple(Block(f"{index}.{block.name}", block.sources) for index, block in enumerate(layers))
    seconds = factor * layers[0].nbytes / DISK
    costs = [BlockCost(block.name, block.nbytes, seconds) for block in layers]
    plan = plan_residency(costs, Rates(DISK, 8e9, LINK), Budget(3 * layers[0].nbytes, host=STAGING, staging=STAGING))
    device = SimulatedAccelerator(link_rate=LINK, disk_rate=DISK)

    with Ring(layers, plan, device, SimulatedReader(device)) as ring:
        for _ in range(4):
            for block in layers:
                with ring.visit(block.name) as weights:
                    device.compute(block.name, seconds, reads=tuple(weights.values()))

    compute = [span for span in device.spans if span.lane == "compute"]
    reading = sum(block.layout.read_bytes for block in layers) / DISK
    first, last = layers[0].layout.read_bytes / DISK, seconds
    ideal = max(first + 4 * len(layers) * seconds, 4 * reading + last)
    assert len(layers) == 34
    assert compute[-1].end / ideal <= 1.03
    assert plan.count(Tier.DISK) == 34


def test_the_published_model_keeps_the_compute_busy_despite_its_large_blocks() -> None:
    rate = 1.1 / DISK
    plan = plan_of("ample", rate)

    device = run(Ring, plan, rate, steps=4)

    busy = sum(span.end - span.start for span in device.spans if span.lane == "compute")
    assert device.stall_seconds <= 0.03 * busy


@pytest.mark.parametrize("kind", ["disk", "ample", "pinned", "resident"])
def test_the_planner_predicts_the_stall_of_the_simulated_run(kind: str) -> None:
    rate = 0.5 / DISK
    plan = plan_of(kind, rate)
    device = SimulatedAccelerator(link_rate=LINK, disk_rate=DISK)
    reader = SimulatedReader(device)

    stalls = []
    with Ring(published_blocks(), plan, device, reader) as ring:
        for _ in range(4):
            before = device.stall_seconds
            for block in published_blocks():
                with ring.visit(block.name) as weights:
                    device.compute(block.name, block.nbytes * rate, reads=tuple(weights.values()))
            stalls.append(device.stall_seconds - before)

    assert stalls[-1] == pytest.approx(plan.stall_seconds, rel=0.05, abs=0.02)


def test_the_steady_state_allocates_nothing_and_never_makes_the_caller_wait_for_the_device() -> None:
    device = SimulatedAccelerator(link_rate=LINK, disk_rate=DISK)
    plan = plan_of("disk", 1 / DISK)
    with Ring(published_blocks(), plan, device, SimulatedReader(device)) as ring:
        allocated = device.allocations
        for _ in range(3):
            for block in published_blocks():
                with ring.visit(block.name) as weights:
                    device.compute(block.name, 0.05, reads=tuple(weights.values()))

        assert device.allocations == allocated == 2  # the slots and the staging ring
        assert device.host_syncs.get("caller", 0) == 0
        assert ring.seeks == 0


def test_streamed_bytes_are_read_once_a_step() -> None:
    device = SimulatedAccelerator()
    reader = SimulatedReader(device)
    model_bytes = sum(block.layout.read_bytes for block in published_blocks())
    largest = 3 * max(block.layout.read_bytes for block in published_blocks())

    with Ring(published_blocks(), plan_of("disk", 1 / DISK), device, reader) as ring:
        for _ in range(3):
            for block in published_blocks():
                with ring.visit(block.name):
                    pass

    assert 3 * model_bytes <= reader.read_bytes <= 3 * model_bytes + largest


def test_pinned_and_resident_blocks_are_read_once_for_all_steps() -> None:
    model_bytes = sum(block.layout.read_bytes for block in published_blocks())
    for kind in ("pinned", "resident"):
        device = SimulatedAccelerator()
        reader = SimulatedReader(device)
        with Ring(published_blocks(), plan_of(kind, 0.1 / DISK), device, reader) as ring:
            for _ in range(3):
                for block in published_blocks():
                    with ring.visit(block.name):
                        pass

        assert reader.read_bytes == model_bytes, kind


def test_seeks_cancels_and_exceptions_leave_no_hazard_behind() -> None:
    device = SimulatedAccelerator(link_rate=LINK, disk_rate=DISK)
    blocks = published_blocks()
    with Ring(blocks, plan_of("mixed", 1 / DISK), device, SimulatedReader(device)) as ring:
        for first, last in ((0, 7), (3, 20), (20, 34), (0, 34), (33, 34), (5, 6), (0, 34)):
            for block in blocks[first:last]:
                with ring.visit(block.name) as weights:
                    device.compute(block.name, 0.05, reads=tuple(weights.values()))
        with pytest.raises(ZeroDivisionError), ring.visit("layers.7") as weights:
            device.compute("half a block", 1 / 0, reads=tuple(weights.values()))
        for block in blocks:
            with ring.visit(block.name) as weights:
                device.compute(block.name, 0.05, reads=tuple(weights.values()))

        assert ring.seeks >= 4
    assert device.hazards == []
