"""Flow-matching sampling: sigmas, shift, the Euler step and guidance, as pure functions.

Source: the L2P reference scheduler; sigma runs from 1 (noise) to 0 (picture) and
the model predicts the velocity noise - picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .arguments import number, whole_number
from .config import MAX_COUNT, TIMESTEP_SCALE


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """sigma' = shift * sigma / (1 + (shift - 1) * sigma): more steps at high noise for shift > 1."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def make_sigmas(steps: int, shift: float, strength: float = 1.0) -> Tensor:
    """(steps + 1,) fp32 noise levels from shift(strength) down to 0, the last exactly 0.

    Raises ValueError unless 1 <= steps <= MAX_COUNT, shift > 0 and 0 < strength <= 1.
    """
    steps = whole_number(steps, "the number of steps", 1, MAX_COUNT)
    if number(shift, "shift") <= 0:
        raise ValueError(f"shift must be positive, got {shift}")
    if not 0 < number(strength, "strength") <= 1:
        raise ValueError(f"strength must lie in (0, 1], got {strength}")
    sigmas = shift_sigmas(torch.linspace(strength, 0, steps + 1, dtype=torch.float32), shift)
    if not sigmas.isfinite().all():
        raise ValueError(f"shift must be positive and of a usual size, got {shift}")
    return sigmas


def check_sigmas(sigmas: Sequence[float]) -> Tensor:
    """A caller's own noise levels with the final 0 appended.

    Raises ValueError unless they descend strictly within (0, 1].
    """
    values = [number(sigma, "a sigma") for sigma in sigmas]
    if not values:
        raise ValueError("sigmas is empty; give at least one noise level in (0, 1]")
    if not all(0 < s <= 1 for s in values):
        raise ValueError(f"sigmas must lie in (0, 1] (the final 0 is appended), got {values}")
    if any(b >= a for a, b in pairwise(values)):
        raise ValueError(f"sigmas must descend, got {values}")
    return torch.tensor([*values, 0.0], dtype=torch.float32)


def model_time(sigma: Tensor, *, bf16: bool = False) -> Tensor:
    """What the network is fed: t = 1 - sigma, 0 at pure noise.

    bf16: round the timestep 1000 sigma to bf16 before inverting it, and every
    step of that arithmetic, as the original pipeline does. Off by up to 2.7 of
    1000 on a 30-step schedule; only for comparing with the original.
    """
    timestep = sigma * TIMESTEP_SCALE
    if bf16:
        timestep = timestep.to(torch.bfloat16)
    return (TIMESTEP_SCALE - timestep) / TIMESTEP_SCALE


def euler_step(pixels: Tensor, velocity: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """One Euler step of dx/dsigma = velocity, from sigma to next_sigma, in the dtype of `pixels`."""
    return pixels + velocity.to(pixels.dtype) * (next_sigma - sigma).to(pixels)


def denoised(pixels: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The picture the model currently expects at the end: x - sigma * v."""
    return pixels - velocity.to(pixels.dtype) * sigma.to(pixels)


def guide(positive: Tensor, negative: Tensor, cfg_scale: float) -> Tensor:
    """negative + cfg_scale * (positive - negative)."""
    return negative + cfg_scale * (positive - negative)


def add_noise(picture: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) * picture + sigma * noise: where img2img starts."""
    return (1 - sigma).to(picture) * picture + sigma.to(noise) * noise


def make_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal fp32 noise on the generator's device. CPU and CUDA generators differ for one seed."""
    return torch.randn(tuple(shape), generator=generator, device=generator.device, dtype=torch.float32)
