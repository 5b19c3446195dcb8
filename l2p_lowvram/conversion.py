"""Rewriting checkpoints: INT8 from floats and floats from INT8, a few MiB of rows at a time.

Planning reads headers, and a sample of bytes to tell the source by: `quantized_state` and `dequantized_state` turn
what a layout found into lazy tensors, from which `Rewriting` knows every name, dtype, shape and byte of the new
file. Only writing it reads weights: by positional reads, because mapped pages would count as memory, and each row
once (twice for a scale per tensor). So a conversion takes the same memory for every file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from offload import Checkpoint, CheckpointError, Part, Reader, TensorSource, format_bytes
from offload.blocks import Extent
from offload.header import shown
from offload.mapped import read_source

from . import __version__
from .encoder import EncoderLayout, config_json, read_encoder_layout
from .export import (
    DEFAULT_TARGETS,
    LayoutStyle,
    LazyTensor,
    ModelState,
    QuantizedWeight,
    model_entries,
    row_runs,
    settings_metadata,
)
from .layout import ModelLayout, read_layout
from .linear import expand_scale
from .markers import QUANTIZATION_METADATA
from .naming import SCALE
from .paths import CONFIG_FILE, destination
from .quantization import Scheme, absmax, quantize_tensor, tensor_scale
from .safetensors_writer import TensorEntry, file_bytes, write_safetensors
from .settings import METADATA_ENTRY
from .sources import LinearQuantization
from .weights import check_scales
from .whole_file import require_replaceable, whole_file

CONVERSION_METADATA = "l2p_conversion"
ENCODER_TARGETS = ("layers.*.self_attn.[qkvo]_proj", "layers.*.mlp.*_proj")
# One reads while another computes; more only help where the disk answers slowly.
THREADS = 3
_PIECE_BYTES = 8 << 20
# Of each tensor, and of all together, that are read to tell a source from others.
_SAMPLED_BYTES, _SAMPLE_BYTES = 64 << 10, 64 << 20
_NAMED_IN_ERRORS = 4


class Layout(Protocol):
    """What `ModelLayout` and `EncoderLayout` have in common."""

    @property
    def path(self) -> Path: ...
    @property
    def sources(self) -> Mapping[str, TensorSource]: ...
    @property
    def quantized(self) -> Mapping[str, LinearQuantization]: ...


@dataclass(frozen=True)
class Recipe:
    """What becomes of a checkpoint's tensors.

    scheme: of the linear layers named by `include` and not by `exclude` (patterns of module names as used
        inside, `layers.*.attention.qkv`); None dequantises every layer.
    float_dtype: of all float tensors that are written; None keeps what they are.
    """

    scheme: str | None = "row"
    include: tuple[str, ...] = DEFAULT_TARGETS
    exclude: tuple[str, ...] = ()
    float_dtype: torch.dtype | None = None

    def state(self, layout: Layout, reader: RowReader) -> ModelState:
        """The new checkpoint's tensors by inside name. Raises ValueError for patterns without a match."""
        if self.scheme is None:
            return dequantized_state(layout, reader, self.float_dtype)
        targets = target_linears(layout, self.include, self.exclude)
        return quantized_state(layout, reader, Scheme.parse(self.scheme), targets, self.float_dtype)

    def as_dict(self) -> dict[str, object]:
        dtype = "as stored" if self.float_dtype is None else str(self.float_dtype).removeprefix("torch.")
        if self.scheme is None:
            return {"floats": dtype}
        return {"scheme": self.scheme, "include": self.include, "exclude": self.exclude, "floats": dtype}


class RowReader:
    """Rows of parameters, read when they are asked for. Safe to use from several threads."""

    def __init__(self, checkpoint: Checkpoint, reader: Reader) -> None:
        """Neither is closed here."""
        self._checkpoint, self._reader = checkpoint, reader
        self._changed = threading.Lock()
        self.read_bytes = 0  # of weights, so far

    def rows(self, source: TensorSource, start: int, stop: int) -> Tensor:
        """Rows start to stop in the parameter's dtype. Raises CheckpointError, OSError."""
        pieces, first = [], 0
        for part in source.parts:
            begin, end = max(start - first, 0), min(stop - first, part.shape[0])
            if begin < end:
                pieces.append(self._part_rows(part, begin, end).to(source.dtype))
            first += part.shape[0]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def whole(self, source: TensorSource) -> Tensor:
        """A small parameter: a scale. A copy, since a view keeps the file mapped, which not all systems then delete."""
        return read_source(self._checkpoint, source).clone()

    def _part_rows(self, part: Part, start: int, stop: int) -> Tensor:
        info = part.tensor
        row_bytes = info.nbytes // part.shape[0]
        raw = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        extent = Extent(info.path, info.offset + start * row_bytes, raw.numel(), 0)
        self._reader.submit(info.name, [extent], raw).wait()
        with self._changed:
            self.read_bytes += raw.numel()
        return raw.view(info.torch_dtype).reshape(stop - start, *part.shape[1:])


