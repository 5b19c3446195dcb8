"""What a model's owner may say about it beside the weights: `l2p.json`.

    {"rope_axes": [8, 12, 12], "defaults": {"width": 256, "steps": 20, "cfg_scale": 2.0}}

The same JSON may stand in the safetensors metadata entry `l2p`. Every key is optional, and keys that
are not known are left alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from offload import CheckpointError
from offload.header import parse_json_object

from .config import ModelConfig, SamplingDefaults
from .paths import SETTINGS_FILE, model_folder

METADATA_ENTRY = "l2p"
_MAX_SETTINGS_BYTES = 1 << 20


@dataclass(frozen=True)
class ModelSettings:
    """rope_axes: channels of a head per position axis, or None. defaults: fields of SamplingDefaults."""

    rope_axes: tuple[int, int, int] | None = None
    defaults: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, raw: bytes, path: Path, what: str = SETTINGS_FILE) -> ModelSettings:
        """Read the JSON; `path` and `what` are for messages. Raises CheckpointError."""
        values = parse_json_object(raw, path, what, floats=True)
        axes = values.get("rope_axes")
        if axes is not None and not (isinstance(axes, list) and len(axes) == 3 and all(map(_is_int, axes))):
            raise CheckpointError(path, f"{what}: rope_axes must be three whole numbers, got {axes!r:.80}")
        defaults = values.get("defaults", {})
        if not isinstance(defaults, dict):
            raise CheckpointError(path, f"{what}: defaults must be an object, got {defaults!r:.80}")
        try:
            SamplingDefaults().updated(defaults)
        except (ValueError, OverflowError) as error:
            raise CheckpointError(path, f"{what}: {error}") from None
        return cls(tuple(axes) if axes is not None else None, defaults)

    def over(self, base: ModelSettings) -> ModelSettings:
        """These settings, with those of `base` where these are silent."""
        return ModelSettings(self.rope_axes or base.rope_axes, {**base.defaults, **self.defaults})


def settings_beside(weights: Path) -> ModelSettings:
    """The `l2p.json` of the model folder that `weights` is the model file of; empty where there is none.

    Raises CheckpointError for a file that is there and wrong.
    """
    folder = model_folder(weights)
    if folder is None or not (folder / SETTINGS_FILE).is_file():
        return ModelSettings()
    path = folder / SETTINGS_FILE
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_SETTINGS_BYTES + 1)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror or error}") from error
    if len(raw) > _MAX_SETTINGS_BYTES:
        raise CheckpointError(path, f"is larger than {_MAX_SETTINGS_BYTES} bytes, which no settings need")
    return ModelSettings.parse(raw, path)


def settings_json(config: ModelConfig) -> str:
    """The text of an `l2p.json` that says all it can about `config`."""
    return json.dumps({"rope_axes": list(config.rope_axes), "defaults": asdict(config.defaults)})


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
