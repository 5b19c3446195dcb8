"""Products with INT8 weights as they lie, by the oneDNN that torch carries, asked for by its own C interface.

oneDNN multiplies int8 by int8, or floats by int8 that it converts while it packs them, and scales what it writes. Of
that torch's operations pass on parts: they take weights packed beforehand, or scale in passes over memory of their
own. The interface is oneDNN's documented one (https://uxlfoundation.github.io/oneDNN, "C API", stable within version
3). Torch does not export it; where its library has a symbol table (torch's own wheels for Linux do), the functions are
found by their names. What is found is used only where a product by it is right.
"""

from __future__ import annotations

import ctypes
import re
from contextlib import ExitStack
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_uint, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .elf_symbols import function_addresses

# oneDNN's numbers for what it is told (dnnl_types.h, dnnl_common_types.h).
_DTYPES = {torch.bfloat16: 2, torch.float32: 3, torch.int8: 5, torch.uint8: 6}
_CPU, _IN_ORDER, _OWN_SCRATCHPAD = 1, 1, 1
_STRICT, _IN_BF16, _OF_INTEGERS_TOO = 0, 1, 1  # what a product may be computed in
_MULTIPLY = 0x1FFF1  # an operation afterwards
_SOURCE, _OPERAND, _DESTINATION, _WEIGHTS, _SCRATCHPAD, _SCALES, _AFTERWARDS = 1, 2, 17, 33, 80, 4096, 32768
_NAME, _SCRATCHPAD_OF = 8, 136
_DIMENSIONS = c_int64 * 12

# By the dtypes of inputs and weights: names of the kernels that are worth calling.
_FAST_KERNELS = {
    (torch.int8, torch.int8): re.compile("brg_matmul:.*amx"),
    (torch.bfloat16, torch.int8): re.compile("brg_matmul:.*amx"),
    (torch.bfloat16, torch.bfloat16): re.compile("brg_matmul:.*amx"),
    (torch.float32, torch.int8): re.compile("brg_matmul:avx(512|10)"),
}
_REFERENCE = "ref"  # how that one's name begins which takes minutes
_CAPABILITY = "AVX512"  # which all of them need, in torch's words
# Of the product by which a kernel is tried.
_CHECKED_ROWS, _CHECKED_COLUMNS, _CHECKED_OUTPUTS = 48, 96, 80
# Multiplied at a time: oneDNN's own memory grows with them, to 22 MiB for these.
_MOST_ROWS = 4096

_HANDLE, _NEW = c_void_p, POINTER(c_void_p)
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "engine_create": (_NEW, c_int, c_size_t),
    "stream_create": (_NEW, _HANDLE, c_uint),
    "stream_wait": (_HANDLE,),
    "memory_desc_create_with_strides": (_NEW, c_int, _DIMENSIONS, c_int, _DIMENSIONS),
    "memory_desc_destroy": (_HANDLE,),
    "memory_create": (_NEW, _HANDLE, _HANDLE, _HANDLE),
    "memory_destroy": (_HANDLE,),
    "primitive_attr_create": (_NEW,),
    "primitive_attr_destroy": (_HANDLE,),
    "primitive_attr_set_scratchpad_mode": (_HANDLE, c_int),
    "primitive_attr_set_scales_mask": (_HANDLE, c_int, c_int),
    "primitive_attr_set_fpmath_mode_v2": (_HANDLE, c_int, c_int),
    "primitive_attr_set_post_ops": (_HANDLE, _HANDLE),
    "post_ops_create": (_NEW,),
    "post_ops_destroy": (_HANDLE,),
    "post_ops_append_binary": (_HANDLE, c_int, _HANDLE),
    "matmul_primitive_desc_create": (_NEW, *[_HANDLE] * 6),
    "primitive_desc_query": (_HANDLE, c_int, c_int, c_void_p),
    "primitive_desc_destroy": (_HANDLE,),
    "primitive_create": (_NEW, _HANDLE),
    "primitive_destroy": (_HANDLE,),
    "primitive_execute": (_HANDLE, _HANDLE, c_int, c_void_p),
}


class _Argument(ctypes.Structure):
    _fields_ = (("number", c_int), ("memory", c_void_p))


class OneDnnError(RuntimeError):
    """oneDNN refuses a call."""


