"""What a machine can do, in four numbers: for plans of machines that are not at hand.

Arithmetic of cards is their published dense FP16 tensor rate with FP32 accumulation, of which a transformer
reaches about half (`REACHED`); links are PCIe rates as copies from pinned memory reach them; the disk is an
NVMe drive. None of it was measured here: `profile` measures the machine at hand instead.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType

import torch

from offload import Checkpoint, CheckpointError, available_device_bytes, format_bytes, probe_io
from offload.header import parse_json_object, shown

from .choices import DTYPE_CHOICES
from .context import context_bytes
from .devices import DTYPES, choose_device, choose_dtype
from .estimates import CONTEXT_BYTES, CPU_FLOPS, DISK_RATE
from .linear import product

REACHED = 0.5
_GIB = 1 << 30
_PCIE3_X16, _PCIE4_X8, _PCIE4_X16 = 12e9, 12e9, 25e9
_NVME = 3e9
_MAX_JSON_BYTES = 1 << 16
_MAX_NAME = 120


@dataclass(frozen=True)
class DeviceProfile:
    """memory: bytes of the device that are free beside its context. flops: multiplications and additions a second that
    are reached. link, disk: bytes a second to the device and from the file; link is None where there is none (CPU).
    dtype: what it computes in, "bf16", "fp16" or "fp32". source: where the figures come from. context: bytes that the
    driver holds beside tensors, the usual allowance where that is not known.

    Raises ValueError for figures that cannot be.
    """

    name: str
    memory: int
    flops: float
    link: float | None
    disk: float
    dtype: str
    source: str
    context: int = CONTEXT_BYTES

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isprintable() or len(self.name) > _MAX_NAME:
            raise ValueError(f"name of a device profile must be one line of text, got {self.name!r:.40}")
        if not isinstance(self.source, str):
            raise ValueError(f"source of a device profile must be text, got {self.source!r:.40}")
        for what in ("memory", "flops", "link", "disk", "context"):
            value = getattr(self, what)
            if what == "link" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e20:
                raise ValueError(f"{what} of a device profile must be a positive number, got {value!r:.40}")
        if self.dtype not in DTYPE_CHOICES:
            raise ValueError(f"dtype of a device profile must be bf16, fp16 or fp32, got {self.dtype!r:.40}")

    @property
    def is_cpu(self) -> bool:
        return self.link is None


def _card(name: str, gib: int, tflops: float, link: float, dtype: str, source: str) -> DeviceProfile:
    return DeviceProfile(name, gib * _GIB - CONTEXT_BYTES, REACHED * tflops * 1e12, link, _NVME, dtype, source)


_TURING = "Turing whitepaper: 2 x FP32 rate on tensor cores with FP32 accumulation; no bf16"
_AMPERE = "GA102 whitepaper: GeForce tensor cores give 2 x the FP32 rate with FP32 accumulation"
_ADA = "Ada whitepaper: likewise, 165.2 TFLOPS for the RTX 4090"
PROFILES = MappingProxyType(
    {
        profile.name: profile
        for profile in (
            _card("gtx1660-6g", 6, 10.0, _PCIE3_X16, "fp16", "no tensor cores: FP16 at 2 x the FP32 rate of 5.0"),
            _card("rtx2060-6g", 6, 12.9, _PCIE3_X16, "fp16", f"{_TURING}; FP32 6.5"),
            _card("rtx3060-12g", 12, 25.4, _PCIE4_X16, "bf16", f"{_AMPERE}; FP32 12.7"),
            _card("rtx3060-laptop-6g", 6, 24.0, _PCIE4_X16, "bf16", f"{_AMPERE}; FP32 12.0 at 95 W"),
            _card("rtx4060-laptop-8g", 8, 24.7, _PCIE4_X8, "bf16", f"{_ADA}; FP32 12.35 at 90 W"),
            _card("rtx4090", 24, 165.2, _PCIE4_X16, "bf16", _ADA),
        )
    }
)


# Of machines that are not named: a slow card, and one core of a CPU as it was met here.
ANY_CARD = _card("a slow card", 12, 40.0, _PCIE4_X8, "bf16", "a guess")
ANY_CPU = DeviceProfile("this CPU", 1 << 40, CPU_FLOPS, None, DISK_RATE, "fp32", "a guess; measure with profile")


def choose_profile(name: str | None, *, vram: int | None, dtype: str) -> DeviceProfile:
    """The named profile; else a card's where a VRAM budget is given, or there is one, else the CPU's.

    dtype: "auto" leaves the profile's own. Raises ValueError, OSError.
    """
    if name is not None:
        profile = find_profile(name)
    else:
        profile = _of_this_machine(has_budget=vram is not None)
    return profile if dtype == "auto" else replace(profile, dtype=dtype)


def _of_this_machine(*, has_budget: bool) -> DeviceProfile:
    """Memory and dtype as they are here, rates as a guess. has_budget: for a card, whether there is one or not."""
    if torch.cuda.is_available():
        card = choose_device("cuda")
        dtype = choose_dtype(None, card)
        context = context_bytes(card, dtype)  # before what is free is asked for: it is taken from that
        memory = available_device_bytes(card) or ANY_CARD.memory
        return replace(ANY_CARD, memory=memory, dtype=_name_of(dtype), context=context)
    if has_budget:
        return ANY_CARD
    return replace(ANY_CPU, dtype=_name_of(choose_dtype(None, torch.device("cpu"))))


def _name_of(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def find_profile(name: str) -> DeviceProfile:
    """A profile by name, or read from the JSON file that `profile` wrote. Raises ValueError, OSError."""
    if name in PROFILES:
        return PROFILES[name]
    path = Path(name)
    if path.suffix != ".json":
        raise ValueError(
            f"unknown device profile {name!r}; known are {', '.join(PROFILES)}, or a .json file of profile"
        )
    with path.open("rb") as file:
        raw = file.read(_MAX_JSON_BYTES + 1)
    try:
        return _from_json(raw, path)
    except CheckpointError as error:
        raise ValueError(f"{path}: is no device profile ({error.reason})") from None
    except ValueError as error:
        raise ValueError(f"{path}: is no device profile ({error})") from None


def _from_json(raw: bytes, path: Path) -> DeviceProfile:
    """Raises ValueError."""
    if len(raw) > _MAX_JSON_BYTES:
        raise ValueError(f"it is larger than the {_MAX_JSON_BYTES} bytes that none needs")
    values = parse_json_object(raw, path, "it", floats=True)
    names = {field.name for field in fields(DeviceProfile)}
    for name in sorted((values.keys() | {"context"}) ^ names):  # context was not in files of earlier versions
        raise ValueError(f"it lacks {name}" if name in names else f"it has the unknown entry {shown(name)}")
    return DeviceProfile(**values)


def as_json(profile: DeviceProfile) -> str:
    return json.dumps(asdict(profile), indent=2)


def as_text(profile: DeviceProfile) -> str:
    link = "none" if profile.link is None else f"{profile.link / 1e9:.2f} GB/s"
    return (
        f"{profile.name}: {format_bytes(profile.memory)}, {profile.flops / 1e9:.3g} GFLOP/s in {profile.dtype}, "
        f"link {link}, disk {profile.disk / 1e9:.2f} GB/s"
    )


def measure_here(device: str, dtype: str, model: str | None) -> DeviceProfile:
    """The machine at hand. model: the file whose disk is measured; None leaves a cautious guess.

    Raises ValueError, CheckpointError, OSError.
    """
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    if model is None:
        disk, disk_source = DISK_RATE, "not measured"
    else:
        with Checkpoint.open(model) as checkpoint:
            probe = probe_io(checkpoint)
        if not probe.rates:
            raise ValueError(f"{model} cannot be read: {probe.reason}")
        disk, disk_source = probe.rates[probe.io], probe.reason
    context = context_bytes(place, kind)
    memory = available_device_bytes(place)
    if memory is None:
        raise ValueError(f"device {place} does not tell how much memory it has, so it has no profile")
    link = None if place.type == "cpu" else _link_rate(place)
    source = f"measured with torch {torch.__version__}; disk: {disk_source}"
    return DeviceProfile(str(place), memory, _flops(place, kind), link, disk, _name_of(kind), source, context)


@torch.inference_mode()
def _flops(device: torch.device, dtype: torch.dtype) -> float:
    """Of a product as a linear layer of the real model's width makes it: the best of a few, once warm."""
    tokens, width, hidden = (256 if device.type == "cpu" else 4096), 3840, 10240
    x = torch.randn(tokens, width, device=device).to(dtype)
    weight = torch.randn(hidden, width, device=device).to(dtype)
    best = min(run_seconds(lambda: product(x, weight), device) for _ in range(5))
    return 2 * tokens * width * hidden / best


def _link_rate(device: torch.device) -> float:
    source = torch.empty(64 << 20, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device=device)
    return source.nbytes / min(run_seconds(lambda: target.copy_(source, non_blocking=True), device) for _ in range(5))


def run_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of `work`, with all that it queued on `device`."""
    started = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.get_device_module(device.type).synchronize(device)
    return time.perf_counter() - started
