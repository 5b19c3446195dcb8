"""Where a pipeline's transformer gets its weights from: it has them, or they stream.

Besides its transformer blocks the model is cut into three more: what a caption needs before its refiner,
what a picture needs before the first block, and the local decoder. A step visits, in this order,

    image_embedder, noise_refiner.*, layers.*, local_decoder

and a prompt, once before its first step, caption_embedder and context_refiner.*.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

from offload import Block, Checkpoint, TensorSource

from .config import TOKEN_MULTIPLE, ModelConfig
from .layout import ModelLayout
from .model import L2PTransformer
from .streaming import Streamer, WeightStream, Work

CAPTION_EMBEDDER, IMAGE_EMBEDDER, LOCAL_DECODER = "caption_embedder", "image_embedder", "local_decoder"
_CAPTION_PARAMETERS = ("cap_embedder", "cap_pad_token")
_DECODER_PARAMETERS = "local_decoder"
# Multiplications a second, for the planner alone: of a slow card and of one CPU core.
_FLOPS = {"cpu": 60e9}
_DEVICE_FLOPS = 20e12


@dataclass(frozen=True)
class PictureWork:
    """What a run computes on: the size of its pictures, how many branches share a visit, caption tokens of each."""

    width: int
    height: int
    branches: int
    caption_tokens: int
    dtype: torch.dtype


class TransformerWeights(Protocol):
    """Lends the transformer its weights. `visit` works between `open` and `close`."""

    def open(self, work: PictureWork) -> None:
        """Get ready for a run, keeping what an earlier one left there if it fits. Raises BudgetError."""

    def visit(self, name: str) -> AbstractContextManager[None]: ...

    def close(self) -> None:
        """Give everything back; `open` works again afterwards."""


class ResidentWeights:
    """A model that has its weights."""

    def open(self, work: PictureWork) -> None: ...

    def visit(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None: ...


class StreamedWeights:
    """A model on the meta device, its weights streamed from `checkpoint`, which is closed with it."""

    def __init__(
        self, transformer: L2PTransformer, layout: ModelLayout, checkpoint: Checkpoint, streamer: Streamer
    ) -> None:
        self._transformer = transformer
        self._checkpoint = checkpoint
        self._streamer = streamer
        self._config = layout.config
        self._blocks, self._once = cut_into_blocks(layout)
        self._stream: WeightStream | None = None

    def open(self, work: PictureWork) -> None:
        activations = activation_bytes(self._config, work)
        if self._stream is not None and not self._stream.closed:
            if activations <= self._stream.work.activations:
                return
            self._stream.close()
        seconds = visit_seconds(self._config, work, self._blocks, self._streamer.device.type)
        demand = Work(f"{work.width}x{work.height}", self._blocks, seconds, activations, self._once)
        self._stream = self._streamer.open(self._transformer, self._checkpoint, demand)

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
    named = {**{name: tuple(sources) for name, sources in rest.items()}, **layout.blocks}
    once = [CAPTION_EMBEDDER, *(name for name in layout.blocks if name.startswith("context_refiner."))]
    rounds = [name for name in layout.blocks if name not in once]
    order = [*once, IMAGE_EMBEDDER, *rounds, LOCAL_DECODER]
    return [Block(name, named[name]) for name in order], frozenset(once)


def _part(name: str) -> str:
    root = name.split(".", 1)[0]
    if root in _CAPTION_PARAMETERS:
        return CAPTION_EMBEDDER
    return LOCAL_DECODER if root == _DECODER_PARAMETERS else IMAGE_EMBEDDER


def image_tokens(config: ModelConfig, width: int, height: int) -> int:
    """Tokens of a picture, pads included."""
    tokens = (width // config.patch_size) * (height // config.patch_size)
    return -(-tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE


def activation_bytes(config: ModelConfig, work: PictureWork) -> int:
    """An upper estimate of what a step holds beside the weights, in bytes.

    Tokens of every branch; one branch's widest moment in a block; the local decoder's maps at full
    resolution; the picture, its noise and its estimate in fp32.
    """
    size = work.dtype.itemsize
    tokens = image_tokens(config, work.width, work.height) + work.caption_tokens
    streams = work.branches * tokens * config.dim * size
    block = tokens * max(3 * config.ffn_dim * size, config.dim * (7 * size + 16))
    pixels = work.width * work.height
    level = config.decoder.levels[0]
    decoder = pixels * size * (2 * level.encoder + 2 * level.up + level.out + 8)
    dequantised = 48 << 20
    return streams + max(block, decoder) + work.branches * pixels * 3 * 4 * 4 + dequantised


def visit_seconds(config: ModelConfig, work: PictureWork, blocks: list[Block], device_type: str) -> dict[str, float]:
    """Rough seconds per visit of each block, all branches together."""
    tokens = work.branches * (image_tokens(config, work.width, work.height) + work.caption_tokens)
    per_second = _FLOPS.get(device_type, _DEVICE_FLOPS)
    dim, ffn = config.dim, config.ffn_dim
    block = 2 * tokens * (4 * dim * dim + 3 * dim * ffn) + 4 * tokens * (tokens // max(work.branches, 1)) * dim
    return {b.name: (block if "." in b.name else block / 10) / per_second for b in blocks}
