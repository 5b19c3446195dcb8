"""`quantize` on a full-size 1K original against `cp` of the same file: `python benchmarks/quantize.py FOLDER`.

FOLDER gets a synthetic original (19.57 GB, the published tensors and dtypes), for a while a copy of it, then the
INT8 file (7.19 GB); all three are deleted at the end. Both ways begin with the source out of the page cache, as
far as the system lets go of it, and end with the result on the disk (fsync). Reported: seconds, the rate of
`quantize` in bytes of the source over that of `cp`, its peak anonymous memory, and whether names, dtypes and
shapes of the result are those of the published file, as `synthetic.py` models it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from l2p_lowvram.export import LayoutStyle, model_entries
from l2p_lowvram.families import PUBLISHED
from l2p_lowvram.synthetic import main as make_synthetic
from l2p_lowvram.synthetic import synthetic_state
from offload import Checkpoint


def forget(path: Path) -> None:
    """Write the file back and drop its pages from the cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def copied(source: Path, target: Path) -> float:
    """Seconds of `cp` and `sync`."""
    forget(source)
    started = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", source, target], check=True)
    subprocess.run(["sync", target], check=True)
    return time.perf_counter() - started


def quantized(source: Path, target: Path, scheme: str) -> tuple[float, int, int]:
    """Seconds, peak anonymous bytes and peak resident bytes of the command, imports included."""
    forget(source)
    started = time.perf_counter()
    command = [sys.executable, "-m", "l2p_lowvram", "quantize", source, target, "--scheme", scheme, "-q"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    anonymous = resident = 0
    while process.poll() is None:
        try:
            memory = psutil.Process(process.pid).memory_info()
            anonymous = max(anonymous, memory.rss - memory.shared)
            resident = max(resident, memory.rss)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.05)
    seconds = time.perf_counter() - started
    if process.wait():
        raise SystemExit("quantize failed")
    return seconds, anonymous, resident


def described(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with Checkpoint.open(path) as checkpoint:
        return {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}


def published() -> dict[str, tuple[str, tuple[int, ...]]]:
    entries, _ = model_entries(synthetic_state(PUBLISHED["1k"]), LayoutStyle(), 16)
    return {entry.name: (entry.dtype, entry.shape) for entry in entries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="on the disk to measure; 40 GB free")
    parser.add_argument("--scheme", default="row")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    source, copy, target = (options.folder / f"{name}.safetensors" for name in ("original", "copy", "int8"))
    try:
        make_synthetic([str(source), "--original", "--overwrite"])
        cp_seconds = copied(source, copy)
        copy.unlink()
        seconds, anonymous, resident = quantized(source, target, options.scheme)
        found, expected = described(target), published()
        with Checkpoint.open(target) as checkpoint:
            tensor_bytes = checkpoint.nbytes
        rows = {
            "source bytes": source.stat().st_size,
            "cp + sync, seconds": round(cp_seconds, 1),
            "quantize, seconds": round(seconds, 1),
            "rate over cp's (bytes of the source)": round(cp_seconds / seconds, 2),
            "peak anonymous memory, MiB": anonymous >> 20,
            "peak resident memory, MiB": resident >> 20,
            "tensors / bytes of tensors": f"{len(found)} / {tensor_bytes}",
            "the published file's names, dtypes, shapes": found == expected,
        }
        print("\n".join(f"{name:44} {value}" for name, value in rows.items()))
    finally:
        for path in (source, copy, target):
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
