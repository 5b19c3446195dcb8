"""The demo model's world: coloured shapes, the phrases that name them, and their true pictures.

One scene is one shape on a plain background. `draw_scenes` samples scenes,
`phrase` words them in varying order, `render` paints them at any size.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# RGB in [-1, 1]; far enough apart that the nearest colour is never in doubt.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.80, -0.80, -0.80),
    "green": (-0.75, 0.35, -0.65),
    "blue": (-0.75, -0.50, 0.85),
    "yellow": (0.95, 0.75, -0.75),
    "purple": (0.10, -0.70, 0.30),
    "orange": (0.95, 0.05, -0.85),
    "white": (0.95, 0.95, 0.95),
    "black": (-0.92, -0.92, -0.92),
}
SHAPES = ("circle", "square", "triangle", "ring")
SIZES = {"small": 0.14, "medium": 0.19, "large": 0.25}  # radius as a share of the shorter side
# Centre as a share of width and height.
POSITIONS = {
    "left": (0.28, 0.5),
    "right": (0.72, 0.5),
    "top": (0.5, 0.28),
    "bottom": (0.5, 0.72),
    "center": (0.5, 0.5),
}
JITTER = 0.005  # of the centre, and (relative to it) of the radius


@dataclass(frozen=True)
class Scene:
    """What a picture shows; every field is a word of the prompt."""

    shape: str
    colour: str
    background: str
    size: str = "medium"
    position: str = "center"

    def labels(self) -> tuple[int, int, int, int, int]:
        """Class index of shape, colour, background, size and position."""
        return (
            SHAPES.index(self.shape),
            list(COLOURS).index(self.colour),
            list(COLOURS).index(self.background),
            list(SIZES).index(self.size),
            list(POSITIONS).index(self.position),
        )


CLASSES = (len(SHAPES), len(COLOURS), len(COLOURS), len(SIZES), len(POSITIONS))


def draw_scenes(rng: random.Random, count: int) -> list[Scene]:
    """Independent, uniform scenes; shape and background never share a colour."""
    scenes = []
    for _ in range(count):
        colour, background = rng.sample(list(COLOURS), 2)
        scenes.append(
            Scene(rng.choice(SHAPES), colour, background, rng.choice(list(SIZES)), rng.choice(list(POSITIONS)))
        )
    return scenes


def phrase(scene: Scene, rng: random.Random) -> str:
    """One of the wordings of a scene; articles, commas and order vary.

    `medium` and `center` may be left unsaid, as they are what is assumed.
    """
    size = "" if scene.size == "medium" and rng.random() < 0.4 else scene.size
    article, the = rng.choice(("a ", "one ", "the ", "")), rng.choice(("a ", "the ", ""))
    body = " ".join(word for word in (size, scene.colour, scene.shape) if word)
    if size and rng.random() < 0.15:
        body = f"{scene.colour} {scene.shape}, {size}"
        if rng.random() < 0.5:
            body = f"{size}, {scene.colour} {scene.shape}"
    back = f"{the}{scene.background} background"
    if scene.position == "center" and rng.random() < 0.4:
        place = ""
    else:
        place = rng.choice(_PLACES).format(scene.position)
    return _arrange(article + body, back, place, rng)


_PLACES = ("{}", "{}", "{}", "at the {}", "on the {}", "in the {}", "{} side")


def _arrange(body: str, back: str, place: str, rng: random.Random) -> str:
    """Body, background and place in one of the orders people write them in."""
    comma, tail = rng.choice((", ", " ")), f", {place}" if place else ""
    orders = (
        f"{body} on {back}{tail}",
        f"{body} on {back}{tail}",
        f"{body} on {back}{tail.replace(', ', ' ')}",
        f"{body}{tail}, {back}",
        f"{body}{tail}{comma}on {back}",
        f"on {back}, {body}{tail}",
        f"{back} with {body}{tail}",
        f"{back}{comma}{body}{tail}",
        f"{place + ', ' if place else ''}{body}{comma}{back}",
        f"{place + ': ' if place else ''}{body} on {back}",
    )
    text = rng.choice(orders)
    return text[0].upper() + text[1:] if rng.random() < 0.1 else text


def render(scenes: Sequence[Scene], width: int, height: int, generator: torch.Generator | None = None) -> Tensor:
    """(B, 3, H, W) in [-1, 1]: antialiased pictures.

    With a generator, centre and radius vary a little from picture to picture.
    """
    return paint(scenes, covers(scenes, width, height, generator))


def covers(
    scenes: Sequence[Scene],
    width: int,
    height: int,
    generator: torch.Generator | None = None,
    jitter: float = JITTER,
) -> Tensor:
    """(B, 1, H, W) in [0, 1]: how much of each pixel the figure covers; `generator` as in `render`."""
    noise = torch.rand(len(scenes), 3, generator=generator) * 2 - 1 if generator else torch.zeros(len(scenes), 3)
    result = torch.empty(len(scenes), 1, height, width)
    for cover, scene, (x, y, scale) in zip(result, scenes, noise.tolist(), strict=True):
        share = POSITIONS[scene.position]
        centre = ((share[0] + jitter * x) * width, (share[1] + jitter * y) * height)
        cover.copy_(outline(scene.shape, width, height, centre, SIZES[scene.size] * (1 + jitter * scale)))
    return result


def colours(scenes: Sequence[Scene]) -> Tensor:
    """(B, 2, 3): RGB of figure and background."""
    return torch.tensor([(COLOURS[scene.colour], COLOURS[scene.background]) for scene in scenes])


def paint(scenes: Sequence[Scene], cover: Tensor) -> Tensor:
    """(B, 3, H, W): figures in their colours where `cover` (B, 1, H, W) is 1, else background."""
    figure, background = colours(scenes)[..., None, None].unbind(1)
    return background + (figure - background) * cover


def outline(
    shape: str, width: int, height: int, centre: tuple[float | Tensor, float | Tensor], radius: float
) -> Tensor:
    """(H, W) in [0, 1]: how much of each pixel a shape covers.

    centre: (x, y) in pixels. radius: share of the shorter side.
    """
    dx = torch.arange(width) + 0.5 - centre[0]
    dy = torch.arange(height) + 0.5 - centre[1]
    distance = _DISTANCE[shape](dx[None, :], dy[:, None], radius * min(width, height))
    return (0.5 - distance).clamp(0, 1)


def _circle(dx: Tensor, dy: Tensor, radius: float) -> Tensor:
    return (dx**2 + dy**2).sqrt() - radius


def _square(dx: Tensor, dy: Tensor, radius: float) -> Tensor:
    return torch.maximum(dx.abs(), dy.abs()) - 0.88 * radius


def _triangle(dx: Tensor, dy: Tensor, radius: float) -> Tensor:
    # Pointing up, as high as wide, its box centred on the scene's position.
    edge = (2 * dx.abs() - dy - radius) / 5**0.5
    return torch.maximum(edge, dy - radius)


def _ring(dx: Tensor, dy: Tensor, radius: float) -> Tensor:
    return ((dx**2 + dy**2).sqrt() - 0.76 * radius).abs() - 0.24 * radius


# Signed distance in pixels to the outline, negative inside. dx (1, W), dy (H, 1).
_DISTANCE = {"circle": _circle, "square": _square, "triangle": _triangle, "ring": _ring}
