"""Forwards of the full-size INT8 file on the CPU, cold: `python benchmarks/streaming.py FOLDER [--save]`.

512 image and 64 caption tokens (512x256 pixels, or --width wider), one branch, --steps forwards through the pipeline
in the dtype that it takes here (or --dtype), each way in a process of its own that begins with the file out of the
page cache:

    streamed   --ram 2GiB, in a memory control group limited to 3 GiB where one can be made
    compute    all weights in RAM before the clock starts
    read       the streamed run's blocks read once, into two buffers in turns, nothing computed

The ways take turns, --rounds times. A shared machine is faster and slower by the minute, so a ratio is that of
neighbouring runs, and the median of them counts. One far under 1 means that a baseline was disturbed, and says nothing.

Reported: streamed / max(compute, read) of the first forward, which is judged and begins with the caption, the plan and
memory that nobody has touched, and of the later ones, whose blocks come from the disk again; peak anonymous memory
(pinned memory is part of it), and with what is mapped, libraries included; bytes read per step with guidance (two
branches) and nothing resident / bytes of the blocks that a step visits; seconds from the start of the process to the
first transformer block computing, the import of torch taken off, of the fastest run: reading what is cold is what
disturbs it.
FOLDER/model.safetensors is made where it is missing (7.19 GB). --save also plots the streamed run.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

LIMIT = 3 << 30
RAM = 2 << 30
HEIGHT, CAPTION = 256, 64

Rounds = dict[str, list[dict[str, Any]]]  # runs by way


@dataclass(frozen=True)
class Job:
    """What a worker does, as it travels to its process."""

    way: str
    model: str
    threads: int
    width: int
    steps: int
    dtype: str | None


def worker(job: Job) -> dict[str, Any]:
    """In a process of its own. Heavy imports here, so that they can be timed."""
    began = time.perf_counter()
    import torch

    imported = time.perf_counter() - began
    torch.set_num_threads(job.threads)
    ways: dict[str, Callable[[Job], dict[str, Any]]] = {
        "streamed": streamed,
        "compute": compute,
        "read": read,
        "guided": guided,
    }
    result = ways[job.way](job)
    result["torch_import_seconds"] = imported
    return result


def streamed(job: Job) -> dict[str, Any]:
    from l2p_lowvram.pipeline import L2PPipeline
    from offload import Tier
    from offload.memory import MemoryWatch

    with (
        MemoryWatch() as watch,
        L2PPipeline.from_pretrained(job.model, device="cpu", dtype=job.dtype, ram=RAM) as pipeline,
    ):
        cpu = time.process_time()
        started = time.perf_counter()
        ends = forwards(pipeline, job)
        (stream,) = pipeline.streamer.streams
        spans = list(stream.source.timeline)
        found = {
            "seconds": ends[0] - started,
            "later_seconds": [end - start for start, end in pairwise(ends)],
            "cpu_seconds": time.process_time() - cpu,
            "read_bytes": stream.read_bytes,
            "io": stream.io.reason,
            "arithmetic": f"{str(pipeline.dtype).removeprefix('torch.')}, {pipeline.compute.told()}",
            "resident": 0 if stream.plan is None else stream.plan.count(Tier.DEVICE),
            "slots": 0 if stream.plan is None else stream.plan.slots,
            "waited_seconds": sum(span.seconds for span in spans if span.lane == "wait" and span.end <= ends[0]),
            "spans": [(span.lane, span.what, span.start, span.end) for span in spans if span.start < ends[0]],
        }
    return {**found, "peak_anonymous_bytes": watch.peak_anonymous, "peak_file_bytes": watch.peak_file_backed}


def compute(job: Job) -> dict[str, Any]:
    from l2p_lowvram.pipeline import L2PPipeline

    with L2PPipeline.from_pretrained(job.model, device="cpu", dtype=job.dtype, io="read") as pipeline:
        opened = pipeline.weights.open
        loaded = cpu = 0.0

        def open_and_load(work: Any) -> Any:
            nonlocal loaded, cpu
            tiling = opened(work)
            if loaded:
                return tiling
            (stream,) = pipeline.streamer.streams
            moving = [
                n for n, tier in stream.plan.tiers.items() if tier.value != "device" and n not in stream.demand.once
            ]
            if moving:
                raise SystemExit(f"too little free memory to hold the weights: {len(moving)} blocks would stream")
            for block in stream.demand.blocks:
                with pipeline.weights.visit(block.name):
                    pass
            loaded, cpu = time.perf_counter(), time.process_time()
            return tiling

        pipeline.weights.open = open_and_load  # type: ignore[method-assign]
        ends = forwards(pipeline, job)
        # The blocks of the prompt are never kept: what they are waited for is not computing.
        waits = [span for span in pipeline.streamer.streams[0].source.timeline.lane("wait") if span.start >= loaded]
        waited = sum(span.seconds for span in waits)
        return {
            "seconds": ends[0] - loaded - waited,
            "later_seconds": [end - start for start, end in pairwise(ends)],
            "cpu_seconds": time.process_time() - cpu,
            "waited_seconds": waited,
        }


def forwards(pipeline: Any, job: Job) -> list[float]:
    """When each step of one call with one branch ended. The first refines the caption; each visits every block once."""
    import torch

    features = torch.randn(CAPTION, pipeline.config.caption_dim, generator=torch.Generator().manual_seed(0))
    ends: list[float] = []

    def note(*_: Any) -> None:
        ends.append(time.perf_counter())

    pipeline(
        prompt_embeds=features,
        width=job.width,
        height=HEIGHT,
        num_inference_steps=job.steps,
        cfg_scale=1.0,
        seed=1,
        output_type="pt",
        callback_on_step_end=note,
    )
    return [*ends[:-1], time.perf_counter()]


def read(job: Job) -> dict[str, Any]:
    from l2p_lowvram.layout import read_layout
    from l2p_lowvram.model_weights import cut_into_blocks
    from offload import Checkpoint

    with Checkpoint.open(job.model) as checkpoint:
        return read_blocks(checkpoint, cut_into_blocks(read_layout(checkpoint))[0])


def read_blocks(checkpoint: Any, blocks: Any) -> dict[str, Any]:
    """Seconds to read every block once, the way the probe chooses, into two buffers in turns."""
    from offload import Reader, probe_io
    from offload.devices import aligned_buffer

    io = probe_io(checkpoint, rounds=3, round_bytes=8 << 20).io
    buffers = [aligned_buffer(max(block.nbytes for block in blocks)).fill_(0) for _ in range(2)]
    with Reader(checkpoint, io=io) as reader:
        started = time.perf_counter()
        jobs: list[Any] = []
        for turn, block in enumerate(blocks):
            if turn >= 2:
                jobs[turn - 2].wait()
            jobs.append(reader.submit(block.name, block.layout.extents, buffers[turn % 2], drop_cache=True))
        for job in jobs[-2:]:
            job.wait()
        return {"seconds": time.perf_counter() - started, "read_bytes": reader.read_bytes, "io": io}


def guided(job: Job) -> dict[str, Any]:
    """Three guided steps of a small picture with the least memory; counts the second and the third."""
    import torch

    from l2p_lowvram.pipeline import L2PPipeline
    from offload import BudgetError

    size = 64
    features = torch.randn(32, 2560, generator=torch.Generator().manual_seed(0))
    counted: list[int] = []

    def call(ram: int) -> tuple[int, int, int]:
        with L2PPipeline.from_pretrained(job.model, device="cpu", dtype=job.dtype, ram=ram, slots=2) as pipeline:

            def note(*_: Any) -> None:
                counted.append(settled(pipeline.streamer.streams[0]))

            pipeline(
                prompt_embeds=features,
                negative_prompt_embeds=features.flip(0),
                width=size,
                height=size,
                num_inference_steps=3,
                cfg_scale=2.0,
                seed=1,
                output_type="pt",
                callback_on_step_end=note,
            )
            (stream,) = pipeline.streamer.streams
            rounds = [block for block in stream.demand.blocks if block.name not in stream.demand.once]
            resident = sum(tier.value == "device" for tier in stream.plan.tiers.values())
            return sum(block.layout.read_bytes for block in rounds), resident, stream.plan.slot_bytes

    try:
        call(1)
        raise AssertionError("a budget of one byte was accepted")
    except BudgetError as error:
        least = error.needed
    pass_bytes, resident, _ = call(least)
    return {"step_bytes": (counted[2] - counted[0]) / 2, "pass_bytes": pass_bytes, "resident": resident, "ram": least}


def settled(stream: Any) -> int:
    """Bytes read once the ring is full and reading has stopped: the same blocks are ahead after every step."""
    before = -1
    while before != stream.read_bytes:
        before = stream.read_bytes
        time.sleep(1.0)
    return before


def first_block(run: dict[str, Any], started: float) -> float:
    """Seconds from the start of the process to the first transformer block's compute, without importing torch."""
    begins = [start for lane, what, start, _ in run["spans"] if lane == "compute" and "." in what]
    return min(begins) - started - run["torch_import_seconds"]


