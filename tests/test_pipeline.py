"""The pipeline's own promises: seeds, batches, callbacks, sizes, guidance, what is refused."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import weakref
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from l2p_lowvram import L2PPipeline, NonFiniteError, devices, pipeline, prompts, sampling
from l2p_lowvram import model as model_module
from l2p_lowvram.devices import choose_dtype
from l2p_lowvram.errors import is_out_of_memory
from l2p_lowvram.layout import read_layout
from l2p_lowvram.model import TransformerBlock
from l2p_lowvram.synthetic import main as make_synthetic
from l2p_lowvram.tilings import tilings
from l2p_lowvram.weights import load_transformer
from offload import Checkpoint
from tests import goldens
from tests.test_golden_text import encoder_folder, tokenizer_file  # noqa: F401  (a fixture)

SIZE = {"width": 64, "height": 32}
FAST = {**SIZE, "num_inference_steps": 2, "output_type": "pt"}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> L2PPipeline:
    path = goldens.write_checkpoint("a_mini", tmp_path_factory.mktemp("model"))
    return L2PPipeline.from_pretrained(path, device="cpu", dtype="fp32")


def features(seed: int, tokens: int = 9, width: int = 48) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


PROMPT = {"prompt_embeds": features(1), "negative_prompt_embeds": features(2, tokens=40)}


def test_same_seed_gives_the_same_bits(pipe):
    first = pipe(**PROMPT, seed=3, **FAST)
    second = pipe(**PROMPT, seed=3, **FAST)

    assert first.seeds == [3]
    assert torch.equal(first.images, second.images)
    assert not torch.equal(first.images, pipe(**PROMPT, seed=4, **FAST).images)


def test_pictures_of_a_batch_are_those_of_single_runs(pipe):
    """Branches share block visits with unchanged shapes, so not a bit may differ."""
    together = pipe(
        prompt_embeds=[features(1), features(5, tokens=50)],
        negative_prompt_embeds=features(2),
        seed=10,
        num_images_per_prompt=2,
        **FAST,
    )

    assert together.seeds == [10, 11, 12, 13]
    for index, prompt in enumerate([features(1), features(1), features(5, tokens=50), features(5, tokens=50)]):
        alone = pipe(prompt_embeds=prompt, negative_prompt_embeds=features(2), seed=10 + index, **FAST)
        assert torch.equal(together.images[index], alone.images[0])


@pytest.mark.parametrize(("tokens", "shared"), [(9, True), (40, False)])
def test_a_step_visits_every_block_with_both_branches_and_shares_what_sees_no_caption(
    pipe, monkeypatch, tokens: int, shared: bool
):
    """The image tokens see of a caption only its padded length, by their positions."""
    visits: list[str] = []
    names = {id(block.module): block.name for block in pipe.transformer.blocks()}
    refiner = set(map(id, pipe.transformer.context_refiner))

    def watched(method, told: str):
        def watch(self, *args):
            if id(self) in refiner:
                visits.append(f"context refiner, {told}")
            elif id(self) in names and method.__name__.endswith("_"):
                visits.append(f"{names[id(self)]}, {told}")
            return method(self, *args)

        return watch

    for method, told in (
        (TransformerBlock.with_attention, "attention"),
        (TransformerBlock.add_attention_, "attention"),
        (TransformerBlock.feed_forward_added, "feed-forward"),
        (TransformerBlock.add_feed_forward_, "feed-forward"),
    ):
        monkeypatch.setattr(TransformerBlock, method.__name__, watched(method, told))
    # Of no other test: captions of the call before are kept.
    positive, negative = features(60 + tokens), features(62, tokens=tokens)
    together = pipe(prompt_embeds=positive, negative_prompt_embeds=negative, seed=1, **FAST).images
    monkeypatch.undo()

    halves = ("attention", "feed-forward")
    once = [f"context refiner, {half}" for _ in refiner for half in halves for _ in range(2)]
    branches = {"noise_refiner": 1 if shared else 2, "layers": 2}
    per_step = [
        f"{name}, {half}" for name in names.values() for half in halves for _ in range(branches[name.split(".")[0]])
    ]
    assert visits == once + per_step * 2
    assert torch.equal(together, unshared(pipe, positive, negative))


def unshared(pipe, positive: Tensor, negative: Tensor) -> Tensor:
    """The same run, every branch from the prelude on by itself."""
    runs = [BranchRun(pipe, prompt) for prompt in (positive, negative)]
    pixels = sampling.make_noise((1, 3, 32, 64), torch.Generator().manual_seed(1))
    for sigma, following in pairwise(sampling.make_sigmas(2, pipe.config.defaults.shift)):
        first, second = (run(pixels, sampling.model_time(sigma[None])) for run in runs)
        velocity = sampling.guide(first, second, pipe.config.defaults.cfg_scale)
        pixels = sampling.euler_step(pixels, velocity, sigma, following)
    return pixels


class BranchRun:
    """One branch through a model that has its weights, in the pipeline's slices."""

    def __init__(self, pipe, prompt: Tensor) -> None:
        with Checkpoint.open(pipe.weights._checkpoint.files[0]) as checkpoint:
            self.model = load_transformer(checkpoint, read_layout(checkpoint))
        self.caption = self.model.encode_caption(prompt)
        self.tiling = next(tilings(pipe.config, pipe.work(64, 32, 1, 2.0, prompt.shape[0])))

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, t: Tensor) -> Tensor:
        slices = self.tiling.sizes.slices()
        state = self.model.prelude(pixels, t, self.caption, slices)
        for block in self.model.blocks():
            state = block.visit(state, slices=slices)
        return self.model.epilogue(state, pixels)


