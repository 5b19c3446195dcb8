"""What the `generate` command is asked for, checked as far as it can be without a model."""

from __future__ import annotations

import argparse
import hashlib
import os
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from . import images
from .config import DEFAULT_STRENGTH, MAX_SEED
from .paths import DEMO, belongs_to, destination, expanded, parts_of, same_file_key
from .user_input import InputError, user_input
from .whole_file import require_replaceable

if TYPE_CHECKING:
    from PIL.Image import Image

# The encoder reads 512 tokens; a longer text than this is the wrong file.
MAX_PROMPT_BYTES = 65_536
RANDOM_SEED = -1
# Random seeds are short enough to copy by hand.
_RANDOM_SEEDS = 2**32


@dataclass(frozen=True)
class Picture:
    """One picture asked for."""

    seed: int
    index: int
    path: Path


@dataclass(frozen=True)
class Preview:
    """Where the estimate of each step goes: one file that is replaced, or a folder with a file a step."""

    path: Path
    is_folder: bool

    def file(self, seed: int, step: int) -> Path:
        return self.path / f"{seed}_step_{step + 1:03d}.png" if self.is_folder else self.path

    def would_write(self, path: Path, seed: int) -> bool:
        """Whether `path` is in the folder, with the name of a preview of that seed."""
        return path.name.startswith(f"{seed}_step_") and same_file_key(path.parent) == same_file_key(self.path)

    def present(self, seed: int) -> Path | None:
        """A preview of that seed that is in the folder already."""
        return next(iter(sorted(self.path.glob(f"{seed}_step_*.png"))), None)


@dataclass(frozen=True)
class Order:
    """A checked request. options: as parsed, for those that need no checking or a model to be checked."""

    model: str
    prompt: str
    negative_prompt: str
    pictures: tuple[Picture, ...]
    preview: Preview | None
    image: Image | None
    image_sha256: str | None
    options: argparse.Namespace = field(repr=False)

    @property
    def strength(self) -> float:
        return DEFAULT_STRENGTH if self.options.strength is None else float(self.options.strength)


def take_order(options: argparse.Namespace, model: str) -> Order:
    """Check what was asked for and read the prompt and the init image. Raises InputError."""
    with user_input():
        _check_combinations(options)
        for name, path in (("--text-encoder", options.text_encoder), ("--tokenizer", options.tokenizer)):
            if path is not None and not expanded(path).exists():
                raise InputError(f"{name} {path}: no such file or folder")
        report = None if options.report is None else Path(options.report)
        if report is not None:
            check_free(report, "--report", overwrite=options.overwrite)
        prompt = read_prompt(options.prompt, options.prompt_file)
        seeds = choose_seeds(options.seed, options.count)
        pictures = name_pictures(options.output, seeds)
        for picture in pictures:
            _check_destination(picture.path, overwrite=options.overwrite)
        preview = None
        if options.preview is not None:
            preview = _take_preview(Path(options.preview), pictures, overwrite=options.overwrite)
        _check_apart(pictures, preview, report, _inputs(options, model))
        image, digest = None, None
        if options.image is not None:
            image = images.read_image(Path(options.image))
            digest = _file_sha256(Path(options.image))
        negative = _check_text(options.negative_prompt, "negative prompt")
        return Order(model, prompt, negative, pictures, preview, image, digest, options)


def _inputs(options: argparse.Namespace, model: str) -> list[tuple[str, Path]]:
    """The files that a run reads, and the options that name them."""
    named = {
        "--image": options.image,
        "--prompt-file": options.prompt_file,
        "--model": None if model == DEMO else model,
        "--text-encoder": options.text_encoder,
        "--tokenizer": options.tokenizer,
    }
    found = {option: expanded(path) for option, path in named.items() if path is not None}
    return [
        (option, part)
        for option, path in found.items()
        for part in (parts_of(path) if option in ("--model", "--text-encoder") else [path])
    ]


def _check_apart(
    pictures: Sequence[Picture], preview: Preview | None, report: Path | None, read: Sequence[tuple[str, Path]]
) -> None:
    """Raise InputError where one file would be written twice, or written while it is read.

    Not for an `--output` that is the `--image`: with `--overwrite` it is drawn anew in its place.
    """
    written = {same_file_key(picture.path): "--output" for picture in pictures}
    if preview is not None and preview.is_folder:
        for file in [*(picture.path for picture in pictures), *([] if report is None else [report])]:
            if any(preview.would_write(file, picture.seed) for picture in pictures):
                raise InputError(f"{file}: is a name that --preview {preview.path} gives; give another")
    preview_file = None if preview is None or preview.is_folder else preview.path
    for option, path in (("--preview", preview_file), ("--report", report)):
        if path is None:
            continue
        other = written.setdefault(same_file_key(path), option)
        if other != option:
            raise InputError(f"{path}: is named by both {option} and {other}")
        for name, source in read:
            if belongs_to(path, source):
                raise InputError(f"{option} {path}: is read, as {name} says; give another name")


