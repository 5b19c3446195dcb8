"""The full-size INT8 file on a graphics card: `python benchmarks/card.py FOLDER [--save]`.

Runs of the pipeline with guidance (two branches, 64 caption tokens), --steps steps each, at every size of --sizes: with
all weights on the card before the clock starts, and streamed within every budget of --budgets ("VRAM", or "VRAM:RAM",
where the host memory, too, is less than the file). A process of its own per size; the budgets of one take turns,
--rounds times, so that what the machine does meanwhile meets all.

    step       seconds of a step after the first, the median
    link       the bytes that a step moves to the card, copied from pinned memory and nothing else
    disk       the bytes that a step reads again, read from the file into two buffers and nothing else
    ratio      streamed / max(weights on the card, link, disk); at most 1.10 is aimed at
    held       most that the driver says is used on the card while the run lasts, other programs' apart that were there
               before; at most --vram is aimed at
    planned    what the plan promised, context included
    bits       whether the picture is that of weights that stay, to the bit. "other slices": the budget held only
               smaller ones, which change the last bits

--family takes the native high-resolution models' tensors and sizes instead. The file is made in FOLDER where it is
missing (7.19 GB). Needs a CUDA card with 10 GiB free for the weights that stay; --no-resident leaves those out.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from limited import drop_cache
from on_card import CardWatch, copying_seconds
from results import Figure, at_most, finish, parser
from streaming import read_blocks

from l2p_lowvram.layout import read_layout
from l2p_lowvram.model_weights import ResidentWeights, cut_into_blocks
from l2p_lowvram.pipeline import L2PPipeline
from l2p_lowvram.synthetic import main as make_synthetic
from l2p_lowvram.weights import load_transformer
from offload import Checkpoint, Tier, driver_bytes, format_bytes, parse_bytes

CAPTION = 64
SIZES = {"1k": [512, 1024, 2048], "4k": [4096], "8k": [8192], "10k": [10240]}
_CARD = torch.device("cuda", 0)


@dataclass(frozen=True)
class Job:
    """What a worker does. budgets: (vram, ram), ram None for what is free."""

    model: str
    size: int
    steps: int
    rounds: int
    compute: str
    resident: bool
    budgets: tuple[tuple[int, int | None], ...]


def call(pipe: L2PPipeline, job: Job) -> tuple[list[float], str]:
    """Seconds of every step, the first from the call on, and the picture's bits."""
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randn(CAPTION, pipe.config.caption_dim, generator=generator) for _ in range(2))
    ends = [time.perf_counter()]

    def note(*_: Any) -> None:
        torch.cuda.synchronize()
        ends.append(time.perf_counter())

    out = pipe(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        width=job.size,
        height=job.size,
        num_inference_steps=job.steps,
        cfg_scale=2.0,
        seed=1,
        output_type="pt",
        callback_on_step_end=note,
    )
    assert isinstance(out.images, torch.Tensor)
    picture = hashlib.sha256(out.images.numpy().tobytes()).hexdigest()
    return [end - start for start, end in pairwise(ends)], picture


def resident(job: Job, compute: Any) -> dict[str, Any]:
    with Checkpoint.open(job.model) as checkpoint:
        model = load_transformer(checkpoint, read_layout(checkpoint), device=_CARD)
    with L2PPipeline(model, device=_CARD, dtype=torch.bfloat16, compute=compute) as pipe:
        assert isinstance(pipe.weights, ResidentWeights)
        seconds, picture = call(pipe, job)
        slices = pipe.describe_plan(pipe.work(job.size, job.size, 1, 2.0, CAPTION)).split(";")[0]
    return {"seconds": seconds, "picture": picture, "slices": slices}


def streamed(job: Job, vram: int, ram: int | None, base: int) -> dict[str, Any]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with (
        CardWatch(_CARD) as watch,
        L2PPipeline.from_pretrained(
            job.model, device=_CARD, dtype="bf16", vram=vram, ram=ram, compute=job.compute
        ) as pipe,
    ):
        seconds, picture = call(pipe, job)
        stream = pipe.streamer.streams[-1]
        demand, plan = stream.demand, stream.plan
        again = [block for block in demand.blocks if block.name not in demand.once]
        moved = [block for block in again if plan.tiers[block.name] is not Tier.DEVICE]
        read = [block for block in moved if plan.tiers[block.name] is Tier.DISK]
        phase = pipe.phases[-1]
        return {
            "vram": vram,
            "ram": ram,
            "seconds": seconds,
            "picture": picture,
            "used": watch.peak_bytes - base,
            "planned": phase.planned_bytes,
            "context": pipe.streamer.context_bytes,
            "reserved": torch.cuda.max_memory_reserved(),
            "link_bytes": sum(block.nbytes for block in moved),
            "disk_bytes": sum(block.layout.read_bytes for block in read),
            "tiers": {tier.value: plan.count(tier) for tier in Tier},
            "slices": pipe.describe_plan(pipe.work(job.size, job.size, 1, 2.0, CAPTION)).split(";")[0],
            "waited": sum(span.seconds for span in stream.source.timeline if span.lane == "wait"),
            "fallbacks": pipe.fallbacks,
            "compute": pipe.compute.told(),
        }


