"""What a file is, read from its headers: the `inspect` command."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby

from offload import Checkpoint, CheckpointError, TensorInfo, TensorSource, format_bytes
from offload.header import shown

from .config import ModelConfig
from .encoder import read_encoder_layout
from .layout import ModelLayout, block_of, read_layout
from .linear import REGULAR
from .paths import expanded
from .sources import LinearQuantization
from .user_input import printable

MODEL, TEXT_ENCODER = "L2P model", "text encoder"
_OUTSIDE_BLOCKS = "outside the blocks"
_ROUTINE = frozenset({"format"})  # metadata that is there by convention and says nothing


@dataclass(frozen=True)
class DtypeShare:
    """Tensors and bytes of one dtype."""

    tensors: int
    bytes: int


@dataclass(frozen=True)
class ModelReport:
    """An accepted L2P model.

    linears: stack -> how many of its linear layers are stored in which way.
    blocks: block -> bytes in the file. rest_bytes: of everything outside the blocks.
    """

    family: str
    parameters: int
    config: ModelConfig
    naming: str
    prefix: str
    linears: Mapping[str, Mapping[str, int]]
    blocks: Mapping[str, int]
    rest_bytes: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What `inspect_model` found.

    kind: what it can be used as; None where it is refused, then `reason` says why.
    bytes, tensors, dtypes, metadata: of the file, zero and empty where even its header is refused.
    """

    path: str
    kind: str | None
    reason: str | None
    bytes: int = 0
    tensors: int = 0
    dtypes: Mapping[str, DtypeShare] | None = None
    metadata: tuple[str, ...] = ()
    model: ModelReport | None = None
    text_encoder: Mapping[str, float] | None = None

    @property
    def accepted(self) -> bool:
        return self.kind is not None

    def as_json(self) -> str:
        """One JSON object."""
        return json.dumps({"accepted": self.accepted, **asdict(self)}, indent=2)

    def as_text(self) -> str:
        """A few dozen lines for people, whatever the number of tensors."""
        lines = [f"{self.path}: {self.kind or 'refused'}"]
        if self.reason is not None:
            lines.append(f"  reason        {self.reason}")
        if self.dtypes is not None:
            lines.append(f"  file          {format_bytes(self.bytes)} ({self.bytes} bytes), {self.tensors} tensors")
            lines += _labelled("dtypes", [_dtype_line(name, share) for name, share in self.dtypes.items()])
        if self.metadata:
            lines += _labelled("metadata", [", ".join(shown(name) for name in self.metadata[:8])])
        if self.model is not None:
            lines += _model_lines(self.model)
        if self.text_encoder is not None:
            lines += _labelled("sizes", [f"{name} {value:g}" for name, value in self.text_encoder.items()])
        return "\n".join(map(printable, lines))


def inspect_model(path: str | os.PathLike[str]) -> Report:
    """Look at a safetensors file, a sharded set or a model folder; reads headers and markers only.

    Also says why a file is refused, and recognises text encoders. Raises nothing for bad files, FileNotFoundError for
    the folder of a user there is not.
    """
    try:
        checkpoint = Checkpoint.open(expanded(path))
    except CheckpointError as error:
        return Report(str(path), None, error.reason)
    with checkpoint:
        report = Report(
            str(path),
            None,
            None,
            sum(file.stat().st_size for file in checkpoint.files),
            len(checkpoint.tensors),
            _dtypes(checkpoint.tensors.values()),
            tuple(sorted(name for name in checkpoint.metadata if name not in _ROUTINE)),
        )
        return _identified(report, checkpoint)


def _identified(report: Report, checkpoint: Checkpoint) -> Report:
    """`report` with what the tensors are taken for, or why they are refused."""
    fields = {name: getattr(report, name) for name in ("path", "bytes", "tensors", "dtypes", "metadata")}
    try:
        if any(name.endswith("embed_tokens.weight") for name in checkpoint.tensors):
            encoder = read_encoder_layout(checkpoint)
            return Report(**fields, kind=TEXT_ENCODER, reason=None, text_encoder=asdict(encoder.config))
        model = _model_report(read_layout(checkpoint))
        return Report(**fields, kind=MODEL, reason=None, model=model)
    except CheckpointError as error:
        return Report(**fields, kind=None, reason=error.reason)


