"""Tables of figures, on the screen and as JSON beside the machine and the command that made them."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Figure:
    """One line of a table. target: what was asked for, empty where nothing was; met: whether it was reached."""

    what: str
    value: float | int | str
    unit: str = ""
    target: str = ""
    met: bool | None = None

    def cells(self) -> tuple[str, str, str, str]:
        value = f"{self.value:.4g}" if isinstance(self.value, float) else str(self.value)
        met = {True: "met", False: "MISSED", None: ""}[self.met]
        return self.what, f"{value} {self.unit}".strip(), self.target, met


def at_most(what: str, value: float, limit: float, unit: str = "") -> Figure:
    return Figure(what, value, unit, f"<= {limit:g} {unit}".strip(), value <= limit)


def at_least(what: str, value: float, limit: float, unit: str = "") -> Figure:
    return Figure(what, value, unit, f">= {limit:g} {unit}".strip(), value >= limit)


def machine() -> dict[str, Any]:
    """The machine in neutral words: processor, vector width, cores, memory, versions."""
    flags = _cpuinfo("flags").split()
    vectors = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else ""
    return {
        "processor": _cpuinfo("model name") or platform.processor(),
        "vectors": vectors,
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def show(figures: Sequence[Figure]) -> None:
    """Print a table."""
    rows = [("", "measured", "target", ""), *(figure.cells() for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def save(name: str, figures: Sequence[Figure], details: Mapping[str, Any] | None = None) -> Path:
    """Write results/NAME.json: figures, machine, commit, command; `details` holds what the figures came from."""
    command = " ".join([*_switches(), "python", f"benchmarks/{Path(sys.argv[0]).name}", *_without_paths(sys.argv[1:])])
    record = {
        "command": command,
        "commit": _commit(),
        "machine": machine(),
        "figures": [asdict(figure) for figure in figures],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**record, **(details or {})}, indent=1, default=str) + "\n")
    return path


def _switches() -> list[str]:
    """What the environment told the libraries that compute."""
    return sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith(("ONEDNN_", "DNNL_")))


def _commit() -> str | None:
    """Of the tree that was measured, "-dirty" where files were changed since; None where git cannot tell."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _without_paths(arguments: Sequence[str]) -> list[str]:
    """Arguments as others would give them: folders of this machine are nobody's business."""
    return ["PATH" if "/" in argument else argument for argument in arguments]


def finish(
    name: str, figures: Sequence[Figure], options: argparse.Namespace, details: Mapping[str, Any] | None = None
) -> None:
    """The end of every script: the table (or, with --json, the record), saved with --save."""
    if options.json:
        print(json.dumps({"figures": [asdict(figure) for figure in figures], **(details or {})}, default=str))
    else:
        show(figures)
    if options.save:
        save(name, figures, details)


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the options that every script has."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--json", action="store_true", help="print JSON instead of the table")
    result.add_argument("--save", action="store_true", help="also write benchmarks/results/NAME.json and plots")
    return result
