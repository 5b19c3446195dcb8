"""A CUDA device that has no memory and computes nothing, on any build of torch, and counts every byte.

    with FakeCuda(ARCHES["sm86"]) as cuda:
        model(torch.empty(1, 3, 4096, 4096, device=cuda.device))
    print(cuda.memory.peak, cuda.memory.peak_at, cuda.allocator.peak_reserved)

Modelled, as a CUDA build of torch would do it:
    storages       counted once however many views they have, 512-byte rounding, freed with their last tensor
    attention      flash, memory-efficient, cuDNN or math, by card, dtype and head width
    fused RMSNorm  one kernel where input and weight have one dtype; torch's own composite where not
    copies         contiguous ones that kernels (convolution, pooling, upsampling, matrix products) make of their
                   inputs, and staging of strided tensors on their way between host and device
    host reads     bool(), item(), torch.equal of tensors: answered "all is well", and listed with copies between
                   host and device that make the host wait
Not modelled: the CUDA context, cuBLAS and cuDNN workspaces, what flash attention takes to split a few queries over
many keys, kernels' other scratch, several streams. Nothing here says that a kernel accepts its inputs.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
import torch.nn.functional as F
from allocator_model import CachingAllocator, Chunk, rounded
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# The torch whose private parts below were looked at.
TESTED_TORCH = "2.13"
_REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"
_CUDA, _META, _DEVICE_TYPES = 1, 14, 20  # c10::DeviceType
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_TORCH_FOLDER = str(Path(torch.__file__).parent)
_HIDDEN_FILES = (_TORCH_FOLDER, __file__, "<")


class DeviceGuardError(RuntimeError):
    """This torch cannot be made to handle CUDA tensors without CUDA; the message says what failed."""


@contextmanager
def device_guard() -> Iterator[None]:
    """While open, operations on fake CUDA tensors work although torch was built without CUDA.

    Every operation asks the device guard of its tensor's device; a CPU build has none for CUDA. The entry of
    the meta device, which does nothing, is put in its place in torch's own table (private, found by its symbol),
    and taken out again. Then "cuda" without an index means the meta device: always write "cuda:0".
    Does nothing on a CUDA build. Raises DeviceGuardError.
    """
    table = _guard_table()
    if table[_CUDA]:
        yield
        return
    table[_CUDA] = table[_META]
    try:
        _require_working_guard()
        yield
    finally:
        table[_CUDA] = None


def _guard_table() -> Any:
    try:
        library = ctypes.CDLL(str(Path(_TORCH_FOLDER) / "lib" / "libc10.so"))
        return (ctypes.c_void_p * _DEVICE_TYPES).in_dll(library, _REGISTRY)
    except (OSError, ValueError) as error:
        raise DeviceGuardError(_broken(str(error))) from error


def _require_working_guard() -> None:
    try:
        with FakeTensorMode():
            tensor = torch.empty(4, device="cuda:0")
            tensor[:2] = torch.ones(2)
            tensor.view(torch.uint8)
    except RuntimeError as error:
        raise DeviceGuardError(_broken(str(error).splitlines()[0])) from error


def _broken(reason: str) -> str:
    return (
        f"fake CUDA tensors need the table of device guards in Linux builds of torch {TESTED_TORCH}; "
        f"torch {torch.__version__} on {sys.platform} differs: {reason}"
    )


@dataclass(frozen=True)
class Arch:
    """A generation of cards by compute capability: which attention kernel torch picks there.

    After aten/src/ATen/native/transformers/cuda/sdp_utils.cpp of torch 2.13; builds without flash attention
    (some for Windows) are not told apart.
    """

    name: str
    capability: tuple[int, int]

    def attention_kernel(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> str:
        """ "cudnn", "flash", "efficient" or "math", for q (..., D) and unequal key lengths at will."""
        half = q.dtype in (torch.float16, torch.bfloat16)
        width = q.shape[-1]
        strides = all(tensor.stride(-1) == 1 for tensor in (q, k, v))
        if mask is None and half and strides and self.capability >= (8, 0):
            if self.capability in ((9, 0), (10, 0)) and width <= 128 and width % 8 == 0:
                return "cudnn"
            if width <= 256:
                return "flash"
        if self._has_efficient(q.dtype) and width % (8 if half else 4) == 0 and strides:
            return "efficient"
        return "math"

    def has_fused_attention(self, dtype: torch.dtype, head_dim: int) -> bool:
        """Whether unmasked attention runs without a score matrix: the arch's answer to `has_fused_kernel`."""
        probe = torch.empty(1, 1, 1, head_dim, device="meta", dtype=dtype)
        return self.attention_kernel(probe, probe, probe) != "math"

    def _has_efficient(self, dtype: torch.dtype) -> bool:
        # Turing has no bfloat16 matrix units, and the kernel no other way.
        return dtype in (torch.float16, torch.float32) or (dtype == torch.bfloat16 and self.capability >= (8, 0))


