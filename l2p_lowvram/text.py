"""Prompts to features: chat template, tokenizer, and a Qwen3-shaped causal encoder.

Source: Qwen3 (Hugging Face layer names) as Z-Image uses it: the features are the
hidden states that enter the *last* layer, so that layer and the final norm never run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import TextEncoderConfig
from .linear import Linear, RMSNorm
from .scratch import Scratch

MAX_TOKENS = 512


def render_prompt(prompt: str) -> str:
    """The prompt in Qwen3's chat template, thinking enabled, no system message.

    The prompt is neither stripped nor escaped: special-token text inside it
    becomes special tokens, as in the reference.
    """
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


class PromptTokenizer:
    """A tokenizer applied to rendered prompts, cut to 512 tokens on the right; `tokenizer_file` reads one."""

    def __init__(self, encode: Callable[[str], Sequence[int]], identity: str = "") -> None:
        """encode: text -> token ids, special tokens recognised, nothing added. identity: names the vocabulary."""
        self._encode = encode
        self.identity = identity

    def __call__(self, prompt: str) -> list[int]:
        return list(self._encode(render_prompt(prompt)))[:MAX_TOKENS]


def rope_cos_sin(length: int, width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """(L, width) cosines and sines for rotate-half RoPE, fp32."""
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    angle = torch.arange(length, dtype=torch.float32, device=device)[:, None] / theta**exponent
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, L, D): first and second half of D are the real and imaginary parts."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)


class EncoderAttention(nn.Module):
    """Causal grouped-query attention with q/k RMSNorm per head before RoPE."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        inner = config.num_attention_heads * config.head_dim
        shared = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, inner, bias=False)
        self.k_proj = Linear(config.hidden_size, shared, bias=False)
        self.v_proj = Linear(config.hidden_size, shared, bias=False)
        self.o_proj = Linear(inner, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = rotate_half(self.q_norm(q).transpose(1, 2), cos, sin)
        k = rotate_half(self.k_norm(k).transpose(1, 2), cos, sin)
        o = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
        return self.o_proj(o.transpose(1, 2).flatten(2))


class EncoderMLP(nn.Module):
    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class EncoderLayer(nn.Module):
    """One Qwen3 decoder layer: two sublayers, self-attention and MLP, each added to the hidden states."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.self_attn = EncoderAttention(config)
        self.mlp = EncoderMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, L, hidden), cos and sin (L, head width) -> (B, L, hidden)."""
        return self.with_mlp(self.with_attention(x, cos, sin))

    def with_attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x + self.self_attn(self.input_layernorm(x), cos, sin)

    def with_mlp(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.post_attention_layernorm(x))


class Embedding(nn.Module):
    """Token rows (vocabulary, hidden), kept in their stored dtype and cast after the look-up."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, width) * 0.02)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        weight = self.weight.detach() if self.weight.dtype.itemsize == 1 else self.weight
        if weight.dtype.itemsize == 1:  # no gather for float8, so move its bytes
            return F.embedding(ids, weight.view(torch.uint8)).view(weight.dtype).to(dtype)
        return F.embedding(ids, weight).to(dtype)


# What a layer is made of, and the unit of streaming.
SUBLAYERS = SELF_ATTENTION, MLP = "self_attn", "mlp"
_OF_MLP = (MLP, "post_attention_layernorm")


def encoder_sublayer_of(parameter: str) -> str:
    """Which sublayer a parameter of a layer belongs to: "mlp.up_proj.weight" -> "mlp"."""
    return MLP if parameter.split(".", 1)[0] in _OF_MLP else SELF_ATTENTION


@dataclass(frozen=True)
class EncoderSublayer:
    """Half of a layer by name, "layers.3.self_attn" or "layers.3.mlp", for whoever drives the loop."""

    name: str
    layer: EncoderLayer
    kind: str

    def visit(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states (B, L, hidden) through the sublayer."""
        return self.layer.with_mlp(x) if self.kind == MLP else self.layer.with_attention(x, cos, sin)


class TextEncoder(nn.Module):
    """Token ids -> hidden states before the last layer.

    Holds only what is needed: the embedding and all layers but the last.
    prelude -> sublayers, like the transformer; there is no epilogue.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers - 1))
        self.scratch = Scratch()
        self.scratch.share(self)

    def sublayers(self) -> list[EncoderSublayer]:
        """In the order they run."""
        return [
            EncoderSublayer(f"layers.{index}.{kind}", layer, kind)  # type: ignore[arg-type]
            for index, layer in enumerate(self.layers)
            for kind in SUBLAYERS
        ]

    def check_ids(self, input_ids: Tensor) -> None:
        """Raise ValueError unless input_ids is (B, L) of tokens that the vocabulary has."""
        if input_ids.dim() != 2 or input_ids.shape[1] < 1:
            raise ValueError(f"input_ids must have shape (batch, tokens), got {list(input_ids.shape)}")
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"token id {high if low >= 0 else low} is outside the encoder's vocabulary of "
                f"{self.config.vocab_size}; does the tokenizer belong to this text encoder?"
            )

    def prelude(self, input_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """input_ids (B, L) -> embedded tokens (B, L, hidden), RoPE cosines and sines.

        Ids are rows of the embedding at hand; `check_ids` says whether they are tokens.
        """
        cos, sin = rope_cos_sin(input_ids.shape[1], self.config.head_dim, self.config.rope_theta, input_ids.device)
        return self.embed_tokens(input_ids, dtype), cos, sin

    def forward(self, input_ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """input_ids (B, L), unpadded -> (B, L, hidden): the features of every token."""
        self.check_ids(input_ids)
        x, cos, sin = self.prelude(input_ids, dtype)
        for sublayer in self.sublayers():
            x = sublayer.visit(x, cos, sin)
        return x
