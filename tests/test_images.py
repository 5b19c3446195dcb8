"""Pixels to pictures and back, and files that appear complete or not at all."""

import io
import logging
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from l2p_lowvram import images, whole_file

GRADIENT = torch.linspace(-1, 1, 3 * 5 * 7).reshape(1, 3, 5, 7)


def gradient() -> Image.Image:
    return images.to_pil(GRADIENT)[0]


def user_comment(path: Path) -> str:
    with Image.open(path) as image:
        raw = image.getexif().get_ifd(ExifTags.IFD.Exif)[0x9286]
    assert raw.startswith(b"UNICODE\0")
    return raw[8:].decode("utf-16-be")


def test_every_byte_value_survives_the_way_to_pixels_and_back() -> None:
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)

    pixels = images.from_pil(Image.fromarray(values[0].numpy()), 16, 16)

    assert pixels.dtype == torch.float32
    assert pixels.shape == (1, 3, 16, 16)
    assert pixels.min() == -1
    assert pixels.max() == 1
    assert torch.equal(images.to_uint8(pixels), values)


def test_levels_are_clamped_and_rounded_half_to_even() -> None:
    # (x + 1) / 2 * 255 is exactly 63.75, 127.5 and 191.25 for these.
    pixels = torch.tensor([-7.0, -0.5, 0.0, 0.5, 1.5]).reshape(1, 1, 1, 5).expand(1, 3, 1, 5)

    assert images.to_uint8(pixels)[0, 0, :, 0].tolist() == [0, 64, 128, 191, 255]


def test_bf16_pixels_are_rounded_in_fp32() -> None:
    pixels = GRADIENT.to(torch.bfloat16)

    assert torch.equal(images.to_uint8(pixels), images.to_uint8(pixels.float()))


def test_making_levels_leaves_the_pixels_alone() -> None:
    pixels = GRADIENT.clone()

    images.to_uint8(pixels)

    assert torch.equal(pixels, GRADIENT)


def test_pictures_come_out_in_rows_and_channels_in_place() -> None:
    pixels = -torch.ones(2, 3, 4, 6)
    pixels[1, 0, 2, 5] = 1

    first, second = images.to_pil(pixels)

    assert second.size == (6, 4)
    assert second.getpixel((5, 2)) == (255, 0, 0)
    assert first.getextrema() == ((0, 0), (0, 0), (0, 0))


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)

    same = images.from_pil(Image.fromarray(noise), 11, 9)
    smaller = images.from_pil(Image.fromarray(noise), 6, 4)

    assert torch.equal(images.to_uint8(same)[0], torch.from_numpy(noise))
    assert smaller.shape == (1, 3, 4, 6)
    assert smaller.is_contiguous()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_other_colour_modes_become_rgb(mode: str) -> None:
    assert images.from_pil(gradient().convert(mode), 7, 5).shape == (1, 3, 5, 7)


def test_a_16_bit_grey_picture_keeps_its_shades(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 257 * 100, 65_535]], dtype=np.uint16)).save(tmp_path / "grey.png")

    shades = np.asarray(images.read_image(tmp_path / "grey.png"))[0, :, 0]

    assert shades.tolist() == [0, 100, 255]


def test_16_bit_grey_in_strips_is_16_bit_grey_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = np.random.default_rng(0).integers(0, 65_536, (31, 17), dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "grey.png")
    monkeypatch.setattr(images, "_STRIP_PIXELS", 4 * 17 + 3)

    shades = np.asarray(images.read_image(tmp_path / "grey.png"))[..., 0]

    assert np.array_equal(shades, np.rint(levels / 257))


def test_a_large_16_bit_grey_picture_takes_few_bytes_a_pixel_beside_pillows(tmp_path: Path) -> None:
    side = 3000
    Image.fromarray(np.full((side, side), 257 * 100, np.uint16)).save(tmp_path / "grey.png", compress_level=1)

    tracemalloc.start()
    try:
        images.read_image(tmp_path / "grey.png")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 4 * side**2


