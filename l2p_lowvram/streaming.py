"""A model's weights within a budget: which blocks stay, which stream, and who brings them.

The modules are on the meta device; `WeightStream.visit` lends them the weights of one block at a time. Where
these come from is decided per phase (text encoder, denoising) from block sizes and budgets alone:

    CPU, CUDA          a ring of slots filled by parallel reads, blocks that fit staying for the run
    CPU, io "mmap"     the mapped file itself, within the same plan: its pages brought ahead and let go of
    other devices      the mapped file, copied block by block; there is no ring for them yet
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from offload import (
    Block,
    BlockCost,
    BlockSource,
    Budget,
    BudgetError,
    Checkpoint,
    CpuDevice,
    Extent,
    IoProbe,
    MappedBlocks,
    OwnedDevice,
    PagedBlocks,
    Rates,
    Reader,
    ResidencyPlan,
    Ring,
    TensorSource,
    Tier,
    available_device_bytes,
    available_host_bytes,
    format_bytes,
    plan_residency,
    probe_io,
    process_memory,
)
from offload.devices import aligned_buffer
from offload.mapped import read_source
from offload.memory import return_freed_memory, trim_heap
from offload.paged import copied_bytes
from offload.paging import POPULATES_SAFELY
from offload.pinned import system_pin_limit

from .choices import AUTO, IO_CHOICES
from .estimates import CACHED_RATE, CONTEXT_BYTES, DISK_RATE, LINK_RATE, WORKSPACE_BYTES, default_vram
from .weights import lent

# Below this the probe would take longer than it could save.
_PROBED_BYTES = 256 << 20
# What the process comes to hold beside weights and activations: interpreter, libraries, the picture's file.
_HOST_SLACK = 96 << 20
# Left to the system and to other programs where no --ram is given.
_HOST_SPARE = 1 << 30
# The process's own memory differs a little from run to run; a plan must not.
_HOST_STEP = 64 << 20
# Phases whose figures are kept once they are closed; a long-lived pipeline opens one for every prompt.
_KEPT_CLOSED = 64
_STAGING_BYTES = 64 << 20
# With a budget on a CPU, what is freed goes back to the system from this size on: as glibc has it at most, so that a
# block's activations, the same for every block, are not new memory each time; and around the local decoder.
_RETURNED_BYTES, _SPARING_BYTES = 32 << 20, 4 << 20
# With less every copy is so short that its overhead counts.
_LEAST_STAGING_BYTES = 4 << 20
# Of all blocks, what visits of the mapped file may copy before slots are the better place. The thread that computes
# makes those copies; readers make one of everything, beside it.
_MOST_COPIED = 1 / 2


@dataclass(frozen=True)
class MemoryOptions:
    """What may be held, in bytes, and how weights are read. None: decided from what is free.

    vram: device memory, all of it: weights, activations, the device's own context. Not for the CPU.
    ram: host memory: pinned, anonymous, and what is kept cached or mapped. On the CPU it bounds everything.
    pin: the most that may be page-locked; 0 for none. io: one of IO_CHOICES. slots: of the ring.
    poison: fill every slot with garbage the moment it is free (for tests).
    Raises ValueError for an unknown io, or slots under 2.
    """

    vram: int | None = None
    ram: int | None = None
    pin: int | None = None
    io: str = AUTO
    slots: int | None = None
    poison: bool = False

    def __post_init__(self) -> None:
        if self.io not in IO_CHOICES:
            raise ValueError(f"io must be one of {', '.join(IO_CHOICES)}, got {self.io!r}")
        if self.slots is not None and self.slots < 2:
            raise ValueError(f"the ring needs at least 2 slots, got {self.slots}")


@dataclass(frozen=True)
class PhaseDemand:
    """What a phase asks of its weights.

    phase: for reports and messages. seconds: rough compute time per visit of each block. activations: peak
    bytes beside the weights. once: blocks visited at the start only, the others round and round. host_bytes:
    taken in host memory beside a device. to_align: dtypes of weights that a CPU's kernels want aligned; None: all.
    """

    phase: str
    blocks: Sequence[Block]
    seconds: Mapping[str, float]
    activations: int
    once: Collection[str] = ()
    host_bytes: int = 0
    to_align: frozenset[torch.dtype] | None = None

    @property
    def copied_share(self) -> float:
        """Of the blocks' bytes, what visits of the mapped file would copy."""
        copied = sum(copied_bytes(block, self.to_align) for block in self.blocks)
        return copied / max(sum(block.nbytes for block in self.blocks), 1)

    def with_copies(self) -> PhaseDemand:
        """Its activations, and what one visit of the mapped file copies."""
        most = max((copied_bytes(block, self.to_align) for block in self.blocks), default=0)
        return replace(self, activations=self.activations + most)

    def costs(self) -> list[BlockCost]:
        has_rounds = any(block.name not in self.once for block in self.blocks)
        return [
            BlockCost(
                block.name,
                block.nbytes,
                self.seconds.get(block.name, 0.0),
                visits=int(block.name not in self.once or not has_rounds),
                may_stay=block.name not in self.once,
            )
            for block in self.blocks
        ]


