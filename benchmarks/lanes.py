"""A picture of who worked when: one lane each for disk, copy, compute and wait. Needs the `bench` extra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from offload.timeline import Span

LANES = ("disk", "copy", "compute", "wait")
_COLOURS = {"disk": "#4878a8", "copy": "#6aa56e", "compute": "#d08a3c", "wait": "#b04a4a"}


def plot_lanes(
    charts: Sequence[tuple[str, Sequence[Span]]], path: Path, *, lanes: Sequence[str] = LANES, unit: str = "s"
) -> None:
    """Save a chart per (title, spans) under each other. Spans in seconds, drawn from the first one's start on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(charts), 1, figsize=(11, 1.7 * len(charts) + 0.5), squeeze=False)
    for axis, (title, spans) in zip(axes[:, 0], charts, strict=True):
        begin = min(span.start for span in spans)
        for row, lane in enumerate(lanes):
            bars = [(span.start - begin, span.seconds) for span in spans if span.lane == lane]
            axis.broken_barh(bars, (row - 0.38, 0.76), facecolors=_COLOURS[lane], edgecolor="white", linewidth=0.3)
        axis.set_yticks(range(len(lanes)), lanes)
        axis.set_ylim(len(lanes) - 0.5, -0.5)
        axis.set_xlim(left=0)
        axis.set_title(title, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
    axes[-1, 0].set_xlabel(f"{unit}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
