"""L2PPipeline: prompt -> features -> denoised pixels -> pictures.

Composes the plain modules and the weights that stream to them: encodes (and lets go of the text encoder),
refines the captions once, then walks the blocks once per step with every branch.
"""

from __future__ import annotations

import functools
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from PIL import Image
from torch import Tensor

from offload import BudgetError, parse_bytes
from offload.owner import Owner, is_worker

from . import images, sampling
from .arguments import number, whole_number
from .choices import INT8
from .compute import DEQUANTISED, Compute, LayerSize, choose_compute, without_int8
from .config import IMAGE_CHANNELS, ModelConfig
from .context import context_bytes
from .devices import choose_device, choose_dtype, full_fp32, in_host_memory, on_device, stream_dtype
from .errors import NonFiniteError, is_out_of_memory
from .model import Caption, L2PTransformer, Room, State, padded_length
from .model_weights import (
    CAPTION_EMBEDDER,
    IMAGE_EMBEDDER,
    LOCAL_DECODER,
    ResidentWeights,
    TransformerWeights,
)
from .paths import expanded
from .prompt_cache import PromptCache
from .prompts import PromptEncoder
from .report import PhaseFigures, phase_figures
from .repository import ModelFiles, locate_model
from .request import (
    Embeds,
    Prompts,
    check_image,
    check_start,
    choose_size,
    make_schedule,
    negative_list,
    noise_source,
    noised,
    prompt_list,
    require_finite,
)
from .slicing import key_tile_for
from .streamed_encoder import StreamedTextEncoder
from .streaming import MemoryOptions, Streamer
from .tiled_decoder import decode_tiled, reading, writing_velocity
from .tilings import PictureWork, Tiling, tilings

StepCallback = Callable[["L2PPipeline", int, float, dict[str, Tensor]], "dict[str, Tensor] | None"]
ProgressCallback = Callable[[str, int, int], None]
P = ParamSpec("P")
R = TypeVar("R")
OUTPUT_TYPES = ("pil", "pt", "np")


@dataclass
class PipelineOutput:
    """images: list of PIL images, a float tensor (B, 3, H, W) ("pt"), or uint8 (B, H, W, 3) ("np").

    The tensor is the sample itself: black is -1, white 1, and what lies a little beyond is not clipped.

    seeds: the seed of each picture, None when the noise came from elsewhere.
    seconds: time per phase. interrupted: the run was stopped early; the pictures
    are then the estimates of the last step done.
    """

    images: Any
    seeds: list[int] | None
    seconds: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False


@dataclass(frozen=True)
class _Job:
    """A checked request: everything the denoising loop needs."""

    work: PictureWork
    sigmas: Tensor  # (steps + 1,) fp32, the last 0
    positive: list[Caption]
    negative: list[Caption] | None
    cfg_scale: float
    callback: StepCallback | None


def _computing(method: Callable[Concatenate[L2PPipeline, P], R]) -> Callable[Concatenate[L2PPipeline, P], R]:
    """Without autograd's records and autocast's dtypes, the pipeline's card being torch's current one and what names no
    device made in host memory; one call at a time, whichever thread makes it."""

    @functools.wraps(method)
    def run(self: L2PPipeline, /, *args: P.args, **kwargs: P.kwargs) -> R:
        self._owner.require("this pipeline")  # whoever had its turn as a child was forked will never give it back
        with (
            self._turn,
            # Not inference mode, whose tensors a callback could not go on with; and out of a caller's, since what is
            # kept for the next call must be usable without it.
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(self.device.type, enabled=False),
            on_device(self.device),
            in_host_memory(),
        ):
            return method(self, *args, **kwargs)

    return run