def test_guidance_of_one_never_looks_at_the_negative_prompt(pipe):
    plain = pipe(prompt_embeds=features(1), cfg_scale=1.0, seed=1, **FAST)
    ignored = pipe(**PROMPT, cfg_scale=1.0, seed=1, **FAST)
    guided = pipe(**PROMPT, cfg_scale=1.5, seed=1, **FAST)

    assert torch.equal(plain.images, ignored.images)
    assert not torch.equal(plain.images, guided.images)


def test_guidance_follows_the_documented_formula(pipe):
    """One step from the same noise: velocities are linear in cfg_scale."""
    scales = (1.0, 2.0, 3.0)
    one_step = {**FAST, "num_inference_steps": 1}

    at = [pipe(**PROMPT, cfg_scale=scale, seed=1, **one_step).images for scale in scales]

    torch.testing.assert_close(at[2] - at[1], at[1] - at[0], atol=1e-5, rtol=0)


def test_output_types_show_the_same_picture(pipe):
    options = {**PROMPT, "seed": 1, **SIZE, "num_inference_steps": 2}
    tensor = pipe(**options, output_type="pt").images
    array = pipe(**options, output_type="np").images
    pictures = pipe(**options).images

    assert tensor.shape == (1, 3, 32, 64)
    assert tensor.dtype == torch.float32
    assert array.shape == (1, 32, 64, 3)
    assert array.dtype == np.uint8
    assert np.array_equal(np.asarray(pictures[0]), array[0])
    expected = ((tensor.clamp(-1, 1) + 1) / 2 * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(array, expected)


def test_returned_tensors_can_be_trained_with(pipe):
    images = pipe(**PROMPT, seed=1, **FAST).images
    weight = torch.ones((), requires_grad=True)

    (images * weight).sum().backward()

    assert weight.grad == images.sum()


def test_callback_sees_every_step_and_the_estimate_arrives_at_the_picture(pipe):
    seen: list[tuple[int, float]] = []
    kept: dict[str, Tensor] = {}

    def watch(given, step, sigma, tensors):
        assert given is pipe
        seen.append((step, sigma))
        kept.update(tensors)

    out = pipe(**PROMPT, seed=1, **{**FAST, "num_inference_steps": 3}, callback_on_step_end=watch)

    assert [step for step, _ in seen] == [0, 1, 2]
    assert seen[-1][1] == 0
    assert all(earlier > later for (_, earlier), (_, later) in pairwise(seen))
    assert torch.equal(kept["latents"], out.images)
    torch.testing.assert_close(kept["denoised"], out.images, atol=1e-6, rtol=0)


@pytest.mark.parametrize("style", ["in place", "returned"])
def test_callback_may_replace_the_sample(pipe, style: str):
    replacement = torch.full((1, 3, 32, 64), 0.25)

    def replace(given, step, sigma, tensors):
        if step == 1:
            if style == "returned":
                return {"latents": replacement}
            tensors["latents"] = replacement
        return None

    out = pipe(**PROMPT, seed=1, **FAST, callback_on_step_end=replace)

    assert torch.equal(out.images, replacement)


@pytest.mark.parametrize("returned", [None, [1.0], torch.zeros(1, 3, 32, 32)])
def test_a_callback_that_returns_no_sample_is_told(pipe, returned):
    with pytest.raises(ValueError, match=r"the callback returned latents .*, expected a tensor"):
        pipe(**PROMPT, seed=1, **FAST, callback_on_step_end=lambda *_: {"latents": returned})


def test_the_sample_of_a_later_step_is_held_once(pipe, monkeypatch: pytest.MonkeyPatch):
    """What a step started from, its noise and the estimate nobody asked for are gone by the next one."""
    alive: list[weakref.ref] = []
    found: list[int] = []
    step, noise = sampling.euler_step, sampling.make_noise

    def noted(make, *arguments):
        made = make(*arguments)
        alive.append(weakref.ref(made))
        return made

    def counted(*arguments):
        gc.collect()
        found.append(sum(reference() is not None for reference in alive))
        return noted(step, *arguments)

    monkeypatch.setattr(sampling, "make_noise", lambda *a: noted(noise, *a))
    monkeypatch.setattr(sampling, "euler_step", counted)
    monkeypatch.setattr(sampling, "denoised", lambda *_: pytest.fail("nobody asked for the estimate"))
    picture = torch.zeros(3, 32, 64)
    pipe(**PROMPT, seed=1, image=picture, strength=1.0, **{**FAST, "num_inference_steps": 4})

    assert found == [0, 1, 1, 1]


def test_interrupt_after_the_last_step_leaves_a_whole_picture(pipe, monkeypatch: pytest.MonkeyPatch):
    step = sampling.euler_step

    def interrupt_last(pixels, velocity, sigma, next_sigma):
        if next_sigma == 0:
            pipe.interrupt()
        return step(pixels, velocity, sigma, next_sigma)

    expected = pipe(**PROMPT, seed=1, **FAST).images
    monkeypatch.setattr(sampling, "euler_step", interrupt_last)
    out = pipe(**PROMPT, seed=1, **FAST)

    assert not out.interrupted
    assert torch.equal(out.images, expected)


def test_devices_without_float64_turn_by_the_same_angles(monkeypatch: pytest.MonkeyPatch):
    positions = torch.randint(0, 300, (50, 3), generator=torch.Generator().manual_seed(0)).float()
    expected = model_module.rope_table(positions, (32, 48, 48))
    monkeypatch.setattr(model_module, "_WITH_FLOAT64", ())

    assert torch.equal(model_module.rope_table(positions, (32, 48, 48)), expected)


def test_numbers_of_numpy_are_seeds(pipe):
    assert torch.equal(pipe(**PROMPT, seed=np.int64(3), **FAST).images, pipe(**PROMPT, seed=3, **FAST).images)


def test_sigmas_leave_no_strength(pipe):
    with pytest.raises(ValueError, match="leave out strength"):
        pipe(**PROMPT, seed=1, sigmas=[0.5], image=torch.zeros(3, 32, 64), strength=0.5)


def test_prompts_may_come_one_by_one():
    with L2PPipeline.from_pretrained("demo") as demo:
        one, two = demo.encode_prompts(prompt for prompt in ("a red circle", "a blue square"))
        (alone,) = demo.encode_prompts("a red circle")

    assert torch.equal(alone, one)
    assert not torch.equal(one[: len(two)], two[: len(one)])


@pytest.mark.parametrize("folder", ["", 3])
def test_a_prompt_cache_that_is_no_folder_is_refused(folder):
    with pytest.raises(ValueError, match="prompt_cache must be True, False or a folder"):
        L2PPipeline.from_pretrained("demo", prompt_cache=folder)


@pytest.mark.parametrize(
    "switch",
    [
        "pass",
        "torch.set_float32_matmul_precision('medium')",
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.fp32_precision = 'tf32'",
    ],
)
def test_fp32_on_a_card_is_fp32_whatever_switch_a_program_used(switch: str):
    """In a process of its own: once the newer switches are used the older ones raise."""
    script = f"""
import torch
from l2p_lowvram.devices import full_fp32
def state():
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
{switch}
before = state()
with full_fp32(torch.device("cuda"), torch.float32):
    assert state() == ("ieee", "ieee"), state()
assert state() == before, (before, state())
with full_fp32(torch.device("cuda"), torch.bfloat16):
    assert state() == before
one, other = (full_fp32(torch.device("cuda"), torch.float32) for _ in range(2))  # of two pipelines in two threads
for context in (one, other):
    context.__enter__()
one.__exit__(None, None, None)
assert state() == ("ieee", "ieee"), state()
other.__exit__(None, None, None)
assert state() == before, (before, state())
matmul = torch.backends.cuda.matmul
def sums():
    return (matmul.allow_fp16_accumulation, matmul.allow_fp16_reduced_precision_reduction,
            getattr(matmul, "allow_fp16_reduced_precision_reduction_split_k", True))
has_two = hasattr(matmul, "allow_fp16_reduced_precision_reduction_split_k")  # not in torch 2.9
for allowed in (True, (False, False) if has_two else False):
    matmul.allow_fp16_accumulation, matmul.allow_fp16_reduced_precision_reduction = True, allowed
    before = sums()
    with full_fp32(torch.device("cuda"), torch.float32):
        assert sums() == (False, False, True), sums()
    assert sums() == before, (before, sums())
"""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has the older switches alone")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)

    assert done.returncode == 0, done.stderr


def test_prompts_captions_and_steps_are_computed_in_full_fp32(monkeypatch: pytest.MonkeyPatch):
    inside: list[tuple[torch.device, torch.dtype]] = []
    seen: dict[str, list[tuple[torch.device, torch.dtype]]] = {}

    @contextmanager
    def entered(device: torch.device, dtype: torch.dtype):
        inside.append((device, dtype))
        yield
        inside.pop()

    def watched(owner: object, name: str) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (seen.update({name: list(inside)}), original(*a, **k))[1])

    monkeypatch.setattr(pipeline, "full_fp32", entered)
    with L2PPipeline.from_pretrained("demo", device="cpu", dtype="fp16") as pipe:
        for owner, name in ((prompts.PromptEncoder, "__call__"), (pipe, "_refine"), (pipe, "_velocities")):
            watched(owner, name)
        pipe("a red ring", width=32, height=32, num_inference_steps=1)

    assert seen == {key: [(torch.device("cpu"), torch.float32)] for key in ("__call__", "_refine", "_velocities")}


