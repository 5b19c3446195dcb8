"""Which files make up a model: one file, a sharded set, a model folder, or the demo.

FOLDER/
  model.safetensors     or model.safetensors.index.json and its shards
  l2p.json              optional: RoPE axes and sampling defaults
  text_encoder/         optional: config.json and safetensors files
  tokenizer/            optional: tokenizer.json
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from offload import Checkpoint, CheckpointError

from .layout import read_layout
from .model import L2PTransformer
from .model_weights import StreamedWeights
from .paths import DEMO, TEXT_ENCODER_FOLDER, TOKENIZER_FILE, TOKENIZER_FOLDER, expanded, model_folder
from .streamed_encoder import StreamedTextEncoder
from .streaming import Streamer
from .text import PromptTokenizer
from .tokenizer_file import read_tokenizer
from .weights import build_transformer, check_scales, int8_layers

DEMO_FOLDER = Path(__file__).parent / "demo" / "assets"

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class OpenedTransformer:
    """A model without weights, and what lends them to it. int8_layers: as `weights.int8_layers` counts them."""

    transformer: L2PTransformer
    weights: StreamedWeights
    identity: dict[str, object]
    warnings: tuple[str, ...]
    int8_layers: int


@dataclass(frozen=True)
class ModelFiles:
    """weights: file, index or folder. text_encoder_path, tokenizer_path: None where the model has none."""

    weights: Path
    text_encoder_path: Path | None = None
    tokenizer_path: Path | None = None

    def open_transformer(self, streamer: Streamer) -> OpenedTransformer:
        """Check the file and get ready to stream it; reads its header and its scales. Raises CheckpointError."""
        checkpoint = Checkpoint.open(self.weights)
        try:
            layout = read_layout(checkpoint)
            check_scales(checkpoint, layout.sources.values())
            identity: dict[str, object] = {
                "file": DEMO if self.weights == DEMO_FOLDER else self.weights.name,
                "bytes": sum(file.stat().st_size for file in checkpoint.files),
                "header_sha256": checkpoint.header_sha256,
                "family": layout.family,
            }
        except BaseException:
            checkpoint.close()
            raise
        transformer = build_transformer(layout)
        weights = StreamedWeights(transformer, layout, checkpoint, streamer)
        return OpenedTransformer(transformer, weights, identity, layout.warnings, int8_layers(layout))

    def check_width(self, features: int, expected: int) -> None:
        """Raise ValueError unless the text encoder's features are as wide as the model expects them."""
        if features != expected:
            raise ValueError(
                f"{self.text_encoder_path}: the text encoder makes features of width {features}, "
                f"the model reads {expected}; they do not belong together"
            )

    def text_encoder(self, streamer: Streamer, dtype: torch.dtype) -> StreamedTextEncoder | None:
        """Raises CheckpointError."""
        if self.text_encoder_path is None:
            return None
        return StreamedTextEncoder(self.text_encoder_path, device=streamer.device, dtype=dtype, streamer=streamer)

    def tokenizer(self) -> PromptTokenizer:
        """Raises ValueError."""
        if self.tokenizer_path is None:
            raise ValueError(
                f"no {TOKENIZER_FILE} found for the text encoder {self.text_encoder_path}; name it with tokenizer="
            )
        return read_tokenizer(self.tokenizer_path)


def locate_model(
    model: PathLike, *, text_encoder: PathLike | None = None, tokenizer: PathLike | None = None
) -> ModelFiles:
    """Find the files. Raises FileNotFoundError or CheckpointError naming what is missing."""
    path = DEMO_FOLDER if str(model) == DEMO else expanded(model)
    if not path.exists():
        hint = ""
        if len(path.parts) == 2 and not path.suffix:
            hint = "; if this is a Hugging Face repository, download it first (hf download) and name the file"
        raise FileNotFoundError(f"{path}: no such model file or folder{hint}")
    encoder_path = _existing(text_encoder, "text encoder")
    tokenizer_path = _existing(tokenizer, "tokenizer")
    folder = model_folder(path)
    if folder is not None and encoder_path is None and (folder / TEXT_ENCODER_FOLDER).is_dir():
        encoder_path = folder / TEXT_ENCODER_FOLDER
    return ModelFiles(path, encoder_path, _find_tokenizer(folder, encoder_path, tokenizer_path))


def _existing(path: PathLike | None, what: str) -> Path | None:
    if path is None:
        return None
    result = expanded(path)
    if not result.exists():
        raise FileNotFoundError(f"{result}: no such {what} file or folder")
    return result


def _find_tokenizer(model: Path | None, encoder: Path | None, named: Path | None) -> Path | None:
    """The named tokenizer, else the first of the usual places around model and encoder."""
    if named is not None:
        found = named / TOKENIZER_FILE if named.is_dir() else named
        if not found.is_file():
            raise CheckpointError(named, f"has no {TOKENIZER_FILE}")
        return found
    folders = [model / TOKENIZER_FOLDER, model] if model is not None else []
    if encoder is not None:
        folder = encoder if encoder.is_dir() else encoder.parent
        folders += [folder, folder.parent / TOKENIZER_FOLDER, folder / TOKENIZER_FOLDER]
    return next((folder / TOKENIZER_FILE for folder in folders if (folder / TOKENIZER_FILE).is_file()), None)
