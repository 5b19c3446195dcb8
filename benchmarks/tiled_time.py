"""What tiles cost in time: `python benchmarks/tiled_time.py [--size 1024] [--save]`.

The demo model on the CPU: one step with guidance, cut as the plan for `--ram 2GiB` cuts it, against the same
step with nothing cut at all (every token, head and pixel at once). Alternated, medians of the ratio.
Reported besides: the largest difference between the two pictures, which have values in [-1, 1].
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from limited import as_command_line
from results import Figure, at_most, finish, parser
from torch import Tensor

from l2p_lowvram import L2PPipeline
from l2p_lowvram.decoder_plan import whole_plan
from l2p_lowvram.tilings import PictureWork, Tiling

ROUNDS = 5


def timed(draw: Callable[[], Tensor]) -> tuple[float, Tensor]:
    started = time.perf_counter()
    picture = draw()
    return time.perf_counter() - started, picture


def whole(pipe: L2PPipeline, work: PictureWork) -> Tiling:
    """Slices larger than anything there is, and the decoder at once."""
    tiling, _ = pipe.weights.choose(work)  # type: ignore[attr-defined]
    everything = 1 << 30
    sizes = replace(tiling.sizes, tokens=everything, queries=everything, heads=everything, patch_rows=everything)
    return replace(tiling, sizes=sizes, decoder=whole_plan(pipe.config.decoder))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--size", type=int, default=1024)
    arguments = options.parse_args()
    size = arguments.size
    with L2PPipeline.from_pretrained("demo", ram="2GiB", dtype="fp32") as pipe:
        work = pipe.work(size, size, 1, 2.0, 32)
        positive, negative = pipe.encode_prompts(["a large red circle on a blue background, left", ""])
        planned, _ = pipe.weights.choose(work)  # type: ignore[attr-defined]
        open_weights = pipe.weights.open

        def draw(tiling: Tiling) -> Tensor:
            pipe.weights.open = lambda work: (open_weights(work), tiling)[1]  # type: ignore[method-assign]
            images: Tensor = pipe(
                prompt_embeds=positive,
                negative_prompt_embeds=negative,
                width=size,
                height=size,
                num_inference_steps=1,
                cfg_scale=2.0,
                seed=1,
                output_type="pt",
            ).images
            return images

        uncut = whole(pipe, work)
        draw(planned)  # weights are there from now on
        runs = [(timed(lambda: draw(planned)), timed(lambda: draw(uncut))) for _ in range(ROUNDS)]
    ratio = statistics.median(tiled[0] / plain[0] for tiled, plain in runs)
    difference = max(float((tiled[1] - plain[1]).abs().max()) for tiled, plain in runs)
    finish(
        "tiled_time",
        [
            Figure("cut by the plan for 2 GiB", planned.told()),
            Figure("a step, tiled", statistics.median(tiled[0] for tiled, _ in runs), "s"),
            Figure("a step, whole", statistics.median(plain[0] for _, plain in runs), "s"),
            at_most("tiled / whole, time", ratio, 1.05),
            at_most("largest difference of the two pictures", difference, 1e-4),
        ],
        arguments,
    )


if __name__ == "__main__":
    as_command_line()
    torch.set_grad_enabled(False)
    main()
