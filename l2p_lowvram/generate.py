"""The `generate` command: one model, one prompt, one picture per seed.

Everything that can be refused is refused before the step that costs time: options and paths before the
model is opened, sizes before the prompt is encoded.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload import MemoryWatch, format_bytes, peak_device_bytes, process_memory, start_device_peak

from . import images, metadata
from .console import print_line, say
from .context import held_context_bytes
from .estimates import PROMPT_TOKENS
from .order import Order, Picture, Preview, take_order
from .progress import Progress
from .report import budget_record, phase_record, phase_table
from .user_input import InputError, describe_os_error, one_line, refusals, user_input
from .whole_file import whole_file

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from .pipeline import L2PPipeline
    from .tilings import PictureWork

# 4 and below are the command line's own.
EXIT_MISPLACED, EXIT_BUDGET = 2, 5
# Steps in a row whose preview could not replace the last one, before it is given up.
MOST_PREVIEWS_SKIPPED = 5
DEMO_NOTICE = (
    "no --model given: drawing coloured shapes with the embedded demo model; "
    "for real pictures give --model (or L2P_MODEL) an L2P safetensors file, see the README"
)


@dataclass
class Run:
    """A command in progress: what it has done and found so far."""

    order: Order
    pipe: L2PPipeline
    progress: Progress
    preview: Preview | None
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    written: list[Picture] = field(default_factory=list)
    previews_skipped: int = 0  # since the last that was written
    misplaced: bool = False  # a picture that is not where it was asked for

    def warn(self, message: str) -> None:
        self.warnings.append(message)
        say(f"warning: {message}")

    def warn_of_new(self, messages: Sequence[str]) -> None:
        for message in messages:
            if message not in self.warnings:
                self.warn(message)

    def add_seconds(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


def generate(options: argparse.Namespace, *, model: str | None, prompt_cache: bool | Path | None) -> int:
    """Run the command. model: None for the demo. prompt_cache: as `L2PPipeline.from_pretrained` takes it.

    Raises InputError, NonFiniteError or KeyboardInterrupt; pictures finished by then stay, and are in the report.
    """
    started = time.perf_counter()
    with MemoryWatch() as watch:
        order = take_order(options, model or "demo")
        notices = []
        if model is None:
            notices.append(DEMO_NOTICE)
            say(DEMO_NOTICE)
        run = Run(order, _load(order, prompt_cache), Progress(quiet=options.quiet), order.preview, notices)
        del order  # its photograph may be larger than the whole budget, and is let go of once it is resized
        try:
            run.add_seconds("load", time.perf_counter() - started)
            run.warn_of_new(run.pipe.warnings)
            with user_input():
                settings = resolve_settings(run)
                # Refused now rather than after the text encoder has run.
                plan = run.pipe.describe_plan(_work(run, settings), _encoded(run, settings))
            if not options.quiet:
                say(f"plan: {plan}")
                say(f"compute: {run.pipe.compute.told()}")
            start_device_peak(run.pipe.device)
            with _told_if_it_fails(run, settings, watch, started):
                make_pictures(run, settings)
            run.seconds["total"] = time.perf_counter() - started
            report = make_report(run, settings, watch)
        finally:
            run.pipe.close()
    _deliver(options, report)
    if not options.quiet:
        _summarise(run, report)
    if run.misplaced:
        return EXIT_MISPLACED
    return EXIT_BUDGET if options.strict_budget and _breaks_budget(report) else 0


def _prompts(settings: metadata.RunSettings) -> list[str]:
    """Those that are encoded: the negative one only where there is guidance."""
    return [settings.prompt, settings.negative_prompt] if settings.cfg_scale != 1 else [settings.prompt]


def _work(run: Run, settings: metadata.RunSettings) -> PictureWork:
    prompts = _encoded(run, settings)
    tokens = run.pipe.caption_tokens(prompts) if prompts else PROMPT_TOKENS
    return run.pipe.work(settings.width, settings.height, 1, settings.cfg_scale, tokens)


def _encoded(run: Run, settings: metadata.RunSettings) -> list[str]:
    return [] if run.pipe.prompt_encoder is None else _prompts(settings)


def _breaks_budget(report: dict[str, Any]) -> bool:
    """Whether more was held than asked for; said in a line. Without a budget, than was planned."""
    budget = report["memory"]["budget"]
    on_device = report["peak_device_bytes"] is not None
    allowed = budget["vram" if on_device else "ram"] or report["memory"]["planned_bytes"]
    held = report["memory"]["held_bytes"]
    if held <= allowed:
        return False
    say(f"budget broken: {format_bytes(held)} were held, {format_bytes(allowed)} allowed")
    return True


@contextmanager
def _told_if_it_fails(run: Run, settings: metadata.RunSettings, watch: MemoryWatch, started: float) -> Iterator[None]:
    """Around the work: where it ends early, pictures that are finished are reported like those of a whole run."""
    try:
        yield
    except BaseException as error:
        if run.written:
            run.seconds["total"] = time.perf_counter() - started
            report = make_report(run, settings, watch) | {"error": one_line(error) or type(error).__name__}
            with suppress(InputError):  # the first error is the one to tell
                _deliver(run.order.options, report)
        raise


def _deliver(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """The report to where it was asked for. Raises InputError."""
    text = json.dumps(report, indent=2)
    if options.json:
        print_line(text)
    if options.report is not None:
        try:
            with whole_file(Path(options.report), overwrite=options.overwrite) as file:
                file.write(f"{text}\n".encode())
        except OSError as error:
            raise InputError(describe_os_error(error)) from error


def _summarise(run: Run, report: dict[str, Any]) -> None:
    for reason in report["memory"]["fallbacks"]:
        say(f"slower than it could be: {reason}")
    say(phase_table(run.pipe.phases))
    say(summary_line(report, run.progress.steps))


def _load(order: Order, prompt_cache: bool | Path | None) -> L2PPipeline:
    from .pipeline import L2PPipeline

    options = order.options
    with user_input():
        return L2PPipeline.from_pretrained(
            order.model,
            text_encoder=options.text_encoder,
            tokenizer=options.tokenizer,
            device=options.device,
            dtype=None if options.dtype == "auto" else options.dtype,
            prompt_cache=prompt_cache,
            bf16_timestep=options.bf16_timestep,
            compute=options.compute,
            vram=options.vram,
            ram=options.ram,
            pin=options.pin,
            io=options.io,
            slots=options.slots,
        )


def resolve_settings(run: Run) -> metadata.RunSettings:
    """Options over the model's defaults, for the first picture. Raises ValueError for what cannot be run."""
    from .sampling import check_sigmas, make_sigmas

    order, options, pipe = run.order, run.order.options, run.pipe
    defaults = pipe.config.defaults
    own_size = order.image.size if order.image is not None else (defaults.width, defaults.height)
    width = own_size[0] if options.width is None else options.width
    height = own_size[1] if options.height is None else options.height
    pipe.config.check_size(width, height)
    for picture in order.pictures:
        images.check_side(picture.path, width, height)
    if run.preview is not None:
        images.check_side(run.preview.file(order.pictures[0].seed, 0), width, height)
    if order.image is not None and order.image.width * height != order.image.height * width:
        run.warn(f"the init image is {order.image.width}x{order.image.height}, stretched to {width}x{height}")
    if order.image is not None:
        # Now: a photograph can be larger than the whole budget, and would be held to the end.
        run.order = order = replace(order, image=images.resized(order.image, width, height))

    cfg_scale = defaults.cfg_scale if options.cfg_scale is None else options.cfg_scale
    if order.negative_prompt and cfg_scale == 1:
        run.warn("the negative prompt has no effect at --cfg-scale 1, which turns guidance off")

    shift = defaults.shift if options.shift is None else options.shift
    strength = 1.0 if order.image is None else order.strength
    if options.sigmas is None:
        steps = defaults.steps if options.steps is None else options.steps
        make_sigmas(steps, shift, strength)
    else:
        steps = len(check_sigmas(options.sigmas)) - 1
    own_sigmas = options.sigmas is not None
    return metadata.RunSettings(
        prompt=order.prompt,
        negative_prompt=order.negative_prompt,
        width=width,
        height=height,
        steps=steps,
        cfg_scale=float(cfg_scale),
        shift=None if own_sigmas else float(shift),
        sigmas=tuple(options.sigmas) if own_sigmas else None,
        seed=order.pictures[0].seed,
        init_image=_init_image(order, None if own_sigmas else strength),
        dtype=str(pipe.dtype).removeprefix("torch."),
        device=str(pipe.device),
        noise_device=str(pipe.device) if options.noise_device == "device" else "cpu",
        bf16_timestep=options.bf16_timestep,
        compute=pipe.compute.name,
    )


