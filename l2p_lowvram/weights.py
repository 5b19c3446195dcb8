"""From file tensors to a model: every parameter bound as the file stores it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from offload import Checkpoint, CheckpointError, TensorSource
from offload.header import shown

from .layout import ModelLayout
from .linear import Linear
from .model import L2PTransformer
from .naming import SCALE


def load_transformer(
    checkpoint: Checkpoint, layout: ModelLayout, *, device: torch.device | str = "cpu"
) -> L2PTransformer:
    """The model with its weights in their stored dtypes on `device`.

    On the CPU, parameters are read-only views of the mapped file, which pages in on first use; only a
    qkv that the file keeps split is copied. They stay valid after the checkpoint is closed.
    Raises CheckpointError for scales that are not finite.
    """
    with torch.device("meta"):
        model = L2PTransformer(layout.config)
    for source in layout.sources.values():
        bind(model, source.name, read_source(checkpoint, source).to(device))
    for name, quantization in layout.quantized.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, Linear)
        linear.rotation = quantization.rotation
        linear.full_precision_matmul = quantization.full_precision_matmul
    return model.requires_grad_(False).eval()


def read_source(checkpoint: Checkpoint, source: TensorSource) -> Tensor:
    """One parameter on the CPU: a view of the mapped file where `source.is_view`, else a copy.

    Raises CheckpointError for a scale that is negative or not finite.
    """
    if source.is_view:
        result = checkpoint.tensor(source.parts[0].tensor.name).reshape(source.shape)
    else:
        result = torch.empty(source.shape, dtype=source.dtype)
        start = 0
        for part in source.parts:
            stored = checkpoint.tensor(part.tensor.name)
            rows = result.narrow(0, start, part.shape[0]) if part.shape else result
            rows.copy_(stored.reshape(part.shape) if stored.numel() == rows.numel() else stored.reshape(()))
            start += rows.shape[0] if part.shape else 0
    if source.name.endswith(f".{SCALE}"):
        check_scale(source, result)
    return result


def check_scale(source: TensorSource, scale: Tensor) -> None:
    """Raise CheckpointError unless every scale is finite and not negative."""
    low, high = scale.aminmax()
    if not (0 <= float(low) <= float(high) < float("inf")):
        tensor = source.parts[0].tensor
        reason = f"holds scales from {float(low)} to {float(high)}; they must be finite and not negative"
        raise CheckpointError(tensor.path, f"tensor {shown(tensor.name)} {reason}")


def bind(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put `tensor` in the place of the parameter (or `weight_scale` buffer) `name`, without a copy."""
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    setattr(module, leaf, tensor if leaf == SCALE else nn.Parameter(tensor, requires_grad=False))
