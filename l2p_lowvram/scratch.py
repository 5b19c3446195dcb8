"""Memory that a model's layers use one after the other, instead of a fresh tensor each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Scratch:
    """Named buffers, each as large as its largest use so far. Owned by a model; freed by `release`.

    For layers that run one after the other, on one stream: what a later use of a name writes is ordered behind
    everything that reads an earlier one. Not for two threads, and not for what autograd keeps.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device, least: int = 0) -> Tensor:
        """A tensor whose values are garbage, valid until `name` is taken again. least: bytes that a new buffer
        has at least, where later uses will want them: one that grows leaves a hole in a card's memory."""
        key, nbytes = (name, device), math.prod(shape) * dtype.itemsize
        if key not in self._buffers or self._buffers[key].numel() < nbytes:
            self._buffers.pop(key, None)  # first, so that the two never exist together
            with torch.inference_mode(False):  # a later use may stand outside of it
                self._buffers[key] = torch.empty(max(nbytes, least), dtype=torch.uint8, device=device)
        return self._buffers[key][:nbytes].view(dtype).view(*shape)

    def release(self) -> None:
        """Give the memory back; tensors taken before keep theirs alive until they are gone."""
        self._buffers.clear()

    def share(self, model: nn.Module) -> None:
        """Make this the scratch of every layer in `model` that has one."""
        for module in model.modules():
            if hasattr(module, "scratch"):
                module.scratch = self  # type: ignore[assignment]
