"""`plan`: the numbers of the run itself, from headers alone; and what the pipeline does with its slices."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from l2p_lowvram import L2PPipeline, cli, linear, pipeline, profiles, streaming
from l2p_lowvram import tilings as tilings_module
from l2p_lowvram.estimates import default_vram
from l2p_lowvram.families import PUBLISHED
from l2p_lowvram.planning import make_plan
from l2p_lowvram.profiles import ANY_CARD, ANY_CPU
from l2p_lowvram.repository import locate_model
from l2p_lowvram.streamed_encoder import StreamedTextEncoder
from l2p_lowvram.streaming import MemoryOptions, PhaseDemand, Streamer
from l2p_lowvram.tilings import PictureWork, device_activations, tilings
from offload import BlockCost, Budget, Rates, ResidencyPlan
from offload.memory import ProcessMemory, process_memory
from tests import goldens
from tests.test_streaming import FAST, PROMPT

ASKED = {"width": None, "height": None, "steps": 4, "cfg_scale": None, "pictures": 1}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return goldens.write_checkpoint("a_mini", tmp_path)


def test_the_plan_names_the_bytes_that_the_run_then_takes(model: Path) -> None:
    ram = process_memory().anonymous + (600 << 20)
    plan = make_plan(locate_model(model), ANY_CPU, MemoryOptions(ram=ram), {**ASKED, "width": 64, "height": 32})

    with L2PPipeline.from_pretrained(model, device="cpu", dtype="fp32", ram=ram) as pipe:
        pipe(**PROMPT, **FAST)
        (figures,) = pipe.phases

    assert plan.fits
    assert plan.phases[0].host_bytes == figures.planned_bytes
    assert plan.tiers == figures.tiers
    assert plan.slots == figures.slots


def test_without_a_budget_a_card_is_planned_with_what_a_run_would_take_there(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module in (profiles, streaming):
        monkeypatch.setattr(module, "available_device_bytes", lambda _: 6 << 30)
    monkeypatch.setattr(profiles, "choose_device", torch.device)
    monkeypatch.setattr(profiles, "choose_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(profiles, "context_bytes", lambda *_: 700 << 20)
    budgets = []
    original = streaming.plan_residency

    def noted(blocks: list[BlockCost], rates: Rates, budget: Budget, **named: int | None) -> ResidencyPlan:
        budgets.append(budget.device)
        return original(blocks, rates, budget, **named)

    monkeypatch.setattr(streaming, "plan_residency", noted)
    files, profile = locate_model(model), profiles.choose_profile(None, vram=None, dtype="auto")

    make_plan(files, profile, MemoryOptions(), {**ASKED, "width": 64, "height": 32})
    (planned,) = set(budgets)
    Streamer(torch.device("cuda"), context_bytes=700 << 20).plan(PhaseDemand("run", [], {}, activations=0), None)

    assert planned == budgets[-1] == default_vram(6 << 30, 700 << 20)


def test_a_card_is_planned_for_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "-m", "demo", "-W", "4096", "-H", "4096", "--device-profile", "rtx4060-laptop-8g"]

    assert cli.main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out

    assert {"fits", "peak_device_bytes", "peak_host_bytes", "seconds_per_step", "phases"} <= plan.keys()
    assert plan["fits"]
    assert 0 < plan["peak_device_bytes"] <= 8 << 30
    assert plan["phases"][0]["name"] == "text encoder"
    assert plan["seconds_per_step"] == pytest.approx(sum(p["seconds"] for p in plan["phases"] if "step" in p["name"]))
    assert "demo" not in text
    assert "fits" in text.splitlines()[0]


def test_what_does_not_fit_names_the_smallest_budget_and_the_largest_size(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # By name: with the context of a card at hand it has nothing to do.
    named = ["plan", "-m", "demo", "--device-profile", "rtx4060-laptop-8g", "--json"]

    def planned(width: int, height: int, vram: str) -> int:
        return cli.main([*named, "-W", str(width), "-H", str(height), "--vram", vram])

    assert planned(8192, 4096, "750MiB") == 2
    plan = json.loads(capsys.readouterr().out)
    width, height = plan["largest_size"]
    smallest = plan["smallest_budget"]

    assert not plan["fits"]
    assert 0 < width < 8192
    assert abs(width / height - 2) < 0.2
    assert planned(width, height, "750MiB") == 0
    assert planned(8192, 4096, str(smallest)) == 0
    assert planned(8192, 4096, str(smallest - 1)) == 2


def test_too_little_host_memory_for_a_card_does_not_fit_either(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "process_memory", lambda: ProcessMemory(300 << 20, 0, 0, 0))
    arguments = ["plan", "-m", "demo", "-W", "256", "-H", "256", "--vram", "4GiB", "--device-profile", "rtx3060-12g"]

    assert cli.main([*arguments, "--ram", "20MiB", "--json"]) == 2
    plan = json.loads(capsys.readouterr().out)

    assert "RAM budget 20.00 MiB is too small" in plan["reason"]
    assert plan["peak_device_bytes"] == 0
    assert cli.main([*arguments, "--ram", str(plan["smallest_budget"])]) == 0


def test_a_text_encoder_that_does_not_fit_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def demand(self: StreamedTextEncoder, lengths: list[int]) -> PhaseDemand:
        return PhaseDemand("text encoder", [], {}, activations=3 << 30)

    monkeypatch.setattr(StreamedTextEncoder, "demand", demand)
    plan = make_plan(locate_model("demo"), ANY_CARD, MemoryOptions(vram=3 << 30), {**ASKED, "width": 64, "height": 64})

    assert not plan.fits
    assert plan.reason is not None
    assert plan.reason.startswith("text encoder: ")
    assert plan.smallest_budget == plan.peak_device_bytes > 3 << 30


@pytest.mark.parametrize("compute", ["auto", "int8"])
def test_a_file_without_int8_layers_is_planned_without_int8(tmp_path: Path, compute: str) -> None:
    asked = {**ASKED, "width": 64, "height": 64}
    path = goldens.write_checkpoint("a_mini", tmp_path)

    plans = [make_plan(locate_model(path), ANY_CARD, MemoryOptions(), asked, name) for name in ("dequant", compute)]

    assert plans[0] == plans[1]


def test_the_prediction_reads_no_weight(model: Path) -> None:
    size = model.stat().st_size
    with model.open("r+b") as file:  # everything behind the header is gone, but for the file's length
        header = 8 + int.from_bytes(file.read(8), "little")
        file.truncate(header)
        file.truncate(size)

    assert make_plan(locate_model(model), ANY_CARD, MemoryOptions(), {**ASKED, "width": 64, "height": 32}).fits


def test_slices_are_the_same_for_every_budget_that_holds_the_first_choice(model: Path) -> None:
    plans = [
        make_plan(locate_model(model), ANY_CARD, MemoryOptions(vram=vram << 30), {**ASKED, "width": 512, "height": 512})
        for vram in (2, 3, 8, 24)
    ]

    assert {(plan.slices, plan.slice_level, plan.notes) for plan in plans} == {(plans[0].slices, 0, ())}


@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("family", PUBLISHED)
def test_smaller_slices_take_less_memory_at_every_size(family: str, on_cpu: bool) -> None:
    config = PUBLISHED[family]
    side = config.defaults.width
    work = PictureWork(side, side, 1, True, 64, torch.bfloat16, on_cpu=on_cpu)

    bytes_by_level = [device_activations(config, work, t) for t in tilings(config, work)]

    assert len(bytes_by_level) > 3
    assert bytes_by_level == sorted(bytes_by_level, reverse=True)


def test_running_out_of_memory_halves_the_slices_and_redoes_the_step(model: Path, monkeypatch) -> None:
    """The second step fails twice; what the first one made stays, and the picture is that of smaller slices."""
    monkeypatch.setattr(linear, "CPU_SLICE_BYTES", 1 << 20)
    fail_at, calls = {3, 4}, []
    decode = pipeline.decode_tiled

    def run_out(*arguments) -> None:
        calls.append(arguments[1])
        if len(calls) in fail_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        decode(*arguments)

    with L2PPipeline.from_pretrained(model, device="cpu", dtype="fp32") as pipe:
        expected = pipe(**PROMPT, **FAST).images
        steps: list[int] = []
        monkeypatch.setattr(pipeline, "decode_tiled", run_out)
        found = pipe(**PROMPT, **FAST, callback_on_step_end=lambda pipe, step, *_: steps.append(step)).images
        warnings = pipe.warnings

    assert steps == [0, 1, 2]  # each done once, none twice
    assert len(calls) == 3 * 2 + len(fail_at)
    assert [w.partition(";")[0] for w in warnings] == ["out of memory in step 2"] * 2
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_running_out_of_memory_with_the_smallest_slices_is_told(model: Path, monkeypatch) -> None:
    def run_out(*_) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with L2PPipeline.from_pretrained(model, device="cpu", dtype="fp32") as pipe:
        monkeypatch.setattr(pipeline, "decode_tiled", run_out)
        with pytest.raises(torch.OutOfMemoryError):
            pipe(**PROMPT, **FAST)


CARD_WORK = PictureWork(1024, 1024, 1, True, 64, torch.bfloat16)
SAME_SLICES = [{}, {"guided": False}, {"pictures": 3}, {"caption_tokens": 32}, {"caption_tokens": 512}, {"int8": True}]


@pytest.mark.parametrize("side", [256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_card_slices_follow_from_size_and_dtype_alone(side: int, dtype: torch.dtype) -> None:
    """What else a call has may not change a picture's bits, nor what multiplies the plan."""
    work = replace(CARD_WORK, width=side, height=side, dtype=dtype)

    chosen = [list(tilings(PUBLISHED["1k"], replace(work, **changes))) for changes in SAME_SLICES]

    assert all(tiling == chosen[0] for tiling in chosen)
    assert all(30 % tiling.sizes.heads == 0 for tiling in chosen[0])