def first_wait(run: dict[str, Any]) -> float:
    """Seconds that the first transformer block was waited for: it is read once all else is ready."""
    return next(end - start for lane, what, start, end in run["spans"] if lane == "wait" and "." in what)


def judged(rounds: Rounds, limit: float = 1.10) -> list[Any]:
    """Seconds of each way and the ratio, medians. The same work cannot be much faster streamed: then the baseline was
    disturbed, and nothing is met."""
    from results import Figure, at_most

    spent = {way: [run["seconds"] for run in rounds[way]] for way in ("streamed", "compute", "read")}
    ratios = [mine / max(others) for mine, *others in zip(*spent.values(), strict=True)]
    ratio, what = statistics.median(ratios), f"streamed / max(compute, read), median of {len(ratios)}"
    figures = [
        *(Figure(f"{way}{'' if way == 'streamed' else ' only'}", statistics.median(spent[way]), "s") for way in spent),
        at_most(what, ratio, limit)
        if ratio >= 0.9
        else Figure(f"{what}: baseline disturbed", ratio, "", f"<= {limit}"),
        Figure("of the rounds", _told(ratios)),
    ]
    return figures + later(rounds)


def later(rounds: Rounds) -> list[Any]:
    """The same of the forwards after the first, where there were any."""
    from results import Figure

    mine, theirs = (
        [run["later_seconds"] for run in rounds[way] if run.get("later_seconds")] for way in ("streamed", "compute")
    )
    if not mine or not theirs:
        return []
    read_only = [run["seconds"] for run in rounds["read"]]
    ratios = [
        statistics.median(ours) / max(statistics.median(others), reading)
        for ours, others, reading in zip(mine, theirs, read_only, strict=True)
    ]
    return [
        Figure("later forwards: streamed", statistics.median(chain(*mine)), "s"),
        Figure("later forwards: compute only", statistics.median(chain(*theirs)), "s"),
        Figure("later forwards: streamed / max(compute, read)", statistics.median(ratios)),
        Figure("of the rounds", _told(ratios)),
    ]


