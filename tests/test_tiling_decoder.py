"""The local decoder in tiles against the whole, for the level structure of every family."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import FakeCuda
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from l2p_lowvram import decoder, decoder_plan
from l2p_lowvram.config import ModelConfig
from l2p_lowvram.decoder import LocalDecoder, decoder_layers, encoder_layers, merge_layers, nearest_resize
from l2p_lowvram.decoder_memory import choose_plan, decoder_memory
from l2p_lowvram.decoder_plan import DecoderJob, DecoderPlan, Stage, macs, overhead, whole_plan
from l2p_lowvram.families import PUBLISHED
from l2p_lowvram.linear import Conv2d
from l2p_lowvram.synthetic import mini_config
from l2p_lowvram.tiled_decoder import decode_tiled, reading, writing_velocity
from l2p_lowvram.weights import bind
from tests.live_bytes import LiveBytes

PATCHES = {"1k": 16, "4k": 64, "8k": 128, "10k": 160}
# (height, width), neither square nor a multiple of a tile.
SIZES = {"1k": (176, 272), "4k": (448, 320), "8k": (640, 896), "10k": (640, 960)}
PLANS = {
    "1k": ([(0, 4, 48)], [(0, 1, 32), (1, 4, 0)], [(0, 2, 64), (2, 3, 48), (3, 4, 80)]),
    "4k": ([(0, 6, 128)], [(0, 2, 100), (2, 6, 0)], [(0, 3, 96), (3, 4, 160), (4, 6, 192)]),
    "8k": ([(0, 7, 384)], [(0, 3, 136), (3, 7, 0)], [(0, 1, 250), (1, 4, 208), (4, 7, 384)]),
    "10k": ([(0, 6, 192)], [(0, 2, 252), (2, 6, 0)], [(0, 3, 96), (3, 5, 160), (5, 6, 384)]),
}
CASES = [(family, index) for family, plans in PLANS.items() for index in range(len(plans))]
# The 1K file at 3840 x 2160 and 4096 x 4096, the others at their own size, (width, height).
FULL_SIZES = [("1k", 1024, 1024), ("1k", 3840, 2160), ("1k", 4096, 4096), ("4k", 4096, 4096)]
FULL_SIZES += [("8k", 8192, 8192), ("10k", 10240, 10240)]


def random_decoder(config: ModelConfig, dtype: torch.dtype = torch.float32) -> LocalDecoder:
    """Weights that keep the signal alive through every level, so that a mistake anywhere is seen, without
    blowing up fp32's own noise (a gain of 1.5 puts the untiled 8K decoder 3e-5 from float64)."""
    torch.manual_seed(5)
    decoder = LocalDecoder(config.decoder, config.dim)
    for name, parameter in decoder.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1.2 / parameter[0].numel() ** 0.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return decoder.to(dtype).requires_grad_(False)


