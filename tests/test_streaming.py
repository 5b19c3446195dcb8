"""The pipeline on streamed weights: the same bits under every budget, every fault ends cleanly, nothing is left."""

from __future__ import annotations

import errno
import gc
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import offload.cuda
from l2p_lowvram import L2PPipeline, cli, half_kernels, images, linear, sampling, selftest, streaming
from l2p_lowvram.estimates import CONTEXT_BYTES, WORKSPACE_BYTES
from l2p_lowvram.layout import read_layout
from l2p_lowvram.model import L2PTransformer
from l2p_lowvram.model_weights import StreamedWeights, cut_into_blocks
from l2p_lowvram.report import phase_table
from l2p_lowvram.repository import locate_model
from l2p_lowvram.selftest import DelayedReader
from l2p_lowvram.streaming import MemoryOptions, PhaseDemand, Streamer
from l2p_lowvram.synthetic import mini_config, random_state_dict
from l2p_lowvram.tilings import device_activations, tilings
from l2p_lowvram.weights import build_transformer, lent, load_transformer
from offload import (
    BudgetError,
    Checkpoint,
    CheckpointError,
    ProcessMemory,
    Reader,
    ResidencyPlan,
    Tier,
    format_bytes,
)
from offload.reading import PositionalFile, ReadJob
from tests import goldens
from tests.live_bytes import LiveBytes

STEPS = 3
FAST = {"width": 64, "height": 32, "num_inference_steps": STEPS, "output_type": "pt", "seed": 1}


def features(seed: int, tokens: int = 9) -> Tensor:
    return torch.randn(tokens, 48, generator=torch.Generator().manual_seed(seed))


PROMPT = {"prompt_embeds": features(1), "negative_prompt_embeds": features(2, tokens=40)}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No thread and no descriptor stays behind, however a test's pipelines ended."""
    gc.collect()
    before = psutil.Process().num_fds()
    yield
    gc.collect()  # tracebacks keep frames, and those pipelines
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("offload")] == []
    assert psutil.Process().num_fds() <= before


