"""Where to compute and in which dtype."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

# AMD's architectures that multiply bf16 matrices: CDNA and RDNA from the third on.
_HIP_WITH_BF16 = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")

# Of those within `full_fp32`: the first holds what sets the switches back.
_lock = threading.Lock()
_open: list[Callable[[], None] | None] = []

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(device: str | torch.device) -> torch.device:
    """ "auto": CUDA where there is one, else the CPU. Raises ValueError for a device that is not there.

    A card is named with its number: "cuda" alone would be whichever card is the current one at the time. Makes the
    device's context, so that what the driver takes of the host's memory is seen by whoever plans it.
    """
    try:
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        made = torch.empty(1, device=place)
    # torch raises AssertionError where CUDA is compiled out, ImportError for kinds that others add to it.
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"device {str(device)!r} cannot be used here ({reason}); try auto or cpu") from error
    if place.type == "meta":
        raise ValueError("device 'meta' computes nothing; try auto or cpu")
    return made.device


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype of activations. None or "auto": bf16 where `device` computes it natively; else fp16 on cards
    that are fast in it (GTX 16, RTX 20), else fp32.

    Raises ValueError for anything but bf16, fp16 and fp32.
    """
    if dtype is None or dtype == "auto":
        if computes_bf16(device):
            return torch.bfloat16
        return torch.float16 if fast_in_fp16(device) else torch.float32
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
        return DTYPES[dtype]
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype must be torch.bfloat16, float16 or float32, got {dtype}")
    return dtype


def stream_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of token stream, embedders, text encoder and local decoder, where attention and feed-forward are `dtype`:
    fp16 is too narrow for them."""
    return torch.float32 if dtype == torch.float16 else dtype


@contextmanager
def full_fp32(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """While open, fp32 on CUDA is fp32: cuDNN's convolutions would round their inputs to TF32 by default, and products
    of fp16 matrices add parts in fp16, where what the sum can hold overflows."""
    if device.type != "cuda" or dtype != torch.float32:
        yield
        return
    with _lock:
        _open.append(_switch_to_fp32() if not _open else None)
    try:
        yield
    finally:
        with _lock:
            # Whoever leaves last gives back what the first one found: the switches are the process's.
            first = _open.pop(0)
            if first is not None and _open:
                _open[0] = first
            elif first is not None:
                first()


def _switch_to_fp32() -> Callable[[], None]:
    """Set the switches; returns what sets them back."""
    switches = _switches_of_fp32()
    before = [getattr(switch, name) for switch, name, _ in switches]
    for switch, name, value in switches:
        setattr(switch, name, value)

    def back() -> None:
        for (switch, name, _), value in zip(switches, before, strict=True):
            setattr(switch, name, value)

    return back


def _switches_of_fp32() -> list[tuple[Any, str, object]]:
    """(switch, attribute, value) with which fp32 is fp32, and sums of fp16 products are, too."""
    # Typed as they are: they change their attributes from release to release.
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    # The older switches raise where a program has used the newer ones.
    switches: list[tuple[Any, str, object]]
    if hasattr(matmul, "fp32_precision"):
        switches = [(matmul, "fp32_precision", "ieee"), (cudnn.conv, "fp32_precision", "ieee")]
    else:
        switches = [(matmul, "allow_tf32", False), (cudnn, "allow_tf32", False)]
    if hasattr(matmul, "allow_fp16_accumulation"):
        switches.append((matmul, "allow_fp16_accumulation", False))
    return [*switches, (_Reductions(matmul), "allowed", (False, True))]


class _Reductions:
    """Whether parts of a sum of fp16 products may be added in fp16, and sums cut in parts at all (which newer versions
    of torch put into one setting)."""

    _name = "allow_fp16_reduced_precision_reduction"

    def __init__(self, matmul: Any) -> None:
        self._matmul = matmul

    @property
    def allowed(self) -> tuple[bool, bool]:
        return getattr(self._matmul, self._name), getattr(self._matmul, f"{self._name}_split_k", True)

    @allowed.setter
    def allowed(self, value: tuple[bool, bool]) -> None:
        setattr(self._matmul, self._name, value[0] if value[1] else value)


def is_card(device: torch.device) -> bool:
    """Whether kernels are cuBLAS's and cuDNN's, or AMD's in their place. MPS has others: some releases of torch write a
    product wrongly into a part of a tensor there."""
    return device.type == "cuda"


def in_host_memory() -> AbstractContextManager[object]:
    """While open, what is made without naming a device is in host memory, whatever default a program has set."""
    # Made to see: not every release of torch tells of a default that a `with torch.device(...)` has set.
    return nullcontext() if torch.empty(0).device.type == "cpu" else torch.device("cpu")


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """While open, a card is torch's current device: what is asked about "the card", such as which attention kernel it
    has, and what is made without naming one, concerns this one."""
    is_card = device.type == "cuda" and torch.cuda.is_available()
    with torch.cuda.device(device) if is_card else nullcontext():
        yield


def fast_in_fp16(device: torch.device) -> bool:
    """Whether a card computes fp16 faster than fp32: from Volta on; those before have hardly any of it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)


def computes_bf16(device: torch.device) -> bool:
    """Whether `device` has bf16 arithmetic of its own (emulation does not count)."""
    if device.type == "cuda":
        if torch.version.hip is not None:  # torch says yes of every card
            architecture = str(torch.cuda.get_device_properties(device).gcnArchName)
            return architecture.startswith(_HIP_WITH_BF16)
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Names torch keeps private; without them fp32 is always right, only slower.
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, lambda: False)() for name in checks)
    return False


def device_name(device: torch.device) -> str:
    """What a device rounds like: a card's model, a CPU's vectors."""
    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    name = getattr(torch.get_device_module(device.type), "get_device_name", None)
    return device.type if name is None else f"{device.type} {name(device)}"