class _Interface:
    """Its C functions, by their names without `dnnl_`: each raises OneDnnError where it fails."""

    def __init__(self) -> None:
        """Raises OSError, AttributeError or ValueError where they are not found."""
        torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        names = [*_FUNCTIONS, "primitive_desc_query_md", "memory_desc_get_size"]
        found = function_addresses(torch_library.aoti_torch_dtype_int8, [f"dnnl_{name}" for name in names])
        self._functions = {
            name: ctypes.CFUNCTYPE(c_int, *arguments)(found[f"dnnl_{name}"]) for name, arguments in _FUNCTIONS.items()
        }
        # These two return what is asked for, not a status.
        self._description_of = ctypes.CFUNCTYPE(c_void_p, _HANDLE, c_int, c_int)(found["dnnl_primitive_desc_query_md"])
        self._size = ctypes.CFUNCTYPE(c_size_t, _HANDLE)(found["dnnl_memory_desc_get_size"])
        self.engine = self.new("engine", _CPU, 0)
        self.stream = self.new("stream", self.engine, _IN_ORDER)

    def call(self, name: str, *arguments: Any) -> None:
        if status := self._functions[name](*arguments):
            raise OneDnnError(f"oneDNN's {name} fails with status {status}")

    def new(self, kind: str, *arguments: Any, by: str | None = None, destroyed: ExitStack | None = None) -> c_void_p:
        """What `KIND_create`, or the function `by`, makes; destroyed with a stack, or never."""
        made = c_void_p()
        self.call(by or f"{kind}_create", ctypes.byref(made), *arguments)
        if destroyed is not None:
            destroyed.callback(self._functions[f"{kind}_destroy"], made)
        return made

    def scratchpad_bytes(self, description: c_void_p) -> int:
        return int(self._size(self._description_of(description, _SCRATCHPAD_OF, 0)))


@lru_cache
def _interface() -> _Interface | None:
    try:
        return _Interface()
    except (OSError, AttributeError, ValueError, OneDnnError):
        return None


class _Matmul:
    """oneDNN's product for `multiply_into`, made of one call's tensors. Its objects are destroyed with the context.

    kernel: the name of the implementation that oneDNN chose. Raises OneDnnError where there is none worth the name.
    """

    def __init__(self, out: Tensor, x: Tensor, w: Tensor, scale: Tensor, row_scale: Tensor | None) -> None:
        interface = _interface()
        if interface is None:
            raise OneDnnError("oneDNN's interface is not to be found")
        self._interface, self._objects = interface, ExitStack()
        # A factor per row is known to oneDNN only where rows are those of a stack of matrices.
        self._stack = () if row_scale is None else (1,)
        self._arguments: list[_Argument] = []
        try:
            self._prepare(out, x, w, scale, row_scale)
            self.kernel = self._kernel()
            if self.kernel.startswith(_REFERENCE):
                raise OneDnnError(f"oneDNN has only its reference for {list(x.shape)} times {list(w.T.shape)}")
        except BaseException:
            self._objects.close()
            raise

    def __enter__(self) -> _Matmul:
        return self

    def __exit__(self, *_: object) -> None:
        self._objects.close()

    def _kernel(self) -> str:
        """The name of the implementation that oneDNN chose."""
        name = c_char_p()
        self._interface.call("primitive_desc_query", self._description, _NAME, 0, ctypes.byref(name))
        return (name.value or b"").decode()

    @property
    def scratchpad_bytes(self) -> int:
        return self._interface.scratchpad_bytes(self._description)

    def run(self) -> None:
        scratchpad = torch.empty(self.scratchpad_bytes, dtype=torch.uint8, device="cpu")
        self._pass(_SCRATCHPAD, scratchpad, self._described(scratchpad))
        arguments = (_Argument * len(self._arguments))(*self._arguments)
        primitive = self._new("primitive", self._description)
        stream = self._interface.stream
        self._interface.call("primitive_execute", primitive, stream, len(arguments), ctypes.byref(arguments))
        self._interface.call("stream_wait", stream)

    def _prepare(self, out: Tensor, x: Tensor, w: Tensor, scale: Tensor, row_scale: Tensor | None) -> None:
        call = self._interface.call
        attributes, after = self._new("primitive_attr"), self._new("post_ops")
        call("primitive_attr_set_scratchpad_mode", attributes, _OWN_SCRATCHPAD)
        of_each_column = 1 << (len(self._stack) + 1) if scale.numel() > 1 else 0
        call("primitive_attr_set_scales_mask", attributes, _WEIGHTS, of_each_column)
        self._pass(_SCALES | _WEIGHTS, scale, self._described(scale))
        if x.dtype != w.dtype:
            precision = _IN_BF16 if x.dtype == torch.bfloat16 else _STRICT
            call("primitive_attr_set_fpmath_mode_v2", attributes, precision, _OF_INTEGERS_TOO)
        if row_scale is not None:
            call("post_ops_append_binary", after, _MULTIPLY, self._pass_matrix(_AFTERWARDS | _OPERAND, row_scale))
        call("primitive_attr_set_post_ops", attributes, after)
        source, weights, destination = (
            self._pass_matrix(number, matrix) for number, matrix in ((_SOURCE, x), (_WEIGHTS, w.T), (_DESTINATION, out))
        )
        engine = self._interface.engine
        self._description = self._new(
            "primitive_desc", engine, source, weights, None, destination, attributes, by="matmul_primitive_desc_create"
        )

    def _new(self, kind: str, *arguments: Any, by: str | None = None) -> c_void_p:
        return self._interface.new(kind, *arguments, by=by, destroyed=self._objects)

    def _pass_matrix(self, number: int, matrix: Tensor) -> c_void_p:
        described = self._described(matrix, self._stack)
        self._pass(number, matrix, described)
        return described

    def _pass(self, number: int, tensor: Tensor, described: c_void_p) -> None:
        """The tensor must outlive the call."""
        memory = self._new("memory", described, self._interface.engine, tensor.data_ptr())
        self._arguments.append(_Argument(number, memory))

    def _described(self, tensor: Tensor, stack: tuple[int, ...] = ()) -> c_void_p:
        sizes = _DIMENSIONS(*stack, *tensor.shape)
        strides = _DIMENSIONS(*(tensor.numel() for _ in stack), *tensor.stride())
        count = len(stack) + tensor.dim()
        return self._new(
            "memory_desc", count, sizes, _DTYPES[tensor.dtype], strides, by="memory_desc_create_with_strides"
        )