@pytest.fixture(autouse=True)
def process_of_a_fixed_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test process grows from test to test, and with it what a budget has to hold."""
    monkeypatch.setattr(streaming, "process_memory", lambda: ProcessMemory(300 << 20, 0, 0, 0))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return goldens.write_checkpoint("a_mini", tmp_path)


def smallest_ram(model: Path, io: str = "read") -> int:
    with (
        L2PPipeline.from_pretrained(model, device="cpu", dtype="fp32", ram=1, io=io) as pipe,
        pytest.raises(BudgetError) as refusal,
    ):
        pipe(**PROMPT, **FAST)
    return refusal.value.needed


def resident_picture(model: Path) -> Tensor:
    """By the model with all its weights, without any streaming."""
    with Checkpoint.open(model) as checkpoint:
        transformer = load_transformer(checkpoint, read_layout(checkpoint))
    return L2PPipeline(transformer)(**PROMPT, **FAST).images


@pytest.mark.parametrize("io", ["read", "direct", "mmap"])
@pytest.mark.parametrize("extra", [0, 300_000, 1 << 40])
def test_every_budget_and_every_way_of_reading_give_the_same_bits(model: Path, io: str, extra: int) -> None:
    streamer = Streamer(torch.device("cpu"), MemoryOptions(ram=smallest_ram(model, io) + extra, io=io, poison=True))
    files = locate_model(model)

    with L2PPipeline.from_streamer(files, streamer, torch.float32) as pipe:
        picture = pipe(**PROMPT, **FAST).images
        plans = [stream.plan for stream in streamer.streams]

    assert torch.equal(picture, resident_picture(model))
    if io != "mmap":
        (plan,) = plans
        assert plan is not None
        assert plan.device_bytes <= streamer.options.ram
        assert extra or plan.count(Tier.DEVICE) == 0
        assert extra < 1 << 40 or plan.count(Tier.DISK) == len(visited_once(model))


@pytest.mark.parametrize("begin", [0, 2, 8, 24])
def test_half_precision_computed_where_a_file_has_it_has_the_bits_of_slots(
    model: Path, tmp_path: Path, begin: int
) -> None:
    """begin: where the data begin, in bytes after a multiple of 256."""
    half = half_precision(model, tmp_path, begin)

    assert torch.equal(picture_in_bf16(half, "mmap"), picture_in_bf16(half, "read"))


@pytest.mark.parametrize("is_noticed", [True, False])
def test_kernels_that_round_by_address_are_noticed_and_would_change_the_picture(
    model: Path, tmp_path: Path, is_noticed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, whole = half_precision(model, tmp_path, begin=24), F.linear

    def minding(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return whole(x, weight, bias) * (1.25 if weight.data_ptr() % 64 else 1)

    monkeypatch.setattr(F, "linear", minding)
    asked = half_kernels._may_mind.__wrapped__ if is_noticed else lambda dtype: dtype == torch.float32
    monkeypatch.setattr(half_kernels, "_may_mind", asked)

    assert torch.equal(picture_in_bf16(half, "mmap"), picture_in_bf16(half, "read")) == is_noticed


def picture_in_bf16(model: Path, io: str) -> Tensor:
    with L2PPipeline.from_pretrained(model, device="cpu", dtype="bf16", io=io, ram=1 << 40) as pipe:
        return pipe(**PROMPT, **FAST).images


def half_precision(model: Path, folder: Path, begin: int) -> Path:
    """The same model in bf16, its data `begin` bytes after a multiple of 256."""
    half = folder / "half.safetensors"
    with Checkpoint.open(model) as checkpoint:
        save_file(
            {name: checkpoint.tensor(name).bfloat16() for name in checkpoint.tensors},
            half,
            metadata=dict(checkpoint.metadata),
        )
    written = half.read_bytes()
    header = written[8 : 8 + int.from_bytes(written[:8], "little")]
    padded = header + b" " * ((begin - 8 - len(header)) % 256)
    half.write_bytes(len(padded).to_bytes(8, "little") + padded + written[8 + len(header) :])
    return half


def visited_once(model: Path) -> frozenset[str]:
    """Blocks visited once: they are never kept."""
    with Checkpoint.open(model) as checkpoint:
        return cut_into_blocks(read_layout(checkpoint))[1]


def test_too_little_host_memory_beside_a_card_is_refused_with_the_numbers(model: Path) -> None:
    with Checkpoint.open(model) as checkpoint:
        work = PhaseDemand("64x32", cut_into_blocks(read_layout(checkpoint))[0], {}, activations=0, host_bytes=1 << 20)

    def plan(ram: int) -> ResidencyPlan:
        return Streamer(torch.device("cuda"), MemoryOptions(vram=4 << 30, ram=ram)).plan(work, None)

    with pytest.raises(
        BudgetError, match=r"64x32: RAM budget 100\.00 MiB is too small: .*; give more with --ram"
    ) as info:
        plan(100 << 20)

    assert plan(info.value.needed).staging_bytes >= 4 << 20
    with pytest.raises(BudgetError):
        plan(info.value.needed - 1)


def test_one_byte_less_than_the_smallest_budget_is_refused_with_the_numbers(model: Path) -> None:
    least = smallest_ram(model)

    with (
        L2PPipeline.from_pretrained(model, device="cpu", dtype="fp32", ram=least - 1) as pipe,
        pytest.raises(BudgetError, match=rf"64x32: RAM budget .* takes {least} bytes; give more with --ram"),
    ):
        pipe(**PROMPT, **FAST)


def test_a_picture_beyond_the_budget_is_refused_before_anything_of_its_size_is_made(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "make_noise", lambda *_: pytest.fail("noise was drawn"))
    monkeypatch.setattr(images, "from_pil", lambda *_: pytest.fail("the photograph was resized"))

    for start in ({}, {"image": Image.new("RGB", (64, 32)), "strength": 0.5}):
        with (
            L2PPipeline.from_pretrained(model, device="cpu", dtype="fp32", ram="600MiB") as pipe,
            pytest.raises(BudgetError, match=r"8192x8192: RAM budget 600\.00 MiB is too small"),
        ):
            pipe(**PROMPT, **start, width=8192, height=8192, num_inference_steps=2)


@pytest.mark.parametrize("io", ["read", "mmap"])
@pytest.mark.parametrize("does", ["encodes", "closes", "draws another"])
def test_a_callback_that_takes_the_memory_changes_no_bit(io: str, does: str) -> None:
    asked: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 1, "output_type": "pt"}
    with (
        L2PPipeline.from_pretrained("demo", device="cpu", dtype="fp32", ram=1, io=io) as pipe,
        pytest.raises(BudgetError) as refusal,
    ):
        pipe("a red ring", **asked)

    def act(pipe: L2PPipeline, step: int, *_: object) -> None:
        if does == "encodes":
            pipe.encode_prompt("a blue square")
        elif does == "closes":
            pipe.close()
        elif step == 0:
            pipe("a blue square", **{**asked, "width": 32})

    with L2PPipeline.from_pretrained("demo", device="cpu", dtype="fp32", ram=refusal.value.needed, io=io) as pipe:
        plain = pipe("a red ring", **asked).images
        assert torch.equal(pipe("a red ring", **asked, callback_on_step_end=act).images, plain)


def test_the_smallest_budget_that_a_refusal_names_is_enough_for_encoding_and_drawing() -> None:
    asked: dict[str, Any] = {"width": 1024, "height": 1024, "num_inference_steps": 1, "cfg_scale": 1}
    with (
        L2PPipeline.from_pretrained("demo", device="cpu", dtype="fp32", ram="200MiB") as pipe,
        pytest.raises(BudgetError) as refusal,
    ):
        pipe("a red ring " * 60, **asked)

    with L2PPipeline.from_pretrained("demo", device="cpu", dtype="fp32", ram=refusal.value.needed) as pipe:
        pipe("a red ring " * 60, **asked)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc keeps what is freed")
@pytest.mark.parametrize("ram", [None, 1 << 30])
def test_with_a_budget_freed_activations_go_back_to_the_system(ram: int | None) -> None:
    held = held_after_freeing("streamer.sparing()", ram)

    if ram:
        assert held < 16 << 20
    else:  # as glibc has it: how much it keeps by itself differs from system to system
        assert held >= held_after_freeing("nullcontext()", ram) // 2


def held_after_freeing(context: str, ram: int | None) -> int:
    """Bytes that a process holds within `context` once it has freed 8 MiB twenty times between smaller blocks."""
    script = f"""
