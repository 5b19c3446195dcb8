"""One contender of `peers.py`, in a process of its own: JSON with its seconds and memory on the last line.

All contenders call the same `Walk`: the project's own modules, plain (no slices), INT8 weights dequantised a few
rows at a time by `l2p_lowvram.linear.Linear`. What differs is who puts the weights there:

    ours         `StreamedWeights`: half a layer at a time, from the mapped file or a ring of slots, brought ahead
                 On a card what activations take is what a rehearsed walk took, since slices of them are not made here;
                 where that does not fit, the least --vram that does is used
    hand         `safe_open` anew for every block, its tensors lent to the modules, then dropped
    accelerate   `disk_offload(..., offload_buffers=True)` with an index that points into the safetensors file.
                 The meta modules carry the stored dtypes, else it would widen INT8 to fp32 while loading
    accelerate_cpu  `cpu_offload(..., offload_buffers=True)`, all weights in host memory
    diffsynth    `enable_vram_management` with everything on "disk" and nothing onloaded ahead, a layer at a time, as
                 DiffSynth's own map for the Z-Image transformer has it. INT8 layers take its way for layers that a
                 file keeps quantised (`AutoWrappedQuantizedModule`), told by `StoredLinears` how ours are stored; all
                 others `AutoWrappedModule`. computation_dtype None keeps the stored dtypes, and with them the
                 arithmetic. Only `diffsynth.core.vram` is imported: the package's own __init__ wants torchvision
    diffusers    `apply_group_offloading`, all weights in pinned host memory, block by block on a stream of its own; it
                 refuses to work without an accelerator. Its hooks sit on the `forward` of a group's modules. By
                 "block_level" those are the children of each ModuleList and Sequential right below the model: a block
                 of ours, which the walk calls as a module, has one. All else (embedders, timestep, local decoder, 26
                 MiB) is one group that comes with the walk's own `forward` and goes after it. "leaf_level" works too,
                 a group for each layer; but blocks are what diffusers prefetches with the fewest waits. It learns the
                 order in the first forward; as later ones leave out the prompt, the first block of each is not
                 prefetched
    diffusers_disk  the same with `offload_to_disk_path`
    compute      all weights in memory before the clock starts: the part of a forward that is not reading
    read         the blocks read once, nothing computed: the other part
    link         the blocks of a later forward copied to the card from pinned memory, nothing else

On a card every process begins with a walk over zeros, which loads the kernels that all contenders use; maps of the
local decoder lie there as `map_format` says, so that no convolution's choice depends on the memory that is left.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import importlib
import json
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from limited import drop_cache
from on_card import CardWatch, copying_seconds
from torch import Tensor

from l2p_lowvram.context import context_bytes
from l2p_lowvram.decoder import map_format
from l2p_lowvram.devices import DTYPES, choose_device, full_fp32, on_device
from l2p_lowvram.layout import ModelLayout, read_layout
from l2p_lowvram.linear import Conv2d, Linear, RMSNorm
from l2p_lowvram.model import Caption, L2PTransformer
from l2p_lowvram.model_weights import (
    CAPTION_EMBEDDER,
    IMAGE_EMBEDDER,
    LOCAL_DECODER,
    StreamedWeights,
    cut_into_blocks,
)
from l2p_lowvram.streaming import MemoryOptions, PhaseDemand, Streamer
from l2p_lowvram.tilings import PictureWork, Tiling
from l2p_lowvram.weights import bind, build_transformer, check_scales, lent
from offload import BudgetError, Checkpoint, MemoryWatch, process_memory

CAPTION = 32
# Image tokens -> width and height in pixels, for patches of 16.
SIZES = {32: (128, 64), 256: (256, 256), 1024: (512, 512), 4096: (1024, 1024)}
# Of what a rehearsed walk took on a card, what is added for holes that torch's allocator makes in another order.
HOLES_SHARE, HOLES_BYTES = 0.15, 64 << 20
Visit = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Job:
    """What a contender is given. scratch: a folder for what it keeps. ram, vram: our budgets in bytes, None for what is
    free. least: the least RAM that works instead. activations: bytes that a walk takes on a card, once rehearsed."""

    model: Path
    tokens: int
    scratch: Path
    ram: int | None
    least: bool
    vram: int | None
    io: str
    device: torch.device
    dtype: torch.dtype
    threads: int
    steps: int
    activations: int = 0

    @property
    def size(self) -> tuple[int, int]:
        return SIZES[self.tokens]

    @property
    def on_card(self) -> bool:
        return self.device.type == "cuda"


class Walk(L2PTransformer):
    """The transformer with prompt and step as one call; `visit` is open while a block's weights are needed."""

    visit: Visit
    caption: Any
    # What a visit is of: half a layer, as we stream it, or a whole one, as everybody else has it.
    by_sublayer = False

    def forward(self, pixels: Tensor, t: Tensor, features: Tensor | None) -> Tensor:  # type: ignore[override]
        """features None: the caption of the call before, as in every step but the first."""
        if features is not None:
            with self.visit(CAPTION_EMBEDDER):
                caption = self.embed_caption(features, pixels.dtype)
            self.caption = self.refined(caption)
        with self.visit(IMAGE_EMBEDDER):
            state = self.prelude(pixels, t, self.caption)
        for named in self.sublayers() if self.by_sublayer else self.blocks():
            with self.visit(named.name):
                state = named.visit(state)
        with self.visit(LOCAL_DECODER):
            return self.epilogue(state, pixels)

    def refined(self, caption: Caption) -> Caption:
        if self.by_sublayer:
            for sublayer in self.refiner_sublayers():
                with self.visit(sublayer.name):
                    caption = sublayer.refine(caption)
            return caption
        for index, block in enumerate(self.context_refiner):
            with self.visit(f"context_refiner.{index}"):
                caption = replace(caption, tokens=block(caption.tokens, caption.rope))
        return caption