def _init_image(order: Order, strength: float | None) -> metadata.InitImage | None:
    if order.image_sha256 is None:
        return None
    return metadata.InitImage(Path(order.options.image).name, order.image_sha256, strength)


def make_pictures(run: Run, settings: metadata.RunSettings) -> None:
    """Encode once, then one pipeline call per seed; each path is printed as its file is complete."""
    order, quiet = run.order, run.order.options.quiet
    if not quiet:
        seeds = " ".join(str(picture.seed) for picture in order.pictures)
        say(f"{settings.width}x{settings.height}, {settings.steps} steps, {settings.dtype}, seed {seeds}")
    try:
        run.pipe.on_progress = run.progress.report
        positive, negative = _encode(run, settings)
        for picture in order.pictures:
            label = f"picture {picture.index + 1}/{len(order.pictures)}"
            with run.progress.picture(label, settings.steps):
                image = _draw(run, settings, picture, positive, negative)
            run.warn_of_new(run.pipe.warnings)
            saved = _save(run, settings, picture, image)
            run.written.append(saved)
            if not order.options.json:
                print_line(str(saved.path))
    except KeyboardInterrupt:
        if len(order.pictures) > 1:
            say(f"{len(run.written)} of {len(order.pictures)} pictures written")
        raise
    finally:
        run.progress.close()
        run.pipe.on_progress = None
        run.warn_of_new(run.pipe.warnings)


