"""Writing L2P checkpoints in the layouts that `layout.py` reads.

A model to write is a mapping from parameter names as used inside (`layers.0.attention.qkv.weight`) to
lazily made tensors or quantised linear weights. A `LayoutStyle` says how the file spells them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from .config import DEFAULT_ROPE_AXES, ModelConfig
from .families import with_family_defaults
from .linear import Rotation, scale_block
from .markers import QUANTIZATION_METADATA, marker_json
from .naming import MARKER, QKV, QKV_PARTS, original_module
from .quantization import Scheme
from .safetensors_writer import TensorEntry, write_safetensors
from .settings import METADATA_ENTRY, settings_json

# What the published INT8 files quantise: the five linear layers of the main stack.
DEFAULT_TARGETS = ("layers.*.attention.qkv", "layers.*.attention.out", "layers.*.feed_forward.w[123]")
_RUN_ELEMENTS = 2 << 20


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made, or read, when its turn comes.

    read: makes it whole. read_rows: makes rows start to stop of it, in any order and on any thread; None
        where it only comes whole.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    read_rows: Callable[[int, int], Tensor] | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @classmethod
    def of_rows(cls, dtype: torch.dtype, shape: tuple[int, ...], read_rows: Callable[[int, int], Tensor]) -> LazyTensor:
        return cls(dtype, shape, lambda: read_rows(0, shape[0]), read_rows)

    def rows(self, start: int, stop: int) -> LazyTensor:
        shape, read_rows = (stop - start, *self.shape[1:]), self.read_rows
        if read_rows is None:
            return LazyTensor(self.dtype, shape, lambda: self.read()[start:stop])
        return LazyTensor.of_rows(self.dtype, shape, lambda first, last: read_rows(start + first, start + last))

    def reshaped(self, *shape: int) -> LazyTensor:
        return LazyTensor(self.dtype, shape, lambda: self.read().reshape(shape))

    def cast(self, dtype: torch.dtype) -> LazyTensor:
        read_rows = self.read_rows
        if dtype == self.dtype:
            return self
        if read_rows is None:
            return LazyTensor(dtype, self.shape, lambda: self.read().to(dtype))
        return LazyTensor.of_rows(dtype, self.shape, lambda start, stop: read_rows(start, stop).to(dtype))


def run_rows(shape: tuple[int, ...]) -> int:
    """How many rows of a tensor of `shape` make a run of at most a few MiB, one at least."""
    return max(_RUN_ELEMENTS // max(math.prod(shape[1:]), 1), 1)


def row_runs(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(start, stop) of all such runs."""
    step = run_rows(shape)
    return ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))


