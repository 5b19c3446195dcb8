"""The L2P transformer: Z-Image's single-stream diffusion transformer on pixel patches.

prelude -> blocks -> epilogue. The blocks are visited in order and only ever see
one token stream, so whoever drives the loop decides where their weights live
and how many branches share a visit. `Slices` says how a block computes: all
tokens at once, or in slices that update the token stream in place:

    state = model.prelude(pixels, t, model.encode_caption(features))
    for block in model.blocks():
        state = block.visit(state)
    velocity = model.epilogue(state, pixels)

A block is two sublayers, attention and feed-forward, with weights of their own; `model.sublayers()` can be visited
in place of the blocks, for whoever has room for one of them at a time.

Shape letters: B batch, L tokens, D token width, H heads, C channels.
Source: the L2P and Z-Image reference implementations; their layer names are kept
in the form that fuses to_q, to_k, to_v into `qkv`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import (
    IMAGE_CHANNELS,
    NORM_EPS,
    ROPE_THETA,
    TIMESTEP_FREQUENCIES,
    TIMESTEP_SCALE,
    TOKEN_MULTIPLE,
    ModelConfig,
)
from .decoder import LocalDecoder
from .int8_matmul import Int8Matmul
from .linear import Linear, RMSNorm
from .scratch import Scratch

PerToken = Callable[..., "Tensor | tuple[Tensor, ...]"]


def all_tokens(function: PerToken, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """outputs := function(*inputs), in one go."""
    results = function(*inputs)
    for output, result in zip(outputs, (results,) if isinstance(results, Tensor) else results, strict=True):
        output.copy_(result)


def attend_all(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """out := attention of all queries, in one go. All (B, H, L, D); out may be q."""
    out.copy_(F.scaled_dot_product_attention(q, k, v))


@dataclass(frozen=True)
class Slices:
    """How a block works on its token stream in place, so that only the stream itself exists as a whole.

    tokenwise(function, inputs, outputs): outputs := function(*inputs), where function treats every position
        of axis -2 on its own, so that it may run on a few positions at a time. An output may be an input.
    attend(q, k, v, out): attention into `out`, which may be q.
    heads: attention heads whose keys and values exist together; None: all.
    patch_rows: rows of patches that are embedded together; None: all.
    """

    tokenwise: Callable[[PerToken, Sequence[Tensor], Sequence[Tensor]], None] = all_tokens
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], None] = attend_all
    heads: int | None = None
    patch_rows: int | None = None

    def __post_init__(self) -> None:
        for name in ("heads", "patch_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def patchify(pixels: Tensor, patch: int) -> Tensor:
    """(B, 3, H, W) -> (B, H/patch * W/patch, patch * patch * 3): patches row by row,
    inside a patch row, column, channel with the channel fastest."""
    batch, channels, height, width = pixels.shape
    x = pixels.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


# Others (MPS, some of Intel's) have none.
_WITH_FLOAT64 = ("cpu", "cuda", "meta")


def rope_table(positions: Tensor, axes: Sequence[int], out: Tensor | None = None) -> Tensor:
    """positions (L, 3) -> complex rotations (L, sum(axes) / 2), complex64; in `out` where given.

    Channel pair i of an axis of width d turns by position * 256^(-2i/d);
    frequencies in float64, the angle rounded to fp32 as the reference does; on the CPU for devices without float64.
    """
    device = positions.device
    if device.type not in _WITH_FLOAT64:
        positions = positions.cpu()
    columns = []
    for axis, width in enumerate(axes):
        exponent = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
        angle = positions[:, axis, None].double() / ROPE_THETA**exponent
        columns.append(angle.float())
    angles = torch.cat(columns, dim=1).to(device)
    return torch.polar(torch.ones_like(angles), angles, out=out)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn neighbouring channel pairs of x (B, L, H, D) by rope (L, D/2), in fp32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope[:, None]).flatten(-2).to(x.dtype)


# What a product of fp16 rows is scaled down to. fp16 ends at 65,504, while the published model multiplies up to
# 344,064 (layers.0.feed_forward.w2 reads it); so a layer may still make 4096 times what it reads. What becomes too
# small for fp16 thereby is under 2^-18 of the row's largest.
_LARGEST_FP16 = 16


def fp16_factor(*rows: Tensor) -> Tensor:
    """(..., 1) in fp16: the power of two, at most 1, that keeps the product of `rows` (..., K) within 16.

    Exact to multiply with and to divide by, short of what becomes too small for fp16. Never under 2^-24, the smallest
    number of fp16, with which the product of the largest two is 256.
    """
    bound = torch.ones((), device=rows[0].device)
    for row in rows:
        low, high = row.aminmax(dim=-1, keepdim=True)
        bound = bound * torch.maximum(high, -low).float()
    return torch.exp2(-(bound / _LARGEST_FP16).log2().ceil().clamp(min=0, max=24)).to(torch.float16)


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor; in place of x, which nothing else holds, where autograd does not need it."""
    return x * factor if torch.is_grad_enabled() else x.mul_(factor)


