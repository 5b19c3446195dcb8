"""The demo model far above its size, within a RAM budget: `python benchmarks/large_pictures.py FOLDER [--save]`.

Runs `generate --model demo -W N -H N --steps 4 --ram 4GiB --strict-budget` for each size and reports seconds and
the peak of anonymous memory beside the budget and the plan. With --save also a sheet of the pictures, scaled
down, and a cut-out of each at full size. What the model draws at sizes it never saw is its own affair; seams
would be ours.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from results import RESULTS, Figure, at_most, finish, parser

PROMPT = "a large red circle on a blue background, left"
BUDGET = 4 << 30
THUMBNAIL = 320


def draw(size: int, folder: Path, steps: int) -> dict[str, Any]:
    """One run of the command line; returns its report."""
    picture = folder / f"{size}.png"
    command = [sys.executable, "-m", "l2p_lowvram", "generate", "--model", "demo", "-p", PROMPT, "--seed", "1"]
    command += ["-W", str(size), "-H", str(size), "--steps", str(steps), "--ram", str(BUDGET), "--strict-budget"]
    command += ["--no-prompt-cache", "--overwrite", "--json", "-o", str(picture)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def sheet(folder: Path, sizes: list[int]) -> Image.Image:
    """Per size the whole picture, scaled down, and its middle as it is."""
    canvas = Image.new("RGB", (THUMBNAIL * len(sizes), 2 * THUMBNAIL + 20), "white")
    for column, size in enumerate(sizes):
        with Image.open(folder / f"{size}.png") as picture:
            canvas.paste(picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS), (column * THUMBNAIL, 20))
            corner = (size - THUMBNAIL) // 2
            middle = picture.crop((corner, corner, corner + THUMBNAIL, corner + THUMBNAIL))
            canvas.paste(middle, (column * THUMBNAIL, 20 + THUMBNAIL))
        ImageDraw.Draw(canvas).text((column * THUMBNAIL + 4, 4), f"{size}x{size}, below its middle 1:1", fill="black")
    return canvas


def main() -> None:
    options = parser(__doc__)
    options.add_argument("folder", type=Path, help="where the pictures go")
    options.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096])
    options.add_argument("--steps", type=int, default=4)
    arguments = options.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    figures = []
    for size in arguments.sizes:
        report = draw(size, arguments.folder, arguments.steps)
        held, planned = report["memory"]["held_bytes"], report["memory"]["planned_bytes"]
        figures += [
            Figure(f"{size}x{size}, {arguments.steps} steps", report["seconds"]["total"], "s"),
            at_most(f"{size}x{size}, held (planned {planned / 2**30:.2f} GiB)", held / 2**30, BUDGET / 2**30, "GiB"),
        ]
    finish("large_pictures", figures, arguments)
    if arguments.save:
        sheet(arguments.folder, arguments.sizes).save(RESULTS / "large_pictures.png", optimize=True)


if __name__ == "__main__":
    main()