from contextlib import nullcontext
import torch
from l2p_lowvram.streaming import MemoryOptions, Streamer
from offload import process_memory
streamer = Streamer(torch.device("cpu"), MemoryOptions(ram={ram}))
torch.ones(30 << 20, dtype=torch.uint8)  # freed: from here on glibc keeps blocks of that size
before, kept = process_memory().anonymous, []
with {context}:
    for _ in range(20):
        freed = torch.ones(8 << 20, dtype=torch.uint8)
        kept.append(freed)
        kept.append(torch.ones(64 << 10, dtype=torch.uint8))
    del freed, kept[::2]
print(process_memory().anonymous - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    return int(done.stdout)


def test_a_pipeline_collected_by_a_thread_of_its_own_is_closed_all_the_same(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = L2PPipeline.from_pretrained(model, device="cpu", dtype="fp32", io="read")
    read_into, collected = PositionalFile.read_into, []

    def collect(file: PositionalFile, *arguments: Any) -> int:
        if not collected and pipe.streamer.streams:
            collected.append(threading.current_thread().name)
            pipe._finalizer()
        return read_into(file, *arguments)

    def draw() -> None:
        with suppress(ValueError):  # closed under way
            pipe(**PROMPT, **FAST)

    monkeypatch.setattr(PositionalFile, "read_into", collect)
    drawing = threading.Thread(target=draw, daemon=True)
    drawing.start()
    drawing.join(30)
    for thread in threading.enumerate():
        if thread.name == "close":
            thread.join(30)

    assert collected == ["offload-read"]
    assert not drawing.is_alive()
    assert [thread.name for thread in threading.enumerate() if thread.name == "close"] == []


def test_a_step_reads_every_streamed_block_once_for_both_branches(model: Path) -> None:
    with Checkpoint.open(model) as checkpoint:
        blocks, once = cut_into_blocks(read_layout(checkpoint))
    per_step = sum(block.layout.read_bytes for block in blocks if block.name not in once)
    first = sum(block.layout.read_bytes for block in blocks if block.name in once)

    with L2PPipeline.from_pretrained(model, device="cpu", dtype="fp32", ram=smallest_ram(model)) as pipe:
        pipe(**PROMPT, **FAST)
        (stream,) = pipe.streamer.streams
        (figures,) = pipe.phases
        visited = [span.what for span in stream.source.timeline.lane("compute")]

    prefetched = figures.read_bytes - first - STEPS * per_step
    assert visited == [block.name for block in blocks] + [b.name for b in blocks if b.name not in once] * (STEPS - 1)
    assert 0 <= prefetched < per_step  # the courier is ahead, into the step that never comes
    assert figures.tiers == {"disk": len(blocks)}


def test_what_a_prompt_visits_once_is_no_part_of_the_steps(model: Path) -> None:
    costs = work_of(model, once=visited_once(model)).costs()

    told = {(cost.visits, cost.may_stay): cost.name in visited_once(model) for cost in costs}
    assert told == {(1, True): False, (0, False): True}


def test_weights_stay_for_the_next_picture_and_captions_for_the_same_prompt(model: Path) -> None:
    with L2PPipeline.from_pretrained(model, device="cpu", dtype="fp32") as pipe:
        first = pipe(**PROMPT, **FAST).images
        read = pipe.phases[0].read_bytes
        second = pipe(**PROMPT, **FAST).images

        assert len(pipe.phases) == 1
        assert pipe.phases[0].read_bytes == read
        other = pipe(prompt_embeds=features(3), negative_prompt_embeds=features(2), **FAST).images
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("io", ["read", "mmap"])
def test_weights_that_stay_for_a_larger_picture_leave_it_the_room_it_needs(model: Path, io: str) -> None:
    """With mmap that includes what a visit copies."""
    with L2PPipeline.from_pretrained(model, device="cpu", dtype="fp32", ram="2GiB", io=io) as pipe:
        weights = pipe.weights
        assert isinstance(weights, StreamedWeights)
        for width in range(64, 256, 32):
            work = pipe.work(width, 32, 1, 1.0, 32)
            weights.open(work)
            stream, demand = pipe.streamer.streams[-1], weights.choose(work)[1]
            needed = (demand.with_copies() if io == "mmap" else demand).activations
            assert stream.plan is not None
            beside = stream.plan.device_bytes - stream.planned_device_bytes - pipe.streamer.process_bytes
            assert beside >= needed
        assert demand.with_copies().activations > demand.activations


def test_what_is_told_of_a_run_is_what_it_does(model: Path) -> None:
    with L2PPipeline.from_pretrained(
        model, device="cpu", dtype="fp32", ram=smallest_ram(model, "mmap") + 200_000, io="mmap"
    ) as pipe:
        work = pipe.work(64, 32, 1, 1.0, 32)
        told = pipe.describe_plan(work)
        pipe.weights.open(work)
        (stream,) = pipe.streamer.streams

    assert stream.plan is not None
    stay = stream.plan.count(Tier.DEVICE)
    streamed = len(stream.demand.blocks) - stay
    assert told.endswith(f"{stay} blocks stay, {streamed} stream, {format_bytes(stream.plan.device_bytes)} in all")


def test_a_closed_pipeline_can_be_used_again(model: Path) -> None:
    pipe = L2PPipeline.from_pretrained(model, device="cpu", dtype="fp32")
    first = pipe(**PROMPT, **FAST).images
    pipe.close()
    again = pipe(**PROMPT, **FAST).images
    pipe.close()
    pipe.close()

    assert torch.equal(first, again)


def test_two_pipelines_in_one_process_do_not_disturb_each_other(model: Path) -> None:
    ram = smallest_ram(model)
    expected = resident_picture(model)
    found: list[Tensor] = []

    def draw() -> None:
        with L2PPipeline.from_pretrained(model, device="cpu", dtype="fp32", ram=ram) as pipe:
            found.append(pipe(**PROMPT, **FAST).images)

    threads = [threading.Thread(target=draw) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [torch.equal(picture, expected) for picture in found] == [True, True]


def test_a_disk_that_fails_from_the_probe_on_is_told_by_block(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, buffers: list, at: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(streaming, "_PROBED_BYTES", 0)
    with L2PPipeline.from_pretrained(model, device="cpu", dtype="fp32") as pipe:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(OSError, match=r"block caption_embedder: \d+ bytes at byte \d+ cannot be read"):
            pipe(**PROMPT, **FAST)


@pytest.mark.parametrize(("spare", "drops"), [(300_000, True), (1 << 30, False)])
def test_without_a_budget_only_what_comes_again_and_again_leaves_the_page_cache(
    model: Path, monkeypatch: pytest.MonkeyPatch, spare: int, drops: bool
) -> None:
    """It would put out what other programs, or the plan, keep there."""
    dropped: list[bool] = []

    class Noting(Reader):
        def submit(self, *arguments: Any, drop_cache: bool = False) -> ReadJob:
            dropped.append(drop_cache)
            return super().submit(*arguments, drop_cache=drop_cache)

    class NotingStreamer(Streamer):
        def open_reader(self, checkpoint: Checkpoint, io: str, *, read_ahead: bool = True) -> Reader:
            return Noting(checkpoint, io=io, read_ahead=read_ahead)

    monkeypatch.setattr(streaming, "_HOST_STEP", 1 << 16)
    needed = smallest_ram(model) - (300 << 20) - streaming._HOST_SLACK + (1 << 16)
    monkeypatch.setattr(streaming, "available_host_bytes", lambda: streaming._HOST_SPARE + needed + spare)
    streamer = NotingStreamer(torch.device("cpu"), MemoryOptions(io="read"))
    with L2PPipeline.from_streamer(locate_model(model), streamer, torch.float32) as pipe:
        pipe(**PROMPT, **FAST)
        (figures,) = pipe.phases

    once = len(visited_once(model))
    assert (figures.tiers.get("disk", 0) > once) == drops
    assert set(dropped) == {drops}


def test_a_closed_pipeline_measures_the_process_anew(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = [1 << 30]
    monkeypatch.setattr(streaming, "process_memory", lambda: ProcessMemory(held[0], 0, 0, 0))
    with L2PPipeline.from_pretrained(model, device="cpu", dtype="fp32", ram="2GiB") as pipe:
        pipe(**PROMPT, **FAST)
        before = pipe.streamer.process_bytes
        held[0] = 300 << 20
        assert pipe.streamer.process_bytes == before > 1 << 30  # plans do not change with every small growth
        pipe.close()
        assert pipe.streamer.process_bytes < 500 << 20


@pytest.mark.parametrize("io", ["read", "mmap"])
def test_mapped_weights_are_not_taken_for_memory_that_would_come_free(
    model: Path, monkeypatch: pytest.MonkeyPatch, io: str
) -> None:
    monkeypatch.setattr(streaming, "_HOST_STEP", 4096)
    monkeypatch.setattr(streaming, "available_host_bytes", lambda: streaming._HOST_SPARE + (1 << 30))
    with L2PPipeline.from_pretrained(model, device="cpu", dtype="fp32", io=io) as pipe:
        before = pipe.streamer._ram()
        pipe(**PROMPT, **FAST)
        (stream,) = pipe.streamer.streams
        more = pipe.streamer._ram() - before

    assert stream.device_bytes == 0  # closed by now
    assert more > (1 << 20) if io == "read" else more < stream.planned_device_bytes - stream.source.mapped_bytes + 4096


def test_figures_of_the_latest_phases_are_kept_and_of_no_more(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_KEPT_CLOSED", 3)
    with L2PPipeline.from_pretrained(model, device="cpu", dtype="fp32") as pipe:
        for _ in range(6):
            pipe(**PROMPT, **FAST)
            pipe.close()
        pipe(**PROMPT, **FAST)

        assert [stream.closed for stream in pipe.streamer.streams] == [True] * 3 + [False]


class LateStreamer(Streamer):
    def open_reader(self, checkpoint: Checkpoint, io: str, *, read_ahead: bool = True) -> Reader:
        return DelayedReader(checkpoint, io=io, read_ahead=read_ahead)


def test_late_reads_change_nothing(model: Path) -> None:
    streamer = LateStreamer(torch.device("cpu"), MemoryOptions(ram=smallest_ram(model), poison=True))

    with L2PPipeline.from_streamer(locate_model(model), streamer, torch.float32) as pipe:
        assert torch.equal(pipe(**PROMPT, **FAST).images, resident_picture(model))


@pytest.mark.parametrize("change", ["truncated", "replaced", "touched"])
def test_a_file_that_changes_under_way_stops_the_run_by_name(model: Path, change: str) -> None:
    whole = model.read_bytes()

    def spoil(pipe: L2PPipeline, step: int, sigma: float, tensors: dict[str, Tensor]) -> None:
        if change == "truncated":
            os.truncate(model, 9000)
        elif change == "replaced":
            model.unlink()
            model.write_bytes(whole[:-1])
        else:
            os.utime(model, ns=(1, 1))

    with L2PPipeline.from_pretrained(model, device="cpu", dtype="fp32", ram=smallest_ram(model)) as pipe:
        with pytest.raises(CheckpointError, match=rf"{model.name}.*(replaced|cut short|modified since|was removed)"):
            pipe(**PROMPT, **FAST, callback_on_step_end=spoil)
        model.write_bytes(whole)
    with L2PPipeline.from_pretrained(model, device="cpu", dtype="fp32", ram=smallest_ram(model)) as pipe:
        assert torch.equal(pipe(**PROMPT, **FAST).images, resident_picture(model))


def test_an_exception_inside_a_block_leaves_a_pipeline_that_works(model: Path, monkeypatch) -> None:
    with L2PPipeline.from_pretrained(model, device="cpu", dtype="fp32", ram=smallest_ram(model)) as pipe:
        block = pipe.transformer.layers[1]
        with monkeypatch.context() as patch:
            patch.setattr(block, "add_feed_forward_", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                pipe(**PROMPT, **FAST)

        assert block.attention.qkv.weight.is_meta
        assert torch.equal(pipe(**PROMPT, **FAST).images, resident_picture(model))


def test_an_interrupted_run_leaves_a_pipeline_that_works(model: Path) -> None:
    with L2PPipeline.from_pretrained(model, device="cpu", dtype="fp32", ram=smallest_ram(model)) as pipe:
        pipe(**PROMPT, **FAST, callback_on_step_end=lambda pipe, *_: pipe.interrupt())

        assert torch.equal(pipe(**PROMPT, **FAST).images, resident_picture(model))


def test_a_pipeline_nobody_closes_is_closed_by_the_garbage_collector(model: Path) -> None:
    pipe = L2PPipeline.from_pretrained(model, device="cpu", dtype="fp32", ram=smallest_ram(model))
    pipe(**PROMPT, **FAST)
    assert any(thread.name.startswith("offload") for thread in threading.enumerate())

    del pipe  # and the fixture looks for what is left


def test_lent_weights_are_gone_after_the_visit(model: Path) -> None:
    with Checkpoint.open(model) as checkpoint:
        transformer = build_transformer(read_layout(checkpoint))
    weight = torch.ones(transformer.x_embedder.weight.shape)

    with lent(transformer, {"x_embedder.weight": weight}):
        assert transformer.x_embedder.weight is weight

    assert transformer.x_embedder.weight.is_meta


def test_vram_on_the_cpu_is_refused_with_the_way_out(model: Path) -> None:
    with pytest.raises(ValueError, match=r"on the CPU device memory is RAM, give --ram instead"):
        L2PPipeline.from_pretrained(model, device="cpu", vram="6GiB")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ram": "lots"}, "ram: cannot read 'lots' as a size"),
        ({"io": "tape"}, "io must be one of auto, read, direct, mmap, got 'tape'"),
        ({"slots": 1}, "the ring needs at least 2 slots, got 1"),
    ],
)
def test_memory_options_that_mean_nothing_are_refused(model: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        L2PPipeline.from_pretrained(model, **{"device": "cpu", **options})


def test_the_plan_is_the_same_on_the_second_run(model: Path) -> None:
    plans = []
    for _ in range(2):
        with L2PPipeline.from_pretrained(model, device="cpu", dtype="fp32", ram="1GiB") as pipe:
            pipe(**PROMPT, **FAST)
            plans += [stream.plan for stream in pipe.streamer.streams]

    assert plans[0] == plans[1]


def test_the_table_has_a_line_per_phase(model: Path) -> None:
    with L2PPipeline.from_pretrained(model, device="cpu", dtype="fp32") as pipe:
        pipe(**PROMPT, **FAST)
        table = phase_table(pipe.phases)
        (figures,) = pipe.phases

    assert table.splitlines()[0].startswith("phase")
    assert table.splitlines()[1].startswith("64x32")
    held = figures.compute_seconds + figures.wait_seconds
    assert 0 < figures.wait_p50 <= figures.wait_p95 <= figures.wait_seconds <= held


def test_the_demo_draws_the_same_picture_within_every_ram(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--model", "demo", "-p", "a red ring on a blue background", "--seed", "1", "--steps", "2"]
    arguments += ["--no-prompt-cache", "--no-metadata", "-q"]
    assert cli.main([*arguments, "-o", str(tmp_path / "free.png")]) == 0
    assert cli.main([*arguments, "--ram", "1MiB", "-o", str(tmp_path / "none.png")]) == 2
    # The encoder is refused first, then, with what it needs, the picture.
    for attempt in range(3):
        needed = int(capsys.readouterr().err.split(" bytes; give more")[0].rsplit(" ", 1)[1])
        if cli.main([*arguments, "--ram", str(needed), "-o", str(tmp_path / "least.png")]) == 0:
            break
        assert attempt < 2

    assert (tmp_path / "least.png").read_bytes() == (tmp_path / "free.png").read_bytes()
    assert not (tmp_path / "none.png").exists()


@pytest.mark.slow
def test_the_selftest_passes_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["selftest"]) == 0
    assert "DIFFERENT" not in capsys.readouterr().out


@pytest.mark.parametrize("value", [1e-7, float("nan")], ids=["last bit", "poison"])
def test_the_selftest_tells_a_picture_that_differs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    drawn: list[bool] = []

    def draw(pipe: L2PPipeline, features: Sequence[Tensor]) -> Tensor:
        drawn.append(pipe.memory.poison)
        return torch.full((1, 3, 4, 4), value if len(drawn) == 3 else 0.0)

    monkeypatch.setattr(selftest, "_draw", draw)

    assert cli.main(["selftest"]) == 1
    told = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert told.count("DIFFERENT") == 1
    assert drawn[:3] == [False, True, True]


def work_of(model: Path, **options: Any) -> PhaseDemand:
    with Checkpoint.open(model) as checkpoint:
        return PhaseDemand("64x32", cut_into_blocks(read_layout(checkpoint))[0], {}, activations=0, **options)


@pytest.mark.parametrize(("device", "vram"), [("cpu", None), ("cuda", 4 << 30)])
def test_what_phases_that_stay_open_hold_is_in_the_plan_of_the_next(model: Path, device: str, vram: int | None) -> None:
    streamer = Streamer(torch.device(device), MemoryOptions(vram=vram, ram=4 << 30, io="read"))
    other: Any = SimpleNamespace(device_bytes=1 << 30, host_bytes=1 << 28)

    alone, beside = (streamer.plan(work_of(model), None, streams) for streams in ((), [other]))

    assert beside.device_bytes == alone.device_bytes + (1 << 30)
    assert beside.tiers == alone.tiers


def test_pins_and_slots_are_those_that_were_asked_for(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(offload.cuda, "CudaDevice", lambda device, **options: asked.append(options["pin_limit"]))
    monkeypatch.setattr(streaming, "available_device_bytes", lambda device: 8 << 30)
    vram, plans = CONTEXT_BYTES + WORKSPACE_BYTES + 1_300_000, []
    work = work_of(model)
    sublayers = replace(work, blocks=[block for block in work.blocks if "." in block.name])  # about as large as another

    for pin, slots in ((0, 2), (1 << 30, 9)):
        streamer = Streamer(torch.device("cuda", 0), MemoryOptions(vram, ram=4 << 30, pin=pin, slots=slots))
        streamer.ring_device()
        plans.append(streamer.plan(sublayers, None))

    assert asked == [0, 1 << 30]
    assert [plan.count(Tier.PINNED) > 0 for plan in plans] == [False, True]
    assert [plan.slots for plan in plans] == [2, 9]
    assert plans[0].ring_bytes < plans[1].ring_bytes


def test_a_step_on_the_cpu_holds_no_more_than_was_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and estimates included, which here are most of it."""
    monkeypatch.setattr(linear, "CPU_SLICE_BYTES", 1 << 18)
    config = mini_config(16, dim=32, n_heads=1)
    model = L2PTransformer(config)
    model.load_state_dict(random_state_dict(config))
    with L2PPipeline(model.requires_grad_(False)) as pipe:
        work = pipe.work(512, 512, 3, 2.0, 32)
        *_, tiling = tilings(config, work)
        monkeypatch.setattr(pipe.weights, "open", lambda work: tiling)
        gc.collect()
        with LiveBytes() as live:
            before = live.restart()
            pipe(
                prompt_embeds=[torch.randn(9, config.caption_dim) for _ in range(3)],
                negative_prompt_embeds=torch.randn(9, config.caption_dim),
                **{**FAST, "width": 512, "height": 512, "num_inference_steps": 2},
                callback_on_step_end=lambda *_: None,
            )

    planned = device_activations(config, work, tiling)
    assert 0.55 * planned < live.peak - before <= planned
    assert work.host_bytes > planned / 2


def test_the_smallest_budget_that_is_named_works_for_the_text_encoder_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo's encoder needs more than its transformer does for a small picture."""
    target = str(tmp_path / "x.png")

    def draw(ram: int) -> tuple[int, str]:
        arguments = ["-m", "demo", "-q", "-p", "new words", "--no-prompt-cache", "--steps", "1", "-W", "64", "-H", "64"]
        code = cli.main(["generate", *arguments, "-o", target, "--overwrite", "--ram", str(ram)])
        return code, capsys.readouterr().err

    code, said = draw(0)
    least = int(said.split("the nearest plan that fits takes ")[1].split()[0])

    assert code == 2
    assert draw(least - 1)[0] == 2
    assert draw(least)[0] == 0