def random_inputs(family: str, config: ModelConfig, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    height, width = SIZES[family]
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randn(1, height // PATCHES[family] * (width // PATCHES[family]), config.dim, generator=generator)
    grid = (height // PATCHES[family], width // PATCHES[family])
    # As the model gives them: a transposed view of the token stream.
    features = tokens.to(dtype).transpose(1, 2).unflatten(2, grid)
    return torch.randn(1, 3, height, width, generator=generator).to(dtype), features


def stages(family: str, index: int) -> DecoderPlan:
    return DecoderPlan(tuple(Stage(*stage) for stage in PLANS[family][index]))


def run(decoder: LocalDecoder, plan: DecoderPlan, pixels: Tensor, features: Tensor) -> Tensor:
    out = torch.full_like(pixels, torch.nan)
    read = reading(pixels, features.device, features.dtype)
    decode_tiled(decoder, plan, (pixels.shape[-2], pixels.shape[-1]), read, features, writing_velocity(out))
    return out


def relative(difference: Tensor, reference: Tensor) -> float:
    return float(difference.abs().max() / reference.abs().max())


@torch.inference_mode()
@pytest.mark.parametrize(("family", "index"), CASES)
def test_tiles_give_what_the_whole_decoder_gives(family: str, index: int):
    config = mini_config(PATCHES[family])
    decoder = random_decoder(config)
    pixels, features = random_inputs(family, config)

    velocity = run(decoder, stages(family, index), pixels, features)

    whole = -decoder(pixels, features)
    assert relative(velocity - whole, whole) <= 1e-5


@torch.inference_mode()
@pytest.mark.parametrize(("family", "index"), CASES)
def test_in_float64_tiles_agree_to_the_last_digits(family: str, index: int):
    config = mini_config(PATCHES[family])
    decoder = random_decoder(config, torch.float64)
    pixels, features = random_inputs(family, config, torch.float64)

    velocity = run(decoder, stages(family, index), pixels, features)

    whole = -decoder(pixels, features)
    assert relative(velocity - whole, whole) <= 1e-13


@torch.inference_mode()
@pytest.mark.parametrize(("family", "index"), CASES)
def test_a_halo_one_alignment_step_smaller_fails_the_same_tolerance(
    family: str, index: int, monkeypatch: pytest.MonkeyPatch
):
    config = mini_config(PATCHES[family])
    decoder = random_decoder(config)
    pixels, features = random_inputs(family, config)
    uncut = decoder_plan.tiles
    monkeypatch.setattr(decoder_plan, "tiles", lambda r, n, tile: uncut(r, n, tile, halo=r.halo - r.align))
    decoder_plan._axis.cache_clear()

    try:
        velocity = run(decoder, stages(family, index), pixels, features)
    finally:
        decoder_plan._axis.cache_clear()

    whole = -decoder(pixels, features)
    assert relative(velocity - whole, whole) > 1e-3


@torch.inference_mode()
@pytest.mark.parametrize("family", PATCHES)
def test_the_whole_plan_is_the_decoder_bit_for_bit(family: str):
    config = mini_config(PATCHES[family])
    decoder = random_decoder(config)
    pixels, features = random_inputs(family, config)

    velocity = run(decoder, whole_plan(config.decoder), pixels, features)

    assert torch.equal(velocity, -decoder(pixels, features))


@torch.inference_mode()
@pytest.mark.parametrize("family", PATCHES)
def test_maps_that_lie_as_on_a_card_give_the_same_picture(family: str, monkeypatch: pytest.MonkeyPatch):
    config = mini_config(PATCHES[family])
    model = random_decoder(config, torch.float64)
    pixels, features = random_inputs(family, config, torch.float64)
    monkeypatch.setattr(decoder, "map_format", lambda device, dtype: torch.contiguous_format)
    expected = model(pixels, features).neg()  # the plain way
    monkeypatch.setattr(decoder, "map_format", lambda device, dtype: torch.channels_last)
    otherwise: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, Conv2d):
            module.register_forward_pre_hook(
                lambda _, args, name=name: otherwise.update([name] if args[0].stride(1) != 1 else [])
            )
            if module.kernel_size == (1, 1):
                monkeypatch.setattr(module, "forward", module._at_each_position)

    got = run(model, stages(family, 1), pixels, features)

    assert relative(got - expected, expected) < 1e-12
    assert otherwise == {f"enc{config.decoder.levels[0].name}.0"}, "the picture alone lies otherwise"


@pytest.mark.parametrize(
    ("place", "dtype", "is_last"),
    [
        ("cpu", torch.float32, True),
        ("cpu", torch.bfloat16, True),
        ("cuda:0", torch.bfloat16, True),
        ("cuda:0", torch.float32, False),
        ("mps", torch.bfloat16, False),  # nobody has measured
    ],
)
def test_maps_lie_as_the_kernels_of_a_device_want_them(place: str, dtype: torch.dtype, is_last: bool):
    assert (decoder.map_format(torch.device(place), dtype) is torch.channels_last) == is_last


@torch.inference_mode()
def test_a_map_is_halved_as_by_pooling_from_any_view():
    x = torch.randn(2, 9, 24, 34).to(torch.bfloat16)
    x[0, 5, 3, 7] = float("nan")
    views = [x, x[:, 2:6], x[..., 3:11, 5:21], x.contiguous(memory_format=torch.channels_last)[:, 1:, 2:, :30]]

    for view in views:
        assert torch.equal(decoder.halved(view).nan_to_num(7), F.max_pool2d(view, 2).nan_to_num(7))
        assert decoder.halved(view).isnan().sum() == F.max_pool2d(view, 2).isnan().sum()


@torch.inference_mode()
def test_the_features_of_a_10k_crop_are_those_of_the_global_grid():
    features = torch.randn(1, 4, 4, 6)

    resized = nearest_resize(features, (10, 15))

    assert torch.equal(resized, torch.nn.functional.interpolate(features, (10, 15), mode="nearest"))
    assert torch.equal(nearest_resize(features, (10, 15), slice(3, 7), slice(8, 13)), resized[..., 3:7, 8:13])
    # A crop that resized its own cells (0 and 1) would repeat them 2 and 2 times, not 3 and 2 as the grid does.
    assert not torch.equal(nearest_resize(features[:, :, :2], (4, 15)), resized[:, :, :4])


@torch.inference_mode()
def test_the_picture_is_read_in_crops_and_its_dtype_and_the_result_follow_the_caller():
    config = mini_config(16)
    decoder = random_decoder(config)
    pixels, features = random_inputs("1k", config)
    largest: list[int] = []

    def read(rows: slice, columns: slice) -> Tensor:
        largest.append((rows.stop - rows.start) * (columns.stop - columns.start))
        return pixels.double()[..., rows, columns].float()

    out = torch.empty(1, 3, *SIZES["1k"], dtype=torch.float64)
    decode_tiled(decoder, stages("1k", 2), SIZES["1k"], read, features, writing_velocity(out))

    assert relative(out + decoder(pixels, features), out) <= 1e-5
    assert max(largest) == (64 + 2 * 8) ** 2


@pytest.mark.parametrize("family", PATCHES)
def test_the_plain_description_is_the_modules_own(family: str):
    """Every convolution of the module, in the order it runs, with its kernel and channels."""
    config = PUBLISHED[family]
    with torch.device("meta"):
        decoder = LocalDecoder(config.decoder, config.dim)
    ran: list[tuple[str, int, int]] = []
    for module in decoder.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda m, *_: ran.append((f"conv{m.kernel_size[0]}", m.in_channels, m.out_channels))
            )
    side = config.size_multiple
    decoder(torch.empty(1, 3, side, side, device="meta"), torch.empty(1, 3840, side // 64, side // 64, device="meta"))

    levels = range(len(config.decoder.levels))
    described = [*encoder_layers(config.decoder, levels), *merge_layers(config.decoder, config.dim)]
    described += decoder_layers(config.decoder, levels)

    assert ran == [(layer.kind, layer.inputs, layer.outputs) for layer in described if layer.kind.startswith("conv")]


@pytest.mark.parametrize(
    ("family", "tera"), [("4k", 0.616), ("8k", 0.962), ("10k", 1.453)]
)  # fmt: skip
def test_the_arithmetic_of_the_whole_decoder_is_the_published_one(family: str, tera: float):
    side = PUBLISHED[family].defaults.width

    job = DecoderJob.of(PUBLISHED[family], side, side)

    assert macs(job, whole_plan(job.config)) / 1e12 == pytest.approx(tera, abs=5e-4)


@pytest.mark.parametrize(
    ("family", "split", "factor"),
    [
        ("4k", (Stage(0, 6, 1024),), 1.642),
        ("4k", (Stage(0, 2, 1024), Stage(2, 6)), 1.052),
        ("4k", (Stage(0, 3, 1024), Stage(3, 6)), 1.113),
        ("8k", (Stage(0, 7, 1024),), 2.74),
        ("8k", (Stage(0, 3, 1024), Stage(3, 7)), 1.084),
        ("10k", (Stage(0, 3, 1024), Stage(3, 6)), 1.088),
    ],
)
def test_the_overhead_of_known_splits_is_the_published_one(family: str, split: tuple[Stage, ...], factor: float):
    side = PUBLISHED[family].defaults.width
    job = DecoderJob.of(PUBLISHED[family], side, side)

    assert overhead(job, DecoderPlan(split)) == pytest.approx(factor, abs=0.006)


@pytest.mark.parametrize(("family", "width", "height"), FULL_SIZES)
def test_a_card_of_8_gib_pays_little_arithmetic_for_tiles(family: str, width: int, height: int):
    """With 3 GB of the card for the decoder: 1.06 for 1K and 4K, 1.09 for 8K and 10K at most."""
    job = DecoderJob.of(PUBLISHED[family], width, height)

    plan = choose_plan(job, 3 * 10**9, itemsize=2)

    assert decoder_memory(job, plan, itemsize=2).segment <= 3 * 10**9
    assert 1.0 <= overhead(job, plan) <= (1.06 if family in ("1k", "4k") else 1.09)


@pytest.mark.parametrize(("family", "width", "height"), FULL_SIZES)
def test_more_memory_never_costs_more_arithmetic(family: str, width: int, height: int):
    job = DecoderJob.of(PUBLISHED[family], width, height)

    chosen = [choose_plan(job, limit, itemsize=2) for limit in (300 * 10**6, 10**9, 3 * 10**9, 2 * 10**10)]

    costs = [macs(job, plan) for plan in chosen]
    assert costs == sorted(costs, reverse=True)
    assert chosen[-1] == whole_plan(job.config)


def counted_peak(job: DecoderJob, plan: DecoderPlan, config: ModelConfig) -> int:
    """Bytes that really live at once in fp32 (a CPU may lack kernels for less), on tensors without data."""
    with torch.device("meta"):
        decoder = LocalDecoder(config.decoder, config.dim)
    with torch.inference_mode(), FakeTensorMode(), LiveBytes() as live:
        for name, parameter in list(decoder.named_parameters()):
            bind(decoder, name, torch.empty(parameter.shape))
        tokens = torch.empty(1, job.grid[0] * job.grid[1], config.dim)
        features = tokens.transpose(1, 2).unflatten(2, job.grid)
        before = live.restart()
        read = lambda r, c: torch.empty(1, 3, r.stop - r.start, c.stop - c.start)  # noqa: E731
        decode_tiled(decoder, plan, (job.height, job.width), read, features, lambda rows, columns, values: None)
    return live.peak - before


@pytest.mark.parametrize(("family", "width", "height"), FULL_SIZES)
@pytest.mark.parametrize("limit", [400 * 10**6, 10**9, 3 * 10**9, 2 * 10**10])
def test_the_predicted_peak_is_the_counted_one(family: str, width: int, height: int, limit: int):
    config = PUBLISHED[family]
    job = DecoderJob.of(config, width, height)
    plan = choose_plan(job, limit, itemsize=2)

    counted = counted_peak(job, plan, config)

    assert decoder_memory(job, plan, itemsize=4).tensors == pytest.approx(counted, rel=0.02)


def reserved_for(job: DecoderJob, plan: DecoderPlan, config: ModelConfig, segment: int) -> int:
    """What torch's allocator would reserve in bf16, for tensors of more than 1 MiB, given a free segment first."""
    with torch.device("meta"):
        decoder = LocalDecoder(config.decoder, config.dim)
    with FakeCuda() as cuda:
        for name, parameter in list(decoder.named_parameters()):
            bind(decoder, name, torch.empty(parameter.shape, device=cuda.device, dtype=torch.bfloat16))
        tokens = torch.empty(1, job.grid[0] * job.grid[1], config.dim, device=cuda.device, dtype=torch.bfloat16)
        features = tokens.transpose(1, 2).unflatten(2, job.grid)
        cuda.allocator.empty_cache()
        before = cuda.allocator.reserved
        torch.empty(segment, dtype=torch.uint8, device=cuda.device)
        pixels, out = torch.empty(1, 3, job.height, job.width), torch.empty(1, 3, job.height, job.width)
        read, write = reading(pixels, cuda.device, torch.bfloat16), writing_velocity(out)
        decode_tiled(decoder, plan, (job.height, job.width), read, features, write)
        return cuda.allocator.peak_reserved - before


@pytest.mark.parametrize(("family", "width", "height"), FULL_SIZES)
@pytest.mark.parametrize("limit", [250 << 20, 1000 << 20, 3000 << 20])
def test_the_predicted_segment_holds_the_decoder(family: str, width: int, height: int, limit: int):
    config = PUBLISHED[family]
    job = DecoderJob.of(config, width, height)
    plan = choose_plan(job, limit, itemsize=2)
    memory = decoder_memory(job, plan, itemsize=2, room=1)

    reserved = reserved_for(job, plan, config, memory.segment)

    assert memory.tensors <= memory.segment <= reserved
    assert reserved <= memory.segment + (4 << 20), "what is under 1 MiB lies elsewhere"


def test_maps_with_channels_first_would_take_more_of_a_card(monkeypatch: pytest.MonkeyPatch):
    config, job = PUBLISHED["1k"], DecoderJob.of(PUBLISHED["1k"], 1024, 1024)
    plan = whole_plan(config.decoder)
    segment = decoder_memory(job, plan, itemsize=2, room=1).segment
    fits = reserved_for(job, plan, config, segment) <= segment + (4 << 20)
    monkeypatch.setattr(decoder, "map_format", lambda device, dtype: torch.contiguous_format)

    assert fits
    assert reserved_for(job, plan, config, segment) > segment + (200 << 20)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stage(2, 2), "at least one level, got 2 to 2"),
        (lambda: Stage(0, 4, 24), "must be 0 or a multiple of 16 pixels, got 24"),
        (lambda: DecoderPlan(()), "at least one stage"),
        (lambda: DecoderPlan((Stage(0, 1), Stage(2, 4))), "should start at level 1"),
        (lambda: DecoderPlan((Stage(0, 3),)).check(PUBLISHED["1k"].decoder), "covers 3 levels, the decoder has 4"),
        (
            lambda: choose_plan(DecoderJob.of(PUBLISHED["1k"], 1024, 1024), 1000, 2),
            "needs at least [0-9]+ bytes for 1024x1024, got 1000",
        ),
    ],
)
def test_plans_that_cannot_work_are_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


@torch.inference_mode()
def test_a_picture_off_the_grid_is_refused():
    config = mini_config(16)
    pixels = torch.zeros(1, 3, 40, 48)

    with pytest.raises(ValueError, match="multiples of 16 pixels, got 40"):
        run(random_decoder(config), whole_plan(config.decoder), pixels, torch.zeros(1, config.dim, 2, 3))


def test_a_plan_is_a_value():
    plan = DecoderPlan((Stage(0, 2, 64), Stage(2, 4)))

    assert replace(plan) == plan
    assert hash(replace(plan)) == hash(plan)
