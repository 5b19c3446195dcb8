"""The `plan` command: what a run will hold, move and take, from headers and a device profile alone.

The same code chooses slices and residency as for the run itself, so the bytes are those of the run. Seconds
come from the profile's rates: a wait is predicted by playing the ring through.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from offload import BudgetError, Rates, ResidencyPlan, Tier, format_bytes
from offload.residency import predict_stall

from .choices import AUTO
from .compute import LayerSize, may_take_int8
from .config import MAX_SIDE, ModelConfig
from .devices import DTYPES, stream_dtype
from .estimates import CACHED_RATE, PROMPT_TOKENS, default_vram
from .model_weights import LOCAL_DECODER, visit_seconds
from .profiles import DeviceProfile
from .repository import ModelFiles
from .streamed_encoder import StreamedTextEncoder
from .streaming import MemoryOptions, PhaseDemand, Streamer
from .tilings import PictureWork, Tiling, decoder_overhead

# Bytes of host memory per pixel while a picture is saved: 8-bit pixels, their copy in the encoder.
_SAVED_PIXEL_BYTES = 6
_SAVED_PIXELS_PER_SECOND = 10e6


@dataclass(frozen=True)
class PlanRequest:
    """What a run is to do. Sizes in pixels; dtype as "bf16", "fp16" or "fp32". int8: whether INT8 weights may be
    multiplied in integers. on_cpu: whether the CPU computes."""

    width: int
    height: int
    steps: int
    cfg_scale: float
    pictures: int
    dtype: str
    int8: bool = False
    on_cpu: bool = False

    def work(self, width: int | None = None, height: int | None = None) -> PictureWork:
        kind = DTYPES[self.dtype]
        size = (self.width if width is None else width, self.height if height is None else height)
        guided = self.cfg_scale != 1
        return PictureWork(*size, self.pictures, guided, PROMPT_TOKENS, kind, int8=self.int8, on_cpu=self.on_cpu)


@dataclass(frozen=True)
class PhasePlan:
    """One phase: peak bytes on the device and in host memory, bytes read and moved over the link, seconds.
    Of the denoising phases, per step."""

    name: str
    device_bytes: int
    host_bytes: int
    read_bytes: int
    link_bytes: int
    seconds: float


@dataclass(frozen=True)
class RunPlan:
    """fits: within the budgets; if not, `reason`, and the smallest budget and largest picture that do.

    device_bytes of the CPU are 0: there everything is host memory. tiers: how many blocks of a step live
    where. slices: how the transformer and the local decoder are cut; level 0 is the first choice.
    """

    fits: bool
    reason: str | None
    family: str
    width: int
    height: int
    profile: str
    peak_device_bytes: int
    peak_host_bytes: int
    seconds_per_step: float
    seconds: float
    phases: tuple[PhasePlan, ...]
    tiers: dict[str, int]
    slots: int
    slot_bytes: int
    slices: str
    slice_level: int
    decoder_overhead: float
    notes: tuple[str, ...]
    smallest_budget: int | None = None
    largest_size: tuple[int, int] | None = None

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


class Planner:
    """Plans runs of one model on one device within one budget. Reads headers (and scales) only."""

    def __init__(self, files: ModelFiles, profile: DeviceProfile, options: MemoryOptions) -> None:
        """Raises CheckpointError, ValueError for --vram on a CPU."""
        self._profile = profile
        vram = (
            default_vram(profile.memory, profile.context)
            if options.vram is None and not profile.is_cpu
            else options.vram
        )
        # Never "auto": that would read the file to find out.
        io = "read" if options.io == "auto" else options.io
        options = MemoryOptions(vram, options.ram, options.pin, io, options.slots)
        place = torch.device("cpu" if profile.is_cpu else "cuda")
        self._streamer = Streamer(place, options, context_bytes=profile.context)
        self._opened = files.open_transformer(self._streamer)
        self._encoder = files.text_encoder(self._streamer, stream_dtype(DTYPES[profile.dtype]))

    @property
    def config(self) -> ModelConfig:
        return self._opened.transformer.config

    def may_take_int8(self, compute: str) -> bool:
        """Whether a run could multiply in integers, which takes other memory."""
        size = LayerSize(self.config.dim, self.config.ffn_dim)
        dtype = DTYPES[self._profile.dtype]
        return bool(self._opened.int8_layers) and may_take_int8(compute, self._streamer.device, dtype, size)

    def close(self) -> None:
        self._opened.weights.close()

    def plan(self, request: PlanRequest) -> RunPlan:
        """Raises ValueError for a size that the model does not draw."""
        self.config.check_size(request.width, request.height)
        work = request.work()
        try:
            encoding = self._encode(request)
            tiling, demand = self._opened.weights.choose(work)
        except BudgetError:
            return self._refused(request, max(self._refusals(request, work), key=lambda error: error.needed))
        plan = self._streamer.plan(demand, None)
        step, decoder = self._denoise(work, tiling, demand, plan)
        phases = [*encoding, step, decoder, self._save(request)]
        per_step = step.seconds + decoder.seconds
        return RunPlan(
            fits=True,
            reason=None,
            family=str(self._opened.identity["family"]),
            width=request.width,
            height=request.height,
            profile=self._profile.name,
            peak_device_bytes=max(phase.device_bytes for phase in phases),
            peak_host_bytes=max(phase.host_bytes for phase in phases),
            seconds_per_step=per_step,
            seconds=sum(phase.seconds for phase in phases) + (request.steps - 1) * per_step,
            phases=tuple(phases),
            tiers={tier.value: plan.count(tier) for tier in Tier if plan.count(tier)},
            slots=plan.slots,
            slot_bytes=plan.slot_bytes,
            slices=tiling.told(),
            slice_level=tiling.level,
            decoder_overhead=decoder_overhead(self.config, work, tiling),
            notes=(*plan.notes, *_level_note(tiling)),
        )

    def _denoise(
        self, work: PictureWork, tiling: Tiling, demand: PhaseDemand, plan: ResidencyPlan
    ) -> tuple[PhasePlan, PhasePlan]:
        """A step without, and of, the local decoder; both at the peak of the step, which they share."""
        seconds = visit_seconds(self.config, work, list(demand.blocks), self._profile.flops)
        seconds[LOCAL_DECODER] *= decoder_overhead(self.config, work, tiling)
        timed = PhaseDemand(demand.phase, demand.blocks, seconds, demand.activations, demand.once)
        stall = predict_stall(
            timed.costs(),
            self._rates(),
            plan.tiers,
            slots=plan.slots,
            slot_bytes=plan.slot_bytes,
            staging_bytes=plan.staging_bytes,
        )
        rounds = [block for block in demand.blocks if block.name not in demand.once]
        read = sum(b.layout.read_bytes for b in rounds if plan.tiers[b.name] in (Tier.DISK, Tier.CACHED))
        moved = sum(b.nbytes for b in rounds if plan.tiers[b.name] is not Tier.DEVICE)
        device, host = self._peaks(plan, work.host_bytes)
        compute = sum(seconds[block.name] for block in rounds if block.name != LOCAL_DECODER)
        link = 0 if self._profile.is_cpu else moved
        step = PhasePlan("denoise step", device, host, read, link, compute + stall)
        return step, PhasePlan("local decoder (of a step)", device, host, 0, 0, seconds[LOCAL_DECODER])

    def _encode(self, request: PlanRequest) -> list[PhasePlan]:
        """Raises BudgetError."""
        encoder = self._encoder
        if encoder is None:
            return []
        demand = encoder.demand([PROMPT_TOKENS] * (2 if request.cfg_scale != 1 else 1))
        plan = self._streamer.plan(demand, None)
        read = sum(block.layout.read_bytes for block in demand.blocks)
        tokens = PROMPT_TOKENS * (2 if request.cfg_scale != 1 else 1)
        compute = 2 * tokens * _parameters(encoder) / self._profile.flops
        device, host = self._peaks(plan, 0)
        link = 0 if self._profile.is_cpu else read
        slowest = max(compute, read / self._profile.disk, link / (self._profile.link or 1e30))
        return [PhasePlan("text encoder", device, host, read, link, slowest)]

    def _save(self, request: PlanRequest) -> PhasePlan:
        pixels = request.width * request.height
        host = self._streamer.process_bytes + _SAVED_PIXEL_BYTES * pixels
        return PhasePlan("save", 0, host, 0, 0, request.pictures * pixels / _SAVED_PIXELS_PER_SECOND)

    def _peaks(self, plan: ResidencyPlan, pictures: int) -> tuple[int, int]:
        """Device and host bytes of a phase."""
        if self._profile.is_cpu:
            return 0, plan.device_bytes
        return plan.device_bytes, self._streamer.process_bytes + plan.host_bytes + pictures

    def _rates(self) -> Rates:
        return Rates(disk=self._profile.disk, cached=CACHED_RATE, link=self._profile.link)

    def _refused(self, request: PlanRequest, error: BudgetError) -> RunPlan:
        on_host = self._profile.is_cpu or error.of == "host"
        return RunPlan(
            fits=False,
            reason=str(error),
            family=str(self._opened.identity["family"]),
            width=request.width,
            height=request.height,
            profile=self._profile.name,
            peak_device_bytes=0 if on_host else error.needed,
            peak_host_bytes=error.needed if on_host else 0,
            seconds_per_step=0.0,
            seconds=0.0,
            phases=(),
            tiers={},
            slots=0,
            slot_bytes=0,
            slices="",
            slice_level=0,
            decoder_overhead=0.0,
            notes=(),
            smallest_budget=error.needed,
            largest_size=self._largest(request),
        )

    def _largest(self, request: PlanRequest) -> tuple[int, int] | None:
        """The largest picture of about the same shape that fits; None where none does."""
        step = self.config.size_multiple
        low, high = 0, min(max(request.width, request.height), MAX_SIDE) // step
        while low < high:
            middle = (low + high + 1) // 2
            if self._fits(request, *self._scaled(request, middle)):
                low = middle
            else:
                high = middle - 1
        return self._scaled(request, low) if low else None

    def _scaled(self, request: PlanRequest, cells: int) -> tuple[int, int]:
        """Width and height whose longer side has `cells` steps of the model's grid."""
        step, longer = self.config.size_multiple, max(request.width, request.height)
        sides = (max(round(cells * side / longer), 1) * step for side in (request.width, request.height))
        return next(sides), next(sides)

    def _fits(self, request: PlanRequest, width: int, height: int) -> bool:
        return not self._refusals(request, request.work(width, height))

    def _refusals(self, request: PlanRequest, work: PictureWork) -> list[BudgetError]:
        """Of the phases that do not fit."""
        found = []
        for attempt in (lambda: self._encode(request), lambda: self._opened.weights.choose(work)):
            try:
                attempt()
            except BudgetError as error:
                found.append(error)
        return found


