"""What INT8 weights and INT8 arithmetic cost in pictures: `python benchmarks/quality.py FOLDER [--save]`.

The demo model, from its weights as they were trained (the layers that the shipped file has in INT8 lie in
`demo_unquantised.safetensors` beside this script; that the shipped ones are made from them is checked), is quantised
in each scheme. Every mode draws the first prompts of `demo_accuracy.py` with its seeds and default settings. Reported
for each mode: PSNR and SSIM against the unquantised bf16 run, mean and worst picture; the judge's five figures; and
for one forward at sigma 0.5 on 8 pictures, the relative L2 distance of every block's output.

PSNR is of floats clipped to [-1, 1], 10 log10(4 / MSE), averaged in dB. SSIM has Gaussian windows of 11 x 11 with
sigma 1.5, per channel, inside the border. Models and pictures are kept in FOLDER, and what is there is not made again;
`--minutes` ends drawing early, with as many prompts as all modes have by then.
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from results import RESULTS, Figure, at_least, at_most, finish, parser
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from l2p_lowvram import L2PPipeline, sampling
from l2p_lowvram.conversion import Recipe, Rewriting
from l2p_lowvram.demo.judge import agreement, judge
from l2p_lowvram.demo.scenes import Scene, draw_scenes, phrase, render
from l2p_lowvram.images import to_uint8
from l2p_lowvram.layout import read_layout
from l2p_lowvram.repository import DEMO_FOLDER
from l2p_lowvram.weights import load_transformer
from offload import Checkpoint

TRAINED = Path(__file__).parent / "demo_unquantised.safetensors"
PREFIX, MODEL_FILE = "model.diffusion_model.", "model.safetensors"
FLOAT = "float"
# 64 is the largest group of a regular rotation that divides the widths of all layers, 128 and 384.
SCHEMES = ("row", "tensor", "convrot64")
SEED, PROMPTS = 2026, 208  # of demo_accuracy.py
BATCH = 4
FORWARD_SIGMA, FORWARD_PICTURES = 0.5, 8
AMPLIFIED = 32


@dataclass(frozen=True)
class Mode:
    """file: FLOAT or a scheme. psnr: asked for, in dB. extra: for reference, not among those asked for."""

    name: str
    file: str
    dtype: str
    compute: str = "dequant"
    psnr: float | None = None
    extra: bool = False

    @property
    def key(self) -> str:
        return f"{self.file}-{self.dtype}-{self.compute}"


REFERENCE = Mode("bf16, unquantised", FLOAT, "bf16")
EXACT = Mode("fp32, unquantised", FLOAT, "fp32", extra=True)
MODES = (
    REFERENCE,
    EXACT,
    Mode("fp16, unquantised", FLOAT, "fp16"),
    Mode("W8A16 row", "row", "bf16", psnr=40),
    Mode("W8A16 tensor", "tensor", "bf16"),
    Mode("W8A16 ConvRot 64", "convrot64", "bf16"),
    Mode("W8A8 row", "row", "bf16", "int8"),
    Mode("W8A8 ConvRot 64", "convrot64", "bf16", "int8", psnr=32),
    Mode("W8 row, fp32 (as shipped)", "row", "fp32", extra=True),
)


def write_models(folder: Path) -> None:
    """A model folder per kind of weights. Raises SystemExit if row is not the shipped file."""
    for name in (FLOAT, *SCHEMES):
        if not (folder / name).exists():
            shutil.copytree(DEMO_FOLDER, folder / name)
    source = folder / FLOAT / MODEL_FILE
    shipped = load_file(DEMO_FOLDER / MODEL_FILE)
    floats = {name: value for name, value in shipped.items() if not name.endswith((".weight_scale", ".comfy_quant"))}
    save_file(floats | {f"{PREFIX}{name}": value for name, value in load_file(TRAINED).items()}, source)
    for scheme in SCHEMES:
        with (
            Checkpoint.open(folder / FLOAT) as checkpoint,
            Rewriting(checkpoint, read_layout(checkpoint), Recipe(scheme)) as rewriting,
        ):
            rewriting.write(folder / scheme / MODEL_FILE, overwrite=True)
    row = load_file(folder / "row" / MODEL_FILE)
    if not all(torch.equal(row[name], value) for name, value in shipped.items() if not name.endswith(".comfy_quant")):
        raise SystemExit(f"{TRAINED}: quantised by row it is not the shipped demo model; one of them is out of date")


@dataclass(frozen=True)
class Task:
    """The first `count` of demo_accuracy.py's prompts."""

    count: int

    @cached_property
    def scenes(self) -> list[Scene]:
        return self._drawn[0]

    @cached_property
    def prompts(self) -> list[str]:
        return self._drawn[1]

    @cached_property
    def _drawn(self) -> tuple[list[Scene], list[str]]:
        rng = random.Random(SEED)
        scenes = draw_scenes(rng, PROMPTS)
        return scenes[: self.count], [phrase(scene, rng) for scene in scenes][: self.count]


