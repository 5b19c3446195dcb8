"""Prompts' features, where the cache and the text encoder meet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from l2p_lowvram.prompt_cache import PromptCache
from l2p_lowvram.prompts import PromptEncoder
from l2p_lowvram.streamed_encoder import StreamedTextEncoder
from l2p_lowvram.text import MAX_TOKENS, PromptTokenizer

WIDTH = 4


def prompt_encoder(cache: PromptCache, encode: Callable[..., list[Tensor]]) -> PromptEncoder:
    encoder = SimpleNamespace(
        encode=encode,
        identity=lambda: "encoder",
        dtype=torch.float32,
        device=torch.device("cpu"),
        config=SimpleNamespace(hidden_size=WIDTH),
    )
    return PromptEncoder(cast(StreamedTextEncoder, encoder), PromptTokenizer(lambda _: [1, 2, 3]), cache)


@pytest.mark.parametrize(
    ("shape", "is_hit"),
    [
        ((3, WIDTH), True),
        ((MAX_TOKENS, WIDTH), True),
        ((MAX_TOKENS + 1, WIDTH), False),
        ((0, WIDTH), False),
        ((3, WIDTH + 1), False),
        ((3,), False),
    ],
)
def test_features_no_prompt_has_are_encoded_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], is_hit: bool
) -> None:
    cached, made = torch.ones(shape), torch.zeros(1, 3, WIDTH)
    cache = PromptCache(tmp_path)
    monkeypatch.setattr(cache, "get", lambda _: cached)
    encoder = prompt_encoder(cache, lambda ids, progress: [made])

    (found,) = encoder(["a cat"])

    assert torch.equal(found, cached if is_hit else made[0])