def _told(ratios: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in ratios)


def peaks(run: dict[str, Any]) -> list[Any]:
    from results import Figure, at_most

    anonymous, mapped = run["peak_anonymous_bytes"] / 2**30, run["peak_file_bytes"] / 2**30
    return [
        at_most(f"peak anonymous + pinned, {run['group']}", anonymous, 2.0, "GiB"),
        Figure(
            "peak anonymous + peak mapped, libraries included",
            anonymous + mapped,
            "GiB",
            "<= 2",
            anonymous + mapped <= 2,
        ),
    ]


def run_in_turns(model: Path, options: Any) -> Rounds:
    """Every way `options.rounds` times, each in a process of its own, from a cold file."""
    from limited import drop_cache, measured

    rounds: Rounds = {way: [] for way in options.ways}
    for turn, way in enumerate(options.ways * options.rounds):
        if way == "guided" and turn >= len(options.ways):
            continue  # counts bytes: once is enough
        drop_cache([model])
        limit = LIMIT if way in ("streamed", "guided") else None
        job = Job(way, str(model), options.threads, options.width, options.steps, options.dtype)
        run = measured([__file__, "--worker", json.dumps(asdict(job))], limit=limit)
        rounds[way].append(run)
        told = f"{run.get('seconds', 0.0):.2f} s, then " + ", ".join(f"{s:.2f}" for s in run.get("later_seconds", []))
        print(f"{way}: {told}", file=sys.stderr)
    return rounds


