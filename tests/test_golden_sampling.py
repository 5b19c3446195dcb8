"""Schedules, steps, noise and whole trajectories against the original pipeline."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from l2p_lowvram import sampling
from l2p_lowvram.pipeline import L2PPipeline
from tests import goldens


def schedules() -> list[str]:
    return sorted(key.removesuffix(".sigmas") for key in goldens.tensors("scheduler") if key.endswith(".sigmas"))


@pytest.mark.parametrize("name", schedules())
def test_sigmas_match_the_reference(name: str):
    stored = goldens.tensors("scheduler")
    match = re.fullmatch(r"steps(\d+)_shift([\d.]+?)(?:_strength([\d.]+))?", name)
    assert match is not None
    steps, shift, strength = int(match[1]), float(match[2]), float(match[3] or 1)

    sigmas = sampling.make_sigmas(steps, shift, strength)

    assert sigmas[-1] == 0
    torch.testing.assert_close(sigmas[:-1], stored[f"{name}.sigmas"], atol=1e-6, rtol=0)
    torch.testing.assert_close(1000 * sigmas[:-1], stored[f"{name}.timesteps"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", [name for name in schedules() if "strength" not in name])
def test_the_networks_time_matches_the_reference_in_both_roundings(name: str):
    stored = goldens.tensors("scheduler")
    sigmas = stored[f"{name}.sigmas"]

    exact = sampling.model_time(sigmas) * 1000
    rounded = sampling.model_time(sigmas, bf16=True) * 1000

    torch.testing.assert_close(exact, stored[f"{name}.t_embed_fp32"].float(), atol=1e-3, rtol=0)
    assert torch.equal(rounded.float(), stored[f"{name}.t_embed_bf16"].float())


def test_euler_steps_and_noising_match_the_reference():
    stored = goldens.tensors("scheduler_step")
    sigmas = sampling.make_sigmas(8, 3.0)

    for step in range(8):
        stepped = sampling.euler_step(stored["sample"], stored["velocity"], sigmas[step], sigmas[step + 1])
        torch.testing.assert_close(stepped, stored[f"step{step}"], atol=1e-6, rtol=0)
    noised = sampling.add_noise(stored["sample"], stored["velocity"], sigmas[3])
    torch.testing.assert_close(noised, stored["add_noise_at3"], atol=1e-6, rtol=0)


def test_cpu_noise_is_bit_exact():
    stored = goldens.tensors("rng_cpu")
    for key, expected in stored.items():
        generator = torch.Generator().manual_seed(int(key.removeprefix("seed")))
        assert torch.equal(sampling.make_noise(expected.shape, generator), expected)
    for case in goldens.values("rng_cpu")["cases"]:
        generator = torch.Generator().manual_seed(case["seed"])
        noise = sampling.make_noise(case["shape"], generator)
        assert hashlib.sha256(noise.numpy().astype("<f4").tobytes()).hexdigest() == case["sha256_le_f32"]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("goldens")
    loaded: dict[tuple[str, str], L2PPipeline] = {}

    def pipeline(name: str, dtype: str = "fp32") -> L2PPipeline:
        if (name, dtype) not in loaded:
            path = goldens.write_checkpoint(name, folder)
            loaded[name, dtype] = L2PPipeline.from_pretrained(path, dtype=dtype, bf16_timestep=dtype == "bf16")
        return loaded[name, dtype]

    return pipeline


class Trajectory:
    """A stored run of the original pipeline, and the same run by ours."""

    def __init__(self, name: str) -> None:
        self.stored, self.about = goldens.tensors(name), goldens.metadata(name)
        self.seen: list[Tensor] = []

    def run(self, pipe: L2PPipeline, stored: dict[str, Tensor] | None = None) -> Tensor:
        """Returns the final pixels; `seen` holds those after every step."""
        about, prompts = self.about, stored or self.stored
        image, strength = None, float(about.get("denoising_strength", 1))
        if "init_image_uint8_hwc" in self.stored:
            image = Image.fromarray(self.stored["init_image_uint8_hwc"].numpy())

        def watch(pipe: L2PPipeline, step: int, sigma: float, tensors: dict[str, Tensor]) -> None:
            self.seen.append(tensors["latents"].clone())

        out = pipe(
            prompt_embeds=prompts["prompt_embeds"],
            negative_prompt_embeds=prompts.get("negative_prompt_embeds"),
            width=int(about["W"]),
            height=int(about["H"]),
            num_inference_steps=int(about["steps"]),
            cfg_scale=float(about["cfg"]),
            shift=3.0,
            seed=int(about["seed"]),
            image=image,
            strength=strength,
            output_type="pt",
            callback_on_step_end=watch,
        )
        assert torch.equal(out.images, self.seen[-1])
        return out.images


CASES = [
    ("a", "a.traj_cfg2", 2e-4),
    ("a", "a.traj_nocfg", 2e-4),
    ("a_mini", "a_mini.traj_30steps_cfg2", 2e-4),
    ("a_mini", "a_mini.traj_ragged_cfg2", 2e-4),
    ("a_mini", "a_mini.traj_img2img_strength0.6", 2e-4),
    ("hr64_a", "hr64_a.traj_cfg4", 1e-3),
]


@pytest.mark.parametrize(("model", "name", "tolerance"), CASES, ids=[name for _, name, _ in CASES])
def test_trajectory_matches_the_reference(pipelines, model: str, name: str, tolerance: float):
    trajectory = Trajectory(name)
    expected = trajectory.stored.get("latents")
    middle = None if expected is not None else trajectory.stored["latents_first_mid_last"]

    final = trajectory.run(pipelines(model))

    if expected is not None:
        assert len(trajectory.seen) == len(expected) - 1
        for seen, stored in zip(trajectory.seen, expected[1:], strict=True):
            torch.testing.assert_close(seen, stored, atol=tolerance, rtol=0)
    else:
        assert middle is not None
        steps = len(trajectory.seen)
        torch.testing.assert_close(trajectory.seen[steps // 2 - 1], middle[1], atol=tolerance, rtol=0)
        torch.testing.assert_close(final, middle[2], atol=tolerance, rtol=0)


@pytest.mark.parametrize(("model", "name"), [case[:2] for case in CASES])
def test_finished_picture_matches_the_reference(pipelines, model: str, name: str):
    trajectory = Trajectory(name)
    from l2p_lowvram.images import to_uint8

    picture = to_uint8(trajectory.run(pipelines(model)))[0].numpy().astype(int)

    difference = np.abs(picture - trajectory.stored["image_uint8_hwc"].numpy().astype(int))
    assert difference.max() <= 1
    assert (difference > 0).sum() <= 16


def test_bf16_trajectory_with_the_originals_timestep_stays_close(pipelines):
    trajectory = Trajectory("a.traj_cfg2_bf16")
    prompts = goldens.tensors("a.traj_cfg2")

    trajectory.run(pipelines("a", "bf16"), prompts)

    for step, expected in ((4, 1), (8, 2)):
        stored = trajectory.stored["latents_first_mid_last"][expected]
        assert (trajectory.seen[step - 1] - stored).norm() / stored.norm() < 0.04