class StoredLinear:
    """A linear layer's weight (N, K) as the source has it, float or quantised, row by row."""

    def __init__(self, source: TensorSource, reader: RowReader) -> None:
        self.source, self._reader = source, reader
        self.quantization: LinearQuantization | None = None
        self._scale_source: TensorSource | None = None

    @classmethod
    def of(cls, layout: Layout, module: str, reader: RowReader) -> StoredLinear:
        result = cls(layout.sources[f"{module}.weight"], reader)
        result.quantization = layout.quantized.get(module)
        result._scale_source = layout.sources.get(f"{module}.{SCALE}")
        return result

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.source.shape
        return rows, columns

    @cached_property
    def scale(self) -> Tensor:
        """fp32, as the layout shapes it."""
        assert self._scale_source is not None
        return self._reader.whole(self._scale_source).float()

    def stored_rows(self, start: int, stop: int) -> Tensor:
        return self._reader.rows(self.source, start, stop)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the weight that is meant: scaled and un-rotated in fp32, or floats as stored."""
        stored = self.stored_rows(start, stop)
        if self.quantization is None:
            return stored
        rows = stored.float() * self.scale_of_rows(start, stop)
        rotation = self.quantization.rotation
        return rows if rotation is None else rotation.apply(rows)

    def scale_of_rows(self, start: int, stop: int) -> Tensor:
        """The scales of these rows, to multiply (stop - start, K) by."""
        return expand_scale(self.scale, *self.shape, span=slice(start, stop))

    def as_stored(self) -> QuantizedWeight:
        """The quantised weight without change of a bit."""
        assert self.quantization is not None
        assert self._scale_source is not None
        return QuantizedWeight(
            LazyTensor.of_rows(self.source.dtype, self.shape, self.stored_rows),
            LazyTensor(torch.float32, self._scale_source.shape, lambda: self.scale),
            self.quantization.rotation,
            self.quantization.full_precision_matmul,
        )

    def is_stored_in(self, scheme: Scheme) -> bool:
        found = self.quantization
        if found is None or found.dtype != "I8" or found.rotation != scheme.rotation:
            return False
        return found.block == (self.shape if scheme.block is None else (1, self.shape[1]))


class _Quantizer:
    """One weight on its way to INT8, a run of rows after the other, in any order and from any thread."""

    def __init__(self, weight: StoredLinear, scheme: Scheme) -> None:
        self._weight, self._scheme = weight, scheme
        self._row_scales = torch.full((weight.shape[0], 1), math.nan)
        self._tensor_scale: Tensor | None = None
        self._scanning = threading.Lock()

    def quantized(self) -> QuantizedWeight:
        marked = self._weight.quantization
        return QuantizedWeight(
            LazyTensor.of_rows(torch.int8, self._weight.shape, self.rows),
            LazyTensor(torch.float32, () if self._scheme.block is None else (self._weight.shape[0], 1), self.scale),
            self._scheme.rotation,
            marked is not None and marked.full_precision_matmul,
            passes=2 if self._scheme.block is None else 1,
        )

    def rows(self, start: int, stop: int) -> Tensor:
        if self._scheme.block is None:
            return quantize_tensor(self._weight.rows(start, stop), self._whole_scale())[0]
        stored, scale = self._scheme.quantize(self._weight.rows(start, stop))
        self._require_finite(scale, start, stop)
        self._row_scales[start:stop] = scale
        return stored

    def scale(self) -> Tensor:
        """Of all rows, each of which must have been asked for."""
        if self._scheme.block is None:
            return self._whole_scale()
        assert not self._row_scales.isnan().any(), "a row's scale was asked for before the row"
        return self._row_scales

    def _whole_scale(self) -> Tensor:
        """From a reading of the whole weight before it is quantised."""
        with self._scanning:
            if self._tensor_scale is None:
                self._tensor_scale = self._scan()
            return self._tensor_scale

    def _scan(self) -> Tensor:
        largest = torch.zeros(())
        for start, stop in row_runs(self._weight.shape):
            found = absmax(self._weight.rows(start, stop).float())
            self._require_finite(found, start, stop)
            largest = torch.maximum(largest, found)
        return tensor_scale(largest)

    def _require_finite(self, values: Tensor, start: int, stop: int) -> None:
        if not values.isfinite().all():
            tensor = self._weight.source.parts[0].tensor
            place = f"{self._weight.source.name}, rows {start} to {stop}"
            reason = f"holds NaN or infinity ({place}), which has no INT8 value; use --exclude or another file"
            raise CheckpointError(tensor.path, f"tensor {shown(tensor.name)} {reason}")


def linears(layout: Layout) -> tuple[str, ...]:
    """The linear layers, by module name."""
    weights = (name for name, source in layout.sources.items() if len(source.shape) == 2)
    return tuple(name.removesuffix(".weight") for name in weights if name.endswith(".weight") and "embed_" not in name)


def target_linears(layout: Layout, include: Sequence[str], exclude: Sequence[str]) -> frozenset[str]:
    """The linear layers some pattern of `include` names and none of `exclude`.

    Raises ValueError for a pattern that names no linear layer.
    """
    modules = linears(layout)
    for option, patterns in (("--include", include), ("--exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(module, pattern) for module in modules):
                some = ", ".join(modules[-_NAMED_IN_ERRORS:])
                raise ValueError(f"{option} {pattern!r} names none of {len(modules)} linear layers such as {some}")
    return frozenset(module for module in modules if _matches(module, include) and not _matches(module, exclude))


def quantized_state(
    layout: Layout, reader: RowReader, scheme: Scheme, targets: frozenset[str], float_dtype: torch.dtype | None = None
) -> dict[str, LazyTensor | QuantizedWeight]:
    """The checkpoint with `targets` in `scheme`; everything else as stored, floats in `float_dtype` if given.

    What is quantised already stays to the bit unless it is a target in another scheme: that is
    dequantised first and rounded a second time. A rotation leaves alone a layer whose columns its group
    does not divide, as ctq does.
    """
    state: dict[str, LazyTensor | QuantizedWeight] = {}
    for name, module, source in _parameters(layout):
        if module in targets:
            weight = StoredLinear.of(layout, module, reader)
            fitting = scheme.fitting(weight.shape[1])
            kept = weight.is_stored_in(fitting)
            state[name] = weight.as_stored() if kept else _Quantizer(weight, fitting).quantized()
        elif module in layout.quantized:
            state[name] = StoredLinear.of(layout, module, reader).as_stored()
        else:
            state[name] = _float(source, reader, float_dtype)
    return state


def dequantized_state(
    layout: Layout, reader: RowReader, dtype: torch.dtype | None = torch.bfloat16
) -> dict[str, LazyTensor | QuantizedWeight]:
    """The checkpoint without quantised layers, all floats in `dtype`; None: as stored, and BF16 for what was INT8."""
    state: dict[str, LazyTensor | QuantizedWeight] = {}
    for name, module, source in _parameters(layout):
        if module in layout.quantized:
            weight = StoredLinear.of(layout, module, reader)
            lazy = LazyTensor.of_rows(torch.float32, weight.shape, weight.rows)
            state[name] = lazy.cast(dtype or torch.bfloat16)
        else:
            state[name] = _float(source, reader, dtype)
    return state


def _parameters(layout: Layout) -> list[tuple[str, str, TensorSource]]:
    """(name, module of a weight or "", source) of all that is no scale."""
    return [
        (name, name.removesuffix(".weight") if name.endswith(".weight") else "", source)
        for name, source in layout.sources.items()
        if not name.endswith(f".{SCALE}")
    ]


def _float(source: TensorSource, reader: RowReader, dtype: torch.dtype | None) -> LazyTensor:
    lazy = LazyTensor.of_rows(source.dtype, source.shape, lambda start, stop: reader.rows(source, start, stop))
    return lazy.cast(dtype or source.dtype)


def _matches(module: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(module, pattern) for pattern in patterns)


class Rewriting:
    """A checkpoint about to be rewritten: the new file, planned from the old one's headers and a sample of its bytes.

    entries, metadata: of the new file. source_bytes: what writing it reads. Holds descriptors and threads
    until closed; a context manager.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: ModelLayout | EncoderLayout,
        recipe: Recipe,
        style: LayoutStyle | None = None,
    ) -> None:
        """Reads headers and a sample; `checkpoint` stays the caller's. Raises ValueError, CheckpointError, OSError."""
        self.checkpoint, self.layout, self.recipe = checkpoint, layout, recipe
        check_scales(checkpoint, layout.sources.values())
        self._files = Reader(checkpoint, threads=THREADS, piece_bytes=_PIECE_BYTES)
        try:
            self.reader = RowReader(checkpoint, self._files)
            self.state = recipe.state(layout, self.reader)
            self.entries, self.metadata = self._plan(style or LayoutStyle())
        except BaseException:
            self.close()
            raise

    def _plan(self, style: LayoutStyle) -> tuple[list[TensorEntry], dict[str, str]]:
        own = (QUANTIZATION_METADATA, METADATA_ENTRY, CONVERSION_METADATA)
        metadata = {name: text for name, text in self.checkpoint.metadata.items() if name not in own}
        if self.recipe.scheme is not None and style.splits_qkv:
            raise ValueError("INT8 layers are written with q, k and v in one tensor; use such a style")
        if isinstance(self.layout, ModelLayout):
            entries, declared = model_entries(self.state, style, self.layout.config.patch_size)
            declared |= settings_metadata(self.layout.config)
        else:
            spelled = {f"model.{name}": value for name, value in self.state.items()}
            entries, declared = model_entries(spelled, LayoutStyle(prefix="", marker="both"), 0)
            declared |= {"format": "pt"}
        return entries, metadata | declared | {CONVERSION_METADATA: json.dumps(self.provenance)}

    @cached_property
    def provenance(self) -> dict[str, object]:
        """Where the new file comes from: tool, settings, and the source by name, size and hashes.

        `sample_sha256` tells fine-tunes apart, whose headers are the same: of the first bytes of every tensor, in the
        order of the files.
        """
        source = {
            "file": self.checkpoint.files[0].name,
            "files": len(self.checkpoint.files),
            "bytes": sum(identity.size for identity in self.checkpoint.identities.values()),
            "header_sha256": self.checkpoint.header_sha256,
            "sample_sha256": self._sample_sha256(),
        }
        return {"tool": f"l2p_lowvram {__version__}", **self.recipe.as_dict(), "source": source}

    def _sample_sha256(self) -> str:
        tensors = self.checkpoint.tensors.values()
        most = min(_SAMPLED_BYTES, _SAMPLE_BYTES // max(len(tensors), 1))
        sizes = [min(info.nbytes, most) for info in tensors]
        starts = [0, *accumulate(sizes)]
        extents = [Extent(i.path, i.offset, size, at) for i, size, at in zip(tensors, sizes, starts, strict=False)]
        sample = torch.empty(starts[-1], dtype=torch.uint8)
        self._files.submit("sample", [extent for extent in extents if extent.nbytes], sample).wait()
        return hashlib.sha256(sample.numpy().data).hexdigest()

    @property
    def nbytes(self) -> int:
        """Of the new file."""
        return file_bytes(self.entries, self.metadata)

    @cached_property
    def source_bytes(self) -> int:
        return sum(self._read_bytes(name) for name in self.state)

    def _read_bytes(self, name: str) -> int:
        value = self.state[name]
        return self.layout.sources[name].nbytes * (value.passes if isinstance(value, QuantizedWeight) else 1)

    @property
    def quantized(self) -> tuple[str, ...]:
        """The layers that are quantised in the new file."""
        return tuple(name.removesuffix(".weight") for name, v in self.state.items() if isinstance(v, QuantizedWeight))

    def check_target(self, path: Path, *, overwrite: bool) -> None:
        """Raise ValueError or an OSError for a path the file cannot be written to, before hours of work."""
        if not path.parent.is_dir():
            raise ValueError(f"{path}: the folder {path.parent} does not exist; make it or name another")
        if path.is_dir():
            raise ValueError(f"{path}: is a folder; name a file in it, such as {path / 'model.safetensors'}")
        if any(path.exists() and path.samefile(file) for file in self.checkpoint.files):
            raise ValueError(f"{path}: is the input itself; name another file")
        if os.path.lexists(path) and not overwrite:
            raise ValueError(f"{path}: already exists; name another file or give --overwrite")
        require_replaceable(path)
        _require_not_open(destination(path))
        free = shutil.disk_usage(destination(path).parent).free
        if free < self.nbytes:
            has = f"{format_bytes(free)} free"
            raise ValueError(f"{path}: needs {format_bytes(self.nbytes)} but its disk has {has}; name another place")

    @property
    def is_text_encoder(self) -> bool:
        return isinstance(self.layout, EncoderLayout)

    @property
    def warnings(self) -> tuple[str, ...]:
        found = self.layout.warnings if isinstance(self.layout, ModelLayout) else ()
        return (*found, *self._unrotated())

    def _unrotated(self) -> list[str]:
        """Of a rotating scheme, that it leaves layers alone whose columns its group does not divide."""
        rotation = None if self.recipe.scheme is None else Scheme.parse(self.recipe.scheme).rotation
        if rotation is None:
            return []
        weights = [value.weight for value in self.state.values() if isinstance(value, QuantizedWeight)]
        plain = sum(weight.shape[1] % rotation.group > 0 for weight in weights)
        told = f"{plain} of {len(weights)} layers are not rotated: their columns are no multiple of {rotation.group}"
        return [told] if plain else []

    def check_config(self, path: Path, *, overwrite: bool) -> None:
        """Raise ValueError or an OSError where `config.json` beside a text encoder at `path` cannot be written, or is
        there and says otherwise."""
        beside = path.with_name(CONFIG_FILE)
        if beside.exists() and not beside.is_file():
            raise ValueError(f"{beside}: is no file, so the configuration cannot go there; name another folder")
        require_replaceable(beside)
        if not overwrite and beside.exists() and beside.read_bytes() != self._config:
            raise ValueError(f"{beside}: already exists and differs; name another folder or give --overwrite")

    @contextmanager
    def config_beside(self, path: Path) -> Iterator[None]:
        """Around the writing of a text encoder at `path`: afterwards the source's `config.json` lies beside it, made
        where it had none. All that can fail does so before the block, which replaces the former encoder."""
        beside = path.with_name(CONFIG_FILE)
        if beside.is_file() and beside.read_bytes() == self._config:
            yield
            return
        with whole_file(beside, overwrite=True) as file:
            file.write(self._config)
            file.flush()
            yield

    @cached_property
    def _config(self) -> bytes:
        assert isinstance(self.layout, EncoderLayout)
        source = self.layout.path.with_name(CONFIG_FILE)
        return source.read_bytes() if source.is_file() else config_json(self.layout.config).encode()

    def write(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        progress: Callable[[int], object] | None = None,
        check: Callable[[Path], object] | None = None,
    ) -> int:
        """Write the file, whole or not at all, and return its size. progress: is told bytes of the source as they
        have been read. check: is given the whole file before it has its name, and may refuse it.
        Raises ValueError, CheckpointError, OSError."""
        path, told = Path(path), 0
        self.check_target(path, overwrite=overwrite)

        def tell(_: int) -> None:
            nonlocal told
            done = self.reader.read_bytes
            if progress is not None:
                progress(done - told)
            told = done

        return write_safetensors(
            path,
            self.entries,
            self.metadata,
            overwrite=overwrite,
            durable=True,
            threads=THREADS,
            progress=tell,
            check=check,
        )

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> Rewriting:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _require_not_open(path: Path) -> None:
    """Raise ValueError for a file that Windows will not let us replace: one that another program has open."""
    if sys.platform == "win32" and path.exists():
        try:
            os.rename(path, path)  # noqa: PTH104 # refused as a replacement would be, and changes nothing
        except OSError as error:
            reason = f"cannot be replaced ({error.strerror}); close it where it is open, or name another file"
            raise ValueError(f"{path}: {reason}") from error


def read_any_layout(
    checkpoint: Checkpoint, *, text_encoder: bool, like: Layout | None = None
) -> ModelLayout | EncoderLayout:
    """like: a layout whose configuration counts, rather than what lies beside the file. Raises CheckpointError."""
    if not text_encoder:
        return read_layout(checkpoint)
    config = like.config if isinstance(like, EncoderLayout) else None
    return read_encoder_layout(checkpoint, whole=True, config=config)
