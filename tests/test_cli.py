"""The command line around a pipeline that only draws noise: what is refused, printed, written, returned."""

import argparse
import errno
import hashlib
import inspect
import io
import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from l2p_lowvram import __version__, cli, images, order, user_input
from l2p_lowvram import generate as generate_module
from l2p_lowvram.cli import main
from l2p_lowvram.compute import Compute
from l2p_lowvram.config import DecoderConfig, DecoderLevel, ModelConfig, SamplingDefaults
from l2p_lowvram.errors import NonFiniteError, is_out_of_memory
from l2p_lowvram.estimates import CONTEXT_BYTES
from l2p_lowvram.model import L2PTransformer
from l2p_lowvram.profiles import ANY_CPU
from l2p_lowvram.report import PhaseFigures
from l2p_lowvram.streaming import MemoryOptions
from l2p_lowvram.whole_file import refused_by_windows, whole_file
from offload import BudgetError, CheckpointError, MemoryWatch, process_memory

BLOCKS = 4
CONFIG = ModelConfig(
    patch_size=16,
    dim=32,
    n_heads=1,
    n_layers=1,
    n_noise_refiner=1,
    n_context_refiner=1,
    ffn_dim=32,
    caption_dim=8,
    timestep_hidden=8,
    rope_axes=(8, 12, 12),
    decoder=DecoderConfig((DecoderLevel("1", 4, 4, 4),), 4),
    defaults=SamplingDefaults(width=48, height=32, steps=3, cfg_scale=2.0, shift=3.0),
)


class FakePipeline:
    """Stands in for L2PPipeline: remembers how it was called and draws noise from the seed."""

    last: "FakePipeline"
    load_error: BaseException | None = None
    encode_error: BaseException | None = None
    draw_error: BaseException | None = None
    plan_error: BaseException | None = None
    has_text_encoder = True
    loads = 0

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        self.model, self.options = model, options
        self.config, self.device = CONFIG, torch.device("cpu")
        self.dtype = options["dtype"] or torch.float32
        self.compute = Compute("dequant", None, "as planned")
        self.identity = {"file": "fake.safetensors", "bytes": 1, "header_sha256": "ab" * 32, "family": "1K"}
        self.warnings: tuple[str, ...] = ()
        self.on_progress: Any = None
        self.planned: list[list[str]] = []
        self.prompt_encoder = types.SimpleNamespace() if self.has_text_encoder else None
        self.memory, self.phases, self.fallbacks = MemoryOptions(ram=options["ram"]), [], []
        self.closed = False
        self.encoded: list[str] = []
        self.calls: list[dict[str, Any]] = []

    @classmethod
    def from_pretrained(cls, model: str, **options: Any) -> "FakePipeline":
        cls.loads += 1
        if cls.load_error is not None:
            raise cls.load_error
        cls.last = cls(model, options)
        return cls.last

    def close(self) -> None:
        self.closed = True

    def work(self, *arguments: Any) -> tuple[Any, ...]:
        return arguments

    def caption_tokens(self, prompts: list[str]) -> int:
        return max(map(len, prompts))

    def describe_plan(self, work: Any, prompts: list[str]) -> str:
        self.planned.append(prompts)
        if self.plan_error is not None:
            raise self.plan_error
        return "slices as given"

    def encode_prompts(self, prompts: list[str]) -> list[torch.Tensor]:
        if self.encode_error is not None:
            raise self.encode_error
        self.encoded += prompts
        for layer in range(2):
            self.on_progress("text encoder", layer + 1, 2)
        return [torch.ones(3, 8) for _ in prompts]

    def __call__(self, **options: Any) -> types.SimpleNamespace:
        self.calls.append(options)
        if self.draw_error is not None:
            raise self.draw_error
        generator = torch.Generator().manual_seed(options["seed"])
        pixels = torch.rand(1, 3, options["height"], options["width"], generator=generator) * 2 - 1
        steps = options["num_inference_steps"] or len(options["sigmas"])
        for step in range(steps):
            for block in range(BLOCKS):
                self.on_progress("denoise", block + 1, BLOCKS)
            tensors = {"latents": pixels, "denoised": pixels}
            options["callback_on_step_end"](self, step, 0.5, tensors)
        return types.SimpleNamespace(
            images=images.to_pil(pixels), seeds=[options["seed"]], seconds={"denoise": 0.5}, interrupted=False
        )