ARCHES = {
    name: Arch(name, (int(name[2:-1]), int(name[-1])))
    for name in ("sm61", "sm75", "sm80", "sm86", "sm89", "sm90", "sm120")
}


class Memory(TorchDispatchMode):
    """Counts the storages on the device, as operations make and lose them.

    current, peak: bytes alive, every storage rounded up to 512. peak_at: the operation and the line that made
    the peak, with its callers. host_syncs: how often which line made the host wait for the device.
    """

    def __init__(self, allocator: CachingAllocator | None = None) -> None:
        super().__init__()
        self.allocator = allocator or CachingAllocator()
        self.current = self.peak = 0
        self.peak_at = self.reserved_at = ""
        self.host_syncs: Counter[str] = Counter()
        self._alive: dict[int, tuple[weakref.ref[Any], int, Chunk]] = {}
        self._history: list[tuple[int, str]] = []
        self._peak_index = 0

    def alive_at_peak(self) -> list[tuple[int, str]]:
        """(bytes, line that made them) of what was alive at the peak, the largest first."""
        sites: Counter[str] = Counter()
        for nbytes, site in self._history[: self._peak_index]:
            sites[site] += nbytes
        return sorted(((nbytes, site) for site, nbytes in sites.items() if nbytes), reverse=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "aten":
            return func(*args, **kwargs)
        if _is_composite(func):
            with self:
                # The kernel written in C++: decompositions written in Python may make other tensors.
                result = func._op_dk(_COMPOSITE, *args, **kwargs)
            if result is not NotImplemented:
                return result
        self._note_copy(func, args, kwargs)
        scratch = sum(rounded(nbytes) for nbytes in _copied_inputs(func, args))
        held = self._hold(scratch, func) if scratch else None
        result = func(*args, **kwargs)
        if func is aten.convolution.default and _has_channels_last(args[0]):
            # cuDNN's order, which a build without CUDA does not know of.
            result = torch.empty_like(result, memory_format=torch.channels_last)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "cuda":
                self._count(leaf.untyped_storage(), func)
        if held is not None:
            self._release(scratch, held, _site(func))
        return result

    def _count(self, storage: torch.UntypedStorage, func: Any) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if not nbytes or (key in self._alive and self._alive[key][0]() is storage):
            return
        site = _site(func)
        chunk = self._hold(rounded(nbytes), func, site)

        def gone(_: Any) -> None:
            del self._alive[key]
            self._release(rounded(nbytes), chunk, site)

        self._alive[key] = (weakref.ref(storage, gone), nbytes, chunk)

    def _hold(self, nbytes: int, func: Any, site: str | None = None) -> Chunk:
        before = self.allocator.peak_reserved
        chunk = self.allocator.allocate(nbytes)
        self._history.append((nbytes, site or _site(func)))
        self.current += nbytes
        if self.current > self.peak:
            self.peak, self._peak_index = self.current, len(self._history)
            self.peak_at = f"{_spelled(func)} at {callers()}"
        if self.allocator.peak_reserved > before:
            self.reserved_at = f"{_spelled(func)} at {callers()}"
        return chunk

    def _release(self, nbytes: int, chunk: Chunk, site: str) -> None:
        self.allocator.free(chunk)
        self._history.append((-nbytes, site))
        self.current -= nbytes

    def _note_copy(self, func: Any, args: Any, kwargs: Any) -> None:
        """A copy between host and device makes the host wait for all that was queued, unless asked not to."""
        if func is aten.copy_.default:
            pair, blocks = (args[0].device.type, args[1].device.type), not (len(args) > 2 and args[2])
            blocks = blocks and not kwargs.get("non_blocking", False)
        elif func is aten._to_copy.default:
            target = kwargs.get("device") or args[0].device
            pair, blocks = (target.type, args[0].device.type), not kwargs.get("non_blocking", False)
        else:
            return
        if blocks and set(pair) == {"cpu", "cuda"}:
            self.host_syncs[f"copy to {pair[0]} at {callers(1)}"] += 1


_OWN_COPIES = {
    aten.convolution.default,
    aten.upsample_nearest2d.default,
    aten._fused_rms_norm.default,
}
_LEAST_TURNED_CHANNELS = 8
_MATRIX_OPERANDS = {aten.mm.default: (0, 1), aten.bmm.default: (0, 1), aten.addmm.default: (1, 2)}


@lru_cache(maxsize=1024)
def _is_composite(func: Any) -> bool:
    # On CUDA this one is a kernel; elsewhere torch falls back to a chain of operations.
    if func.name() == "aten::_fused_rms_norm":
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _copied_inputs(func: Any, args: Any) -> Iterator[int]:
    """Bytes of each copy that a CUDA kernel makes of its inputs for as long as it runs."""
    if func in _OWN_COPIES:
        x = args[0]
        if x.device.type == "cuda" and not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
            yield x.nbytes
        if func is aten.convolution.default and _turns_maps(x):
            # Input and output in the kernel's order; as measured on an H200 with cuDNN 9.19.
            yield x.nbytes
            yield x.nbytes // x.shape[1] * args[1].shape[0]
    elif func in _MATRIX_OPERANDS:
        operands = [args[index] for index in _MATRIX_OPERANDS[func]]
        yield from (t.nbytes for t in operands if t.device.type == "cuda" and not _suits_blas(t))
    elif func is aten.copy_.default and args[0].device.type != args[1].device.type:
        # Strided device memory passes through a contiguous copy on its way to or from the host.
        yield from (t.nbytes for t in args[:2] if t.device.type == "cuda" and not t.is_contiguous())


def _turns_maps(x: Tensor) -> bool:
    """Whether cuDNN copies maps to another order of channels, and back: last in half precision, else first. Of a
    picture's few channels it does not."""
    is_turned = _has_channels_last(x) != (x.dtype.itemsize == 2)
    return x.device.type == "cuda" and x.shape[1] >= _LEAST_TURNED_CHANNELS and is_turned


def _has_channels_last(x: Tensor) -> bool:
    return x.device.type == "cuda" and x.shape[1] > 1 and x.stride(1) == 1


def _suits_blas(matrix: Tensor) -> bool:
    """Rows or columns lie together, so that a product reads the matrix, or the batch of them, as it is."""
    rows, columns = matrix.shape[-2:]
    return (matrix.stride(-1) == 1 and matrix.stride(-2) >= columns) or (
        matrix.stride(-2) == 1 and matrix.stride(-1) >= rows
    )


class Routing(TorchFunctionMode):
    """Sends attention where a CUDA build would, and answers what Python asks of values that do not exist.

    kernels: attention calls by kernel. A truth is true, tensors of one shape are equal, a number is 1.
    """

    def __init__(self, arch: Arch, memory: Memory) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self._arch = arch
        self._memory = memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].device.type == "cuda":
            return self._attend(*args, **kwargs)
        if func in _HOST_READS:
            if any(t.device.type == "cuda" for t in args if isinstance(t, Tensor)):
                self._memory.host_syncs[f"{func.__name__} at {callers(1)}"] += 1
            return _HOST_READS[func](*args)
        return func(*args, **kwargs)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        kernel = self._arch.attention_kernel(q, k, v, attn_mask)
        self.kernels[kernel] += 1
        if options:
            raise NotImplementedError(f"attention with {', '.join(options)} is not modelled")
        if kernel == "flash":
            return aten._scaled_dot_product_flash_attention(q, k, v)[0]
        if kernel == "efficient":
            return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, False)[0]
        if kernel == "cudnn":
            return aten._scaled_dot_product_cudnn_attention(q, k, v, attn_mask, False)[0]
        return aten._scaled_dot_product_attention_math(q, k, v, attn_mask)[0]