def test_a_text_encoder_that_overflows_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prompts.PromptEncoder, "__call__", lambda *_: [torch.full((9, 128), float("inf"))])

    with (
        L2PPipeline.from_pretrained("demo", device="cpu", dtype="fp32") as pipe,
        pytest.raises(NonFiniteError, match="in the text encoder; try dtype fp32"),
    ):
        pipe.encode_prompt("a red ring")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: out of memory\nCUDA kernel errors might be reported later", True),
        ("GET was unable to find an engine to execute this computation", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_what_torch_says_when_memory_runs_out_is_understood(message: str, expected: bool):
    assert is_out_of_memory(RuntimeError(message)) is expected


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("gfx1030", torch.float16), ("gfx1100", torch.bfloat16), ("gfx90a:sramecc+:xnack-", torch.bfloat16)],
)
def test_amd_cards_without_bf16_compute_in_fp16(architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """torch says of each of them that it has bf16."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=architecture))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 3))

    assert choose_dtype(None, torch.device("cuda")) == dtype


def test_a_call_runs_with_its_card_as_the_current_one(pipe, monkeypatch: pytest.MonkeyPatch):
    """What torch decides by the current device, such as which attention kernel runs, concerns the right one."""
    entered: list[torch.device] = []

    @contextmanager
    def on(device):
        entered.append(device)
        yield

    monkeypatch.setattr(pipeline, "on_device", on)
    pipe(**PROMPT, seed=1, **FAST)

    assert entered == [pipe.device]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", on)
    with devices.on_device(torch.device("cuda:1")), devices.on_device(torch.device("cpu")):
        assert entered[1:] == [torch.device("cuda:1")]


def test_a_programs_autocast_changes_nothing(pipe):
    plain = pipe(**PROMPT, seed=1, **FAST).images
    pipe.close()
    pipe._refined = []

    with torch.autocast("cpu", torch.bfloat16):
        inside = pipe(**PROMPT, seed=1, **FAST).images

    assert torch.equal(inside, plain)
    assert torch.equal(pipe(**PROMPT, seed=1, **FAST).images, plain)


def test_calls_from_several_threads_take_turns(pipe):
    """Weights are lent to one set of modules, so two at once would compute on each other's."""
    expected = [pipe(**PROMPT, seed=seed, **FAST).images for seed in range(4)]
    found: dict[int, Tensor] = {}

    def draw(seed: int) -> None:
        found[seed] = pipe(**PROMPT, seed=seed, **FAST).images

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert all(torch.equal(found[seed], expected[seed]) for seed in range(4))


def test_a_programs_default_device_changes_nothing(pipe):
    plain = pipe(**PROMPT, seed=1, **FAST).images
    pipe.close()
    pipe._refined = []

    with torch.device("meta"):
        found = pipe(**PROMPT, seed=1, **FAST).images

    assert torch.equal(found, plain)


def test_interrupt_stops_after_the_step_and_returns_its_estimate(pipe):
    kept: list[Tensor] = []

    def stop(given, step, sigma, tensors):
        kept.append(tensors["denoised"])
        given.interrupt()

    out = pipe(**PROMPT, seed=1, **{**FAST, "num_inference_steps": 9}, callback_on_step_end=stop)

    assert out.interrupted
    assert len(kept) == 1
    assert torch.equal(out.images, kept[0])
    assert not pipe(**PROMPT, seed=1, **FAST).interrupted


def test_own_noise_equals_the_seeds(pipe):
    noise = torch.randn((1, 3, 32, 64), generator=torch.Generator().manual_seed(5))

    by_seed = pipe(**PROMPT, seed=5, **FAST).images
    by_latents = pipe(**PROMPT, latents=noise, num_inference_steps=2, output_type="pt")
    by_generator = pipe(**PROMPT, generator=torch.Generator().manual_seed(5), **FAST).images

    assert by_latents.seeds is None
    assert torch.equal(by_seed, by_latents.images)
    assert torch.equal(by_seed, by_generator)


def test_own_sigmas_equal_the_schedule_they_spell(pipe):
    from l2p_lowvram.sampling import make_sigmas

    spelled = make_sigmas(2, 3.0)[:-1].tolist()

    by_steps = pipe(**PROMPT, seed=5, shift=3.0, **FAST).images
    by_sigmas = pipe(**PROMPT, seed=5, sigmas=spelled, **SIZE, output_type="pt").images

    assert torch.equal(by_steps, by_sigmas)


def test_img2img_takes_pictures_and_tensors_and_keeps_their_size(pipe):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).float() * (2 / 255) - 1
    options = {**PROMPT, "seed": 1, "num_inference_steps": 2, "output_type": "pt", "strength": 0.3}

    picture = pipe(**options, image=Image.fromarray(pixels)).images
    same = pipe(**options, image=tensor).images
    weaker = pipe(**{**options, "strength": 0.05}, image=tensor).images

    assert picture.shape == (1, 3, 32, 64)
    torch.testing.assert_close(picture, same, atol=1e-5, rtol=0)
    assert (weaker - tensor).abs().mean() < (picture - tensor).abs().mean()


