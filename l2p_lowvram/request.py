"""What a call of the pipeline is given, checked: size, schedule, noise, first picture, prompts. No model is needed.

Everything here raises ValueError for what cannot be used, by name.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from . import images, sampling
from .arguments import whole_number
from .config import DEFAULT_STRENGTH, IMAGE_CHANNELS, MAX_SEED, ModelConfig, SamplingDefaults
from .devices import choose_device

Prompts = str | Sequence[str]
Embeds = Tensor | Sequence[Tensor]


def make_schedule(
    defaults: SamplingDefaults,
    steps: int | None,
    shift: float | None,
    sigmas: Sequence[float] | None,
    strength: float | None,
    *,
    from_noise: bool,
) -> Tensor:
    """(steps + 1,) fp32 noise levels down to 0: the model's defaults where nothing is given, or a caller's own."""
    if sigmas is None:
        steps = defaults.steps if steps is None else steps
        depart = 1.0 if from_noise else DEFAULT_STRENGTH if strength is None else strength
        return sampling.make_sigmas(steps, defaults.shift if shift is None else shift, depart)
    if steps is not None or shift is not None:
        raise ValueError("sigmas says everything about the schedule; leave out num_inference_steps and shift")
    if strength is not None:
        raise ValueError("sigmas says everything about the schedule; leave out strength")
    return sampling.check_sigmas(sigmas)


def choose_size(
    config: ModelConfig,
    width: int | None,
    height: int | None,
    image: Image.Image | Tensor | None,
    latents: Tensor | None,
) -> tuple[int, int]:
    """Width and height, checked. Raises ValueError."""
    own = (config.defaults.width, config.defaults.height)
    if latents is not None:
        if not isinstance(latents, Tensor):
            raise ValueError(f"latents must be a tensor (B, 3, H, W), got {type(latents).__name__}")
        if latents.dim() != 4 or latents.shape[1] != IMAGE_CHANNELS:
            raise ValueError(f"latents must have shape (B, 3, H, W), got {list(latents.shape)}")
        own = (latents.shape[3], latents.shape[2])
    elif isinstance(image, Image.Image):
        own = image.size
    elif image is not None:
        own = (image.shape[-1], image.shape[-2])
    width, height = (own[0] if width is None else width), (own[1] if height is None else height)
    config.check_size(width, height)
    return width, height


def noise_source(
    shape: tuple[int, int, int, int],
    seed: int | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    latents: Tensor | None,
    noise_device: str | torch.device,
) -> tuple[Callable[[], Tensor], list[int] | None]:
    """What draws the initial noise (B, 3, H, W) in fp32 in host memory, and the pictures' seeds where seeds make
    it. Raises ValueError here, not as it draws."""
    if sum(source is not None for source in (seed, generator, latents)) > 1:
        raise ValueError("give one of seed, generator and latents")
    if latents is not None:
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {list(shape)} here, got {list(latents.shape)}")
        return lambda: latents.float().cpu(), None
    if isinstance(generator, torch.Generator):
        return lambda: sampling.make_noise(shape, generator).cpu(), None
    single, seeds = (1, *shape[1:]), None
    if generator is not None:
        generators = list(generator)
        if len(generators) != shape[0]:
            raise ValueError(f"{len(generators)} generators for {shape[0]} pictures; give one, or one each")
    else:
        first = secrets.randbelow(2**32) if seed is None else whole_number(seed, "seed", 0, MAX_SEED)
        seeds = [first + index for index in range(shape[0])]
        place = choose_device(noise_device)
        generators = [torch.Generator(place).manual_seed(value) for value in seeds]
    return lambda: torch.cat([sampling.make_noise(single, g).cpu() for g in generators]), seeds


def check_image(image: object) -> Image.Image | Tensor | None:
    """The image upright, if it is one that img2img takes. Raises ValueError."""
    if image is None:
        return None
    if isinstance(image, Image.Image):
        return images.upright(image)
    if isinstance(image, Tensor) and image.dim() in (3, 4) and image.dtype.is_floating_point:
        return image
    what = f"{image.dtype} tensor {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
    raise ValueError(f"image must be a PIL image, or a float tensor (3, H, W) or (1, 3, H, W) in [-1, 1], got {what}")


def check_start(image: Image.Image | Tensor | None, latents: Tensor | None, shape: tuple[int, int, int]) -> None:
    """Raise ValueError unless what a run is to begin with is of this shape (3, H, W) and finite."""
    if latents is not None:
        require_finite(latents, "latents")
    if isinstance(image, Tensor):
        if tuple(image.shape) not in (shape, (1, *shape)):
            raise ValueError(f"image must have shape {shape} for this size, got {list(image.shape)}")
        require_finite(image, "image")


def noised(image: Image.Image | Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Where img2img starts: the picture, resized where it is a PIL image, with as much noise as `sigma` says."""
    return sampling.add_noise(_picture(image, noise.shape[3], noise.shape[2]), noise, sigma)


def _picture(image: Image.Image | Tensor, width: int, height: int) -> Tensor:
    """img2img's start (1, 3, H, W) in fp32, in host memory."""
    if isinstance(image, Image.Image):
        return images.from_pil(image, width, height)
    return (image[None] if image.dim() == 3 else image).float().cpu()


def require_finite(values: Tensor, what: str) -> None:
    if not values.isfinite().all():
        raise ValueError(f"{what} holds NaN or infinity")


def prompt_list(prompt: Prompts | None, embeds: Embeds | None) -> list[str | Tensor]:
    """The prompts as a list of texts or feature tensors. Raises ValueError unless exactly one is given."""
    if (prompt is None) == (embeds is None):
        raise ValueError("give either prompt or prompt_embeds")
    if embeds is not None:
        items: list[str | Tensor] = [embeds] if isinstance(embeds, Tensor) else list(embeds)
    else:
        assert prompt is not None
        items = [prompt] if isinstance(prompt, str) else list(prompt)
    if not items:
        raise ValueError("the list of prompts is empty")
    return _check_items(items, "prompt")


def negative_list(negative: Prompts | None, embeds: Embeds | None, count: int) -> list[str | Tensor]:
    """One negative prompt per prompt; a single one serves all."""
    negative = "" if negative is None else negative
    if embeds is not None:
        if negative:
            raise ValueError("give either negative_prompt or negative_prompt_embeds")
        items: list[str | Tensor] = [embeds] if isinstance(embeds, Tensor) else list(embeds)
    else:
        items = [negative] if isinstance(negative, str) else list(negative)
    if len(items) == 1:
        items = items * count
    if len(items) != count:
        raise ValueError(f"{len(items)} negative prompts for {count} prompts; give one, or one each")
    return _check_items(items, "negative_prompt")


def _check_items(items: list[str | Tensor], what: str) -> list[str | Tensor]:
    for item in items:
        if not isinstance(item, str | Tensor):
            raise ValueError(f"{what} must be text, or features as a tensor, got {type(item).__name__}")
    return items
