"""How a run is cut: slice sizes of the transformer and tiles of the local decoder, from a small canonical set.

Slices change the last bits of a picture, so they depend on the budget only when they must: every run
takes the first, largest choice, and a smaller one only where the memory left does not hold it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from . import activations, int8_matmul, linear
from .config import IMAGE_CHANNELS, ModelConfig
from .decoder_memory import choose_plan
from .decoder_plan import DecoderJob, DecoderPlan, overhead
from .devices import stream_dtype
from .half_kernels import minding_address
from .model import padded_length
from .segment import LEAST_OWN_SEGMENT, reserved_bytes
from .slicing import SliceSizes

# (tokens, queries, heads) of the transformer and bytes of the local decoder, from the largest to the smallest.
_SMALLER_CHOICES = (
    (2048, 4096, 3, 500 << 20),
    (2048, 4096, 3, 250 << 20),
    (1024, 2048, 2, 125 << 20),
    (512, 1024, 1, 60 << 20),
    (256, 512, 1, 30 << 20),
)
_CARD_CHOICES = ((8192, 16384, 6, 3000 << 20), (4096, 8192, 6, 1000 << 20), *_SMALLER_CHOICES)
# A CPU gains from fewer tokens, whose tensors it finds again in its caches and its allocator (2112: a picture of
# 1024 x 1024 and a caption of up to 128 tokens are two slices), and from more heads: every group of them normalises
# and quantises the tokens anew, and six make a product of only 768 outputs.
_CPU_CHOICES = ((2112, 16384, 15, 3000 << 20), (2112, 8192, 6, 1000 << 20), *_SMALLER_CHOICES)
# Of the decoder's own peak: what a CPU's convolutions may take besides, where a kernel wants maps or weights in another
# order and copies them.
_CPU_CONVOLUTION_SHARE = 0.25
# Tokens of captions, short and as long as the text encoder makes them, that groups of heads are chosen for on cards.
_CAPTIONS = (32, 512)
# fp32 pictures that a step holds in host memory beside one velocity per branch: the sample, the guided
# velocity, the estimate, the next sample.
_PICTURES = 4
_PATCH_ROWS_PIXELS = 4 << 20
# What torch's allocator reserves on a card besides: small tensors, and what the ring is rounded up to.
_ALLOCATOR_BYTES = 12 << 20


@dataclass(frozen=True)
class PictureWork:
    """What a run computes on: the size of its pictures, how many of them, whether each has a second, guiding
    branch, and the longest caption's tokens (pads included). keys: of `SliceSizes`, given by the device. int8:
    whether INT8 weights may be multiplied in integers. on_cpu: computed where the host's memory is."""

    width: int
    height: int
    pictures: int
    guided: bool
    caption_tokens: int
    dtype: torch.dtype
    keys: int | None = None
    int8: bool = False
    on_cpu: bool = False

    @property
    def stream_itemsize(self) -> int:
        """Bytes of an element of token stream, embedders and decoder."""
        return stream_dtype(self.dtype).itemsize

    @property
    def to_align(self) -> frozenset[torch.dtype]:
        """Dtypes of weights that a CPU's kernels want aligned: those of activations, since others are converted first,
        where kernels mind. None are copied for anything but a CPU."""
        kinds = frozenset({self.dtype, stream_dtype(self.dtype)})
        return minding_address(kinds) if self.on_cpu else kinds

    @property
    def branches(self) -> int:
        return self.pictures * (2 if self.guided else 1)

    @property
    def pixel_bytes(self) -> int:
        """Of one picture in fp32."""
        return IMAGE_CHANNELS * self.width * self.height * 4

    @property
    def host_bytes(self) -> int:
        """What the sampler's pictures take in host memory."""
        return self.pixel_bytes * (self.pictures * _PICTURES + self.branches)

    def tokens(self, config: ModelConfig) -> int:
        """Of one branch, image and caption."""
        return activations.image_tokens(config, self.width, self.height) + padded_length(self.caption_tokens)


@dataclass(frozen=True)
class Tiling:
    """One way to cut a run. level: its place in the canonical set, 0 the largest slices."""

    level: int
    sizes: SliceSizes
    decoder: DecoderPlan

    def told(self) -> str:
        """`4096 tokens, 8192 queries, 6 heads, decoder tiles 512`."""
        tiles = "/".join(str(stage.tile or "whole") for stage in self.decoder.stages)
        sizes = self.sizes
        return f"{sizes.tokens} tokens, {sizes.queries} queries, {sizes.heads} heads, decoder tiles {tiles}"