def open_pipe(folder: Path, mode: Mode) -> L2PPipeline:
    return L2PPipeline.from_pretrained(folder / mode.file, device="cpu", dtype=mode.dtype, compute=mode.compute)


def draw_pictures(folder: Path, task: Task, minutes: float) -> dict[str, Tensor]:
    """(N, 3, H, W) by mode, N the prompts that every mode has drawn in time."""
    end = time.monotonic() + 60 * minutes
    pipes = {mode: open_pipe(folder, mode) for mode in MODES}
    drawn: dict[str, list[Tensor]] = {mode.key: [] for mode in MODES}
    for start in tqdm(range(0, task.count, BATCH), unit="batch", file=sys.stderr):
        batch: dict[str, Tensor] = {}
        for mode in MODES:
            path = folder / f"{mode.key}-{start}.npy"
            if not path.exists() and time.monotonic() < end:
                prompts = task.prompts[start : start + BATCH]
                np.save(path, pipes[mode](prompts, seed=SEED + start, output_type="pt").images.numpy())
            if path.exists():
                batch[mode.key] = torch.from_numpy(np.load(path))
        if len(batch) < len(MODES):
            break
        for key, pictures in batch.items():
            drawn[key].append(pictures)
    if not drawn[REFERENCE.key]:
        raise SystemExit("not a single batch was drawn in time; give more --minutes")
    return {key: torch.cat(batches) for key, batches in drawn.items()}


def psnr(pictures: Tensor, reference: Tensor) -> Tensor:
    """(N, 3, H, W) twice -> dB of each picture."""
    error = (pictures.clamp(-1, 1) - reference.clamp(-1, 1)).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error)


def ssim(pictures: Tensor, reference: Tensor) -> Tensor:
    """(N, 3, H, W) twice -> of each picture, the mean over pixels and channels. Source: Wang et al. (2004)."""
    x, y = (images.clamp(-1, 1).flatten(0, 1)[:, None].double() for images in (pictures, reference))
    offsets = torch.arange(-5, 6, dtype=torch.float64)
    bell = torch.exp(-offsets.square() / (2 * 1.5**2))
    bell /= bell.sum()
    window = (bell[:, None] * bell)[None, None]
    mean_x, mean_y = F.conv2d(x, window), F.conv2d(y, window)
    var_x = F.conv2d(x * x, window) - mean_x.square()
    var_y = F.conv2d(y * y, window) - mean_y.square()
    covariance = F.conv2d(x * y, window) - mean_x * mean_y
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    light = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return (light * (2 * covariance + c2) / (var_x + var_y + c2)).unflatten(0, (-1, 3)).mean((1, 2, 3, 4))


def check_measures() -> None:
    """Known values: what is equal, what differs by a constant, what has its details turned round."""
    noise = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5
    grey = torch.full_like(noise, 0.25)
    light = (2 * 0.25 * 0.5 + 4e-4) / (0.25**2 + 0.5**2 + 4e-4)
    wanted = {
        "SSIM of equal pictures": (ssim(noise, noise), 1.0),
        "SSIM of plain pictures": (ssim(grey, 2 * grey), light),
        "PSNR at a distance of 0.2": (psnr(noise + 0.2, noise), 20.0),
    }
    for what, (found, value) in wanted.items():
        if not torch.allclose(found.double(), torch.full_like(found.double(), value), atol=1e-4):
            raise SystemExit(f"{what} is {found.tolist()}, must be {value}")
    if not (ssim(0.5 + noise, 0.5 - noise) < 0).all():
        raise SystemExit("SSIM of pictures whose details are each other's negative must be negative")


