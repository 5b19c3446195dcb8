"""Linear layers whose weights stay as the checkpoint stores them.

A weight may be F32, BF16, F16, FP8 or INT8 and becomes the activation's dtype
only while it is used, so a block's bytes in memory are its bytes on disk.
Quantisation is symmetric: weight = stored * scale, optionally un-rotated.
Rotation: ConvRot (regular Hadamard) and QuaRot (Sylvester Hadamard) store
W H per group of input columns, H orthogonal and symmetric, so that applying H
once more gives W back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .devices import is_card
from .fp8 import widen_into
from .half_kernels import has_half_kernels
from .int8_matmul import Int8Matmul, QuantizedRows, multiply, quantize_rows, rows_at_a_time
from .onednn import multiplies, multiply_into
from .scratch import Scratch
from .work_sharing import share, worker_count

REGULAR, SYLVESTER = "regular", "sylvester"

# Of a weight in fp32, while it is dequantised: what stays in a CPU's cache; on a GPU, enough rows for full speed.
CPU_SLICE_BYTES = 8 << 20
DEVICE_SLICE_BYTES = 16 << 20
# Of converted rows that a CPU multiplies at a time in half precision, and how many: its matrix units are up to
# twice as slow with fewer than a thousand.
_CPU_HALF_BYTES = 25 << 20
_CPU_HALF_ROWS = 1280
# The same where oneDNN's own interface multiplies, which scales as it writes: any number of rows will do.
_CPU_KERNEL_BYTES = 29 << 20
# Fewest columns of a weight that oneDNN's own interface multiplies: narrower ones would spend their time on calls. And
# most tokens that it multiplies in half precision with int8 values: it converts these for every few hundred.
_LEAST_KERNEL_COLUMNS = 512
_MOST_STORED_TOKENS = 640
# Of converted rows that a card multiplies at a time: fewer are faster to write than to ask for.
_CARD_PRODUCT_BYTES = 32 << 20
# Of outputs in fp32 on their way to half precision.
_CPU_SCALED_BYTES = 2 << 20
# Of a weight in fp32, what one of several threads multiplies at a time; and with few tokens, where converting takes as
# long as multiplying. Products of fewer multiplications for each of them are made by all
# threads together.
_PIECE_BYTES = 5 << 20
_SMALL_PIECE_BYTES, _FEW_TOKENS = 2 << 20, 128
_LEAST_SHARED_WORK = 1 << 26
# Rows of a piece are a multiple of this, which keeps all of them on boundaries that kernels like.
_PIECE_MULTIPLE = 16


def converted_bytes(device: torch.device, itemsize: int, held: int = 0) -> int:
    """Most bytes of scratch that layers take for the rows they convert: of one slice values and rotated values
    in fp32, and the result of a slice, or of the `held` bytes that `Linear.rows` keeps converted."""
    nbytes = CPU_SLICE_BYTES if device.type == "cpu" else DEVICE_SLICE_BYTES
    if device.type == "cpu" and itemsize == 2:
        return 2 * nbytes + max(max(_CPU_HALF_BYTES, held) + _CPU_SCALED_BYTES, _CPU_KERNEL_BYTES)
    if device.type == "cpu":
        return 2 * nbytes + max(nbytes, held, _PIECE_BYTES * worker_count())
    return 2 * nbytes + max(_CARD_PRODUCT_BYTES if is_card(device) else nbytes * itemsize // 4, held)


def product_bytes(device: torch.device, dtype: torch.dtype, tokens: int, columns: int, outputs: int) -> int:
    """Of what one slice of a converted weight (outputs, columns) makes of so many tokens, before it is where it is to
    be. On cards it is written there at once."""
    if is_card(device):
        return 0
    return tokens * min(_multiplied_rows(device, dtype, columns, outputs), outputs) * dtype.itemsize


def _slice_rows(device: torch.device, columns: int) -> int:
    """Rows that are dequantised at a time."""
    nbytes = CPU_SLICE_BYTES if device.type == "cpu" else DEVICE_SLICE_BYTES
    return max(nbytes // (4 * columns) // 64, 1) * 64


def _multiplied_rows(
    device: torch.device, dtype: torch.dtype, columns: int, outputs: int, writes_scaled: bool = False
) -> int:
    """Rows that are multiplied at a time: in slices of equal size, where a CPU's matrix units want many."""
    if is_card(device):
        return max(_CARD_PRODUCT_BYTES // (dtype.itemsize * columns) // 64, 1) * 64
    if device.type != "cpu" or dtype.itemsize != 2:
        return _slice_rows(device, columns)
    if writes_scaled:
        most = _CPU_KERNEL_BYTES // (dtype.itemsize * columns)
    else:
        most = min(_CPU_HALF_BYTES // (dtype.itemsize * columns), _CPU_HALF_ROWS)
    parts = -(-outputs // max(most // 64 * 64, 64))
    return -(-outputs // parts // 64) * 64


@dataclass(frozen=True)
class Rotation:
    """A block-diagonal Hadamard rotation of the input columns, `group` columns a block."""

    group: int
    kind: str = REGULAR

    def __post_init__(self) -> None:
        if self.kind not in (REGULAR, SYLVESTER):
            raise ValueError(f"rotation kind must be {REGULAR!r} or {SYLVESTER!r}, got {self.kind!r}")
        power = self.group.bit_length() - 1
        if self.group < 2 or self.group != 1 << power:
            raise ValueError(f"rotation group must be a power of two, got {self.group}")
        if self.kind == REGULAR and power % 2:
            raise ValueError(f"a regular Hadamard rotation needs a power of four, got {self.group}")

    def apply(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x (..., K) with every run of `group` columns multiplied by H, in fp32; into `out` where given."""
        blocks = x.float().reshape(-1, self.group)
        target = None if out is None else out.view(-1, self.group)
        return torch.mm(blocks, hadamard(self.group, self.kind, x.device), out=target).view(x.shape)


@lru_cache(maxsize=16)
def hadamard(size: int, kind: str, device: torch.device) -> Tensor:
    """Normalised Hadamard matrix of order `size` as the Kronecker power of a small base.

    "regular": base 4x4 with -1 on the anti-diagonal (every row sums to 1);
    "sylvester": base [[1, 1], [1, -1]].
    """
    dtype = torch.float32
    if kind == REGULAR:
        base = torch.ones(4, 4, dtype=dtype) - 2 * torch.eye(4, dtype=dtype).flip(0)
    else:
        base = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=dtype)
    matrix = torch.ones(1, 1, dtype=dtype)
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, base)
    return (matrix / math.sqrt(size)).to(device)


def scale_block(shape: tuple[int, ...], rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of a (rows, columns) weight that one element of a scale covers.

    (), (1), (1, 1): the whole weight; (N), (N, 1): a row; (N/b, K/b): a square block of side b.
    The row rule comes first, since a column of blocks with b = 1 has the same shape.
    Raises ValueError for any other shape.
    """
    if shape in ((), (1,), (1, 1)):
        return rows, columns
    if shape in ((rows,), (rows, 1)):
        return 1, columns
    if len(shape) == 2 and all(shape):
        block = rows // shape[0]
        if (shape[0] * block, shape[1] * block) == (rows, columns):
            return block, block
    raise ValueError(f"scale of shape {list(shape)} fits no rule for a weight of shape [{rows}, {columns}]")


def expand_scale(scale: Tensor, rows: int, columns: int, *, span: slice = slice(None)) -> Tensor:
    """A scale of any accepted shape as a tensor that broadcasts against (rows, columns)[span].

    Raises ValueError for a shape that `scale_block` refuses.
    """
    block_rows, block_columns = scale_block(tuple(scale.shape), rows, columns)
    if (block_rows, block_columns) == (rows, columns):
        return scale.reshape(1, 1)
    start, stop, _ = span.indices(rows)
    first = start // block_rows
    grid = scale.reshape(rows // block_rows, -1)[first : -(-stop // block_rows)]
    if block_rows > 1:
        grid = grid.repeat_interleave(block_rows, 0)[start - first * block_rows : stop - first * block_rows]
    return grid if block_columns == columns else grid.repeat_interleave(block_columns, 1)


class Linear(nn.Module):
    """y = x W^T + b for a weight kept in its stored dtype.

    weight: (N, K), any float dtype, or int8/float8 with `weight_scale`.
    weight_scale: None or fp32 of any shape `expand_scale` takes.
    rotation: how the stored weight is rotated along K, or None.
    full_precision_matmul: the file asks that activations are never quantised here.
    int8_matmul: what multiplies in integers where the weight allows it (`takes_int8`); None: the weight is
        dequantised. Only for layers of many rows.
    scratch: where converted rows of the weight pass through.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_scale: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.register_buffer("weight_scale", None)
        self.rotation: Rotation | None = None
        self.full_precision_matmul = False
        self.int8_matmul: Int8Matmul | None = None
        self.scratch = Scratch()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight.is_meta:
            return  # torch would import its symbolic kernels to initialise nothing
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def quantize_(self, weight: Tensor, scale: Tensor, rotation: Rotation | None = None) -> None:
        """Replace the weight by stored values and their scale (no copy is made)."""
        scale_block(tuple(scale.shape), *weight.shape)  # raises
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = scale.float()
        self.rotation = rotation

    @property
    def takes_int8(self) -> bool:
        """Whether the weight can be multiplied in integers: INT8, each row under one scale, and the file allows it."""
        if self.weight.dtype != torch.int8 or self.weight_scale is None or self.full_precision_matmul:
            return False
        return self._has_row_scales

    @property
    def _has_row_scales(self) -> bool:
        """Whether each row of the weight is under one scale."""
        assert self.weight_scale is not None
        return scale_block(tuple(self.weight_scale.shape), self.out_features, self.in_features)[1] == self.in_features

    @property
    def multiplies_int8(self) -> bool:
        return self.int8_matmul is not None and self.takes_int8

    def dequantized(self, dtype: torch.dtype = torch.float32, rows: slice = slice(None)) -> Tensor:
        """The weight (N, K)[rows] in `dtype`; scaling and un-rotation happen in fp32.

        Exact: a row has the same bits whether it is asked for alone or with others; of rotated weights up to rounding.
        """
        if self.weight_scale is None:
            return self.weight[rows].to(dtype)
        count = len(range(*rows.indices(self.out_features)))
        out = torch.empty(count, self.in_features, dtype=dtype, device=self.weight.device)
        return self._convert_into(out, rows)

    def read(self, x: Tensor) -> Tensor | QuantizedRows:
        """x (..., K) as `forward` reads it: to be shared with other layers that read the same x."""
        return quantize_rows(x, self.rotation) if self.multiplies_int8 else x

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        if self.multiplies_int8:
            return self._multiply_int8(x, slice(None))
        if isinstance(x, QuantizedRows):
            x = x.source
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.weight_scale is None and self.weight.dtype == x.dtype:
            return product(x, self.weight, bias)
        # Autograd keeps what it multiplied with: nothing that the next slice overwrites.
        keeps = _wants_gradients(x, self.weight, bias)
        output_scale = None if keeps else self._output_scale(x.device, x.dtype)
        writes_scaled = False
        if output_scale is not None and bias is None:
            if self._multiplies_stored(x.dtype, x.shape[:-1].numel()):
                return _linear_scaled(x, self.weight, output_scale)
            writes_scaled = self._has_kernel(x.dtype, x.dtype)
        result = x.new_empty(*x.shape[:-1], self.out_features)
        workers = _workers_for(x, self.weight, bias) if self._converts_apart(x.dtype) else 1
        if workers > 1:
            self._multiply_shared(result, x, output_scale, bias, workers)
            return result
        # A few rows at a time: the weight never stands dequantised as a whole, and on a CPU the
        # slice is still in the cache when it is multiplied.
        step = _multiplied_rows(x.device, x.dtype, self.in_features, self.out_features, writes_scaled)
        for rows in _pieces(0, self.out_features, step):
            out, added = result[..., rows], None if bias is None else bias[rows]
            if keeps:
                out.copy_(product(x, self.dequantized(x.dtype, rows), added))
                continue
            weight = self._take(rows.stop - rows.start, x.dtype)
            self._convert_into(weight, rows, scaled=output_scale is None)
            if output_scale is None and added is None and is_card(x.device):
                # Where it is to be, in one kernel; others copy a result that lies apart.
                torch.mm(x.reshape(-1, x.shape[-1]), weight.T, out=result.view(-1, self.out_features)[:, rows])
            elif output_scale is None:
                out.copy_(product(x, weight, added))
            elif writes_scaled:
                flat = result.view(-1, self.out_features)[:, rows]
                multiply_into(flat, x.reshape(-1, self.in_features), weight, _of_rows(output_scale, rows))
            else:
                _write_scaled(out, product(x, weight), _of_rows(output_scale, rows), added)
        return result

    def _multiply_shared(
        self, result: Tensor, x: Tensor, scale: Tensor | None, bias: Tensor | None, workers: int
    ) -> None:
        """result := x W^T * scale + bias: threads convert and multiply pieces of the weight as they come free."""
        step = _piece_rows(x, self.weight, workers)
        rooms = self._take(step * workers, x.dtype).split(step)

        def converted(worker: int, rows: slice) -> Tensor:
            return self._convert_into(rooms[worker][: rows.stop - rows.start], rows, scaled=scale is None)

        _multiply_pieces(result, x, converted, step, scale, bias, workers)

    def rows(
        self, parts: Sequence[slice], dtype: torch.dtype, tokens: int
    ) -> list[Callable[[Tensor | QuantizedRows], Tensor]]:
        """For each of `parts`, rows of the weight: x, of `dtype` and as from `read`, -> x W[part]^T. No bias.

        tokens: rows of all x together. Converted rows are converted here, once for many x, and stand in the scratch
        until another layer, or this one, converts something.
        """
        if self.multiplies_int8:
            return [partial(self._multiply_int8, rows=part) for part in parts]
        if self.weight_scale is None and self.weight.dtype == dtype:
            return [partial(product, weight=self.weight[part]) for part in parts]
        scale = self._output_scale(self.weight.device, dtype)
        if scale is not None and self._multiplies_stored(dtype, tokens):
            return [partial(_linear_scaled, weight=self.weight[part], scale=_of_rows(scale, part)) for part in parts]
        counts = [len(range(*part.indices(self.out_features))) for part in parts]
        held = self._take(sum(counts), dtype).split(counts)
        self._convert_all(list(zip(held, parts, strict=True)), scaled=scale is None)
        if scale is None:
            return [partial(product, weight=weight) for weight in held]
        return [
            partial(_linear_scaled, weight=weight, scale=_of_rows(scale, part))
            for weight, part in zip(held, parts, strict=True)
        ]

    def _output_scale(self, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """(N) or (1) fp32, where outputs are scaled and not the weight, whose int8 values are exact in `dtype`.

        On CPUs, where each pass over a weight costs time; a card scales as it converts. Not in fp16, which sums of
        unscaled products would leave; nor where a row has several scales.
        """
        scale = self.weight_scale
        if device.type != "cpu" or dtype == torch.float16 or self.weight.dtype != torch.int8 or scale is None:
            return None
        if not self._has_row_scales:
            return None
        return scale.reshape(-1)

    def _has_kernel(self, inputs: torch.dtype, weights: torch.dtype) -> bool:
        """Whether oneDNN multiplies and scales this layer's int8 values, as they are or converted."""
        return _is_wide_and_plain(self.weight) and multiplies(inputs, weights)

    def _multiplies_stored(self, dtype: torch.dtype, tokens: int) -> bool:
        """Whether to multiply so many rows of `dtype` with the int8 values where they lie."""
        if self.rotation is not None or not self._has_kernel(dtype, torch.int8):
            return False
        return dtype == torch.float32 or tokens <= _MOST_STORED_TOKENS

    def _multiply_int8(self, x: Tensor | QuantizedRows, rows: slice) -> Tensor:
        if not isinstance(x, QuantizedRows) or x.rotation != self.rotation:
            x = quantize_rows(x if isinstance(x, Tensor) else x.source, self.rotation)
        assert self.int8_matmul is not None
        assert self.weight_scale is not None
        scale = expand_scale(self.weight_scale, *self.weight.shape, span=rows)
        return multiply(self.int8_matmul, x, self.weight[rows], scale, None if self.bias is None else self.bias[rows])

    def _take(self, rows: int, dtype: torch.dtype) -> Tensor:
        device = self.weight.device
        least = _CARD_PRODUCT_BYTES if is_card(device) else 0
        return self.scratch.take("weight", (rows, self.in_features), dtype, device, least)

    def _convert_into(self, out: Tensor, rows: slice, *, scaled: bool = True) -> Tensor:
        """out := the weight's rows (n, K) in out's dtype, a slice at a time; `scaled`, or as they are stored."""
        start, stop, _ = rows.indices(self.out_features)
        step = max(stop - start, 1) if self._converts_at_once else _slice_rows(out.device, self.in_features)
        for piece, part in zip(out.split(step), _pieces(start, stop, step), strict=True):
            self._convert_slice(piece, part, scaled)
        return out

    def _convert_all(self, wanted: Sequence[tuple[Tensor, slice]], *, scaled: bool) -> None:
        """Each out := its rows of the weight, where it may be in pieces that threads take as they come free."""
        workers = worker_count() if self._converts_apart(wanted[0][0].dtype) else 1
        if workers == 1:
            for out, part in wanted:
                self._convert_into(out, part, scaled=scaled)
            return
        step = _slice_rows(self.weight.device, self.in_features)
        pieces = []
        for out, part in wanted:
            start, stop, _ = part.indices(self.out_features)
            pieces += list(zip(out.split(step), _pieces(start, stop, step), strict=True))
        share(pieces, lambda _, piece: self._convert_into(*piece, scaled=scaled), workers)

    def _converts_apart(self, dtype: torch.dtype) -> bool:
        """Whether several threads may convert rows to `dtype` at once, on a CPU: nothing passes through the scratch
        on its way, nor takes memory of its own, as scales of blocks do."""
        if self.weight.device.type != "cpu" or dtype != torch.float32 or self.rotation is not None:
            return False
        return self.weight_scale is None or self._has_row_scales

    def _convert_slice(self, out: Tensor, rows: slice, scaled: bool) -> None:
        """out := these rows; what is fp32 in between stands in the scratch."""
        stored = self.weight[rows]
        if self.weight_scale is None or not (scaled or self.rotation):
            _copy_into(out, stored)
            return
        scale = expand_scale(self.weight_scale, *self.weight.shape, span=rows)
        if self._converts_at_once:
            torch.mul(stored, scale, out=out)
            return
        plain = self.rotation is None and out.dtype == torch.float32
        values = _copy_into(out if plain else self._take_fp32("values", stored.shape), stored)
        if scaled:
            values.mul_(scale)
        if self.rotation is not None:
            target = out if out.dtype == torch.float32 else self._take_fp32("turned", stored.shape)
            values = self.rotation.apply(values, target)
        if values.dtype != out.dtype:
            out.copy_(values)

    @property
    def _converts_at_once(self) -> bool:
        """One kernel, which multiplies in fp32 and rounds as it writes. On a CPU it would make copies inside; scales of
        blocks are spread over all columns before, a slice at a time."""
        if not is_card(self.weight.device) or self.weight.dtype != torch.int8 or self.rotation is not None:
            return False
        return self.weight_scale is not None and self._has_row_scales

    def _take_fp32(self, name: str, shape: torch.Size) -> Tensor:
        return self.scratch.take(name, shape, torch.float32, self.weight.device)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.weight.dtype}, rotation={self.rotation}"


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """x (..., K) W^T * scale + b. scale: None, (N) or (1) fp32. Of all rows together: where x is a slice of a longer
    tensor, `F.linear` multiplies each item of the batch by itself, on a CPU in several times the time."""
    workers = _workers_for(x, weight, bias)
    if workers > 1:
        result = x.new_empty(*x.shape[:-1], weight.shape[0])
        step = _piece_rows(x, weight, workers)
        _multiply_pieces(result, x, lambda _, rows: weight[rows], step, scale, bias, workers)
        return result
    if scale is None:
        y = F.linear(x.reshape(-1, x.shape[-1]), weight, bias)
    else:
        y = F.linear(x.reshape(-1, x.shape[-1]), weight)
        _write_scaled(y, y, scale, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def _wants_gradients(*operands: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(operand is not None and operand.requires_grad for operand in operands)


def _workers_for(x: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    """How many threads share x W^T, of which each multiplies alone; 1: torch's own way.

    In fp32 on CPUs, by whose BLAS a thread multiplies part of a weight as fast by itself as beside others. Of half
    precision, which is oneDNN's, that is not known.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or type(x) is not Tensor or not _is_wide_and_plain(weight):
        return 1
    # Settings of autocast are a thread's own.
    if _wants_gradients(x, weight, bias) or torch.is_autocast_enabled("cpu"):
        return 1
    workers = worker_count()
    return workers if x.shape[:-1].numel() * weight.numel() >= _LEAST_SHARED_WORK * workers else 1


def _pieces(start: int, stop: int, step: int) -> list[slice]:
    """The rows from start to stop, `step` at a time."""
    return [slice(first, min(first + step, stop)) for first in range(start, stop, step)]


def _piece_rows(x: Tensor, weight: Tensor, workers: int) -> int:
    """Rows of the weight that a thread multiplies at a time: in pieces of about one size, about as many for each."""
    outputs, columns = weight.shape
    nbytes = _SMALL_PIECE_BYTES if x.shape[:-1].numel() <= _FEW_TOKENS else _PIECE_BYTES
    most = max(nbytes // (4 * columns) // _PIECE_MULTIPLE, 1) * _PIECE_MULTIPLE
    pieces = -(-outputs // (most * workers)) * workers
    return -(-outputs // (pieces * _PIECE_MULTIPLE)) * _PIECE_MULTIPLE


def _multiply_pieces(
    result: Tensor,
    x: Tensor,
    weight_rows: Callable[[int, slice], Tensor],
    step: int,
    scale: Tensor | None,
    bias: Tensor | None,
    workers: int,
) -> None:
    """result (..., N) := x W^T * scale + bias. weight_rows(worker, rows): these of the weight, (n, K) fp32."""
    outputs = result.shape[-1]
    inputs, out = x.reshape(-1, x.shape[-1]), result.view(-1, outputs)

    def multiply(worker: int, rows: slice) -> None:
        part = out[:, rows]
        torch.mm(inputs, weight_rows(worker, rows).T, out=part)
        if scale is not None:
            part.mul_(_of_rows(scale, rows))
        if bias is not None:
            part.add_(bias[rows])

    share(_pieces(0, outputs, step), multiply, workers)


def _copy_into(out: Tensor, stored: Tensor) -> Tensor:
    """out := stored, in out's dtype."""
    is_widened = stored.device.type == "cpu" and stored.dtype == torch.float8_e4m3fn
    if is_widened and stored.is_contiguous() and out.is_contiguous():
        return widen_into(out, stored)
    return out.copy_(stored)


def _of_rows(scale: Tensor, rows: slice) -> Tensor:
    """Of an output scale, (N) or (1), what these rows have."""
    return scale if scale.shape[0] == 1 else scale[rows]


def _write_scaled(out: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """out (..., n) := y * scale + bias, in fp32 until it is written."""
    if y.dtype == torch.float32:
        torch.mul(y, scale, out=out)
        if bias is not None:
            out.add_(bias)
        return
    step = rows_at_a_time(y.flatten(0, -2))
    for start in range(0, y.shape[-2], step):
        part = slice(start, start + step)
        values = y[..., part, :].float().mul_(scale)
        out[..., part, :] = values if bias is None else values.add_(bias)


def _is_wide_and_plain(weight: Tensor) -> bool:
    """Subclasses of tensors may have no values, or take part in more than a product."""
    is_plain = type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu"
    return is_plain and weight.shape[1] >= _LEAST_KERNEL_COLUMNS


def _linear_scaled(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """(x W^T) * scale, scaled in fp32. weight (N, K), of x's dtype or int8 as `multiplies` is true of; scale (N) or
    (1)."""
    rows = x.reshape(-1, x.shape[-1])
    if _is_wide_and_plain(weight) and multiplies(x.dtype, weight.dtype):
        y = torch.empty(rows.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
        multiply_into(y, rows, weight, scale)
    else:
        y = product(rows, weight, scale=scale)
    return y.view(*x.shape[:-1], weight.shape[0])


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; the weight stays as stored."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.is_grad_enabled():
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        rows = x.reshape(-1, x.shape[-1])
        result, weight = torch.empty_like(rows), self.weight.float()
        # On a CPU torch's goes over all of x many times; a few rows at a time stay in the cache meanwhile.
        step = rows_at_a_time(rows)
        for start in range(0, rows.shape[0], step):
            part = rows[start : start + step].float()
            factor = (part * part).mean(dim=-1, keepdim=True).add_(self.eps).rsqrt_()
            result[start : start + step] = (part * factor).mul_(weight)
        return result.view(x.shape)


class Conv2d(nn.Conv2d):
    """A convolution whose weights stay in their stored dtype and follow the input's on use.

    On a CPU without half-precision kernels it computes in fp32 and rounds the result, which is what
    accumulating in fp32 gives, and a hundred times faster than torch's fallback there. Of maps that lie channels last
    on a card, one of a single position is a matrix product, and is made by one: cuDNN would pad few outputs to eight.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size == (1, 1) and is_card(x.device) and x.is_contiguous(memory_format=torch.channels_last):
            return self._at_each_position(x)
        lacks_kernel = x.device.type == "cpu" and x.dtype.itemsize == 2 and not has_half_kernels(x.dtype)
        dtype = torch.float32 if lacks_kernel else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return self._conv_forward(x.to(dtype), self.weight.to(dtype), bias).to(x.dtype)

    def _at_each_position(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        rows = x.permute(0, 2, 3, 1)
        y = product(rows, self.weight.flatten(1).to(x.dtype), bias)
        return y.permute(0, 3, 1, 2)
