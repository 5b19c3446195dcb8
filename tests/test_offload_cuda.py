"""The ring on a CudaDevice: on a made-up torch.cuda that computes on the processor, and on a card where there is one.

The made-up card puts off what is queued on a copy stream until somebody is entitled to see it. So a wait
that is missing shows as wrong numbers, always, and not only when the timing is bad.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from offload import Block, Checkpoint, CpuDevice, CudaDevice, PinnedArena, Reader, Ring
from offload.blocks import Extent, Part, TensorSource
from offload.devices import Stream
from offload.reading import ReadJob
from offload.residency import BlockCost, Budget, Rates, ResidencyPlan, Tier, plan_residency
from offload.ring import _Staging, _Visit
from tests.test_offload_pinned import PAGE, FakeDriver

COURIER = "offload-courier"
STAGING = 4 * 4 * PAGE


@dataclass(frozen=True)
class Call:
    """What was asked of the card, by which thread, for which stream."""

    thread: str
    stream: str
    what: str
    subject: Any = None


class FakeEvent:
    def __init__(self, card: "FakeCard", options: dict[str, bool]) -> None:
        self.options = options
        self.point: tuple[FakeStream, int] | None = None
        self.milliseconds = 0.0
        self._card = card

    def synchronize(self) -> None:
        self._card.note("event", "synchronize", self)
        self.reach()

    def query(self) -> bool:
        return self.point is not None and self.point[0].has_done(self.point[1])

    def elapsed_time(self, later: "FakeEvent") -> float:
        return float(np.float32(later.milliseconds - self.milliseconds))

    def reach(self) -> None:
        """Do what is queued up to the recorded point."""
        if self.point is not None:
            stream, count = self.point
            stream.work_up_to(count)


class FakeStream:
    """`is_late`: queued work is done when an event or the host waits for it, else at once."""

    def __init__(self, card: "FakeCard", name: str, *, is_late: bool) -> None:
        self.name = name
        self._card = card
        self._is_late = is_late
        self._queue: deque[Callable[[], object]] = deque()
        self._queued = 0
        self._done = 0

    def queue(self, work: Callable[[], object]) -> None:
        with self._card.lock:
            self._queue.append(work)
            self._queued += 1
            if not self._is_late:
                self.work_up_to(self._queued)

    def work_up_to(self, count: int) -> None:
        with self._card.lock:
            while self._done < count:
                self._done += 1
                self._queue.popleft()()

    def record_event(self, event: FakeEvent) -> None:
        self._card.note(self.name, "record", event)
        event.point = (self, self._queued)
        event.milliseconds = self._card.milliseconds

    def has_done(self, count: int) -> bool:
        return self._done >= count

    def wait_event(self, event: FakeEvent) -> None:
        self._card.note(self.name, "wait", event)
        point = event.point  # as it is now: a later record is another point
        if point is not None:
            stream, count = point
            self.queue(lambda: stream.work_up_to(count))

    def synchronize(self) -> None:
        self._card.note(self.name, "synchronize")
        self.work_up_to(self._queued)


class FakeCard:
    """Stands in for the module torch.cuda. `fail_copy`: the number of the copy that a driver error hits."""

    def __init__(self, *, is_late: bool = True) -> None:
        self.calls: list[Call] = []
        self.lock = threading.RLock()
        self.fail_copy: int | None = None
        self.fail_set_device = False
        self.milliseconds = 0.0
        self.copies = 0
        self._is_late = is_late
        self._streams = 0
        self._default = FakeStream(self, "compute", is_late=False)
        self._local = threading.local()

    def note(self, stream: str, what: str, subject: Any = None) -> None:
        self.calls.append(Call(threading.current_thread().name, stream, what, subject))

    def of(self, what: str, thread: str | None = None) -> list[Call]:
        return [call for call in self.calls if call.what == what and thread in (None, call.thread)]

    # As in torch.cuda

    def current_device(self) -> int:
        return 0

    def set_device(self, device: torch.device) -> None:
        self.note("", "set_device", device)
        if self.fail_set_device:
            raise RuntimeError("CUDA error: invalid device ordinal")

    def Stream(self, *, device: torch.device, priority: int) -> FakeStream:
        self.note("", "new stream", priority)
        self._streams += 1
        return FakeStream(self, f"copy {self._streams}", is_late=self._is_late)

    def Event(self, **options: bool) -> FakeEvent:
        self.note("", "new event", options)
        return FakeEvent(self, options)

    def current_stream(self, device: torch.device) -> FakeStream:
        stream: FakeStream = getattr(self._local, "stream", self._default)
        return stream

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before = self.current_stream(torch.device("cpu"))
        self._local.stream = stream
        try:
            with _QueuesKernels(self, stream):
                yield
        finally:
            self._local.stream = before


class _QueuesKernels(TorchDispatchMode):
    """Puts copies and fills into a stream's queue. Anything but a view is noted."""

    def __init__(self, card: FakeCard, stream: FakeStream) -> None:
        super().__init__()
        self._card = card
        self._stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        what = str(func.overloadpacket).removeprefix("aten.")
        if what not in ("copy_", "fill_"):
            if what != "slice":
                self._card.note(self._stream.name, what)
            return func(*args, **(kwargs or {}))
        self._card.note(self._stream.name, what, args)
        if what == "copy_":
            self._card.copies += 1
            if self._card.copies == self._card.fail_copy:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self._stream.queue(lambda: func(*args, **(kwargs or {})))
        return args[0]


