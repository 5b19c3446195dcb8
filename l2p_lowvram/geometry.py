"""A model's dimensions from the shapes of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from offload import CheckpointError
from offload.header import shown

from .config import DEFAULT_ROPE_AXES, IMAGE_CHANNELS, DecoderConfig, DecoderLevel, ModelConfig
from .families import LEVEL_NAMES, with_family_defaults
from .paths import SETTINGS_FILE
from .settings import METADATA_ENTRY, ModelSettings

_MAX_BLOCKS = 400  # of all stacks; the published models have 34
_STACKS = ("noise_refiner", "context_refiner", "layers")
_MAX_WIDTH = 1 << 20

_Shapes = Mapping[str, tuple[int, ...]]


def read_config(shapes: _Shapes, path: Path, settings: ModelSettings, patch_size: int | None) -> ModelConfig:
    """What model has parameters of these shapes; `patch_size` is the one the embedder's name spells, if any.

    Only reads what it needs: the caller compares all shapes with the model's. Raises CheckpointError.
    """
    dims = _Dimensions(shapes, path)
    dim = dims.read("x_embedder.weight", 0, rank=2)
    head_dim = dims.read("layers.0.attention.q_norm.weight", 0, rank=1)
    if head_dim > dim or dim % head_dim:
        raise CheckpointError(path, f"token width {dim} is no multiple of the head width {head_dim} (q_norm)")
    noise, context, layers = dims.counts()
    try:
        config = ModelConfig(
            patch_size=_patch_size(dims, patch_size),
            dim=dim,
            n_heads=dim // head_dim,
            n_layers=layers,
            n_noise_refiner=noise,
            n_context_refiner=context,
            ffn_dim=dims.read("layers.0.feed_forward.w1.weight", 0, rank=2),
            caption_dim=dims.read("cap_embedder.0.weight", 0, rank=1),
            timestep_hidden=dims.read("t_embedder.mlp.0.weight", 0, rank=2),
            rope_axes=_rope_axes(head_dim, path, settings),
            decoder=_decoder(dims),
        )
        config = with_family_defaults(config)
        return _with_settings(config, settings)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(path, str(error)) from None


def _with_settings(config: ModelConfig, settings: ModelSettings) -> ModelConfig:
    """`config` with the settings' sampling defaults; raises ValueError for a size off the grid."""
    defaults = config.defaults.updated(settings.defaults)
    config.check_size(defaults.width, defaults.height)
    return replace(config, defaults=defaults)


class _Dimensions:
    def __init__(self, shapes: _Shapes, path: Path) -> None:
        self.shapes = shapes
        self.path = path

    def read(self, name: str, axis: int, *, rank: int) -> int:
        """One size of a tensor that has to be there; raises CheckpointError."""
        shape = self.shapes.get(name)
        if shape is None:
            lacks = f"lacks {name}, which tells the model's dimensions"
            raise CheckpointError(self.path, f"{lacks}; is it an L2P model, and whole?")
        if len(shape) != rank or not 0 < shape[axis] <= _MAX_WIDTH:
            reason = f"tensor {shown(name)} has shape {list(shape)}; it must have {rank} axes of sensible size"
            raise CheckpointError(self.path, reason)
        return shape[axis]

    def count(self, stack: str) -> int:
        """Blocks of a stack, which must be numbered 0, 1, 2, ...; raises CheckpointError."""
        pattern = re.compile(rf"{stack}\.(0|[1-9]\d{{0,8}})\.")
        numbers = {int(match.group(1)) for name in self.shapes if (match := pattern.match(name))}
        if not numbers:
            raise CheckpointError(self.path, f"lacks {stack}.0 and all other blocks of {stack}")
        gap = next(number for number in range(len(numbers) + 1) if number not in numbers)
        if gap < len(numbers):
            reason = f"lacks block {stack}.{gap}, though it has blocks up to {stack}.{max(numbers)}"
            raise CheckpointError(self.path, reason)
        return len(numbers)

    def counts(self) -> tuple[int, ...]:
        """Blocks of each of _STACKS; raises CheckpointError."""
        counts = tuple(self.count(stack) for stack in _STACKS)
        if sum(counts) > _MAX_BLOCKS:
            spelled = " + ".join(f"{count} {stack}" for stack, count in zip(_STACKS, counts, strict=True))
            reason = f"has {sum(counts)} blocks ({spelled}), the limit is {_MAX_BLOCKS}"
            raise CheckpointError(self.path, reason)
        return counts


def _patch_size(dims: _Dimensions, spelled: int | None) -> int:
    inputs = dims.read("x_embedder.weight", 1, rank=2)
    patch = math.isqrt(inputs // IMAGE_CHANNELS)
    if patch**2 * IMAGE_CHANNELS != inputs:
        hint = "; is this latent Z-Image rather than L2P?" if inputs == 64 else ""
        reason = f"x_embedder.weight takes {inputs} inputs, which are no square patch of RGB pixels{hint}"
        raise CheckpointError(dims.path, reason)
    if spelled not in (None, patch):
        reason = f"all_x_embedder.{spelled}-1 has {inputs} inputs, which are a patch of {patch}, not {spelled}"
        raise CheckpointError(dims.path, reason)
    return patch


def _rope_axes(head_dim: int, path: Path, settings: ModelSettings) -> tuple[int, int, int]:
    axes = settings.rope_axes or DEFAULT_ROPE_AXES.get(head_dim)
    if axes is None:
        reason = (
            f"the file does not say how its head width {head_dim} is split into RoPE axes; write "
            f'{{"rope_axes": [sequence, row, column]}}, three even numbers that add up to {head_dim}, into '
            f"{SETTINGS_FILE} beside model.safetensors or into the metadata entry {METADATA_ENTRY!r}"
        )
        raise CheckpointError(path, reason)
    return axes


def _decoder(dims: _Dimensions) -> DecoderConfig:
    """The levels that are there, from full resolution downwards; raises CheckpointError."""
    names = [name for name in LEVEL_NAMES if f"local_decoder.enc{name}.0.weight" in dims.shapes]
    if not names:
        raise CheckpointError(dims.path, "lacks local_decoder.enc1.0.weight and all other decoder levels")
    levels = []
    for name in names:
        encoder, up, out = (
            dims.read(f"local_decoder.{layer}.weight", 0, rank=4)
            for layer in (f"enc{name}.0", f"up{name}.1", f"dec{name}.0")
        )
        levels.append(DecoderLevel(name, encoder, up, out))
    return DecoderConfig(tuple(levels), dims.read("local_decoder.bottleneck.0.weight", 0, rank=4))