def _parameters(encoder: StreamedTextEncoder) -> int:
    return sum(
        source.shape[0] * source.shape[1]
        for sources in encoder.layout.blocks.values()
        for source in sources
        if len(source.shape) == 2
    )


def _level_note(tiling: Tiling) -> Sequence[str]:
    if tiling.level == 0:
        return ()
    return ("smaller slices than the first choice, for want of memory: the last bits of a picture differ by slices",)


def plan_text(plan: RunPlan) -> str:
    """For people: a line on the whole, a table of phases, and what it rests on."""
    size = f"{plan.family} at {plan.width}x{plan.height} on {plan.profile}"
    if not plan.fits:
        largest = "no picture fits" if plan.largest_size is None else "{}x{} fits".format(*plan.largest_size)
        assert plan.smallest_budget is not None
        return (
            f"{size}: does not fit. {plan.reason}\n"
            f"smallest budget: {format_bytes(plan.smallest_budget)} ({plan.smallest_budget} bytes); "
            f"within this one, {largest}"
        )
    lines = [f"{size}: fits, {_seconds(plan.seconds_per_step)} a step, {_seconds(plan.seconds)} in all (estimates)"]
    rows: list[tuple[str, ...]] = [("phase", "device", "host", "read", "over the link", "time")]
    rows += [
        (
            phase.name,
            *_sizes(phase.device_bytes, phase.host_bytes, phase.read_bytes, phase.link_bytes),
            _seconds(phase.seconds),
        )
        for phase in plan.phases
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    tiers = ", ".join(f"{count} {tier}" for tier, count in plan.tiers.items())
    lines.append(f"blocks: {tiers}; ring of {plan.slots} slots of {format_bytes(plan.slot_bytes)}")
    lines.append(f"slices: {plan.slices}; decoder arithmetic x{plan.decoder_overhead:.2f}")
    return "\n".join([*lines, *plan.notes])


def _sizes(*values: int) -> list[str]:
    return [format_bytes(value) if value else "-" for value in values]


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def make_plan(
    files: ModelFiles,
    profile: DeviceProfile,
    options: MemoryOptions,
    request: dict[str, int | float | None],
    compute: str = AUTO,
) -> RunPlan:
    """Plan a run. request: width, height, steps, cfg_scale and pictures; None takes the model's default.

    compute: as for `L2PPipeline`; "auto" counts with INT8 wherever a run may take it.

    Raises CheckpointError, ValueError.
    """
    planner = Planner(files, profile, options)
    try:
        defaults = planner.config.defaults
        chosen = {name: getattr(defaults, name, 1) if value is None else value for name, value in request.items()}
        int8 = planner.may_take_int8(compute)
        return planner.plan(PlanRequest(**chosen, dtype=profile.dtype, int8=int8, on_cpu=profile.is_cpu))  # type: ignore[arg-type]
    finally:
        planner.close()
