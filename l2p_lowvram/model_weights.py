"""Where a pipeline's transformer gets its weights from: it has them, or they stream.

What streams as one block is half a transformer layer, a sublayer: the smallest ring for the published model takes two
thirds of what whole layers need, and a ring of a given size hides more reading (`benchmarks/simulated.py`). Besides
those there are three: what a caption needs before its refiner, what a picture needs before the first layer, and the
local decoder. A step visits, in this order,

    image_embedder, noise_refiner.*.{attention,feed_forward}, layers.*.{attention,feed_forward}, local_decoder

and a prompt, once before its first step, caption_embedder and context_refiner.*.{attention,feed_forward}.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from offload import Block, BudgetError, Checkpoint, TensorSource

from .activations import image_tokens
from .config import ModelConfig
from .decoder_plan import DecoderJob, macs, whole_plan
from .estimates import CARD_FLOPS, CPU_FLOPS
from .layout import ModelLayout
from .model import FEED_FORWARD, SUBLAYERS, L2PTransformer, sublayer_of
from .streaming import PhaseDemand, Streamer, WeightStream
from .tilings import PictureWork, Tiling, device_activations, device_segments, tilings

CAPTION_EMBEDDER, IMAGE_EMBEDDER, LOCAL_DECODER = "caption_embedder", "image_embedder", "local_decoder"
_CAPTION_PARAMETERS = ("cap_embedder", "cap_pad_token")
_DECODER_PARAMETERS = "local_decoder"


class TransformerWeights(Protocol):
    """Lends the transformer its weights. `visit` works between `open` and `close`."""

    def open(self, work: PictureWork) -> Tiling:
        """Get ready for a run, keeping what an earlier one left there if it fits; says how to cut it.

        Raises BudgetError.
        """

    def told(self, work: PictureWork) -> str:
        """How a run would be cut and where its blocks would live, in words. Raises BudgetError if it cannot be."""

    def reserve(self, work: PictureWork, tiling: Tiling) -> None:
        """Get the memory of the steps ready; after `open`, with everything made that lives longer than a step."""

    def resume(self, work: PictureWork, tiling: Tiling) -> None:
        """Between two steps: `open` and `reserve` anew where somebody took the memory meanwhile. Raises BudgetError."""

    def visit(self, name: str) -> AbstractContextManager[None]: ...

    def close(self) -> None:
        """Give everything back; `open` works again afterwards."""


class ResidentWeights:
    """A model that has its weights."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config

    def open(self, work: PictureWork) -> Tiling:
        return next(tilings(self._config, work))

    def told(self, work: PictureWork) -> str:
        return f"slices of {self.open(work).told()}; all weights in place"

    def reserve(self, work: PictureWork, tiling: Tiling) -> None: ...

    def resume(self, work: PictureWork, tiling: Tiling) -> None: ...

    def visit(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None: ...


class StreamedWeights:
    """A model on the meta device, its weights streamed from `checkpoint`.

    `close` gives back memory and threads; the checkpoint stays mapped for as long as this lives, so that `open` can
    begin again. Of each file that keeps one descriptor, Python's own of the mapping.
    """

    def __init__(
        self, transformer: L2PTransformer, layout: ModelLayout, checkpoint: Checkpoint, streamer: Streamer
    ) -> None:
        self._transformer = transformer
        self._checkpoint = checkpoint
        self._streamer = streamer
        self._config = layout.config
        self._blocks, self._once = cut_into_blocks(layout)
        self._stream: WeightStream | None = None

    def open(self, work: PictureWork) -> Tiling:
        tiling, demand = self.choose(work)
        if self._stream is not None and not self._stream.closed:
            planned = self._stream.demand
            if demand.activations <= planned.activations and demand.host_bytes <= planned.host_bytes:
                return tiling
            self._stream.close()
        self._stream = self._streamer.open(self._transformer, self._checkpoint, demand)
        return tiling

    def told(self, work: PictureWork) -> str:
        tiling, demand = self.choose(work)
        return f"slices of {tiling.told()}; {self._streamer.told(demand, self._checkpoint)}"

    def reserve(self, work: PictureWork, tiling: Tiling) -> None:
        self._streamer.reserve(device_segments(self._config, work, tiling))

    def resume(self, work: PictureWork, tiling: Tiling) -> None:
        stream = self._stream
        self.open(work)
        if self._stream is not stream:
            self.reserve(work, tiling)

    def choose(self, work: PictureWork) -> tuple[Tiling, PhaseDemand]:
        """The largest slices whose activations leave room for the weights' ring. Raises BudgetError."""
        seconds = visit_seconds(self._config, work, self._blocks, CPU_FLOPS if work.on_cpu else CARD_FLOPS)
        refusal: BudgetError | None = None
        for tiling in tilings(self._config, work):
            activations = device_activations(self._config, work, tiling)
            phase = f"{work.width}x{work.height}"
            demand = PhaseDemand(phase, self._blocks, seconds, activations, self._once, work.host_bytes, work.to_align)
            try:
                self._streamer.require_room(self._checkpoint, demand)
            except BudgetError as error:
                refusal = error
            else:
                return tiling, demand
        assert refusal is not None, "there is always a first choice"
        raise refusal

    def visit(self, name: str) -> AbstractContextManager[None]:
        assert self._stream is not None, "open comes first"
        return self._stream.visit(name)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


def cut_into_blocks(layout: ModelLayout) -> tuple[list[Block], frozenset[str]]:
    """All weights of a model as blocks in the order of their visits, and the names of those visited once."""
    rest: dict[str, list[TensorSource]] = {CAPTION_EMBEDDER: [], IMAGE_EMBEDDER: [], LOCAL_DECODER: []}
    for source in layout.rest:
        rest[_part(source.name)].append(source)
    halves = _sublayers(layout)
    named = {name: tuple(sources) for name, sources in {**rest, **halves}.items()}
    once = [CAPTION_EMBEDDER, *(name for name in halves if name.startswith("context_refiner."))]
    rounds = [name for name in halves if name not in once]
    order = [*once, IMAGE_EMBEDDER, *rounds, LOCAL_DECODER]
    return [Block(name, named[name]) for name in order], frozenset(once)


def _sublayers(layout: ModelLayout) -> dict[str, list[TensorSource]]:
    """Name ("layers.3.attention") -> what it needs, in model order."""
    halves: dict[str, list[TensorSource]] = {f"{layer}.{kind}": [] for layer in layout.blocks for kind in SUBLAYERS}
    for layer, sources in layout.blocks.items():
        for source in sources:
            halves[f"{layer}.{sublayer_of(source.name.removeprefix(f'{layer}.'))}"].append(source)
    return halves


def _part(name: str) -> str:
    root = name.split(".", 1)[0]
    if root in _CAPTION_PARAMETERS:
        return CAPTION_EMBEDDER
    return LOCAL_DECODER if root == _DECODER_PARAMETERS else IMAGE_EMBEDDER


def visit_seconds(config: ModelConfig, work: PictureWork, blocks: list[Block], flops: float) -> dict[str, float]:
    """Seconds per visit of each block, all branches together, at `flops` operations a second."""
    seconds = {}
    for block in blocks:
        if block.name.startswith("context_refiner."):
            tokens, seen = work.branches * work.caption_tokens, work.caption_tokens
        elif block.name.startswith("noise_refiner."):
            seen = image_tokens(config, work.width, work.height)
            tokens = work.pictures * seen  # guided branches share them
        else:
            seen = work.tokens(config)
            tokens = work.branches * seen
        seconds[block.name] = _flops(config, block.name, tokens, seen) / flops if "." in block.name else 0.0
    decoder = work.branches * 2 * macs(DecoderJob.of(config, work.width, work.height), whole_plan(config.decoder))
    return seconds | {LOCAL_DECODER: decoder / flops}


def _flops(config: ModelConfig, name: str, tokens: int, seen: int) -> float:
    """Operations of a sublayer on `tokens`, each attending to `seen`."""
    dim = config.dim
    if name.endswith(FEED_FORWARD):
        return 2.0 * tokens * 3 * dim * config.ffn_dim
    return 2.0 * tokens * 4 * dim * dim + 4.0 * tokens * seen * dim
