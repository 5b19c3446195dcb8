"""Prompts' features, from the cache or from the text encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .devices import device_name
from .prompt_cache import PromptCache
from .streamed_encoder import StreamedTextEncoder
from .text import MAX_TOKENS, PromptTokenizer, render_prompt


class PromptEncoder:
    """Tokenizer and text encoder together, with an optional cache on disk.

    What is cached depends on the encoder's and tokenizer's identity, the rendered prompt, the dtype, torch's release
    and the device's name, so a hit gives the bits that encoding would have given.
    """

    def __init__(
        self, encoder: StreamedTextEncoder, tokenizer: PromptTokenizer, cache: PromptCache | None = None
    ) -> None:
        self.encoder, self.tokenizer, self.cache = encoder, tokenizer, cache

    def __call__(self, prompts: Sequence[str], progress: Callable[[int, int], None] | None = None) -> list[Tensor]:
        """Prompts -> (tokens, width) each, on the encoder's device, in its dtype.

        Those not in the cache go through the encoder together: its weights are read once.
        """
        keys = {prompt: self._key(prompt) for prompt in prompts}
        known = {prompt: found for prompt, key in keys.items() if (found := self._cached(key)) is not None}
        missing = [prompt for prompt in keys if prompt not in known]
        if missing:
            ids = [torch.tensor([self.tokenizer(prompt)]) for prompt in missing]
            for prompt, features in zip(missing, self.encoder.encode(ids, progress), strict=True):
                known[prompt] = features[0]
                key = keys[prompt]
                if self.cache is not None and key is not None:
                    self.cache.put(key, features[0].cpu())
        return [known[prompt].to(self.encoder.device, self.encoder.dtype) for prompt in prompts]

    def require_room(self, prompts: Sequence[str]) -> None:
        """Raise BudgetError unless those that are not in the cache can be encoded."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if self._cached(self._key(prompt)) is None]
        if missing:
            self.encoder.require_room([len(self.tokenizer(prompt)) for prompt in missing])

    def _key(self, prompt: str) -> str | None:
        if self.cache is None:
            return None
        return self.cache.key(
            f"{self.encoder.identity()} {self.tokenizer.identity}",
            render_prompt(prompt),
            self.encoder.dtype,
            device_name(self.encoder.device),
        )

    def _cached(self, key: str | None) -> Tensor | None:
        features = None if self.cache is None or key is None else self.cache.get(key)
        if features is None or features.dim() != 2 or not 0 < features.shape[0] <= MAX_TOKENS:
            return None
        return features if features.shape[1] == self.encoder.config.hidden_size else None