def walk_of(layout: ModelLayout, visit: Visit = nullcontext) -> Walk:
    """On the meta device, every tensor with its stored dtype."""
    model = build_transformer(layout)
    for source in layout.sources.values():
        if len(source.parts) > 1:
            raise SystemExit(f"{source.name} is kept in {len(source.parts)} tensors; peers take one each")
        bind(model, source.name, torch.empty(source.shape, dtype=source.dtype, device="meta"))
    model.__class__ = Walk
    assert isinstance(model, Walk)
    model.visit = visit
    return model


def file_names(layout: ModelLayout) -> dict[str, str]:
    """Name of a parameter or scale -> name in the file."""
    return {source.name: source.parts[0].tensor.name for source in layout.sources.values()}


@dataclass
class Contender:
    """Ready to walk. begin: what belongs to the first forward. notes: for the record. files: that it reads from, beside
    the model's."""

    walk: Walk
    begin: Callable[[], Any] = lambda: None
    notes: Callable[[], Mapping[str, Any]] = dict
    files: Sequence[Path] = ()


class PlainWeights(StreamedWeights):
    """For a walk that makes no slices, and takes `activations` bytes on a card."""

    activations = 0

    def choose(self, work: PictureWork) -> tuple[Tiling, PhaseDemand]:
        tiling, demand = super().choose(work)
        demand = replace(demand, activations=self.activations)
        self._streamer.require_room(self._checkpoint, demand)
        return tiling, demand


