"""Pixels to pictures and back: tensors in [-1, 1], PIL images, PNG, JPEG and WebP files."""

from __future__ import annotations

import json
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from .whole_file import whole_file

DEFAULT_QUALITY = 95
# The largest model family draws 10240 x 10240; a file that claims more than this is no picture for us.
MAX_PIXELS = 1 << 27
# The formats Pillow reads without an external program; the rest (EPS, for one) are not asked for.
_READ_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
# As many are converted at a time as take a few MiB in float64.
_STRIP_PIXELS = 1 << 18
_USER_COMMENT = 0x9286
# One JPEG segment holds 65,533 bytes, and the EXIF structure takes a few.
_MAX_COMMENT_BYTES = 65_000


@dataclass(frozen=True)
class ImageFormat:
    """name: as Pillow calls it. max_side: pixels the format can say. lossy: `quality` has a meaning."""

    name: str
    max_side: int
    lossy: bool


FORMATS: Mapping[str, ImageFormat] = MappingProxyType(
    {
        ".png": ImageFormat("PNG", 2**31 - 1, lossy=False),
        ".jpg": ImageFormat("JPEG", 65_535, lossy=True),
        ".jpeg": ImageFormat("JPEG", 65_535, lossy=True),
        ".webp": ImageFormat("WEBP", 16_383, lossy=True),
    }
)
# Where a picture may say how it is to be turned.
_TURNING_NOTES = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
# By EXIF's orientation; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_uint8(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1], any float dtype -> (B, H, W, 3) uint8 on the same device.

    round(clamp((x + 1) / 2, 0, 1) * 255) in fp32, halves to even.
    """
    levels = (pixels.float() + 1).div_(2).clamp_(0, 1).mul_(255).round_()
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] -> one RGB image each."""
    return [Image.fromarray(picture) for picture in to_uint8(pixels).cpu().numpy()]


def from_pil(image: Image.Image, width: int, height: int) -> Tensor:
    """Any image -> (1, 3, H, W) fp32 in [-1, 1], p * (2 / 255) - 1.

    Turned as its EXIF says, made RGB, and resized (Lanczos, without keeping the aspect ratio) only
    where the size differs.
    """
    image = resized(_upright_rgb(image), width, height)
    levels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)[None]
    return levels.to(torch.float32, memory_format=torch.contiguous_format) * (2 / 255) - 1


def resized(image: Image.Image, width: int, height: int) -> Image.Image:
    """By Lanczos, without keeping the aspect ratio; itself where it has that size."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def read_image(path: Path) -> Image.Image:
    """The picture in a file, RGB and turned as its EXIF says, read completely.

    Raises OSError when the file cannot be opened, ValueError when it is no picture, is damaged, or
    claims more than MAX_PIXELS (found out before any pixel is decoded).
    """
    with path.open("rb") as file, _quiet_pillow():
        try:
            image = Image.open(file, formats=_READ_FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            picture = _upright_rgb(image)
            picture.load()  # as long as the file is open
            return picture
        except UnidentifiedImageError:
            raise ValueError(f"{path}: not a picture in {', '.join(_READ_FORMATS)} format") from None
        except Image.DecompressionBombError:
            raise ValueError(f"{path}: has more than {MAX_PIXELS} pixels, the most that is read") from None
        except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
            # What Pillow's readers raise on damaged files. It repeats no path, and can span lines.
            raise ValueError(f"{path}: damaged picture ({' '.join(str(error).split())})") from error


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Pillow warns of odd files and logs about them, at times a line per tag, and of sizes from 89 megapixels on, which
    is less than a 10K picture. What matters of it is an error."""
    logger = logging.getLogger("PIL")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            logger.setLevel(level)


def image_format(path: Path) -> ImageFormat:
    """The format the suffix asks for. Raises ValueError naming the suffixes there are."""
    chosen = FORMATS.get(path.suffix.lower())
    if chosen is None:
        found = f"got {path.suffix!r}" if path.suffix else "got none"
        raise ValueError(f"{path}: the file name must end in {', '.join(FORMATS)}, {found}")
    return chosen