def multiply_into(out: Tensor, x: Tensor, w: Tensor, scale: Tensor, row_scale: Tensor | None = None) -> None:
    """out := x w^T * scale * row_scale, in fp32 until it is rounded to out's dtype.

    out (M, N) of any float dtype; x (M, K) fp32 or bf16 as out, or int8, whose sums are exact; w (N, K) int8, or bf16
    as x; scale (N) or (1) fp32; row_scale (M, 1) fp32. Rows may lie apart; the elements of one of out and x not.
    For what `multiplies` is true of. Raises OneDnnError where oneDNN refuses.
    """
    if w.stride(-1) != 1:
        w = w.contiguous()
    written = out
    if out.dtype not in _DTYPES:
        written = torch.empty(out.shape, dtype=torch.float32, device=out.device)
    elif row_scale is not None and not out.is_contiguous():
        # oneDNN takes the factors of other rows where those of its result lie apart.
        written = torch.empty_like(out, memory_format=torch.contiguous_format)
    for start in range(0, x.shape[0], _MOST_ROWS):
        rows = slice(start, start + _MOST_ROWS)
        with _Matmul(written[rows], x[rows], w, scale, None if row_scale is None else row_scale[rows]) as matmul:
            matmul.run()
    if written is not out:
        out.copy_(written)


@lru_cache
def multiplies(inputs: torch.dtype, weights: torch.dtype = torch.int8) -> bool:
    """Whether `multiply_into` takes such x and w here, and well: by a kernel known to be fast, and right.

    int8 and bf16: on CPUs with AMX. fp32: with AVX-512. On others torch's operations are faster, or oneDNN has
    nothing but its reference.
    """
    fast = _FAST_KERNELS.get((inputs, weights))
    if fast is None or torch.backends.cpu.get_cpu_capability() != _CAPABILITY:
        return False
    x, w, scale, row_scale = _checked_operands(inputs, weights)
    out_dtype = torch.float32 if inputs == torch.int8 else inputs
    # Floats among others of longer rows, which older versions have no kernel for.
    width = _CHECKED_OUTPUTS if inputs == torch.int8 else 2 * _CHECKED_OUTPUTS
    out = torch.empty(_CHECKED_ROWS, width, dtype=out_dtype, device="cpu")[:, :_CHECKED_OUTPUTS]
    try:
        with _Matmul(out, x, w, scale, row_scale) as matmul:
            if not fast.match(matmul.kernel):
                return False
            matmul.run()
    except OneDnnError:
        return False
    # In float64, which autocast leaves alone.
    sums = x.double() @ w.double().T * scale
    return torch.equal(out, (sums if row_scale is None else sums * row_scale).to(out_dtype))


def _checked_operands(inputs: torch.dtype, weights: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x, w, scale and row_scale of a product that is exact until it is rounded to its dtype."""
    sizes = (_CHECKED_ROWS, _CHECKED_COLUMNS, _CHECKED_OUTPUTS)
    rows, columns, outputs = (torch.arange(size, device="cpu").view(-1, 1) for size in sizes)
    x = ((rows * 7 + columns.T * 5) % 31 - 15).to(inputs)
    w = ((outputs * 3 + columns.T * 11) % 255 - 127).to(weights)
    scale = 2.0 ** (outputs.view(-1) % 5 - 2)
    row_scale = 2.0 ** (rows % 3 - 1) if inputs == torch.int8 else None
    return x, w, scale, row_scale


class OneDnnInt8:
    """oneDNN's int8 kernel, a `WritingMatmul`: for what `multiplies(torch.int8)` is true of."""

    def __call__(self, q: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
        """In fp32, rounded once; never into `out`, since sums that stay int32 take oneDNN twice the time."""
        result = torch.empty(q.shape[0], w.shape[0], dtype=torch.float32, device=q.device)
        multiply_into(result, q, w, torch.ones(1, device=q.device))
        return result

    def write(self, out: Tensor, q: Tensor, row_scale: Tensor, w: Tensor, scale: Tensor) -> None:
        multiply_into(out, q, w, scale.reshape(-1), row_scale)


by_onednn = OneDnnInt8()