class L2PPipeline:
    """A model and what it needs to turn prompts into pictures. A context manager.

    Holds weights, files and threads between calls, so that the next one need not begin from the disk;
    `close` gives them back (so does the garbage collector), and a call after it takes them anew. Calls from several
    threads take turns; callbacks may call in, from the thread they are called in.

    weights: None where `transformer` has its own. compute: what multiplies INT8 weights.
    on_progress, if set, is called with (phase, done, total): "text encoder"
    counts its blocks (halves of layers), "denoise" the blocks within the current step.
    """

    def __init__(
        self,
        transformer: L2PTransformer,
        *,
        weights: TransformerWeights | None = None,
        streamer: Streamer | None = None,
        prompt_encoder: PromptEncoder | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        bf16_timestep: bool = False,
        compute: Compute = DEQUANTISED,
        identity: dict[str, object] | None = None,
        warnings: Sequence[str] = (),
    ) -> None:
        self.transformer = transformer
        self.weights = ResidentWeights(transformer.config) if weights is None else weights
        self.device = torch.device(device)
        self.streamer = Streamer(self.device) if streamer is None else streamer
        self._owner = Owner()
        self._finalizer = weakref.finalize(self, _close_garbage, self.weights, self.streamer, self._owner)
        self._notices: list[str] = []
        self._refined: list[tuple[Tensor, Caption]] = []
        self.dtype, self.stream_dtype = dtype, stream_dtype(dtype)
        transformer.narrow_blocks(None if dtype == self.stream_dtype else dtype)
        self.bf16_timestep = bf16_timestep
        self.compute = compute
        transformer.use_int8(compute.matmul)
        self.identity = identity or {}
        self._warnings = tuple(warnings)
        self.on_progress: ProgressCallback | None = None
        self.prompt_encoder = prompt_encoder
        self._interrupted = False
        self._turn = threading.RLock()  # callbacks may call in

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        text_encoder: str | os.PathLike[str] | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = None,
        vram: int | str | None = None,
        ram: int | str | None = None,
        pin: int | str | None = None,
        io: str = "auto",
        slots: int | None = None,
        prompt_cache: bool | str | os.PathLike[str] | None = None,
        bf16_timestep: bool = False,
        compute: str = "auto",
    ) -> L2PPipeline:
        """Open a model; weights stay in the file until they are used, and stream from it then.

        model: a .safetensors file, a sharded set's index, a folder
            (model.safetensors + optional l2p.json, text_encoder/, tokenizer/), or "demo".
        text_encoder, tokenizer: a file or folder each, instead of the model folder's own.
            Without a text encoder the pipeline runs from `prompt_embeds` alone.
        device: "auto" takes CUDA where there is one. dtype: torch dtype, "bf16",
            "fp16", "fp32", or None for bf16 where the device computes it natively, else fp16 on cards that are
            fast in it, else fp32. With fp16, attention and feed-forward alone are fp16, the rest is fp32.
        vram, ram, pin: budgets in bytes or as text ("6GiB"), by default from what is free. vram bounds device
            memory: weights, activations and the device's own share. ram bounds host memory: pinned,
            anonymous, and what is kept cached; on the CPU it bounds everything, and vram is refused.
            pin bounds what is page-locked. The same seed gives the same bits under every budget that allows
            the same slices (`describe_plan` names them); smaller ones change the last bits.
        io: how weights are read: "read", "direct" (past the page cache), "mmap", or "auto", by a short probe.
        slots: blocks that the ring holds, at least 2; by default 2, or 3 where they come from the disk.
        prompt_cache: keep prompt features on disk: True for the user's cache folder, or a folder.
        bf16_timestep: round the timestep as the original pipeline does (for comparisons only).
        compute: what multiplies the INT8 weights of attention and feed-forward. "dequant": them as floats.
            "int8": INT8 activations, quantised per token, by the best kernel of the device; a seed gives another,
            slightly worse picture. "auto": int8 where it is measured to be clearly faster; on CPUs with VNNI unless it
            is measured to take a quarter longer or more; on others, and for narrow layers, dequant. `pipe.compute`
            says what was chosen and why.

        Raises CheckpointError for a file that is refused, ValueError or FileNotFoundError otherwise. A
        budget that is too small for a picture is found out by the call that makes it (BudgetError).
        """
        place = choose_device(device)
        kind = choose_dtype(dtype, place)
        memory = MemoryOptions(_bytes(vram, "vram"), _bytes(ram, "ram"), _bytes(pin, "pin"), io, slots)
        files = locate_model(model, text_encoder=text_encoder, tokenizer=tokenizer)
        return cls.from_streamer(
            files,
            Streamer(place, memory, context_bytes=context_bytes(place, kind)),
            kind,
            prompt_cache=prompt_cache,
            bf16_timestep=bf16_timestep,
            compute=compute,
        )

    @classmethod
    def from_streamer(
        cls,
        files: ModelFiles,
        streamer: Streamer,
        dtype: torch.dtype,
        *,
        prompt_cache: bool | str | os.PathLike[str] | None = None,
        bf16_timestep: bool = False,
        compute: str = "auto",
    ) -> L2PPipeline:
        """`from_pretrained` once it is known which files make up the model, and who streams them."""
        with in_host_memory():
            return cls._opened(files, streamer, dtype, prompt_cache, bf16_timestep, compute)

    @classmethod
    def _opened(
        cls,
        files: ModelFiles,
        streamer: Streamer,
        dtype: torch.dtype,
        prompt_cache: bool | str | os.PathLike[str] | None,
        bf16_timestep: bool,
        compute: str,
    ) -> L2PPipeline:
        encoder = files.text_encoder(streamer, stream_dtype(dtype))
        tokenizer = files.tokenizer() if encoder is not None else None
        opened = files.open_transformer(streamer)
        if encoder is not None:
            files.check_width(encoder.config.hidden_size, opened.transformer.config.caption_dim)
        if opened.int8_layers:
            size = LayerSize(opened.transformer.config.dim, opened.transformer.config.ffn_dim)
            chosen, notes = choose_compute(compute, streamer.device, dtype, size), opened.warnings
        else:
            chosen, warned = without_int8(compute)
            notes = (*opened.warnings, *warned)
        cache = None
        if prompt_cache is not None and prompt_cache is not False:
            cache = PromptCache(None if prompt_cache is True else _cache_folder(prompt_cache))
        identity, prompts = dict(opened.identity), None
        if encoder is not None and tokenizer is not None:
            prompts = PromptEncoder(encoder, tokenizer, cache)
            identity["text_encoder"] = {"file": encoder.path.name, "header_sha256": encoder.header_sha256}
            identity["tokenizer_sha256"] = tokenizer.identity
        return cls(
            opened.transformer,
            weights=opened.weights,
            streamer=streamer,
            prompt_encoder=prompts,
            device=streamer.device,
            dtype=dtype,
            bf16_timestep=bf16_timestep,
            compute=chosen,
            identity=identity,
            warnings=notes,
        )

    def close(self) -> None:
        """Give back weights, files and threads. May be called twice; the next call takes them anew. In a forked child
        nothing is given back, since it is the parent's."""
        _close(self.weights, self.streamer, self._owner)

    def __enter__(self) -> L2PPipeline:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def text_encoder(self) -> StreamedTextEncoder | None:
        """None where the model has none, and runs from `prompt_embeds` alone."""
        return None if self.prompt_encoder is None else self.prompt_encoder.encoder

    @property
    def memory(self) -> MemoryOptions:
        """The budgets that were asked for."""
        return self.streamer.options

    @property
    def phases(self) -> list[PhaseFigures]:
        """What streaming weights took, a phase each, since the pipeline was made."""
        return [phase_figures(stream) for stream in self.streamer.streams]

    @property
    def fallbacks(self) -> list[str]:
        """Why copies to the device were slower than they could be; empty in the good case."""
        return self.streamer.fallbacks

    @property
    def config(self) -> ModelConfig:
        return self.transformer.config

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is odd about the model, why prompts are not cached if that failed, where memory ran out."""
        cache = self.prompt_encoder.cache if self.prompt_encoder is not None else None
        cached = [] if cache is None or cache.warning is None else [cache.warning]
        return (*self._warnings, *cached, *self.streamer.notices, *self._notices)

    def interrupt(self) -> None:
        """Stop after the current step (from a callback or another thread)."""
        self._interrupted = True

    def encode_prompt(self, prompt: str) -> Tensor:
        """prompt -> features (tokens, width) in the pipeline's dtype (fp32 for fp16), on its device.

        The text encoder's memory is given back before this returns. Raises
        ValueError without a text encoder, NonFiniteError if it overflows.
        """
        return self.encode_prompts([prompt])[0]

    def _encoder_of(self, texts: Sequence[str]) -> PromptEncoder | None:
        """Raises ValueError where there are texts, but no text encoder."""
        if self.prompt_encoder is None and texts:
            raise ValueError(
                "this model has no text encoder; give text_encoder= and tokenizer=, or run from prompt_embeds"
            )
        return self.prompt_encoder

    @_computing
    def encode_prompts(self, prompts: Prompts) -> list[Tensor]:
        """`encode_prompt` of several prompts, for which the encoder's weights are read once."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        encoder = self._encoder_of(prompts)
        if encoder is None:
            return []
        with full_fp32(self.device, self.stream_dtype):
            found = encoder(prompts, self._report("text encoder"))
        if not all(bool(features.isfinite().all()) for features in found):
            raise NonFiniteError("text encoder", hint="try dtype fp32")
        return [features.to(self.device, self.stream_dtype) for features in found]

    @_computing
    def __call__(
        self,
        prompt: Prompts | None = None,
        negative_prompt: Prompts | None = "",
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        cfg_scale: float | None = None,
        shift: float | None = None,
        sigmas: Sequence[float] | None = None,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        image: Image.Image | Tensor | None = None,
        strength: float | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Embeds | None = None,
        negative_prompt_embeds: Embeds | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        noise_device: str | torch.device = "cpu",
    ) -> PipelineOutput:
        """Make one picture per prompt and `num_images_per_prompt`.

        prompt, negative_prompt: text, or a list of texts (one negative prompt serves all).
        height, width: pixels, multiples of `config.size_multiple`; default: the
            image's size for img2img, else the model's.
        cfg_scale c: negative + c * (positive - negative); 1.0 turns guidance off and halves
            the work. It is diffusers' Z-Image `guidance_scale` + 1. Default: the model's; 1.0 where
            there is neither a text encoder nor negative_prompt_embeds.
        sigmas: own noise levels, descending within (0, 1]; the final 0 is appended.
            Excludes num_inference_steps, shift and strength.
        seed: of the first picture, the next takes seed + 1, and so on; noise is drawn on
            `noise_device` one picture at a time, so a picture depends on its own seed alone.
            generator: a torch generator (or one per picture) instead.
        latents: the initial noise (B, 3, H, W) itself.
        image: start from this picture (PIL, or a tensor (3, H, W) or (1, 3, H, W) in [-1, 1])
            noised to `strength` (default 0.6); a PIL image of another size is resized.
        prompt_embeds, negative_prompt_embeds: (tokens, width), or a list of them, instead of text.
        output_type: "pil", "pt" or "np"; see PipelineOutput.
        callback_on_step_end(pipe, step, sigma, tensors): after each step, with the noise level just
            reached, tensors["latents"] and tensors["denoised"] (the current estimate of the clean
            picture), both (B, 3, H, W). It may replace tensors["latents"], or return a dict that does.

        Raises ValueError for bad arguments, BudgetError before anything is drawn where the memory does not suffice,
        NonFiniteError when the sample overflows, RuntimeError in a forked child.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        image = check_image(image)
        count = whole_number(num_images_per_prompt, "num_images_per_prompt", 1)
        cfg = self._cfg_scale(cfg_scale, negative_prompt_embeds)
        schedule = make_schedule(
            self.config.defaults, num_inference_steps, shift, sigmas, strength, from_noise=image is None
        )
        width, height = choose_size(self.config, width, height, image, latents)
        prompts = prompt_list(prompt, prompt_embeds)
        negatives = negative_list(negative_prompt, negative_prompt_embeds, len(prompts)) if cfg != 1 else None
        batch = len(prompts) * count
        draw, seeds = noise_source((batch, IMAGE_CHANNELS, height, width), seed, generator, latents, noise_device)
        check_start(image, latents, (IMAGE_CHANNELS, height, width))

        items = [*prompts, *(negatives or [])]
        work = self.work(width, height, batch, cfg, self.caption_tokens(items))
        self.describe_plan(work, [item for item in items if isinstance(item, str)])  # refuses what does not fit

        with self._interruptible():
            started = time.perf_counter()
            features = self._features(items)
            encoded = time.perf_counter()
            tiling = self.weights.open(work)
            with full_fp32(self.device, self.stream_dtype):
                captions = self._captions(features)
            self.weights.reserve(work, tiling)
            job = _Job(
                work,
                schedule,
                _repeat(captions[: len(prompts)], count),
                None if negatives is None else _repeat(captions[len(prompts) :], count),
                cfg,
                callback_on_step_end,
            )
            # Not before it is known to fit. In a list, for the loop to take it out of: no frame holds on to what the
            # run began with.
            start = [draw() if image is None else noised(image, draw(), schedule[0])]
            require_finite(start[0], "latents" if latents is not None else "image")
            with full_fp32(self.device, self.stream_dtype):
                result, was_stopped = self._denoise(job, start, tiling)
            seconds = {"text encoder": encoded - started, "denoise": time.perf_counter() - encoded}
        return PipelineOutput(_as_output(result, output_type), seeds, seconds, was_stopped)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """One call, which `interrupt` ends. A callback may make another: what is interrupted there is that one."""
        before, self._interrupted = self._interrupted, False
        try:
            yield
        finally:
            self._interrupted = before

    def caption_tokens(self, prompts: Sequence[str | Tensor]) -> int:
        """Of the longest prompt, text or features (tokens, width). Raises ValueError for a text without an encoder."""
        texts = [item for item in prompts if isinstance(item, str)]
        encoder = self._encoder_of(texts)
        lengths = [item.shape[0] for item in prompts if isinstance(item, Tensor)]
        return max([*lengths, *(len(encoder.tokenizer(text)) for text in texts if encoder is not None)])

    def work(self, width: int, height: int, pictures: int, cfg_scale: float, caption_tokens: int) -> PictureWork:
        """What a call computes on, for plans."""
        keys = key_tile_for(self.config, self.device, self.dtype)
        tokens = padded_length(caption_tokens)
        int8 = self.compute.name == INT8
        on_cpu = self.device.type == "cpu"
        return PictureWork(width, height, pictures, cfg_scale != 1, tokens, self.dtype, keys, int8, on_cpu)

    def describe_plan(self, work: PictureWork, prompts: Sequence[str] = ()) -> str:
        """How a run would be cut and where its blocks would live, in words. prompts: that are encoded for it.

        Raises BudgetError with what the needier of encoding and drawing takes, if one of them does not fit.
        """
        plan, refused = "", []
        try:
            plan = self.weights.told(work)
        except BudgetError as error:
            refused.append(error)
        try:
            if self.prompt_encoder is not None:
                self.prompt_encoder.require_room(prompts)
        except BudgetError as error:
            refused.append(error)
        if refused:
            raise max(refused, key=lambda error: error.needed)
        return plan

    def _denoise(self, job: _Job, start: list[Tensor], tiling: Tiling) -> tuple[Tensor, bool]:
        """The Euler loop, on pictures in host memory. Returns the last pixels, or the estimate and True after
        `interrupt`. start: the sample (B, 3, H, W) in fp32, taken out of the list so that nothing else holds it."""
        pixels, steps = start.pop(), len(job.sigmas) - 1
        for step in range(steps):
            sigma, next_sigma = job.sigmas[step], job.sigmas[step + 1]
            velocity, tiling = self._guided_velocity(job, pixels, sigma, step, tiling)
            is_asked = job.callback is not None or self._interrupted
            estimate = sampling.denoised(pixels, velocity, sigma) if is_asked else None
            pixels = sampling.euler_step(pixels, velocity, sigma, next_sigma)
            del velocity
            if not pixels.isfinite().all():
                raise NonFiniteError("sampler", step, steps, hint=f"is a cfg_scale of {job.cfg_scale:g} meant?")
            if job.callback is not None and estimate is not None:
                pixels = self._call_back(job.callback, step, float(next_sigma), pixels, estimate)
                if not pixels.isfinite().all():
                    raise NonFiniteError("callback", step, steps)
                # It may have encoded a prompt, drawn another picture or closed: whatever took the memory is done.
                self.weights.resume(job.work, tiling)
            if self._interrupted and estimate is not None:
                return estimate, True
            del estimate
        return pixels, False

    def _call_back(self, callback: StepCallback, step: int, sigma: float, pixels: Tensor, estimate: Tensor) -> Tensor:
        tensors = {"latents": pixels, "denoised": estimate}
        returned = callback(self, step, sigma, tensors)
        replaced = (tensors if returned is None else {**tensors, **returned})["latents"]
        if not isinstance(replaced, Tensor) or replaced.shape != pixels.shape:
            found = f"of shape {list(replaced.shape)}" if isinstance(replaced, Tensor) else type(replaced).__name__
            raise ValueError(f"the callback returned latents {found}, expected a tensor {list(pixels.shape)}")
        return replaced.detach().to(pixels)

    def _guided_velocity(
        self, job: _Job, pixels: Tensor, sigma: Tensor, step: int, tiling: Tiling
    ) -> tuple[Tensor, Tiling]:
        """(B, 3, H, W) fp32, and the tiling that held. Where memory runs out the slices become smaller, and this
        step is done again: nothing before it is lost."""
        while True:
            try:
                velocities = self._velocities(job, pixels, sigma, step, tiling)
                break
            except (RuntimeError, MemoryError) as error:
                smaller = self._smaller(job.work, tiling) if is_out_of_memory(error) else None
                if smaller is None:
                    raise
                tiling = smaller
            # Outside of the handler, whose traceback holds on to the failed step's tensors.
            self._recover_from_out_of_memory(step, tiling)
        count = pixels.shape[0]
        positive = torch.cat(velocities[:count])
        if job.negative is None:
            return positive, tiling
        negative = torch.cat(velocities[count:])
        del velocities
        return sampling.guide(positive, negative, job.cfg_scale), tiling

    def _smaller(self, work: PictureWork, tiling: Tiling) -> Tiling | None:
        return next((choice for choice in tilings(self.config, work) if choice.level > tiling.level), None)

    def _recover_from_out_of_memory(self, step: int, tiling: Tiling) -> None:
        gc.collect()
        if self.device.type != "cpu":
            torch.get_device_module(self.device.type).empty_cache()
        self._notices.append(f"out of memory in step {step + 1}; it is done again in slices of {tiling.told()}")

    def _velocities(self, job: _Job, pixels: Tensor, sigma: Tensor, step: int, tiling: Tiling) -> list[Tensor]:
        """One forward of every branch, block by block: velocities (1, 3, H, W) fp32 in host memory, all
        pictures' positive ones, then their negative ones.

        The branches share each block visit: every block's weights are needed once a step, while shapes and
        bits stay those of single runs. Guided branches also share what does not see the caption.
        """
        t = sampling.model_time(sigma.reshape(1), bf16=self.bf16_timestep).to(self.device)
        visit, model, slices = self.weights.visit, self.transformer, tiling.sizes.slices()
        pictures = list(pixels.split(1))
        branches = [*zip(range(len(pictures)), job.positive, strict=True)]
        if job.negative is not None:
            branches += zip(range(len(pictures)), job.negative, strict=True)
        with visit(IMAGE_EMBEDDER):
            # All of them before anything that goes: what lives longer lies below.
            rooms = [model.room(pictures[picture], caption) for picture, caption in branches]
            # A caption's length is all that the image tokens know of it: their positions come after it.
            owners = {(picture, caption.length): index for index, (picture, caption) in enumerate(branches)}
            common = {
                key: model.prelude(pictures[key[0]], t, branches[index][1], slices, rooms[index])
                for key, index in owners.items()
            }
        states: list[State] = []
        sublayers = model.sublayers()
        report = self._report("denoise")
        report(0, len(sublayers))
        for done, sublayer in enumerate(sublayers, 1):
            with visit(sublayer.name):
                if not sublayer.joint:
                    common = {key: sublayer.visit(state, slices) for key, state in common.items()}
                else:
                    states = states or _part_branches(branches, common, rooms)
                    states = [sublayer.visit(state, slices) for state in states]
            report(done, len(sublayers))
        model.scratch.release()  # the decoder converts nothing through it, and needs the room
        with visit(LOCAL_DECODER), self.streamer.sparing():
            return [
                self._decode(pictures[picture], state, tiling, (step, len(job.sigmas) - 1))
                for (picture, _), state in zip(branches, states or _part_branches(branches, common, rooms), strict=True)
            ]

    def _decode(self, picture: Tensor, state: State, tiling: Tiling, step: tuple[int, int]) -> Tensor:
        """A finished state -> velocity (1, 3, H, W) fp32 in host memory. Raises NonFiniteError."""
        model = self.transformer
        velocity = torch.empty_like(picture)
        size = (picture.shape[-2], picture.shape[-1])
        read, write = reading(picture, self.device, self.stream_dtype), writing_velocity(velocity)
        decode_tiled(model.local_decoder, tiling.decoder, size, read, model.feature_map(state, picture), write)
        if not velocity.isfinite().all():
            phase = "local decoder" if state.tokens.isfinite().all() else "transformer"
            raise NonFiniteError(phase, *step, hint="" if self.dtype == torch.float32 else "try dtype fp32")
        return velocity

    def _report(self, phase: str) -> Callable[[int, int], None]:
        callback = self.on_progress
        return (lambda done, total: None) if callback is None else lambda done, total: callback(phase, done, total)

    def _features(self, items: Sequence[str | Tensor]) -> list[Tensor]:
        """Features (tokens, width) of every prompt: all texts encoded together, given tensors moved once."""
        texts = list(dict.fromkeys(item for item in items if isinstance(item, str)))
        known: dict[str | int, Tensor] = dict(zip(texts, self.encode_prompts(texts), strict=True)) if texts else {}
        for item in items:
            if isinstance(item, Tensor):
                require_finite(item, "prompt_embeds")
                known.setdefault(id(item), item.to(self.device, self.stream_dtype))
        return [known[id(item) if isinstance(item, Tensor) else item] for item in items]

    def _cfg_scale(self, value: float | None, negative: Embeds | None) -> float:
        """The guidance asked for; by default the model's, or none where no negative prompt can be had."""
        if value is None:
            guided = self.prompt_encoder is not None or negative is not None
            return self.config.defaults.cfg_scale if guided else 1.0
        value = number(value, "cfg_scale")
        if value != 1 and self.prompt_encoder is None and negative is None:
            raise ValueError(
                f"cfg_scale {value:g} needs a negative prompt, which a model without a text encoder cannot "
                "make; give negative_prompt_embeds or cfg_scale=1"
            )
        return value

    def _captions(self, features: Sequence[Tensor]) -> list[Caption]:
        """Each distinct feature tensor through the context refiner, once, all in one visit per block.

        Those of the call before are kept: pictures of one prompt made one by one refine it once.
        """
        distinct = list({id(item): item for item in features}.values())
        new = [item for item in distinct if self._refined_before(item) is None]
        if new:
            captions = self._refine(new)
            kept = [entry for entry in self._refined if any(torch.equal(entry[0], item) for item in distinct)]
            # Clones: the caller may write into the tensors between two calls.
            self._refined = kept + [(item.clone(), caption) for item, caption in zip(new, captions, strict=True)]
        found = {id(item): self._refined_before(item) for item in distinct}
        return [caption for item in features if (caption := found[id(item)]) is not None]

    def _refined_before(self, features: Tensor) -> Caption | None:
        same = (caption for known, caption in self._refined if torch.equal(known, features))
        return next(same, None)

    def _refine(self, features: Sequence[Tensor]) -> list[Caption]:
        model, visit = self.transformer, self.weights.visit
        with visit(CAPTION_EMBEDDER):
            captions = [model.embed_caption(item, self.stream_dtype) for item in features]
        for sublayer in model.refiner_sublayers():
            with visit(sublayer.name):
                captions = [sublayer.refine(caption) for caption in captions]
        return captions