class SelfAttention(nn.Module):
    """Self-attention with q/k RMSNorm before RoPE; one fused projection for q, k and v."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.out = Linear(dim, dim, bias=False)
        self.q_norm = RMSNorm(dim // n_heads, NORM_EPS)
        self.k_norm = RMSNorm(dim // n_heads, NORM_EPS)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).unbind(2)  # each (B, L, H, D)
        q = rotate(self.q_norm(q), rope)
        k = rotate(self.k_norm(k), rope)
        o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.project(o.transpose(1, 2).flatten(2))

    def project(self, o: Tensor) -> Tensor:
        """out(o); in fp32 for fp16, whose sums need not fit."""
        if o.dtype != torch.float16:
            return self.out(o)
        factor = fp16_factor(o)
        return self.out(o * factor).float().div_(factor)

    def attended(
        self, x: Tensor, prepare: Callable[[Tensor], Tensor], rope: Tensor, slices: Slices, dtype: torch.dtype
    ) -> Tensor:
        """What `out` reads, (B, L, D) of `dtype`: all heads side by side, made for a group of heads at a time.

        x (B, L, D); prepare turns rows of it into what qkv reads, of `dtype`. Beside the result there are keys and
        values of one group: its queries stand where its result will, in the result's columns.
        """
        batch, length, dim = x.shape
        result = x.new_empty(batch, length, dim, dtype=dtype)
        group = min(slices.heads or self.n_heads, self.n_heads) * (dim // self.n_heads)
        keys_values = x.new_empty(2, batch, length, group, dtype=dtype)
        for start in range(0, dim, group):
            columns = slice(start, min(start + group, dim))
            k, v = keys_values[..., : columns.stop - start]
            self._attend_heads(x, prepare, rope, slices, columns, (result[..., columns], k, v))
        return result

    def _attend_heads(
        self,
        x: Tensor,
        prepare: Callable[[Tensor], Tensor],
        rope: Tensor,
        slices: Slices,
        columns: slice,
        qkv: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """The heads of `columns`: q, k, v into the buffers qkv (B, L, columns), the result over q."""
        dim, width = x.shape[-1], x.shape[-1] // self.n_heads
        # Rows of the fused projection: first those of q, then k's, then v's.
        rows = [slice(part * dim + columns.start, part * dim + columns.stop) for part in range(3)]
        to_q, to_k, to_v = self.qkv.rows(rows, qkv[0].dtype, x.shape[:-1].numel())

        def project(x: Tensor, rope: Tensor) -> tuple[Tensor, ...]:
            h = self.qkv.read(prepare(x))
            q = rotate(self.q_norm(to_q(h).unflatten(-1, (-1, width))), rope).flatten(-2)
            k = rotate(self.k_norm(to_k(h).unflatten(-1, (-1, width))), rope).flatten(-2)
            return q, k, to_v(h)

        slices.tokenwise(project, (x, rope), qkv)
        q, k, v = (tensor.unflatten(-1, (-1, width)).transpose(1, 2) for tensor in qkv)
        slices.attend(q, k, v, q)


class FeedForward(nn.Module):
    """SwiGLU: w2(SiLU(w1 x) * w3 x)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = Linear(dim, hidden, bias=False)
        self.w2 = Linear(hidden, dim, bias=False)
        self.w3 = Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """In fp32 for fp16, where the product of a row is scaled to fit."""
        read = self.w1.read(x)
        hidden = F.silu(self.w1(read), inplace=not torch.is_grad_enabled())
        if x.dtype == torch.float16:
            other = self.w3(read)
            del read
            factor = fp16_factor(hidden, other)
            hidden = hidden.mul_(other.mul_(factor))
            del other
            return self.w2(hidden).float().div_(factor)
        # The widest tensors of the model: no third one for the product where autograd does not need all.
        hidden = hidden * self.w3(read) if torch.is_grad_enabled() else hidden.mul_(self.w3(read))
        del read
        return self.w2(hidden)