@torch.inference_mode()
def block_outputs(folder: Path, mode: Mode, task: Task) -> dict[str, Tensor]:
    """Token streams after every block, and the velocity, of the first pictures of the task, true ones with noise."""
    count = min(FORWARD_PICTURES, task.count)
    generator = torch.Generator().manual_seed(SEED)
    true = render(task.scenes[:count], 128, 128, generator)
    pixels = sampling.add_noise(true, torch.randn(true.shape, generator=generator), torch.tensor(FORWARD_SIGMA))
    with open_pipe(folder, mode) as pipe, Checkpoint.open(folder / mode.file) as checkpoint:
        model = load_transformer(checkpoint, read_layout(checkpoint))
        model.narrow_blocks(None if pipe.dtype == pipe.stream_dtype else pipe.dtype)
        model.use_int8(pipe.compute.matmul)
        features = pipe.encode_prompts(task.prompts[:count])
        found: dict[str, list[Tensor]] = {}
        for picture, feature in zip(pixels.to(pipe.stream_dtype).split(1), features, strict=True):
            caption = model.encode_caption(feature, pipe.stream_dtype)
            state = model.prelude(picture, sampling.model_time(torch.tensor([FORWARD_SIGMA])), caption)
            for block in model.blocks():
                state = block.visit(state)
                found.setdefault(block.name, []).append(state.tokens.flatten().double())
            found.setdefault("velocity", []).append(model.epilogue(state, picture).flatten().double())
    return {name: torch.cat(outputs) for name, outputs in found.items()}


def layer_errors(folder: Path, task: Task) -> dict[str, dict[str, dict[str, float]]]:
    """Relative L2 of each block's output, by reference, mode and block."""
    outputs = {mode: block_outputs(folder, mode, task) for mode in MODES}
    return {
        reference.name: {
            mode.name: {
                name: float((value - outputs[reference][name]).norm() / outputs[reference][name].norm())
                for name, value in outputs[mode].items()
            }
            for mode in MODES
            if mode is not reference
        }
        for reference in (REFERENCE, EXACT)
    }


def distances(pictures: Tensor, reference: Tensor) -> dict[str, float]:
    decibels, similarity = psnr(pictures, reference), ssim(pictures, reference)
    return {
        "psnr": float(decibels.mean()),
        "psnr_median": float(decibels.median()),
        "psnr_min": float(decibels.min()),
        "ssim": float(similarity.mean()),
        "ssim_min": float(similarity.min()),
    }


