"""Reading the file into the ring, beside plain ways of reading it: `python benchmarks/read_rate.py FILE [--save]`.

Every round reads the same blocks of the file cold (put out of the page cache before each way), `--gb` of
them, another part of the file in every round; the ways take turns at being first. Medians of `--rounds`.

    ring         the ring as the pipeline sets it up, visits that compute nothing
    single       one thread, 1 MiB positional reads into one buffer
    parallel     4 threads, 1 MiB positional reads into one buffer
    direct       4 threads, 1 MiB reads past the page cache, where the file system has them

Reported: bytes per second of each, and ring / best of the others (target 0.95). The ring reads the way that
its probe chose in the same round; the probe itself is not timed.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from limited import drop_cache
from results import Figure, at_least, finish, parser

from l2p_lowvram.layout import read_layout
from l2p_lowvram.model_weights import cut_into_blocks
from offload import Block, BlockCost, Budget, Checkpoint, CpuDevice, Rates, Reader, Ring, plan_residency, probe_io
from offload.devices import aligned_buffer

SLOTS = 3


def through_the_ring(checkpoint: Checkpoint, blocks: Sequence[Block], io: str) -> float:
    """Seconds to visit every block once; the slots have been written to before."""
    costs = [BlockCost(block.name, block.nbytes, 0.0, 0) for block in blocks]
    plan = plan_residency(costs, Rates(2e9), Budget(SLOTS * max(block.nbytes for block in blocks)), slots=SLOTS)
    once = [block.name for block in blocks]
    with Reader(checkpoint, io=io) as reader, Ring(blocks, plan, CpuDevice(), reader, once=once) as ring:
        for slot in ring._slots:
            slot.buffer.fill_(0)
        started = time.perf_counter()
        for block in blocks:
            with ring.visit(block.name):
                pass
        return time.perf_counter() - started


def plainly(checkpoint: Checkpoint, blocks: Sequence[Block], io: str, threads: int) -> float:
    """Seconds to read the same extents with nothing between them."""
    buffer = aligned_buffer(max(block.nbytes for block in blocks)).fill_(0)
    with Reader(checkpoint, io=io, threads=threads) as reader:
        started = time.perf_counter()
        for job in [reader.submit(block.name, block.layout.extents, buffer) for block in blocks]:
            job.wait()
        return time.perf_counter() - started


WAYS = {"single": ("read", 1), "parallel": ("read", 4), "direct": ("direct", 4)}


def seconds_of(way: str, checkpoint: Checkpoint, blocks: Sequence[Block], io: str) -> float:
    drop_cache(checkpoint.files)
    return through_the_ring(checkpoint, blocks, io) if way == "ring" else plainly(checkpoint, blocks, *WAYS[way])


def part(blocks: Sequence[Block], turn: int, nbytes: float) -> list[Block]:
    """At least `nbytes` of blocks, from another place every turn."""
    found: list[Block] = []
    start = turn * 5 % len(blocks)
    for block in [*blocks[start:], *blocks[:start]]:
        if sum(other.nbytes for other in found) >= nbytes:
            break
        found.append(block)
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("file", type=Path)
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--gb", type=float, default=1.5)
    options = arguments.parse_args()
    rates: dict[str, list[float]] = {"ring": [], **{way: [] for way in WAYS}}
    chosen: Counter[str] = Counter()
    with Checkpoint.open(options.file) as checkpoint:
        layers = [block for block in cut_into_blocks(read_layout(checkpoint))[0] if block.name.startswith("layers.")]
        for turn in range(options.rounds):
            blocks = part(layers, turn, options.gb * 1e9)
            nbytes = sum(block.layout.read_bytes for block in blocks)
            drop_cache(checkpoint.files)
            io = probe_io(checkpoint, rounds=3, round_bytes=8 << 20).io
            chosen[io] += 1
            order = list(rates)
            for way in order[turn % len(order) :] + order[: turn % len(order)]:
                rates[way].append(nbytes / seconds_of(way, checkpoint, blocks, io))
    medians = {way: statistics.median(found) for way, found in rates.items()}
    best = max(medians[way] for way in WAYS)
    figures = [Figure(f"{way}, median of {options.rounds}", rate / 1e9, "GB/s") for way, rate in medians.items()]
    figures += [
        Figure("ways the probe chose", ", ".join(f"{io} {count}x" for io, count in chosen.items())),
        at_least("ring / best of the others", medians["ring"] / best, 0.95),
    ]
    finish("read_rate", figures, options, {"bytes_per_second": rates})


if __name__ == "__main__":
    main()