def ours(job: Job, checkpoint: Checkpoint, layout: ModelLayout, stack: ExitStack) -> Contender:
    check_scales(checkpoint, layout.sources.values())
    walk = walk_of(layout)
    walk.by_sublayer = True
    work = PictureWork(*job.size, 1, False, CAPTION, job.dtype, on_cpu=not job.on_card)
    context = context_bytes(job.device, job.dtype)
    memory = MemoryOptions(vram=job.vram, ram=1 if job.least else job.ram, io=job.io)
    weights, streamer = None, None
    while weights is None:
        streamer = Streamer(job.device, memory, context_bytes=context)
        stack.callback(streamer.close)
        weights = (PlainWeights if job.on_card else StreamedWeights)(walk, layout, checkpoint, streamer)
        if isinstance(weights, PlainWeights):
            weights.activations = job.activations
        try:
            weights.choose(work)  # probes how to read
        except BudgetError as error:
            if job.on_card and error.of == "device":
                memory = replace(memory, vram=error.needed)
            elif job.least:
                memory = replace(memory, ram=error.needed)
            else:
                raise
            weights = None
    walk.visit = weights.visit

    def notes() -> Mapping[str, Any]:
        (stream,) = streamer.streams
        waited = sum(span.seconds for span in stream.source.timeline if span.lane == "wait")
        slots = 0 if stream.plan is None else stream.plan.slots
        found = {"io": stream.io.reason, "slots": slots, "ram": memory.ram, "waited_seconds": waited}
        if not job.on_card or stream.plan is None:
            return found
        tiers = [tier.name for tier in stream.plan.tiers.values()]
        return {
            **found,
            "vram": memory.vram,
            "context_bytes": context,
            "activation_bytes": job.activations,
            "tiers": {name: tiers.count(name) for name in tiers},
            "slow_copies": streamer.fallbacks,
        }

    return Contender(walk, lambda: weights.open(work), notes)


def hand(job: Job, checkpoint: Checkpoint, layout: ModelLayout, stack: ExitStack) -> Contender:
    from safetensors import safe_open

    names = file_names(layout)
    embedders = {block.name: block.sources for block in cut_into_blocks(layout)[0] if "." not in block.name}
    sources = {**embedders, **layout.blocks}
    blocks = {name: [source.name for source in held] for name, held in sources.items()}

    @contextmanager
    def visit(block: str) -> Iterator[None]:
        with safe_open(job.model, framework="pt", device=str(job.device)) as file:
            weights = {name: file.get_tensor(names[name]) for name in blocks[block]}
        with lent(walk, weights):
            yield

    walk = walk_of(layout, visit)
    return Contender(walk)


def accelerate(job: Job, checkpoint: Checkpoint, layout: ModelLayout, stack: ExitStack) -> Contender:
    from accelerate import disk_offload

    folder = job.scratch / "accelerate"
    folder.mkdir(exist_ok=True)
    path = str(job.model)
    index = {name: {"safetensors_file": path, "weight_name": stored} for name, stored in file_names(layout).items()}
    (folder / "index.json").write_text(json.dumps(index))
    walk = walk_of(layout)
    disk_offload(walk, folder, execution_device=job.device, offload_buffers=True)
    return Contender(walk)


def accelerate_cpu(job: Job, checkpoint: Checkpoint, layout: ModelLayout, stack: ExitStack) -> Contender:
    from accelerate import cpu_offload

    walk = in_memory(layout, checkpoint)
    cpu_offload(walk, execution_device=job.device, offload_buffers=True)
    return Contender(walk)


class StoredLinears:
    """What DiffSynth asks of a quantisation when it loads a layer from the disk."""

    def is_quantized_linear(self, module: torch.nn.Module) -> bool:
        return isinstance(module, Linear) and module.weight_scale is not None

    def build_quantized_shell(self, module: Linear, dtype: Any, layer_name: str) -> Linear:
        return copy.deepcopy(module)

    def unflatten_state_dict(self, state: dict[str, Tensor], metadata: Any) -> dict[str, Tensor]:
        return state