def measured(pictures: Mapping[str, Tensor], scenes: list[Scene]) -> dict[str, dict[str, dict[str, float]]]:
    """Of each mode: distances from both unquantised runs, and the share of right pictures."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for mode in MODES:
        own, right = pictures[mode.key], agreement(scenes, [judge(picture) for picture in pictures[mode.key]])
        result[mode.name] = {
            "accuracy": right,
            **{
                f"against {reference.name}": distances(own, pictures[reference.key])
                for reference in (REFERENCE, EXACT)
                if mode is not reference
            },
        }
    return result


def figures(
    found: Mapping[str, Mapping[str, Mapping[str, float]]], layers: Mapping[str, Mapping[str, float]], count: int
) -> list[Figure]:
    """The table: of every mode its distances from the reference, and how much its worst accuracy fell."""
    rows = [Figure("prompts", count)]
    normal = found[REFERENCE.name]["accuracy"]
    for mode in MODES[1:]:
        apart, accuracy = found[mode.name][f"against {REFERENCE.name}"], found[mode.name]["accuracy"]
        what = f"{mode.name}: PSNR"
        rows.append(
            Figure(what, apart["psnr"], "dB") if mode.psnr is None else at_least(what, apart["psnr"], mode.psnr, "dB")
        )
        rows.append(Figure(f"{mode.name}: worst PSNR", apart["psnr_min"], "dB"))
        rows.append(Figure(f"{mode.name}: SSIM, mean / worst", f"{apart['ssim']:.4f} / {apart['ssim_min']:.4f}"))
        rows.append(Figure(f"{mode.name}: one forward, relative L2", layers[mode.name]["velocity"]))
        fallen = 100 * max(normal[name] - accuracy[name] for name in normal)
        what = f"{mode.name}: largest loss of an accuracy"
        # With fewer prompts a single picture is more than the point that is allowed: no verdict.
        rows.append(at_most(what, fallen, 1, "points") if count >= 100 else Figure(what, fallen, "points"))
    return rows


def plot_layers(errors: Mapping[str, Mapping[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    for mode, values in errors.items():
        axes.semilogy(list(values), list(values.values()), marker=".", label=mode)
    axes.set_ylabel("relative L2 against fp32")
    axes.grid(alpha=0.3)
    axes.tick_params(axis="x", rotation=20)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def contact_sheet(pictures: Mapping[str, Tensor], prompts: Sequence[str], chosen: Sequence[int]) -> Image.Image:
    """Two rows per chosen prompt, of pictures and of how far their pixels are from the reference; a column per mode."""
    modes = [mode for mode in MODES if not mode.extra]
    head, left, side = 30, 84, pictures[REFERENCE.key].shape[-1]
    sheet = Image.new("RGB", (left + len(modes) * side, head + 2 * len(chosen) * side), "white")
    draw = ImageDraw.Draw(sheet)
    for column, mode in enumerate(modes):
        x = left + column * side
        draw.multiline_text((x + 3, 3), _in_lines(mode.name.split(maxsplit=1), 1), fill="black", font_size=10)
        for row, index in enumerate(chosen):
            own, reference = (pictures[key][index : index + 1].clamp(-1, 1) for key in (mode.key, REFERENCE.key))
            apart = (own - reference).abs().amax(1, keepdim=True).expand_as(own)
            for offset, values in enumerate((own, AMPLIFIED * apart - 1)):
                sheet.paste(Image.fromarray(to_uint8(values)[0].numpy()), (x, head + (2 * row + offset) * side))
    for row, index in enumerate(chosen):
        y = head + 2 * row * side + 3
        draw.multiline_text((3, y), _in_lines(prompts[index].split(), 2), fill="black", font_size=10)
        told = f"difference\nfrom the first\ncolumn,\n{AMPLIFIED} times"
        draw.multiline_text((3, y + side), told, fill="black", font_size=10)
    return sheet


def _in_lines(words: Sequence[str], per_line: int) -> str:
    return "\n".join(" ".join(words[start : start + per_line]) for start in range(0, len(words), per_line))


def chosen_prompts(pictures: Mapping[str, Tensor]) -> list[int]:
    """The first one, and that of the picture which W8A8 row changes most."""
    return list(dict.fromkeys([0, int(psnr(pictures["row-bf16-int8"], pictures[REFERENCE.key]).argmin())]))


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("folder", type=Path, help="for models and pictures, 0.5 GB")
    options_parser.add_argument("--count", type=int, default=64, help=f"prompts, at most {PROMPTS} (default 64)")
    options_parser.add_argument("--minutes", type=float, default=1e6, help="to draw, at most")
    options = options_parser.parse_args()
    if not 1 <= options.count <= PROMPTS:
        options_parser.error(f"--count must lie in 1..{PROMPTS}, got {options.count}")
    check_measures()
    options.folder.mkdir(parents=True, exist_ok=True)
    write_models(options.folder)
    pictures = draw_pictures(options.folder, Task(options.count), options.minutes)
    task = Task(len(pictures[REFERENCE.key]))
    layers = layer_errors(options.folder, task)
    found = measured(pictures, task.scenes)
    if options.save:
        contact_sheet(pictures, task.prompts, chosen_prompts(pictures)).save(RESULTS / "quality.png", optimize=True)
        plot_layers(layers[EXACT.name], RESULTS / "quality_layers.png")
    rows = figures(found, layers[REFERENCE.name], task.count)
    finish("quality", rows, options, {"modes": found, "forward_relative_l2": layers})


if __name__ == "__main__":
    main()
