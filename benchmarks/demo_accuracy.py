"""How often the demo model paints what the prompt says: `python benchmarks/demo_accuracy.py`.

Prompts are drawn from the demo's grammar with a fixed seed, pictures made with the shipped INT8 weights
and default settings, and judged by a pixel classifier (l2p_lowvram/demo/judge.py). Beside the model's
figures stand the classifier's own on true pictures, which bound them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from l2p_lowvram import L2PPipeline
from l2p_lowvram.demo.judge import agreement, judge
from l2p_lowvram.demo.scenes import draw_scenes, phrase, render

BATCH = 8
CAPTION_HEIGHT, PER_ROW = 26, 8


def make_pictures(pipe: L2PPipeline, prompts: list[str], options: argparse.Namespace) -> Tensor:
    """(N, 3, H, W); picture k is made with seed `options.seed` + k."""
    pictures = []
    for start in tqdm(range(0, len(prompts), BATCH), unit="batch", file=sys.stderr):
        batch = prompts[start : start + BATCH]
        size = {"width": options.width, "height": options.height}
        out = pipe(batch, seed=options.seed + start, output_type="pt", cfg_scale=options.cfg_scale, **size)
        pictures.append(out.images)
    return torch.cat(pictures)


def contact_sheet(pictures: Tensor, prompts: list[str], right: list[bool]) -> Image.Image:
    """Pictures with their prompts below; a wrong one has its prompt in red."""
    height, width = pictures.shape[-2:]
    rows = -(-len(prompts) // PER_ROW)
    sheet = Image.new("RGB", (PER_ROW * width, rows * (height + CAPTION_HEIGHT)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        x, y = index % PER_ROW * width, index // PER_ROW * (height + CAPTION_HEIGHT)
        pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
        sheet.paste(Image.fromarray(pixels.numpy()), (x, y))
        words = prompt.split()
        half = (len(words) + 1) // 2
        text = " ".join(words[:half]) + "\n" + " ".join(words[half:])
        draw.multiline_text((x + 3, y + height + 2), text, fill="black" if right[index] else "red", font_size=9)
    return sheet


def table(model: dict[str, float], classifier: dict[str, float]) -> str:
    lines = [f"{'':12}{'model':>8}{'classifier on true pictures':>30}"]
    lines += [f"{name:12}{model[name]:8.1%}{classifier[name]:30.1%}" for name in model]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=208, help="prompts (default 208)")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--cfg-scale", type=float)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the first 40 pictures here")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    rng = random.Random(options.seed)
    scenes = draw_scenes(rng, options.count)
    prompts = [phrase(scene, rng) for scene in scenes]
    pipe = L2PPipeline.from_pretrained(options.model, dtype=options.dtype)

    started = time.perf_counter()
    pictures = make_pictures(pipe, prompts, options)
    seconds = time.perf_counter() - started
    judged = [judge(picture) for picture in pictures]
    truth = render(scenes, pictures.shape[-1], pictures.shape[-2], torch.Generator().manual_seed(options.seed))
    found = agreement(scenes, judged)
    ceiling = agreement(scenes, [judge(picture) for picture in truth])

    if options.sheet:
        right = [seen == scene for seen, scene in zip(judged, scenes, strict=True)]
        contact_sheet(pictures[:40], prompts[:40], right[:40]).save(options.sheet)
    report = {"prompts": len(prompts), "seconds_per_picture": seconds / len(prompts), "model": found}
    report["classifier_on_true_pictures"] = ceiling
    print(json.dumps(report, indent=2) if options.json else table(found, ceiling))


if __name__ == "__main__":
    main()