@pytest.fixture(autouse=True)
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[FakePipeline]:
    """The command line with a pipeline of its own, in an empty folder, without the user's environment."""
    fresh = type("FreshPipeline", (FakePipeline,), {})
    module = types.ModuleType("l2p_lowvram.pipeline")
    module.L2PPipeline = fresh  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "l2p_lowvram.pipeline", module)
    monkeypatch.delenv("L2P_MODEL", raising=False)
    monkeypatch.delenv("L2P_CACHE_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    return fresh


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """`generate` with a model and a prompt: exit code, stdout, stderr."""
    code = main(["generate", "-m", "model.safetensors", "-p", "a fox", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a call that must exit with 2, in one line, before anything is written."""
    before = sorted(Path().iterdir())
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert sorted(Path().iterdir()) == before
    lines = err.splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1].removeprefix("error: ")


def text_of(path: str) -> dict[str, str]:
    with Image.open(path) as image:
        return dict(image.text)  # type: ignore[attr-defined]


def generate_options() -> list[argparse.Action]:
    (commands,) = [a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return list(commands.choices["generate"]._actions)


# what comes out


def test_one_picture_its_path_on_stdout_and_a_summary_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--seed", "7")

    assert (code, out) == (0, "l2p_7.png\n")
    assert images.read_image(Path("l2p_7.png")).size == (48, 32)
    summary = err.splitlines()[-1]
    assert summary.startswith("1 picture in ")
    assert "0.167 s/step, peak memory " in summary
    assert [path.name for path in Path().iterdir()] == ["l2p_7.png"]


def test_the_pipeline_gets_features_and_settings_once(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline]
) -> None:
    code, _, _ = run(
        capsys,
        *("-n", "blurry", "-W", "64", "-H", "16", "--steps", "2", "--cfg-scale", "1.5", "--shift", "2"),
        *("--seed", "1", "2", "--dtype", "fp32", "--device", "cpu", "--bf16-timestep"),
        *("--compute", "int8"),
        *("--vram", "6GiB", "--ram", "500MB", "--pin", "0", "--io", "direct", "--slots", "4"),
    )

    pipe = pipeline.last
    assert code == 0
    assert pipeline.loads == 1
    assert pipe.model == "model.safetensors"
    assert pipe.options == {
        "text_encoder": None,
        "tokenizer": None,
        "device": "cpu",
        "dtype": "fp32",
        "prompt_cache": True,
        "bf16_timestep": True,
        "compute": "int8",
        "vram": 6 << 30,
        "ram": 500_000_000,
        "pin": 0,
        "io": "direct",
        "slots": 4,
    }
    assert pipe.encoded == ["a fox", "blurry"]
    assert pipe.planned == [["a fox", "blurry"]]
    assert [call["seed"] for call in pipe.calls] == [1, 2]
    call = pipe.calls[0]
    assert (call["width"], call["height"], call["num_inference_steps"]) == (64, 16, 2)
    assert (call["cfg_scale"], call["shift"], call["sigmas"]) == (1.5, 2.0, None)
    assert (call["noise_device"], call["image"]) == ("cpu", None)
    assert call["prompt_embeds"].shape == call["negative_prompt_embeds"].shape == (3, 8)
    assert pipe.on_progress is None


def test_the_models_defaults_fill_in_what_is_not_said(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline]
) -> None:
    run(capsys)

    call = pipeline.last.calls[0]
    assert (call["width"], call["height"], call["num_inference_steps"]) == (48, 32, 3)
    assert (call["cfg_scale"], call["shift"]) == (2.0, 3.0)


def test_without_guidance_no_negative_prompt_is_encoded_and_that_is_said(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline]
) -> None:
    code, _, err = run(capsys, "--cfg-scale", "1", "-n", "blurry")

    assert code == 0
    assert pipeline.last.encoded == ["a fox"]
    assert pipeline.last.calls[0]["negative_prompt_embeds"] is None
    assert "warning: the negative prompt has no effect at --cfg-scale 1" in err


def test_own_sigmas_are_the_whole_schedule(capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline]) -> None:
    code, _, _ = run(capsys, "--sigmas", "1", "0.5", "--seed", "1")

    call = pipeline.last.calls[0]
    assert code == 0
    assert (call["num_inference_steps"], call["shift"], call["sigmas"]) == (None, None, (1.0, 0.5))
    record = json.loads(text_of("l2p_1.png")["L2P"])
    assert (record["steps"], record["sigmas"], record["shift"]) == (2, [1.0, 0.5], None)


def test_several_seeds_make_a_picture_each_and_each_path_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--seed", "5", "3", "9", "-o", "p_{index}_{seed}.png")

    assert (code, out.splitlines()) == (0, ["p_0_5.png", "p_1_3.png", "p_2_9.png"])
    assert "seed 5 3 9" in err
    assert "3 pictures in " in err


def test_count_goes_up_from_one_seed(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "--seed", "41", "--count", "2")

    assert out.splitlines() == ["l2p_41.png", "l2p_42.png"]


@pytest.mark.parametrize("seed", [[], ["--seed", "-1"]])
def test_random_seeds_are_printed_and_count_up_too(capsys: pytest.CaptureFixture[str], seed: list[str]) -> None:
    _, out, err = run(capsys, "--count", "2", "-o", "{seed}.png", *seed)

    first, second = (int(Path(line).stem) for line in out.splitlines())
    assert second == first + 1
    assert f"seed {first} {second}" in err


def test_each_picture_tells_its_own_seed(capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "--seed", "1", "2")

    for seed in (1, 2):
        text = text_of(f"l2p_{seed}.png")
        assert text["parameters"].startswith(
            f"a fox\nSteps: 3, Sampler: Euler, CFG scale: 2, Seed: {seed}, Size: 48x32"
        )
        assert json.loads(text["L2P"])["seed"] == seed


def test_no_metadata_embeds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "--no-metadata", "--seed", "1")

    assert text_of("l2p_1.png") == {}


def test_quality_reaches_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    for quality in ("10", "100"):
        assert run(capsys, "-o", f"{quality}.jpg", "--quality", quality, "--seed", "1")[0] == 0

    assert Path("10.jpg").stat().st_size < Path("100.jpg").stat().st_size


def test_braces_in_a_name_are_only_braces(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "--seed", "1", "-o", "{seed.__class__}_{0}_{seed}.png")

    assert out == "{seed.__class__}_{0}_1.png\n"


def test_json_is_one_object_instead_of_paths(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--json", "--seed", "4", "5", "-n", "blurry")

    result = json.loads(out)
    assert code == 0
    assert result["images"] == [
        {"path": f"l2p_{seed}.png", "seed": seed, "index": index, "width": 48, "height": 32}
        for index, seed in enumerate((4, 5))
    ]
    assert (result["prompt"], result["negative_prompt"]) == ("a fox", "blurry")
    assert result["settings"]["steps"] == 3
    assert "seed" not in result["settings"]
    assert result["model"]["file"] == "fake.safetensors"
    assert set(result["seconds"]) == {"load", "text encoder", "denoise", "save", "total"}
    assert result["seconds"]["denoise"] == 1.0
    assert result["peak_rss_bytes"] > 10_000_000
    assert result["peak_device_bytes"] is None
    assert result["warnings"] == []


def test_a_report_is_the_json_in_a_file_and_replaces_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "-o", "a.png", "--json", "--report", "report.json")

    assert code == 0
    report = json.loads(Path("report.json").read_text())
    assert report == json.loads(out)
    assert report["memory"]["peak_anonymous_bytes"] > 10_000_000
    assert refused(capsys, "-o", "b.png", "--report", "report.json").startswith("--report report.json: exists already")
    assert "there is no folder nowhere" in refused(capsys, "-o", "b.png", "--report", "nowhere/report.json")


def test_the_pipeline_is_closed_however_the_run_ends(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline]
) -> None:
    run(capsys, "-o", "a.png")
    assert pipeline.last.closed

    pipeline.draw_error = CheckpointError("model.safetensors", "was modified since it was opened")
    run(capsys, "-o", "b.png")
    assert pipeline.last.closed


def test_a_budget_that_is_too_small_is_refused_before_the_prompt_is_encoded(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline]
) -> None:
    pipeline.plan_error = BudgetError("RAM budget 1.00 MiB is too small", 2)

    assert refused(capsys, "-o", "a.png").startswith("RAM budget 1.00 MiB is too small")
    assert pipeline.last.encoded == []


@pytest.mark.parametrize(("ram", "code"), [("1MiB", 5), ("1TiB", 0)])
def test_a_broken_budget_is_an_exit_code_where_that_is_asked_for(
    capsys: pytest.CaptureFixture[str], ram: str, code: int
) -> None:
    """The pipeline here plans nothing; the process itself is larger than a MiB."""
    assert run(capsys, "-o", "a.png", "--ram", ram, "--strict-budget")[0] == code
    assert run(capsys, "-o", "b.png", "--ram", ram)[0] == 0


def test_the_demo_model_is_announced_in_one_line_with_the_way_out(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline]
) -> None:
    assert main(["generate", "-p", "a fox", "--json", "--quiet"]) == 0

    out, err = capsys.readouterr()
    assert pipeline.last.model == "demo"
    assert len(err.splitlines()) == 1
    for part in ("demo model", "--model", "L2P_MODEL"):
        assert part in err
    assert json.loads(out)["warnings"] == [err.strip()]


def test_asking_for_the_demo_model_is_not_announced(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline]
) -> None:
    assert main(["generate", "-m", "demo", "-p", "a fox", "-q"]) == 0

    assert capsys.readouterr().err == ""
    assert pipeline.last.model == "demo"


def test_the_environment_names_model_and_cache(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("L2P_MODEL", "mine.safetensors")
    monkeypatch.setenv("L2P_CACHE_DIR", "cache")

    assert main(["generate", "-p", "a fox"]) == 0

    assert "demo" not in capsys.readouterr().err
    assert pipeline.last.model == "mine.safetensors"
    assert pipeline.last.options["prompt_cache"] == Path("cache/prompts")


def test_the_option_wins_over_the_environment(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("L2P_MODEL", "mine.safetensors")
    monkeypatch.setenv("L2P_CACHE_DIR", "cache")

    run(capsys, "--no-prompt-cache")

    assert pipeline.last.model == "model.safetensors"
    assert pipeline.last.options["prompt_cache"] is None


def test_quiet_leaves_only_the_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "-q", "--seed", "1") == (0, "l2p_1.png\n", "")


def test_the_bar_shows_seconds_per_step_and_the_block(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("l2p_lowvram.progress._LOG_SECONDS", 0.0)

    _, _, err = run(capsys, "--seed", "1", "2")

    assert "text encoder" in err
    assert "picture 1/2: " in err
    assert "picture 2/2: 100%" in err
    assert "s/step, block 4/4]" in err
    assert "3/3 [" in err


def test_the_models_warnings_reach_stderr_and_json(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = pipeline.from_pretrained

    def load_with_warning(model: str, **options: Any) -> FakePipeline:
        pipe = load(model, **options)
        pipe.warnings = ("shift is a guess",)
        return pipe

    monkeypatch.setattr(pipeline, "from_pretrained", load_with_warning)
    _, out, err = run(capsys, "--json", "-q")

    assert err == "warning: shift is a guess\n"
    assert json.loads(out)["warnings"] == ["shift is a guess"]


def test_the_real_pipeline_takes_what_the_command_gives(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(capsys, "--seed", "1")
    monkeypatch.delitem(sys.modules, "l2p_lowvram.pipeline")
    from l2p_lowvram.pipeline import L2PPipeline

    # bind raises TypeError for a name that is not there.
    inspect.signature(L2PPipeline.from_pretrained).bind("model", **pipeline.last.options)
    inspect.signature(L2PPipeline.__call__).bind(None, **pipeline.last.calls[0])
    with torch.device("meta"):
        model = L2PTransformer(CONFIG)
    used = {"on_progress", "prompt_encoder", "identity", "warnings", "phases", "memory", "fallbacks"}
    assert used | {"compute", "describe_plan", "caption_tokens"} <= set(dir(L2PPipeline(model)))


# prompts


def set_stdin(monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))


def test_the_prompt_comes_from_a_file_or_standard_input(
    pipeline: type[FakePipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = "\ufeffein Füchslein\nim Schnee \r\n".encode()
    Path("prompt.txt").write_bytes(raw)

    for arguments in (["-p", "-"], ["--prompt-file", "prompt.txt"], ["--prompt-file", "-"]):
        set_stdin(monkeypatch, raw)
        assert main(["generate", "-q", *arguments]) == 0

        assert pipeline.last.encoded[0] == "ein Füchslein\nim Schnee "


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b" \n", "error: {place}: the prompt is empty"),
        (b"caf\xe9 au lait", "error: {place}: the prompt is not UTF-8 text (invalid continuation byte)"),
        ("ü".encode() * 40_000, "error: {place}: the prompt is longer than 65536 bytes; the encoder reads 512 tokens"),
    ],
)
def test_a_text_that_is_no_prompt_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, raw: bytes, message: str
) -> None:
    Path("prompt.txt").write_bytes(raw)
    set_stdin(monkeypatch, raw)

    for argument, place in (("-", "standard input"), ("prompt.txt", "prompt.txt")):
        assert main(["generate", "-m", "m", "--prompt-file", argument]) == 2
        assert capsys.readouterr().err.startswith(message.format(place=place))


def test_a_missing_prompt_file_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt-file", "none.txt"]) == 2
    assert capsys.readouterr().err == "error: none.txt: no such file or directory\n"


def test_an_argument_that_is_no_text_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-p", "caf\udce9"]) == 2
    assert capsys.readouterr().err.startswith("error: prompt is not valid text in this locale")


# bad options: all before the model is opened


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "x"], "argument --steps: invalid whole number value: 'x'; see l2p-lowvram generate --help"),
        (["--steps", "0"], "argument --steps: must be a whole number from 1 to 65536, got 0; see"),
        (["--cfg-scale", "nan"], "argument --cfg-scale: must be a finite number, got nan; see"),
        (["--quality", "101"], "argument --quality: must be a whole number from 1 to 100, got 101; see"),
        (["--dtype", "int4"], "argument --dtype: invalid choice: 'int4'"),
        (["--step", "3"], "unrecognized arguments: --step 3; see l2p-lowvram --help"),
        (["--prompt-file", "x"], "argument --prompt-file: not allowed with argument -p/--prompt; see"),
        (["--seed", "1", "2", "--count", "2"], "--count 2 counts up from a single seed, got 2 seeds"),
        (["--seed", "-2"], "seed must lie in 0 to 9223372036854775807 (or be -1 for a random one), got -2"),
        (["--seed", str(2**63 - 1), "--count", "2"], "seed must lie in 0 to 9223372036854775807"),
        (["--count", "2", "-o", "a.png"], "--output a.png is one name for 2 pictures; put {seed} or {index} into it"),
        (["--seed", "1", "1"], "two pictures would be written to l2p_1.png; put {index} into the name"),
        (["--sigmas", "1", "--steps", "3"], "--sigmas says everything about the schedule; leave out --steps"),
        (["--sigmas", "1", "--shift", "3"], "--sigmas says everything about the schedule; leave out --shift"),
        (["--strength", "0.5"], "--strength says how far to depart from --image; there is no --image"),
        (["--quality", "90"], "--quality is for JPEG and WebP, l2p_{seed}.png is lossless"),
        (["-o", "a.gif"], "a.gif: the file name must end in .png, .jpg, .jpeg, .webp, got '.gif'"),
        (["-o", "a"], "a: the file name must end in .png, .jpg, .jpeg, .webp, got none"),
        (["-o", "none/a.png"], "none/a.png: there is no folder none; make it first"),
        (["-o", "taken.png"], "taken.png: exists already; give --overwrite or another --output"),
        (["-o", "folder.png"], "folder.png: is a folder; name a file in it"),
        (["-o", "folder.png", "--overwrite"], "folder.png: is a folder; name a file in it"),
        (["--seed", "7", "3", "-o", "old_{seed}.png"], "old_3.png: exists already"),
        (["-i", "none.png"], "none.png: no such file or directory"),
        (["-i", "folder.png"], "folder.png: is a directory"),
        (["-i", "taken.png"], "taken.png: not a picture in PNG, JPEG, WEBP, BMP, GIF, TIFF format"),
        (["--text-encoder", "none"], "--text-encoder none: no such file or folder"),
        (["--tokenizer", "none"], "--tokenizer none: no such file or folder"),
        (["--preview", "none/a.png"], "--preview none/a.png: there is no folder none; make it first"),
        (["--preview", "none/steps"], "--preview none/steps: there is no folder none; make it first"),
        (["--preview", "l2p_1.png", "--seed", "1"], "l2p_1.png: is named by both --preview and --output"),
        (["--preview", "taken"], "taken: is no folder; give another --preview"),
        (["--vram", "much"], "argument --vram: cannot read 'much' as a size; write 6GiB"),
        (["--io", "tape"], "argument --io: invalid choice: 'tape'"),
        (["--report", "none/a.json"], "--report none/a.json: there is no folder none; make it first"),
        (["--report", "taken"], "--report taken: exists already; give --overwrite or another name"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline], arguments: list[str], message: str
) -> None:
    for name in ("taken.png", "old_3.png", "taken"):
        Path(name).write_text("precious")
    Path("folder.png").mkdir()

    assert refused(capsys, *arguments).startswith(message)
    assert pipeline.loads == 0
    assert Path("taken.png").read_text() == "precious"


@pytest.mark.parametrize("arguments", [["generate"], []])
def test_a_missing_argument_is_one_line_too(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith("error: ")
    assert "--help" in err


def test_a_dangling_link_counts_as_an_existing_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("link.png").symlink_to("nowhere.png")

    assert "exists already" in refused(capsys, "-o", "link.png")


@pytest.mark.parametrize("option", ["--output", "--preview"])
def test_a_folder_that_cannot_be_written_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    Path("locked").mkdir()
    allowed = os.access
    # Not chmod: the superuser may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and allowed(path, mode))

    assert "not writable" in refused(capsys, option, "locked" if option == "--preview" else "locked/a.png")


def test_overwrite_replaces(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.png").write_text("old")

    assert run(capsys, "-o", "a.png", "--overwrite")[0] == 0
    assert images.read_image(Path("a.png")).size == (48, 32)


# refused once the model is known


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-W", "50"], "width must be a multiple of 16 pixels for this model, got 50; nearest are 48 and 64"),
        (["-W", "64", "-H", "8"], "height must be a multiple of 16 pixels for this model, got 8; the smallest is 16"),
        (["-W", "32768", "-o", "a.webp"], "a.webp: WEBP holds at most 16383 pixels a side, the picture has 32768x32"),
        (["--shift", "-1"], "shift must be positive, got -1.0"),
        (["--sigmas", "0.5", "1"], "sigmas must descend, got [0.5, 1.0]"),
        (["--sigmas", "2"], "sigmas must lie in (0, 1]"),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_the_prompt_is_encoded(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline], arguments: list[str], message: str
) -> None:
    assert refused(capsys, *arguments).startswith(message)
    assert pipeline.last.encoded == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (CheckpointError("m.safetensors", "the header\nlies"), "m.safetensors: the header lies"),
        (BudgetError("budget 1 GiB is too small"), "budget 1 GiB is too small"),
        (
            FileNotFoundError(2, "No such file or directory", "M.safetensors"),
            "M.safetensors: no such file or directory",
        ),
        (FileNotFoundError("M: no such model"), "M: no such model"),
        (PermissionError(13, "Permission denied", "m"), "m: permission denied"),
    ],
)
@pytest.mark.parametrize("stage", ["load_error", "encode_error"])
def test_files_that_cannot_be_used_are_one_line(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline], stage: str, error: Exception, message: str
) -> None:
    setattr(pipeline, stage, error)

    assert refused(capsys) == message


def test_a_model_without_a_text_encoder_names_the_options(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline]
) -> None:
    pipeline.has_text_encoder = False

    assert refused(capsys) == ("model.safetensors: has no text encoder; name one with --text-encoder and --tokenizer")


def test_a_checkpoint_found_out_while_denoising_is_still_input(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline]
) -> None:
    pipeline.draw_error = CheckpointError("m", "was cut short meanwhile")

    assert refused(capsys) == "m: was cut short meanwhile"


def raise_from(module: str) -> None:
    """A plain ValueError whose innermost frame belongs to `module`."""
    exec("raise ValueError('from in there')", {"__name__": module})


def test_weights_that_cannot_be_read_while_drawing_are_one_line(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline]
) -> None:
    told = "no direct reads on this file system; use --io read"
    pipeline.draw_error = OSError(errno.EINVAL, told, "model.safetensors")

    assert refused(capsys, "--io", "direct") == f"model.safetensors: {told}"


def test_an_error_of_the_system_about_no_file_keeps_its_traceback(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline]
) -> None:
    pipeline.draw_error = OSError(errno.EMFILE, "Too many open files")

    with pytest.raises(OSError, match="Too many open files"):
        run(capsys)


@pytest.mark.parametrize("module", ["l2p_lowvram.text", "offload.header", "tiling.spans"])
def test_our_own_value_errors_about_input_are_input(module: str) -> None:
    with pytest.raises(user_input.InputError, match="from in there"), user_input.user_input():
        raise_from(module)


@pytest.mark.parametrize("module", ["torch.nn.functional", "PIL.Image", "l2p_lowvram_fork"])
def test_value_errors_of_libraries_stay_what_they_are(module: str) -> None:
    with pytest.raises(ValueError, match="from in there") as caught, user_input.user_input():
        raise_from(module)

    assert type(caught.value) is ValueError


def test_while_computing_a_plain_value_error_is_a_bug() -> None:
    with pytest.raises(ValueError, match="from in there") as caught, user_input.refusals():
        raise_from("l2p_lowvram.model")

    assert type(caught.value) is ValueError


@pytest.mark.parametrize("error", [ValueError("shapes differ"), RuntimeError("kernel failed"), KeyError("x")])
@pytest.mark.parametrize("stage", ["load_error", "encode_error", "draw_error"])
def test_bugs_keep_their_traceback(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline], stage: str, error: Exception
) -> None:
    setattr(pipeline, stage, error)

    with pytest.raises(type(error)) as caught:
        run(capsys)

    assert caught.value is error


@pytest.mark.parametrize("stage", ["encode_error", "draw_error"])
def test_nan_in_the_sample_exits_with_3(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline], stage: str
) -> None:
    setattr(pipeline, stage, NonFiniteError("local decoder", 2, 30, hint="try dtype fp32"))

    code, out, err = run(capsys)

    assert (code, out) == (3, "")
    assert err.splitlines()[-1] == ("error: non-finite value in step 3 of 30, in the local decoder; try dtype fp32")
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["python", "device", "RAM"],
)
def test_running_out_of_memory_exits_with_4_in_one_line(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline], error: Exception
) -> None:
    pipeline.draw_error = error

    code, out, err = run(capsys)

    assert (code, out) == (4, "")
    assert err.splitlines()[-1].startswith("error: out of memory; try a smaller --width")


def test_a_real_allocation_that_fails_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)

    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


# Ctrl-C and full disks


@pytest.mark.parametrize("stage", ["load_error", "encode_error", "draw_error"])
def test_ctrl_c_exits_with_130_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline], stage: str
) -> None:
    setattr(pipeline, stage, KeyboardInterrupt())

    code, out, err = run(capsys)

    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
    assert list(Path().iterdir()) == []


def fail_second_save(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    save, saves = Image.Image.save, iter(range(9))

    def save_or_fail(image: Image.Image, file: Any, *args: Any, **options: Any) -> None:
        if next(saves) == 0:
            return save(image, file, *args, **options)
        file.write(b"\x89PNG half")
        raise error

    monkeypatch.setattr(Image.Image, "save", save_or_fail)


def test_ctrl_c_while_saving_keeps_whole_pictures_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_second_save(monkeypatch, KeyboardInterrupt())

    code, out, err = run(capsys, "--seed", "1", "2", "3")

    assert (code, out) == (130, "l2p_1.png\n")
    assert err.splitlines()[-2:] == ["1 of 3 pictures written", "interrupted"]
    assert [path.name for path in Path().iterdir()] == ["l2p_1.png"]


def test_a_full_disk_is_one_line_and_leaves_whole_pictures_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_second_save(monkeypatch, OSError(28, "No space left on device"))

    code, out, err = run(capsys, "--seed", "1", "2")

    assert (code, out) == (2, "l2p_1.png\n")
    assert err.splitlines()[-1] == "error: l2p_2.png: no space left on device"
    assert [path.name for path in Path().iterdir()] == ["l2p_1.png"]


# img2img and previews


def test_an_init_image_sets_the_size_and_is_recorded(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline]
) -> None:
    Image.new("RGB", (64, 80), "red").save("photo.png")

    code, _, err = run(capsys, "-i", "photo.png", "--strength", "0.25", "--seed", "1")

    call = pipeline.last.calls[0]
    assert code == 0
    assert (call["width"], call["height"], call["strength"]) == (64, 80, 0.25)
    assert call["image"].size == (64, 80)
    assert "stretched" not in err
    record = json.loads(text_of("l2p_1.png")["L2P"])
    assert record["strength"] == 0.25
    assert record["image"]["name"] == "photo.png"
    assert len(record["image"]["sha256"]) == 64
    assert "Denoising strength: 0.25" in text_of("l2p_1.png")["parameters"]


def test_stretching_an_init_image_is_said(capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline]) -> None:
    Image.new("RGB", (64, 80)).save("photo.png")

    _, _, err = run(capsys, "-i", "photo.png", "-W", "32", "-H", "48")

    assert "warning: the init image is 64x80, stretched to 32x48" in err
    assert pipeline.last.calls[0]["strength"] == order.DEFAULT_STRENGTH


@pytest.mark.parametrize("strength", ["0", "1.5"])
def test_a_strength_outside_its_range_is_refused(capsys: pytest.CaptureFixture[str], strength: str) -> None:
    Image.new("RGB", (64, 80)).save("photo.png")

    message = refused(capsys, "-i", "photo.png", "--strength", strength)

    assert message == f"strength must lie in (0, 1], got {float(strength)}"


def test_previews_in_a_folder_are_one_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "--seed", "1", "2", "--steps", "2", "--preview", "steps")

    names = sorted(path.name for path in Path("steps").iterdir())
    assert names == ["1_step_001.png", "1_step_002.png", "2_step_001.png", "2_step_002.png"]
    assert out.splitlines() == ["l2p_1.png", "l2p_2.png"]
    preview, final = (np.asarray(images.read_image(Path(p))) for p in ("steps/1_step_002.png", "l2p_1.png"))
    assert np.array_equal(preview, final)


def test_a_preview_file_is_replaced_each_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--preview", "now.jpg", "--seed", "1")[0] == 0

    assert sorted(path.name for path in Path().iterdir()) == ["l2p_1.png", "now.jpg"]
    assert images.read_image(Path("now.jpg")).size == (48, 32)


def test_previews_replace_nothing_that_was_there_before(capsys: pytest.CaptureFixture[str]) -> None:
    Path("now.jpg").write_text("precious")
    Path("steps").mkdir()
    Path("steps/1_step_001.png").write_text("precious")

    assert refused(capsys, "--preview", "now.jpg") == (
        "--preview now.jpg: exists already; give --overwrite or another name"
    )
    told = refused(capsys, "--preview", "steps", "--seed", "2", "1")
    assert told == "steps/1_step_001.png: exists already; give --overwrite or another --preview folder"
    assert run(capsys, "--preview", "steps", "--seed", "1", "--overwrite")[0] == 0
    assert images.read_image(Path("steps/1_step_001.png")).size == (48, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--report", "l2p_1.png"], "l2p_1.png: is named by both --report and --output"),
        (["--report", "p.png", "--preview", "p.png"], "p.png: is named by both --report and --preview"),
        (["--report", "given.png"], "--report given.png: is read, as --image says; give another name"),
        (["--preview", "link.png"], "--preview link.png: is read, as --image says; give another name"),
        (["--report", "model.safetensors"], "--report model.safetensors: is read, as --model says; give another name"),
        (
            ["-m", "folder", "--report", "folder/x.json"],
            "--report folder/x.json: is read, as --model says; give another name",
        ),
        (["--report", "to_output.json"], "to_output.json: is named by both --report and --output"),
        (
            ["--preview", "p", "-o", "p/1_step_001.png"],
            "p/1_step_001.png: is a name that --preview p gives; give another",
        ),
        (["-o", "loop.png"], "loop.png: is a link that leads round in circles"),
    ],
)
def test_nothing_is_written_over_what_is_read_or_written(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    Image.new("RGB", (48, 32)).save("given.png")
    Path("link.png").symlink_to("given.png")
    Path("model.safetensors").write_text("weights")
    Path("folder").mkdir()
    Path("folder/x.json").write_text("read")
    Path("p").mkdir()
    Path("to_output.json").symlink_to("l2p_1.png")
    Path("loop.png").symlink_to("loop.png")

    assert refused(capsys, "--seed", "1", "-i", "given.png", "--overwrite", *arguments).startswith(message)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
@pytest.mark.parametrize("option", ["--output", "--report", "--preview"])
def test_what_is_no_file_is_never_replaced(capsys: pytest.CaptureFixture[str], option: str) -> None:
    os.mkfifo("pipe.png")

    assert refused(capsys, option, "pipe.png", "--overwrite") == "pipe.png: is no regular file; name another"
    assert Path("pipe.png").is_fifo()


def test_a_link_that_may_be_overwritten_stays_one(capsys: pytest.CaptureFixture[str]) -> None:
    Path("elsewhere").mkdir()
    Path("elsewhere/target.png").write_text("old")
    Path("link.png").symlink_to("elsewhere/target.png")

    assert run(capsys, "-o", "link.png", "--overwrite")[0] == 0

    assert Path("link.png").is_symlink()
    assert images.read_image(Path("elsewhere/target.png")).size == (48, 32)
    assert [path.name for path in Path("elsewhere").iterdir()] == ["target.png"]


def test_a_picture_whose_folder_is_gone_is_kept_elsewhere(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = pipeline.__call__
    Path("gone").mkdir()
    Path("x.png").write_text("precious")

    def remove_the_folder(self: FakePipeline, **options: Any) -> types.SimpleNamespace:
        Path("gone").rmdir()
        return draw(self, **options)

    monkeypatch.setattr(pipeline, "__call__", remove_the_folder)

    code, out, err = run(capsys, "-o", "gone/x.png", "--overwrite")

    there = Path.cwd() / "x-1.png"
    assert (code, out) == (2, f"{there}\n")
    assert f"warning: gone/x.png: no such file or directory; the picture is in {there}" in err
    assert images.read_image(there).size == (48, 32)
    assert Path("x.png").read_text() == "precious"


def test_a_folder_for_previews_is_not_made_for_what_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "--preview", "steps", "-W", "65")  # and `refused` sees that nothing is left

    assert run(capsys, "--preview", "steps", "--seed", "1")[0] == 0
    assert len(list(Path("steps").iterdir())) == 3


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer/tokenizer.json", "text_encoder/model.safetensors", "l2p.json"]
)
def test_what_is_read_beside_a_model_file_is_not_overwritten_either(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    Path("m", name).parent.mkdir(parents=True)
    Path("m", name).write_text("precious")
    arguments = ["-m", "m/model.safetensors", "--report", f"m/{name}", "--overwrite"]

    assert cli.main(["generate", "-p", "a fox", *arguments]) == 2
    assert "is read, as --model says" in capsys.readouterr().err
    assert cli.main(["profile", "-m", "m/model.safetensors", "-o", f"m/{name}", "--overwrite"]) == 2
    assert "belongs to the --model" in capsys.readouterr().err
    assert Path("m", name).read_text() == "precious"


@pytest.mark.parametrize("option", ["--model", "--image", "--preview", "--report", "--output", "--tokenizer"])
def test_an_empty_name_is_refused(capsys: pytest.CaptureFixture[str], option: str) -> None:
    """As an unset variable of the shell leaves it."""
    assert cli.main(["generate", "-p", "a fox", option, ""]) == 2
    assert capsys.readouterr().err == f"error: {option} is empty; name a file or folder\n"
    assert cli.main(["inspect", ""]) == 2
    assert capsys.readouterr().err == "error: FILE is empty; name a file or folder\n"
    assert cli.main(["quantize", "in.safetensors", ""]) == 2
    assert "OUT: is empty; name a file or folder" in capsys.readouterr().err


def test_an_init_image_is_held_in_the_size_of_the_picture(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline]
) -> None:
    Image.new("RGB", (480, 320), "teal").save("large.png")

    assert run(capsys, "-i", "large.png", "-W", "48", "-H", "32")[0] == 0

    assert pipeline.last.calls[0]["image"].size == (48, 32)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_while_torch_is_imported_ends_the_program(tmp_path: Path, name: str, code: int) -> None:
    """torch imports numpy from C++, where what a signal raises is thrown away."""
    script = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.endswith("core.multiarray") and name.startswith("numpy."):
            sys.meta_path.remove(self)  # once: torch goes on without, and Python imports numpy again
            os.kill(os.getpid(), signal.{name})
sys.meta_path.insert(0, Finder())
from l2p_lowvram import cli
sys.argv = "l2p generate -q -p x --steps 1 -W 32 -H 32 -o".split() + [{str(tmp_path / "x.png")!r}]
cli.entry()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)

    assert done.returncode == code, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_taken_meanwhile_costs_no_picture(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = pipeline.__call__

    def take_the_name(self: FakePipeline, **options: Any) -> types.SimpleNamespace:
        Path("x.png").write_text("another's")
        Path("x-1.png").mkdir()
        return draw(self, **options)

    monkeypatch.setattr(pipeline, "__call__", take_the_name)

    code, out, err = run(capsys, "-o", "x.png")

    assert (code, out) == (0, "x-2.png\n")
    assert "warning: x.png was made by another program meanwhile; the picture is in x-2.png" in err
    assert Path("x.png").read_text() == "another's"
    assert images.read_image(Path("x-2.png")).size == (48, 32)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "KeyboardInterrupt"),
        (OSError(28, "No space left on device"), 2, "l2p_2.png: no space left on device"),
    ],
)
def test_finished_pictures_are_reported_even_if_a_later_one_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, told: str
) -> None:
    fail_second_save(monkeypatch, error)

    found, out, _ = run(capsys, "--seed", "1", "2", "3", "--json", "--report", "r.json")

    assert found == code
    for report in (json.loads(out), json.loads(Path("r.json").read_text())):
        assert [image["path"] for image in report["images"]] == ["l2p_1.png"]
        assert report["error"] == told


def test_a_report_that_cannot_be_written_does_not_cost_the_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "r.json")

    monkeypatch.setattr(generate_module, "whole_file", full)

    code, out, err = run(capsys, "--seed", "1", "--json", "--report", "r.json")

    assert code == 2
    assert json.loads(out)["images"][0]["path"] == "l2p_1.png"
    assert err.splitlines()[-1] == "error: r.json: no space left on device"


LONG = "a" * 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", f"{LONG}.png"], "file name too long"),
        (["--report", LONG], "file name too long"),
        (["--preview", LONG], "file name too long"),
        (["-i", LONG], "file name too long"),
        (["--tokenizer", LONG], "file name too long"),
        (["--tokenizer", "~nosuchuser/x"], "~nosuchuser/x: there is no such user"),
    ],
)
def test_names_that_no_system_takes_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in refused(capsys, *arguments)


@pytest.mark.parametrize("option", ["--output", "--report", "--preview"])
def test_a_name_that_only_the_system_refuses_is_noticed_before_drawing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    lstat = os.lstat

    def refuse(path: Any, **options: Any) -> os.stat_result:
        if Path(path).name == "odd.png":
            raise OSError(errno.EINVAL, "Invalid argument", str(path))
        return lstat(path, **options)

    # What pathlib makes of it on Windows, and from Python 3.14 on: a name that is free.
    for question in ("exists", "is_dir", "is_file", "is_symlink"):
        asked = getattr(Path, question)
        free = lambda self, asked=asked, **options: self.name != "odd.png" and asked(self, **options)  # noqa: E731
        monkeypatch.setattr(Path, question, free)
    monkeypatch.setattr(os, "lstat", refuse)

    assert refused(capsys, option, "odd.png") == "odd.png: invalid argument"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fox?.png", "it holds ?"),
        ("fox: a <tale>.png", "it holds : < >"),
        ("fox\t.png", "it holds \\t"),
        ("con.png", "con is a device"),
        ("COM1.old.png", "com1 is a device"),
        ("lpt² .png", "lpt² is a device"),
        ("none/NUL.png", "nul is a device"),
    ],
)
def test_names_that_windows_refuses_are_refused_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")

    told = refused(capsys, "-o", name)

    assert told == f"{user_input.printable(name)}: is a name that is refused here: {reason}; give another"


@pytest.mark.parametrize("name", ["r.json.", "r.json ", "NUL", "aux.json"])
def test_a_report_that_windows_would_put_elsewhere_is_refused_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")

    assert "is a name that is refused here" in refused(capsys, "--report", name)


@pytest.mark.parametrize("path", ["C:fox.png", r"C:\a b\fox.png", "COM10.png", "control.png", ".png", "..", r"\\s\d\x"])
def test_names_that_windows_takes_are_not_refused(path: str) -> None:
    assert refused_by_windows(path) is None


def test_a_picture_whose_name_is_refused_when_it_is_saved_gets_a_plain_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = images.save_image
    Path("pictures").mkdir()

    def refuse(image: Image.Image, path: Path, **options: Any) -> None:
        if path.name.startswith("odd"):
            raise OSError(errno.EINVAL, "Invalid argument", str(path))
        save(image, path, **options)

    monkeypatch.setattr(images, "save_image", refuse)

    code, out, err = run(capsys, "-o", "pictures/odd.png", "--seed", "7")

    assert (code, out) == (2, f"{Path('pictures/l2p-7.png')}\n")
    assert "warning: pictures/odd.png: invalid argument; the picture is in pictures/l2p-7.png" in err
    assert images.read_image(Path("pictures/l2p-7.png")).size == (48, 32)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["plan", "-m", "~nosuchuser/x"], "~nosuchuser/x: there is no such user"),
        (["inspect", "~nosuchuser/x"], "~nosuchuser/x: there is no such user"),
        (["quantize", "~nosuchuser/x", "y.safetensors"], "~nosuchuser/x: there is no such user"),
        (["plan", "-m", LONG], "file name too long"),
        (["plan", "--device-profile", "deep.json"], "deep.json: is no device profile"),
    ],
)
def test_other_commands_refuse_odd_names_too(
    capsys: pytest.CaptureFixture[str], command: list[str], message: str
) -> None:
    Path("deep.json").write_text("[" * 60_000)

    assert main(command) == 2

    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["", ".", "taken.txt", "p/x.json"])
def test_a_profile_that_cannot_be_written_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    Path("taken.txt").write_text("precious")
    monkeypatch.setattr("l2p_lowvram.profiles.measure_here", lambda *_: ANY_CPU)

    assert main(["profile", "-o", name]) == 2

    assert capsys.readouterr().err.count("\n") == 1
    assert Path("taken.txt").read_text() == "precious"


def test_the_model_that_is_measured_is_not_replaced_by_its_profile(capsys: pytest.CaptureFixture[str]) -> None:
    Path("m.safetensors").write_text("weights")

    assert main(["profile", "-m", "m.safetensors", "-o", "m.safetensors", "--overwrite"]) == 2

    assert "m.safetensors: belongs to the --model that is to be measured" in capsys.readouterr().err
    assert Path("m.safetensors").read_text() == "weights"


def test_a_preview_that_cannot_be_saved_costs_a_warning_not_the_picture(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = images.save_image

    def save_no_preview(image: Image.Image, path: Path, **options: Any) -> None:
        if path.parent.name == "steps":
            raise OSError(28, "No space left on device", str(path))
        save(image, path, **options)

    monkeypatch.setattr(images, "save_image", save_no_preview)
    code, out, err = run(capsys, "--preview", "steps", "--seed", "1")

    assert (code, out) == (0, "l2p_1.png\n")
    assert err.count("warning: preview stopped, steps/1_step_001.png: no space left on device") == 1


def hold_preview(monkeypatch: pytest.MonkeyPatch, held: set[int]) -> list[int]:
    """now.png cannot be replaced in these steps, as on Windows while a viewer has it open. Returns steps that tried."""
    replace_file, tried = Path.replace, []

    def replace_unless_held(self: Path, target: Path) -> Path:
        if target.name == "now.png":
            tried.append(len(tried) + 1)
            if tried[-1] in held:
                raise PermissionError(errno.EACCES, "Permission denied", str(self), None, str(target))
        return replace_file(self, target)

    monkeypatch.setattr(Path, "replace", replace_unless_held)
    return tried


def test_a_preview_that_a_viewer_has_open_for_an_instant_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = hold_preview(monkeypatch, held={2, 3, 4, 5, 7, 8, 9, 10})

    code, out, err = run(capsys, "--preview", "now.png", "--seed", "1", "--steps", "11")

    assert (code, out) == (0, "l2p_1.png\n")
    assert len(tried) == 11
    assert "warning" not in err
    assert sorted(path.name for path in Path().iterdir()) == ["l2p_1.png", "now.png"]


def test_a_preview_that_stays_open_is_given_up_with_one_warning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = hold_preview(monkeypatch, held=set(range(2, 99)))

    code, out, err = run(capsys, "--preview", "now.png", "--seed", "1", "--steps", "11")

    assert (code, out) == (0, "l2p_1.png\n")
    assert len(tried) == 6
    assert err.count("warning: preview stopped, now.png: permission denied") == 1


def test_a_preview_that_was_never_written_is_given_up_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = hold_preview(monkeypatch, held={1})

    _, _, err = run(capsys, "--preview", "now.png", "--overwrite")

    assert len(tried) == 1
    assert "warning: preview stopped, now.png: permission denied" in err


@pytest.mark.parametrize("name", ["steps.bmp", "steps.gif"])
def test_a_preview_in_a_format_that_is_not_written_is_refused(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, out, err = run(capsys, "--preview", name)

    assert (code, out) == (2, "")
    assert name in err.splitlines()[-1]
    assert not Path(name).exists()


# inspect


def test_inspect_exits_with_2_for_a_refused_file_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    Path("model.ckpt").write_bytes(b"\x80\x04pickle")

    assert main(["inspect", "model.ckpt"]) == 2
    text, err = capsys.readouterr()
    assert main(["inspect", "model.ckpt", "--json"]) == 2
    report = json.loads(capsys.readouterr().out)

    assert text.startswith("model.ckpt: refused\n")
    assert err == ""
    assert not report["accepted"]
    assert "pickle" in report["reason"]


@pytest.mark.parametrize(("accepted", "code"), [(True, 0), (False, 2)])
def test_inspect_prints_the_report_as_text_or_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, accepted: bool, code: int
) -> None:
    report = types.SimpleNamespace(accepted=accepted, as_text=lambda: "text", as_json=lambda: "{}")
    module = types.ModuleType("l2p_lowvram.inspection")
    module.inspect_model = lambda path: report  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "l2p_lowvram.inspection", module)

    assert main(["inspect", "m"]) == code
    assert main(["inspect", "m", "--json"]) == code
    assert capsys.readouterr().out == "text\n{}\n"


# help, version, the process


@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_help_shows_examples_and_exit_codes(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, "--help"]) == 0

    out = capsys.readouterr().out
    assert f"l2p-lowvram {command} " in out.split("examples:")[1]
    assert "exit codes: 0 done; 2 bad option, file, size or budget; 3 " in out


def test_every_option_of_generate_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    actions = generate_options()

    assert len(actions) > 25
    assert [action.option_strings for action in actions if not action.help] == []


def test_the_examples_use_only_options_there_are() -> None:
    known = {option for action in generate_options() for option in action.option_strings}

    words = cli.GENERATE_EPILOG.split("environment:")[0].replace("\\\n", " ").split()
    options = {word for word in words if word.startswith("-") and word != "-"}

    assert len(options) > 8
    assert options <= known


def test_defaults_named_in_help_are_the_real_ones(capsys: pytest.CaptureFixture[str]) -> None:
    main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())

    assert f"1 entirely (default {order.DEFAULT_STRENGTH})" in text
    assert f"for JPEG and WebP (default {images.DEFAULT_QUALITY})" in text
    assert "(default l2p_{seed}.png)" in text


def test_version_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0

    assert capsys.readouterr().out == f"l2p-lowvram {__version__}\n"


def test_the_modules_run_as_a_program() -> None:
    done = python("-m", "l2p_lowvram", "generate", "-p", "x", "--steps", "no")

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: argument --steps")


def test_help_does_not_wait_for_torch() -> None:
    done = python("-c", "import sys; from l2p_lowvram.cli import main; main(['--help']); print('torch' in sys.modules)")

    assert done.stdout.splitlines()[-1] == "False"


def test_a_reader_that_goes_away_stops_nothing() -> None:
    script = (
        "import os, sys; from l2p_lowvram.console import print_line\n"
        "read, write = os.pipe(); os.dup2(write, 1); os.close(write); os.close(read)\n"
        "print_line('a.png'); print_line('b.png'); print('still here', file=sys.stderr)"
    )

    done = python("-c", script)

    assert (done.returncode, done.stderr) == (0, "still here\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device here")
def test_a_full_standard_output_stops_nothing_but_is_told() -> None:
    script = (
        "import os, sys; from l2p_lowvram.console import lost_output, print_line\n"
        "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)\n"
        "print_line('a.png'); print_line('b.png'); print(lost_output(), lost_output(), file=sys.stderr)"
    )

    done = python("-c", script)

    told = "standard output cannot be written to (no space left on device); its lines are lost"
    assert (done.returncode, done.stderr.splitlines()) == (0, [told, "True False"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device here")
@pytest.mark.parametrize("stderr", ["2>/dev/full", "2>&-"])
def test_without_a_standard_error_the_picture_is_made_all_the_same(stderr: str) -> None:
    command = (
        f"{sys.executable} -m l2p_lowvram generate -p x -W 64 -H 64 --steps 1 --seed 1 --no-prompt-cache "
        f"-o {Path.cwd()}/x.png --json {stderr}"
    )

    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)

    assert done.returncode == 0
    assert json.loads(done.stdout)["images"][0]["seed"] == 1
    assert images.read_image(Path("x.png")).size == (64, 64)


def test_closed_descriptors_are_not_given_to_files() -> None:
    script = (
        "import os; os.close(2); os.close(0); from l2p_lowvram.console import open_standard_descriptors\n"
        "open_standard_descriptors(); print(os.open('Makefile', os.O_RDONLY) > 2)"
    )

    assert python("-c", script).stdout == "True\n"


@pytest.mark.parametrize("command", ["generate", "plan", "profile", "quantize", "dequantize", "inspect", "selftest"])
def test_help_is_for_every_terminal(command: str) -> None:
    with pytest.raises(SystemExit):
        cli.build_parser().parse_args([command, "--help"])
    (commands,) = [a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    assert commands.choices[command].format_help().isascii()


def test_a_file_name_in_bytes_is_printed_as_those_bytes() -> None:
    script = "from l2p_lowvram.console import print_line; print_line('caf\\udce9.png')"

    done = subprocess.run([sys.executable, "-X", "utf8", "-c", script], capture_output=True, cwd=ROOT, check=True)

    assert done.stdout == b"caf\xe9.png\n"


ROOT = Path(__file__).resolve().parent.parent


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, check=False, timeout=120
    )


@pytest.fixture
def signals_as_before() -> Iterator[None]:
    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP here")
def test_under_nohup_a_closed_terminal_stays_ignored(monkeypatch: pytest.MonkeyPatch, signals_as_before: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(cli, "main", lambda: 0)

    with pytest.raises(SystemExit):
        cli.entry()

    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.parametrize(
    ("name", "before", "after", "beside"),
    [
        ("OMP_WAIT_POLICY", None, "PASSIVE", "GOMP_SPINCOUNT"),
        ("OMP_WAIT_POLICY", "ACTIVE", "ACTIVE", "THP_MEM_ALLOC_ENABLE"),
        ("GOMP_SPINCOUNT", "7", "7", "THP_MEM_ALLOC_ENABLE"),
        ("THP_MEM_ALLOC_ENABLE", None, "1", None),
        ("THP_MEM_ALLOC_ENABLE", "0", "0", "GOMP_SPINCOUNT"),
    ],
)
def test_libraries_are_told_how_to_wait_and_to_take_huge_pages_unless_the_user_did(
    name: str,
    before: str | None,
    after: str,
    beside: str | None,
    monkeypatch: pytest.MonkeyPatch,
    signals_as_before: None,
) -> None:
    """beside: another variable that is set."""
    environment = {} if before is None else {name: before}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(cli, "main", lambda: 0)

    with pytest.raises(SystemExit):
        cli.entry()

    assert environment[name] == after
    assert beside is None or beside in environment
    assert before in (None, "0") or len(environment) == 2  # nor what goes together with the user's own


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages as Linux has them")
def test_a_command_has_huge_pages(tmp_path: Path) -> None:
    """Told before torch makes its first tensor, which it is too late after."""
    script = (
        "import sys\n"
        "from l2p_lowvram import cli\n"
        "def pages():\n"
        "    import torch\n"
        "    tensor = torch.ones(32 << 20, dtype=torch.uint8)\n"
        "    return sum(int(l.split()[1]) for l in open('/proc/self/smaps') if l.startswith('AnonHugePages'))\n"
        "cli.main = lambda: print(pages())\n"
        "cli.entry()\n"
    )

    def huge(value: str) -> int:
        environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": value}
        if not value:
            del environment["THP_MEM_ALLOC_ENABLE"]
        return int(subprocess.run([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE).stdout)

    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("this system gives huge pages to all or to none")
    assert huge("0") < 16 << 10 <= huge("")  # KiB


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_process_that_is_asked_to_end_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals_as_before: None, name: str, code: int
) -> None:
    if not hasattr(signal, name):
        pytest.skip(f"there is no {name} here")
    signal.signal(getattr(signal, name), signal.SIG_DFL)

    def write_for_ever() -> int:
        with whole_file(tmp_path / "model.safetensors", overwrite=False) as file:
            file.write(b"half")
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(60)
        return 0

    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(cli, "main", write_for_ever)

    with pytest.raises(SystemExit) as ended:
        cli.entry()

    assert ended.value.code == code
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "source", "target"),
    [
        ("--text-encoder", "encoder", "encoder/config.json"),
        ("--tokenizer", "tokenizer.json", "tokenizer.json"),
        ("--prompt-file", "prompt.txt", "prompt.txt"),
        ("--model", "set/model.safetensors.index.json", "set/model-1.safetensors"),
    ],
)
def test_a_report_replaces_nothing_that_is_read(
    capsys: pytest.CaptureFixture[str], option: str, source: str, target: str
) -> None:
    for name in ("encoder/config.json", "tokenizer.json", "prompt.txt", "set/model-1.safetensors", f"set/{source}"):
        Path(name).parent.mkdir(exist_ok=True, parents=True)
        Path(name).write_text("precious")
    prompt = [] if option == "--prompt-file" else ["-p", "a fox"]

    assert cli.main(["generate", *prompt, option, source, "--report", target, "--overwrite", "-q"]) == 2

    message = f"error: --report {target}: is read, as {option} says; give another name\n"
    assert capsys.readouterr().err == message
    assert Path(target).read_text() == "precious"


def test_a_report_under_the_name_of_a_preview_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("p").mkdir()

    message = refused(capsys, "--seed", "1", "--preview", "p", "--report", "p/1_step_001.png")

    assert message == "p/1_step_001.png: is a name that --preview p gives; give another"


MIB = 1 << 20


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"vram": 1024 * MIB + CONTEXT_BYTES, "ram": MIB}, 0),
        ({"vram": 1024 * MIB + CONTEXT_BYTES - 1, "ram": 1 << 50}, 5),
        ({}, 5),
    ],
    ids=["kept", "broken", "more than planned"],
)
def test_on_a_card_the_budget_is_that_of_its_memory_and_counts_the_context(
    capsys: pytest.CaptureFixture[str],
    pipeline: type[FakePipeline],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, int],
    code: int,
) -> None:
    load = pipeline.from_pretrained

    def load_on_a_card(model: str, **given: Any) -> FakePipeline:
        loaded = load(model, **given)
        loaded.memory = MemoryOptions(**options)
        loaded.streamer = types.SimpleNamespace(context_bytes=CONTEXT_BYTES)
        loaded.phases = [figures(planned_bytes=planned) for planned in (1, 1024 * MIB)]
        return loaded

    monkeypatch.setattr(pipeline, "from_pretrained", load_on_a_card)
    monkeypatch.setattr(generate_module, "peak_device_bytes", lambda device: 1024 * MIB)

    assert run(capsys, "--seed", "1", "--strict-budget")[0] == code


@pytest.mark.parametrize("ram", [["--ram", "1TiB"], []])
def test_mapped_weights_count_towards_the_budget(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline], monkeypatch: pytest.MonkeyPatch, ram: list[str]
) -> None:
    load = pipeline.from_pretrained

    def load_mapped(model: str, **given: Any) -> FakePipeline:
        loaded = load(model, **given)
        loaded.phases = [figures(mapped_bytes=1 << 40, planned_bytes=1 << 40)]
        return loaded

    monkeypatch.setattr(pipeline, "from_pretrained", load_mapped)

    assert run(capsys, "--seed", "1", "--strict-budget", *ram)[0] == 5


@pytest.mark.parametrize("kinds_told", [True, False])
def test_mapped_weights_are_counted_once_whatever_the_system_tells(
    capsys: pytest.CaptureFixture[str],
    pipeline: type[FakePipeline],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kinds_told: bool,
) -> None:
    load = pipeline.from_pretrained
    status = tmp_path / "status"
    if kinds_told:
        status.write_text("RssAnon: 100 kB\nRssFile: 50 kB\nRssShmem: 0 kB\nVmHWM: 150 kB\n")

    def load_mapped(model: str, **given: Any) -> FakePipeline:
        loaded = load(model, **given)
        loaded.phases = [figures(mapped_bytes=40 << 10)]
        return loaded

    monkeypatch.setattr(pipeline, "from_pretrained", load_mapped)
    monkeypatch.setattr(generate_module, "MemoryWatch", lambda: MemoryWatch(sample=lambda: process_memory(status)))

    _, out, _ = run(capsys, "--seed", "1", "--json")

    memory = json.loads(out)["memory"]
    mapped = 40 << 10 if kinds_told else 0
    assert memory["held_bytes"] == memory["peak_anonymous_bytes"] + mapped


def figures(*, mapped_bytes: int = 0, planned_bytes: int = 0) -> PhaseFigures:
    return PhaseFigures(
        phase="48x32", visits=1, read_bytes=0, link_bytes=0, disk_seconds=0.0, disk_rate=None, probed_rate=None,
        compute_seconds=0.0, wait_seconds=0.0, wait_p50=0.0, wait_p95=0.0, io="read", io_reason="", tiers={}, slots=0,
        slot_bytes=0, mapped_bytes=mapped_bytes, device_bytes=0, host_bytes=0, planned_bytes=planned_bytes, notes=(),
    )  # fmt: skip


def test_noise_is_drawn_where_that_is_asked_for(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = pipeline.from_pretrained

    def load_elsewhere(model: str, **options: Any) -> FakePipeline:
        loaded = load(model, **options)
        loaded.device = torch.device("meta")
        return loaded

    monkeypatch.setattr(pipeline, "from_pretrained", load_elsewhere)

    for place, expected in (("device", "meta"), ("cpu", "cpu")):
        assert run(capsys, "--noise-device", place, "--seed", "1", "--overwrite")[0] == 0
        assert pipeline.last.calls[0]["noise_device"] == expected
        assert json.loads(text_of("l2p_1.png")["L2P"])["noise_device"] == expected


def test_what_the_pipeline_warns_of_while_it_draws_is_told(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where memory runs out and a step is done again in smaller slices, which changes the picture."""
    draw, notice = pipeline.__call__, "out of memory in step 1; it is done again in slices of 256 tokens"

    def run_out(self: FakePipeline, **options: Any) -> types.SimpleNamespace:
        self.warnings = (notice,)
        return draw(self, **options)

    monkeypatch.setattr(pipeline, "__call__", run_out)
    code, out, err = run(capsys, "--seed", "1", "2", "--json", "-q")

    assert code == 0
    assert err == f"warning: {notice}\n"
    assert json.loads(out)["warnings"] == [notice]


def test_a_preview_that_its_format_cannot_hold_is_refused_before_the_prompt_is_encoded(
    capsys: pytest.CaptureFixture[str], pipeline: type[FakePipeline]
) -> None:
    """Rather than after the first step."""
    message = refused(capsys, "-W", "32768", "--preview", "now.webp")

    assert message.startswith("now.webp: WEBP holds at most 16383 pixels a side, the picture has 32768x32")
    assert pipeline.last.encoded == []


def test_own_sigmas_leave_no_strength(capsys: pytest.CaptureFixture[str]) -> None:
    """Their first value says how far to depart."""
    Image.new("RGB", (48, 32)).save("photo.png")

    message = refused(capsys, "-i", "photo.png", "--sigmas", "0.5", "--strength", "0.5")

    assert message == "--sigmas says everything about the schedule; leave out --strength"


def test_the_record_hashes_the_whole_init_image(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a file longer than what is read at a time."""
    noise = np.random.default_rng(0).integers(0, 256, (640, 640, 3), dtype=np.uint8)
    Image.fromarray(noise).save("photo.png")
    assert Path("photo.png").stat().st_size > 1 << 20

    run(capsys, "-i", "photo.png", "-W", "32", "-H", "32", "--seed", "1")

    found = json.loads(text_of("l2p_1.png")["L2P"])["image"]["sha256"]
    assert found == hashlib.sha256(Path("photo.png").read_bytes()).hexdigest()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device here")
def test_lines_that_could_not_be_printed_are_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture is there all the same."""
    with Path("/dev/full").open("w") as full, monkeypatch.context() as patched:
        patched.setattr("sys.stdout", full)
        code = main(["generate", "-m", "m", "-p", "a fox", "-q", "--seed", "1"])

    assert code == 2
    assert Path("l2p_1.png").exists()
