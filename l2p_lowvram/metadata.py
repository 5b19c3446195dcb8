"""What a picture file says about its making: A1111's `parameters` text and a JSON record.

The text is for other programs and for people; the record repeats the run.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import PurePath

from . import __version__

RECORD_VERSION = 1
PARAMETERS_KEY = "parameters"
RECORD_KEY = "L2P"


@dataclass(frozen=True)
class InitImage:
    """Where img2img started. name: without its folder. sha256: of the file's bytes, in hex."""

    name: str
    sha256: str
    strength: float | None  # None with own sigmas, whose first says it


@dataclass(frozen=True)
class RunSettings:
    """Everything besides the model that decides the pixels of one picture.

    shift is None where `sigmas` (without the final 0) say everything. dtype and devices as torch
    spells them: "bfloat16", "cuda:0". compute: what multiplied INT8 weights, "dequant" or "int8".
    """

    prompt: str
    negative_prompt: str
    width: int
    height: int
    steps: int
    cfg_scale: float
    shift: float | None
    sigmas: tuple[float, ...] | None
    seed: int
    init_image: InitImage | None
    dtype: str
    device: str
    noise_device: str
    bf16_timestep: bool
    compute: str = "dequant"

    def with_seed(self, seed: int) -> RunSettings:
        return replace(self, seed=seed)


def versions() -> dict[str, str]:
    """They belong to a record: torch does not promise that sums or random numbers stay the same."""
    from torch import __version__ as torch_version

    return {
        "l2p_lowvram": __version__,
        "torch": str(torch_version),
        "python": platform.python_version(),
    }


def text_entries(settings: RunSettings, identity: Mapping[str, object]) -> dict[str, str]:
    """Both notes by the names they are stored under. identity: the pipeline's, of the model file."""
    return {
        PARAMETERS_KEY: parameters_text(settings, identity),
        # Plain ASCII, so that a PNG keeps it as tEXt, which every reader knows.
        RECORD_KEY: json.dumps(run_record(settings, identity)),
    }


def parameters_text(settings: RunSettings, identity: Mapping[str, object]) -> str:
    """A1111's format: prompt, `Negative prompt: …`, and `name: value` pairs on the last line.

    The model hash is the start of the SHA-256 of the file's *header*: A1111 hashes the whole file, which
    would mean reading gigabytes.
    """
    pairs: dict[str, object] = {
        "Steps": settings.steps,
        "Sampler": "Euler",
        "CFG scale": _number(settings.cfg_scale),
        "Seed": settings.seed,
        "Size": f"{settings.width}x{settings.height}",
    }
    if "header_sha256" in identity:
        pairs["Model hash"] = str(identity["header_sha256"])[:10]
    if "file" in identity:
        pairs["Model"] = PurePath(str(identity["file"])).stem
    if settings.init_image is not None and settings.init_image.strength is not None:
        pairs["Denoising strength"] = _number(settings.init_image.strength)
    if settings.shift is not None:
        pairs["Shift"] = _number(settings.shift)
    pairs["Version"] = f"l2p_lowvram {__version__}"
    lines = [settings.prompt]
    if settings.negative_prompt:
        lines.append(f"Negative prompt: {settings.negative_prompt}")
    lines.append(", ".join(f"{name}: {_quote(str(value))}" for name, value in pairs.items()))
    return "\n".join(lines)


def run_record(settings: RunSettings, identity: Mapping[str, object]) -> dict[str, object]:
    """What it takes to repeat the run, as JSON values."""
    return {
        "record_version": RECORD_VERSION,
        **settings_record(settings),
        "seed": settings.seed,
        "model": dict(identity),
        "versions": versions(),
    }


def settings_record(settings: RunSettings) -> dict[str, object]:
    """The settings shared by all pictures of a run: all but the seed, as JSON values."""
    image = settings.init_image
    return {
        "prompt": settings.prompt,
        "negative_prompt": settings.negative_prompt,
        "width": settings.width,
        "height": settings.height,
        "steps": settings.steps,
        "cfg_scale": settings.cfg_scale,
        "shift": settings.shift,
        "sigmas": None if settings.sigmas is None else list(settings.sigmas),
        "strength": None if image is None else image.strength,
        "image": None if image is None else {"name": image.name, "sha256": image.sha256},
        "sampler": "euler",
        "dtype": settings.dtype,
        "device": settings.device,
        "noise_device": settings.noise_device,
        "bf16_timestep": settings.bf16_timestep,
        "compute": settings.compute,
    }


def _number(value: float) -> str:
    """`2.0` as "2": A1111 writes whole numbers without a point, and both read the same."""
    return str(int(value)) if value == int(value) else str(value)


def _quote(value: str) -> str:
    """A1111's rule: what would end a pair early is written as a JSON string."""
    if any(mark in value for mark in (",", "\n", ":")):
        return json.dumps(value, ensure_ascii=False)
    return value
