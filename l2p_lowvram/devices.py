"""Where to compute and in which dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(device: str | torch.device) -> torch.device:
    """ "auto": CUDA where there is one, else the CPU. Raises ValueError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # torch raises AssertionError where CUDA is compiled out
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} cannot be used here ({reason}); try auto or cpu") from error
    if place.type == "meta":
        raise ValueError("device 'meta' computes nothing; try auto or cpu")
    return place


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
    """While open, fp32 on CUDA is fp32: cuDNN's convolutions would round their inputs to TF32 by default."""
    if device.type != "cuda" or dtype != torch.float32:
        yield
        return
    # The older switches raise where a program has used the newer ones.
    name = "fp32_precision" if hasattr(torch.backends.cuda.matmul, "fp32_precision") else "allow_tf32"
    exact: object = "ieee" if name == "fp32_precision" else False
    cudnn: Any = torch.backends.cudnn
    switches: list[Any] = [torch.backends.cuda.matmul, cudnn.conv if name == "fp32_precision" else cudnn]
    before = [getattr(switch, name) for switch in switches]
    for switch in switches:
        setattr(switch, name, exact)
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            setattr(switch, name, value)


def fast_in_fp16(device: torch.device) -> bool:
    """Whether a card computes fp16 faster than fp32: from Volta on; those before have hardly any of it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)


def computes_bf16(device: torch.device) -> bool:
    """Whether `device` has bf16 arithmetic of its own (emulation does not count)."""
    if device.type == "cuda":
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
