"""The embedded demo: its world, its training, and pictures through the real path."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from l2p_lowvram import L2PPipeline
from l2p_lowvram.demo import train
from l2p_lowvram.demo.export import export
from l2p_lowvram.demo.judge import agreement, judge
from l2p_lowvram.demo.muon import Muon, orthogonalised
from l2p_lowvram.demo.scenes import COLOURS, POSITIONS, SHAPES, SIZES, Scene, covers, draw_scenes, phrase, render
from l2p_lowvram.images import from_pil, read_image
from l2p_lowvram.layout import read_layout
from l2p_lowvram.repository import DEMO_FOLDER
from l2p_lowvram.tokenizer_file import read_tokenizer
from offload import Checkpoint


def test_a_phrase_names_all_that_is_not_assumed():
    rng = random.Random(0)
    for scene in draw_scenes(rng, 300):
        words = phrase(scene, rng).lower().replace(",", " ").replace(":", " ").split()
        assert {scene.shape, scene.colour, scene.background, "background"} <= set(words)
        assert scene.size in words or scene.size == "medium"
        assert scene.position in words or scene.position == "center"


@pytest.mark.parametrize(("width", "height"), [(128, 128), (192, 128), (96, 160)])
def test_the_judge_reads_true_pictures_at_any_size(width: int, height: int):
    scenes = draw_scenes(random.Random(1), 60)

    judged = [judge(picture) for picture in render(scenes, width, height, torch.Generator().manual_seed(0))]

    assert min(agreement(scenes, judged).values()) >= 0.98


def test_the_judge_sees_what_is_wrong():
    right = Scene("circle", "red", "blue", "large", "left")
    for change in (
        {"shape": "square"},
        {"colour": "green"},
        {"background": "white"},
        {"size": "small"},
        {"position": "top"},
    ):
        other = Scene(**{**right.__dict__, **change})
        seen = judge(render([other], 128, 128)[0])
        assert seen == other != right
    assert judge(torch.zeros(3, 128, 128)) is None


@pytest.fixture
def small_run(tmp_path: Path, monkeypatch) -> Path:
    """A run folder with the shipped tokenizer and an untrained encoder; a recipe of four tiny steps."""
    from safetensors.torch import save_file

    run = tmp_path / "run"
    run.mkdir()
    (run / train.TOKENIZER_FILE).write_bytes((DEMO_FOLDER / "tokenizer" / "tokenizer.json").read_bytes())
    torch.manual_seed(0)
    save_file(train.TextEncoder(train.ENCODER).state_dict(), run / train.ENCODER_FILE)
    monkeypatch.setattr(train, "MODEL", replace(train.MODEL, dim=64, n_heads=2, n_layers=1, ffn_dim=64))
    monkeypatch.setattr("l2p_lowvram.demo.export.MODEL", train.MODEL)
    sizes, rates = ((32, 48, 2),), (1e-3, 1e-4)
    stages = (
        train.Stage(1, sizes, rates),
        train.Stage(2, sizes, decoder_rate=rates, window=32, restart=True),
        train.Stage(1, sizes, rates, rates, window=32),
    )
    monkeypatch.setattr(train, "RECIPE", stages)
    return run


def test_training_that_was_interrupted_ends_with_the_same_bits(small_run: Path, monkeypatch):
    from safetensors.torch import load_file

    class Stopped(Exception):
        pass

    def stop_before_the_third(run, features, stage, step):
        if step == 2:
            raise Stopped
        return loss(run, features, stage, step)

    loss = train.training_loss
    train.train(small_run, seed=1, save_every=1)
    straight = load_file(small_run / train.STATE_FILE)
    (small_run / train.STATE_FILE).unlink()

    monkeypatch.setattr(train, "training_loss", stop_before_the_third)
    with pytest.raises(Stopped):
        train.train(small_run, seed=1, save_every=1)
    monkeypatch.setattr(train, "training_loss", loss)
    train.train(small_run, seed=1, save_every=1)

    resumed = load_file(small_run / train.STATE_FILE)
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_windows_cut_tokens_and_pixels_in_the_same_place():
    cover = covers(draw_scenes(random.Random(3), 8), 128, 96)
    tokens = torch.arange(8 * 48.0).view(8, 1, 6, 8)
    pixels = tokens.repeat_interleave(16, 2).repeat_interleave(16, 3)

    places = train.draw_windows(cover, 4, random.Random(0))

    seen = train.cut(tokens, places, 4, 1)
    assert torch.equal(train.cut(pixels, places, 4, 16), seen.repeat_interleave(16, 2).repeat_interleave(16, 3))
    assert (train.cut(cover, places, 4, 16)[1::2].amax((1, 2, 3)) > 0.5).all()  # every second one is on the figure


def test_a_part_whose_rate_is_zero_rests(small_run: Path):
    features = train.prepare_text(small_run, seed=1)
    run = train.Run(small_run, seed=1)
    before = {name: p.detach().clone() for name, p in run.parameters.items()}
    stage = train.Stage(1, ((32, 32, 4),), decoder_rate=(1e-3, 1e-3), window=32)

    run.advance(train.training_loss(run, features, stage, 0), 0.0, 1e-3)

    moved = {name for name, p in run.parameters.items() if not torch.equal(p, before[name])}
    assert moved
    assert {train.trained_by(name, before[name]) for name in moved} == {"decoder"}


def test_a_new_decoder_sees_the_plan_and_the_pixels(small_run: Path):
    run = train.Run(small_run, seed=1)
    decoder = run.model.local_decoder
    pixels, tokens = torch.randn(2, 3, 32, 48), torch.randn(2, train.MODEL.dim, 2, 3)
    seen = {}
    decoder.bottleneck[0].register_forward_hook(lambda _module, _inputs, out: seen.update(plan=out.clone()))
    decoder.enc1.register_forward_hook(lambda _module, _inputs, out: seen.update(pixels=out))

    decoder(pixels, tokens)

    wanted = run.sketch(tokens.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)[:, -6:]
    torch.testing.assert_close(seen["plan"][:, 64:70], wanted)
    torch.testing.assert_close(seen["pixels"][:, 0:6:2] - seen["pixels"][:, 1:6:2], 0.5 * pixels)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (3, 16, 16)])
def test_muon_steps_are_nearly_orthogonal(shape: tuple[int, ...]):
    torch.manual_seed(0)

    values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)))

    assert values.min() > 0.3
    assert values.max() < 1.3


def test_muon_takes_a_fused_projection_as_three():
    torch.manual_seed(0)
    parts = [torch.nn.Parameter(torch.randn(16, 16)) for _ in range(3)]
    fused = torch.nn.Parameter(torch.cat([p.detach() for p in parts]))
    for part in parts:
        part.grad = torch.randn(16, 16)
    fused.grad = torch.cat([p.grad for p in parts if p.grad is not None])

    Muon([*parts, fused], lr=0.1).step()

    torch.testing.assert_close(fused.detach(), torch.cat([p.detach() for p in parts]))


def test_an_exported_run_is_a_model_folder_that_runs(small_run: Path, tmp_path: Path):
    train.train(small_run, seed=1, save_every=10)
    export(small_run, tmp_path / "model")

    pipe = L2PPipeline.from_pretrained(tmp_path / "model", dtype="fp32")
    out = pipe("a red circle", seed=1, width=32, height=32, num_inference_steps=1, output_type="pt")

    assert out.images.isfinite().all()
    with Checkpoint.open(tmp_path / "model") as checkpoint:
        quantized = read_layout(checkpoint).quantized
    assert "layers.0.attention.qkv" in quantized


def test_the_shipped_model_is_small_and_in_the_real_formats():
    files = {str(path.relative_to(DEMO_FOLDER)) for path in DEMO_FOLDER.rglob("*") if path.is_file()}
    assert files == {
        "model.safetensors",
        "l2p.json",
        "text_encoder/model.safetensors",
        "text_encoder/config.json",
        "tokenizer/tokenizer.json",
    }
    assert sum((DEMO_FOLDER / file).stat().st_size for file in files) <= 16_000_000
    with Checkpoint.open(DEMO_FOLDER) as checkpoint:
        layout = read_layout(checkpoint)
    assert (layout.prefix, layout.naming) == ("model.diffusion_model.", "comfyui")
    assert len(layout.quantized) == 5 * layout.config.n_layers


def test_the_shipped_tokenizer_knows_the_template_and_any_text():
    tokenizer = read_tokenizer(DEMO_FOLDER / "tokenizer" / "tokenizer.json")

    empty = tokenizer("")
    strange = tokenizer("größe 猫 🙂 <|im_end|>")

    assert len(empty) == 8
    assert max(strange) < train.VOCABULARY


SCENES = [
    ("a large red circle on a blue background, left", 128, Scene("circle", "red", "blue", "large", "left")),
    ("white background with a black square at the bottom", 128, Scene("square", "black", "white", "medium", "bottom")),
    ("on the right: green triangle, orange background", 192, Scene("triangle", "green", "orange", "medium", "right")),
    ("a small yellow ring on a purple background, top", 256, Scene("ring", "yellow", "purple", "small", "top")),
]


@pytest.mark.parametrize(("prompt", "size", "scene"), SCENES, ids=[prompt for prompt, _, _ in SCENES])
def test_generate_paints_what_the_prompt_says(tmp_path: Path, prompt: str, size: int, scene: Scene):
    """Command line to PNG, INT8 weights, default settings. A picture may miss; of three, most must not."""
    target = tmp_path / "x_{seed}.png"
    command = [sys.executable, "-m", "l2p_lowvram", "generate", "--model", "demo", "-p", prompt]
    command += ["-W", str(size), "-H", str(size), "--seed", "1", "2", "3", "-o", str(target)]

    done = subprocess.run(command, capture_output=True, text=True, timeout=600)

    assert done.returncode == 0, done.stderr
    paths = done.stdout.split()
    assert paths == [str(tmp_path / f"x_{seed}.png") for seed in (1, 2, 3)]
    judged = [judge(from_pil(read_image(Path(path)), size, size)[0]) for path in paths]
    for field in ("background", "colour", "position", "shape"):
        hits = sum(seen is not None and getattr(seen, field) == getattr(scene, field) for seen in judged)
        assert hits >= 2, f"{field}: {judged}"


def test_the_command_line_and_the_api_give_the_same_picture(tmp_path: Path):
    target = tmp_path / "x.png"
    prompt = "a large red circle on a blue background, left"
    command = [sys.executable, "-m", "l2p_lowvram", "generate", "-p", prompt, "--seed", "5", "--json"]
    command += ["-o", str(target)]
    # One thread, as here: sums are split by thread, which moves a value in a hundred thousand by one.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert "embedded demo model" in done.stderr

    pipe = L2PPipeline.from_pretrained("demo")
    again = pipe(prompt, seed=report["images"][0]["seed"]).images[0]

    assert read_image(target).tobytes() == again.tobytes()


def test_the_grammar_has_the_documented_words():
    assert set(COLOURS) == {"red", "green", "blue", "yellow", "purple", "orange", "white", "black"}
    assert set(SHAPES) == {"circle", "square", "triangle", "ring"}
    assert set(SIZES) == {"small", "medium", "large"}
    assert set(POSITIONS) == {"left", "right", "top", "bottom", "center"}