def _model_report(layout: ModelLayout) -> ModelReport:
    parameters = sum(
        part.tensor.nbytes // part.tensor.torch_dtype.itemsize
        for name, source in layout.sources.items()
        if not name.endswith("weight_scale")
        for part in source.parts
    )
    return ModelReport(
        layout.family,
        parameters,
        layout.config,
        layout.naming,
        layout.prefix,
        _linears(layout),
        dict(layout.block_bytes),
        layout.rest_bytes,
        layout.warnings,
    )


def _linears(layout: ModelLayout) -> dict[str, dict[str, int]]:
    """Stack -> storage -> number of linear layers, which are the weights with two axes."""
    counts: dict[str, Counter[str]] = {}
    for name, source in layout.sources.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and len(source.shape) == 2:
            in_block = block_of(name) in layout.blocks
            stack = name.partition(".")[0] if in_block else _OUTSIDE_BLOCKS
            storage = _storage(source, layout.quantized.get(module))
            counts.setdefault(stack, Counter())[storage] += 1
    return {stack: dict(counter.most_common()) for stack, counter in counts.items()}


def _storage(source: TensorSource, quantization: LinearQuantization | None) -> str:
    dtypes = "/".join(sorted({part.tensor.dtype for part in source.parts}))
    if quantization is None:
        return dtypes
    text = f"{dtypes.replace('I8', 'INT8')}, {quantization.granularity} scales"
    if (rotation := quantization.rotation) is not None:
        text += f", {'ConvRot' if rotation.kind == REGULAR else 'Sylvester rotation'} {rotation.group}"
    return text + (", full precision matmul" if quantization.full_precision_matmul else "")


def _dtypes(tensors: Iterable[TensorInfo]) -> dict[str, DtypeShare]:
    """Dtype -> share, the one with most bytes first."""
    sizes: dict[str, list[int]] = {}
    for info in tensors:
        sizes.setdefault(info.dtype, []).append(info.nbytes)
    ordered = sorted(sizes.items(), key=lambda item: -sum(item[1]))
    return {dtype: DtypeShare(len(nbytes), sum(nbytes)) for dtype, nbytes in ordered}


def _dtype_line(name: str, share: DtypeShare) -> str:
    return f"{name:<8} {format_bytes(share.bytes):>10} in {share.tensors} tensors"


def _labelled(label: str, values: Sequence[str]) -> list[str]:
    return [f"  {label if index == 0 else '':<13} {value}" for index, value in enumerate(values)]


def _model_lines(model: ModelReport) -> list[str]:
    config, defaults = model.config, model.config.defaults
    sizes = [
        f"token width {config.dim}, {config.n_heads} heads of {config.head_dim}, feed-forward {config.ffn_dim}",
        f"text features {config.caption_dim}, RoPE axes {'+'.join(map(str, config.rope_axes))}",
        f"{config.n_layers} layers, {config.n_noise_refiner} + {config.n_context_refiner} refiners",
    ]
    levels = " ".join(f"{level.name}:{level.encoder}/{level.up}/{level.out}" for level in config.decoder.levels)
    multiple = f"width and height in multiples of {config.size_multiple}"
    linears = [
        f"{stack}: {count} of {sum(storages.values())} {storage}"
        for stack, storages in model.linears.items()
        for storage, count in storages.items()
    ]
    sampling = f"{defaults.steps} steps, cfg scale {defaults.cfg_scale:g}, shift {defaults.shift:g}"
    return [
        *_labelled("family", [f"{model.family} (patch {config.patch_size}), {model.parameters / 1e9:.3f} B values"]),
        *_labelled("names", [f"{model.naming}, prefix {model.prefix!r}"]),
        *_labelled("sizes", sizes),
        *_labelled("decoder", [f"{levels} bottleneck {config.decoder.bottleneck}", multiple]),
        *_labelled("linears", linears),
        *_labelled("blocks", [*_block_lines(model.blocks), f"rest: {format_bytes(model.rest_bytes)}"]),
        *_labelled("defaults", [f"{defaults.width}x{defaults.height}, {sampling}"]),
        *_labelled("warnings", model.warnings),
    ]


def _block_lines(blocks: Mapping[str, int]) -> list[str]:
    """Bytes per block; neighbours of equal size share a line."""
    lines = []
    runs = groupby(blocks.items(), key=lambda item: (item[0].partition(".")[0], item[1]))
    for (stack, nbytes), run in runs:
        numbers = [name.partition(".")[2] for name, _ in run]
        spelled = numbers[0] if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        count = f"{len(numbers)} x " if len(numbers) > 1 else ""
        lines.append(f"{stack}.{spelled}: {count}{format_bytes(nbytes)}")
    return lines
