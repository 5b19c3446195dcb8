"""Counts the bytes of all tensors alive, as operations make and lose them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`current` and `peak` bytes of the storages that operations return while the mode is on.

    A storage counts once, however many views it has, until its last tensor is gone. Every operation counts
    as one kernel: what it allocates inside and frees again is not seen. In inference mode that holds for
    composite operations as well (linear, rms_norm, attention), as on a device with fused kernels for them.
    `at` names the operation that made the peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self.at = ""
        self._alive: dict[int, weakref.ref[Any]] = {}

    def restart(self) -> int:
        """Forget the peak so far; returns the bytes alive now."""
        self.peak = self.current
        return self.current

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._count(leaf.untyped_storage(), func, tuple(leaf.shape))
        return result

    def _count(self, storage: torch.UntypedStorage, func: Any, shape: tuple[int, ...]) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._alive and self._alive[key]() is storage:
            return

        def gone(_: Any) -> None:
            self.current -= nbytes
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, gone)
        self.current += nbytes
        if self.current > self.peak:
            self.peak, self.at = self.current, f"{func} -> {list(shape)}"
