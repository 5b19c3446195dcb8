"""One contender of `peers.py`, in a process of its own: JSON with its seconds and memory on the last line.

All contenders call the same `Walk`: the project's own modules, plain (no slices), INT8 weights dequantised a few
rows at a time by `l2p_lowvram.linear.Linear`. What differs is who puts the weights there:

    ours         `StreamedWeights`: a ring of slots filled by parallel reads, ahead of the compute
    hand         `safe_open` anew for every block, its tensors lent to the modules, then dropped
    accelerate   `disk_offload(..., offload_buffers=True)` with an index that points into the safetensors file.
                 The meta modules carry the stored dtypes, else it would widen INT8 to fp32 while loading
    diffsynth    `enable_vram_management` with everything on "disk" and nothing onloaded ahead, a layer at a time, as
                 DiffSynth's own map for the Z-Image transformer has it. INT8 layers take its way for layers that a
                 file keeps quantised (`AutoWrappedQuantizedModule`), told by `StoredLinears` how ours are stored; all
                 others `AutoWrappedModule`. computation_dtype None keeps the stored dtypes, and with them the
                 arithmetic. Only `diffsynth.core.vram` is imported: the package's own __init__ wants torchvision
    diffusers    `apply_group_offloading(..., offload_to_disk_path=...)`; refuses to work without an accelerator
    compute      all weights in memory before the clock starts: the part of a forward that is not reading
    read         the blocks read once, nothing computed: the other part
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from limited import drop_cache
from torch import Tensor

from l2p_lowvram.layout import ModelLayout, read_layout
from l2p_lowvram.linear import Conv2d, Linear, RMSNorm
from l2p_lowvram.model import L2PTransformer
from l2p_lowvram.model_weights import (
    CAPTION_EMBEDDER,
    IMAGE_EMBEDDER,
    LOCAL_DECODER,
    StreamedWeights,
    cut_into_blocks,
)
from l2p_lowvram.streaming import MemoryOptions, Streamer
from l2p_lowvram.tilings import PictureWork
from l2p_lowvram.weights import bind, build_transformer, check_scales, lent
from offload import BudgetError, Checkpoint, MemoryWatch, process_memory

CAPTION = 32
# Image tokens -> width and height in pixels, for patches of 16.
SIZES = {32: (128, 64), 256: (256, 256), 1024: (512, 512)}
Visit = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Job:
    """What a contender is given. scratch: a folder for what it keeps. ram: bytes, or None for the least that works."""

    model: Path
    tokens: int
    scratch: Path
    ram: int | None
    io: str
    device: str
    threads: int
    steps: int

    @property
    def size(self) -> tuple[int, int]:
        return SIZES[self.tokens]


class Walk(L2PTransformer):
    """The transformer with prompt and step as one call; `visit` is open while a block's weights are needed."""

    visit: Visit
    caption: Any

    def forward(self, pixels: Tensor, t: Tensor, features: Tensor | None) -> Tensor:  # type: ignore[override]
        """features None: the caption of the call before, as in every step but the first."""
        if features is not None:
            with self.visit(CAPTION_EMBEDDER):
                caption = self.embed_caption(features, pixels.dtype)
            for index, block in enumerate(self.context_refiner):
                with self.visit(f"context_refiner.{index}"):
                    caption = replace(caption, tokens=block(caption.tokens, caption.rope))
            self.caption = caption
        with self.visit(IMAGE_EMBEDDER):
            state = self.prelude(pixels, t, self.caption)
        for named in self.blocks():
            with self.visit(named.name):
                state = named.visit(state)
        with self.visit(LOCAL_DECODER):
            return self.epilogue(state, pixels)


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
    """Ready to walk. begin: what belongs to the first forward. notes: for the record."""

    walk: Walk
    begin: Callable[[], Any] = lambda: None
    notes: Callable[[], Mapping[str, Any]] = dict


def ours(job: Job, checkpoint: Checkpoint, layout: ModelLayout, stack: ExitStack) -> Contender:
    check_scales(checkpoint, layout.sources.values())
    walk = walk_of(layout)
    work = PictureWork(*job.size, 1, False, CAPTION, torch.float32, on_cpu=job.device == "cpu")
    ram, weights, streamer = job.ram or 1, None, None
    while weights is None:
        streamer = Streamer(torch.device(job.device), MemoryOptions(ram=ram, io=job.io))
        stack.callback(streamer.close)
        weights = StreamedWeights(walk, layout, checkpoint, streamer)
        try:
            weights.choose(work)  # probes how to read
        except BudgetError as error:
            if job.ram is not None:
                raise
            ram, weights = error.needed, None
    walk.visit = weights.visit

    def notes() -> Mapping[str, Any]:
        (stream,) = streamer.streams
        waited = sum(span.seconds for span in stream.source.timeline if span.lane == "wait")
        slots = 0 if stream.plan is None else stream.plan.slots
        return {"io": stream.io.reason, "slots": slots, "ram": ram, "waited_seconds": waited}

    return Contender(walk, lambda: weights.open(work), notes)


