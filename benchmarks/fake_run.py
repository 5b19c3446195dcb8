"""The real pipeline at full size on a fake card: no weights, no memory, every device byte counted.

The checkpoint is a sparse file with a true header, the ring runs on a device whose buffers are counted and whose
copies do nothing, and its courier runs on the caller's thread, so that every run is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from allocator_model import CachingAllocator
from fake_cuda import Arch, FakeCuda
from repetition import repetitions_left_out
from torch import Tensor

from l2p_lowvram import L2PPipeline, linear, slicing
from l2p_lowvram.config import ModelConfig
from l2p_lowvram.estimates import CONTEXT_BYTES, WORKSPACE_BYTES
from l2p_lowvram.export import LayoutStyle, model_entries, settings_metadata
from l2p_lowvram.repository import ModelFiles
from l2p_lowvram.safetensors_writer import encode_header
from l2p_lowvram.streaming import MemoryOptions, Streamer
from l2p_lowvram.synthetic import synthetic_state
from l2p_lowvram.tilings import PictureWork, decoder_overhead
from offload import BudgetError, Checkpoint, ResidencyPlan
from offload.blocks import Extent
from offload.devices import Cancelled, Counter, Courier, Event, NoTimer, Stream, Worker
from offload.reading import Reader
from offload.timeline import Timeline

PROMPT_TOKENS = 64
# So that plans do not depend on the machine: host memory is no matter here.
_HOST_BYTES = 1 << 40
_MARKER_BYTES = 1 << 10


def write_sparse_checkpoint(path: Path, config: ModelConfig, *, scheme: str | None = "row") -> None:
    """A published file (INT8 layers, the rest BF16 and F32) of which only header and markers are written.

    The weights are holes: they read as zeros and take no disk, in a file of full length.
    """
    entries, metadata = model_entries(synthetic_state(config, scheme=scheme), LayoutStyle(), config.patch_size)
    with path.open("wb") as file:
        file.write(encode_header(entries, metadata | settings_metadata(config)))
        for entry in entries:
            if entry.nbytes <= _MARKER_BYTES and entry.dtype == "U8":
                file.writelines(bytes(piece) for piece in entry.data())
            else:
                file.seek(entry.nbytes, 1)
        file.truncate()


class FakeDevice:
    """A Device whose buffers are fake CUDA tensors, and whose courier runs while the caller waits for it."""

    reads_into_device = False
    fallbacks: Sequence[str] = ()

    def __init__(self) -> None:
        self.allocator: CachingAllocator | None = None
        self._couriers: list[_FakeWorker] = []

    def reserve(self, segments: Sequence[int]) -> None:
        """As `offload.cuda.CudaDevice` does. No tensors, which would count as the run's."""
        if self.allocator is None:
            return
        self.allocator.empty_cache()
        held = []
        with suppress(torch.OutOfMemoryError):
            for nbytes in segments:
                held.append(self.allocator.allocate(nbytes))
        for chunk in held:
            self.allocator.free(chunk)

    def release_cached(self) -> None:
        if self.allocator is not None:
            self.allocator.empty_cache()

    def close(self) -> None: ...

    def compute_stream(self) -> Stream:
        return _FakeStream()

    def new_stream(self, name: str) -> Stream:
        return _FakeStream()

    def new_event(self) -> Event:
        return _FakeEvent()

    def visit_timer(self, timeline: Timeline) -> NoTimer:
        return NoTimer()

    def new_counter(self) -> Counter:
        return _FakeCounter(self)

    def device_buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=FakeCuda.device)

    def pinned_buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def start(self, courier: Courier) -> Worker:
        worker = _FakeWorker(courier)
        self._couriers.append(worker)
        return worker

    def run_couriers(self) -> None:
        for worker in self._couriers:
            worker.advance()
        self._couriers = [worker for worker in self._couriers if not worker.ended]


class _FakeEvent:
    def synchronize(self) -> None: ...


