"""Leaves out what would only repeat itself: equal work from an equal state of the allocator.

A step of a large picture is thousands of equal slices in dozens of equal blocks. Whatever allocates and frees the
same sizes in the same order, from the same state of the allocator, ends in the same state and makes the same peak.
So a loop may be left when its state has been there before, and a sublayer's visit when one like it has been made.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

from allocator_model import CachingAllocator
from torch import Tensor

from l2p_lowvram.model import Slices, TransformerBlock
from tiling.spans import Span


@contextmanager
def repetitions_left_out(allocator: CachingAllocator) -> Iterator[None]:
    """While open, slices of tokens and visits of sublayers that only repeat earlier ones are not made."""
    # By name: `tiling.tokenwise` is the function of that module.
    module = import_module("tiling.tokenwise")
    with ExitStack() as stack:
        stack.enter_context(patch.object(module, "spans", _shortened(module.spans, allocator)))
        for name in ("add_attention_", "add_feed_forward_"):
            stack.enter_context(patch.object(TransformerBlock, name, _once(getattr(TransformerBlock, name), allocator)))
        yield


def _shortened(spans: Callable[[int, int], Sequence[Span]], allocator: CachingAllocator) -> Any:
    def shortened(length: int, tile: int) -> Iterator[Span]:
        """Up to the first repetition, and what does not fill whole rounds of it."""
        left, seen = list(spans(length, tile)), {}
        while left:
            size = left[0].keep_stop - left[0].keep_start
            equal = sum(span.keep_stop - span.keep_start == size for span in left)
            key = (size, allocator.state())
            if key in seen:
                period = seen[key] - len(left)
                del left[: equal // period * period]
                seen.clear()
                continue
            seen[key] = len(left)
            yield left.pop(0)

    return shortened


def _once(add: Callable[..., None], allocator: CachingAllocator) -> Any:
    known: set[Hashable] = set()

    def once(block: TransformerBlock, x: Tensor, *others: Any) -> None:
        """Not where a sublayer like this one has come back to the state that it began in."""
        slices: Slices = others[-1]
        stored = tuple((name, weight.dtype) for name, weight in block.named_parameters())
        work = (stored, block.adaLN_modulation is None, tuple(x.shape), x.stride(), x.dtype, slices.heads)
        before = allocator.state()
        if (work, before) in known:
            return
        add(block, x, *others)
        if allocator.state() == before:
            known.add((work, before))

    return once
