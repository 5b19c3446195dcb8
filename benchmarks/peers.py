"""Our streaming beside others', the same modules and INT8 weights: `python benchmarks/peers.py FOLDER [--save]`.

Forwards of one branch, 32 caption tokens, on the CPU in fp32 unless --device and --dtype say otherwise. Every run is a
process of its own which begins with the file out of the page cache; contenders take turns, medians of --rounds (one
from 256 tokens on, which take long and vary little). `peer_contenders.py` says how each is set up, and that all of
them walk the same modules.

    models   full (the published file's tensors, 7.19 GB), mid (its width, 6 layers, 2.62 GB), narrow (width 1024, 60
             layers, 1.10 GB), made in FOLDER where they are missing
    time     of the first forward, prompt included, from opened files and hooked modules to the velocity. Not in it:
             imports, opening and hooking (given apart), and what our probe of the disk takes (part of opening).
             later: the mean of the --steps - 1 forwards right after, the file as the page cache then has it
    memory   of the whole process: most that was resident at once (VmHWM, imports included), and the peaks of its
             anonymous and its file-backed part (sampled), which need not have been reached together

`compute` (weights in memory before the clock starts) and `read` (the blocks read, nothing computed) say how much of
a forward is which: a point where reading takes longer than computing is disk-bound. Targets there: at least 1.5
times as fast as each peer, with at most half its memory; elsewhere never slower. A time within the runs' own spread
of the target is called noise, not met; it is not judged where other programs computed beside the runs. Velocities
must agree to the bit; where they do not, the largest difference is told. --limit puts every contender into a memory
group, --disk makes their disk slower ("500MB": what a SATA drive gives; needs root and control groups v1), so that a
machine whose processors are slow for its disk shows both parts of the curve; --read-ahead sets how far Linux reads
ahead meanwhile (root; 128 KiB unless a system says otherwise), on which loops that map a file depend. DiffSynth is
installed into FOLDER without its dependencies. FOLDER/runs.json grows with every point.

Later forwards on the CPU are a matter of memory: what fits into the group's page cache the others find there, which
their own memory does not show, while the least --ram has us read again. So where a group is given, we run a second
time, `ours_group`, with --ram of most of its size, and later forwards are judged by that run; first ones and memory by
the least. Both are told.

On a card (--device cuda) the later forwards count, for which every contender has had the chance to keep the weights in
host memory: accelerate_cpu and diffusers begin with them there, the others find the file in the page cache, and we
keep what --ram allows. `compute` is then a later forward with all weights on the card, `link` the copying of the
blocks alone, from pinned memory; where that takes longer than computing, the point is link-bound, and the target
at least 1.5 times as fast as each peer, elsewhere never slower. Memory of the card: most that torch's allocator
reserved, and most that was used on it as the driver tells (sampled), contexts included. A peer that fails is told
and left out.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from limited import drop_cache, measured, read_ahead
from results import RESULTS, Figure, at_least, at_most, finish, parser

from l2p_lowvram.synthetic import main as make_synthetic
from offload import parse_bytes

MODELS = {
    "full": [],
    "mid": ["--layers", "6"],
    "narrow": ["--dim", "1024", "--heads", "8", "--layers", "60"],
}
POINTS = ["full:32", "mid:32", "mid:256", "mid:1024", "narrow:32", "narrow:256", "narrow:1024"]
PEERS = ["hand", "accelerate", "diffsynth", "diffusers"]
ALL_PEERS = [*PEERS, "accelerate_cpu", "diffusers_disk"]
# Of the group's memory, what we are given as `ours_group`: its size counts what the kernel keeps for the process, too.
OF_THE_GROUP = 15 / 16
# No contenders: they show the machine.
MACHINE = ["compute", "read", "link"]
DIFFSYNTH = "diffsynth==2.1.12"
LONG = 256
# Processor time of other programs beside a forward, as a share of its own: above it a ratio is told, not judged.
DISTURBED = 0.1
Runs = dict[str, list[dict[str, Any]]]


def prepare(folder: Path, models: Sequence[str], peers: Sequence[str]) -> None:
    """Make the files that are missing, install what is."""
    folder.mkdir(parents=True, exist_ok=True)
    for model in models:
        path = folder / f"{model}.safetensors"
        if not path.exists():
            make_synthetic([str(path), *MODELS[model]])
    if "diffsynth" in peers and not (folder / "diffsynth").exists():
        command = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder / "diffsynth"), DIFFSYNTH]
        subprocess.run([sys.executable, *command], check=True)


def measure(point: str, contenders: Sequence[str], options: Any) -> Runs:
    """All runs of one model and number of tokens, by contender."""
    model, tokens = point.split(":")
    path = options.folder / f"{model}.safetensors"
    runs: Runs = {name: [] for name in contenders}
    first: dict[str, Any] | None = None  # of ours
    for turn in range(1 if int(tokens) >= LONG else options.rounds):
        order = [name for name in contenders if turn == 0 or name not in MACHINE]
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            drop_cache([path])
            ram = int(parse_bytes(options.limit) * OF_THE_GROUP) if name == "ours_group" else options.ram
            job = {
                "model": str(path),
                "tokens": int(tokens),
                "scratch": str(options.folder),
                "ram": None if ram in ("least", "free") else parse_bytes(ram),
                "least": ram == "least",
                "vram": options.vram,
                "io": options.io,
                "device": options.device,
                "dtype": options.dtype,
                "threads": options.threads,
                "steps": options.steps if name != "compute" or options.device != "cpu" else 1,
            }
            script = str(Path(__file__).with_name("peer_contenders.py"))
            # They need all weights at once.
            limit = None if name in MACHINE or options.limit is None else parse_bytes(options.limit)
            try:
                contender = name.removesuffix("_group")
                run = measured([script, contender, json.dumps(job)], limit=limit, disk=(options.disk, path))
            except RuntimeError as error:
                if options.device == "cpu" or name in MACHINE:
                    raise
                # Minutes on a card are few: the others go on.
                print(f"{point} {name}: {error}", file=sys.stderr)
                continue
            if name not in ("read", "link"):
                if first is None and contender == "ours":
                    first = run
                    # Our next run leaves its own in place of this one.
                    shutil.copyfile(options.folder / "velocity-ours.pt", options.folder / "velocity-first.pt")
                run["difference"] = difference(options.folder, contender, first, run)
            runs[name].append(run)
            print(f"{point} {name}: {run['seconds']:.2f} s{told_later(run)}", file=sys.stderr)
    return runs


def difference(folder: Path, name: str, first: dict[str, Any] | None, run: dict[str, Any]) -> float:
    """Of the velocity that `name` has just left in `folder` from that of our `first` run, the largest; 0 for equal
    bits."""
    if first is None or first["velocity_sha256"] == run["velocity_sha256"]:
        return 0.0
    mine, other = (torch.load(folder / f"velocity-{which}.pt") for which in ("first", name))
    return float((mine - other).abs().max())


def median(runs: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def later_seconds(run: dict[str, Any]) -> float:
    """Of a forward after the first, the mean; 0 where there was none."""
    return statistics.fmean(run["later_seconds"] or [0.0])


def told_later(run: dict[str, Any]) -> str:
    later = run.get("later_seconds")
    return f", later {', '.join(f'{seconds:.3f}' for seconds in later)} s" if later else ""


def times_of(runs: Sequence[dict[str, Any]], which: str) -> list[float]:
    """Seconds of the "first" or of "later" forwards, a figure a run."""
    return [run["seconds"] if which == "first" else later_seconds(run) for run in runs]


def spread(times: Sequence[float]) -> float:
    """How far they lie apart, as a share of their median; 5 % for a single run."""
    return (max(times) - min(times)) / statistics.median(times) if len(times) > 1 else 0.05


def figures_of(point: str, runs: Runs) -> list[Figure]:
    """The lines of one point: what the machine does, what each contender takes, and our share of each peer's."""
    told = "{}, {} tokens".format(*point.split(":"))
    computing, reading = median(runs["compute"], "seconds"), median(runs["read"], "seconds")
    disk_bound = reading > computing
    bound = "disk-bound" if disk_bound else "compute-bound"
    figures = [Figure(f"{told}: compute only / read only", f"{computing:.2f} s / {reading:.2f} s, {bound}")]
    present = [name for name in ("ours", "ours_group", *ALL_PEERS) if runs.get(name)]
    figures += [Figure(f"{told}: {name}", described(runs[name])) for name in present]
    target = 1.5 if disk_bound else 1.0
    judged = {"first": "ours"}
    if later_seconds(runs["ours"][0]):
        judged["later"] = "ours_group" if runs.get("ours_group") else "ours"
    for name in (peer for peer in present if peer in ALL_PEERS):
        for which, mine in judged.items():
            what = f"{told}: {name} / {mine}, time of the {which}"
            figures.append(faster(what, which, runs[mine], runs[name], target))
            if mine != "ours":
                plain = faster(what, which, runs["ours"], runs[name], target)
                figures.append(Figure(f"{told}: {name} / ours, time of the {which}", plain.value))
        ratio = median(runs["ours"], "peak_bytes") / median(runs[name], "peak_bytes")
        what = f"{told}: ours / {name}, peak memory"
        figures.append(at_most(what, ratio, 0.5) if disk_bound else Figure(what, ratio))
    differences = [run["difference"] for name in [*present, "compute"] for run in runs[name]]
    figures.append(at_most(f"{told}: largest difference of a velocity from ours", max(differences), 0.0))
    return figures