class _FakeStream:
    def record(self, event: Event) -> None: ...

    def wait(self, event: Event) -> None: ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Nothing: a copy allocates nothing, and there are no values."""

    def fill(self, target: Tensor, value: int) -> None: ...

    def synchronize(self) -> None: ...


class _FakeCounter:
    """Between caller and courier on one thread: whoever waits lets the couriers run."""

    def __init__(self, device: FakeDevice) -> None:
        self.value = 0
        self.error: BaseException | None = None
        self._device = device

    def advance(self) -> None:
        self.value += 1

    def wait(self, value: int) -> None:
        if self.value < value:
            self._device.run_couriers()
        if self.value < value:
            raise self.error or RuntimeError(f"waits for {value}, and nobody will advance {self.value}")

    def fail(self, error: BaseException) -> None:
        self.error = self.error or error


class _FakeWorker:
    def __init__(self, courier: Courier) -> None:
        self.ended = False
        self._courier = courier
        self._awaited: tuple[Counter, int] | None = None

    def advance(self) -> None:
        """Run until the courier waits for something that has not come."""
        while not self.ended and not self._blocked():
            self._awaited = next(self._courier, None)
            self.ended = self._awaited is None

    def _blocked(self) -> bool:
        if self._awaited is None:
            return False
        counter, value = self._awaited
        assert isinstance(counter, _FakeCounter)
        if counter.value < value and counter.error is not None:
            assert isinstance(counter.error, Cancelled)
            self.join()
        return counter.value < value

    def join(self) -> None:
        self.ended = True
        self._courier.close()  # type: ignore[attr-defined]


class _NoReader:
    """A context manager that reads nothing, at once."""

    io, read_bytes, span = "fake", 0, None

    def submit(self, label: str, extents: Sequence[Extent], buffer: Tensor, *, drop_cache: bool = False) -> _NoReader:
        return self

    def wait(self) -> None: ...

    def cancel(self) -> None: ...

    def __enter__(self) -> _NoReader:
        return self

    def __exit__(self, *error: object) -> None: ...


class FakeStreamer(Streamer):
    """Streams blocks that are never read to a card that is not there. vram: the budget in bytes, context included."""

    def __init__(self, vram: int) -> None:
        super().__init__(FakeCuda.device, MemoryOptions(vram=vram, ram=_HOST_BYTES, pin=0, io="read"))
        self._fake_device = FakeDevice()

    def ring_device(self) -> FakeDevice:
        return self._fake_device

    def open_reader(self, checkpoint: Checkpoint, io: str) -> Reader:
        return _NoReader()  # type: ignore[return-value]


@dataclass(frozen=True)
class Request:
    """Pictures to account for. Sizes in pixels; vram in bytes, context included; None: `streamed_budget`."""

    width: int
    height: int
    guided: bool = True
    pictures: int = 1
    steps: int = 1
    dtype: torch.dtype = torch.bfloat16
    vram: int | None = None


@dataclass(frozen=True)
class Account:
    """What a run took on the device, in bytes, the CUDA context apart.

    predicted: what the plan had promised. peak, live: the allocator's reserved bytes and the tensors' own, each
    with the workspace allowance of the plan, which is not modelled. peak_at, reserved_at: the operation and the
    lines that made them. alive: the largest holdings at the peak of `live`. host_syncs: by line, for the whole run.
    """

    plan: ResidencyPlan
    slices: str
    predicted: int
    peak: int
    live: int
    peak_at: str
    reserved_at: str
    alive: Sequence[tuple[int, str]]
    kernels: dict[str, int]
    host_syncs: dict[str, int]
    notices: Sequence[str]
    flushes: int


def predicted_bytes(plan: ResidencyPlan) -> int:
    """Device bytes that a plan promises to keep within, the CUDA context apart: weights, activations, workspaces."""
    return plan.device_bytes - CONTEXT_BYTES


def account(
    model: Path,
    request: Request,
    arch: Arch,
    *,
    limit_bytes: int | None = None,
    expandable: bool = False,
    repetitions: bool = False,
) -> Account:
    """Run the pipeline on a file of `write_sparse_checkpoint`.

    limit_bytes: what the allocator may reserve; None: what the budget leaves it, as on a card. expandable: with
    segments that grow. repetitions: make also those slices and visits that only repeat others, which takes minutes
    and changes nothing but the counts.
    Raises BudgetError where the request's budget is too small.
    """
    vram = streamed_budget(model, request, arch) if request.vram is None else request.vram
    limit_bytes = vram - CONTEXT_BYTES - WORKSPACE_BYTES if limit_bytes is None else limit_bytes
    with ExitStack() as stack:
        stack.enter_context(patch.object(slicing, "has_fused_kernel", _asking(arch)))
        pipe = stack.enter_context(_pipeline(model, vram, request))
        pipe.describe_plan(_work(pipe, request))  # a budget too small is refused before it limits anything
        # A cached matrix of one fake device is no use to the next.
        stack.callback(linear.hadamard.cache_clear)
        linear.hadamard.cache_clear()
        cuda = stack.enter_context(FakeCuda(arch, limit_bytes=limit_bytes, expandable=expandable))
        assert isinstance(pipe.streamer, FakeStreamer)
        pipe.streamer.ring_device().allocator = cuda.allocator
        if not repetitions:
            stack.enter_context(repetitions_left_out(cuda.allocator))
        _generate(pipe, request)
        (stream,) = pipe.streamer.streams
        assert stream.plan is not None
        return _account(cuda, stream.plan, pipe, request)


def streamed_budget(model: Path, request: Request, arch: Arch, within: int = _HOST_BYTES) -> int:
    """The smallest budget with the slices that a run `within` a budget takes: a pair of slots, nothing resident.

    Both in bytes, context included. Raises BudgetError.
    """
    with patch.object(slicing, "has_fused_kernel", _asking(arch)), _pipeline(model, within, request) as pipe:
        _, demand = pipe.weights.choose(_work(pipe, request))  # type: ignore[attr-defined]
    try:
        FakeStreamer(vram=0).plan(demand, None)
    except BudgetError as error:
        return error.needed
    raise AssertionError("nothing fits into no memory")


def decoder_arithmetic(model: Path, request: Request, arch: Arch, vram: int) -> float:
    """Operations of the local decoder relative to the untiled one, as a budget is planned (bytes, context included)."""
    with patch.object(slicing, "has_fused_kernel", _asking(arch)), _pipeline(model, vram, request) as pipe:
        work = _work(pipe, request)
        tiling, _ = pipe.weights.choose(work)  # type: ignore[attr-defined]
        return decoder_overhead(pipe.config, work, tiling)


def _pipeline(model: Path, vram: int, request: Request) -> L2PPipeline:
    # "auto" would try kernels on the card.
    return L2PPipeline.from_streamer(ModelFiles(model), FakeStreamer(vram), request.dtype, compute="dequant")


def _work(pipe: L2PPipeline, request: Request) -> PictureWork:
    cfg_scale = 2.0 if request.guided else 1.0
    return pipe.work(request.width, request.height, request.pictures, cfg_scale, PROMPT_TOKENS)


def _asking(arch: Arch):  # type: ignore[no-untyped-def]
    return lambda device, dtype, head_dim: arch.has_fused_attention(dtype, head_dim)


def _generate(pipe: L2PPipeline, request: Request) -> None:
    """One call, its prompts encoded already. The negative one is a token shorter: torch.equal tells shapes apart."""
    size = (request.pictures, 3, request.height, request.width)
    features = [torch.empty(PROMPT_TOKENS - i, pipe.config.caption_dim, device=pipe.device) for i in range(2)]
    positive, negative = (item.to(request.dtype) for item in features)
    del features
    pipe(
        prompt_embeds=positive,
        negative_prompt_embeds=negative if request.guided else None,
        latents=torch.empty(size),
        width=request.width,
        height=request.height,
        num_images_per_prompt=request.pictures,
        num_inference_steps=request.steps,
        cfg_scale=2.0 if request.guided else 1.0,
        output_type="pt",
    )


def _account(cuda: FakeCuda, plan: ResidencyPlan, pipe: L2PPipeline, request: Request) -> Account:
    memory = cuda.memory
    return Account(
        plan,
        pipe.describe_plan(_work(pipe, request)),
        predicted_bytes(plan),
        cuda.allocator.peak_reserved + WORKSPACE_BYTES,
        memory.peak + WORKSPACE_BYTES,
        memory.peak_at,
        memory.reserved_at,
        memory.alive_at_peak(),
        dict(cuda.routing.kernels),
        dict(memory.host_syncs),
        pipe.warnings,
        cuda.allocator.flushes,
    )
