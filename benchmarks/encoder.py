"""The full-size text encoder on the CPU, cold: `python benchmarks/encoder.py FOLDER [--save]`.

A synthetic Qwen3-4B (8.04 GB BF16 in four shards, made in FOLDER where missing) encodes one prompt of 64
tokens in fp32, each way in a process of its own that begins with the files out of the page cache:

    streamed   --ram 2GiB, in a memory control group limited to 3 GiB where one can be made
    compute    all weights in RAM before the clock starts
    read       the streamed run's blocks read once, into two buffers in turns, nothing computed

The ways take turns, --rounds times; the ratio is the median of those of neighbouring runs. Reported: streamed /
max(compute, read), peak anonymous memory (pinned memory is part of it), and with what is mapped, libraries included,
and whether both ways gave the same features.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

LIMIT = 3 << 30
RAM = 2 << 30
TOKENS = 64
_SHARDS = 4


def worker(way: str, folder: str, threads: int) -> dict[str, Any]:
    """In a process of its own."""
    import torch

    torch.set_num_threads(threads)
    found = read(folder) if way == "read" else encode(folder, None if way == "compute" else RAM)
    return {**found, "cpu_seconds": time.process_time()}


def encode(folder: str, ram: int | None) -> dict[str, Any]:
    """Seconds of one prompt; without a budget, once every weight is in RAM."""
    import torch

    from l2p_lowvram.streamed_encoder import StreamedTextEncoder
    from l2p_lowvram.streaming import MemoryOptions, Streamer
    from offload.memory import MemoryWatch

    device = torch.device("cpu")
    with MemoryWatch() as watch:
        streamer = Streamer(device, MemoryOptions(ram=ram) if ram else MemoryOptions(io="read"))
        encoder = StreamedTextEncoder(folder, device=device, dtype=torch.float32, streamer=streamer)
        ids = torch.randint(encoder.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
        features, seconds = (encode_streamed if ram else encode_loaded)(encoder, ids)
    return {
        "seconds": seconds,
        "peak_anonymous_bytes": watch.peak_anonymous,
        "peak_file_bytes": watch.peak_file_backed,
        "features": hashlib.sha256(features.numpy().tobytes()).hexdigest(),
        **({"phases": [vars(phase) for phase in _phases(streamer)]} if ram else {}),
    }


def encode_streamed(encoder: Any, ids: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    features = encoder(ids)
    return features, time.perf_counter() - started


def encode_loaded(encoder: Any, ids: Any) -> tuple[Any, float]:
    """The same operations with weights that are there, read before the clock starts."""
    import torch

    from l2p_lowvram.weights import bind
    from offload import Checkpoint
    from offload.mapped import read_aligned

    model = encoder._model
    with torch.inference_mode(), Checkpoint.open(encoder.path) as checkpoint:
        for source in encoder.layout.sources.values():
            # A copy in memory of our own: a mapped page would be read when it is first used.
            bind(model, source.name, read_aligned(checkpoint, source).clone())
        started = time.perf_counter()
        x, cos, sin = model.prelude(ids, encoder.dtype)
        for sublayer in model.sublayers():
            x = sublayer.visit(x, cos, sin)
        return x, time.perf_counter() - started


def _phases(streamer: Any) -> list[Any]:
    from l2p_lowvram.report import phase_figures

    return [phase_figures(stream) for stream in streamer.streams]


def read(folder: str) -> dict[str, Any]:
    from streaming import read_blocks

    from l2p_lowvram.encoder import read_encoder_layout
    from offload import Block, Checkpoint

    with Checkpoint.open(folder) as checkpoint:
        layout = read_encoder_layout(checkpoint)
        return read_blocks(checkpoint, [Block(name, sources) for name, sources in layout.blocks.items()])


def make_encoder(folder: Path) -> None:
    """Random weights under Hugging Face's names and sizes, with index and configuration."""
    import torch
    from safetensors.torch import save_file

    from l2p_lowvram.config import TextEncoderConfig
    from l2p_lowvram.encoder import config_json
    from l2p_lowvram.paths import CONFIG_FILE
    from l2p_lowvram.synthetic import RandomTile
    from l2p_lowvram.text import TextEncoder

    config = TextEncoderConfig(2560, 36, 32, 8, 128, 9728, 151_936)
    with torch.device("meta"):
        # Its last layer makes no features, but is in the published files.
        model = TextEncoder(TextEncoderConfig(2560, 37, 32, 8, 128, 9728, 151_936))
    shapes = {f"model.{name}": tuple(value.shape) for name, value in model.named_parameters()}
    shapes["model.norm.weight"] = (config.hidden_size,)
    names, tile, index = list(shapes), RandomTile(0), {}
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(_SHARDS):
        held = names[shard * len(names) // _SHARDS : (shard + 1) * len(names) // _SHARDS]
        file = f"model-{shard + 1:05}-of-{_SHARDS:05}.safetensors"
        save_file({name: tile.floats(name, shapes[name], torch.bfloat16) for name in held}, folder / file)
        index |= dict.fromkeys(held, file)
    (folder / CONFIG_FILE).write_text(config_json(config))
    # Last: it says that the rest is complete.
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def main() -> None:
    from limited import drop_cache, measured
    from results import Figure, finish, parser
    from streaming import judged, peaks

    arguments = parser(__doc__)
    arguments.add_argument("folder", type=Path, help="where the encoder is made and kept (8.0 GB)")
    arguments.add_argument("--threads", type=int, default=os.cpu_count())
    arguments.add_argument("--rounds", type=int, default=5, help="of each way in turns")
    options = arguments.parse_args()
    if not (options.folder / "model.safetensors.index.json").exists():
        make_encoder(options.folder)
    files = sorted(options.folder.glob("*.safetensors"))
    rounds: dict[str, list[dict[str, Any]]] = {"streamed": [], "compute": [], "read": []}
    for way in [*rounds] * options.rounds:
        drop_cache(files)
        limit = LIMIT if way == "streamed" else None
        rounds[way].append(
            measured([__file__, "--worker", way, str(options.folder), str(options.threads)], limit=limit)
        )
        print(f"{way}: {rounds[way][-1]['seconds']:.2f} s", file=sys.stderr)
    streamed = max(rounds["streamed"], key=lambda run: run["peak_anonymous_bytes"])
    same = len({run["features"] for run in [*rounds["streamed"], *rounds["compute"]]}) == 1
    figures = [
        Figure("encoder", sum(path.stat().st_size for path in files) / 1e9, "GB"),
        *judged(rounds, limit=1.15),
        *peaks(streamed),
        Figure("how it was read", streamed["phases"][0]["io_reason"]),
        Figure("same features, to the bit", str(same), "", "True", same),
    ]
    finish("encoder", figures, options, {"rounds": rounds})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(worker(sys.argv[2], sys.argv[3], int(sys.argv[4])), default=str))
    else:
        main()