class _Notes(TorchDispatchMode):
    """Keeps the names of all operators of the calling thread."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


pytestmark = pytest.mark.usefixtures("no_thread_is_left")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Seven blocks, the first of twice the size, each with a BF16 scale that is cast on the device."""
    tensors: dict[str, Tensor] = {}
    for index in range(7):
        width = 512 if index < 1 else 256
        tensors[f"{index}.weight"] = torch.randint(-128, 128, (64, width), dtype=torch.int8)
        tensors[f"{index}.scale"] = torch.rand(64, 1).bfloat16()
        tensors[f"{index}.bias"] = torch.randn(67)
    save_file(tensors, tmp_path / "model.safetensors")
    return Checkpoint.open(tmp_path / "model.safetensors")


@pytest.fixture
def blocks(checkpoint: Checkpoint) -> list[Block]:
    made = []
    for index in range(7):
        weight, scale, bias = (checkpoint.tensors[f"{index}.{name}"] for name in ("weight", "scale", "bias"))
        cast = TensorSource("scale", (64, 1), torch.float32, (Part(scale, (64, 1)),))
        made.append(Block(f"{index}", (TensorSource.plain(weight, "weight"), cast, TensorSource.plain(bias, "bias"))))
    return made


def plan_for(blocks: Sequence[Block], kind: str) -> ResidencyPlan:
    """A plan in which the named tiers occur; "all" has all four."""
    block = blocks[-1].nbytes
    costs = [BlockCost(block.name, block.nbytes, 1e-6) for block in blocks]
    budget = {
        "disk": Budget(2 * block, host=STAGING, staging=STAGING),
        "pinned": Budget(2 * block, host=STAGING + 99 * block, pinned=STAGING + 99 * block, staging=STAGING),
        "all": Budget(5 * block, host=STAGING + 3 * block, pinned=STAGING + 2 * block, staging=STAGING),
        "resident": Budget(99 * block, host=STAGING, staging=STAGING),
    }[kind]
    plan = plan_residency(costs, Rates(disk=1e9, cached=5e9, link=1e9), budget)
    expected = {"disk": {Tier.DISK}, "pinned": {Tier.PINNED}, "all": set(Tier), "resident": {Tier.DEVICE}}[kind]
    assert set(plan.tiers.values()) == expected
    return plan