def _encode(run: Run, settings: metadata.RunSettings) -> tuple[Tensor, Tensor | None]:
    """Features of the prompt and, with guidance on, of the negative prompt."""
    if run.pipe.prompt_encoder is None:
        raise InputError(f"{run.order.model}: has no text encoder; name one with --text-encoder and --tokenizer")
    started = time.perf_counter()
    guided = settings.cfg_scale != 1
    with user_input():
        found = run.pipe.encode_prompts(_prompts(settings))
    run.add_seconds("text encoder", time.perf_counter() - started)
    run.warn_of_new(run.pipe.warnings)
    return found[0], found[1] if guided else None


def _draw(
    run: Run, settings: metadata.RunSettings, picture: Picture, positive: Tensor, negative: Tensor | None
) -> Image:
    def step_end(pipe: L2PPipeline, step: int, sigma: float, tensors: dict[str, Tensor]) -> None:
        run.progress.step_done()
        _save_preview(run, picture, step, tensors["denoised"])

    order = run.order
    started = time.perf_counter()
    with refusals(), _files_told():
        output = run.pipe(
            width=settings.width,
            height=settings.height,
            num_inference_steps=None if settings.sigmas else settings.steps,
            cfg_scale=settings.cfg_scale,
            shift=settings.shift,
            sigmas=settings.sigmas,
            seed=picture.seed,
            image=order.image,
            strength=None if order.image is None or settings.sigmas else order.strength,
            prompt_embeds=positive,
            negative_prompt_embeds=negative,
            callback_on_step_end=step_end,
            noise_device=settings.noise_device,
        )
    run.add_seconds("denoise", output.seconds.get("denoise", time.perf_counter() - started))
    result: Image = output.images[0]
    return result


