"""The published models, told apart by their patch size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from .config import DEFAULT_ROPE_AXES, DecoderConfig, DecoderLevel, ModelConfig, SamplingDefaults

# Patch size -> name and what the authors sample with. The high-resolution scripts name 50 steps and
# guidance 4; that their shift is also 3 is taken from the 1K scheduler and not verified upstream.
_FAMILIES: Mapping[int, tuple[str, SamplingDefaults]] = MappingProxyType(
    {
        16: ("1K", SamplingDefaults(1024, 1024, 30, 2.0, 3.0)),
        64: ("4K", SamplingDefaults(4096, 4096, 50, 4.0, 3.0)),
        128: ("8K", SamplingDefaults(8192, 8192, 50, 4.0, 3.0)),
        160: ("10K", SamplingDefaults(10240, 10240, 50, 4.0, 3.0)),
    }
)

# Levels of the local decoder by name, from full resolution downwards. No model has all of them.
LEVEL_NAMES = ("_8k", "_10k_a", "0", "0b", *(str(number) for number in range(1, 17)))


def family_name(patch_size: int) -> str:
    """The published name, "1K", "4K", "8K" or "10K", or "patch-N" for a patch size nobody has published."""
    return _FAMILIES[patch_size][0] if patch_size in _FAMILIES else f"patch-{patch_size}"


def with_family_defaults(config: ModelConfig) -> ModelConfig:
    """`config` with the sampling defaults of its patch size.

    Only a patch size nobody has published can leave a size that is no multiple of the grid; it is
    rounded down (but not to zero), since there is no published value to keep.
    """
    _, defaults = _FAMILIES.get(config.patch_size, _FAMILIES[16])
    step = config.size_multiple
    side = max(defaults.width // step, 1) * step
    return replace(config, defaults=replace(defaults, width=side, height=side))


def _published(patch_size: int, levels: tuple[DecoderLevel, ...], bottleneck: int) -> ModelConfig:
    config = ModelConfig(
        patch_size=patch_size,
        dim=3840,
        n_heads=30,
        n_layers=30,
        n_noise_refiner=2,
        n_context_refiner=2,
        ffn_dim=10240,
        caption_dim=2560,
        timestep_hidden=1024,
        rope_axes=DEFAULT_ROPE_AXES[128],
        decoder=DecoderConfig(levels, bottleneck),
    )
    return with_family_defaults(config)


_LEVELS_1K = (
    DecoderLevel("1", 64, 64, 64),
    DecoderLevel("2", 128, 128, 64),
    DecoderLevel("3", 256, 256, 128),
    DecoderLevel("4", 512, 512, 256),
)
_LEVELS_10K_INNER = (
    DecoderLevel("0", 16, 16, 16),
    DecoderLevel("0b", 32, 32, 16),
    DecoderLevel("1", 64, 64, 32),
    DecoderLevel("2", 128, 128, 64),
    DecoderLevel("3", 256, 256, 128),
)
_LEVELS_4K = (*_LEVELS_10K_INNER, DecoderLevel("4", 512, 512, 256))

# The full-size models by family name in lower case.
PUBLISHED: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "1k": _published(16, _LEVELS_1K, 512),
        "4k": _published(64, _LEVELS_4K, 512),
        "8k": _published(128, (DecoderLevel("_8k", 3, 16, 16), *_LEVELS_4K), 512),
        "10k": _published(160, (DecoderLevel("_10k_a", 3, 16, 16), *_LEVELS_10K_INNER), 512),
    }
)