@pytest.mark.parametrize("key", [(1, 2, 3), 7], ids=["RGB", "L"])
def test_a_colour_that_is_transparent_stays_that_colour(tmp_path: Path, key: object) -> None:
    picture = gradient() if key != 7 else gradient().convert("L")
    picture.save(tmp_path / "x.png", transparency=key)

    assert np.array_equal(np.asarray(images.read_image(tmp_path / "x.png")), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("suffix", ["tif", "png", "jpg", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_of_every_format_are_turned_once(tmp_path: Path, orientation: int, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)).save(path, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))

    read = images.read_image(path)
    with Image.open(path) as image:
        given = images.upright(image)
        again = images.upright(given)

    assert expected.shape == ((16, 32, 3) if orientation < 5 else (32, 16, 3))
    assert np.array_equal(np.asarray(read), expected)
    assert np.array_equal(np.asarray(given), expected)
    assert np.array_equal(np.asarray(again), expected)


def test_what_pillow_thinks_of_a_file_is_neither_printed_nor_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Warnings are errors in these tests."""
    stream = io.BytesIO()
    gradient().save(stream, "TIFF", dpi=(72, 72))
    one, two = (struct.pack("<HHI", 296, 3, count) for count in (1, 2))  # the unit: one value, or two
    assert one in stream.getvalue()
    (tmp_path / "x.tif").write_bytes(stream.getvalue().replace(one, two))
    transpose = images._upright_rgb

    def noted(image: Image.Image) -> Image.Image:
        logging.getLogger("PIL.TiffImagePlugin").error("a line per tag")
        return transpose(image)

    monkeypatch.setattr(images, "_upright_rgb", noted)

    assert images.read_image(tmp_path / "x.tif").size == (7, 5)
    assert caplog.text == ""
    with pytest.warns(UserWarning, match="too many entries"), Image.open(tmp_path / "x.tif") as image:
        image.load()
    logging.getLogger("PIL.TiffImagePlugin").error("heard again")
    assert "heard again" in caplog.text


def test_a_picture_is_turned_as_its_exif_says_once(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # shown turned right
    gradient().save(tmp_path / "turned.png", exif=exif)

    image = images.read_image(tmp_path / "turned.png")

    assert image.size == (5, 7)
    assert torch.equal(images.from_pil(image, 5, 7), images.from_pil(gradient(), 7, 5).rot90(-1, (2, 3)))


def test_a_missing_picture_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        images.read_image(tmp_path / "none.png")


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0")

    with pytest.raises(ValueError, match=r"text\.png: not a picture in PNG, JPEG, WEBP, BMP, GIF, TIFF format"):
        images.read_image(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_truncated_picture_is_a_damaged_one(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut{suffix}"
    images.save_image(gradient().resize((64, 64)), path)
    path.write_bytes(path.read_bytes()[:-40])

    with pytest.raises(ValueError, match=r"^[^\n]*cut\.\w+: (damaged|not a) picture[^\n]*$"):
        images.read_image(path)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("side", [11_586, 60_000])  # just over our bound; over Pillow's own
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b""))

    with pytest.raises(ValueError, match=r"bomb\.png: has more than 134217728 pixels"):
        images.read_image(path)


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.jpeg", "JPEG"), ("a.webp", "WEBP")]
)
def test_the_suffix_picks_the_format(tmp_path: Path, name: str, kind: str) -> None:
    images.save_image(gradient(), tmp_path / name)

    with Image.open(tmp_path / name) as image:
        assert (image.format, image.size) == (kind, (7, 5))


@pytest.mark.parametrize(("name", "found"), [("a.tiff", "got '.tiff'"), ("a", "got none")])
def test_an_unknown_suffix_names_those_there_are(tmp_path: Path, name: str, found: str) -> None:
    with pytest.raises(ValueError, match=rf"must end in \.png, \.jpg, \.jpeg, \.webp, {found}"):
        images.save_image(gradient(), tmp_path / name)

    assert list(tmp_path.iterdir()) == []


def test_a_picture_too_large_for_its_format_is_refused_with_one_that_holds_it() -> None:
    with pytest.raises(
        ValueError, match=r"WEBP holds at most 16383 pixels a side, the picture has 64x20480; use \.png"
    ):
        images.check_side(Path("a.webp"), 64, 20_480)

    images.check_side(Path("a.png"), 64, 20_480)


def test_png_is_lossless_and_quality_changes_the_others(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8))

    images.save_image(noise, tmp_path / "a.png")
    for quality in (20, 100):
        images.save_image(noise, tmp_path / f"{quality}.jpg", quality=quality)

    assert np.array_equal(np.asarray(images.read_image(tmp_path / "a.png")), np.asarray(noise))
    assert (tmp_path / "20.jpg").stat().st_size < (tmp_path / "100.jpg").stat().st_size


def test_png_text_keeps_every_alphabet(tmp_path: Path) -> None:
    text = {"parameters": "a fox, 狐\nSteps: 3", "L2P": '{"seed": 1}'}

    images.save_image(gradient(), tmp_path / "a.png", text=text)

    with Image.open(tmp_path / "a.png") as image:
        assert image.text == text  # type: ignore[attr-defined]
    assert b"tEXtL2P" in (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_jpeg_and_webp_carry_the_text_in_the_user_comment(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"

    images.save_image(gradient(), path, text={"L2P": '{"seed": 1}', "parameters": "狐 fox\nSteps: 3"})

    assert user_comment(path) == '狐 fox\nSteps: 3, L2P: "{\\"seed\\": 1}"'


def test_text_a_jpeg_cannot_hold_is_left_out_rather_than_the_picture_lost(tmp_path: Path) -> None:
    images.save_image(gradient(), tmp_path / "half.jpg", text={"parameters": "x" * 20_000, "L2P": "y" * 20_000})
    images.save_image(gradient(), tmp_path / "none.jpg", text={"parameters": "x" * 40_000})

    assert user_comment(tmp_path / "half.jpg") == "x" * 20_000
    with Image.open(tmp_path / "none.jpg") as image:
        assert not image.getexif()


def test_an_existing_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("precious")

    with pytest.raises(FileExistsError) as caught:
        images.save_image(gradient(), path)
    assert caught.value.filename == str(path)
    assert path.read_text() == "precious"

    images.save_image(gradient(), path, overwrite=True)
    assert images.read_image(path).size == (7, 5)
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_taken_while_writing_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    save = Image.Image.save

    def save_while_another_does(image: Image.Image, *args: object, **options: object) -> None:
        save(image, *args, **options)  # type: ignore[arg-type]
        path.write_text("other")

    monkeypatch.setattr(Image.Image, "save", save_while_another_does)
    with pytest.raises(FileExistsError):
        images.save_image(gradient(), path)

    assert path.read_text() == "other"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("taken", [False, True])
def test_without_hard_links_the_name_is_claimed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError(95, "operation not supported")

    path = tmp_path / "a.png"
    monkeypatch.setattr(os, "link", refuse)
    if taken:
        path.write_text("precious")
        with pytest.raises(FileExistsError):
            images.save_image(gradient(), path)
        assert path.read_text() == "precious"
    else:
        images.save_image(gradient(), path)
        assert images.read_image(path).size == (7, 5)

    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError(28, "No space left on device")])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_save_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, overwrite: bool
) -> None:
    def write_half(image: Image.Image, file: object, *_: object, **__: object) -> None:
        file.write(b"\x89PNG half a picture")  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(Image.Image, "save", write_half)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        images.save_image(gradient(), tmp_path / "a.png", overwrite=overwrite)

    assert list(tmp_path.iterdir()) == []


def test_the_name_shows_nothing_until_the_file_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"

    with whole_file.whole_file(path, overwrite=False) as file:
        file.write(b"first half")
        file.flush()
        assert not path.exists()
        file.write(b", second half")

    assert path.read_bytes() == b"first half, second half"


def test_an_error_names_the_file_not_its_hidden_stand_in(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "a.png"

    with pytest.raises(FileNotFoundError) as caught:
        images.save_image(gradient(), path)

    assert caught.value.filename == str(path)


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_a_picture_has_the_mode_any_new_file_has(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()

    images.save_image(gradient(), tmp_path / "a.png")

    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("orientation", range(10))
def test_a_picture_is_turned_like_pillow_turns_it(orientation: int) -> None:
    image = gradient().convert("RGB")
    image.getexif()[ExifTags.Base.Orientation] = orientation
    expected = ImageOps.exif_transpose(image)

    turned = images.upright(image)

    assert np.array_equal(np.asarray(turned), np.asarray(expected))
    assert np.array_equal(np.asarray(images.upright(turned)), np.asarray(expected))  # once


def test_a_file_name_that_is_no_text_costs_no_picture(tmp_path: Path) -> None:
    for name in ("x.png", "x.jpg", "x.webp"):
        images.save_image(gradient().convert("RGB"), tmp_path / name, text={"parameters": "Model: caf\udce9"})

        assert images.read_image(tmp_path / name).size == gradient().size


@pytest.mark.parametrize("damage", [(b"Exif\0\0MM", b"Exif\0\0XX"), (b"Exif\0\0MM", b"Exif\0\0MX")])
def test_exif_that_cannot_be_read_is_left_alone(tmp_path: Path, damage: tuple[bytes, bytes]) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif.endian = ">"
    stream = io.BytesIO()
    Image.new("RGB", (128, 64), "red").save(stream, "JPEG", exif=exif.tobytes())
    assert damage[0] in stream.getvalue()
    (tmp_path / "x.jpg").write_bytes(stream.getvalue().replace(*damage))

    image = images.read_image(tmp_path / "x.jpg")

    assert image.size == (128, 64)
    assert "exif" not in image.info
    assert images.upright(image).size == (128, 64)
    assert images.from_pil(image, 128, 64).shape == (1, 3, 64, 128)
