"""The `selftest` command: the demo model streamed in hostile circumstances against the same model held whole.

On every device at hand: slots filled with garbage the moment they are free, reads and computation delayed
at random, the smallest ring that the planner allows, every way of reading. Pictures must be equal bit for
bit. What it cannot show by chance, the order of waits, is verified by a simulator in the test suite.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from offload import BudgetError, Checkpoint, Reader
from offload.blocks import Extent
from offload.reading import ReadJob

from .choices import DEQUANT, IO_CHOICES
from .layout import read_layout
from .pipeline import L2PPipeline
from .repository import DEMO_FOLDER, ModelFiles, locate_model
from .streaming import MemoryOptions, Streamer
from .weights import load_transformer

_PROMPT = "a large red circle on a blue background, left"
_STEPS = 3
_LONGEST_DELAY = 0.004  # seconds


@dataclass(frozen=True)
class Check:
    """One comparison. difference: largest absolute one, 0.0 where all bits are equal; None where it did not run."""

    device: str
    what: str
    difference: float | None
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.difference is None or self.difference == 0.0


class DelayedReader(Reader):
    """Every read is handed over after a random while."""

    def submit(self, label: str, extents: Sequence[Extent], buffer: Tensor, *, drop_cache: bool = False) -> ReadJob:
        time.sleep(random.random() * _LONGEST_DELAY)
        job = super().submit(label, extents, buffer, drop_cache=drop_cache)
        wait = job.wait

        def wait_longer() -> None:
            time.sleep(random.random() * _LONGEST_DELAY)
            wait()

        job.wait = wait_longer  # type: ignore[method-assign]
        return job


class DelayingStreamer(Streamer):
    """A Streamer whose reads are late."""

    def open_reader(self, checkpoint: Checkpoint, io: str, *, read_ahead: bool = True) -> Reader:
        return DelayedReader(checkpoint, io=io, read_ahead=read_ahead)


def devices() -> list[torch.device]:
    """The CPU and every CUDA card."""
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def run_checks(tell: Callable[[Check], None]) -> list[Check]:
    """All checks on all devices; each is told as it ends."""
    checks = []
    for device in devices():
        with _resident(device) as pipe:
            features = pipe.encode_prompts([_PROMPT, ""])
            expected = _draw(pipe, features)
        for io in IO_CHOICES[1:]:
            for smallest in (True, False):
                checks.append(_check(device, io, expected, features, smallest=smallest))
                tell(checks[-1])
    return checks


@contextmanager
def _resident(device: torch.device) -> Iterator[L2PPipeline]:
    """The demo with all weights in place, as plain as it gets; its text encoder alone streams."""
    with Checkpoint.open(DEMO_FOLDER) as checkpoint:
        model = load_transformer(checkpoint, read_layout(checkpoint), device=device)
    streamed = _pipeline(Streamer(device))
    with L2PPipeline(model, prompt_encoder=streamed.prompt_encoder, device=device) as pipe:
        yield pipe
    streamed.close()


def _pipeline(streamer: Streamer) -> L2PPipeline:
    files: ModelFiles = locate_model("demo")
    return L2PPipeline.from_streamer(files, streamer, torch.float32, compute=DEQUANT)


def _check(device: torch.device, io: str, expected: Tensor, features: Sequence[Tensor], *, smallest: bool) -> Check:
    what = f"{io}, {'smallest ring' if smallest else 'all that fits'}, poisoned slots, random delays"
    try:
        found = _draw_in_smallest(device, io, features) if smallest else _draw_in(device, io, features, None)
    except OSError as error:  # a file system without direct reads
        return Check(str(device), what, None, f"not run: {error.strerror or error}")
    if found.isnan().any():
        return Check(str(device), what, float("inf"), "the picture has NaN: a slot was read after it was freed")
    return Check(str(device), what, float((found - expected).abs().max()))


def _draw_in_smallest(device: torch.device, io: str, features: Sequence[Tensor]) -> Tensor:
    """In what a refusal says is needed; asked again where the process has grown meanwhile."""
    budget = 1
    while True:
        try:
            return _draw_in(device, io, features, budget)
        except BudgetError as error:
            if error.needed <= budget:
                raise
            budget = error.needed


def _draw_in(device: torch.device, io: str, features: Sequence[Tensor], budget: int | None) -> Tensor:
    bounded = {"ram" if device.type == "cpu" else "vram": budget}
    options = MemoryOptions(**bounded, io=io, poison=True)
    with _pipeline(DelayingStreamer(device, options)) as pipe:
        return _draw(pipe, features)


def _draw(pipe: L2PPipeline, features: Sequence[Tensor]) -> Tensor:
    """A picture (1, 3, H, W) on the CPU, drawn with pauses."""
    pipe.on_progress = lambda phase, done, total: time.sleep(random.random() * _LONGEST_DELAY)
    images: Tensor = pipe(
        prompt_embeds=features[0],
        negative_prompt_embeds=features[1],
        seed=1,
        num_inference_steps=_STEPS,
        output_type="pt",
    ).images
    return images.cpu()