@pytest.mark.parametrize(("family", "side"), [("1k", 512), ("1k", 1024), ("1k", 4096), ("4k", 4096), ("10k", 10240)])
@pytest.mark.parametrize("changes", SAME_SLICES)
def test_more_heads_take_no_more_memory(family: str, side: int, changes: dict[str, Any]) -> None:
    config, work = PUBLISHED[family], replace(CARD_WORK, width=side, height=side, **changes)
    more = list(tilings(config, work))

    with patch.object(tilings_module, "_with_more_heads", lambda config, works, tiling: tiling):
        fewer = list(tilings(config, work))

    assert any(a.sizes.heads > b.sizes.heads for a, b in zip(more, fewer, strict=True))
    for a, b in zip(more, fewer, strict=True):
        assert device_activations(config, work, a) <= device_activations(config, work, b)


def test_tiny_slices_draw_the_same_picture(monkeypatch) -> None:
    """The demo at a size of several tiles, through the real pipeline, tiled small against whole."""
    with L2PPipeline.from_pretrained("demo", device="cpu", dtype="fp32", compute="dequant") as pipe:
        choices = list(tilings(pipe.config, pipe.work(512, 384, 1, 2.0, 32)))
        pictures = []
        for tiling in (choices[0], choices[-1]):
            small = replace(tiling, sizes=replace(tiling.sizes, tokens=96, queries=64, heads=1, keys=80))
            chosen = tiling if tiling is choices[0] else small
            open_ = pipe.weights.open
            monkeypatch.setattr(pipe.weights, "open", lambda work, open_=open_, chosen=chosen: (open_(work), chosen)[1])
            pictures.append(
                pipe("a red ring", seed=3, width=512, height=384, num_inference_steps=2, output_type="pt").images
            )
            monkeypatch.undo()

    torch.testing.assert_close(pictures[0], pictures[1], atol=2e-4, rtol=0)