def diffsynth(job: Job, checkpoint: Checkpoint, layout: ModelLayout, stack: ExitStack) -> Contender:
    sys.path.append(str(job.scratch / "diffsynth"))
    for name in ("diffsynth", "diffsynth.core"):
        package = types.ModuleType(name)
        package.__path__ = [str(job.scratch / "diffsynth" / name.replace(".", "/"))]
        sys.modules[name] = package
    vram = importlib.import_module("diffsynth.core.vram.layers")
    walk = walk_of(layout)
    names = file_names(layout)
    disk = vram.DiskMap(str(job.model), str(job.device), state_dict_converter=lambda stored: names)
    places = {f"{state}_{what}": "disk" for state in ("offload", "onload", "preparing") for what in ("dtype", "device")}
    places |= {"computation_dtype": None, "computation_device": str(job.device)}
    wrapped = dict.fromkeys((Linear, RMSNorm, Conv2d), vram.AutoWrappedModule)
    vram.enable_vram_management(walk, wrapped, places, disk_map=disk, quantize=StoredLinears())
    for module in walk.modules():
        if hasattr(module, "onload"):
            module.onload()
    return Contender(walk)


def diffusers(job: Job, checkpoint: Checkpoint, layout: ModelLayout, stack: ExitStack) -> Contender:
    return Contender(in_groups(job, in_memory(layout, checkpoint)))


def diffusers_disk(job: Job, checkpoint: Checkpoint, layout: ModelLayout, stack: ExitStack) -> Contender:
    folder = job.scratch / "diffusers" / job.model.stem
    walk = in_groups(job, in_memory(layout, checkpoint), folder)
    return Contender(walk, files=sorted(folder.iterdir()))


def in_groups(job: Job, walk: Walk, folder: Path | None = None) -> Walk:
    """Offloaded as diffusers does it. folder: for its files; None: to host memory."""
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        walk,
        onload_device=job.device,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=True,
        record_stream=False,
        low_cpu_mem_usage=False,
        offload_to_disk_path=None if folder is None else str(folder),
    )
    return walk


def compute(job: Job, checkpoint: Checkpoint, layout: ModelLayout, stack: ExitStack) -> Contender:
    return Contender(in_memory(layout, checkpoint).to(job.device))


def in_memory(layout: ModelLayout, checkpoint: Checkpoint) -> Walk:
    from offload.mapped import read_source

    walk = walk_of(layout)
    for source in layout.sources.values():
        bind(walk, source.name, read_source(checkpoint, source).clone())
    return walk


CONTENDERS = {
    function.__name__: function
    for function in (ours, hand, accelerate, accelerate_cpu, diffsynth, diffusers, diffusers_disk, compute)
}


