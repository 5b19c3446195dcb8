"""The ring on a simulated accelerator, in virtual time: `python benchmarks/simulated.py [--save]`.

Full-size blocks of the published INT8 file, whose header is made here; its 7 GB are not. Link 12 GB/s, disk
3 GB/s, nothing pinned or cached, 4 steps, compute 0.9, 1.1 and 3 times what the disk takes for the same blocks.

    layers      34 equal INT8 blocks, whole layers, in a ring of 3
    published   what the pipeline visits: embedders, the sublayers of BF16 refiners of twice the size and of 30 layers,
                decoder, within a budget of 1.25 GiB for weights; the planner decides about the ring and what stays
    tight       the same within 360 MiB, and with whole layers as blocks, of which a refiner then fills the ring

Reported per case: virtual seconds / those of an ideal pipeline (target 1.03, but for the tight ones), in which disk,
link and compute work whenever they have something to do, with no limit to how far ahead. Then, in the steady state,
buffers allocated and waits of each host thread for the device, per block (target 0 on the thread that computes).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lanes import plot_lanes
from results import RESULTS, Figure, at_most, finish, parser

from l2p_lowvram.export import LayoutStyle, model_entries
from l2p_lowvram.families import PUBLISHED
from l2p_lowvram.layout import ModelLayout, read_layout
from l2p_lowvram.model_weights import cut_into_blocks
from l2p_lowvram.safetensors_writer import encode_header
from l2p_lowvram.synthetic import synthetic_state
from offload import (
    Block,
    BlockCost,
    Budget,
    Checkpoint,
    Rates,
    ResidencyPlan,
    Ring,
    TensorSource,
    Tier,
    plan_residency,
)
from offload.simulator import SimulatedAccelerator, SimulatedReader
from offload.timeline import Span

LINK, DISK = 12e9, 3e9
STEPS = 4
STAGING = 128 << 20
FACTORS = (0.9, 1.1, 3.0)
TIGHT = 360 << 20
_MARKER_BYTES = 1 << 10


@dataclass(frozen=True)
class Schedule:
    """Blocks in the order of their visits, those visited once, and seconds of compute per visit."""

    name: str
    blocks: Sequence[Block]
    once: frozenset[str]
    seconds: Mapping[str, float]
    vram: int

    def visits(self, steps: int) -> list[Block]:
        rounds = [block for block in self.blocks if block.name not in self.once]
        return [block for block in self.blocks if block.name in self.once] + rounds * steps


@dataclass(frozen=True)
class Outcome:
    """Virtual seconds; allocations and host waits of the steps after the first."""

    plan: ResidencyPlan
    seconds: float
    ideal: float
    allocations: int
    syncs: Mapping[str, int]
    visits: int
    hazards: int
    spans: Sequence[Span]


def published_layout(folder: Path) -> ModelLayout:
    """Of the published file, from a sparse one with the same header and markers."""
    entries, metadata = model_entries(synthetic_state(PUBLISHED["1k"]), LayoutStyle(), PUBLISHED["1k"].patch_size)
    path = folder / "model.safetensors"
    with path.open("wb") as file:
        file.write(encode_header(entries, metadata))
        for entry in entries:
            if entry.nbytes <= _MARKER_BYTES and entry.dtype == "U8":
                file.write(b"".join(bytes(piece) for piece in entry.data()))
            else:
                file.seek(entry.nbytes, 1)
        file.truncate()
    with Checkpoint.open(path) as checkpoint:
        return read_layout(checkpoint)


def layers_alone(layout: ModelLayout, factor: float) -> Schedule:
    """34 INT8 blocks of one size, as if the refiners were quantised too."""
    layers = [sources for name, sources in layout.blocks.items() if name.startswith("layers.")]
    stack = [Block(f"block.{index}", (layers[6:24] * 2)[index]) for index in range(34)]
    seconds = {block.name: factor * block.layout.read_bytes / DISK for block in stack}
    return Schedule("layers", stack, frozenset(), seconds, 3 * stack[0].nbytes)


def as_published(layout: ModelLayout, factor: float, vram: int = 5 << 28, *, halved: bool = True) -> Schedule:
    """All blocks; one computes as long as it has weights, however they are stored. halved: as the pipeline has them;
    else a layer is one."""
    blocks, once = cut_into_blocks(layout)
    if not halved:
        blocks, once = whole_layers(blocks), frozenset(map(layer_of, once))
    rounds = [block for block in blocks if block.name not in once]
    step = factor * sum(block.layout.read_bytes for block in rounds) / DISK
    each = step / sum(weights(block) for block in rounds)
    seconds = {b.name: each * weights(b) / (8 if b.name.startswith("context_refiner") else 1) for b in blocks}
    return Schedule("published", blocks, once, seconds, vram)


def whole_layers(blocks: Sequence[Block]) -> list[Block]:
    """The same weights in the same order, a block for each layer."""
    together: dict[str, list[TensorSource]] = {}
    for block in blocks:
        together.setdefault(layer_of(block.name), []).extend(block.sources)
    return [Block(name, tuple(sources)) for name, sources in together.items()]


def layer_of(name: str) -> str:
    return ".".join(name.split(".")[:2])


def weights(block: Block) -> int:
    """Of a sublayer; what else there is computes for nothing."""
    return sum(math.prod(source.shape) for source in block.sources) if "." in block.name else 0


def plan(schedule: Schedule) -> ResidencyPlan:
    costs = [
        BlockCost(b.name, b.nbytes, schedule.seconds[b.name], b.name not in schedule.once) for b in schedule.blocks
    ]
    return plan_residency(costs, Rates(DISK, link=LINK), Budget(schedule.vram, host=STAGING, staging=STAGING))


def run(schedule: Schedule) -> Outcome:
    device = SimulatedAccelerator(link_rate=LINK, disk_rate=DISK)
    found = plan(schedule)
    steps = [schedule.visits(1)] + [schedule.visits(1)[len(schedule.once) :]] * (STEPS - 1)
    allocations, syncs = 0, {}
    with Ring(schedule.blocks, found, device, SimulatedReader(device), once=schedule.once) as ring:
        for number, step in enumerate(steps):
            if number == 1:
                allocations, syncs = device.allocations, dict(device.host_syncs)
            for block in step:
                with ring.visit(block.name) as weights:
                    device.compute(block.name, schedule.seconds[block.name], reads=tuple(weights.values()))
        allocations = device.allocations - allocations
        syncs = {host: device.host_syncs.get(host, 0) - syncs.get(host, 0) for host in ("caller", "courier")}
    return Outcome(
        found,
        max(span.end for span in device.spans if span.lane == "compute"),
        ideal_seconds(schedule, found),
        allocations,
        syncs,
        sum(len(step) for step in steps[1:]),
        len(device.hazards),
        device.spans,
    )


def ideal_seconds(schedule: Schedule, found: ResidencyPlan) -> float:
    """When the last visit ends if disk, link and compute each work whenever they have something to do, as if
    any number of blocks could be read ahead; blocks that stay are read once."""
    read = copied = computed = 0.0
    here: set[str] = set()
    for block in schedule.visits(STEPS):
        if block.name not in here:
            read += block.layout.read_bytes / DISK
            copied = max(copied + block.layout.read_bytes / LINK, read)
        if found.tiers[block.name] is Tier.DEVICE:
            here.add(block.name)
        computed = max(computed, copied) + schedule.seconds[block.name]
    return computed


def figures(outcomes: Mapping[str, Outcome]) -> list[Figure]:
    rows = [at_most(f"{name}: achieved / ideal", o.seconds / o.ideal, 1.03) for name, o in outcomes.items()]
    rows += [
        at_most("allocations per block, most of any case", max(o.allocations / o.visits for o in outcomes.values()), 0),
        at_most(
            "host waits for the device per block, computing thread",
            max(o.syncs["caller"] / o.visits for o in outcomes.values()),
            0,
        ),
        Figure(
            "host waits for the device per block, courier thread",
            max(o.syncs["courier"] / o.visits for o in outcomes.values()),
        ),
        at_most("ordering hazards", sum(o.hazards for o in outcomes.values()), 0),
    ]
    return rows


def described(outcome: Outcome) -> dict[str, object]:
    """The plan and the seconds of a case, for the record."""
    found = outcome.plan
    resident = [name for name, tier in found.tiers.items() if tier is Tier.DEVICE]
    ring = {"slots": found.slots, "slot_bytes": found.slot_bytes, "resident": resident}
    return {"seconds": outcome.seconds, "ideal_seconds": outcome.ideal, **ring, "host_waits": outcome.syncs}


def main() -> None:
    options = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        layout = published_layout(Path(folder))
    schedules = [layers_alone(layout, factor) for factor in FACTORS]
    schedules += [as_published(layout, factor) for factor in FACTORS]
    names = [f"{schedule.name}, compute {FACTORS[i % 3]:g}x disk" for i, schedule in enumerate(schedules)]
    outcomes = {name: run(schedule) for name, schedule in zip(names, schedules, strict=True)}
    tight = {
        f"tight, {what}, compute {factor:g}x disk": run(as_published(layout, factor, TIGHT, halved=halved))
        for what, halved in (("halves of layers", True), ("whole layers", False))
        for factor in FACTORS
    }
    lines = figures(outcomes) + [
        Figure(f"{name}: achieved / ideal", outcome.seconds / outcome.ideal) for name, outcome in tight.items()
    ]
    details = {name: described(outcome) for name, outcome in {**outcomes, **tight}.items()}
    finish("simulated", lines, options, {"cases": details})
    if options.save:
        charts = [(name, [s for s in o.spans if s.start < 6]) for name, o in outcomes.items()]
        plot_lanes(charts, RESULTS / "simulated.png", lanes=("disk", "copy", "compute"), unit="virtual seconds")


if __name__ == "__main__":
    main()
