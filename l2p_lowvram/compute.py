"""What multiplies INT8 weights: dequantised weights, or integers by the best kernel that this device has.

Kernels are tried before they are believed: one whose sums are not the exact integers is out (some saturate,
silently, on CPUs without VNNI). On a card `auto` takes INT8 only where it was seen to be faster; on CPUs with VNNI or
AMX, where it is known to be, unless it was seen to take a quarter longer or more.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .choices import AUTO, COMPUTE_CHOICES, DEQUANT, INT8
from .int8_matmul import Int8Matmul, by_int_mm, in_fp32
from .linear import Linear
from .onednn import by_onednn, multiplies
from .profiles import run_seconds

# By which INT8 must win before `auto` takes it: it costs accuracy, and what a disturbed measurement could turn
# around would make other pictures from one run to the next. VNNI is known to win by far (3 to 6 times where it was
# measured; AMX, which is fast in bf16 too, 1.4 to 2), so on a CPU the measurement has but a veto.
MARGIN, CPU_MARGIN = 1.25, 0.8
# Narrower layers spend their time on calls, not on sums: `auto` dequantises them, unmeasured.
_LEAST_COLUMNS = 512
# Rows that kernels are measured on: a picture of 1024 x 1024 with patches of 16, since fewer would measure how fast a
# fast card is given work (on an H200, int8 was 1.8 times as fast for 1,024 and slower for 4,096); on a CPU fewer, and a
# part of the outputs, so that a run begins some tens of milliseconds later and not a second.
_CARD_TOKENS = 4096
_MEASURED_TOKENS = {"cpu": 512}
_MEASURED_OUTPUTS = {"cpu": 2048}
_CHECKED_ROWS = 64
# Environment variables that limit what oneDNN uses, in the order in which it reads them.
_ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_ROUNDS = 3


@dataclass(frozen=True)
class Compute:
    """name: "dequant" or "int8". matmul: of INT8, None for dequant. reason: how it came to that, for people."""

    name: str
    matmul: Int8Matmul | None
    reason: str

    def told(self) -> str:
        return f"{self.name} ({self.reason})"


DEQUANTISED = Compute(DEQUANT, None, "nothing else was asked for")


@dataclass(frozen=True)
class LayerSize:
    """Of the linear layer that stands for all of a model's."""

    columns: int
    outputs: int


def choose_compute(asked: str, device: torch.device, dtype: torch.dtype, size: LayerSize) -> Compute:
    """asked: one of COMPUTE_CHOICES. size: of the layer to measure. Measures once per process, for some tens of
    milliseconds; where `auto` dequantises in any case (a CPU without VNNI, narrow layers), never.

    Raises ValueError for an unknown choice.
    """
    if asked not in COMPUTE_CHOICES:
        raise ValueError(f"compute must be one of {', '.join(COMPUTE_CHOICES)}, got {asked!r}")
    unmeasured = _dequant_reason(asked, device, dtype, size)
    if unmeasured is not None:
        return Compute(DEQUANT, None, unmeasured)
    kernels = fast_kernels(device)
    if not kernels:
        return Compute(INT8, in_fp32, f"as asked for; no INT8 kernel for {_named(device)}")
    best = _fastest(tuple(kernels), device, dtype, size)
    if best.kernel is None:
        told = f"no kernel computes right here: {best.note}"
        return Compute(DEQUANT, None, told) if asked == AUTO else Compute(INT8, in_fp32, f"as asked for; {told}")
    told = f"{best.kernel} is {best.ratio:.2f} x as fast as dequant"
    margin = CPU_MARGIN if device.type == "cpu" else MARGIN
    if asked == AUTO and best.ratio < margin:
        return Compute(DEQUANT, None, f"measured: {told}, less than {margin:g} x")
    return Compute(INT8, kernels[best.kernel], f"{'measured' if asked == AUTO else 'as asked for'}: {told}")


def may_take_int8(asked: str, device: torch.device, dtype: torch.dtype, size: LayerSize) -> bool:
    """Whether `choose_compute` could take INT8, the measurement permitting. Measures nothing."""
    return _dequant_reason(asked, device, dtype, size) is None


def _dequant_reason(asked: str, device: torch.device, dtype: torch.dtype, size: LayerSize) -> str | None:
    """Why weights are dequantised whatever a measurement might say; None where INT8 may be taken."""
    if asked != AUTO:
        return "as asked for" if asked == DEQUANT else None
    if size.columns < _LEAST_COLUMNS:
        return f"layers of {size.columns} columns gain nothing in INT8"
    if device.type == "cpu" and dtype == torch.bfloat16 and has_amx() and not multiplies(torch.int8):
        # A measured ratio of the kernel left lies on either side of the margin from one run to the next.
        return "this CPU's matrix units are nearly as fast in bf16"
    return None if fast_kernels(device) else f"no INT8 kernel for {_named(device)}"


