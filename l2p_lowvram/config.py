"""What a model is: frozen descriptions that the modules are built from.

Every value here can be read from a checkpoint's tensor shapes, except the RoPE
axes (see `DEFAULT_ROPE_AXES`) and the sampling defaults.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

# Fixed by the architecture, the same in every published checkpoint.
IMAGE_CHANNELS = 3
TOKEN_MULTIPLE = 32  # both token streams are padded to a multiple of this
TIMESTEP_FREQUENCIES = 256  # width of the sinusoid
TIMESTEP_SCALE = 1000.0
ROPE_THETA = 256.0
NORM_EPS = 1e-5

# (caption/sequence, row, column) channels of one head, for the published head width.
DEFAULT_ROPE_AXES = {128: (32, 48, 48)}

# How far img2img departs from its picture where nobody says.
DEFAULT_STRENGTH = 0.6
# Of a picture, in pixels: far more than any model draws, and what planning takes a minute to refuse.
MAX_SIDE = 65_536
# Of steps, or pictures of one command: far more than anybody waits for.
MAX_COUNT = 65_536
MAX_SEED = 2**63 - 1  # what torch's generators take
_LARGEST_DEFAULT = 1_000_000  # of any sampling default: a file's word is not taken for more


@dataclass(frozen=True)
class DecoderLevel:
    """One resolution of the local decoder.

    `name` is the suffix of its layers in the checkpoint (`enc1` -> "1").
    encoder: channels of its skip map; up: channels after the upsampling conv;
    out: channels its `dec` layer hands to the next shallower level.
    """

    name: str
    encoder: int
    up: int
    out: int


@dataclass(frozen=True)
class DecoderConfig:
    """The local decoder: levels from full resolution downwards, and the bottleneck width."""

    levels: tuple[DecoderLevel, ...]
    bottleneck: int

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("the local decoder needs at least one level")

    @property
    def pooling(self) -> int:
        """Pixels per bottleneck cell and side: every level halves the map once."""
        return 2 ** len(self.levels)


@dataclass(frozen=True)
class SamplingDefaults:
    """What a model is sampled with when the caller names nothing."""

    width: int = 1024
    height: int = 1024
    steps: int = 30
    cfg_scale: float = 2.0
    shift: float = 3.0

    def updated(self, values: dict[str, Any]) -> SamplingDefaults:
        """A copy with the named fields replaced (used for `l2p.json`).

        Raises ValueError for an unknown name or a value of the wrong kind.
        """
        known = {"width": int, "height": int, "steps": int, "cfg_scale": float, "shift": float}
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"unknown default {name!r:.80}; known are {', '.join(known)}")
            whole = known[name] is int
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise ValueError(f"default {name} must be a {'whole ' if whole else ''}number, got {value!r:.80}")
            if not 0 < value <= _LARGEST_DEFAULT:
                raise ValueError(f"default {name} must lie in 0 to {_LARGEST_DEFAULT}, got {value!r:.80}")
        return replace(self, **{name: known[name](value) for name, value in values.items()})


@dataclass(frozen=True)
class ModelConfig:
    """The L2P transformer and its decoder.

    patch_size: pixels per token and side. dim: token width. n_heads: attention
    heads of width dim // n_heads. ffn_dim: SwiGLU width. caption_dim: width of
    the text features. timestep_hidden: width inside the timestep MLP.
    rope_axes: channels of a head rotated by (sequence, row, column) position.
    """

    patch_size: int
    dim: int
    n_heads: int
    n_layers: int
    n_noise_refiner: int
    n_context_refiner: int
    ffn_dim: int
    caption_dim: int
    timestep_hidden: int
    rope_axes: tuple[int, int, int]
    decoder: DecoderConfig
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)

    def __post_init__(self) -> None:
        if self.n_heads < 1 or self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} is no multiple of the {self.n_heads} heads")
        if sum(self.rope_axes) != self.head_dim or any(a <= 0 or a % 2 for a in self.rope_axes):
            raise ValueError(
                f"rope_axes {list(self.rope_axes)} must be three even numbers that add up to "
                f"the head width {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def timestep_dim(self) -> int:
        """Width of the timestep embedding that every adaLN reads."""
        return min(self.dim, TIMESTEP_FREQUENCIES)

    @property
    def size_multiple(self) -> int:
        """Width and height must be multiples of this.

        The patch grid and the decoder's pooled grid both have to come out whole;
        they differ for the 10K family (patch 160, pooling 64), hence the lcm.
        """
        return math.lcm(self.patch_size, self.decoder.pooling)

    def check_size(self, width: int, height: int) -> None:
        """Raise ValueError, naming the nearest legal values, unless the size fits the grid."""
        for side, value in (("width", width), ("height", height)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{side} must be a whole number of pixels, got {value!r}")
            step = self.size_multiple
            if value <= 0 or value % step:
                below, above = value // step * step, (max(value, 0) // step + 1) * step
                nearest = f"nearest are {below} and {above}" if below > 0 else f"the smallest is {step}"
                raise ValueError(f"{side} must be a multiple of {step} pixels for this model, got {value}; {nearest}")
            if value > MAX_SIDE:
                raise ValueError(f"{side} must be at most {MAX_SIDE} pixels, got {value}")


@dataclass(frozen=True)
class TextEncoderConfig:
    """A Qwen3-shaped text encoder; field names as in Hugging Face's config.json."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        if self.num_hidden_layers < 2:
            raise ValueError(
                f"num_hidden_layers must be at least 2, got {self.num_hidden_layers}: "
                "the features are the input of the last layer"
            )
