"""A whole `generate` run on the full-size 1K INT8 checkpoint: `python benchmarks/full_size.py FOLDER`.

The published file holds 7,187,907,602 bytes; this one has the same tensors, dtypes and size with random
values, and a two-layer text encoder of the right width. Reported: seconds and peak memory of `inspect`
and of `generate` (256x256, 2 steps, guidance 2), the share of the machine's memory, and whether the
picture is finite. Beside it, the seconds that reading the file once takes here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from safetensors.torch import save_file

from l2p_lowvram.config import TextEncoderConfig
from l2p_lowvram.demo.export import complete_encoder, encoder_config
from l2p_lowvram.repository import DEMO_FOLDER
from l2p_lowvram.synthetic import main as make_synthetic
from l2p_lowvram.text import TextEncoder

ENCODER = TextEncoderConfig(
    hidden_size=2560,
    num_hidden_layers=3,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=9728,
    vocab_size=512,
)


def prepare(folder: Path) -> Path:
    """A model folder with the full-size file; made once (half a minute), 8 GB."""
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model.safetensors"
    if not model.exists():
        make_synthetic([str(model)])
    encoder = folder / "text_encoder"
    if not encoder.exists():
        encoder.mkdir()
        torch.manual_seed(0)
        weights = complete_encoder(TextEncoder(ENCODER).state_dict(), ENCODER)
        save_file({k: v.to(torch.bfloat16) for k, v in weights.items()}, encoder / "model.safetensors")
        (encoder / "config.json").write_text(json.dumps(encoder_config(ENCODER)))
    return folder


def timed(*command: str) -> tuple[float, str]:
    started = time.perf_counter()
    arguments = [sys.executable, "-m", "l2p_lowvram", *command]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - started, done.stdout


def read_once(path: Path) -> float:
    """Seconds to read the file from start to end, as it lies now (perhaps in the page cache)."""
    started = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(8 << 20)
        while file.readinto(buffer):
            pass
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoint is made and kept (8 GB)")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args()
    folder = prepare(options.folder)
    size = str(options.size)
    picture = folder / "picture.png"

    imports, _ = timed("--version")
    torch_import = timed_import()
    inspect, text = timed("inspect", str(folder / "model.safetensors"), "--json")
    command = ["generate", "-m", str(folder), "--tokenizer", str(DEMO_FOLDER / "tokenizer"), "-p", "a red circle"]
    command += ["-W", size, "-H", size, "--steps", str(options.steps), "--cfg-scale", "2", "--seed", "1"]
    seconds, report = timed(*command, "--no-prompt-cache", "--overwrite", "--json", "-o", str(picture))

    found = json.loads(report)
    pixels = np.asarray(Image.open(picture))
    rows = {
        "file bytes": (folder / "model.safetensors").stat().st_size,
        "family": json.loads(text)["model"]["family"],
        "inspect, seconds": round(inspect, 2),
        "of which importing torch": round(torch_import - imports, 2),
        "generate, seconds": round(seconds, 1),
        "seconds per step": round(found["seconds"]["denoise"] / options.steps, 1),
        "reading the file once, seconds": round(read_once(folder / "model.safetensors"), 1),
        "peak RSS, GiB (pages of the mapped file included)": round(found["peak_rss_bytes"] / 2**30, 2),
        "machine's memory, GiB": round(psutil.virtual_memory().total / 2**30, 1),
        "picture": f"{pixels.shape[1]}x{pixels.shape[0]}, values {pixels.min()} to {pixels.max()}",
    }
    print("\n".join(f"{name:52} {value}" for name, value in rows.items()))


def timed_import() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
