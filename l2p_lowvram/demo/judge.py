"""What a picture of the demo's world shows, read from its pixels alone.

No learning and no knowledge of the prompt: the background is the commonest colour of the rim, the
figure is what differs from it, and its class is that of the outline that overlaps it best.
"""

from __future__ import annotations

from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor

from .scenes import COLOURS, POSITIONS, SHAPES, Scene, outline

_PALETTE = torch.tensor(list(COLOURS.values()))
_NAMES = list(COLOURS)
_RADII = torch.linspace(0.10, 0.30, 21).tolist()  # tried outlines, as a share of the shorter side
_SMALL_TO_MEDIUM, _MEDIUM_TO_LARGE = 0.165, 0.22  # half-way between the sizes' radii
RIM = 0.04  # width of the rim that tells the background, as a share of the shorter side


def nearest_colours(picture: Tensor) -> Tensor:
    """(3, H, W) -> (H, W) index of the closest palette colour per pixel."""
    return (picture.permute(1, 2, 0)[..., None, :] - _PALETTE).square().sum(-1).argmin(-1)


def judge(picture: Tensor) -> Scene | None:
    """picture (3, H, W) in [-1, 1] -> the scene it shows, or None for a plain surface."""
    picture = F.avg_pool2d(picture.float().clamp(-1, 1)[None], 3, stride=1, padding=1, count_include_pad=False)[0]
    background = int(_rim(nearest_colours(picture)).mode().values)
    colour = _figure_colour(picture, background)
    if colour is None:
        return None
    figure = _figure(picture, background, colour)
    if figure.sum() < 0.002 * figure.numel():
        return None
    shape, radius = _best_outline(figure)
    size = "small" if radius < _SMALL_TO_MEDIUM else "medium" if radius < _MEDIUM_TO_LARGE else "large"
    return Scene(shape, _NAMES[colour], _NAMES[background], size, _position(figure))


def _rim(values: Tensor) -> Tensor:
    width = max(1, round(RIM * min(values.shape)))
    rows = torch.cat([values[:width].flatten(), values[-width:].flatten()])
    return torch.cat([rows, values[:, :width].flatten(), values[:, -width:].flatten()])


def _figure_colour(picture: Tensor, background: int) -> int | None:
    """The commonest palette colour of what differs from the background; None if nothing does."""
    others = [index for index in range(len(_NAMES)) if index != background]
    gap = (_PALETTE[others] - _PALETTE[background]).square().sum(-1).min().sqrt()
    differs = (picture - _PALETTE[background][:, None, None]).square().sum(0).sqrt() > gap / 2
    counts = nearest_colours(picture)[_majority(differs)].bincount(minlength=len(_NAMES))
    counts[background] = 0
    return int(counts.argmax()) if counts.any() else None


def _figure(picture: Tensor, background: int, colour: int) -> Tensor:
    """(H, W) bool: pixels more than half-way from the background's colour to the figure's."""
    axis = _PALETTE[colour] - _PALETTE[background]
    share = ((picture - _PALETTE[background][:, None, None]) * axis[:, None, None]).sum(0) / axis.square().sum()
    return _majority(share > 0.5)


def _majority(mask: Tensor) -> Tensor:
    """Each pixel as most of its neighbours are: single odd pixels are no figure."""
    return F.avg_pool2d(mask[None].float(), 3, stride=1, padding=1)[0] > 0.5


def _best_outline(figure: Tensor) -> tuple[str, float]:
    """Shape and radius whose outline, put where the figure is, has the largest overlap (IoU) with it."""
    rows, columns = figure.any(1).nonzero().flatten(), figure.any(0).nonzero().flatten()
    centre = ((columns[0] + columns[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2)
    best = ("", 0.0, -1.0)
    for shape in SHAPES:
        for radius in _RADII:
            painted = outline(shape, figure.shape[1], figure.shape[0], centre, radius) > 0.5
            overlap = float((painted & figure).sum() / (painted | figure).sum())
            best = max(best, (shape, radius, overlap), key=lambda entry: entry[2])
    return best[0], best[1]


def _position(figure: Tensor) -> str:
    """The named position closest to the middle of the figure's extent, of which stray specks are no part."""
    points = figure.nonzero().float().add(0.5)
    rows, columns = points.quantile(torch.tensor([0.02, 0.98]), dim=0).mean(0).tolist()
    x, y = columns / figure.shape[1], rows / figure.shape[0]
    return min(POSITIONS, key=lambda name: (POSITIONS[name][0] - x) ** 2 + (POSITIONS[name][1] - y) ** 2)


def agreement(expected: list[Scene], judged: list[Scene | None]) -> dict[str, float]:
    """Share of pictures whose shape, colour, background, size and position are as expected."""
    return {
        field.name: sum(
            seen is not None and getattr(seen, field.name) == getattr(scene, field.name)
            for scene, seen in zip(expected, judged, strict=True)
        )
        / len(expected)
        for field in fields(Scene)
    }
