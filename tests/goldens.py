"""The reference tensors: small sets beside this file, larger ones in ../shared/golden where that exists.

Made by running other people's implementations; weights are rebuilt from a recipe by name.
"""

from __future__ import annotations

import importlib.util
import json
import os
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).parents[1]
LOCAL = ROOT / "tests" / "golden"
SHARED = Path(os.environ.get("L2P_GOLDEN", ROOT.parent / "shared" / "golden"))
FOLDERS = (LOCAL, SHARED, SHARED / "hr", SHARED / "int8")


def path(name: str) -> Path:
    """The file, or a skip where only the larger sets have it."""
    for folder in FOLDERS:
        if (folder / name).is_file():
            return folder / name
    return pytest.skip(f"{name} belongs to the larger golden sets, which are not here")


def tensors(name: str) -> dict[str, Tensor]:
    return load_file(path(f"{name}.safetensors"))


def values(name: str) -> Any:
    return json.loads(path(f"{name}.json").read_text())


def metadata(name: str) -> dict[str, str]:
    with safe_open(path(f"{name}.safetensors"), "pt") as file:
        return file.metadata()


@lru_cache
def recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, LOCAL / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@lru_cache
def weights(name: str) -> dict[str, Tensor]:
    """The complete checkpoint of a golden set, in the original's names."""
    config = values(f"{name}.config")
    maker = recipe("make_weights_hr" if config["kind"] == "l2p_hr" else "make_weights")
    built = maker.build(config)
    assert maker.digest(built) == config["digest_all"]
    return {key: torch.from_numpy(value) for key, value in built.items()}


def write_checkpoint(name: str, folder: Path) -> Path:
    """The golden set's weights as a file whose metadata tells the RoPE axes."""
    axes = values(f"{name}.config")["axes_dims"]
    target = folder / f"{name}.safetensors"
    save_file(weights(name), target, metadata={"l2p": json.dumps({"rope_axes": axes})})
    return target