# What a block is made of, and the unit of streaming. A parameter of a block belongs to the attention unless its name
# in there begins with one of the others.
SUBLAYERS = ATTENTION, FEED_FORWARD = "attention", "feed_forward"
_OF_FEED_FORWARD = (FEED_FORWARD, "ffn_norm1", "ffn_norm2")


def sublayer_of(parameter: str) -> str:
    """Which sublayer a parameter of a block belongs to: "feed_forward.w1.weight" -> "feed_forward"."""
    return FEED_FORWARD if parameter.split(".", 1)[0] in _OF_FEED_FORWARD else ATTENTION


class TransformerBlock(nn.Module):
    """One transformer layer: two sublayers, attention and feed-forward, each added to the token stream.

    With `modulated`, scales and tanh gates come from the timestep embedding
    through adaLN; without (context refiner), scale is 1 and gate is 1.
    narrow: what attention and feed-forward compute in, where that is not the token stream's dtype.
    """

    def __init__(self, config: ModelConfig, *, modulated: bool) -> None:
        super().__init__()
        dim = config.dim
        self.attention = SelfAttention(dim, config.n_heads)
        self.feed_forward = FeedForward(dim, config.ffn_dim)
        self.attention_norm1 = RMSNorm(dim, NORM_EPS)
        self.attention_norm2 = RMSNorm(dim, NORM_EPS)
        self.ffn_norm1 = RMSNorm(dim, NORM_EPS)
        self.ffn_norm2 = RMSNorm(dim, NORM_EPS)
        self.adaLN_modulation = nn.Sequential(Linear(config.timestep_dim, 4 * dim)) if modulated else None
        self.narrow: torch.dtype | None = None
        Scratch().share(self)

    def use_int8(self, matmul: Int8Matmul | None) -> None:
        """Multiply attention's and feed-forward's INT8 weights with INT8 activations; None: dequantise them.

        adaLN never: it computes on one row, and on what every token depends on.
        """
        for layer in (self.attention.qkv, self.attention.out, *self.feed_forward.children()):
            assert isinstance(layer, Linear)
            layer.int8_matmul = matmul

    def forward(self, x: Tensor, rope: Tensor, timestep_embedding: Tensor | None = None) -> Tensor:
        """x (B, L, D), rope (L, head width / 2), timestep_embedding (B, T) -> (B, L, D)."""
        modulation = self.modulation(timestep_embedding)
        return self.feed_forward_added(self.with_attention(x, rope, modulation), modulation)

    def update_(self, x: Tensor, rope: Tensor, timestep_embedding: Tensor | None, slices: Slices) -> None:
        """`forward` with the result in place of x, in slices. Beside x there are the attention's result
        (B, L, D), keys and values of one group of heads, and whatever one slice needs.

        The same operations on the same rows: exact up to the order in which kernels sum for other shapes.
        """
        modulation = self.modulation(timestep_embedding)
        self.add_attention_(x, rope, modulation, slices)
        self.add_feed_forward_(x, modulation, slices)

    def with_attention(self, x: Tensor, rope: Tensor, modulation: tuple[Tensor, ...] | None) -> Tensor:
        """The first sublayer: x (B, L, D) with attention added."""
        o = self.attention(self.attention_input(x, modulation), rope)
        return self.attention_added(x, o, modulation)

    def add_attention_(self, x: Tensor, rope: Tensor, modulation: tuple[Tensor, ...] | None, slices: Slices) -> None:
        """`with_attention` in place of x, in slices."""
        dtype = self.narrow or x.dtype
        o = self.attention.attended(x, lambda x: self.attention_input(x, modulation), rope, slices, dtype)

        def add_attention(x: Tensor, o: Tensor) -> Tensor:
            return self.attention_added(x, self.attention.project(o), modulation)

        slices.tokenwise(add_attention, (x, o), (x,))

    def add_feed_forward_(self, x: Tensor, modulation: tuple[Tensor, ...] | None, slices: Slices) -> None:
        """The second sublayer, `feed_forward_added` in place of x (B, L, D), in slices."""
        slices.tokenwise(lambda x: self.feed_forward_added(x, modulation), (x,), (x,))

    def modulation(self, timestep_embedding: Tensor | None) -> tuple[Tensor, ...] | None:
        """(scale_attn, gate_attn, scale_ffn, gate_ffn), each (B, 1, D) and ready to multiply with; None without."""
        if self.adaLN_modulation is None:
            return None
        modulation = self.adaLN_modulation(timestep_embedding).unsqueeze(1)
        scale_attn, gate_attn, scale_ffn, gate_ffn = modulation.chunk(4, dim=-1)
        return 1 + scale_attn, gate_attn.tanh(), 1 + scale_ffn, gate_ffn.tanh()

    # The three steps below treat every token on its own: any rows of x (B, L, D) will do. The last is the second
    # sublayer, whole.

    def attention_input(self, x: Tensor, modulation: tuple[Tensor, ...] | None) -> Tensor:
        h = self.attention_norm1(x)
        if modulation is not None:
            h = _times(h, modulation[0])
        return h.to(self.narrow or x.dtype)

    def attention_added(self, x: Tensor, o: Tensor, modulation: tuple[Tensor, ...] | None) -> Tensor:
        o = self.attention_norm2(o).to(x.dtype)
        return x + o if modulation is None else x + _times(o, modulation[1])

    def feed_forward_added(self, x: Tensor, modulation: tuple[Tensor, ...] | None) -> Tensor:
        h = self.ffn_norm1(x)
        if modulation is not None:
            h = _times(h, modulation[2])
        h = h.to(self.narrow or x.dtype)
        h = self.ffn_norm2(self.feed_forward(h)).to(x.dtype)
        return x + h if modulation is None else x + _times(h, modulation[3])