def test_without_encoder_and_negative_features_guidance_is_off_by_default(pipe):
    plain = pipe(prompt_embeds=features(1), seed=1, **FAST)
    spelled = pipe(prompt_embeds=features(1), cfg_scale=1.0, seed=1, **FAST)

    assert torch.equal(plain.images, spelled.images)


def test_a_rotated_photograph_is_taken_upright(pipe, tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32)).save(tmp_path / "photo.jpg", exif=exif)
    with Image.open(tmp_path / "photo.jpg") as photo:
        out = pipe(**PROMPT, image=photo, seed=1, num_inference_steps=1, output_type="pt")

    assert out.images.shape == (1, 3, 64, 32)


def test_drawing_a_seed_leaves_the_global_generator_alone(pipe):
    torch.manual_seed(0)
    expected = torch.rand(3)

    torch.manual_seed(0)
    pipe(**PROMPT, **FAST)

    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("tokens", [1, 32, 33])
@pytest.mark.parametrize(("width", "height"), [(16, 16), (80, 48), (16, 128)])
def test_ragged_grids_and_captions_run(pipe, tokens: int, width: int, height: int):
    out = pipe(
        prompt_embeds=features(1, tokens=tokens),
        negative_prompt_embeds=features(2, tokens=2),
        width=width,
        height=height,
        num_inference_steps=1,
        seed=1,
        output_type="pt",
    )

    assert out.images.shape == (1, 3, height, width)
    assert out.images.isfinite().all()