_HOST_READS: dict[Any, Any] = {
    Tensor.__bool__: lambda tensor: True,
    Tensor.item: lambda tensor: 1,
    Tensor.__float__: lambda tensor: 1.0,
    Tensor.__int__: lambda tensor: 1,
    torch.equal: lambda a, b: a.shape == b.shape,
    Tensor.equal: lambda a, b: a.shape == b.shape,
}


class FakeCuda:
    """A context manager: while open, tensors made are fake, those on `device` counted; inference mode is on.

    limit_bytes: what the allocator may reserve before it raises torch.OutOfMemoryError; None: any amount.
    expandable: of the allocator. Tensors made inside are of no use after it is closed. Raises DeviceGuardError.
    """

    device = torch.device("cuda", 0)

    def __init__(
        self, arch: Arch = ARCHES["sm86"], *, limit_bytes: int | None = None, expandable: bool = False
    ) -> None:
        self.arch = arch
        self.allocator = CachingAllocator(limit_bytes, expandable=expandable)
        self.memory = Memory(self.allocator)
        self.routing = Routing(arch, self.memory)
        self._modes = ExitStack()

    def __enter__(self) -> FakeCuda:
        with ExitStack() as stack:
            for mode in (torch.inference_mode(), device_guard(), FakeTensorMode(), self.routing, self.memory):
                stack.enter_context(mode)
            self._modes = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._modes.close()


def callers(most: int = 4) -> str:
    """The lines that led here, innermost first: `linear.py:183 forward < model.py:186 forward`."""
    return " < ".join(_told(frame) for frame, _ in zip(_frames(), range(most), strict=False))


def _site(func: Any) -> str:
    frame = next(_frames(), None)
    return f"{_spelled(func)} at {_told(frame)}" if frame is not None else _spelled(func)


def _frames() -> Iterator[FrameType]:
    """Frames of the calling thread outside of torch and of this file."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_HIDDEN_FILES):
            yield frame
        frame = frame.f_back


def _told(frame: FrameType) -> str:
    return _line(frame.f_code, frame.f_lineno)


@lru_cache(maxsize=4096)
def _line(code: CodeType, number: int) -> str:
    return f"{Path(code.co_filename).name}:{number} {code.co_name}"


@lru_cache(maxsize=1024)
def _spelled(func: Any) -> str:
    return str(func).removeprefix("aten.").removesuffix(".default")