class TimestepEmbedder(nn.Module):
    """t = 1 - sigma -> (B, timestep_dim), through a 256-wide sinusoid (cosines first)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            Linear(TIMESTEP_FREQUENCIES, config.timestep_hidden),
            nn.SiLU(),
            Linear(config.timestep_hidden, config.timestep_dim),
        )

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        half = TIMESTEP_FREQUENCIES // 2
        index = torch.arange(half, dtype=torch.float32, device=t.device)
        angle = (t * TIMESTEP_SCALE).float()[:, None] * torch.exp(-math.log(10000.0) * index / half)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype))


@dataclass(frozen=True)
class Caption:
    """A prompt as the transformer sees it: refined once, used in every step.

    tokens (B, L, D) with L a multiple of 32, pads included; rope (L, head width / 2).
    """

    tokens: Tensor
    rope: Tensor

    @property
    def length(self) -> int:
        return self.tokens.shape[1]


@dataclass(frozen=True)
class Room:
    """Memory of a branch's state: tokens (B, L, D) and their rope (L, head width / 2), image and caption."""

    tokens: Tensor
    rope: Tensor


@dataclass(frozen=True)
class State:
    """One branch on its way through the blocks.

    tokens (B, L, D): the image tokens (pads included) while the noise refiner
    runs, image then caption tokens afterwards. rope fits `tokens`.
    room: where given, a room that starts with `tokens`, has space for the caption
    behind, and the whole rope, so that joining copies the caption alone.
    modulation: of the block whose attention was visited last, until its feed-forward is.
    """

    tokens: Tensor
    rope: Tensor
    timestep_embedding: Tensor
    caption: Caption
    joined: bool = False
    room: Room | None = None
    modulation: tuple[Tensor, ...] | None = None

    def join(self) -> State:
        """Append the caption tokens, once."""
        if self.joined:
            return self
        if self.room is not None:
            self.room.tokens[:, self.tokens.shape[1] :] = self.caption.tokens
            return replace(self, tokens=self.room.tokens, rope=self.room.rope, joined=True, room=None)
        tokens = torch.cat([self.tokens, self.caption.tokens.expand(self.tokens.shape[0], -1, -1)], dim=1)
        return replace(self, tokens=tokens, rope=torch.cat([self.rope, self.caption.rope]), joined=True)

    def copied_to(self, room: Room) -> State:
        """The state in another room of the same size; before joining."""
        assert self.room is not None
        length = self.tokens.shape[1]
        room.tokens[:, :length] = self.tokens
        room.rope.copy_(self.room.rope)
        return replace(self, tokens=room.tokens[:, :length], rope=room.rope[:length], room=room)


