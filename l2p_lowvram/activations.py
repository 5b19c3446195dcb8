"""Peak activation bytes of a denoising step from sizes alone: what a plan counts with before anything runs.

Letters: L tokens of a branch (image and caption, pads included), D token width, G = heads x head width of one
head group, F feed-forward width, T and Q tokens and queries of one slice, e bytes of an element, r of one of the
token stream, which is wider for fp16. All for one branch of batch 1. A kernel's own scratch, weights, what the
allocator rounds up, and a branch's modulation (4 D r, 60 KiB at full size, between two sublayers) are not in here.

    state       L (D r + 4 head width)                    token stream, RoPE table (complex64): lives all step
    block       L D e + 2 L G e                           attention result, keys and values of a head group
                + the larger of a projected slice and an attended slice,
                or L D e + an output slice, or the feed-forward's slice;
                beside any of them the scratch of converted weights, or slices in int8
    prelude     a strip of patches: pixels, patches, embedded rows; or making the RoPE table
    epilogue    `decoder_memory`
"""

from __future__ import annotations

from .config import IMAGE_CHANNELS, ModelConfig
from .decoder_memory import decoder_memory
from .decoder_plan import DecoderJob, DecoderPlan
from .model import padded_length
from .slicing import SliceSizes


def image_tokens(config: ModelConfig, width: int, height: int) -> int:
    """Image tokens of a picture, pads included."""
    return padded_length((width // config.patch_size) * (height // config.patch_size))


def state_bytes(config: ModelConfig, tokens: int, itemsize: int) -> int:
    """What a branch of `tokens` holds from the prelude to the epilogue: L (D e + head width / 2 * 8)."""
    return tokens * (config.dim * itemsize + config.head_dim // 2 * 8)


def group_weight_bytes(config: ModelConfig, sizes: SliceSizes, itemsize: int) -> int:
    """The rows of qkv that one head group needs, converted: they are held together."""
    return 3 * min(sizes.heads, config.n_heads) * config.head_dim * config.dim * itemsize


def block_bytes(
    config: ModelConfig,
    tokens: int,
    sizes: SliceSizes,
    itemsize: int,
    *,
    scratch_bytes: int,
    int8_bytes: int = 0,
    product_bytes: int = 0,
    stream_itemsize: int | None = None,
) -> int:
    """Most bytes alive beside the state while a block updates it in slices.

    itemsize: of what attention and feed-forward compute in. stream_itemsize: of the state; None: the same.
    scratch_bytes: of converted weights; 0 where they are stored in the activations' dtype, or none is converted.
    int8_bytes: `int8_matmul.working_bytes` where INT8 weights are multiplied in integers: then a slice of
    tokens stands in int8 too. 0 where they are not. product_bytes: `linear.product_bytes` of a slice of tokens, the
    most of any layer; 0 where no weight is converted.
    """
    dim, e, r = config.dim, itemsize, stream_itemsize or itemsize
    group = min(sizes.heads, config.n_heads) * config.head_dim
    slice_tokens, queries = min(sizes.tokens, tokens), min(sizes.queries, tokens)
    result, row, wide_row = tokens * dim * e, slice_tokens * dim * e, slice_tokens * dim * r
    widened = 0 if r == e else wide_row
    hidden = slice_tokens * config.ffn_dim * e
    row8, hidden8 = (row // e, hidden // e) if int8_bytes else (0, 0)
    # What attention reads is normalised in the state's dtype, then there in both.
    project = max(_project_bytes(slice_tokens, dim, group, e) + row8, wide_row + (0 if r == e else row))
    multiply = row + row8 + 3 * slice_tokens * group * e + int8_bytes
    attend = _attend_bytes(queries, group, sizes, config, e)
    attention = result + 2 * tokens * group * e + max(project, multiply, attend)
    beside = max(row8 + int8_bytes, product_bytes)
    output = result + max(2 * wide_row, 2 * row - row * (r == e) + max(beside, widened))
    feed_forward = row + max(2 * hidden + beside, hidden + row + max(hidden8 + int8_bytes, product_bytes, widened))
    return scratch_bytes + max(attention, output, feed_forward, 2 * wide_row)


def _project_bytes(tokens: int, dim: int, group: int, e: int) -> int:
    """A slice through norm, modulation (in place), projection, q/k norm and rotation; the rotation of k is the worst:
    beside h and q there are its input, the fp32 pairs (a view for fp32), the turned pairs and their result."""
    copied = 0 if e == 4 else 4 + e
    return tokens * dim * e + tokens * group * (2 * e + 4 + copied)


def _attend_bytes(queries: int, group: int, sizes: SliceSizes, config: ModelConfig, e: int) -> int:
    """The result of one slice of queries; with key tiles, the running sums and one tile of scores, in fp32."""
    if sizes.keys is None:
        return queries * group * e
    heads = group // config.head_dim
    return queries * group * 3 * 4 + heads * queries * sizes.keys * 4 + sizes.keys * group * 4


def prelude_bytes(config: ModelConfig, width: int, height: int, sizes: SliceSizes, itemsize: int) -> int:
    """Most bytes alive beside the state (and the states of other branches) while a picture is embedded."""
    patch, tokens = config.patch_size, image_tokens(config, width, height)
    rows = min(sizes.patch_rows, height // patch)
    pixels = IMAGE_CHANNELS * rows * patch * width * itemsize
    embedded = rows * (width // patch) * config.dim * itemsize
    # Before the table itself: angles twice (parts and whole), and ones of the same shape, all fp32.
    rope = tokens * config.head_dim // 2 * 12
    return max(2 * pixels + embedded, pixels + rope + embedded)


def epilogue_bytes(
    config: ModelConfig, width: int, height: int, plan: DecoderPlan, itemsize: int, *, on_cpu: bool, room: int = 0
) -> int:
    """Most bytes beside the states while the local decoder runs: on a card with the holes between tensors, in a
    segment of at least `room` bytes."""
    job = DecoderJob.of(config, width, height)
    return decoder_memory(job, plan, itemsize).tensors if on_cpu else decoder_memory(job, plan, itemsize, room).segment
