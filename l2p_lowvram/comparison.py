"""How far a rewritten checkpoint is from the one it was made of, layer by layer, read from both files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from offload import CheckpointError

from .conversion import THREADS, Layout, RowReader, StoredLinear
from .export import row_runs
from .naming import SCALE
from .quantization import SMALLEST_SCALE

# Half a step is the largest rounding error there is; the rest is for the arithmetic of comparing.
_HALF_STEP = 0.501


@dataclass(frozen=True)
class LayerError:
    """A quantised layer against its source.

    relative_l2: norm of the difference over the norm of the source. max_abs: largest difference of a
    value. max_steps: the largest in units of its scale, of rotated layers before they are rotated back: at most 0.5
    where rounding to INT8 is all that happened.
    """

    layer: str
    relative_l2: float
    max_abs: float
    max_steps: float


@dataclass(frozen=True)
class ReadableLayout:
    """A checkpoint's layout and the reader of its rows."""

    layout: Layout
    reader: RowReader

    @property
    def path(self) -> Path:
        return self.layout.path

    @property
    def parameters(self) -> list[str]:
        return [name for name in self.layout.sources if not name.endswith(f".{SCALE}")]

    def linear(self, name: str) -> StoredLinear | None:
        """The quantised layer whose weight is `name`; None where it is no such weight."""
        module = name.removesuffix(".weight")
        if module == name or module not in self.layout.quantized:
            return None
        return StoredLinear.of(self.layout, module, self.reader)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a parameter, dequantised in fp32 where it is quantised."""
        linear = self.linear(name)
        return self.reader.rows(self.layout.sources[name], start, stop) if linear is None else linear.rows(start, stop)


def layer_errors(
    source: ReadableLayout, written: ReadableLayout, progress: Callable[[int], object] | None = None
) -> list[LayerError]:
    """The error of every layer that is quantised in `written`; progress is told bytes of it as they are compared.

    Raises CheckpointError where `written` has other parameters, floats or FP8 values that are not the source's (in
    the new dtype), or INT8 values that are not the nearest ones.
    """
    names = source.parameters
    if set(names) != set(written.parameters):
        raise CheckpointError(written.path, "holds other parameters than the file it was made of")
    found: list[LayerError] = []
    with ThreadPoolExecutor(THREADS, "compare") as pool:
        try:
            for name, error in zip(names, pool.map(lambda name: _compared(source, written, name), names), strict=True):
                found += [] if error is None else [error]
                if progress is not None:
                    progress(written.layout.sources[name].nbytes)
        finally:
            pool.shutdown(cancel_futures=True)
    return found


def _compared(source: ReadableLayout, written: ReadableLayout, name: str) -> LayerError | None:
    after = written.linear(name)
    if after is None:
        _require_equal(source, written, name)
        return None
    found = _layer_error(name.removesuffix(".weight"), source, after)
    assert after.quantization is not None
    before = source.linear(name)
    kept = before is not None and before.quantization == after.quantization
    limit = 0.0 if kept else _HALF_STEP
    if not (math.isfinite(found.relative_l2) and found.max_steps <= limit):
        reason = f"{found.layer} is off by {found.max_steps:.3g} steps where rounding explains {limit:.1f}"
        raise CheckpointError(written.path, f"{reason}; it was not written as computed")
    return found


def _layer_error(module: str, source: ReadableLayout, after: StoredLinear) -> LayerError:
    assert after.quantization is not None
    rotation = after.quantization.rotation
    difference = norm = 0.0
    largest = torch.zeros(2)
    for start, stop in row_runs(after.shape):
        values = source.rows(f"{module}.weight", start, stop).float()
        error = after.rows(start, stop).sub_(values)
        difference += float(error.square().sum())
        norm += float(values.square_().sum())
        # A rotation is its own inverse: it gives back the error of what is stored.
        stored = error if rotation is None else rotation.apply(error)
        steps = stored.abs() / after.scale_of_rows(start, stop).clamp_min(SMALLEST_SCALE)
        largest = torch.maximum(largest, torch.stack([error.abs_().amax(), steps.amax()]))
    max_abs, max_steps = largest.tolist()
    return LayerError(module, math.sqrt(difference / norm) if norm else 0.0, max_abs, max_steps)


def _require_equal(source: ReadableLayout, written: ReadableLayout, name: str) -> None:
    after, before = written.layout.sources[name], source.linear(name)
    rotated = before is not None and before.quantization is not None and before.quantization.rotation is not None
    for start, stop in row_runs(after.shape):
        expected = source.rows(name, start, stop).to(after.dtype)
        if not _same(expected, written.rows(name, start, stop), rotated=rotated):
            reason = f"{name} is not what it was made of; it was not written as computed"
            raise CheckpointError(written.path, reason)


def _same(expected: Tensor, found: Tensor, *, rotated: bool) -> bool:
    """To the bit (NaN equals itself, -0 is not 0); products with a rotation up to rounding, which depends on how
    many rows are multiplied at once."""
    if not rotated:
        return torch.equal(expected.contiguous().view(torch.uint8), found.contiguous().view(torch.uint8))
    difference = (found.float() - expected.float()).norm()
    return bool(difference <= torch.finfo(expected.dtype).eps * expected.float().norm())


def error_table(errors: Sequence[LayerError]) -> str:
    """One line a layer, and the largest of each column."""
    width = max(len(label) for label in ("largest", *(error.layer for error in errors)))
    lines = [f"{'layer':{width}}  {'relative L2':>11}  {'max abs':>9}  {'max steps':>9}"]
    lines += [_line(width, error) for error in errors]
    if errors:
        lines.append(_line(width, largest_error(errors)))
    return "\n".join(lines)


def largest_error(errors: Iterable[LayerError]) -> LayerError:
    """The largest of each column."""
    errors = list(errors)
    columns = ((e.relative_l2 for e in errors), (e.max_abs for e in errors), (e.max_steps for e in errors))
    return LayerError("largest", *(max(column, default=0.0) for column in columns))


def _line(width: int, error: LayerError) -> str:
    return f"{error.layer:{width}}  {error.relative_l2:>11.6f}  {error.max_abs:>9.3g}  {error.max_steps:>9.3f}"
