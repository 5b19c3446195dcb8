"""Which tensors of a checkpoint make which parameter: every published layout, read from the header.

Nothing here reads weights (only the small `comfy_quant` markers), so a layout costs milliseconds on
any file. It holds all that is needed to load the model (`weights.py`) or to stream it block by block:
every parameter names its file tensors with their offsets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import torch

from offload import Checkpoint, CheckpointError, Part, TensorInfo, TensorSource
from offload.header import shown

from .config import ModelConfig
from .families import family_name
from .geometry import read_config
from .linear import SYLVESTER, Linear
from .markers import LayerMarker, read_marker, read_metadata_markers
from .model import L2PTransformer
from .naming import (
    IGNORED_ENTRIES,
    IGNORED_SIDECARS,
    MARKER,
    QKV,
    QKV_PARTS,
    SCALE,
    TensorName,
    embedder_patch,
    find_prefix,
    foreign_model,
    is_original,
    parse_name,
    refused_sidecar,
    strip_any_prefix,
)
from .settings import METADATA_ENTRY, ModelSettings, settings_beside
from .sources import (
    LinearQuantization,
    linear_quantization,
    total_bytes,
    weight_source,
)

_NAMED_IN_ERRORS = 3


@dataclass(frozen=True)
class ModelLayout:
    """An L2P model in a checkpoint.

    naming: "original", "comfyui" or, where the file mixes them, "mixed".
    sources: parameters and `weight_scale` buffers of L2PTransformer(config) by name, all of them.
    quantized: linear layers (module names) whose weight has a scale.
    warnings: what is odd about the file but no reason to refuse it.
    """

    path: Path
    config: ModelConfig
    prefix: str
    naming: str
    sources: Mapping[str, TensorSource]
    quantized: Mapping[str, LinearQuantization]
    warnings: tuple[str, ...]

    @property
    def family(self) -> str:
        """The published name, "1K", "4K", "8K" or "10K", or "patch-N"."""
        return family_name(self.config.patch_size)

    @cached_property
    def blocks(self) -> Mapping[str, tuple[TensorSource, ...]]:
        """Block name -> what it needs, in model order: noise refiner, context refiner, layers."""
        names = [
            f"{stack}.{index}"
            for stack, count in (
                ("noise_refiner", self.config.n_noise_refiner),
                ("context_refiner", self.config.n_context_refiner),
                ("layers", self.config.n_layers),
            )
            for index in range(count)
        ]
        grouped: dict[str, list[TensorSource]] = {name: [] for name in names}
        for name, source in self.sources.items():
            grouped.get(block_of(name), []).append(source)
        return MappingProxyType({name: tuple(sources) for name, sources in grouped.items()})

    @cached_property
    def rest(self) -> tuple[TensorSource, ...]:
        """What prelude and epilogue need: embedders, pad tokens, local decoder."""
        return tuple(source for name, source in self.sources.items() if block_of(name) not in self.blocks)

    @cached_property
    def block_bytes(self) -> Mapping[str, int]:
        return MappingProxyType({name: total_bytes(sources) for name, sources in self.blocks.items()})

    @property
    def rest_bytes(self) -> int:
        return total_bytes(self.rest)


def block_of(name: str) -> str:
    """The block a parameter belongs to, "layers.3"; no block's name for what belongs to none."""
    return ".".join(name.split(".", 2)[:2])


def read_layout(
    checkpoint: Checkpoint,
    *,
    rope_axes: tuple[int, int, int] | None = None,
) -> ModelLayout:
    """Find an L2P model in an open checkpoint.

    rope_axes: overrides every other source, the `l2p.json` beside the file among them (which is read if the file is
    named `model*.safetensors`). None will do for head width 128.
    Raises CheckpointError naming the tensor and the reason for everything that is not exactly an L2P
    model in a supported layout, missing and left-over tensors included.
    """
    path = checkpoint.files[0]
    found = _Inventory.of(checkpoint, path)
    settings = _settings(checkpoint, path)
    if rope_axes is not None:
        settings = replace(settings, rope_axes=rope_axes)
    config = read_config(found.shapes(), path, settings, found.patch_size)
    expected, linears = _parameters(config)
    weights = found.match(expected, linears)

    sources: dict[str, TensorSource] = {}
    quantized: dict[str, LinearQuantization] = {}
    for name, shape in expected.items():
        module, _, leaf = name.rpartition(".")
        is_weight = leaf == "weight" and module in linears
        sources[name] = weight_source(name, shape, weights[name], may_be_int8=is_weight)
        if is_weight and (entry := found.quantization(module, sources[name])) is not None:
            sources[f"{module}.{SCALE}"], quantized[module] = entry
    return ModelLayout(
        path,
        config,
        found.prefix,
        found.naming,
        MappingProxyType(sources),
        MappingProxyType(quantized),
        (*found.warnings(), *_rotation_warnings(quantized)),
    )