def fastest(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return min(runs, key=lambda run: run["seconds"])


def streamed_figures(runs: list[dict[str, Any]]) -> list[Any]:
    """What the fastest of them did, the most memory that one took, the soonest first block."""
    from results import Figure, at_most

    run, soonest = fastest(runs), min(runs, key=lambda run: run["first_block_seconds"])
    return [
        Figure("streamed: processor time of all forwards", run["cpu_seconds"], "s"),
        Figure("streamed: how it was read", run["io"]),
        Figure("streamed: arithmetic", run["arithmetic"]),
        *peaks(max(runs, key=lambda run: run["peak_anonymous_bytes"])),
        Figure("waited for weights", run["waited_seconds"], "s"),
        at_most("start of process to first block computing", soonest["first_block_seconds"], 1.0, "s"),
        Figure("of it, waiting for that block's bytes", soonest["first_wait_seconds"], "s"),
    ]


def guided_figure(run: dict[str, Any]) -> Any:
    from results import Figure

    ratio = run["step_bytes"] / run["pass_bytes"]
    return Figure("bytes read per guided step / bytes of a pass", ratio, "", "1.00", ratio == 1.0)


def main() -> None:
    from results import RESULTS, finish, parser

    arguments = parser(__doc__)
    arguments.add_argument("folder", type=Path, help="where the checkpoint is made and kept (7.2 GB)")
    arguments.add_argument("--threads", type=int, default=os.cpu_count())
    arguments.add_argument("--ways", nargs="*", default=["streamed", "compute", "read", "guided"])
    arguments.add_argument("--rounds", type=int, default=3, help="of each way in turns")
    arguments.add_argument("--steps", type=int, default=3, help="forwards of a run; the first is judged")
    arguments.add_argument("--dtype", help="fp32 or bf16; the pipeline's own choice if not given")
    arguments.add_argument("--width", type=int, default=512, help="pixels; 512 are 512 image tokens")
    options = arguments.parse_args()
    model = options.folder / "model.safetensors"
    if not model.exists():
        from l2p_lowvram.synthetic import main as make_synthetic

        model.parent.mkdir(parents=True, exist_ok=True)
        make_synthetic([str(model)])

    rounds = run_in_turns(model, options)
    figures = judged(rounds) if {"streamed", "compute", "read"} <= rounds.keys() else []
    spans: list[Any] = []
    if "streamed" in rounds:
        figures += streamed_figures(rounds["streamed"])
        spans = fastest(rounds["streamed"])["spans"]
    if "guided" in rounds:
        figures.append(guided_figure(rounds["guided"][0]))
    for run in rounds.get("streamed", []):
        del run["spans"]
    finish("streaming", figures, options, {"rounds": rounds})
    if options.save and spans:
        from lanes import plot_lanes

        from offload.timeline import Span

        plot_lanes([("one forward, streamed within 2 GiB", [Span(*span) for span in spans])], RESULTS / "streaming.png")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        found = worker(Job(**json.loads(sys.argv[2])))
        if "spans" in found:
            found["first_wait_seconds"] = first_wait(found)
            found["first_block_seconds"] = first_block(found, float(os.environ["BENCHMARK_STARTED"]))
        print(json.dumps(found))
    else:
        main()
