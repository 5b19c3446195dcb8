"""How files say that a linear layer is quantised: `comfy_quant` tensors and file metadata.

A marker is a JSON object, in a U8 tensor `X.comfy_quant` or under `layers` of the metadata entry
`_quantization_metadata`, which wins where both are there. Writers disagree on the details: the format
may be missing, the rest may be nested in `params`, and labels are at times wrong. So a marker only
decides what shapes cannot tell: which format is refused, the rotation, and full precision.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offload import Checkpoint, CheckpointError, TensorInfo
from offload.header import parse_json_object, shown

from .linear import REGULAR, SYLVESTER, Rotation

QUANTIZATION_METADATA = "_quantization_metadata"
_MAX_MARKER_BYTES = 64 << 10

_INT8_FORMATS = frozenset({"int8_tensorwise", "int8_blockwise", "int8_rowwise"})
_FLOAT8_FORMATS = frozenset(
    f"float8_{kind}{scaling}" for kind in ("e4m3fn", "e5m2") for scaling in ("", "_rowwise", "_blockwise", "_block3d")
)
_WRITTEN_FORMATS = {
    torch.int8: "int8_tensorwise",
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.float8_e5m2: "float8_e5m2",
}
_PACKED_FORMATS = frozenset({"convrot_w4a4", "asym_w4a8_int8", "awq_w4a16", "nvfp4", "mxfp8"})

_DEFAULT_GROUP = 256
# Published rotations by group size. 128 and 512 are no powers of four, so they have to be Sylvester's.
_ROTATIONS = {
    **dict.fromkeys((16, 64, 256, 1024), REGULAR),
    **dict.fromkeys((128, 512), SYLVESTER),
}


@dataclass(frozen=True)
class LayerMarker:
    """What a marker says about one linear layer. dtype: "I8" or "F8", None where it names no format."""

    dtype: str | None = None
    rotation: Rotation | None = None
    full_precision_matmul: bool = False

    def check_dtype(self, weight: TensorInfo) -> None:
        """Raise CheckpointError unless the weight's dtype is what the marker's format says."""
        if self.dtype is not None and not weight.dtype.startswith(self.dtype):
            reason = f"tensor {shown(weight.name)} is {weight.dtype} but its marker says {self.dtype}"
            raise CheckpointError(weight.path, reason)

    def check_columns(self, weight: TensorInfo) -> None:
        """Raise CheckpointError unless the rotation's group divides the weight's columns."""
        if self.rotation is not None and weight.shape[-1] % self.rotation.group:
            reason = (
                f"tensor {shown(weight.name)} has {weight.shape[-1]} columns, no multiple of the "
                f"rotation group {self.rotation.group} its marker names"
            )
            raise CheckpointError(weight.path, reason)


def parse_marker(values: Mapping[str, Any], path: Path, what: str) -> LayerMarker:
    """Read a marker's JSON object; `path` and `what` (a tensor's name) are for messages.

    Raises CheckpointError for a format that is refused, an unknown one, and wrong types.
    """
    nested = values.get("params", {})
    if not isinstance(nested, dict):
        raise CheckpointError(path, f"{what}: params must be an object, got {str(nested)[:80]!r}")
    values = {**nested, **values}
    return LayerMarker(
        _format_dtype(values.get("format"), path, what),
        _rotation(values, path, what),
        _flag(values, "full_precision_matrix_mult", path, what),
    )


def read_marker(checkpoint: Checkpoint, info: TensorInfo) -> LayerMarker:
    """Read a `comfy_quant` tensor. Raises CheckpointError."""
    what = f"marker {shown(info.name)}"
    if info.dtype != "U8" or len(info.shape) != 1 or info.nbytes > _MAX_MARKER_BYTES:
        reason = f"must be 1-D U8 of at most {_MAX_MARKER_BYTES} bytes, got {info.dtype} {list(info.shape)}"
        raise CheckpointError(info.path, f"{what} {reason}")
    raw = checkpoint.tensor(info.name).numpy().tobytes().rstrip(b"\0 \n")
    return parse_marker(parse_json_object(raw, info.path, what, floats=True), info.path, what)


def read_metadata_markers(metadata: Mapping[str, str], path: Path) -> dict[str, LayerMarker]:
    """Layer name as the file spells it -> marker, from the file metadata. Raises CheckpointError."""
    text = metadata.get(QUANTIZATION_METADATA)
    if text is None:
        return {}
    values = parse_json_object(text.encode(), path, f"metadata {QUANTIZATION_METADATA}", floats=True)
    layers = values.get("layers", {})
    if not isinstance(layers, dict) or not all(isinstance(layer, dict) for layer in layers.values()):
        raise CheckpointError(path, f"metadata {QUANTIZATION_METADATA}: layers must map names to objects")
    return {name: parse_marker(layer, path, f"metadata of {shown(name)}") for name, layer in layers.items()}


def marker_json(
    dtype: torch.dtype,
    block: tuple[int, int],
    shape: tuple[int, int],
    rotation: Rotation | None = None,
    *,
    full_precision_matmul: bool = False,
) -> str:
    """The marker ComfyUI understands, for a weight of `shape` with one scale per `block` of it."""
    values: dict[str, object] = {"format": _WRITTEN_FORMATS[dtype]}
    if dtype == torch.int8 and block != shape:
        if block[0] == 1:
            values["per_row"] = True
        else:
            values = {"format": "int8_blockwise", "group_size": block[0]}
    if rotation is not None:
        values |= {"convrot": True, "convrot_groupsize": rotation.group}
    if full_precision_matmul:
        values["full_precision_matrix_mult"] = True
    return json.dumps(values)


def _format_dtype(name: object, path: Path, what: str) -> str | None:
    if name is None:
        return None
    name = str(name)
    if name in _INT8_FORMATS:
        return "I8"
    if name in _FLOAT8_FORMATS:
        return "F8"
    kind = "the 4-bit or block-float" if name in _PACKED_FORMATS else "the unknown"
    reason = f"{what} names {kind} format {shown(name)}; INT8 and scaled FP8 are supported"
    raise CheckpointError(path, reason)


def _rotation(values: Mapping[str, Any], path: Path, what: str) -> Rotation | None:
    if not _flag(values, "convrot", path, what):
        return None
    group = values.get("convrot_groupsize")
    group = _DEFAULT_GROUP if group is None else group
    if isinstance(group, bool) or not isinstance(group, int) or group not in _ROTATIONS:
        known = ", ".join(map(str, sorted(_ROTATIONS)))
        raise CheckpointError(path, f"{what} names the rotation group {str(group)[:40]}; known are {known}")
    return Rotation(group, _ROTATIONS[group])


def _flag(values: Mapping[str, Any], name: str, path: Path, what: str) -> bool:
    value = values.get(name)
    if value not in (None, False, True):  # 0 and 1 pass, as some writers spell it
        raise CheckpointError(path, f"{what}: {name} must be true or false, got {str(value)[:40]!r}")
    return bool(value)