def _close(weights: TransformerWeights, streamer: Streamer, owner: Owner) -> None:
    if owner.is_another:
        return
    try:
        weights.close()
    finally:
        streamer.close()


def _close_garbage(weights: TransformerWeights, streamer: Streamer, owner: Owner) -> None:
    """Garbage is collected by whichever thread comes to it; one that is to be ended cannot wait for itself."""
    if is_worker():
        threading.Thread(target=_close, args=(weights, streamer, owner), name="close").start()
    else:
        _close(weights, streamer, owner)


def _bytes(size: int | str | None, name: str) -> int | None:
    if size is None:
        return None
    try:
        return parse_bytes(size)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _part_branches(
    branches: Sequence[tuple[int, Caption]], common: dict[tuple[int, int], State], rooms: Sequence[Room]
) -> list[State]:
    """A state per branch, each in its room, from those they share so far."""
    states: list[State] = []
    for (picture, caption), room in zip(branches, rooms, strict=True):
        state = replace(common[picture, caption.length], caption=caption)
        states.append((state if state.room is room else state.copied_to(room)).join())
    common.clear()
    return states


def _repeat(captions: Sequence[Caption], count: int) -> list[Caption]:
    """Picture order: all pictures of the first prompt, then of the second, and so on."""
    return [caption for caption in captions for _ in range(count)]


def _cache_folder(folder: str | os.PathLike[str] | bool) -> Path:
    if not isinstance(folder, (str, os.PathLike)) or not str(folder):
        raise ValueError(f"prompt_cache must be True, False or a folder, got {folder!r}")
    return expanded(folder)


def _as_output(pixels: Tensor, output_type: str) -> Any:
    if output_type == "pt":
        return pixels.float()
    if output_type == "np":
        return images.to_uint8(pixels).cpu().numpy()
    return images.to_pil(pixels)