@dataclass(frozen=True)
class QuantizedWeight:
    """A linear layer's weight as stored: int8 or float8 (N, K), and its scale, (), (N, 1) or (N/b, K/b).

    passes: how often making it all reads what it is made of.
    """

    weight: LazyTensor
    scale: LazyTensor
    rotation: Rotation | None = None
    full_precision_matmul: bool = False
    passes: int = 1

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of the weight that share a scale."""
        return scale_block(self.scale.shape, *self.weight.shape)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """A run of the weight's rows with its scales; a run has to start and stop between blocks."""
        scale = self.scale
        if self.block != self.weight.shape:
            scale = scale.rows(start // self.block[0], stop // self.block[0])
        return replace(self, weight=self.weight.rows(start, stop), scale=scale)


ModelState = Mapping[str, "LazyTensor | QuantizedWeight"]


@dataclass(frozen=True)
class LayoutStyle:
    """How a file spells a model. The defaults are the published 1K INT8 file's, as far as known.

    split_qkv: q, k, v as three tensors; by default as the naming does.
    scale_rank: axes of a scale: row scales (N) or (N, 1), tensor scales (), (1) or (1, 1); by default
        (N, 1) and ().
    marker: where a quantised layer is declared: a `comfy_quant` tensor, one that lacks the format, one
        that nests the rest in `params`, the file metadata, a tensor and the metadata ("both"), or nowhere.
    extras: also the tensors that readers have to ignore.
    """

    prefix: str = "model.diffusion_model."
    naming: Literal["comfyui", "original"] = "comfyui"
    split_qkv: bool | None = None
    adaln_index: Literal[0, 1] = 0
    scale_key: Literal["weight_scale", "scale_weight"] = "weight_scale"
    scale_rank: int | None = None
    scale_dtype: torch.dtype = torch.float32
    marker: Literal["tensor", "no-format", "nested", "metadata", "both", "none"] = "tensor"
    metadata_prefix: bool = True
    extras: bool = False

    @property
    def splits_qkv(self) -> bool:
        return self.naming == "original" if self.split_qkv is None else self.split_qkv


ORIGINAL = LayoutStyle(prefix="", naming="original", marker="none")


def model_entries(state: ModelState, style: LayoutStyle, patch_size: int) -> tuple[list[TensorEntry], dict[str, str]]:
    """The tensors of the file, in file order, and the file metadata the style asks for.

    Blocks come first and in the order they run, so that streaming reads forwards; markers come last,
    because their odd lengths would put the tensors behind them on odd addresses.
    """
    entries: list[TensorEntry] = []
    markers: dict[str, str] = {}
    for name in sorted(state, key=_stack):
        value = state[name]
        module, _, leaf = name.rpartition(".")
        for spelled, part in _split(module, value, style, patch_size):
            if isinstance(part, QuantizedWeight):
                entries += _quantized_entries(spelled, part, style)
                markers[spelled] = _marker(part)
            else:
                path = f"{spelled}.{leaf}" if spelled else leaf
                entries.append(_entry(style.prefix + path, part))
    tensors, metadata = _declared(markers, style)
    return entries + tensors + (_ignored_entries(style) if style.extras else []), metadata


def save_model(
    path: str | os.PathLike[str],
    state: ModelState,
    config: ModelConfig,
    *,
    style: LayoutStyle | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    progress: Callable[[int], object] | None = None,
) -> int:
    """Write a model in `style`; returns the file's bytes."""
    entries, own = model_entries(state, style or LayoutStyle(), config.patch_size)
    own |= settings_metadata(config) | dict(metadata or {})
    return write_safetensors(path, entries, own, overwrite=overwrite, progress=progress)


def settings_metadata(config: ModelConfig) -> dict[str, str]:
    """What a file has to say itself to be used without an `l2p.json`: RoPE axes and sampling defaults, where
    head width and family alone do not tell them."""
    known_axes = config.rope_axes == DEFAULT_ROPE_AXES.get(config.head_dim)
    if known_axes and config.defaults == with_family_defaults(config).defaults:
        return {}
    return {METADATA_ENTRY: settings_json(config)}


def save_checkpoint(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    scheme: str | None = "row",
    targets: Sequence[str] = DEFAULT_TARGETS,
    rest_dtype: torch.dtype | None = torch.bfloat16,
    style: LayoutStyle | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> int:
    """Quantise and write a float model, given as `L2PTransformer.state_dict()`; returns the file's bytes.

    scheme: as `Scheme.parse` reads it; None quantises nothing. targets: patterns of linear layers to
    quantise. rest_dtype: of everything else; None keeps what it is.
    """
    state = quantized_state(state_dict, scheme, targets=targets, rest_dtype=rest_dtype)
    return save_model(path, state, config, style=style, metadata=metadata, overwrite=overwrite)


def quantized_state(
    state_dict: Mapping[str, Tensor],
    scheme: str | None = "row",
    *,
    targets: Sequence[str] = DEFAULT_TARGETS,
    rest_dtype: torch.dtype | None = torch.bfloat16,
) -> dict[str, LazyTensor | QuantizedWeight]:
    """A float model with the weights of `targets` quantised and the rest cast.

    A rotation leaves alone a layer whose columns its group does not divide, as ctq does.
    """
    parsed = Scheme.parse(scheme) if scheme else None
    state: dict[str, LazyTensor | QuantizedWeight] = {}
    for name, tensor in state_dict.items():
        if parsed is not None and is_target(name, targets):
            state[name] = quantized_weight(tensor, parsed)
        else:
            state[name] = LazyTensor.of(tensor).cast(rest_dtype or tensor.dtype)
    return state


def quantized_weight(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """`weight` (N, K) quantised now; unrotated where the rotation's group does not divide K."""
    scheme = scheme.fitting(weight.shape[1])
    stored, scale = scheme.quantize(weight)
    return QuantizedWeight(LazyTensor.of(stored), LazyTensor.of(scale), scheme.rotation)


def is_target(name: str, targets: Sequence[str]) -> bool:
    """Whether the parameter is the weight of a linear layer that `targets` name."""
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and any(fnmatchcase(module, target) for target in targets)


def _stack(name: str) -> tuple[int, int]:
    """Sort key: noise refiner, context refiner, layers, the rest; each in its own order."""
    head, _, tail = name.partition(".")
    stacks = ("noise_refiner", "context_refiner", "layers")
    return (stacks.index(head), int(tail.partition(".")[0])) if head in stacks else (len(stacks), 0)


def _split(
    module: str, value: LazyTensor | QuantizedWeight, style: LayoutStyle, patch_size: int
) -> Iterator[tuple[str, LazyTensor | QuantizedWeight]]:
    """The parts a parameter has in the file, each with its module as the file spells it."""
    if style.adaln_index:
        module = module.replace("adaLN_modulation.0", "adaLN_modulation.1")
    if module.endswith(QKV) and style.splits_qkv:
        rows = (value.weight if isinstance(value, QuantizedWeight) else value).shape[0] // len(QKV_PARTS)
        for index, spelling in enumerate(QKV_PARTS):
            part = value.rows(index * rows, (index + 1) * rows)
            yield module.replace(QKV, f"attention.{spelling}"), part
    else:
        yield (original_module(module, patch_size) if style.naming == "original" else module), value


def _quantized_entries(module: str, value: QuantizedWeight, style: LayoutStyle) -> list[TensorEntry]:
    path = f"{style.prefix}{module}"
    entries = [
        _entry(f"{path}.weight", value.weight),
        _entry(f"{path}.{style.scale_key}", _shaped_scale(value, style).cast(style.scale_dtype)),
    ]
    if style.extras:
        entries.append(_entry(f"{path}.input_scale", LazyTensor.of(torch.ones(()))))
    return entries


def _shaped_scale(value: QuantizedWeight, style: LayoutStyle) -> LazyTensor:
    if value.block == value.weight.shape:
        return value.scale.reshaped(*[1] * (style.scale_rank or 0))
    if value.block[0] == 1:
        rows = value.weight.shape[0]
        return value.scale.reshaped(rows) if style.scale_rank == 1 else value.scale.reshaped(rows, 1)
    return value.scale


def _marker(value: QuantizedWeight) -> str:
    rows, columns = value.weight.shape
    return marker_json(
        value.weight.dtype,
        value.block,
        (rows, columns),
        value.rotation,
        full_precision_matmul=value.full_precision_matmul,
    )


def _declared(markers: Mapping[str, str], style: LayoutStyle) -> tuple[list[TensorEntry], dict[str, str]]:
    """Markers (module -> JSON) as tensors or as file metadata."""
    metadata: dict[str, str] = {}
    if style.marker in ("metadata", "both") and markers:
        prefix = style.prefix if style.metadata_prefix else ""
        layers = {prefix + module: json.loads(text) for module, text in markers.items()}
        metadata[QUANTIZATION_METADATA] = json.dumps({"format_version": "1.0", "layers": layers})
    if style.marker == "metadata":
        return [], metadata
    if style.marker == "none":
        rotated = next((module for module, text in markers.items() if "convrot" in text), None)
        if rotated is not None:
            raise ValueError(f"{rotated} is rotated, which a file without markers cannot say")
        return [], {}
    return [
        _entry(f"{style.prefix}{module}.{MARKER}", _text_tensor(_restyled(text, style)))
        for module, text in markers.items()
    ], metadata


def _restyled(text: str, style: LayoutStyle) -> str:
    if style.marker in ("tensor", "both"):
        return text
    values = json.loads(text)
    kind = values.pop("format")
    return json.dumps({"format": kind, "params": values} if style.marker == "nested" else values)


def _ignored_entries(style: LayoutStyle) -> list[TensorEntry]:
    return [
        _entry(f"{style.prefix}scaled_int8", LazyTensor.of(torch.ones(2, dtype=torch.int8))),
        _entry("int8_quantized", LazyTensor.of(torch.ones(1, dtype=torch.uint8))),
        _entry("int8_model_type", _text_tensor("z-image")),
    ]


def _text_tensor(text: str) -> LazyTensor:
    return LazyTensor.of(torch.tensor(list(text.encode()), dtype=torch.uint8))


def _entry(name: str, tensor: LazyTensor) -> TensorEntry:
    if tensor.read_rows is not None:
        return TensorEntry.of_rows(name, tensor.dtype, tensor.shape, tensor.read_rows, run_rows(tensor.shape))
    return TensorEntry.of(name, tensor.dtype, tensor.shape, tensor.read)
