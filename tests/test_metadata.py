"""What a picture file says about its making."""

import json
import re
from dataclasses import replace

import pytest
import torch

from l2p_lowvram import __version__
from l2p_lowvram.metadata import (
    InitImage,
    RunSettings,
    parameters_text,
    run_record,
    text_entries,
)

IDENTITY = {"file": "l2p_int8.safetensors", "bytes": 123, "header_sha256": "0123456789abcdef" * 4, "family": "1K"}
SETTINGS = RunSettings(
    prompt="a red fox",
    negative_prompt="",
    width=1024,
    height=768,
    steps=30,
    cfg_scale=2.0,
    shift=3.0,
    sigmas=None,
    seed=42,
    init_image=None,
    dtype="bfloat16",
    device="cpu",
    noise_device="cpu",
    bf16_timestep=False,
    compute="int8",
)


def a1111_pairs(text: str) -> dict[str, str]:
    """The last line, read with the pattern A1111 uses (modules/infotext_utils.py)."""
    pattern = r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)'
    return {
        name: json.loads(value) if value.startswith('"') else value
        for name, value in re.findall(pattern, text.split("\n")[-1])
    }


def test_the_parameters_read_as_a1111_writes_them() -> None:
    settings = replace(SETTINGS, negative_prompt="blurry")

    assert parameters_text(settings, IDENTITY) == (
        "a red fox\n"
        "Negative prompt: blurry\n"
        "Steps: 30, Sampler: Euler, CFG scale: 2, Seed: 42, Size: 1024x768, Model hash: 0123456789, "
        f"Model: l2p_int8, Shift: 3, Version: l2p_lowvram {__version__}"
    )


def test_without_a_negative_prompt_there_is_no_line_for_it() -> None:
    lines = parameters_text(SETTINGS, IDENTITY).split("\n")

    assert lines[0] == "a red fox"
    assert lines[1].startswith("Steps: 30, ")
    assert len(lines) == 2


def test_values_that_would_end_a_pair_early_are_quoted() -> None:
    identity = {**IDENTITY, "file": 'my "best", model: 2.safetensors'}

    text = parameters_text(SETTINGS, identity)

    assert r'Model: "my \"best\", model: 2", ' in text
    assert a1111_pairs(text)["Model"] == 'my "best", model: 2'
    assert a1111_pairs(text)["Size"] == "1024x768"


def test_numbers_keep_their_fraction() -> None:
    assert "CFG scale: 1.75, " in parameters_text(replace(SETTINGS, cfg_scale=1.75), IDENTITY)


def test_img2img_says_how_far_it_departed() -> None:
    settings = replace(SETTINGS, init_image=InitImage("photo.jpg", "ab" * 32, 0.5))

    assert a1111_pairs(parameters_text(settings, IDENTITY))["Denoising strength"] == "0.5"
    assert run_record(settings, IDENTITY)["strength"] == 0.5
    assert run_record(settings, IDENTITY)["image"] == {"name": "photo.jpg", "sha256": "ab" * 32}


def test_own_sigmas_take_the_place_of_the_shift() -> None:
    settings = replace(SETTINGS, steps=2, shift=None, sigmas=(1.0, 0.5))

    record = run_record(settings, IDENTITY)

    assert "Shift" not in a1111_pairs(parameters_text(settings, IDENTITY))
    assert (record["steps"], record["shift"], record["sigmas"]) == (2, None, [1.0, 0.5])


def test_the_record_holds_what_it_takes_to_repeat_the_run() -> None:
    record = json.loads(text_entries(SETTINGS.with_seed(7), IDENTITY)["L2P"])

    python = record["versions"].pop("python")
    assert re.fullmatch(r"3\.\d+\..+", python)
    assert record == {
        "record_version": 1,
        "prompt": "a red fox",
        "negative_prompt": "",
        "width": 1024,
        "height": 768,
        "steps": 30,
        "cfg_scale": 2.0,
        "shift": 3.0,
        "sigmas": None,
        "strength": None,
        "image": None,
        "sampler": "euler",
        "dtype": "bfloat16",
        "device": "cpu",
        "noise_device": "cpu",
        "bf16_timestep": False,
        "compute": "int8",
        "seed": 7,
        "model": IDENTITY,
        "versions": {"l2p_lowvram": __version__, "torch": str(torch.__version__)},
    }


def test_the_record_is_plain_ascii_in_any_language() -> None:
    entries = text_entries(replace(SETTINGS, prompt="ein Fuchs, 狐 🦊"), IDENTITY)

    assert entries["L2P"].isascii()
    assert json.loads(entries["L2P"])["prompt"] == "ein Fuchs, 狐 🦊"
    assert entries["parameters"].startswith("ein Fuchs, 狐 🦊\n")


@pytest.mark.parametrize("field", [field for field in RunSettings.__dataclass_fields__ if field != "init_image"])
def test_every_setting_is_in_the_record(field: str) -> None:
    assert field in run_record(SETTINGS, IDENTITY)