def hand(job: Job, checkpoint: Checkpoint, layout: ModelLayout, stack: ExitStack) -> Contender:
    from safetensors import safe_open

    names = file_names(layout)
    blocks = {block.name: [source.name for source in block.sources] for block in cut_into_blocks(layout)[0]}

    @contextmanager
    def visit(block: str) -> Iterator[None]:
        with safe_open(job.model, framework="pt", device=job.device) as file:
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
    disk_offload(walk, folder, execution_device=torch.device(job.device), offload_buffers=True)
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
    disk = vram.DiskMap(str(job.model), job.device, state_dict_converter=lambda stored: names)
    places = {f"{state}_{what}": "disk" for state in ("offload", "onload", "preparing") for what in ("dtype", "device")}
    places |= {"computation_dtype": None, "computation_device": job.device}
    wrapped = dict.fromkeys((Linear, RMSNorm, Conv2d), vram.AutoWrappedModule)
    vram.enable_vram_management(walk, wrapped, places, disk_map=disk, quantize=StoredLinears())
    for module in walk.modules():
        if hasattr(module, "onload"):
            module.onload()
    return Contender(walk)


def diffusers(job: Job, checkpoint: Checkpoint, layout: ModelLayout, stack: ExitStack) -> Contender:
    from diffusers.hooks import apply_group_offloading

    walk = in_memory(layout, checkpoint)
    apply_group_offloading(
        walk,
        onload_device=torch.device(job.device),
        offload_type="leaf_level",
        offload_to_disk_path=str(job.scratch / "diffusers"),
    )
    return Contender(walk)


def compute(job: Job, checkpoint: Checkpoint, layout: ModelLayout, stack: ExitStack) -> Contender:
    return Contender(in_memory(layout, checkpoint).to(job.device))


def in_memory(layout: ModelLayout, checkpoint: Checkpoint) -> Walk:
    from offload.mapped import read_source

    walk = walk_of(layout)
    for source in layout.sources.values():
        bind(walk, source.name, read_source(checkpoint, source).clone())
    return walk


CONTENDERS = {function.__name__: function for function in (ours, hand, accelerate, diffsynth, diffusers, compute)}


def run(name: str, job: Job) -> dict[str, Any]:
    """Seconds of opening and of forwards, the first from a cold file, and the process's peaks."""
    torch.set_num_threads(job.threads)
    generator = torch.Generator().manual_seed(0)
    width, height = job.size
    drop_cache([job.model])
    with ExitStack() as stack:
        began = time.perf_counter()
        checkpoint = stack.enter_context(Checkpoint.open(job.model))
        layout = read_layout(checkpoint)
        contender = CONTENDERS[name](job, checkpoint, layout, stack)
        opened = time.perf_counter() - began
        pixels = torch.randn(1, 3, height, width, generator=generator).to(job.device)
        features = torch.randn(CAPTION, layout.config.caption_dim, generator=generator).to(job.device)
        t = torch.tensor([0.3], device=job.device)
        drop_cache([job.model])  # again: opening has read a little
        base = process_memory()
        watch = stack.enter_context(MemoryWatch())
        with torch.no_grad():
            began, cpu, busy = time.perf_counter(), time.process_time(), busy_seconds()
            contender.begin()
            velocity = contender.walk(pixels, t, features).cpu()
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
            others = max(busy_seconds() - busy - cpu, 0.0)
            found = {"seconds": seconds, "cpu_seconds": cpu, "others_seconds": others, "open_seconds": opened}
            found |= contender.notes()
            found["first_peak_bytes"] = process_memory().peak
            found["later_seconds"] = [timed(lambda: contender.walk(pixels, t, None)) for _ in range(job.steps - 1)]
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


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
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


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    job = Job(**{**given, "model": Path(given["model"]), "scratch": Path(given["scratch"])})
    print(json.dumps(read(job) if sys.argv[1] == "read" else run(sys.argv[1], job)))
