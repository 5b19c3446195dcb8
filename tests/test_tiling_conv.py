"""Conv nets in tiles against the whole, and the integers against what the nets really look at."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tiling import JOIN, SKIP, Conv, Reach, Up, layers_from, layers_of, pool, reach, tiled, tiles


def conv(inputs: int, outputs: int, kernel: int = 3, **settings: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **settings).double()


def somebodys_net() -> nn.Sequential:
    """Convolutions, activations, pooling and upsampling as one finds them."""
    torch.manual_seed(3)
    return nn.Sequential(
        conv(3, 6, padding=1), nn.SiLU(), nn.MaxPool2d(2),
        conv(6, 8, 5, padding=2), nn.ReLU(), conv(8, 8, 4, stride=2, padding=1), nn.SiLU(),
        conv(8, 8, padding=2, dilation=2), nn.Upsample(scale_factor=2), conv(8, 6, padding=1), nn.SiLU(),
        nn.Upsample(scale_factor=2), conv(6, 3, 1),
    ).eval()  # fmt: skip


NETS = {
    "somebody's net": somebodys_net,
    "one convolution": lambda: nn.Sequential(conv(3, 2, 7, padding=3)),
    "a downsampler": lambda: nn.Sequential(conv(3, 4, padding=1, stride=2), nn.SiLU(), conv(4, 4, stride=2, padding=1)),
    "an upsampler": lambda: nn.Sequential(conv(3, 4, padding=1), nn.Upsample(scale_factor=3), conv(4, 2, padding=1)),
    "overlapping pools": lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1), conv(3, 2, padding=1)),
    "reflected borders": lambda: nn.Sequential(conv(3, 4, padding=1, padding_mode="reflect"), conv(4, 3, padding=1)),
}


@torch.inference_mode()
@pytest.mark.parametrize("name", NETS)
def test_a_plain_net_in_tiles_gives_what_the_whole_gives(name: str):
    """The example of the documentation: any plain sequential net, its layers read off its modules."""
    torch.manual_seed(11)
    net = NETS[name]()
    align = reach(layers_of(net)).align
    x = torch.randn(1, 3, 9 * align + 8, 12 * align if align > 1 else 33, dtype=torch.float64)
    x = x[..., : x.shape[-2] // align * align, :]

    for tile in (align, 3 * align, 64):
        torch.testing.assert_close(tiled(net, x, tile=tile // align * align), net(x), atol=1e-12, rtol=0)


class UNet(nn.Module):
    """No sequence of modules: nothing can be read off it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.deep, self.last = conv(3, 4, padding=1), conv(4, 4, padding=1), conv(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.cat([x, F.interpolate(self.deep(F.max_pool2d(x, 2)), scale_factor=2)], 1))


@torch.inference_mode()
def test_any_net_runs_in_tiles_once_its_layers_are_named():
    net, x = UNet(), torch.randn(1, 3, 40, 28, dtype=torch.float64)
    layers = (Conv(3), SKIP, pool(2), Conv(3), Up(2), JOIN, Conv(1, 1, 0))

    torch.testing.assert_close(tiled(net, x, tile=8, layers=layers), net(x), atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="layers of UNet cannot be read off; give layers="):
        tiled(net, x, tile=8)


@torch.inference_mode()
@pytest.mark.parametrize("name", [name for name in NETS if name != "an upsampler"])
def test_one_alignment_step_less_than_the_halo_is_wrong(name: str):
    net = NETS[name]()
    found = reach(layers_of(net))
    x = torch.randn(1, 3, 16 * found.align, 16 * found.align, dtype=torch.float64)

    short = tiled(net, x, tile=8 * found.align, halo=found.halo - found.align)

    assert (short - net(x)).abs().max() > 1e-6


def looked_at(net: nn.Sequential, found: Reach) -> tuple[int, int]:
    """How far before and after its aligned cell an output really looks along rows: by gradients."""
    size = found.align * 2 * (found.halo // found.align + 2)
    x = torch.randn(1, 3, size, 4 * found.align, dtype=torch.float64, requires_grad=True)
    cell = size // found.align // 2
    net(x)[..., cell * found.out_align : (cell + 1) * found.out_align, :].sin().sum().backward()
    assert x.grad is not None
    rows = x.grad.abs().amax((0, 1, 3)).nonzero().flatten()
    return cell * found.align - int(rows[0]), int(rows[-1]) + 1 - (cell + 1) * found.align


@pytest.mark.parametrize("name", [name for name in NETS if "pool" not in name])
def test_the_reach_is_what_the_gradient_shows(name: str):
    net = nn.Sequential(*(nn.AvgPool2d(2) if isinstance(m, nn.MaxPool2d) else m for m in NETS[name]()))
    found = reach(layers_of(NETS[name]()))

    before, after = looked_at(net, found)

    assert (max(before, 0), max(after, 0)) == (found.before, found.after)


@pytest.mark.parametrize(("depth", "align", "halo"), [(2, 4, 12), (3, 8, 24), (4, 16, 48), (6, 64, 192), (7, 128, 384)])
def test_halo_and_alignment_of_a_u_net_follow_from_its_layers(depth: int, align: int, halo: int):
    """Published for the L2P decoders: alignment 2^n; a structural reach of 3 * 2^n - 1."""
    layers = layers_from(
        ["conv3", "skip", "pool2"] * depth + ["conv1"] + ["up2", "conv3", "join", "conv3"] * depth + ["conv1"]
    )

    found = reach(layers)

    assert (found.align, found.halo) == (align, halo)
    assert max(found.before, found.after) == 3 * 2**depth - 1


@pytest.mark.parametrize(
    ("depth", "before", "halo", "cells"), [(1, 2, 2, 1), (2, 7, 8, 2), (3, 19, 24, 2), (4, 39, 48, 2)]
)
def test_the_shallow_levels_of_a_u_net_need_a_few_pixels(depth: int, before: int, halo: int, cells: int):
    """With everything deeper given from outside: halo 2, 8, 24, 48 for 1 to 4 levels."""
    shallow = ["conv3", "skip", "pool2"] * depth + ["inner"] + ["up2", "conv3", "join", "conv3"] * depth + ["conv1"]

    found = reach(layers_from(shallow))

    assert found.halo == halo
    assert found.before in (before, cells * 2**depth)
    assert found.inner == 1


def small_u_net(x: Tensor, weights: list[Tensor]) -> Tensor:
    first = F.silu(F.conv2d(x, weights[0], padding=1))
    second = F.silu(F.conv2d(F.max_pool2d(first, 2), weights[1], padding=1))
    deep = F.silu(F.conv2d(F.max_pool2d(second, 2), weights[2]))
    up = F.conv2d(F.interpolate(deep, scale_factor=2), weights[3], padding=1)
    up = F.conv2d(torch.cat([up, second], 1), weights[4], padding=1)
    up = F.conv2d(F.interpolate(up, scale_factor=2), weights[5], padding=1)
    return F.conv2d(torch.cat([up, first], 1), weights[6], padding=1)


def u_net_weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(4, 3, 3), (4, 4, 3), (4, 4, 1), (4, 4, 3), (4, 8, 3), (4, 4, 3), (2, 8, 3)]
    return [torch.randn(o, i, k, k, generator=generator, dtype=torch.float64) / 3 for o, i, k in shapes]


