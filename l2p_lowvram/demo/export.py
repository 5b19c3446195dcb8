"""Turn a training run into a model folder: `python -m l2p_lowvram.demo.export RUN_DIR MODEL_DIR`.

The folder has the formats of the real thing: an INT8 model in ComfyUI's layout, a Qwen3 text encoder as
Hugging Face stores it, `tokenizer.json` and `l2p.json`. Weights are the run's average.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config import TextEncoderConfig
from ..export import save_checkpoint
from ..paths import SETTINGS_FILE
from ..settings import settings_json
from .train import AVERAGE, ENCODER, ENCODER_FILE, MODEL, SKETCH, STATE_FILE, TOKENIZER_FILE


def export(run: Path, target: Path, scheme: str | None = "row") -> None:
    """Write `target` from the newest state in `run`; existing files there are replaced.

    scheme: of the INT8 linears, as `quantization.Scheme` names it; None keeps all weights F32.
    """
    for folder in ("text_encoder", "tokenizer"):
        (target / folder).mkdir(parents=True, exist_ok=True)
    tensors = load_file(run / STATE_FILE)
    average = {name.removeprefix(AVERAGE): value for name, value in tensors.items() if name.startswith(AVERAGE)}
    average = {name: value for name, value in average.items() if not name.startswith(SKETCH)}
    rest = torch.bfloat16 if scheme else None
    model = target / "model.safetensors"
    save_checkpoint(model, average, MODEL, scheme=scheme, rest_dtype=rest, overwrite=True)
    (target / SETTINGS_FILE).write_text(settings_json(MODEL) + "\n")
    encoder = complete_encoder(load_file(run / ENCODER_FILE), ENCODER)
    encoder_file = target / "text_encoder" / "model.safetensors"
    halves = {name: value.to(torch.bfloat16).contiguous() for name, value in encoder.items()}
    save_file(halves, encoder_file, metadata={"format": "pt"})
    encoder_file.chmod(model.stat().st_mode)  # the library makes files that only their owner may read
    (target / "text_encoder" / "config.json").write_text(json.dumps(encoder_config(ENCODER), indent=2) + "\n")
    shutil.copyfile(run / TOKENIZER_FILE, target / "tokenizer" / TOKENIZER_FILE)


def complete_encoder(weights: dict[str, Tensor], config: TextEncoderConfig) -> dict[str, Tensor]:
    """The trained layers in Hugging Face's names, with the last layer that is never used.

    It adds nothing (its outputs are zero), so that the file is a whole Qwen3 model to other readers.
    """
    last, trained = config.num_hidden_layers - 1, "layers.0."
    result = {f"model.{name}": value for name, value in weights.items()}
    for name, value in weights.items():
        if name.startswith(trained):
            silent = name.endswith(("o_proj.weight", "down_proj.weight"))
            result[f"model.layers.{last}.{name.removeprefix(trained)}"] = value * 0 if silent else value
    result["model.norm.weight"] = torch.ones(config.hidden_size)
    return result


def encoder_config(config: TextEncoderConfig) -> dict[str, object]:
    """`config.json` as transformers writes it for a Qwen3 model."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
        "dtype": "bfloat16",
        **asdict(config),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument("target", type=Path, help="the model folder to write")
    parser.add_argument("--float", action="store_true", help="keep all weights F32 (for comparing)")
    arguments = parser.parse_args(argv)
    export(arguments.run, arguments.target, None if arguments.float else "row")


if __name__ == "__main__":
    main()