def inputs(job: Job, layout: ModelLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, t and features (which stay fp32 until they are embedded), the same for all contenders."""
    generator = torch.Generator().manual_seed(0)
    width, height = job.size
    pixels = torch.randn(1, 3, height, width, generator=generator)
    features = torch.randn(CAPTION, layout.config.caption_dim, generator=generator)
    pixels = pixels.to(job.device, job.dtype, memory_format=map_format(job.device, job.dtype))
    return pixels, torch.tensor([0.3], device=job.device), features.to(job.device)


def rehearsed(job: Job) -> Job:
    """After a walk on a card over zeros: its kernels are loaded, and it is known what a walk takes beside the weights
    of one block. Nothing of it stays but what libraries keep."""
    taken = rehearse(job)
    gc.collect()  # the walk and what visits it hold each other
    synchronize(job)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(job.device)
    return replace(job, activations=int(taken * (1 + HOLES_SHARE)) + HOLES_BYTES)


def rehearse(job: Job) -> int:
    """Most bytes of a walk over zeros that torch's allocator reserved beside those zeros."""
    with Checkpoint.open(job.model) as checkpoint:
        layout = read_layout(checkpoint)
    blocks = {block.name: block.sources for block in cut_into_blocks(layout)[0]}
    taken = 0

    @contextmanager
    def visit(name: str) -> Iterator[None]:
        nonlocal taken
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(job.device)
        zeros = {
            source.name: torch.zeros(source.shape, dtype=source.dtype, device=job.device) for source in blocks[name]
        }
        weights = torch.cuda.memory_reserved(job.device) - before
        torch.cuda.reset_peak_memory_stats(job.device)
        with lent(walk, zeros):
            yield
        taken = max(taken, torch.cuda.max_memory_reserved(job.device) - weights)

    walk = walk_of(layout, visit)
    walk.by_sublayer = True
    with torch.no_grad():
        walk(*inputs(job, layout))
    return taken


def run(name: str, job: Job) -> dict[str, Any]:
    """Seconds of opening and of forwards, the first from a cold file, and the process's peaks."""
    torch.set_num_threads(job.threads)
    with ExitStack() as stack:
        stack.enter_context(on_device(job.device))
        stack.enter_context(full_fp32(job.device, job.dtype))
        card = None
        if job.on_card:
            job = rehearsed(job)
            card = stack.enter_context(CardWatch(job.device))
        drop_cache([job.model])
        began = time.perf_counter()
        checkpoint = stack.enter_context(Checkpoint.open(job.model))
        layout = read_layout(checkpoint)
        contender = CONTENDERS[name](job, checkpoint, layout, stack)
        synchronize(job)
        opened = time.perf_counter() - began
        pixels, t, features = inputs(job, layout)
        drop_cache([job.model, *contender.files])  # again: opening has read a little
        base = process_memory()
        watch = stack.enter_context(MemoryWatch())
        with torch.no_grad():
            synchronize(job)
            began, cpu, busy = time.perf_counter(), time.process_time(), busy_seconds()
            contender.begin()
            velocity = contender.walk(pixels, t, features).float().cpu()
            synchronize(job)
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
            others = max(busy_seconds() - busy - cpu, 0.0)
            found = {"seconds": seconds, "cpu_seconds": cpu, "others_seconds": others, "open_seconds": opened}
            found |= contender.notes()
            found["first_peak_bytes"] = process_memory().peak
            found["later_seconds"] = [timed(job, lambda: contender.walk(pixels, t, None)) for _ in range(job.steps - 1)]
        if card is not None:
            found["card_reserved_bytes"] = torch.cuda.max_memory_reserved(job.device)
            found["card_driver_bytes"] = card.peak_bytes
    torch.save(velocity, job.scratch / f"velocity-{name}.pt")
    return {
        **found,
        "velocity_sha256": hashlib.sha256(velocity.numpy().tobytes()).hexdigest(),
        "finite": bool(velocity.isfinite().all()),
        "base_bytes": base.resident,
        "peak_bytes": process_memory().peak,
        "peak_anonymous_bytes": watch.peak_anonymous,
        "peak_file_bytes": watch.peak_file_backed,
    }


def synchronize(job: Job) -> None:
    """Let a card finish, so that clocks and figures mean what has been done."""
    if job.on_card:
        torch.cuda.synchronize(job.device)


def timed(job: Job, work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    synchronize(job)
    return time.perf_counter() - began


def busy_seconds() -> float:
    """Processor time that all programs of the machine have had. What is not ours are neighbours that disturb."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def read(job: Job) -> dict[str, Any]:
    from streaming import read_blocks

    with Checkpoint.open(job.model) as checkpoint:
        blocks = cut_into_blocks(read_layout(checkpoint))[0]
        drop_cache([job.model])
        return dict(read_blocks(checkpoint, blocks))


def link(job: Job) -> dict[str, Any]:
    """Seconds of one pass of all blocks that a later forward needs, from one pinned buffer; a pass before warms up."""
    with Checkpoint.open(job.model) as checkpoint:
        blocks, once = cut_into_blocks(read_layout(checkpoint))
    sizes = [block.nbytes for block in blocks if block.name not in once]
    return {"seconds": copying_seconds(job.device, sizes), "copied_bytes": sum(sizes)}


MACHINE = {function.__name__: function for function in (read, link)}


def job_of(given: Mapping[str, Any]) -> Job:
    """From JSON."""
    paths = {key: Path(given[key]) for key in ("model", "scratch")}
    return Job(**{**given, **paths, "device": choose_device(given["device"]), "dtype": DTYPES[given["dtype"]]})


if __name__ == "__main__":
    job, name = job_of(json.loads(sys.argv[2])), sys.argv[1]
    print(json.dumps(MACHINE[name](job) if name in MACHINE else run(name, job)))