def worker(job: Job) -> dict[str, Any]:
    free, total = torch.cuda.mem_get_info(0)
    # Before the first kernel: what other programs use.
    base = total - free - driver_bytes(_CARD)[0]
    with Checkpoint.open(job.model) as checkpoint:
        blocks = cut_into_blocks(read_layout(checkpoint))[0]
        sizes = [block.nbytes for block in blocks]
        link_rate = sum(sizes) / copying_seconds(_CARD, sizes)
        # Cold: what a step reads again was dropped from the page cache after the step before.
        drop_cache([Path(job.model)])
        found = read_blocks(checkpoint, blocks)
    rates = {"link_rate": link_rate, "disk_rate": found["read_bytes"] / found["seconds"]}
    runs = [streamed(job, vram, ram, base) for _ in range(job.rounds) for vram, ram in job.budgets]
    with L2PPipeline.from_pretrained(job.model, device=_CARD, dtype="bf16", compute=job.compute) as pipe:
        compute = pipe.compute
    torch.cuda.empty_cache()
    whole = [resident(job, compute) for _ in range(job.rounds if job.resident else 0)]
    return {**rates, "resident": whole, "streamed": runs}


def figures_of(size: int, found: dict[str, Any]) -> list[Figure]:
    whole = statistics.median([s for run in found["resident"] for s in run["seconds"][1:]] or [0.0])
    figures = [
        Figure(f"{size}: weights on the card, step", whole, "s"),
        Figure(f"{size}: arithmetic", found["streamed"][0]["compute"]),
        Figure(
            f"{size}: link alone, disk alone", f"{found['link_rate'] / 1e9:.1f}, {found['disk_rate'] / 1e9:.1f} GB/s"
        ),
    ]
    budgets = dict.fromkeys((run["vram"], run["ram"]) for run in found["streamed"])
    for vram, ram in budgets:
        runs = [run for run in found["streamed"] if (run["vram"], run["ram"]) == (vram, ram)]
        told = f"{size}: --vram {format_bytes(vram)}" + (f" --ram {format_bytes(ram)}" if ram else "")
        step = statistics.median(s for run in runs for s in run["seconds"][1:])
        link = runs[0]["link_bytes"] / found["link_rate"]
        disk = runs[0]["disk_bytes"] / found["disk_rate"]
        held = max(run["used"] for run in runs)
        figures += [
            Figure(f"{told}, step (link {link:.3f} s, disk {disk:.3f} s)", step, "s"),
            *([at_most(f"{told}, ratio", step / max(whole, link, disk), 1.10)] if whole else []),
            at_most(f"{told}, held of {runs[0]['planned'] / 2**30:.3f} planned", held / 2**30, vram / 2**30, "GiB"),
            *([bits_of(told, found["resident"][0], runs)] if whole else []),
        ]
    return figures


def bits_of(told: str, whole: dict[str, Any], runs: list[dict[str, Any]]) -> Figure:
    same = {run["picture"] == whole["picture"] for run in runs}
    if same == {False} and runs[0]["slices"] != whole["slices"]:
        return Figure(f"{told}, bits", f"other slices ({runs[0]['slices']})")
    return Figure(f"{told}, bits", "equal" if same == {True} else "DIFFERENT", "", "equal", same == {True})


def budget(text: str) -> tuple[int, int | None]:
    vram, _, ram = text.partition(":")
    return parse_bytes(vram), parse_bytes(ram) if ram else None


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("folder", type=Path, help="where the checkpoint is made and kept (7.2 GB)")
    arguments.add_argument("--family", default="1k", choices=SIZES, help="whose tensors the file has")
    arguments.add_argument("--sizes", nargs="+", type=int, help="pixels of a side; 1k: 512 1024 2048, else its own")
    arguments.add_argument("--no-resident", action="store_true", help="streamed runs alone")
    arguments.add_argument(
        "--budgets", nargs="+", default=["2GiB", "4GiB", "6GiB", "4GiB:3GiB"], help="VRAM or VRAM:RAM"
    )
    arguments.add_argument("--steps", type=int, default=5)
    arguments.add_argument("--rounds", type=int, default=1)
    arguments.add_argument("--compute", default="dequant", help="auto, int8 or dequant")
    options = arguments.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA card; benchmarks/streaming.py measures CPUs")
    family = options.family
    model = options.folder / ("model.safetensors" if family == "1k" else f"model-{family}.safetensors")
    if not model.exists():
        model.parent.mkdir(parents=True, exist_ok=True)
        make_synthetic([str(model), *([] if family == "1k" else ["--family", family])])
    found, figures = {}, []
    for size in options.sizes or SIZES[family]:
        budgets = tuple(budget(text) for text in options.budgets)
        job = Job(str(model), size, options.steps, options.rounds, options.compute, not options.no_resident, budgets)
        command = [sys.executable, __file__, "--worker", json.dumps(asdict(job))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[size] = json.loads(done.stdout.splitlines()[-1])
        figures += figures_of(size, found[size])
        print(f"{size} done", file=sys.stderr)
    sizes = "_".join(str(size) for size in options.sizes or SIZES[family])
    finish(f"card_{sizes}" if family == "1k" else f"card_{family}", figures, options, {"runs": found})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        given = json.loads(sys.argv[2])
        budgets = tuple((vram, ram) for vram, ram in given.pop("budgets"))
        print(json.dumps(worker(Job(**given, budgets=budgets))))
    else:
        main()