def check_side(path: Path, width: int, height: int) -> None:
    """Raise ValueError if the format of `path` cannot hold a picture of that size."""
    chosen = image_format(path)
    if max(width, height) > chosen.max_side:
        raise ValueError(
            f"{path}: {chosen.name} holds at most {chosen.max_side} pixels a side, "
            f"the picture has {width}x{height}; use .png"
        )


def save_image(
    image: Image.Image,
    path: Path,
    *,
    text: Mapping[str, str] | None = None,
    overwrite: bool = False,
    quality: int = DEFAULT_QUALITY,
) -> None:
    """Write PNG, JPEG or WebP by suffix; under `path` stands the whole picture or nothing.

    text: entries to embed: PNG text chunks by these names; in JPEG and WebP the EXIF UserComment, which
    holds the entry "parameters" and then, as far as a JPEG has room for them, the others as `, name: "…"`.
    quality: 1 to 100, for JPEG and WebP.

    Raises FileExistsError without `overwrite`, ValueError for another suffix or a picture too large for
    the format, OSError when it cannot be written. An exception, Ctrl-C included, leaves no file behind.
    """
    chosen = image_format(path)
    check_side(path, *image.size)
    # A picture is worth more than its note: names of files need not be text.
    text = {name: value.encode("utf-8", "replace").decode() for name, value in (text or {}).items()}
    options = _png_options(text) if chosen.name == "PNG" else _exif_options(text, quality)
    if chosen.name == "JPEG":
        options["subsampling"] = 0  # full colour resolution: thin coloured outlines stay sharp
    with whole_file(path, overwrite=overwrite) as file:
        image.save(file, chosen.name, **options)


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says, if that can be read, and without it."""
    image.load()  # first: Pillow turns a TIFF itself as it is loaded, and then takes the note away
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever Pillow's reader thinks of damaged EXIF; the picture itself is not damaged
        turn = None
    if turn is None and not any(note in image.info for note in _TURNING_NOTES):
        return image
    image = image.copy() if turn is None else image.transpose(turn)
    for note in _TURNING_NOTES:
        image.info.pop(note, None)
    return image


def _upright_rgb(image: Image.Image) -> Image.Image:
    image = upright(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 bits a channel")
    if image.mode.startswith("I"):
        image = _grey(image)
    if "transparency" in image.info and image.mode != "RGB":
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """16-bit grey in 8 bits: Pillow's own conversion clips at 255, which leaves a white picture."""
    levels = np.empty((image.height, image.width), np.uint8)
    rows = max(_STRIP_PIXELS // image.width, 1)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        strip = np.asarray(image.crop((0, top, image.width, bottom)), dtype=np.float64)
        levels[top:bottom] = np.rint(strip.clip(0, 65_535) / 257)
    return Image.fromarray(levels)


def _png_options(text: Mapping[str, str]) -> dict[str, Any]:
    chunks = PngImagePlugin.PngInfo()
    for name, value in text.items():
        chunks.add_text(name, value)  # tEXt, or iTXt where Latin-1 does not do
    return {"pnginfo": chunks}


def _exif_options(text: Mapping[str, str], quality: int) -> dict[str, Any]:
    options: dict[str, Any] = {"quality": quality}
    comment = _user_comment(text)
    if comment:
        exif = Image.Exif()
        exif[ExifTags.IFD.Exif] = {_USER_COMMENT: comment}
        options["exif"] = exif.tobytes()
    return options


def _user_comment(text: Mapping[str, str]) -> bytes:
    """The EXIF UserComment in the encoding A1111 writes and reads; empty for no text.

    A picture is worth more than its note: what does not fit is left out, never a reason to fail.
    """
    pieces = [text["parameters"]] if "parameters" in text else []
    pieces += [f"{name}: {json.dumps(value)}" for name, value in text.items() if name != "parameters"]
    while pieces:
        comment = b"UNICODE\0" + ", ".join(pieces).encode("utf-16-be")
        if len(comment) <= _MAX_COMMENT_BYTES:
            return comment
        pieces.pop()
    return b""