def tilings(config: ModelConfig, work: PictureWork) -> Iterator[Tiling]:
    """The canonical choices for a run, from the largest slices to the smallest."""
    job = DecoderJob.of(config, work.width, work.height)
    # The strip of patches that is embedded together: a few megapixels, at least one row of patches.
    rows = max(1, _PATCH_ROWS_PIXELS // (config.patch_size * work.width))
    for level, (tokens, queries, heads, limit) in enumerate(_CPU_CHOICES if work.on_cpu else _CARD_CHOICES):
        try:
            decoder = _decoder_plan(job, limit, work.stream_itemsize)
        except ValueError:  # no plan is that small
            return
        sizes = SliceSizes(tokens, queries, min(heads, config.n_heads), work.keys, max(rows >> level, 1))
        tiling = Tiling(level, sizes, decoder)
        yield tiling if work.on_cpu else _with_more_heads(config, _typical(work), tiling)


def _typical(work: PictureWork) -> tuple[PictureWork, ...]:
    """Runs of the same size and dtype whose memory decides for all of them: a picture must not depend on the captions
    beside its own, nor a plan on what multiplies in the end."""
    return tuple(
        replace(work, pictures=1, guided=False, caption_tokens=tokens, int8=int8)
        for tokens in _CAPTIONS
        for int8 in (False, True)
    )


@lru_cache(maxsize=256)
def _with_more_heads(config: ModelConfig, works: tuple[PictureWork, ...], tiling: Tiling) -> Tiling:
    """With the largest groups of heads, all of one size, that take no more memory in any of `works`: where there are
    fewer tokens than a slice may have. A card is then given its work in fewer calls, which is what limits a fast one on
    small pictures."""
    for heads in range(config.n_heads, tiling.sizes.heads, -1):
        wider = replace(tiling, sizes=replace(tiling.sizes, heads=heads))
        if config.n_heads % heads == 0 and all(
            _widest_moment(config, work, wider) <= _widest_moment(config, work, tiling) for work in works
        ):
            return wider
    return tiling


@lru_cache(maxsize=256)
def _decoder_plan(job: DecoderJob, limit: int, itemsize: int) -> DecoderPlan:
    return choose_plan(job, limit, itemsize)


def device_activations(config: ModelConfig, work: PictureWork, tiling: Tiling) -> int:
    """Peak bytes beside the weights in the memory that computes: on the CPU the sampler's pictures too.

    The states and captions of every branch, and the widest moment of prelude, block and local decoder; on a card
    in the segments that torch's allocator makes of them.
    """
    if not work.on_cpu:
        return sum(device_segments(config, work, tiling)) + _kept_bytes(config, work) + _ALLOCATOR_BYTES
    captions = work.branches * activations.state_bytes(config, padded_length(work.caption_tokens), work.stream_itemsize)
    states = work.branches * activations.state_bytes(config, work.tokens(config), work.stream_itemsize)
    return states + captions + _widest_moment(config, work, tiling) + work.host_bytes


def device_segments(config: ModelConfig, work: PictureWork, tiling: Tiling) -> tuple[int, ...]:
    """What torch's allocator should reserve on a card, in bytes, so that a step fits without holes: one segment
    for the state of each branch, which lives all step, and one for everything that comes and goes."""
    state = activations.state_bytes(config, work.tokens(config), work.stream_itemsize)
    moment = _widest_moment(config, work, tiling)
    if state < LEAST_OWN_SEGMENT:
        return (reserved_bytes(work.branches * state + moment),)
    return (*[reserved_bytes(state)] * work.branches, reserved_bytes(moment))


def _kept_bytes(config: ModelConfig, work: PictureWork) -> int:
    """What torch's allocator reserves for captions, and for prompts as they came and as they were refined."""
    length, e = padded_length(work.caption_tokens), work.stream_itemsize
    caption = activations.state_bytes(config, length, e)
    features = length * config.caption_dim * e
    shared = reserved_bytes(max(caption, features))
    # Refining leaves them scattered: one segment more than they fill.
    return (-(-work.branches * (caption + 2 * features) // shared) + 1) * shared


def _widest_moment(config: ModelConfig, work: PictureWork, tiling: Tiling) -> int:
    """Most bytes beside states and captions: of prelude, block and local decoder."""
    e, r, tokens, sizes = work.dtype.itemsize, work.stream_itemsize, work.tokens(config), tiling.sizes
    device = torch.device("cpu" if work.on_cpu else "cuda")
    held = activations.group_weight_bytes(config, sizes, e)
    # Blocks convert weights to their dtype, everything else to that of the stream.
    converted = max(linear.converted_bytes(device, size, held) for size in {e, r})
    rows = min(sizes.tokens, tokens)
    layers = ((config.dim, config.dim), (config.dim, config.ffn_dim), (config.ffn_dim, config.dim))
    product = max(linear.product_bytes(device, work.dtype, rows, *layer) for layer in layers)
    working = int8_matmul.working_bytes(device, rows, config.ffn_dim) if work.int8 else 0
    # Even with INT8 arithmetic some layers may be dequantised: the file's own wish, or what it left in floats.
    block = activations.block_bytes(
        config,
        tokens,
        sizes,
        e,
        scratch_bytes=converted,
        int8_bytes=working,
        product_bytes=product,
        stream_itemsize=r,
    )
    prelude = activations.prelude_bytes(config, work.width, work.height, sizes, r) + converted
    room = max(block, prelude)
    epilogue = activations.epilogue_bytes(
        config, work.width, work.height, tiling.decoder, r, on_cpu=work.on_cpu, room=room
    )
    if work.on_cpu:
        epilogue += int(epilogue * _CPU_CONVOLUTION_SHARE)
    return max(room, epilogue)


def decoder_overhead(config: ModelConfig, work: PictureWork, tiling: Tiling) -> float:
    """Arithmetic of the tiled local decoder relative to the whole one."""
    return overhead(DecoderJob.of(config, work.width, work.height), tiling.decoder)
