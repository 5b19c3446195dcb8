"""INT8 products by the kernel that torch keeps for its own quantised models, on weights as they lie.

On CPUs with AMX `torch.ops.onednn.qlinear_pointwise` takes half the time of `torch._int_mm`, whose sums come through
oneDNN's slower way for int32. But it reads a weight only as an MKLDNN tensor, and torch makes such a tensor by copying
and turning: 80 ms for the 44 MB that are then multiplied in 20. The kernel itself takes rows as a checkpoint has them.
So an MKLDNN tensor is made here that is a view, by the call with which torch's compiled models do so: from an address
and a serialised memory descriptor.

That descriptor is oneDNN's own structure, with no promise to stay as it is. It is learnt from tensors that torch makes,
and used only if it tells all that is expected, a weight read through it is the weight, and a product by it is right.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .int8_matmul import by_int_mm

# Of tensors that a descriptor is learnt from: numbers that nothing else in it has.
_LEARNT_SHAPES = ((1009, 2003), (1013, 1999))
_INT64 = 8
_WORD = 4  # int64 values stand at multiples of this


@dataclass(frozen=True)
class _Descriptor:
    """A serialised descriptor of a matrix, stored row by row, and where in it its numbers stand, in bytes.

    rows, columns: of each number of rows and columns, as size and as padded size. strides: of a row, then a column.
    """

    serialised: bytes
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    strides: tuple[int, int]

    def of_transposed(self, rows: int, columns: int) -> bytes:
        """The descriptor of the transposed view, (columns, rows), of a matrix (rows, columns) stored row by row."""
        result = bytearray(self.serialised)
        places = [(place, columns) for place in self.rows] + [(place, rows) for place in self.columns]
        for place, value in [*places, (self.strides[0], 1), (self.strides[1], columns)]:
            result[place : place + _INT64] = value.to_bytes(_INT64, sys.byteorder)
        return bytes(result)


def _learn() -> _Descriptor:
    """Raises ValueError where torch's descriptor is not as expected, RuntimeError or AttributeError without one."""
    first, second = (_learn_from(*shape) for shape in _LEARNT_SHAPES)
    if (first.rows, first.columns, first.strides) != (second.rows, second.columns, second.strides):
        raise ValueError("memory descriptors differ in more than their numbers")
    return first


def _serialised(rows: int, columns: int) -> bytes:
    matrix = torch.zeros(rows, columns, dtype=torch.int8, device="cpu").to_mkldnn()
    return bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(matrix).tolist())


def _learn_from(rows: int, columns: int) -> _Descriptor:
    serialised = _serialised(rows, columns)
    at_rows, at_columns = _places(serialised, rows), _places(serialised, columns)
    # Size and padded size; of columns also the stride of a row, before that of a column, which is 1.
    if len(at_rows) != 2 or at_columns[:2] != tuple(place + _INT64 for place in at_rows) or len(at_columns) != 3:
        raise ValueError("an unknown memory descriptor")
    of_row, of_column = at_columns[2], at_columns[2] + _INT64
    if serialised[of_column : of_column + _INT64] != (1).to_bytes(_INT64, sys.byteorder):
        raise ValueError("a memory descriptor without strides")
    return _Descriptor(serialised, at_rows, at_columns[:2], (of_row, of_column))


def _places(serialised: bytes, value: int) -> tuple[int, ...]:
    wanted = value.to_bytes(_INT64, sys.byteorder)
    places = range(0, len(serialised) - _INT64 + 1, _WORD)
    return tuple(place for place in places if serialised[place : place + _INT64] == wanted)


