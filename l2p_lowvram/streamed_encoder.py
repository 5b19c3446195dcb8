"""A text encoder that holds its weights only while it works, half a layer at a time, within the pipeline's budget."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from offload import Block, Checkpoint, CheckpointError

from .config import TextEncoderConfig
from .encoder import read_encoder_layout
from .estimates import CPU_FLOPS
from .half_kernels import minding_address
from .linear import converted_bytes
from .streaming import PhaseDemand, Streamer, WeightStream
from .text import TextEncoder
from .weights import check_scales, lent, mark_quantized

_EMBEDDING = "embed_tokens.weight"
# What of a file tells it from others: its header, and as many samples at even distances.
_HEADER_BYTES, _SAMPLED_BYTES, _SAMPLES = 1 << 20, 16 << 10, 64


class StreamedTextEncoder:
    """Token ids -> features. All prompts of a call go through each sublayer in one visit, so that its
    weights are read once; of the embedding only the rows of the tokens at hand are read at all."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        device: torch.device,
        dtype: torch.dtype,
        streamer: Streamer | None = None,
    ) -> None:
        """Reads headers, and scales where there are any. Raises CheckpointError."""
        self.path = Path(path)
        self.device, self.dtype = device, dtype
        self._streamer = Streamer(device) if streamer is None else streamer
        with Checkpoint.open(self.path) as checkpoint:
            self.layout = read_encoder_layout(checkpoint)
            check_scales(checkpoint, self.layout.sources.values())
            self.files, self.header_sha256 = checkpoint.files, checkpoint.header_sha256
            self._identities = dict(checkpoint.identities)
        with torch.device("meta"):
            model = TextEncoder(self.layout.config)
        mark_quantized(model, self.layout.quantized)
        self._model = model.requires_grad_(False).eval()
        self._blocks = [Block(name, sources) for name, sources in self.layout.blocks.items()]

    @property
    def config(self) -> TextEncoderConfig:
        return self.layout.config

    def identity(self) -> str:
        """Changes whenever the files do, as far as names, sizes, times, headers and samples of all parts tell."""
        digest = hashlib.sha256(repr(self.config).encode())
        for file in self.files:
            stat = file.stat()
            digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
            with file.open("rb") as handle:
                digest.update(handle.read(_HEADER_BYTES))
                for part in range(1, _SAMPLES):
                    handle.seek(part * stat.st_size // _SAMPLES)
                    digest.update(handle.read(_SAMPLED_BYTES))
        return digest.hexdigest()

    def __call__(self, input_ids: Tensor, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """input_ids (B, L), unpadded -> hidden states before the last layer (B, L, hidden)."""
        return self.encode([input_ids], progress)[0]

    @torch.no_grad()
    def encode(self, prompts: Sequence[Tensor], progress: Callable[[int, int], None] | None = None) -> list[Tensor]:
        """Several input_ids (B, L) of different lengths -> hidden states before the last layer (B, L, hidden).

        Raises ValueError for ids outside the vocabulary, BudgetError, CheckpointError, OSError.
        """
        for ids in prompts:
            self._model.check_ids(ids)
        with Checkpoint.open(self.path) as checkpoint:
            if checkpoint.identities != self._identities:
                # What it is read by, places and shapes of its tensors, is of the files as they were.
                raise CheckpointError(self.path, "was replaced or modified since it was opened; load the model again")
            stream = self._streamer.open(self._model, checkpoint, self.demand([ids.numel() for ids in prompts]))
            try:
                states = [self._embed(stream, ids) for ids in prompts]
                for done, sublayer in enumerate(self._model.sublayers(), 1):
                    with stream.visit(sublayer.name):
                        states = [(sublayer.visit(x, cos, sin), cos, sin) for x, cos, sin in states]
                    if progress is not None:
                        progress(done, len(self._blocks))
            finally:
                stream.close()
                self._model.scratch.release()
        return [x for x, _, _ in states]

    def _embed(self, stream: WeightStream, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The prelude, on a vocabulary of the tokens at hand."""
        used, compact = ids.unique(return_inverse=True)
        rows = stream.gather(self.layout.sources[_EMBEDDING], used.tolist()).to(self.device)
        with lent(self._model, {_EMBEDDING: rows}):
            return self._model.prelude(compact.to(self.device), self.dtype)

    def require_room(self, lengths: Sequence[int]) -> None:
        """Raise BudgetError unless prompts of so many tokens can be encoded together."""
        with Checkpoint.open(self.path) as checkpoint:
            self._streamer.require_room(checkpoint, self.demand(lengths))

    def demand(self, lengths: Sequence[int]) -> PhaseDemand:
        """What encoding prompts of so many tokens asks of the weights."""
        config = self.config
        longest, tokens = max(lengths, default=0), sum(lengths)
        inner = config.num_attention_heads * config.head_dim
        widest = longest * (3 * config.intermediate_size + 6 * inner) + config.num_attention_heads * longest**2
        activations = 4 * (2 * tokens * config.hidden_size + widest)
        activations += converted_bytes(self.device, self.dtype.itemsize)
        seconds = {block.name: tokens * block.nbytes / CPU_FLOPS for block in self._blocks}
        return PhaseDemand(
            "text encoder",
            self._blocks,
            seconds,
            activations,
            once=[block.name for block in self._blocks],
            to_align=minding_address({self.dtype}) if self.device.type == "cpu" else None,
        )