REFUSED = [
    ({"width": 1000}, r"width must be a multiple of 16 pixels for this model, got 1000; nearest are 992 and 1008"),
    ({"height": 0}, r"height must be a multiple of 16 .* got 0; the smallest is 16"),
    ({"width": 64.0}, "width must be a whole number"),
    ({"num_inference_steps": 0}, "steps must be a whole number from 1 to 65536, got 0"),
    ({"shift": 0.0}, "shift must be positive"),
    ({"cfg_scale": float("nan")}, "cfg_scale must be a finite number"),
    ({"sigmas": [0.5, 0.7], "num_inference_steps": None}, "sigmas must descend"),
    ({"sigmas": [1.5], "num_inference_steps": None}, r"sigmas must lie in \(0, 1\]"),
    ({"sigmas": [], "num_inference_steps": None}, "sigmas is empty"),
    ({"sigmas": [0.5]}, "sigmas says everything"),
    ({"shift": "3"}, "shift must be a finite number, got '3'"),
    ({"cfg_scale": "7"}, "cfg_scale must be a finite number, got '7'"),
    ({"sigmas": [1, None], "num_inference_steps": None}, "a sigma must be a finite number, got None"),
    ({"num_inference_steps": 2**40}, "the number of steps must be a whole number from 1 to 65536, got 1099511627776"),
    ({"seed": -1}, "seed must be a whole number"),
    ({"seed": True}, "seed must be a whole number"),
    ({"latents": np.zeros((1, 3, 32, 64))}, r"latents must be a tensor \(B, 3, H, W\), got ndarray"),
    ({"seed": 1, "latents": torch.zeros(1, 3, 32, 64)}, "give one of seed, generator and latents"),
    ({"latents": torch.zeros(3, 32, 64)}, "latents must have shape"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number from 1"),
    ({"output_type": "latent"}, "output_type must be one of pil, pt, np"),
    ({"prompt_embeds": None}, "give either prompt or prompt_embeds"),
    ({"prompt": "a fox"}, "give either prompt or prompt_embeds"),
    ({"prompt_embeds": features(1, width=47)}, r"text features must have shape \(tokens, 48\), got \[9, 47\]"),
    ({"prompt_embeds": torch.zeros(0, 48)}, r"got \[0, 48\]"),
    ({"negative_prompt_embeds": [features(1)] * 3}, "3 negative prompts for 1 prompts"),
    ({"image": torch.zeros(3, 16, 16)}, r"image must have shape \(3, 32, 64\)"),
    ({"image": torch.zeros(3, 32, 64, dtype=torch.uint8)}, r"image must be a PIL image.* got torch.uint8 tensor"),
    ({"image": np.zeros((32, 64, 3))}, "image must be a PIL image.* got ndarray"),
    ({"image": torch.full((3, 32, 64), float("nan"))}, "image holds NaN or infinity"),
    ({"latents": torch.full((1, 3, 32, 64), float("inf"))}, "latents holds NaN or infinity"),
    ({"prompt_embeds": torch.full((9, 48), float("nan"))}, "prompt_embeds holds NaN or infinity"),
    ({"negative_prompt": "ugly"}, "give either negative_prompt or negative_prompt_embeds"),
    ({"negative_prompt_embeds": None, "cfg_scale": 2.0}, "give negative_prompt_embeds or cfg_scale=1"),
    ({"prompt_embeds": [None]}, "prompt must be text, or features as a tensor, got NoneType"),
    ({"noise_device": "teapot"}, "device 'teapot' cannot be used here"),
    ({"shift": 1e39}, "shift must be positive and of a usual size"),
    ({"image": torch.zeros(3, 32, 64), "strength": 1.5}, r"strength must lie in \(0, 1\]"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_bad_arguments_are_refused_by_name(pipe, change, message: str):
    with pytest.raises(ValueError, match=message):
        pipe(**{**PROMPT, **FAST, **change})


def test_numbers_may_be_numpys(pipe):
    given = {
        "num_inference_steps": np.int64(2),
        "shift": np.float32(3),
        "cfg_scale": np.float64(2),
        "seed": np.int32(5),
    }

    drawn = pipe(**PROMPT, **SIZE, **given, num_images_per_prompt=np.int8(1), output_type="pt")

    plain = {name: value.item() for name, value in given.items()}
    assert torch.equal(drawn.images, pipe(**PROMPT, **SIZE, **plain, output_type="pt").images)
    assert drawn.seeds == [5]


def test_a_prompt_without_a_text_encoder_says_what_to_give(pipe):
    with pytest.raises(ValueError, match="no text encoder; give text_encoder="):
        pipe("a fox", **FAST)


def test_guidance_that_overflows_is_named(pipe):
    with pytest.raises(NonFiniteError, match=r"step 1 of 2, in the sampler; is a cfg_scale of 1e\+39 meant"):
        pipe(**PROMPT, cfg_scale=1e39, seed=1, **FAST)


@pytest.mark.parametrize(
    ("parameter", "phase"),
    [("layers.1.feed_forward.w2.weight", "transformer"), ("local_decoder.out_conv.bias", "local decoder")],
)
def test_an_overflow_stops_the_run_and_names_step_and_phase(tmp_path: Path, parameter: str, phase: str):
    path = goldens.write_checkpoint("a_mini", tmp_path)
    weights, metadata = load_file(path), safe_open(path, "pt").metadata()
    weights[parameter].fill_(float("inf"))
    save_file(weights, path, metadata=metadata)
    pipe = L2PPipeline.from_pretrained(path, device="cpu", dtype="fp32")

    with pytest.raises(NonFiniteError, match=f"in step 1 of 2, in the {phase}") as caught:
        pipe(**PROMPT, seed=1, **FAST)

    assert (caught.value.step, caught.value.phase) == (0, phase)


def test_a_callback_may_differentiate_and_a_caller_be_in_inference_mode(pipe):
    def darken(given, step, sigma, tensors):
        with torch.enable_grad():
            latents = tensors["latents"].requires_grad_()
            latents.square().mean().backward()
        assert latents.grad is not None
        return {"latents": latents - 0.5 * latents.grad}

    with torch.inference_mode():
        first = pipe(**PROMPT, seed=1, **FAST, callback_on_step_end=darken)
    second = pipe(**PROMPT, seed=1, **FAST, callback_on_step_end=darken)
    kept = pipe(
        **PROMPT,
        seed=1,
        **{**FAST, "output_type": "np"},
        callback_on_step_end=lambda *given: {"latents": given[3]["latents"].clone().requires_grad_()},
    )

    assert torch.equal(first.images, second.images)
    assert not torch.equal(second.images, pipe(**PROMPT, seed=1, **FAST).images)
    assert not second.images.requires_grad
    assert kept.images.shape == (1, 32, 64, 3)


def test_a_call_from_a_callback_and_the_call_around_it_are_interrupted_each_on_its_own(pipe):
    def draw_another(given, step, sigma, tensors):
        given.interrupt()
        assert not given(**PROMPT, seed=2, **FAST).interrupted

    def stop_another(given, step, sigma, tensors):
        stop = lambda pipe, *_: pipe.interrupt()  # noqa: E731
        assert given(**PROMPT, seed=2, **FAST, callback_on_step_end=stop).interrupted

    assert pipe(**PROMPT, seed=1, **FAST, callback_on_step_end=draw_another).interrupted
    assert not pipe(**PROMPT, seed=1, **FAST, callback_on_step_end=stop_another).interrupted


def test_a_card_is_named_with_its_number(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "empty", lambda *_, device: SimpleNamespace(device=torch.device("cuda", 1)))

    assert devices.choose_device("cuda") == torch.device("cuda", 1)


def test_a_programs_default_device_does_not_keep_an_int8_model_from_opening(tmp_path: Path):
    path = tmp_path / "wide.safetensors"
    wide = ["--layers", "1", "--refiners", "1", "--dim", "512", "--heads", "4", "--caption-dim", "64"]
    make_synthetic([str(path), *wide])
    with torch.device("meta"), L2PPipeline.from_pretrained(path, device="cpu", dtype="fp32", compute="int8") as pipe:
        assert pipe.compute.name == "int8"


def test_a_callback_that_returns_nan_is_caught(pipe):
    def spoil(given, step, sigma, tensors):
        tensors["latents"] = tensors["latents"] * float("nan")

    with pytest.raises(NonFiniteError, match="step 1 of 2, in the callback"):
        pipe(**PROMPT, seed=1, **FAST, callback_on_step_end=spoil)


@pytest.fixture
def folder(tmp_path: Path, tokenizer_file: Path) -> Path:  # noqa: F811
    """A model folder whose parts fit: model, l2p.json, text encoder, tokenizer."""
    config = {**goldens.values("a_mini.config"), "cap_feat_dim": 64, "set": "with_text"}
    weights = {k: torch.from_numpy(v) for k, v in goldens.recipe("make_weights").build(config).items()}
    root = tmp_path / "model"
    root.mkdir()
    save_file(weights, root / "model.safetensors")
    (root / "l2p.json").write_text(
        '{"rope_axes": [8, 12, 12], "defaults": {"width": 64, "height": 32, "steps": 2, "cfg_scale": 1.5, "shift": 2}}'
    )
    encoder = {**goldens.weights("te_a")}
    embedding = torch.zeros(151_646, 64)
    embedding[:512] = encoder["model.embed_tokens.weight"]
    embedding[151_640:] = encoder["model.embed_tokens.weight"][:6]
    encoder["model.embed_tokens.weight"] = embedding
    encoder_folder(root / "text_encoder", encoder)
    patched = (root / "text_encoder" / "config.json").read_text().replace('"vocab_size": 512', '"vocab_size": 151646')
    (root / "text_encoder" / "config.json").write_text(patched)
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    return root


def test_a_model_folder_brings_defaults_text_encoder_and_tokenizer(folder: Path):
    pipe = L2PPipeline.from_pretrained(folder, device="cpu", dtype="fp32")

    picture = pipe("a cat", seed=1, output_type="pt").images
    embeds = pipe.encode_prompt("a cat")
    spelled = pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=pipe.encode_prompt(""),
        seed=1, width=64, height=32, num_inference_steps=2, cfg_scale=1.5, shift=2.0, output_type="pt",
    ).images  # fmt: skip

    assert embeds.shape == (10, 64)
    assert torch.equal(picture, spelled)
    ids = torch.tensor([[151644, 872, 198, 64, 8251, 151645, 198, 151644, 77091, 198]])
    assert torch.equal(pipe.text_encoder(ids)[0], embeds)


def test_prompts_share_one_reading_of_the_encoder_and_one_refiner_run_each(folder: Path, monkeypatch):
    pipe = L2PPipeline.from_pretrained(folder, device="cpu", dtype="fp32")
    encoded, refined = [], []
    encode, refine = pipe.text_encoder.encode, pipe.transformer.embed_caption
    monkeypatch.setattr(pipe.text_encoder, "encode", lambda ids, *a: encoded.append(len(ids)) or encode(ids, *a))
    monkeypatch.setattr(pipe.transformer, "embed_caption", lambda *a: refined.append(1) or refine(*a))

    pipe(["a cat", "a", "a cat"], seed=1, num_images_per_prompt=2, output_type="pt")

    assert encoded == [3]  # two texts and the empty negative prompt
    assert len(refined) == 3

    embeds = pipe.encode_prompt("a cat")
    for seed in (1, 2):
        pipe(prompt_embeds=embeds, negative_prompt="", seed=seed, output_type="pt")
    assert len(refined) == 3


def test_a_model_file_in_its_folder_finds_its_neighbours(folder: Path):
    by_folder = L2PPipeline.from_pretrained(folder, device="cpu", dtype="fp32")
    by_file = L2PPipeline.from_pretrained(folder / "model.safetensors", device="cpu", dtype="fp32")

    assert by_file.config == by_folder.config
    assert torch.equal(by_file.encode_prompt("a cat"), by_folder.encode_prompt("a cat"))
    assert by_file.identity["text_encoder"] == by_folder.identity["text_encoder"]


def test_the_prompt_cache_skips_the_encoder_and_gives_the_same_bits(folder: Path, tmp_path: Path, monkeypatch):
    cache = tmp_path / "cache"
    fresh = L2PPipeline.from_pretrained(folder, device="cpu", dtype="fp32").encode_prompt("a cat")
    first = L2PPipeline.from_pretrained(folder, device="cpu", dtype="fp32", prompt_cache=cache).encode_prompt("a cat")

    again = L2PPipeline.from_pretrained(folder, device="cpu", dtype="fp32", prompt_cache=cache)
    monkeypatch.setattr(again.text_encoder, "encode", lambda *_: pytest.fail("the encoder was used"))

    assert torch.equal(fresh, first)
    assert torch.equal(fresh, again.encode_prompt("a cat"))


def test_another_encoder_file_misses_the_cache(folder: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    first = L2PPipeline.from_pretrained(folder, device="cpu", dtype="fp32", prompt_cache=cache).encode_prompt("a cat")
    weights = folder / "text_encoder" / "model.safetensors"
    changed = load_file(weights)
    changed["model.layers.0.mlp.up_proj.weight"] *= 2
    save_file(changed, weights)

    second = L2PPipeline.from_pretrained(folder, device="cpu", dtype="fp32", prompt_cache=cache).encode_prompt("a cat")

    assert not torch.equal(first, second)


def test_text_encoder_of_another_width_is_refused(folder: Path, tmp_path: Path):
    model = goldens.write_checkpoint("a_mini", tmp_path)

    with pytest.raises(ValueError, match="makes features of width 64, the model reads 48"):
        L2PPipeline.from_pretrained(model, text_encoder=folder / "text_encoder", device="cpu", dtype="fp32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
        ({"device": "hpu"}, "device 'hpu' cannot be used here"),
        ({"ram": 1.5}, "size must be a whole number of bytes, or text such as 6GiB, got 1.5"),
        ({"device": "teapot"}, "device 'teapot' cannot be used here"),
        ({"dtype": "int8"}, "dtype must be auto, bf16, fp16, fp32, got 'int8'"),
        ({"dtype": torch.int8}, "dtype must be torch.bfloat16, float16 or float32"),
    ],
)
def test_devices_and_dtypes_that_cannot_be_are_refused(folder: Path, options, message: str):
    with pytest.raises(ValueError, match=message):
        L2PPipeline.from_pretrained(folder, **options)


def test_a_missing_model_says_how_to_get_one():
    with pytest.raises(FileNotFoundError, match=r"Abiray/L2P: no such model file or folder; if this is a Hugging Face"):
        L2PPipeline.from_pretrained("Abiray/L2P")


@pytest.mark.parametrize("changed", ["tokenizer", "configuration", "processor"])
def test_all_that_features_come_from_is_in_the_cache_key(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    encoded: list[int] = []

    def encode() -> Tensor:
        with L2PPipeline.from_pretrained(folder, device="cpu", dtype="fp32", prompt_cache=tmp_path / "cache") as pipe:
            assert pipe.text_encoder is not None
            whole = pipe.text_encoder.encode
            monkeypatch.setattr(pipe.text_encoder, "encode", lambda ids, *a: encoded.append(1) or whole(ids, *a))
            return pipe.encode_prompt("a cat")

    first, again = encode(), encode()
    tokenizer, config = folder / "tokenizer" / "tokenizer.json", folder / "text_encoder" / "config.json"
    if changed == "tokenizer":
        values = json.loads(tokenizer.read_text())
        vocabulary = values["model"]["vocab"]
        vocabulary["a"], vocabulary["Ġcat"] = vocabulary["Ġcat"], vocabulary["a"]
        tokenizer.write_text(json.dumps(values))
    elif changed == "configuration":
        config.write_text(json.dumps({**json.loads(config.read_text()), "rope_theta": 100.0}))
    else:
        monkeypatch.setattr(prompts, "device_name", lambda device: "cpu with other vectors")
    second = encode()

    assert len(encoded) == 2
    assert torch.equal(first, again)
    assert torch.equal(first, second) == (changed == "processor")


def test_features_changed_in_place_between_two_calls_are_refined_anew(pipe: L2PPipeline) -> None:
    prompt = features(70)
    first = pipe(prompt_embeds=prompt, seed=1, **FAST).images

    prompt.neg_()
    second = pipe(prompt_embeds=prompt, seed=1, **FAST).images

    pipe(prompt_embeds=features(71), seed=1, **FAST)  # nothing of the calls before is kept any more
    assert not torch.equal(first, second)
    assert torch.equal(second, pipe(prompt_embeds=-features(70), seed=1, **FAST).images)


def test_every_picture_of_a_batch_has_its_own_negative_prompt_and_generator(pipe: L2PPipeline) -> None:
    positives, negatives = [features(1), features(5)], [features(2), features(6)]
    together = pipe(
        prompt_embeds=positives,
        negative_prompt_embeds=negatives,
        generator=[torch.Generator().manual_seed(seed) for seed in range(20, 24)],
        num_images_per_prompt=2,
        **FAST,
    ).images

    for index, prompt in enumerate([0, 0, 1, 1]):
        alone = pipe(
            prompt_embeds=positives[prompt], negative_prompt_embeds=negatives[prompt], seed=20 + index, **FAST
        ).images
        assert torch.equal(together[index], alone[0])


def test_the_timestep_is_rounded_where_that_is_asked_for(tmp_path: Path) -> None:
    path = goldens.write_checkpoint("a_mini", tmp_path)
    pictures = []
    for flag in (False, True):
        with L2PPipeline.from_pretrained(path, device="cpu", dtype="fp32", bf16_timestep=flag) as pipe:
            pictures.append(pipe(prompt_embeds=features(1), seed=1, **{**FAST, "num_inference_steps": 3}).images)

    assert 0 < (pictures[0] - pictures[1]).abs().max() < 0.1
