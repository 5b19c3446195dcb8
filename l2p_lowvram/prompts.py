"""A prompt's features, from the cache or from the text encoder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .encoder import LazyTextEncoder
from .prompt_cache import PromptCache
from .text import PromptTokenizer, render_prompt


class PromptEncoder:
    """Tokenizer and text encoder together, with an optional cache on disk.

    What is cached depends on the encoder's and tokenizer's identity, the rendered prompt, the dtype
    and the kind of device, so a hit gives the bits that encoding would have given.
    """

    def __init__(self, encoder: LazyTextEncoder, tokenizer: PromptTokenizer, cache: PromptCache | None = None) -> None:
        self.encoder, self.tokenizer, self.cache = encoder, tokenizer, cache

    def __call__(self, prompt: str, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """prompt -> (tokens, width) on the encoder's device, in its dtype."""
        if self.cache is None:
            return self._encode(prompt, progress)
        key = self.cache.key(
            f"{self.encoder.identity()} {self.tokenizer.identity}",
            render_prompt(prompt),
            self.encoder.dtype,
            self.encoder.device.type,
        )
        features = self.cache.get(key)
        if features is None or features.dim() != 2 or features.shape[1] != self.encoder.config.hidden_size:
            features = self._encode(prompt, progress)
            self.cache.put(key, features.cpu())
        return features.to(self.encoder.device, self.encoder.dtype)

    def _encode(self, prompt: str, progress: Callable[[int, int], None] | None) -> Tensor:
        return self.encoder(torch.tensor([self.tokenizer(prompt)]), progress)[0]