@dataclass(frozen=True)
class IoChoice:
    """How files are read, at what rate the probe saw it done (bytes per second, None unprobed), and why."""

    io: str
    rate: float | None
    reason: str


class WeightStream:
    """The weights of one phase, lent to `model` block by block. Owns threads, files and memory until `close`."""

    def __init__(
        self,
        model: nn.Module,
        demand: PhaseDemand,
        source: BlockSource,
        resources: ExitStack,
        io: IoChoice,
        *,
        checkpoint: Checkpoint,
        readers: Sequence[Reader] = (),
        plan: ResidencyPlan | None = None,
    ) -> None:
        self.demand = demand
        self.plan = plan
        self.io = io
        self.source = source
        self._model = model
        self._resources = resources
        self._checkpoint = checkpoint
        self._readers = readers
        self._closed = False

    @contextmanager
    def visit(self, name: str) -> Iterator[None]:
        """While open, the modules of block `name` have their weights. One at a time."""
        with self.source.visit(name) as weights, lent(self._model, weights):
            yield

    def gather(self, source: TensorSource, rows: Sequence[int]) -> Tensor:
        """Some rows of a two-dimensional tensor that no block holds, (len(rows), columns), on the CPU.

        Reads those rows alone. Raises CheckpointError, OSError.
        """
        if not self._readers:
            return read_source(self._checkpoint, source)[list(rows)]
        info = source.parts[0].tensor
        row_bytes = info.nbytes // info.shape[0]
        extents = [
            Extent(info.path, info.offset + row * row_bytes, row_bytes, index * row_bytes)
            for index, row in enumerate(rows)
        ]
        buffer = aligned_buffer(len(rows) * row_bytes)
        self._readers[0].submit(source.name, extents, buffer).wait()
        return buffer.view(info.torch_dtype).reshape(len(rows), -1)

    @property
    def planned_device_bytes(self) -> int:
        """What weights take on the device while the phase is open: resident blocks and slots."""
        if self.plan is None:
            return 0
        tiers = self.plan.tiers
        resident = sum(block.nbytes for block in self.demand.blocks if tiers[block.name] is Tier.DEVICE)
        return self.plan.ring_bytes + resident

    @property
    def device_bytes(self) -> int:
        """Held on the device now."""
        return 0 if self._closed else self.planned_device_bytes

    @property
    def host_bytes(self) -> int:
        """Held in host memory beside a device now."""
        return 0 if self.plan is None or self._closed else self.plan.host_bytes

    @property
    def read_bytes(self) -> int:
        return self.source.read_bytes + sum(reader.read_bytes for reader in self._readers)

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Give everything back. May be called twice."""
        self._closed = True
        self._resources.close()


@dataclass
class Streamer:
    """Opens the weights of phases on one device within one budget.

    Phases share the budget: one is closed when another has no room beside it. streams: the open ones and the latest
    of those that were, for their figures. context_bytes: what a card's driver holds beside the tensors.
    """

    device: torch.device
    options: MemoryOptions = field(default_factory=MemoryOptions)
    streams: list[WeightStream] = field(default_factory=list)
    context_bytes: int = CONTEXT_BYTES
    _past_fallbacks: list[str] = field(default_factory=list)
    _probes: dict[str, IoProbe] = field(default_factory=dict)
    _ring_device: OwnedDevice | None = None
    _process_bytes: int | None = None
    _free_vram: int | None = None
    _notices: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.device.type == "cpu" and self.options.vram is not None:
            raise ValueError(
                "--vram is for graphics cards; on the CPU device memory is RAM, give --ram instead (vram= and ram=)"
            )
        if self._is_bounded:
            return_freed_memory(_RETURNED_BYTES)

    def open(self, model: nn.Module, checkpoint: Checkpoint, demand: PhaseDemand) -> WeightStream:
        """Plan the phase, take its memory, start reading. Raises BudgetError, CheckpointError, OSError."""
        io = self._choose_io(checkpoint, demand)
        if not self._has_ring:
            return self._open_mapped(model, checkpoint, demand, io)
        if self._computes_mapped(io):
            return self._open_paged(model, checkpoint, demand, io)
        plan = self._plan_with_room(demand, checkpoint)
        with ExitStack() as stack:
            # Entered first, and so called when the ring is closed: the next phase needs other sizes.
            stack.callback(self.release_cached)
            readers = [stack.enter_context(self.open_reader(checkpoint, io.io))]
            if io.io == "direct" and plan.count(Tier.CACHED):
                readers.append(stack.enter_context(self.open_reader(checkpoint, "read")))
            ring = stack.enter_context(
                Ring(
                    demand.blocks,
                    plan,
                    self.ring_device(),
                    readers[0],
                    once=demand.once,
                    keep_cache=self._keeps_cache(demand, plan),
                    poison=self.options.poison,
                    cached_reader=readers[-1],
                )
            )
            stream = WeightStream(
                model, demand, ring, stack.pop_all(), io, checkpoint=checkpoint, readers=readers, plan=plan
            )
        return self._add(stream)

    def _add(self, stream: WeightStream) -> WeightStream:
        closed = [known for known in self.streams if known.closed]
        forgotten = closed[: max(len(closed) - _KEPT_CLOSED, 0)]
        self.streams = [*(known for known in self.streams if known not in forgotten), stream]
        return stream

    def _keeps_cache(self, demand: PhaseDemand, plan: ResidencyPlan) -> bool:
        """Whether what is read may stay in the page cache: without a budget, unless it would come again and again and
        put out what is to stay there."""
        repeated = (plan.tiers[block.name] for block in demand.blocks if block.name not in demand.once)
        return self.options.ram is None and Tier.DISK not in repeated

    def reserve(self, segments: Sequence[int]) -> None:
        """On a card, let torch's allocator have free segments of these bytes, and no others. Else nothing."""
        if self.device.type == "cuda":
            self.ring_device().reserve(segments)

    def release_cached(self) -> None:
        """On a card, give back what torch's allocator holds for nobody. Else nothing."""
        if self._ring_device is not None:
            self._ring_device.release_cached()

    def _allocator_limit(self) -> int | None:
        """What torch's allocator may reserve. Library workspaces are in it: cuBLAS and cuDNN get theirs from there."""
        return None if self.options.vram is None else max(self.options.vram - self.context_bytes, 0)

    def require_room(self, checkpoint: Checkpoint, demand: PhaseDemand) -> None:
        """Raise BudgetError unless the phase fits, no other being open."""
        if self._has_ring:
            self.plan(demand, checkpoint)

    def told(self, demand: PhaseDemand, checkpoint: Checkpoint) -> str:
        """`6 blocks stay, 31 stream, 1.95 GiB in all`."""
        plan = self.plan(demand, checkpoint)
        stay = plan.count(Tier.DEVICE)
        return f"{stay} blocks stay, {len(demand.blocks) - stay} stream, {format_bytes(plan.device_bytes)} in all"

    def open_reader(self, checkpoint: Checkpoint, io: str, *, read_ahead: bool = True) -> Reader:
        """What reads a phase's files. Raises CheckpointError, OSError."""
        return Reader(checkpoint, io=io, read_ahead=read_ahead)

    def plan(
        self, demand: PhaseDemand, checkpoint: Checkpoint | None, beside: Sequence[WeightStream] = ()
    ) -> ResidencyPlan:
        """Where the blocks of a phase will live, beside those of phases that stay open. Raises BudgetError.

        checkpoint: what is probed where `io` is "auto"; else it may be None.
        """
        is_cpu = self.device.type == "cpu"
        if is_cpu and self._computes_mapped(self._choose_io(checkpoint, demand)):
            demand = demand.with_copies()
        rates = Rates(disk=DISK_RATE) if is_cpu else Rates(disk=DISK_RATE, cached=CACHED_RATE, link=LINK_RATE)
        try:
            budget = self._host_budget(demand, beside) if is_cpu else self._device_budget(demand, beside)
            return plan_residency(demand.costs(), rates, budget, slots=self.options.slots)
        except BudgetError as error:
            name = "ram" if is_cpu or error.of == "host" else "vram"
            raise BudgetError(
                f"{demand.phase}: {error}; give more with --{name} ({name}=)", error.needed, error.of
            ) from None

    def _plan_with_room(self, demand: PhaseDemand, checkpoint: Checkpoint) -> ResidencyPlan:
        """`plan`, if need be after closing the other phases."""
        try:
            return self.plan(demand, checkpoint, self.streams)
        except BudgetError:
            self.close_streams()
            return self.plan(demand, checkpoint)

    def _open_paged(self, model: nn.Module, checkpoint: Checkpoint, demand: PhaseDemand, io: IoChoice) -> WeightStream:
        plan = self._plan_with_room(demand, checkpoint)
        with ExitStack() as stack:
            # Blocks are brought by their pages: it reads single rows.
            reader = stack.enter_context(self.open_reader(checkpoint, "read", read_ahead=False))
            source = stack.enter_context(
                PagedBlocks(
                    checkpoint,
                    demand.blocks,
                    plan,
                    once=demand.once,
                    keep_cache=self._keeps_cache(demand, plan),
                    to_align=demand.to_align,
                )
            )
            stream = WeightStream(
                model, demand, source, stack.pop_all(), io, checkpoint=checkpoint, readers=[reader], plan=plan
            )
        return self._add(stream)

    def _open_mapped(self, model: nn.Module, checkpoint: Checkpoint, demand: PhaseDemand, io: IoChoice) -> WeightStream:
        with ExitStack() as stack:
            blocks = stack.enter_context(MappedBlocks(checkpoint, demand.blocks, self.device))
            stream = WeightStream(model, demand, blocks, stack.pop_all(), io, checkpoint=checkpoint)
        return self._add(stream)

    @property
    def _has_ring(self) -> bool:
        return self.device.type in ("cpu", "cuda")

    def _computes_mapped(self, io: IoChoice) -> bool:
        return io.io == "mmap" and self.device.type == "cpu"

    def ring_device(self) -> OwnedDevice:
        """What rings run on; made when the first one opens."""
        if self._ring_device is None:
            if self.device.type == "cpu":
                self._ring_device = CpuDevice()
            else:
                from offload.cuda import CudaDevice

                self._warn_of_vram()
                limit = self._allocator_limit()
                self._ring_device = CudaDevice(self.device, pin_limit=self.options.pin, memory_limit=limit, timing=True)
        return self._ring_device

    def _choose_io(self, checkpoint: Checkpoint | None, demand: PhaseDemand) -> IoChoice:
        if self.options.io != AUTO:
            return IoChoice(self.options.io, None, f"{self.options.io}, as asked for")
        assert checkpoint is not None, "what is to be probed"
        size = sum(identity.size for identity in checkpoint.identities.values())
        if size < _PROBED_BYTES:
            return IoChoice("read", None, f"read: {format_bytes(size)} are not worth a probe")
        key = str(checkpoint.files)
        if key not in self._probes:
            # Without that call a file cut short while its pages are brought would end the process.
            in_place = self.device.type == "cpu" and POPULATES_SAFELY
            # Processor time varies less than rates: it takes less to tell ways apart by it.
            rounds, round_bytes = (2, 4 << 20) if in_place else (3, 8 << 20)
            self._probes[key] = probe_io(checkpoint, rounds=rounds, round_bytes=round_bytes, in_place=in_place)
        probe = self._probes[key]
        if self._computes_mapped(IoChoice(probe.io, None, "")):
            share = demand.copied_share
            if share > _MOST_COPIED:
                reason = f"{probe.reason_of(probe.reader)}; mmap would copy {share:.0%}"
                return IoChoice(probe.reader, probe.rates.get(probe.reader), reason)
        # No rate where nothing could be read: the first block will tell which bytes.
        return IoChoice(probe.io, probe.rates.get(probe.io), probe.reason)

    def _host_budget(self, demand: PhaseDemand, beside: Sequence[WeightStream]) -> Budget:
        """On the CPU: one budget for everything."""
        held = sum(stream.device_bytes for stream in beside)
        return Budget(self._ram(), demand.activations, reserved=self.process_bytes + held, name="RAM budget")

    def _device_budget(self, demand: PhaseDemand, beside: Sequence[WeightStream]) -> Budget:
        vram = self._vram()
        held = sum(stream.device_bytes for stream in beside)
        host = self._host_left(demand, beside)
        pin = system_pin_limit() if self.options.pin is None else self.options.pin
        return Budget(
            vram,
            demand.activations,
            reserved=self.context_bytes + WORKSPACE_BYTES + held,
            host=host,
            pinned=min(pin, host),
            staging=min(_STAGING_BYTES, host),
        )

    def _vram(self) -> int:
        """What was asked for, or what is free as first seen since `close`: a plan must not change because the driver
        has loaded some kernels meanwhile."""
        if self.options.vram is not None:
            return self.options.vram
        if self._free_vram is None:
            held = sum(stream.device_bytes for stream in self.streams)
            self._free_vram = default_vram(self._free_device_bytes() + held, self.context_bytes)
        return self._free_vram

    def _free_device_bytes(self) -> int:
        free = available_device_bytes(self.device)
        assert free is not None, "a device with a ring tells its memory"
        return free

    def _warn_of_vram(self) -> None:
        """Where less is free than was asked for."""
        if self.options.vram is None:
            return
        free = self._free_device_bytes() + self.context_bytes
        self._notices = []  # of an earlier opening, when other bytes were free
        if self.options.vram > free:
            self._notices.append(
                f"--vram {format_bytes(self.options.vram)} is more than {self.device} has free "
                f"({format_bytes(free)} with this program's own share): memory may run out"
            )

    def _host_left(self, demand: PhaseDemand, beside: Sequence[WeightStream]) -> int:
        """Host bytes for weights on their way to a card. Raises BudgetError where there are hardly any."""
        ram = self._ram()
        taken = self.process_bytes + demand.host_bytes + sum(stream.host_bytes for stream in beside)
        if ram - taken >= _LEAST_STAGING_BYTES:
            return ram - taken
        needed = taken + _LEAST_STAGING_BYTES
        parts = f"process and pictures {format_bytes(taken)} + staging ring {format_bytes(_LEAST_STAGING_BYTES)}"
        raise BudgetError(
            f"RAM budget {format_bytes(ram)} is too small: {parts} = {format_bytes(needed)}; "
            f"the nearest plan that fits takes {needed} bytes",
            needed,
            "host",
        )

    @property
    def process_bytes(self) -> int:
        """Host bytes of the process without weights, as first seen since `close`, in coarse steps: a plan must not
        change because the process grew a little. What other pipelines hold by then is in it."""
        if self._process_bytes is None:
            self._trim()
            anonymous = process_memory().anonymous
            self._process_bytes = -(-anonymous // _HOST_STEP) * _HOST_STEP + _HOST_SLACK
        return self._process_bytes

    def _ram(self) -> int:
        if self.options.ram is not None:
            return self.options.ram
        held = sum(self._taken_bytes(stream) for stream in self.streams)
        spare = max(available_host_bytes() - _HOST_SPARE, 0)
        return self.process_bytes + (spare + held) // _HOST_STEP * _HOST_STEP

    def _taken_bytes(self, stream: WeightStream) -> int:
        """Of what is free in the machine: mapped pages still count as free there."""
        if self.device.type == "cpu":
            return max(stream.device_bytes - stream.source.mapped_bytes, 0)
        return stream.host_bytes

    def close_streams(self) -> None:
        """Close every open phase; their figures stay."""
        for stream in self.streams:
            stream.close()
        self._trim()

    @contextmanager
    def sparing(self) -> Iterator[None]:
        """Around what takes the most memory: with a budget, the heap begins it empty, and all that is freed in it goes
        back at once. It costs page faults."""
        if not self._is_bounded:
            yield
            return
        trim_heap()
        return_freed_memory(_SPARING_BYTES)
        try:
            yield
        finally:
            return_freed_memory(_RETURNED_BYTES)

    def _trim(self) -> None:
        """Let go of what a phase has freed, where memory counts."""
        if self._is_bounded:
            trim_heap()

    @property
    def _is_bounded(self) -> bool:
        """Whether activations count towards a budget of host memory."""
        return self.device.type == "cpu" and self.options.ram is not None

    def close(self) -> None:
        """Give everything back. May be called twice; a closed streamer can be used again."""
        self.close_streams()
        self._process_bytes = self._free_vram = None
        device, self._ring_device = self._ring_device, None
        if device is not None:
            self._past_fallbacks += device.fallbacks
            device.close()

    @property
    def notices(self) -> list[str]:
        """What is odd about the budgets on this machine; empty in the good case."""
        return list(dict.fromkeys(self._notices))

    @property
    def fallbacks(self) -> list[str]:
        """Why copies to the device are slower than they could be; empty in the good case."""
        return [*self._past_fallbacks, *(() if self._ring_device is None else self._ring_device.fallbacks)]