def without_int8(asked: str) -> tuple[Compute, tuple[str, ...]]:
    """The choice for a model that has no layer for INT8, and what to warn of. Raises ValueError as above."""
    if asked not in COMPUTE_CHOICES:
        raise ValueError(f"compute must be one of {', '.join(COMPUTE_CHOICES)}, got {asked!r}")
    reason = "no layer of this file can be multiplied in INT8"
    warning = f"compute {INT8} has no effect: {reason}"
    return Compute(DEQUANT, None, reason), (warning,) if asked == INT8 else ()


def fast_kernels(device: torch.device) -> Mapping[str, Int8Matmul]:
    """Kernels that may be faster than dequantised weights on a device, by name; none where there are none."""
    if device.type != "cuda" and not (device.type == "cpu" and has_vnni()):
        return {}
    if device.type == "cpu" and multiplies(torch.int8):
        # Alone: beside other programs a measurement could prefer the slower one.
        return {"oneDNN's matmul": by_onednn}
    return {"torch._int_mm": by_int_mm}


def has_vnni() -> bool:
    """Whether this CPU multiplies int8 in vectors."""
    return _cpu_has("_is_vnni_supported") or has_amx()


def has_amx() -> bool:
    """Whether this CPU has matrix units, and oneDNN may use them: it can be held to what older CPUs have."""
    allowed = next((os.environ[name] for name in _ISA_LIMITS if name in os.environ), "DEFAULT").upper()
    return _cpu_has("_is_amx_tile_supported") and ("AMX" in allowed or allowed in ("DEFAULT", "ALL"))


def _cpu_has(check: str) -> bool:
    # Names torch keeps private; without them dequantised weights are always right.
    return bool(getattr(torch.cpu, check, lambda: False)())


def _named(device: torch.device) -> str:
    return "a CPU without VNNI" if device.type == "cpu" else f"device {device.type}"


@dataclass(frozen=True)
class _Measured:
    """kernel: the fastest that computes right, None where none does. ratio: dequant's seconds over its. note: on
    those that do not."""

    kernel: str | None
    ratio: float
    note: str = ""


@lru_cache
def _fastest(names: tuple[str, ...], device: torch.device, dtype: torch.dtype, size: LayerSize) -> _Measured:
    kernels, failures = fast_kernels(device), []
    layer, x = _layer_and_input(size, device, dtype)
    ways: dict[str, Int8Matmul | None] = {DEQUANT: None}
    with torch.inference_mode():
        for name in names:
            if (failure := check_kernel(kernels[name], layer.weight)) is None:
                ways[name] = kernels[name]
            else:
                failures.append(f"{name} {failure}")
        if len(ways) == 1:
            return _Measured(None, 0.0, ", ".join(failures))
        # In turns, so that a disturbance meets all; the first of them warms up.
        rounds = [{way: layer_seconds(layer, x, matmul) for way, matmul in ways.items()} for _ in range(_ROUNDS + 1)]
    found = {way: min(seconds[way] for seconds in rounds) for way in ways}
    plain = found.pop(DEQUANT)
    best = min(found, key=lambda name: found[name])
    return _Measured(best, plain / max(found[best], 1e-9))


def _layer_and_input(size: LayerSize, device: torch.device, dtype: torch.dtype) -> tuple[Linear, Tensor]:
    # A generator of its own: whoever draws random numbers here gets those they would have got.
    generator = torch.Generator().manual_seed(0)
    outputs = min(size.outputs, _MEASURED_OUTPUTS.get(device.type, size.outputs))
    weight = torch.randint(-127, 128, (outputs, size.columns), dtype=torch.int8, generator=generator)
    with torch.device("meta"):
        layer = Linear(size.columns, outputs, bias=False)
    layer.quantize_(weight.to(device), torch.rand(outputs, 1, generator=generator).to(device))
    tokens = _MEASURED_TOKENS.get(device.type, _CARD_TOKENS)
    return layer, torch.randn(1, tokens, size.columns, generator=generator).to(device, dtype)


def check_kernel(kernel: Int8Matmul, weight: Tensor) -> str | None:
    """What is wrong with a kernel's sums for `weight` (N, K) int8; None where they are the exact ones."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(-127, 128, (_CHECKED_ROWS, weight.shape[1]), dtype=torch.int8, generator=generator)
    q = rows.to(weight.device)
    try:
        out = torch.empty(_CHECKED_ROWS, weight.shape[0], dtype=torch.int32, device=weight.device)
        same = torch.equal(kernel(q, weight, out).float(), in_fp32(q, weight).float())
    except (RuntimeError, NotImplementedError) as error:
        return f"fails ({str(error).splitlines()[0]:.120})"
    return None if same else "gives wrong sums"


def layer_seconds(layer: Linear, x: Tensor, matmul: Int8Matmul | None) -> float:
    """Of one run of `layer` on x with a kernel, or dequantised. On a CPU of its processors, where that is told finely:
    other programs make the clock say anything, but take nothing from those."""
    layer.int8_matmul = matmul
    if x.device.type != "cpu" or sys.platform == "win32":  # which tells it in sixty-fourths of a second
        return run_seconds(lambda: layer(x), x.device)
    started = time.process_time()
    layer(x)
    return time.process_time() - started
