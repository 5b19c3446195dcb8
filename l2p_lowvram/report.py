"""Where time and memory went: figures of every phase, for people and for programs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from offload import format_bytes
from offload.visit_times import COMPUTE_LANE, WAIT_LANE

from .streaming import MemoryOptions, WeightStream


@dataclass(frozen=True)
class PhaseFigures:
    """What streaming the weights of one phase took. Seconds are wall time, rates bytes per second.

    visits: of blocks. read_bytes: from files. link_bytes: copied to a device over its link.
    disk_seconds: in which at least one read was under way; disk_rate: read_bytes over them.
    probed_rate: what a short probe saw before; None where none was made.
    compute_seconds: holding weights; on a graphics card, of the card. wait_seconds: of the compute (the card's, where
    it takes the time), for weights; wait_p50, wait_p95: per visit.
    tiers: how many blocks live where. device_bytes, host_bytes: held by weights as planned. mapped_bytes: of
    device_bytes, the most of files that was mapped at once for computing on it. planned_bytes: of the device's memory,
    all included; 0 where nothing is planned.
    """

    phase: str
    visits: int
    read_bytes: int
    link_bytes: int
    disk_seconds: float
    disk_rate: float | None
    probed_rate: float | None
    compute_seconds: float
    wait_seconds: float
    wait_p50: float
    wait_p95: float
    io: str
    io_reason: str
    tiers: dict[str, int]
    slots: int
    slot_bytes: int
    mapped_bytes: int
    device_bytes: int
    host_bytes: int
    planned_bytes: int
    notes: tuple[str, ...]


def phase_figures(stream: WeightStream) -> PhaseFigures:
    """The figures of an open or closed phase so far."""
    timeline, plan = stream.source.timeline, stream.plan
    disk = timeline.busy_seconds("disk")
    # Where the device times its visits, what the host sees is only the queueing.
    is_timed = bool(timeline.lane(WAIT_LANE))
    waits = [span.seconds for span in timeline.lane(WAIT_LANE if is_timed else "wait")]
    tiers = {} if plan is None else {tier.value: plan.count(tier) for tier in sorted(set(plan.tiers.values()))}
    return PhaseFigures(
        phase=stream.demand.phase,
        visits=stream.source.visits,
        read_bytes=stream.read_bytes,
        link_bytes=stream.source.copied_bytes,
        disk_seconds=disk,
        disk_rate=stream.read_bytes / disk if disk else None,
        probed_rate=stream.io.rate,
        compute_seconds=timeline.busy_seconds(COMPUTE_LANE if is_timed else "compute"),
        wait_seconds=sum(waits),
        wait_p50=_percentile(waits, 50),
        wait_p95=_percentile(waits, 95),
        io=stream.io.io,
        io_reason=stream.io.reason,
        tiers=tiers or {"mapped": len(stream.demand.blocks)},
        slots=0 if plan is None else plan.slots,
        slot_bytes=0 if plan is None else plan.slot_bytes,
        mapped_bytes=stream.source.mapped_bytes,
        device_bytes=stream.planned_device_bytes,
        host_bytes=0 if plan is None else plan.host_bytes,
        planned_bytes=0 if plan is None else plan.device_bytes,
        notes=() if plan is None else plan.notes,
    )


def _percentile(values: Sequence[float], percent: int) -> float:
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def phase_record(figures: PhaseFigures) -> dict[str, Any]:
    """As JSON: seconds to the microsecond."""
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in asdict(figures).items()}


def budget_record(options: MemoryOptions) -> dict[str, int | str | None]:
    """The budgets that were asked for; null where they were left to the program."""
    return {"vram": options.vram, "ram": options.ram, "pin": options.pin, "io": options.io, "slots": options.slots}


_HEADINGS = ("phase", "blocks", "read", "GB/s (probe)", "compute s", "waited s", "p50/p95 ms", "weights held", "where")


def phase_table(phases: Sequence[PhaseFigures]) -> str:
    """A line per phase, in columns."""
    rows = [_HEADINGS, *(_row(figures) for figures in phases)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def _row(figures: PhaseFigures) -> tuple[str, ...]:
    rate = "-" if figures.disk_rate is None else f"{figures.disk_rate / 1e9:.2f}"
    probe = "-" if figures.probed_rate is None else f"{figures.probed_rate / 1e9:.2f}"
    return (
        figures.phase,
        str(figures.visits),
        format_bytes(figures.read_bytes),
        f"{rate} ({probe})",
        f"{figures.compute_seconds:.2f}",
        f"{figures.wait_seconds:.2f}",
        f"{1e3 * figures.wait_p50:.1f}/{1e3 * figures.wait_p95:.1f}",
        format_bytes(figures.device_bytes + figures.host_bytes),
        ", ".join(f"{count} {tier}" for tier, count in figures.tiers.items()),
    )