def card_figures(point: str, runs: Runs) -> list[Figure]:
    """The lines of one point on a card."""
    told = "{}, {} tokens".format(*point.split(":"))
    computing = statistics.median(times_of(runs["compute"], "later"))
    copying, reading = median(runs["link"], "seconds"), median(runs["read"], "seconds")
    bound = "link-bound" if copying > computing else "compute-bound"
    shown = f"{computing:.3f} s / {copying:.3f} s / {reading:.2f} s, {bound}"
    figures = [Figure(f"{told}: compute only / link only / read only", shown)]
    names = [name for name in ("ours", *ALL_PEERS) if name in runs]
    figures += [Figure(f"{told}: {name}", described(runs[name]) if runs[name] else "failed") for name in names]
    if not runs["ours"]:
        return figures
    present = [name for name in names if runs[name]]
    target = 1.5 if copying > computing else 1.0
    for name in present[1:]:
        what = f"{told}: {name} / ours, time of the later"
        figures.append(faster(what, "later", runs["ours"], runs[name], target))
    differences = [run["difference"] for name in [*present, "compute"] for run in runs[name]]
    figures.append(at_most(f"{told}: largest difference of a velocity from ours", max(differences), 0.0))
    return figures


def described(runs: Sequence[dict[str, Any]]) -> str:
    peak, anonymous, file = (f"{median(runs, f'peak_{kind}bytes') / 2**20:.0f}" for kind in ("", "anonymous_", "file_"))
    later = statistics.median(times_of(runs, "later"))
    if is_on_card(runs[0]):
        torchs, drivers = (f"{median(runs, f'card_{whose}_bytes') / 2**20:.0f}" for whose in ("reserved", "driver"))
        return (
            f"{later:.3f} s (first {median(runs, 'seconds'):.2f} s, opening {median(runs, 'open_seconds'):.2f} s), "
            f"peak on the card {torchs} MiB (driver {drivers}), in host memory {peak} MiB"
            + (f", budget {runs[0]['vram'] / 2**20:.0f} MiB" if runs[0].get("vram") else "")
        )
    again = f"later {later:.2f} s, " if later else ""
    return (
        f"{median(runs, 'seconds'):.2f} s ({again}opening {median(runs, 'open_seconds'):.2f} s), "
        f"peak {peak} MiB (anonymous {anonymous}, file {file})"
    )