@pytest.mark.parametrize("step", [0, 1])
def test_a_u_net_with_skips_is_exact_at_its_halo_and_wrong_one_step_below(step: int):
    layers = layers_from(["conv3", "skip", "pool2"] * 2 + ["conv1"] + ["up2", "conv3", "join", "conv3"] * 2)
    found, weights = reach(layers), u_net_weights()
    x = torch.randn(1, 3, 52, 44, dtype=torch.float64)
    whole = small_u_net(x, weights)

    result = torch.full_like(whole, torch.nan)
    for rows in tiles(found, 52, 16, halo=found.halo - step * found.align):
        for columns in tiles(found, 44, 16, halo=found.halo - step * found.align):
            made = small_u_net(x[..., rows.read, columns.read], weights)
            result[..., rows.keep, columns.keep] = made[..., rows.local, columns.local]

    error = (result - whole).abs().max()
    assert error < 1e-12 if step == 0 else error > 1e-3


@settings(max_examples=60)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 6))
def test_tiles_keep_every_output_once_and_crops_agree(depth: int, cells: int, tile_cells: int):
    layers = layers_from(["conv3", "skip", "pool2"] * depth + ["inner"] + ["up2", "conv3", "join"] * depth)
    found = reach(layers)

    cut = tiles(found, cells * found.align, tile_cells * found.align)

    assert [p for t in cut for p in range(t.keep.start, t.keep.stop)] == list(range(cells * found.align))
    for t in cut:
        assert (t.inner.stop - t.inner.start) * found.align == t.read.stop - t.read.start
        assert t.local.stop - t.local.start == t.keep.stop - t.keep.start
        assert t.read.start + t.local.start == t.keep.start


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Conv(3, 1, 0), "needs a padding from 1 to 1 to keep the grid, got 0"),
        (lambda: Conv(3, 2, 2), "needs a padding from 1 to 1 to keep the grid, got 2"),
        (lambda: Conv(0), "must be positive"),
        (lambda: layers_from(["conv4"]), "unknown layer 'conv4'"),
        (lambda: reach(layers_from(["join"])), "needs a map set aside by a skip"),
        (lambda: reach(layers_from(["skip", "pool2", "join"])), "at the same resolution"),
        (lambda: reach(layers_from(["skip"])), "1 skipped maps are never joined"),
        (lambda: tiles(reach(layers_from(["pool2"])), 9, 2), "length must be a multiple of 2 .* nearest is 8 or 10"),
        (lambda: layers_of(nn.Sequential(nn.GroupNorm(1, 3))), "GroupNorm.* has no exact tiles"),
        (lambda: layers_of(nn.Sequential(nn.Conv2d(1, 1, (3, 5), padding=(1, 2)))), "rows and columns differently"),
    ],
)
def test_what_has_no_exact_tiles_is_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"),
        nn.MaxPool2d(3, 2, 1, dilation=2),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Upsample(scale_factor=1.5),
    ],
    ids=str,
)
def test_layers_whose_settings_look_elsewhere_are_refused(module: nn.Module) -> None:
    with pytest.raises(ValueError, match="has no exact tiles that follow from its settings"):
        layers_of(nn.Sequential(module))


@pytest.mark.parametrize("first", [nn.SiLU(inplace=True), nn.LeakyReLU(0.1, inplace=True)], ids=str)
def test_a_net_that_begins_in_place_changes_no_input_and_no_tile(first: nn.Module) -> None:
    """Halos are read by several tiles."""
    net = nn.Sequential(first, nn.Conv2d(3, 4, 3, padding=1)).eval().requires_grad_(False)
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = x.clone()

    found = tiled(net, x, tile=8)

    assert torch.equal(x, before)
    assert torch.allclose(found, net(before.clone()), atol=1e-6)
