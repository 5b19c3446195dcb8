"""Device profiles: a table with sources, files, and the machine at hand."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from l2p_lowvram import cli, devices, profiles
from l2p_lowvram.profiles import ANY_CARD, PROFILES, DeviceProfile, as_json, choose_profile, find_profile


def test_every_profile_in_the_table_has_a_source_and_its_own_name() -> None:
    assert all(profile.name == name and profile.source for name, profile in PROFILES.items())
    assert {"rtx3060-12g", "rtx4060-laptop-8g", "rtx4090"} <= PROFILES.keys()


def test_the_machine_at_hand_is_measured_and_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "here.json"

    assert cli.main(["profile", "--device", "cpu", "--dtype", "fp32", "-o", str(path), "--json"]) == 0

    profile = find_profile(str(path))
    assert json.loads(capsys.readouterr().out) == json.loads(path.read_text()) == json.loads(as_json(profile))
    assert profile.is_cpu
    assert profile.flops > 1e9
    monkeypatch.setattr(profiles, "measure_here", lambda *_: pytest.fail("measured for nothing"))
    assert cli.main(["profile", "--device", "cpu", "-o", str(path)]) == 2
    assert "here.json: exists already; give --overwrite or another --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no device profile"),
        ("[]", "is no device profile"),
        ('{"name": "x"}', r"is no device profile \(it lacks disk\)"),
        ("[" * 60_000, r"is no device profile \(it is nested too deeply\)"),
        (" " * 70_000, "it is larger than the 65536 bytes that none needs"),
        (as_json(PROFILES["rtx4090"]).replace('"link"', r'"\u001b[31m"'), r"unknown entry '\\x1b\[31m'"),
        (as_json(PROFILES["rtx4090"]).replace('"rtx4090"', r'"\u001b[31m"'), r"one line of text, got '\\x1b\[31m'"),
        (as_json(PROFILES["rtx4090"]).replace('"rtx4090"', "7"), "one line of text, got 7"),
        (as_json(PROFILES["rtx4090"]).replace('"source": "', '"source": 3, "x": "'), "has the unknown entry 'x'"),
        (as_json(PROFILES["rtx4090"]).replace('"bf16"', '"int4"'), "dtype of a device profile must be bf16"),
        (
            as_json(PROFILES["rtx4090"]).replace('"memory": ', '"memory": -'),
            "memory of a device profile must be a positive",
        ),
    ],
)
def test_a_file_that_is_no_profile_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.json").write_text(text)

    with pytest.raises(ValueError, match=message) as refused:
        find_profile(str(tmp_path / "p.json"))

    assert str(refused.value).isprintable()


def test_an_unknown_profile_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown device profile 'rtx9999'; known are gtx1660-6g"):
        find_profile("rtx9999")


def test_impossible_figures_are_refused() -> None:
    with pytest.raises(ValueError, match="flops of a device profile must be a positive number, got 0"):
        DeviceProfile("x", 1, 0, None, 1.0, "fp32", "")


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, "bf16"), (False, "fp32")])
def test_without_a_name_plans_are_for_the_dtype_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, dtype: str
) -> None:
    monkeypatch.setattr(devices, "computes_bf16", lambda device: has_bf16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert choose_profile(None, vram=None, dtype="auto").dtype == dtype
    assert choose_profile(None, vram=None, dtype="fp16").dtype == "fp16"
    assert choose_profile(None, vram=1 << 30, dtype="auto") == ANY_CARD


def test_without_a_name_plans_are_for_the_memory_of_the_card_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(profiles, "available_device_bytes", lambda device: 6 << 30)
    monkeypatch.setattr(profiles, "choose_device", torch.device)
    monkeypatch.setattr(profiles, "choose_dtype", lambda dtype, device: torch.float16)
    monkeypatch.setattr(profiles, "context_bytes", lambda device, dtype: 700 << 20)

    profile = choose_profile(None, vram=None, dtype="auto")

    assert (profile.memory, profile.dtype, profile.is_cpu) == (6 << 30, "fp16", False)
    assert profile.context == 700 << 20


def test_a_profile_of_an_earlier_version_has_the_usual_context(tmp_path: Path) -> None:
    values = {key: value for key, value in asdict(ANY_CARD).items() if key != "context"}
    path = tmp_path / "old.json"
    path.write_text(json.dumps(values))

    assert find_profile(str(path)) == ANY_CARD