@contextmanager
def _files_told() -> Iterator[None]:
    """Around the drawing: weights that cannot be read are reported in one line. Raises InputError."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise InputError(describe_os_error(error)) from error


def _save(run: Run, settings: metadata.RunSettings, picture: Picture, image: Image) -> Picture:
    """The picture as it was saved: under a name beside the one asked for if that was taken while we computed."""
    options = run.order.options
    text = None
    if not options.no_metadata:
        text = metadata.text_entries(settings.with_seed(picture.seed), run.pipe.identity)
    quality = images.DEFAULT_QUALITY if options.quality is None else options.quality
    started = time.perf_counter()

    def save(first: Path, *, overwrite: bool) -> Path:
        for path in _names_beside(first):
            with suppress(FileExistsError, IsADirectoryError):
                images.save_image(image, path, text=text, overwrite=overwrite, quality=quality)
                break
        return path

    try:
        path = save(picture.path, overwrite=options.overwrite)
        if path != picture.path:
            run.warn(f"{picture.path} was made by another program meanwhile; the picture is in {path}")
    except OSError as error:  # the disk is full, the folder gone: what took hours to draw is kept where there is room
        path = _save_elsewhere(picture, save, error)
        run.warn(f"{describe_os_error(error)}; the picture is in {path}")
        run.misplaced = True
    run.add_seconds("save", time.perf_counter() - started)
    return replace(picture, path=path)


def _save_elsewhere(picture: Picture, save: Callable[..., Path], error: OSError) -> Path:
    """In the folder at hand, or that of temporary files, and under a plain name where it is the name that is refused.
    Raises InputError for `error` where none of them takes it."""
    name, plain = picture.path.name, f"l2p-{picture.seed}{picture.path.suffix}"
    folders = (Path.cwd(), Path(tempfile.gettempdir()))
    for path in [folder / name for folder in folders] + [folder / plain for folder in (picture.path.parent, *folders)]:
        with suppress(OSError):
            return save(path, overwrite=False)
    raise InputError(describe_os_error(error)) from error


def _names_beside(path: Path) -> Iterator[Path]:
    """`x.png`, then `x-1.png`, `x-2.png` and so on."""
    yield path
    yield from (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(1))


def _save_preview(run: Run, picture: Picture, step: int, denoised: Tensor) -> None:
    if run.preview is None:
        return
    path = run.preview.file(picture.seed, step)
    try:
        if run.preview.is_folder:
            run.preview.path.mkdir(exist_ok=True)
        images.save_image(images.to_pil(denoised[:1])[0], path, overwrite=True)
        run.previews_skipped = 0
    except OSError as error:  # the picture itself matters more
        run.previews_skipped += 1
        # On Windows a viewer that reads the former one keeps it from being replaced, as a rule for an instant.
        is_held = isinstance(error, PermissionError) and path.exists()
        if is_held and run.previews_skipped < MOST_PREVIEWS_SKIPPED:
            return
        run.preview = None
        run.warn(f"preview stopped, {describe_os_error(error)}")


def make_report(run: Run, settings: metadata.RunSettings, watch: MemoryWatch) -> dict[str, Any]:
    """What `--json` prints and `--report` writes."""
    shared = metadata.settings_record(settings)
    return {
        "images": [
            {
                "path": str(picture.path),
                "seed": picture.seed,
                "index": picture.index,
                "width": settings.width,
                "height": settings.height,
            }
            for picture in run.written
        ],
        "prompt": shared.pop("prompt"),
        "negative_prompt": shared.pop("negative_prompt"),
        "settings": shared,
        "compute": {"name": run.pipe.compute.name, "reason": run.pipe.compute.reason},
        "model": dict(run.pipe.identity),
        "versions": metadata.versions(),
        "seconds": {phase: round(seconds, 3) for phase, seconds in run.seconds.items()},
        "peak_rss_bytes": process_memory().peak,
        "peak_device_bytes": peak_device_bytes(run.pipe.device),
        "memory": {
            "budget": budget_record(run.pipe.memory),
            "peak_anonymous_bytes": watch.peak_anonymous,
            "peak_file_backed_bytes": watch.peak_file_backed,
            "planned_bytes": max((figures.planned_bytes for figures in run.pipe.phases), default=0),
            "held_bytes": _held_bytes(run, watch),
            "fallbacks": run.pipe.fallbacks,
        },
        "phases": [phase_record(figures) for figures in run.pipe.phases],
        "warnings": run.warnings,
    }


def _held_bytes(run: Run, watch: MemoryWatch) -> int:
    """What counts towards the budget: on the CPU anonymous memory and mapped weights, at most; elsewhere torch's peak
    and what the driver holds beside it."""
    on_device = peak_device_bytes(run.pipe.device)
    if on_device is not None:
        return on_device + held_context_bytes(run.pipe.device, run.pipe.streamer.context_bytes)
    if not watch.kinds_told:  # mapped weights are among what counts as anonymous
        return watch.peak_anonymous
    return watch.peak_anonymous + max((figures.mapped_bytes for figures in run.pipe.phases), default=0)


def summary_line(report: dict[str, Any], steps: int) -> str:
    """`2 pictures in 31.0 s, 0.51 s/step, peak memory 1.20 GiB`."""
    count, seconds = len(report["images"]), report["seconds"]
    line = f"{count} picture{'' if count == 1 else 's'} in {seconds['total']:.1f} s"
    if steps:
        line += f", {seconds['denoise'] / steps:.3g} s/step"
    line += f", peak memory {format_bytes(report['peak_rss_bytes'])}"
    if report["peak_device_bytes"] is not None:
        line += f", on the device {format_bytes(report['peak_device_bytes'])}"
    held, planned = report["memory"]["held_bytes"], report["memory"]["planned_bytes"]
    return f"{line} ({format_bytes(held)} of the {format_bytes(planned)} planned)" if planned else line