def _check_combinations(options: argparse.Namespace) -> None:
    if options.sigmas is not None:
        for name in ("steps", "shift", "strength"):
            if getattr(options, name) is not None:
                raise InputError(f"--sigmas says everything about the schedule; leave out --{name}")
    if options.strength is not None and options.image is None:
        raise InputError("--strength says how far to depart from --image; there is no --image")
    if options.quality is not None and not images.image_format(Path(options.output)).lossy:
        raise InputError(f"--quality is for JPEG and WebP, {options.output} is lossless")


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt itself, or from standard input ("-") or a file, without the line end at its end."""
    if prompt is not None and prompt != "-":
        return _check_text(prompt, "prompt")
    if prompt_file is not None and prompt_file != "-":
        place = prompt_file
        with Path(prompt_file).open("rb") as file:
            raw = file.read(MAX_PROMPT_BYTES + 1)
    else:
        place = "standard input"
        if sys.stdin is None:
            raise InputError("the prompt was to come from standard input, which is closed")
        raw = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if len(raw) <= MAX_PROMPT_BYTES:
            raise InputError(f"{place}: the prompt is not UTF-8 text ({error.reason})") from error
        text = raw.decode("utf-8-sig", errors="replace")  # cut inside a character; too long anyway
    text = _check_text(text, f"{place}: the prompt").rstrip("\r\n")
    if not text.strip():
        raise InputError(f"{place}: the prompt is empty")
    return text


def _check_text(text: str, what: str) -> str:
    try:
        nbytes = len(text.encode())
    except UnicodeEncodeError as error:  # an argument in bytes that are no text
        raise InputError(f"{what} is not valid text in this locale ({error.reason})") from error
    if nbytes > MAX_PROMPT_BYTES:
        raise InputError(f"{what} is longer than {MAX_PROMPT_BYTES} bytes; the encoder reads 512 tokens of it")
    return text


def choose_seeds(seeds: Sequence[int] | None, count: int) -> list[int]:
    """One seed per picture: those given, or `count` in a row from the one given or a random one."""
    if seeds is not None and len(seeds) > 1 and count > 1:
        raise InputError(f"--count {count} counts up from a single seed, got {len(seeds)} seeds")
    chosen = [secrets.randbelow(_RANDOM_SEEDS) if seed == RANDOM_SEED else seed for seed in seeds or [-1]]
    if len(chosen) == 1:
        chosen = [chosen[0] + offset for offset in range(count)]
    for seed in chosen:
        if not 0 <= seed <= MAX_SEED:
            raise InputError(f"seed must lie in 0 to {MAX_SEED} (or be -1 for a random one), got {seed}")
    return chosen


def name_pictures(pattern: str, seeds: Sequence[int]) -> tuple[Picture, ...]:
    """Fill `{seed}` and `{index}` (from 0) into the name. Raises InputError for names that collide."""
    pictures = tuple(
        # replace, not format: braces may stand in file names, and `{seed.__class__}` must mean nothing.
        Picture(seed, index, Path(pattern.replace("{seed}", str(seed)).replace("{index}", str(index))))
        for index, seed in enumerate(seeds)
    )
    if len(pictures) > 1 and "{seed}" not in pattern and "{index}" not in pattern:
        raise InputError(
            f"--output {pattern} is one name for {len(pictures)} pictures; put {{seed}} or {{index}} into it"
        )
    seen: dict[str, Picture] = {}
    for picture in pictures:
        other = seen.setdefault(same_file_key(picture.path), picture)
        if other is not picture:
            raise InputError(f"two pictures would be written to {picture.path}; put {{index}} into the name")
    return pictures


def _check_destination(path: Path, *, overwrite: bool) -> None:
    """Raise InputError unless a picture can be saved there, as far as that can be told beforehand."""
    images.image_format(path)
    check_free(path, "--output", overwrite=overwrite)


def check_free(path: Path, option: str, *, overwrite: bool) -> None:
    """Raise InputError or OSError unless a file can be written there, as far as that can be told beforehand."""
    require_replaceable(path)
    named = str(path) if option == "--output" else f"{option} {path}"
    if not path.parent.is_dir():
        raise InputError(f"{named}: there is no folder {path.parent}; make it first")
    folder = destination(path).parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{named}: the folder {folder} is not writable")
    if not overwrite and os.path.lexists(path):
        another = option if option == "--output" else "name"
        raise InputError(f"{named}: exists already; give --overwrite or another {another}")


def _take_preview(path: Path, pictures: Sequence[Picture], *, overwrite: bool) -> Preview:
    """A file if the name ends like one, else a folder, which is made with the first preview. A run's previews replace
    each other, and files that were there before only with `overwrite`."""
    if path.suffix.lower() in images.FORMATS and not path.is_dir():
        images.image_format(path)
        check_free(path, "--preview", overwrite=overwrite)
        return Preview(path, is_folder=False)
    if path.suffix and not path.is_dir():
        images.image_format(path)  # raises: a name that ends like a picture's is no folder's
    if not os.path.lexists(path):
        check_free(path, "--preview", overwrite=overwrite)
    elif not path.is_dir():
        raise InputError(f"{path}: is no folder; give another --preview")
    elif not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"{path}: the preview folder is not writable")
    preview = Preview(path, is_folder=True)
    for picture in pictures:
        if not overwrite and (found := preview.present(picture.seed)) is not None:
            raise InputError(f"{found}: exists already; give --overwrite or another --preview folder")
    return preview


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