@dataclass(frozen=True)
class Block:
    """A named unit of the transformer: `module`'s weights are all that a visit needs.

    joint: runs on image and caption tokens together (else on image tokens alone).
    """

    name: str
    module: TransformerBlock
    joint: bool

    def visit(self, state: State, slices: Slices | None = None) -> State:
        """The state after this block. With `slices` its tokens are updated in place."""
        state = state.join() if self.joint else state
        if slices is not None:
            self.module.update_(state.tokens, state.rope, state.timestep_embedding, slices)
            return state
        tokens = self.module(state.tokens, state.rope, state.timestep_embedding)
        return replace(state, tokens=tokens)

    def sublayers(self) -> list[Sublayer]:
        """The two that together do what a visit does, in this order."""
        return [Sublayer(f"{self.name}.{kind}", self, kind) for kind in SUBLAYERS]


@dataclass(frozen=True)
class Sublayer:
    """Half of a block, by name: "layers.3.attention", "layers.3.feed_forward". A visit needs its own weights alone.

    kind: ATTENTION, which brings the modulation of both, or FEED_FORWARD.
    """

    name: str
    block: Block
    kind: str

    @property
    def joint(self) -> bool:
        return self.block.joint

    def visit(self, state: State, slices: Slices | None = None) -> State:
        """The state after this sublayer. With `slices` its tokens are updated in place."""
        module = self.block.module
        if self.kind == ATTENTION:
            state = state.join() if self.joint else state
            modulation = module.modulation(state.timestep_embedding)
            if slices is None:
                tokens = module.with_attention(state.tokens, state.rope, modulation)
                return replace(state, tokens=tokens, modulation=modulation)
            module.add_attention_(state.tokens, state.rope, modulation, slices)
            return replace(state, modulation=modulation)
        if slices is None:
            tokens = module.feed_forward_added(state.tokens, state.modulation)
            return replace(state, tokens=tokens, modulation=None)
        module.add_feed_forward_(state.tokens, state.modulation, slices)
        return replace(state, modulation=None)

    def refine(self, caption: Caption) -> Caption:
        """The caption after this sublayer of the context refiner, which knows no timestep."""
        module = self.block.module
        if self.kind == ATTENTION:
            return replace(caption, tokens=module.with_attention(caption.tokens, caption.rope, None))
        return replace(caption, tokens=module.feed_forward_added(caption.tokens, None))