def device_on(card: FakeCard, driver: FakeDriver | None = None, **options: Any) -> CudaDevice:
    arena = PinnedArena((driver or FakeDriver()).registration, limit=1 << 30, floor=PAGE)
    return CudaDevice("cpu", runtime=card, arena=arena, **options)


def step(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """A layer of sorts, (rows, 64) -> (rows, 64), that any wrong byte disturbs."""
    hidden = (weights["weight"].float() * weights["scale"]) @ torch.arange(weights["weight"].shape[1]).to(x)
    return torch.tanh(x + hidden / 1000 + weights["bias"].sum())


def walk(ring: Ring, blocks: Sequence[Block], x: Tensor, steps: int = 3) -> Tensor:
    for _ in range(steps):
        for block in blocks:
            with ring.visit(block.name) as weights:
                x = step(dict(weights), x)
    return x


def resident(checkpoint: Checkpoint, blocks: Sequence[Block], x: Tensor, steps: int = 3) -> Tensor:
    """The same with all weights read the plain way."""
    for index in list(range(len(blocks))) * steps:
        names = ("weight", "scale", "bias")
        weights = {name: checkpoint.tensor(f"{index}.{name}").clone().to(x.device) for name in names}
        x = step(weights | {"scale": weights["scale"].float()}, x)
    return x


def streamed(
    checkpoint: Checkpoint,
    blocks: Sequence[Block],
    device: CudaDevice,
    kind: str,
    x: Tensor,
    ring_type: type[Ring] = Ring,
) -> Tensor:
    plan = plan_for(blocks, kind)
    with Reader(checkpoint, piece_bytes=4096) as reader, ring_type(blocks, plan, device, reader, poison=True) as ring:
        return walk(ring, blocks, x)


class NotingReader(Reader):
    """Notes the blocks it is asked for, and whether they may be dropped from the page cache."""

    def submit(self, label: str, extents: Sequence[Extent], buffer: Tensor, *, drop_cache: bool = False) -> ReadJob:
        self.asked: set[tuple[str, bool]] = getattr(self, "asked", set()) | {(label, drop_cache)}
        return super().submit(label, extents, buffer, drop_cache=drop_cache)


def test_blocks_that_stay_in_the_page_cache_have_a_reader_of_their_own(
    checkpoint: Checkpoint, blocks: list[Block]
) -> None:
    plan, x = plan_for(blocks, "all"), torch.randn(3, 64)
    with (
        NotingReader(checkpoint) as reader,
        NotingReader(checkpoint) as cached,
        Ring(blocks, plan, device_on(FakeCard()), reader, cached_reader=cached) as ring,
    ):
        got = walk(ring, blocks, x)

    assert torch.equal(got, resident(checkpoint, blocks, x))
    assert cached.asked == {(name, False) for name, tier in plan.tiers.items() if tier is Tier.CACHED}
    assert reader.asked == {(name, True) for name, tier in plan.tiers.items() if tier is not Tier.CACHED}


@pytest.mark.parametrize("is_late", [True, False], ids=["late", "at once"])
@pytest.mark.parametrize("kind", ["disk", "pinned", "all", "resident"])
def test_streamed_equals_resident_bit_for_bit_however_late_copies_are(
    checkpoint: Checkpoint, blocks: list[Block], kind: str, is_late: bool
) -> None:
    x = torch.randn(3, 64)
    driver = FakeDriver()
    device = device_on(FakeCard(is_late=is_late), driver)

    got = streamed(checkpoint, blocks, device, kind, x)

    expected = resident(checkpoint, blocks, x)
    assert expected.isfinite().all()
    assert torch.equal(got, expected)
    assert device.fallbacks == []
    device.close()
    assert driver.registered == {}


class NoWaitForReady(Ring):
    def _await_ready(self, visit: _Visit, compute: Stream) -> None:
        pass


class StagingRefilledBeforeItsCopy(Ring):
    def _await_refill(self, staging: _Staging) -> None:
        pass


@pytest.mark.parametrize("fault", [NoWaitForReady, StagingRefilledBeforeItsCopy])
def test_a_missing_wait_shows_as_wrong_numbers(checkpoint: Checkpoint, blocks: list[Block], fault: type[Ring]) -> None:
    """The test above can fail: this is what it would see."""
    x = torch.randn(3, 64)

    got = streamed(checkpoint, blocks, device_on(FakeCard()), "disk", x, fault)

    assert not torch.equal(got, resident(checkpoint, blocks, x))


def test_copies_are_queued_by_the_courier_on_its_stream_and_never_wait(
    checkpoint: Checkpoint, blocks: list[Block]
) -> None:
    card = FakeCard()

    streamed(checkpoint, blocks, device_on(card), "all", torch.randn(1, 64))

    copies = card.of("copy_")
    assert len(copies) > 20
    assert {(call.thread, call.stream) for call in copies} == {(COURIER, "copy 1")}
    assert all(call.subject[2:] == (True,) for call in copies), "non_blocking"
    assert {(call.thread, call.stream) for call in card.of("fill_")} == {("MainThread", "compute")}
    assert [call.subject for call in card.of("new stream")] == [-1]


def test_the_steady_state_allocates_nothing_and_the_compute_thread_waits_for_no_copy(
    checkpoint: Checkpoint, blocks: list[Block]
) -> None:
    card = FakeCard(is_late=False)  # so that no thread does another's work
    device = device_on(card)
    with Reader(checkpoint) as reader, Ring(blocks, plan_for(blocks, "all"), device, reader) as ring:
        walk(ring, blocks, torch.randn(1, 64), steps=2)
        events = len(card.of("new event"))
        with _Notes() as notes:
            for block in blocks * 2:
                with ring.visit(block.name):
                    pass

        assert notes.names == []
        assert len(card.of("new event")) == events
        assert card.of("synchronize", "MainThread") == []
        assert {call.what for call in card.calls if call.thread == COURIER} <= {
            *("set_device", "copy_", "record", "wait", "synchronize"),
            *("view", "expand"),  # once per block and slot, no memory
        }
        # Two waits are the courier's right: for a staging buffer to come free, and at its own end.
        assert {call.stream for call in card.of("synchronize", COURIER)} == {"event"}


def test_copied_bytes_are_what_crossed_the_link(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    card = FakeCard()
    device = device_on(card)
    with Reader(checkpoint) as reader, Ring(blocks, plan_for(blocks, "pinned"), device, reader) as ring:
        walk(ring, blocks, torch.randn(1, 64))
        ring.close()

        crossed = [call.subject[1].nbytes for call in card.of("copy_") if call.subject[0].dtype == torch.uint8]
        assert ring.copied_bytes == sum(crossed) >= 3 * sum(block.nbytes for block in blocks)


def test_a_new_buffer_is_not_written_before_the_compute_that_had_its_memory_is_done() -> None:
    card = FakeCard()
    device = device_on(card)
    stream = device.new_stream("copy")
    card.calls.clear()

    device.device_buffer(100)

    _, record, wait = card.calls
    assert (record.stream, record.what, wait.stream, wait.what) == ("compute", "record", "copy 1", "wait")
    assert record.subject is wait.subject
    del stream  # held until here: streams that nobody holds are forgotten


def test_a_new_stream_is_ordered_after_the_compute_for_buffers_that_are_there_already() -> None:
    card = FakeCard()

    device_on(card).new_stream("copy")

    assert [(call.stream, call.what) for call in card.calls[-2:]] == [("compute", "record"), ("copy 1", "wait")]


@pytest.mark.parametrize("nbytes", [0, 1, 1000, 256 * 37])
def test_device_buffers_are_aligned_whatever_the_allocator(nbytes: int) -> None:
    device = device_on(FakeCard())

    for _ in range(5):
        buffer = device.device_buffer(nbytes)
        assert buffer.shape == (nbytes,)
        assert nbytes == 0 or buffer.data_ptr() % 256 == 0


def test_the_courier_takes_the_device_for_its_thread_before_anything_else(
    checkpoint: Checkpoint, blocks: list[Block]
) -> None:
    card = FakeCard()

    streamed(checkpoint, blocks, device_on(card), "disk", torch.randn(1, 64))

    first = next(call for call in card.calls if call.thread == COURIER)
    assert (first.what, first.subject) == ("set_device", torch.device("cpu", 0))


def test_a_courier_that_cannot_take_the_device_leaves_no_caller_waiting(
    checkpoint: Checkpoint, blocks: list[Block]
) -> None:
    card = FakeCard()
    card.fail_set_device = True
    card.fail_copy = 1

    with pytest.raises(RuntimeError, match="illegal memory access"):
        streamed(checkpoint, blocks, device_on(card), "disk", torch.randn(1, 64))


@pytest.mark.parametrize("number", [1, 5, 30])
def test_an_error_of_the_driver_reaches_the_caller_and_the_next_visit_starts_afresh(
    checkpoint: Checkpoint, blocks: list[Block], number: int
) -> None:
    card = FakeCard()
    card.fail_copy = number
    x = torch.randn(2, 64)
    with Reader(checkpoint) as reader, Ring(blocks, plan_for(blocks, "all"), device_on(card), reader) as ring:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            walk(ring, blocks, x)
        after = walk(ring, blocks, x)

    assert torch.equal(after, resident(checkpoint, blocks, x))


@pytest.mark.parametrize("kind", ["disk", "all"])
def test_without_any_pinned_memory_the_result_is_the_same_and_the_reason_is_told(
    checkpoint: Checkpoint, blocks: list[Block], kind: str
) -> None:
    x = torch.randn(2, 64)
    card = FakeCard()
    device = device_on(card, FakeDriver(wall=0))

    got = streamed(checkpoint, blocks, device, kind, x)

    crossed = [call.subject[1].nbytes for call in card.of("copy_") if call.subject[0].dtype == torch.uint8]
    assert torch.equal(got, resident(checkpoint, blocks, x))
    assert device.pageable_bytes == sum(crossed)
    assert device.pageable_copies == len(crossed)
    assert "out of memory (2)" in device.fallbacks[0]
    assert device.fallbacks[-1].startswith(f"{len(crossed)} copies (")
    assert device.fallbacks[-1].endswith(" came from pageable memory and blocked the courier")


@pytest.mark.parametrize("wall", [1, 5, 6, 9, 13])
def test_no_copy_crosses_the_edge_of_what_is_pinned(checkpoint: Checkpoint, blocks: list[Block], wall: int) -> None:
    """The driver refuses a copy whose source is half registered."""
    x = torch.randn(2, 64)
    card = FakeCard()
    driver = FakeDriver(wall=wall * PAGE)
    device = device_on(card, driver)

    with Reader(checkpoint) as reader, Ring(blocks, plan_for(blocks, "all"), device, reader, poison=True) as ring:
        got = walk(ring, blocks, x)

    # The notes keep the memory, and with it its registrations.
    sources = [call.subject[1] for call in card.of("copy_") if call.subject[0].dtype == torch.uint8]
    ends = [(source.data_ptr(), source.data_ptr() + source.nbytes - 1) for source in sources]
    pinned = [(driver.is_registered(first), driver.is_registered(last)) for first, last in ends]

    assert torch.equal(got, resident(checkpoint, blocks, x))
    assert {first is last for first, last in pinned} == {True}
    assert 0 < device.pageable_bytes < sum(source.nbytes for source in sources)
    assert device.pageable_bytes == sum(source.nbytes for source, at in zip(sources, pinned, strict=True) if not at[0])


def test_a_copy_from_memory_of_unknown_origin_is_counted_unless_it_is_pinned() -> None:
    """A device of type cuda without a card: only the decision is asked for, nothing is copied."""
    device = CudaDevice("cuda:0", runtime=FakeCard(), arena=PinnedArena(FakeDriver().registration, limit=0))
    source = torch.zeros(1000, dtype=torch.uint8)

    parts = list(device.transfers(torch.empty(1000, dtype=torch.uint8), source))

    assert len(parts) == 1
    assert (device.pageable_copies, device.pageable_bytes) == (1, 1000)


def test_a_ring_made_in_inference_mode_works(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    x = torch.randn(2, 64)
    with torch.inference_mode():
        got = streamed(checkpoint, blocks, device_on(FakeCard()), "all", x)

        assert torch.equal(got, resident(checkpoint, blocks, x))


def test_closing_a_ring_gives_its_pinned_memory_back_while_the_device_lives_on(
    checkpoint: Checkpoint, blocks: list[Block]
) -> None:
    card, driver = FakeCard(is_late=False), FakeDriver()
    device = device_on(card, driver)
    with Reader(checkpoint) as reader, Ring(blocks, plan_for(blocks, "pinned"), device, reader) as ring:
        walk(ring, blocks, torch.randn(1, 64))
        held = driver.total
        assert held == device.pinned_bytes >= STAGING + sum(block.nbytes for block in blocks)
        ring.close()
        del ring
        card.calls.clear()  # its notes hold tensors

    assert driver.registered == {}


def test_two_rings_on_one_device_do_not_disturb_each_other(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    device = device_on(FakeCard())
    x = torch.randn(2, 64)
    with (
        Reader(checkpoint) as reader,
        Ring(blocks, plan_for(blocks, "disk"), device, reader, poison=True) as one,
        Ring(blocks, plan_for(blocks, "all"), device, reader, poison=True) as two,
    ):
        first = second = x
        for block in blocks * 2:
            with one.visit(block.name) as weights, two.visit(block.name) as others:
                first, second = step(dict(weights), first), step(dict(others), second)

    assert torch.equal(first, second)
    assert torch.equal(first, resident(checkpoint, blocks, x, steps=2))


def test_events_let_the_host_sleep_and_take_no_time() -> None:
    card = FakeCard()

    device_on(card, timing=True).new_event()

    assert card.calls[-1].subject == {"blocking": True}


def test_visits_are_timed_on_the_card_and_the_steady_state_makes_no_event(
    checkpoint: Checkpoint, blocks: list[Block]
) -> None:
    card = FakeCard()
    events = []
    with (
        Reader(checkpoint) as reader,
        Ring(blocks, plan_for(blocks, "disk"), device_on(card, timing=True), reader) as ring,
    ):
        card.milliseconds += 12 * 3.6e6  # a long run: as float32, hours leave four milliseconds
        for step in range(3):
            for block in blocks:
                with ring.visit(block.name):
                    card.milliseconds += 4.0 if step == 2 else 1.0
            events.append(len(card.of("new event")))

    computed = ring.timeline.lane("device compute")
    assert [span.what for span in computed] == [block.name for block in blocks] * 3
    assert [span.seconds for span in computed] == pytest.approx([1e-3] * 14 + [4e-3] * 7)
    assert sum(span.seconds for span in ring.timeline.lane("device wait")) == pytest.approx(0.0, abs=1e-9)
    assert events[1] == events[2]


def test_without_timing_a_card_tells_what_the_host_saw(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    plan = plan_for(blocks, "disk")
    with (
        Reader(checkpoint) as reader,
        Ring(blocks, plan, device_on(FakeCard()), reader) as ring,
        ring.visit(blocks[0].name),
    ):
        pass

    assert {span.lane for span in ring.timeline} == {"disk", "wait", "compute"}


def test_another_kind_of_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be of type cuda, got cpu; use CpuDevice"):
        CudaDevice("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_card_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"there is no device cuda here, only 0 of type cuda; use cpu"):
        CudaDevice()


needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: runs on its real streams")


@pytest.mark.cuda  # real streams, events and copies
@needs_card
@pytest.mark.parametrize("kind", ["disk", "pinned", "all", "resident"])
def test_on_a_card_streamed_equals_resident_bit_for_bit_with_poisoned_slots(
    checkpoint: Checkpoint, blocks: list[Block], kind: str
) -> None:
    x = torch.randn(3, 64, device="cuda")
    device = CudaDevice()

    got = streamed(checkpoint, blocks, device, kind, x)

    expected = resident(checkpoint, blocks, x)
    assert expected.isfinite().all()
    assert torch.equal(got, expected)
    assert device.fallbacks == []
    device.close()


@pytest.mark.cuda  # real streams, and kernels that take their time
@needs_card
def test_on_a_card_slow_compute_is_not_overtaken_by_copies(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    x = torch.randn(3, 64, device="cuda")
    device = CudaDevice()
    with (
        Reader(checkpoint) as reader,
        Ring(blocks, plan_for(blocks, "disk"), device, reader, poison=True) as ring,
    ):
        got = x
        for block in blocks * 3:
            with ring.visit(block.name) as weights:
                torch.cuda._sleep(20_000_000)
                got = step(dict(weights), got)

    assert torch.equal(got, resident(checkpoint, blocks, x))
    device.close()


@pytest.mark.cuda  # asks torch's allocator
@needs_card
def test_on_a_card_the_ring_takes_the_device_bytes_of_its_plan_and_gives_them_back(
    checkpoint: Checkpoint, blocks: list[Block]
) -> None:
    plan = plan_for(blocks, "all")
    device = CudaDevice()
    before = torch.cuda.memory_allocated()
    with Reader(checkpoint) as reader, Ring(blocks, plan, device, reader) as ring:
        held = torch.cuda.memory_allocated() - before
        for block in blocks * 3:
            with ring.visit(block.name):
                pass
        peak = torch.cuda.memory_allocated() - before

    # The allocator counts in steps of 512 bytes, and there are two allocations.
    assert plan.device_bytes <= held <= plan.device_bytes + 2 * 512
    assert peak == held
    assert torch.cuda.memory_allocated() == before
    device.close()


@pytest.mark.cuda  # is a copy from pageable memory
@needs_card
def test_on_a_card_without_pinned_memory_the_result_is_the_same(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    x = torch.randn(2, 64, device="cuda")
    device = CudaDevice(pin_limit=5 * PAGE)

    got = streamed(checkpoint, blocks, device, "all", x)

    assert torch.equal(got, resident(checkpoint, blocks, x))
    assert device.pageable_bytes > 0
    assert device.fallbacks != []
    device.close()


def test_the_processor_agrees_with_the_made_up_card(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    x = torch.randn(2, 64)
    with Reader(checkpoint) as reader, Ring(blocks, plan_for(blocks, "all"), CpuDevice(), reader) as ring:
        on_processor = walk(ring, blocks, x)

    assert torch.equal(on_processor, streamed(checkpoint, blocks, device_on(FakeCard()), "all", x))


def test_closing_waits_for_the_card_before_memory_goes(checkpoint: Checkpoint, blocks: list[Block]) -> None:
    """For copies that the courier queued, and for what was computed on the last block."""
    card = FakeCard()
    with Reader(checkpoint) as reader:
        ring = Ring(blocks, plan_for(blocks, "disk"), device_on(card), reader)
        with ring.visit(blocks[0].name):
            pass
        card.calls.clear()
        ring.close()

    assert [call.stream for call in card.of("synchronize", COURIER)][-1:] == ["copy 1"]
    assert [call.stream for call in card.of("synchronize", "MainThread")][-1:] == ["compute"]
