"""Text encoders on disk: Hugging Face folders and single files, found out from their headers.

The same rules as for the model: hostile until checked, weights kept as stored. Only the layers that
make the features are used; the last layer, the final norm and `lm_head` may be there or not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from offload import Checkpoint, CheckpointError, TensorInfo, TensorSource
from offload.header import parse_json_object, shown

from .config import TextEncoderConfig
from .layout import block_of
from .linear import Linear
from .markers import LayerMarker, read_marker, read_metadata_markers
from .naming import IGNORED_ENTRIES, IGNORED_SIDECARS, MARKER, SCALE, SCALE_SPELLINGS, refused_sidecar
from .paths import CONFIG_FILE
from .sources import LinearQuantization, linear_quantization, total_bytes, weight_source
from .text import SUBLAYERS, TextEncoder, encoder_sublayer_of

FINAL_NORM = "norm.weight"
_MAX_CONFIG_BYTES = 1 << 20
_MAX_LAYERS = 200  # the largest published Qwen3 has 94
_MAX_SIZE = 1 << 20
_ROOT = "embed_tokens.weight"
_LAYER = re.compile(r"layers\.(\d{1,4})\.")
# What a language model has beyond the features; nothing here is ever needed.
_UNUSED = re.compile(r"(^|\.)(lm_head\.|score\.)|^norm\.(weight|bias)$|rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class EncoderLayout:
    """sources: parameters and scales of TextEncoder(config) by name; of a whole encoder, also the last layer and
    the final norm, where the file has them. quantized: linear layers with a scale."""

    path: Path
    config: TextEncoderConfig
    sources: Mapping[str, TensorSource]
    quantized: Mapping[str, LinearQuantization]

    @property
    def nbytes(self) -> int:
        return total_bytes(self.sources.values())

    @property
    def blocks(self) -> dict[str, tuple[TensorSource, ...]]:
        """What streams as one: sublayer ("layers.0.self_attn", …) -> what it needs, in the order they run."""
        grouped: dict[str, list[TensorSource]] = {
            f"layers.{number}.{kind}": [] for number in range(self.config.num_hidden_layers - 1) for kind in SUBLAYERS
        }
        for name, source in self.sources.items():
            layer = block_of(name)
            grouped.get(f"{layer}.{encoder_sublayer_of(name.removeprefix(f'{layer}.'))}", []).append(source)
        return {name: tuple(sources) for name, sources in grouped.items()}

    @property
    def block_bytes(self) -> dict[str, int]:
        return {name: total_bytes(sources) for name, sources in self.blocks.items()}


def read_encoder_layout(
    checkpoint: Checkpoint, *, whole: bool = False, config: TextEncoderConfig | None = None
) -> EncoderLayout:
    """Find a Qwen3-shaped encoder in an open checkpoint; without a `config` the `config.json` beside it is used where
    it exists.

    whole: also what the features do not need, for whoever rewrites the file.
    Raises CheckpointError naming the tensor and the reason for anything else.
    """
    path = checkpoint.files[0]
    tensors, markers = _collect(checkpoint, path)
    config = _read_config(path, tensors) if config is None else config
    used = _with_last_layer(config, tensors) if whole else config
    with torch.device("meta"):
        model = TextEncoder(used)
    linears = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    _require_exact(path, tensors, expected, used.num_hidden_layers)
    sources: dict[str, TensorSource] = {}
    quantized: dict[str, LinearQuantization] = {}
    for name, shape in expected.items():
        module = name.rpartition(".")[0]
        marker = markers.get(module, LayerMarker())
        sources[name] = weight_source(name, shape, [tensors[name]], may_be_int8=module in linears)
        if module in linears:
            scale = tensors.get(f"{module}.{SCALE}")
            if (entry := linear_quantization(module, sources[name], [scale], marker)) is not None:
                sources[entry[0].name], quantized[module] = entry
    if whole and (norm := _final_norm(checkpoint)) is not None:
        sources[FINAL_NORM] = weight_source(FINAL_NORM, (config.hidden_size,), [norm], may_be_int8=False)
    return EncoderLayout(path, config, sources, quantized)


def _with_last_layer(config: TextEncoderConfig, tensors: Mapping[str, TensorInfo]) -> TextEncoderConfig:
    """A configuration whose features need every layer the file has."""
    last = f"layers.{config.num_hidden_layers - 1}."
    if not any(name.startswith(last) for name in tensors):
        return config
    return replace(config, num_hidden_layers=config.num_hidden_layers + 1)


def _final_norm(checkpoint: Checkpoint) -> TensorInfo | None:
    root = next(name for name in checkpoint.tensors if name.endswith(_ROOT))
    return checkpoint.tensors.get(root.removesuffix(_ROOT) + FINAL_NORM)


def _collect(checkpoint: Checkpoint, path: Path) -> tuple[dict[str, TensorInfo], dict[str, LayerMarker]]:
    """Tensors and markers by inside name (no prefix, one spelling of scales). Raises CheckpointError for two of one
    name."""
    roots = [name for name in checkpoint.tensors if name == _ROOT or name.endswith("." + _ROOT)]
    if len(roots) != 1:
        found = f"{len(roots)} of them" if roots else f"first tensor is {shown(next(iter(checkpoint.tensors), ''))}"
        raise CheckpointError(path, f"no text encoder: it must have one {_ROOT} ({found})")
    prefix = roots[0].removesuffix(_ROOT)
    tensors: dict[str, TensorInfo] = {}
    markers: dict[str, LayerMarker] = {}
    for info in checkpoint.tensors.values():
        name = info.name.removeprefix(prefix)
        module, _, leaf = name.rpartition(".")
        if leaf in IGNORED_SIDECARS or leaf in IGNORED_ENTRIES or _UNUSED.search(name):
            continue
        if (refused := refused_sidecar(name)) is not None and leaf not in SCALE_SPELLINGS:
            raise CheckpointError(info.path, f"tensor {shown(info.name)} belongs to {refused}")
        inside = f"{module}.{SCALE}" if leaf in SCALE_SPELLINGS else name
        if (twin := tensors.get(inside)) is not None:
            raise CheckpointError(info.path, f"tensors {shown(twin.name)} and {shown(info.name)} are the same")
        tensors[inside] = info
    for name in [name for name in tensors if name.rpartition(".")[2] == MARKER]:
        markers[name.rpartition(".")[0]] = read_marker(checkpoint, tensors.pop(name))
    return tensors, markers | _metadata_markers(checkpoint, path, prefix)


def _metadata_markers(checkpoint: Checkpoint, path: Path, prefix: str) -> dict[str, LayerMarker]:
    """By inside name. Raises CheckpointError."""
    markers: dict[str, LayerMarker] = {}
    for layer, marker in read_metadata_markers(checkpoint.metadata, path).items():
        inside = layer.removeprefix(prefix)
        if inside in markers:
            raise CheckpointError(path, f"metadata describes layer {shown(inside)} twice, with its prefix and without")
        markers[inside] = marker
    return markers


def _read_config(path: Path, tensors: Mapping[str, TensorInfo]) -> TextEncoderConfig:
    shapes = _config_from_shapes(path, tensors)
    beside = path.with_name(CONFIG_FILE)
    if not beside.is_file():
        return _checked_config(path, shapes)
    with beside.open("rb") as file:
        raw = file.read(_MAX_CONFIG_BYTES + 1)
    if len(raw) > _MAX_CONFIG_BYTES:
        raise CheckpointError(beside, f"is larger than {_MAX_CONFIG_BYTES} bytes, which no configuration needs")
    values = parse_json_object(raw, beside, CONFIG_FILE, floats=True)
    return _config_from_json(beside, values, shapes)


def _config_from_shapes(path: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """All that tensor shapes tell; Qwen3's own eps and theta are the rest."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        info = tensors.get(name)
        if info is None or len(info.shape) != rank or not all(0 < size <= _MAX_SIZE for size in info.shape):
            got = "is missing" if info is None else f"has shape {list(info.shape)}"
            raise CheckpointError(path, f"no Qwen3 text encoder: tensor {name} {got}")
        return info.shape

    vocabulary, hidden = shape(_ROOT, 2)
    (head_dim,) = shape("layers.0.self_attn.q_norm.weight", 1)
    layers = {int(match.group(1)) for name in tensors if (match := _LAYER.match(name))}
    gaps = [number for number in range(len(layers)) if number not in layers]
    if gaps:
        raise CheckpointError(path, f"text encoder has layers up to {max(layers)} but lacks layers.{gaps[0]}")
    if len(layers) > _MAX_LAYERS:
        raise CheckpointError(path, f"text encoder has {len(layers)} layers, the limit is {_MAX_LAYERS}")
    return {
        "hidden_size": hidden,
        "num_hidden_layers": max(layers) + 1,
        "num_attention_heads": max(shape("layers.0.self_attn.q_proj.weight", 2)[0] // head_dim, 1),
        "num_key_value_heads": max(shape("layers.0.self_attn.k_proj.weight", 2)[0] // head_dim, 1),
        "head_dim": head_dim,
        "intermediate_size": shape("layers.0.mlp.gate_proj.weight", 2)[0],
        "vocab_size": vocabulary,
    }


def _config_from_json(path: Path, values: Mapping[str, Any], shapes: dict[str, Any]) -> TextEncoderConfig:
    """`config.json` over the shapes. Raises CheckpointError where they disagree."""
    kind = values.get("model_type", "qwen3")
    if kind != "qwen3":
        raise CheckpointError(path, f"model_type is {kind!r:.40}; only qwen3 is supported")
    for name, seen in shapes.items():
        said = values.get(name, seen)
        # A file cut down to the layers that are used may hold one less than it says.
        if said != seen and not (name == "num_hidden_layers" and said == seen + 1):
            raise CheckpointError(path, f"{name} is {said!r:.40} but the tensors say {seen}")
        if name == "num_hidden_layers" and said == seen + 1:
            shapes[name] = seen + 1
    for name, supported in (("hidden_act", "silu"), ("attention_bias", False)):
        if values.get(name, supported) != supported:
            raise CheckpointError(path, f"{name} is {values[name]!r:.40}; only {supported!r} is supported")
    for name in ("rope_scaling", "rope_parameters"):  # as transformers wrote it up to 4, and since
        if not _is_plain_rope(values.get(name)):
            raise CheckpointError(path, f"{name} is {values[name]!r:.60}; only plain RoPE is supported")
    rope = values.get("rope_parameters")
    theta = values.get("rope_theta", rope.get("rope_theta") if isinstance(rope, dict) else None)
    for name, value in (("rms_norm_eps", values.get("rms_norm_eps")), ("rope_theta", theta)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise CheckpointError(path, f"{name} must be a positive number, got {value!r:.40}")
        shapes[name] = float(value)
    return _checked_config(path, shapes)


def _checked_config(path: Path, values: Mapping[str, Any]) -> TextEncoderConfig:
    try:
        return TextEncoderConfig(**values)
    except ValueError as error:
        raise CheckpointError(path, str(error)) from None


def _is_plain_rope(said: object) -> bool:
    if said is None:
        return True
    return isinstance(said, dict) and said.get("rope_type", said.get("type", "default")) == "default"


def config_json(config: TextEncoderConfig) -> str:
    """The text of a `config.json` as transformers writes it, as far as the weights and this reader know it."""
    values = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu"}
    return json.dumps({**values, "attention_bias": False, **asdict(config)}, indent=2) + "\n"


def _require_exact(
    path: Path, tensors: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]], layers: int
) -> None:
    """Every expected tensor is there, and nothing else but the last layer."""
    missing = [name for name in expected if name not in tensors]
    if missing:
        reason = f"text encoder lacks {len(missing)} of {len(expected)} tensors, first is {missing[0]}"
        raise CheckpointError(path, reason)
    last = f"layers.{layers - 1}."
    known = {*expected, *(name.removesuffix("weight") + SCALE for name in expected)}
    left = [name for name in tensors if name not in known and not name.startswith(last)]
    if left:
        reason = f"has {len(left)} tensors that no Qwen3 text encoder has, first is {shown(left[0])}"
        raise CheckpointError(path, reason)