def _parameters(config: ModelConfig) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Shapes of a model's parameters by name, and the names of its linear layers.

    One block of each stack is made and stands for all of them: making all takes longer than reading the header.
    """
    noise, context, layers = config.n_noise_refiner, config.n_context_refiner, config.n_layers
    counts = {"noise_refiner": noise, "context_refiner": context, "layers": layers}
    one_each = replace(
        config, n_noise_refiner=min(noise, 1), n_context_refiner=min(context, 1), n_layers=min(layers, 1)
    )
    with torch.device("meta"):
        model = L2PTransformer(one_each)

    def spread(name: str) -> Iterator[str]:
        stack, _, rest = name.partition(".0.")
        yield from [f"{stack}.{index}.{rest}" for index in range(counts[stack])] if stack in counts else [name]

    linears = {name for one, module in model.named_modules() if isinstance(module, Linear) for name in spread(one)}
    return {name: tuple(p.shape) for one, p in model.named_parameters() for name in spread(one)}, linears


def _settings(checkpoint: Checkpoint, path: Path) -> ModelSettings:
    settings = settings_beside(path)
    text = checkpoint.metadata.get(METADATA_ENTRY)
    if text is None:
        return settings
    return settings.over(ModelSettings.parse(text.encode(), path, f"metadata entry {METADATA_ENTRY}"))


class _Inventory:
    """The file's tensors sorted by what they are, before anything is known about the model."""

    def __init__(self, path: Path, prefix: str) -> None:
        self.path = path
        self.prefix = prefix
        self.patch_size: int | None = None
        self._tensors: dict[TensorName, TensorInfo] = {}
        self._outside: list[TensorInfo] = []  # not under the prefix
        self._markers: dict[tuple[str, int | None], LayerMarker] = {}
        self._schemes: set[bool] = set()
        self._unknown_markers: list[str] = []

    @classmethod
    def of(cls, checkpoint: Checkpoint, path: Path) -> _Inventory:
        """Sort, and refuse what no L2P file has. Raises CheckpointError."""
        foreign = foreign_model(checkpoint.tensors)
        prefix = find_prefix(checkpoint.tensors)
        if foreign is not None or prefix is None:
            what = f"this is {foreign}" if foreign else "no L2P model: it has no x_embedder"
            raise CheckpointError(path, f"{what} (first tensor is {shown(next(iter(checkpoint.tensors), ''))})")
        inventory = cls(path, prefix)
        for info in checkpoint.tensors.values():
            inventory._add(info)
        inventory._read_markers(checkpoint)
        inventory._check_fused()
        return inventory

    def _add(self, info: TensorInfo) -> None:
        if strip_any_prefix(info.name) in IGNORED_ENTRIES:
            return
        if not info.name.startswith(self.prefix):
            self._outside.append(info)
            return
        stripped = info.name[len(self.prefix) :]
        if (refused := refused_sidecar(stripped)) is not None:
            raise CheckpointError(info.path, f"tensor {shown(info.name)} belongs to {refused}")
        name = parse_name(stripped)
        if (twin := self._tensors.get(name)) is not None:
            raise CheckpointError(info.path, f"tensors {shown(twin.name)} and {shown(info.name)} are the same")
        if name.leaf in IGNORED_SIDECARS:
            return
        self._tensors[name] = info
        self._schemes |= {scheme for scheme in (is_original(stripped),) if scheme is not None}
        self.patch_size = embedder_patch(stripped) or self.patch_size

    def _read_markers(self, checkpoint: Checkpoint) -> None:
        """Read markers and take their tensors out; those of the file metadata win."""
        for name in [name for name in self._tensors if name.leaf == MARKER]:
            marker = read_marker(checkpoint, self._tensors[name])
            if replace(name, leaf="weight") in self._tensors:
                self._markers[name.module, name.part] = marker
                del self._tensors[name]
        modules = {name.module for name in self._tensors}
        for layer, marker in read_metadata_markers(checkpoint.metadata, self.path).items():
            name = parse_name(f"{strip_any_prefix(layer)}.weight")
            self._markers[name.module, name.part] = marker
            if name.module not in modules:
                self._unknown_markers.append(layer)

    def _check_fused(self) -> None:
        """Refuse a qkv that is there both fused and split."""
        for name, info in self._tensors.items():
            fused = self._tensors.get(replace(name, part=None)) if name.part is not None else None
            if fused is not None:
                both = f"{shown(info.name)} and {shown(fused.name)}"
                raise CheckpointError(info.path, f"tensors {both} are both there; q, k, v must be split or fused")

    @property
    def naming(self) -> str:
        if len(self._schemes) > 1:
            return "mixed"
        return "original" if True in self._schemes else "comfyui"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape in the file, without the split ones."""
        return {name.parameter: info.shape for name, info in self._tensors.items() if name.part is None}

    def match(self, expected: Mapping[str, tuple[int, ...]], linears: AbstractSet[str]) -> dict[str, list[TensorInfo]]:
        """The file tensors of every expected parameter; weights of `linears` may have a scale beside them.

        Raises CheckpointError for parameters without tensors and tensors without parameters.
        """
        matched: dict[str, list[TensorInfo]] = {}
        missing: list[str] = []
        used: set[TensorName] = set()
        for parameter in expected:
            module, _, leaf = parameter.rpartition(".")
            names = self._parts(module, leaf)
            missing += [self._spelled(name) for name in names if name not in self._tensors]
            matched[parameter] = [self._tensors[name] for name in names if name in self._tensors]
            used.update(names)
            used.update(replace(name, leaf=SCALE) for name in names if leaf == "weight" and module in linears)
        left = [info.name for name, info in self._tensors.items() if name not in used]
        left += [info.name for info in self._outside]
        self._require_none(missing, left, len(expected))
        return matched

    def _parts(self, module: str, leaf: str) -> list[TensorName]:
        """The names of a parameter's tensors: one, or those of q, k, v."""
        if module.endswith(QKV):
            split = [TensorName(module, leaf, part) for part in range(len(QKV_PARTS))]
            if any(name in self._tensors for name in split):
                return split
        return [TensorName(module, leaf)]

    @staticmethod
    def _spelled(name: TensorName) -> str:
        if name.part is None:
            return name.parameter
        return name.parameter.replace(QKV, f"attention.{QKV_PARTS[name.part]}")

    def _require_none(self, missing: list[str], left: list[str], expected: int) -> None:
        reasons = []
        if missing:
            reasons.append(f"lacks {len(missing)} of {expected} tensors, {_first(missing)}")
        if left:
            reasons.append(f"has {len(left)} tensors that no L2P model has, {_first(left)}")
        if reasons:
            raise CheckpointError(self.path, "; ".join(reasons))

    def scales(self, module: str, weights: int) -> list[TensorInfo | None]:
        """The scale of each of a weight's parts."""
        names = [TensorName(module, SCALE, part) for part in (range(weights) if weights > 1 else (None,))]
        return [self._tensors.get(name) for name in names]

    def marker(self, module: str, weights: Iterable[Part]) -> LayerMarker:
        """The marker of a linear layer; raises CheckpointError unless all parts agree on the rotation."""
        weights = list(weights)
        fused = self._markers.get((module, None))
        parts = [self._markers.get((module, index)) for index in range(len(QKV_PARTS))]
        if fused is not None or not any(parts):
            parts = parts[: len(weights)] if len(weights) > 1 else [None]
        markers = [marker or fused or LayerMarker() for marker in parts]
        for marker in markers:
            if marker.rotation != markers[0].rotation:
                spelled = " and ".join(str(m.rotation and m.rotation.group) for m in (markers[0], marker))
                reason = f"is part of q, k, v with different rotation groups, {spelled}; they cannot be fused"
                raise CheckpointError(self.path, f"tensor {shown(weights[0].tensor.name)} {reason}")
        return replace(markers[0], full_precision_matmul=any(m.full_precision_matmul for m in markers))

    def quantization(self, module: str, weight: TensorSource) -> tuple[TensorSource, LinearQuantization] | None:
        """`linear_quantization` of a layer from its scales and marker in this file."""
        scales = self.scales(module, len(weight.parts))
        return linear_quantization(module, weight, scales, self.marker(module, weight.parts))

    def warnings(self) -> list[str]:
        if not self._unknown_markers:
            return []
        count = len(self._unknown_markers)
        return [f"the file's metadata describes {count} layers it does not have, {_first(self._unknown_markers)}"]


def _first(names: list[str]) -> str:
    some = ", ".join(shown(name) for name in names[:_NAMED_IN_ERRORS])
    return f"first {'is' if len(names) == 1 else 'are'} {some}"


def _rotation_warnings(quantized: Mapping[str, LinearQuantization]) -> list[str]:
    sylvester = [name for name, entry in quantized.items() if entry.rotation and entry.rotation.kind == SYLVESTER]
    if not sylvester:
        return []
    group = quantized[sylvester[0]].rotation
    assert group is not None
    return [
        f"{len(sylvester)} linear layers are rotated in groups of {group.group}, no power of four, which is "
        "taken for a Sylvester Hadamard rotation; if pictures are noise, it was another one"
    ]