class _Views:
    """Makes MKLDNN tensors of memory that others own. Raises OSError or AttributeError where torch lacks the call."""

    def __init__(self) -> None:
        name = "torch_cpu.dll" if sys.platform == "win32" else "libtorch_cpu.so"
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        self._descriptor = _learn()
        self._create = library.aoti_torch_create_tensor_from_blob_v2
        whole, numbers = ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)
        self._create.argtypes = [
            *(ctypes.c_void_p, whole, numbers, numbers, whole),  # data, dimensions, sizes, strides, offset
            *(ctypes.c_int32, ctypes.c_int32, ctypes.c_int32),  # dtype, kind and number of the device
            *(ctypes.POINTER(ctypes.c_void_p), ctypes.c_int32),  # the tensor, the layout
            *(ctypes.c_char_p, whole),  # the descriptor
        ]
        self._int8, self._cpu = library.aoti_torch_dtype_int8(), library.aoti_torch_device_type_cpu()
        self._layout = library.aoti_torch_layout__mkldnn()
        self._take_over = torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr
        self._capsule = ctypes.pythonapi.PyCapsule_New
        self._capsule.restype = ctypes.py_object
        self._capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        self._delete = library.aoti_torch_delete_tensor_object
        self._delete.argtypes = [ctypes.c_void_p]
        # Whether taking a tensor over leaves the handle's own reference, for all that the call is named.
        handle = self._handle(torch.zeros(8, 8, dtype=torch.int8, device="cpu"))
        probe: Any = self._taken_over(handle)
        self._is_left = probe._use_count() > 1
        if self._is_left:
            self._delete(handle)

    def transposed(self, weight: Tensor) -> Tensor:
        """weight (N, K) int8, row by row -> an MKLDNN tensor (K, N) of the same memory, which must outlive it."""
        handle = self._handle(weight)
        try:
            return self._taken_over(handle)
        finally:
            if self._is_left:
                self._delete(handle)

    def _handle(self, weight: Tensor) -> ctypes.c_void_p:
        rows, columns = weight.shape
        sizes, strides = (ctypes.c_int64 * 2)(columns, rows), (ctypes.c_int64 * 2)(1, columns)
        descriptor = self._descriptor.of_transposed(rows, columns)
        handle = ctypes.c_void_p()
        failed = self._create(
            *(weight.data_ptr(), 2, sizes, strides, 0),
            *(self._int8, self._cpu, 0),
            *(ctypes.byref(handle), self._layout),
            *(descriptor, len(descriptor)),
        )
        if failed:
            raise RuntimeError("torch could not make an MKLDNN tensor of a weight")
        return handle

    def _taken_over(self, handle: ctypes.c_void_p) -> Tensor:
        view: Tensor = self._take_over(self._capsule(handle, None, None))
        return view


def _product(view: Tensor, q: Tensor, factor: Tensor) -> Tensor:
    """q (M, K) times an MKLDNN tensor (K, N), both int8, times factor (N) or (1) -> (M, N) in fp32."""
    zero = torch.zeros(1, dtype=torch.int64, device="cpu")
    result: Tensor = torch.ops.onednn.qlinear_pointwise(
        *(q, 1.0, 0),
        *(view, factor, zero, None),
        *(1.0, 0, torch.float32),
        *("none", [], ""),
    )
    return result


@lru_cache
def _views() -> _Views | None:
    """None where this torch has no such views or no such kernel, or they do not show and make what they should."""
    weight = torch.arange(-48, 48, dtype=torch.int8, device="cpu").view(8, 12)
    try:
        views = _Views()
        view = views.transposed(weight)
        shown, sums = view.to_dense(), _product(view, weight[:5], torch.ones(1, device="cpu"))
    except (OSError, AttributeError, RuntimeError, TypeError, ValueError):
        return None
    right = torch.equal(shown, weight.T) and torch.equal(sums, weight[:5].float() @ weight.float().T)
    return views if right else None


def has_qlinear() -> bool:
    """Whether `by_qlinear` has its kernel here: on x86 alone, and not with every torch (2.6 takes uint8, no int8)."""
    return _views() is not None


class Qlinear:
    """oneDNN's int8 kernel for quantised models, an `Int8Matmul` that scales; its sums are fp32, rounded once.

    For CPUs with AMX: on others it takes minutes. Weights that do not lie row by row go through `torch._int_mm`.
    """

    def __call__(self, q: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
        """Never into `out`, which the kernel cannot."""
        return self.scaled(q, w, torch.ones(1, 1, device=q.device))

    def scaled(self, q: Tensor, w: Tensor, factor: Tensor) -> Tensor:
        views = _views()
        if views is None or not w.is_contiguous():
            return by_int_mm(q, w) * factor
        return _product(views.transposed(w), q, factor.reshape(-1))


by_qlinear = Qlinear()
