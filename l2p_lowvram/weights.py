"""From file tensors to modules: parameters bound for good, or lent for the length of one visit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from offload import Block, Checkpoint, CheckpointError, TensorSource
from offload.header import shown
from offload.mapped import MappedBlocks, read_aligned, read_source

from .layout import ModelLayout
from .linear import Linear
from .model import L2PTransformer
from .naming import SCALE
from .sources import LinearQuantization

_INT8_LAYERS = ("attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")


def build_transformer(layout: ModelLayout) -> L2PTransformer:
    """The model on the meta device: it knows how its weights are stored, and has none."""
    with torch.device("meta"):
        model = L2PTransformer(layout.config)
    mark_quantized(model, layout.quantized)
    return model.requires_grad_(False).eval()


def mark_quantized(model: nn.Module, quantized: Mapping[str, LinearQuantization]) -> None:
    """Tell the linear layers how their weights are rotated and what the file asks of their arithmetic."""
    for name, quantization in quantized.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, Linear)
        linear.rotation = quantization.rotation
        linear.full_precision_matmul = quantization.full_precision_matmul


def int8_layers(layout: ModelLayout) -> int:
    """How many layers of the blocks are stored so that they may be multiplied in integers."""
    return sum(
        name.endswith(_INT8_LAYERS) and entry.dtype == "I8" and entry.by_row and not entry.full_precision_matmul
        for name, entry in layout.quantized.items()
    )


def load_transformer(
    checkpoint: Checkpoint, layout: ModelLayout, *, device: torch.device | str = "cpu"
) -> L2PTransformer:
    """The model with all its weights, in their stored dtypes, on `device`: the plain way, without a budget.

    On the CPU, parameters are read-only views of the mapped file, which pages in on first use; copied are
    a qkv that the file keeps split and floats that it does not align. They stay valid after the checkpoint is closed.
    Raises CheckpointError for scales that are not finite.
    """
    check_scales(checkpoint, layout.sources.values())
    model = build_transformer(layout)
    for source in layout.sources.values():
        bind(model, source.name, read_aligned(checkpoint, source).to(device))
    return model


def check_scales(checkpoint: Checkpoint, sources: Iterable[TensorSource]) -> None:
    """Raise CheckpointError unless every scale is finite and not negative. Reads the scales: a few MiB."""
    scales = [source for source in sources if source.name.endswith(f".{SCALE}")]
    # All at once: they lie scattered over the file, and one after the other each would be a wait of its own.
    with MappedBlocks(checkpoint, [Block(SCALE, tuple(scales))]) as mapped:
        mapped.prefetch(SCALE)
        for source in scales:
            low, high = read_source(checkpoint, source).aminmax()
            if not (0 <= float(low) <= float(high) < float("inf")):
                tensor = source.parts[0].tensor
                reason = f"holds scales from {float(low)} to {float(high)}; they must be finite and not negative"
                raise CheckpointError(tensor.path, f"tensor {shown(tensor.name)} {reason}")
        mapped.forget(SCALE)


def bind(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put `tensor` in the place of the parameter (or `weight_scale` buffer) `name`, without a copy."""
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    setattr(module, leaf, tensor if leaf == SCALE else nn.Parameter(tensor, requires_grad=False))


@contextmanager
def lent(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, the parameters and buffers named in `weights` are those tensors.

    Afterwards they are what they were before: of a model on the meta device, nothing that could be
    computed with, so that a use outside of a visit fails instead of reading what the slot holds by then.
    """
    tables = []
    for name, tensor in weights.items():
        module_name, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_name)
        # Straight into the module's own tables: a Parameter per tensor and visit would be for nothing.
        table = module._buffers if leaf in module._buffers else module._parameters
        tables.append((table, leaf, table[leaf]))
        table[leaf] = tensor  # type: ignore[assignment]
    try:
        yield
    finally:
        for table, leaf, before in tables:
            table[leaf] = before  # type: ignore[assignment]