def is_on_card(run: dict[str, Any]) -> bool:
    return "card_driver_bytes" in run


def faster(
    what: str, which: str, ours: Sequence[dict[str, Any]], peer: Sequence[dict[str, Any]], target: float
) -> Figure:
    """Peer's time / ours. Short of the target by less than the runs differ among themselves: noise."""
    mine, theirs = times_of(ours, which), times_of(peer, which)
    ratio = statistics.median(theirs) / statistics.median(mine)
    figure = at_least(what, ratio, target)
    shares = [run["others_seconds"] / run["cpu_seconds"] for run in (*ours, *peer)]
    # Beside a card processors have time for others.
    if statistics.median(shares) > DISTURBED and not is_on_card(ours[0]):
        return Figure(f"{what} (disturbed: other programs were computing)", ratio, "", figure.target)
    if not figure.met and ratio >= target * (1 - max(spread(mine), spread(theirs))):
        return Figure(f"{what} (within noise)", ratio, "", figure.target)
    return figure


def plot(found: dict[str, Runs], path: Path) -> None:
    """Seconds over tokens per model, and below it the memory at each model's fewest tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(point.split(":")[0] for point in found))
    colours = dict(zip(("ours", *PEERS, "compute", "read"), pyplot.get_cmap("tab10").colors, strict=False))
    figure, axes = pyplot.subplots(2, len(models), figsize=(3.9 * len(models), 6.4), squeeze=False)
    for column, model in enumerate(models):
        points = {int(point.split(":")[1]): runs for point, runs in found.items() if point.split(":")[0] == model}
        top, below = axes[:, column]
        for name in ("ours", *PEERS, "compute", "read"):
            line = [(tokens, median(runs[name], "seconds")) for tokens, runs in points.items() if runs.get(name)]
            if line:
                style = {"marker": "o", "linestyle": ":" if name in ("compute", "read") else "-"}
                top.plot(*zip(*line, strict=True), color=colours[name], label=name, markersize=4, **style)
        top.set_xscale("log", base=2)
        top.set_yscale("log")
        top.set_xticks(list(points), [str(tokens) for tokens in points])
        top.set_title(f"{model}: seconds of a cold forward", fontsize=9, loc="left")
        top.set_xlabel("image tokens", fontsize=8)
        top.legend(fontsize=7)
        tokens, runs = min(points.items())
        names = [name for name in ("ours", *PEERS) if runs.get(name)]
        for shift, (kind, shade) in enumerate((("", 1.0), ("anonymous_", 0.65), ("file_", 0.35))):
            heights = [median(runs[name], f"peak_{kind}bytes") / 2**20 for name in names]
            places = [index + (shift - 1) * 0.27 for index in range(len(names))]
            bars = below.bar(places, heights, 0.25, color=[colours[name] for name in names], alpha=shade)
            below.bar_label(bars, fmt="%.0f", fontsize=6)
        below.set_xticks(range(len(names)), names)
        below.set_title(f"{model}, {tokens} tokens: peak MiB resident, anonymous, file", fontsize=9, loc="left")
    for axis in axes.flat:
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("folder", type=Path, help="where models and DiffSynth are made and kept (11 GB)")
    arguments.add_argument("--points", nargs="+", default=POINTS, help="MODEL:TOKENS, tokens 32, 256, 1024 or 4096")
    arguments.add_argument("--peers", nargs="*", default=PEERS, choices=ALL_PEERS)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--steps", type=int, default=3, help="forwards in each run")
    arguments.add_argument(
        "--ram", help='our budget; "least": that works, the default on the CPU; "free": what is, the default on a card'
    )
    arguments.add_argument("--vram", type=parse_bytes, help="our budget on a card; 2GiB by default, more if need be")
    arguments.add_argument("--io", default="auto", help="how we read")
    arguments.add_argument("--limit", help="of a memory group around every contender, for example 3GiB")
    arguments.add_argument(
        "--disk", type=parse_bytes, help="bytes per second that the disk gives; what it can by default"
    )
    arguments.add_argument("--read-ahead", type=parse_bytes, help="of Linux on that disk; as it is set by default")
    arguments.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"), help="of activations")
    arguments.add_argument("--threads", type=int, default=os.cpu_count())
    options = arguments.parse_args()
    on_card = options.device != "cpu"
    options.ram = options.ram or ("free" if on_card else "least")
    if on_card and options.ram == "least":
        arguments.error('--ram least is for the CPU; on a card give bytes, or "free"')
    if not on_card and options.vram is not None:
        arguments.error("--vram is for cards; on the CPU give --ram")
    if on_card and options.vram is None:
        options.vram = 2 << 30
    if on_card and options.steps < 2:
        arguments.error("on a card the later forwards count; --steps must be at least 2")
    peers = [name for name in options.peers if on_card or not name.startswith("diffusers")]
    if len(peers) < len(options.peers):
        print("diffusers' group offloading is left out: it refuses to work without an accelerator", file=sys.stderr)
    prepare(options.folder, list(dict.fromkeys(point.split(":")[0] for point in options.points)), peers)
    found: dict[str, Runs] = {}
    for point in options.points:
        with read_ahead(options.read_ahead, options.folder / f"{point.split(':')[0]}.safetensors"):
            machine = MACHINE if on_card else ["compute", "read"]
            has_group = not on_card and options.limit is not None and options.ram == "least"
            ours = ["ours", "ours_group"] if has_group else ["ours"]
            found[point] = measure(point, [*ours, *peers, *machine], options)
        # A long run that is broken off leaves what it has.
        (options.folder / "runs.json").write_text(json.dumps(found))
    lines = card_figures if on_card else figures_of
    figures = [figure for point, runs in found.items() for figure in lines(point, runs)]
    groups = {run["group"] for runs in found.values() for run in runs["ours"]}
    figures.append(Figure("contenders in", ", ".join(sorted(groups))))
    name = "peers"
    name += f"_{options.device}" if on_card else ""
    name += f"_{options.dtype}" if options.dtype != "fp32" else ""
    if options.disk is not None:
        figures.append(Figure("disk", options.disk / 1e6, "MB/s"))
        name += "_slow_disk"
    if options.read_ahead is not None:
        figures.append(Figure("read-ahead", options.read_ahead / 2**10, "KiB"))
        name += "_read_ahead"
    finish(name, figures, options, {"runs": found})
    if options.save and not on_card:
        plot(found, RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