class L2PTransformer(nn.Module):
    """Predicts the velocity (noise - picture) of a noisy picture, in pixel space."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.x_embedder = Linear(config.patch_size**2 * IMAGE_CHANNELS, dim)
        self.x_pad_token = nn.Parameter(torch.zeros(1, dim))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, dim))
        self.t_embedder = TimestepEmbedder(config)
        self.cap_embedder = nn.Sequential(RMSNorm(config.caption_dim, NORM_EPS), Linear(config.caption_dim, dim))
        self.noise_refiner = self._blocks(config.n_noise_refiner, modulated=True)
        self.context_refiner = self._blocks(config.n_context_refiner, modulated=False)
        self.layers = self._blocks(config.n_layers, modulated=True)
        self.local_decoder = LocalDecoder(config.decoder, dim)
        self.scratch = Scratch()
        self.scratch.share(self)

    def use_int8(self, matmul: Int8Matmul | None) -> None:
        """`TransformerBlock.use_int8` of every block. Embedders and timestep are never multiplied in INT8."""
        for blocks in (self.noise_refiner, self.context_refiner, self.layers):
            for _, block in self._numbered(blocks):
                block.use_int8(matmul)

    def narrow_blocks(self, dtype: torch.dtype | None) -> None:
        """Let attention and feed-forward compute in `dtype`, whatever the token stream's is; None: in the stream's.

        For fp16: its token stream, embedders and decoder are fp32, where nothing overflows.
        """
        for blocks in (self.noise_refiner, self.context_refiner, self.layers):
            for _, block in self._numbered(blocks):
                block.narrow = dtype

    def _blocks(self, count: int, *, modulated: bool) -> nn.ModuleList:
        return nn.ModuleList(TransformerBlock(self.config, modulated=modulated) for _ in range(count))

    def blocks(self) -> list[Block]:
        """The blocks of one denoising step, in the order they run (context refiner apart)."""
        return [Block(f"noise_refiner.{i}", m, joint=False) for i, m in self._numbered(self.noise_refiner)] + [
            Block(f"layers.{i}", m, joint=True) for i, m in self._numbered(self.layers)
        ]

    def sublayers(self) -> list[Sublayer]:
        """Those of `blocks`, in the order they run."""
        return [sublayer for block in self.blocks() for sublayer in block.sublayers()]

    def refiner_sublayers(self) -> list[Sublayer]:
        """Those of the context refiner, in the order they refine a caption."""
        refiner = (Block(f"context_refiner.{i}", m, joint=False) for i, m in self._numbered(self.context_refiner))
        return [sublayer for block in refiner for sublayer in block.sublayers()]

    @staticmethod
    def _numbered(modules: nn.ModuleList) -> Iterator[tuple[int, TransformerBlock]]:
        for index, module in enumerate(modules):
            assert isinstance(module, TransformerBlock)
            yield index, module

    def embed_caption(self, features: Tensor | Sequence[Tensor], dtype: torch.dtype) -> Caption:
        """Text features (L, C), or a batch of them whose padded lengths agree, as unrefined tokens.

        Pads up to a multiple of 32 are real tokens: attended to, updated, and
        counted in the positions. Raises ValueError for an empty or misshapen caption.
        """
        batch = [features] if isinstance(features, Tensor) else list(features)
        width = self.config.caption_dim
        for item in batch:
            if item.dim() != 2 or item.shape[0] < 1 or item.shape[1] != width:
                raise ValueError(f"text features must have shape (tokens, {width}), got {list(item.shape)}")
        lengths = {padded_length(item.shape[0]) for item in batch}
        if len(lengths) > 1:
            raise ValueError(f"captions of one batch must pad to the same length, got {sorted(lengths)}")
        length = lengths.pop()
        rows = [pad_rows(self.cap_embedder(item.to(dtype)), length, self.cap_pad_token) for item in batch]
        position = torch.zeros(length, 3, dtype=torch.float32, device=rows[0].device)
        position[:, 0] = torch.arange(1, length + 1)
        return Caption(torch.stack(rows), rope_table(position, self.config.rope_axes))

    def encode_caption(
        self,
        features: Tensor | Sequence[Tensor],
        dtype: torch.dtype = torch.float32,
    ) -> Caption:
        """`embed_caption` and the context refiner, which sees neither picture nor timestep:
        the result holds for every step of a run."""
        caption = self.embed_caption(features, dtype)
        for _, block in self._numbered(self.context_refiner):
            caption = replace(caption, tokens=block(caption.tokens, caption.rope, None))
        return caption

    def room(self, pixels: Tensor, caption: Caption) -> Room:
        """What `prelude` in slices fills, its values garbage, on the caption's device and in its dtype."""
        patch, tokens = self.config.patch_size, caption.tokens
        length = padded_length(pixels.shape[-2] // patch * (pixels.shape[-1] // patch)) + caption.length
        return Room(
            tokens.new_empty(pixels.shape[0], length, self.config.dim),
            caption.rope.new_empty(length, caption.rope.shape[1]),
        )

    def prelude(
        self, pixels: Tensor, t: Tensor, caption: Caption, slices: Slices | None = None, room: Room | None = None
    ) -> State:
        """pixels (B, 3, H, W) and t (B,) = 1 - sigma -> the state that enters the first block.

        With `slices` the pixels may live anywhere and have any float dtype: some rows of patches at a time
        become the caption's dtype on its device, in `room`, or a new one.
        """
        height, width = pixels.shape[-2:]
        self.config.check_size(width, height)
        patch = self.config.patch_size
        grid = (height // patch, width // patch)
        if slices is not None:
            room = self.room(pixels, caption) if room is None else room
            return self._prelude_in_slices(pixels, t, caption, grid, slices, room)
        rows = self.x_embedder(patchify(pixels, patch))
        length = padded_length(rows.shape[1])
        tokens = torch.stack([pad_rows(row, length, self.x_pad_token) for row in rows])
        rope = rope_table(image_positions(grid, caption.length, length, pixels.device), self.config.rope_axes)
        return State(tokens, rope, self.t_embedder(t, pixels.dtype), caption)

    def _prelude_in_slices(
        self, pixels: Tensor, t: Tensor, caption: Caption, grid: tuple[int, int], slices: Slices, room: Room
    ) -> State:
        """Embeds rows of patches straight into the room."""
        patch, (rows, columns) = self.config.patch_size, grid
        used, length = rows * columns, padded_length(rows * columns)
        device, dtype = caption.tokens.device, caption.tokens.dtype
        step = slices.patch_rows or rows
        for row in range(0, rows, step):
            strip = pixels[:, :, row * patch : (row + step) * patch].to(device, dtype)
            start = row * columns
            room.tokens[:, start : min(start + step * columns, used)] = self.x_embedder(patchify(strip, patch))
        room.tokens[:, used:length] = self.x_pad_token.to(dtype)
        positions = image_positions(grid, caption.length, length, device)
        rope_table(positions, self.config.rope_axes, room.rope[:length])
        room.rope[length:] = caption.rope
        timestep = self.t_embedder(t.to(device), dtype)
        return State(room.tokens[:, :length], room.rope[:length], timestep, caption, room=room)

    def epilogue(self, state: State, pixels: Tensor) -> Tensor:
        """The state after the last block -> velocity (B, 3, H, W)."""
        return -self.local_decoder(pixels, self.feature_map(state, pixels))

    def feature_map(self, state: State, pixels: Tensor) -> Tensor:
        """The image tokens of a finished state as (B, D, H/patch, W/patch); pads are dropped."""
        patch = self.config.patch_size
        rows, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
        return state.tokens[:, : rows * columns].transpose(1, 2).unflatten(2, (rows, columns))

    def forward(
        self,
        pixels: Tensor,
        t: Tensor,
        caption: Caption,
        slices: Slices | None = None,
    ) -> Tensor:
        """pixels (B, 3, H, W) at noise level sigma, t (B,) = 1 - sigma -> velocity (B, 3, H, W)."""
        state = self.prelude(pixels, t, caption, slices)
        for block in self.blocks():
            state = block.visit(state, slices)
        return self.epilogue(state, pixels)


def padded_length(tokens: int) -> int:
    return -(-tokens // TOKEN_MULTIPLE) * TOKEN_MULTIPLE


def pad_rows(rows: Tensor, length: int, pad: Tensor) -> Tensor:
    """rows (L, D) followed by copies of pad (1, D) up to `length`."""
    return torch.cat([rows, pad.to(rows.dtype).expand(length - rows.shape[0], -1)])


def image_positions(grid: tuple[int, int], caption_length: int, length: int, device: torch.device) -> Tensor:
    """(length, 3): (caption_length + 1, row, column) per image token, (0, 0, 0) per pad."""
    rows, columns = grid
    position = torch.zeros(length, 3, dtype=torch.float32, device=device)
    used = position[: rows * columns].view(rows, columns, 3)
    used[..., 0] = caption_length + 1
    used[..., 1] = torch.arange(rows, device=device)[:, None]
    used[..., 2] = torch.arange(columns, device=device)
    return position
