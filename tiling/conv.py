"""Convolutional nets in tiles, exactly: halo and alignment follow from a list of the net's layers.

A net is a sequence of layers, for U-Nets with marks where a map is set aside and joined again:

    Conv(kernel, stride, padding)   also a pooling window (`pool(2)`)
    Up(factor)                      nearest-neighbour upsampling
    SKIP, JOIN                      set the current map aside; concatenate the latest one set aside
    INNER                           from here on the map comes from outside (the deeper part of a U-Net)

Activations and biases do not move information sideways and are left out. Everything here but `run_tiled` is
integer arithmetic on one axis; rows and columns follow the same rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from tiling.spans import nearest_multiples, spans


@dataclass(frozen=True)
class Conv:
    """A sliding window of `kernel` (dilation included) positions; padding only ever fills in beyond the map."""

    kernel: int = 3
    stride: int = 1
    padding: int = 1

    def __post_init__(self) -> None:
        if min(self.kernel, self.stride) < 1 or self.padding < 0:
            raise ValueError(f"kernel and stride must be positive and padding not negative, got {self}")
        # Then a map of n strides gives n positions, inside as at the borders.
        if not self.kernel - self.stride <= 2 * self.padding < self.kernel:
            raise ValueError(
                f"a window of {self.kernel} with stride {self.stride} needs a padding from "
                f"{max(-(-(self.kernel - self.stride) // 2), 0)} to {(self.kernel - 1) // 2} to keep the grid, "
                f"got {self.padding}"
            )


@dataclass(frozen=True)
class Up:
    """Every position repeated `factor` times."""

    factor: int = 2

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"factor must be at least 1, got {self.factor}")


@dataclass(frozen=True)
class Mark:
    """A point of the net that computes nothing: SKIP, JOIN or INNER."""

    name: str


SKIP, JOIN, INNER = Mark("skip"), Mark("join"), Mark("inner")
Layer = Conv | Up | Mark
_MARKS = {mark.name: mark for mark in (SKIP, JOIN, INNER)}


def pool(size: int) -> Conv:
    return Conv(size, size, 0)


def layers_from(words: Iterable[str]) -> tuple[Layer, ...]:
    """ "conv3", "conv1", "pool2", "up2", "skip", "join", "inner" -> layers; convN keeps the map's size.

    Raises ValueError for another word.
    """
    made: list[Layer] = []
    for word in words:
        kind, digits = word.rstrip("0123456789"), word[len(word.rstrip("0123456789")) :]
        if word in _MARKS:
            made.append(_MARKS[word])
        elif kind == "conv" and digits and int(digits) % 2:
            made.append(Conv(int(digits), 1, int(digits) // 2))
        elif kind == "pool" and digits:
            made.append(pool(int(digits)))
        elif kind == "up" and digits:
            made.append(Up(int(digits)))
        else:
            raise ValueError(f"unknown layer {word!r}; known are conv<odd>, pool<n>, up<n>, {', '.join(_MARKS)}")
    return tuple(made)


def layers_of(net: nn.Sequential) -> tuple[Layer, ...]:
    """The layers of a plain sequential net: convolutions, poolings, nearest upsampling, per-position modules.

    Raises ValueError for a module that looks further (normalisation over positions, attention, ...).
    """
    return tuple(layer for module in net for layer in _layers_of_module(module))


_PER_POSITION = (
    nn.Identity, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.BatchNorm2d, nn.Dropout,
)  # fmt: skip


def _layers_of_module(module: nn.Module) -> tuple[Layer, ...]:
    if isinstance(module, nn.Sequential):
        return layers_of(module)
    if isinstance(module, _PER_POSITION):
        return ()
    if isinstance(module, nn.Conv2d) and isinstance(module.padding, tuple) and module.padding_mode != "circular":
        kernel = _square(module, [(k - 1) * d + 1 for k, d in zip(module.kernel_size, module.dilation, strict=True)])
        return (Conv(kernel, _square(module, module.stride), _square(module, module.padding)),)
    if isinstance(module, nn.MaxPool2d) and module.dilation == 1 and not module.ceil_mode:
        sides = (module.kernel_size, module.stride, module.padding)
        kernel, stride, padding = (_square(module, (side,) if isinstance(side, int) else side) for side in sides)
        return (Conv(kernel, stride, padding),)
    if isinstance(module, nn.Upsample) and module.mode == "nearest":
        factor = module.scale_factor
        if isinstance(factor, int | float) and factor == int(factor):
            return (Up(int(factor)),)
    raise ValueError(f"{module} has no exact tiles that follow from its settings; give layers= yourself")


def _square(module: nn.Module, sides: Sequence[int]) -> int:
    if len(set(sides)) != 1:
        raise ValueError(f"{module} treats rows and columns differently, which these layers cannot say")
    return sides[0]


@dataclass(frozen=True)
class Reach:
    """What follows from a net's layers, in positions of one axis.

    align: tiles of the input start and end on multiples of it, so that strides and pools meet the same
    positions as without tiles. out_align: the same edge counted on the output. before, after: how far beyond
    its own aligned cell an output looks on the input. halo: the larger of both, rounded up to `align`: enough
    to read. inner: positions of the INNER map per `align` (0 without one).
    """

    align: int
    out_align: int
    before: int
    after: int
    inner: int

    @property
    def halo(self) -> int:
        return -(-max(self.before, self.after) // self.align) * self.align


def reach(layers: Sequence[Layer]) -> Reach:
    """Receptive field, alignment and halo of a net; JOIN and SKIP have to match. Pure integers."""
    scales = _scales(layers)
    align = math.lcm(*(scale.denominator for scale in scales))
    out_align = int(align * scales[-1])
    inner = next((int(align * scales[i]) for i, layer in enumerate(layers) if layer == INNER), 0)
    # The aligned cell that starts at 0: whatever it needs of the input, and of INNER in input positions.
    needed, deep = _needed(layers, (0, out_align))
    spread = [needed] if needed else []
    if deep is not None:
        spread.append((deep[0] * align // inner, -(-deep[1] * align // inner)))
    before = max((-low for low, _ in spread), default=0)
    after = max((high - align for _, high in spread), default=0)
    return Reach(align, out_align, max(before, 0), max(after, 0), inner)


def _scales(layers: Sequence[Layer]) -> list[Fraction]:
    """Positions per input position, before every layer and after the last one."""
    scales, kept = [Fraction(1)], []
    for layer in layers:
        scale = scales[-1]
        if isinstance(layer, Conv):
            scale /= layer.stride
        elif isinstance(layer, Up):
            scale *= layer.factor
        elif layer == SKIP:
            kept.append(scale)
        elif layer == JOIN and (not kept or kept.pop() != scale):
            raise ValueError("a join needs a map set aside by a skip at the same resolution")
        scales.append(scale)
    if kept:
        raise ValueError(f"{len(kept)} skipped maps are never joined")
    return scales


Interval = tuple[int, int]


def _needed(layers: Sequence[Layer], wanted: Interval) -> tuple[Interval | None, Interval | None]:
    """The input and INNER positions that the outputs `wanted` depend on; None where on none."""
    current: Interval | None = wanted
    inner: Interval | None = None
    joined: list[Interval | None] = []
    for layer in reversed(layers):
        if layer == JOIN:
            joined.append(current)
        elif layer == SKIP:
            current = _union(current, joined.pop())
        elif layer == INNER:
            inner, current = current, None
        elif current is not None:
            current = _before(layer, current)
    return current, inner


def _before(layer: Layer, span: Interval) -> Interval:
    start, stop = span
    if isinstance(layer, Conv):
        first = start * layer.stride - layer.padding
        return first, (stop - 1) * layer.stride - layer.padding + layer.kernel
    assert isinstance(layer, Up)
    return start // layer.factor, -(-stop // layer.factor)


def _union(a: Interval | None, b: Interval | None) -> Interval | None:
    if a is None or b is None:
        return a if b is None else b
    return min(a[0], b[0]), max(a[1], b[1])


@dataclass(frozen=True)
class Tile:
    """One axis of a tile. read: input positions to crop. inner: INNER positions to crop. keep: outputs that
    the tile owns. local: where those lie in what the net makes of the crop."""

    read: slice
    inner: slice
    keep: slice
    local: slice


def tiles(reached: Reach, length: int, tile: int, *, halo: int | None = None) -> list[Tile]:
    """Cut an axis of `length` input positions into tiles whose core is `tile` input positions.

    The outputs are kept exactly once; each tile reads `halo` more (by default what the net needs), cut at the
    ends of the axis, so that the net's own padding fills in only beyond the true border.
    Raises ValueError unless length, tile and halo are multiples of the net's `align`.
    """
    align = reached.align
    if length % align:
        raise ValueError(
            f"length must be a multiple of {align} (the net's alignment), got {length}; "
            f"nearest is {nearest_multiples(length, align, lowest=align)}"
        )

    def scaled(start: int, stop: int, per_align: int) -> slice:
        return slice(start // align * per_align, stop // align * per_align)

    return [
        Tile(
            slice(s.read_start, s.read_stop),
            scaled(s.read_start, s.read_stop, reached.inner),
            scaled(s.keep_start, s.keep_stop, reached.out_align),
            scaled(s.keep_start - s.read_start, s.keep_stop - s.read_start, reached.out_align),
        )
        for s in spans(length, tile, halo=reached.halo if halo is None else halo, align=align)
    ]


# (rows, columns) of the input -> the crop (B, C, rows, columns)
Read = Callable[[slice, slice], Tensor]
# (rows, columns, values): the outputs that a tile owns
Write = Callable[[slice, slice, Tensor], None]


def run_tiled(
    net: Callable[[Tensor], Tensor],
    read: Read,
    write: Write,
    layers: Sequence[Layer],
    size: tuple[int, int],
    *,
    tile: int,
    halo: int | None = None,
) -> None:
    """Run `net` over an input of `size` (height, width) a tile of `tile` x `tile` at a time.

    read fetches a crop, from wherever the input lives; write gets every output once. Exact: a kept output is
    computed from the same inputs as without tiles, up to the order in which a kernel sums.
    """
    reached = reach(layers)
    for rows in tiles(reached, size[0], tile, halo=halo):
        for columns in tiles(reached, size[1], tile, halo=halo):
            result = net(read(rows.read, columns.read))
            write(rows.keep, columns.keep, result[..., rows.local, columns.local])


def tiled(
    net: nn.Module, x: Tensor, *, tile: int, halo: int | None = None, layers: Sequence[Layer] | None = None
) -> Tensor:
    """net(x) for x (B, C, H, W), in tiles; of a plain `nn.Sequential` the layers are read off the modules.

        net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2),
                            nn.Conv2d(8, 8, 3, padding=1), nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 1))
        picture = tiled(net, x, tile=256)

    layers: of any other net, in the order of its forward. Modules have to be in eval mode where that matters (batch
    norm, dropout). Exact up to rounding. Raises ValueError for modules whose layers cannot be read off, and sizes that
    the net's strides do not divide.
    """
    if layers is None:
        if not isinstance(net, nn.Sequential):
            raise ValueError(f"the layers of {type(net).__name__} cannot be read off; give layers=")
        layers = layers_of(net)
    result: list[Tensor] = []
    scale = Fraction(reach(layers).out_align, reach(layers).align)

    def write(rows: slice, columns: slice, values: Tensor) -> None:
        if not result:
            height, width = (int(side * scale) for side in x.shape[-2:])
            result.append(torch.empty(*values.shape[:-2], height, width, dtype=values.dtype, device=values.device))
        result[0][..., rows, columns] = values

    in_place = any(getattr(module, "inplace", False) for module in net.modules())

    def read(rows: slice, columns: slice) -> Tensor:
        crop = x[..., rows, columns]
        return crop.clone() if in_place else crop  # what several tiles read, none may change

    run_tiled(net, read, write, layers, (x.shape[-2], x.shape[-1]), tile=tile, halo=halo)
    return result[0]
