"""The accounting runs the real pipeline: what it counts is what the plan promised, and a score matrix is seen."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import peak_memory
import pytest
from fake_cuda import ARCHES, Arch
from fake_run import FakeDevice, Request, account, streamed_budget, write_sparse_checkpoint

from l2p_lowvram.estimates import CONTEXT_BYTES, WORKSPACE_BYTES
from l2p_lowvram.families import PUBLISHED
from l2p_lowvram.synthetic import mini_config

SMALL = Request(256, 192)
CARD = ARCHES["sm86"]


@pytest.fixture
def mini(tmp_path: Path) -> Path:
    """Small, but wide enough that its tensors are more than the allocator's rounding."""
    path = tmp_path / "mini.safetensors"
    write_sparse_checkpoint(path, mini_config(dim=256, n_heads=4, n_layers=3))
    return path


def two_layers(path: Path, family: str) -> Path:
    """The published model with two of its layers: the peak is that of all thirty."""
    write_sparse_checkpoint(path, replace(PUBLISHED[family], n_layers=2))
    return path


def test_a_sparse_checkpoint_has_the_length_of_a_real_one_and_takes_no_disk(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"

    write_sparse_checkpoint(path, PUBLISHED["1k"])

    assert path.stat().st_size == pytest.approx(7_187_907_602, abs=1000)
    assert path.stat().st_blocks * 512 < 64 << 20


def test_a_run_tells_where_its_peak_is_and_what_makes_the_host_wait(mini: Path) -> None:
    found = account(mini, SMALL, CARD)

    assert found.live <= found.peak
    assert ".py:" in found.peak_at
    assert sum(nbytes for nbytes, _ in found.alive) == found.live - WORKSPACE_BYTES
    assert set(found.kernels) == {"flash"}
    assert not found.notices
    blocks = [line for line in found.host_syncs if "update_" in line]
    assert not blocks, "inside of blocks the host runs ahead"


def test_runs_are_the_same_to_the_byte(mini: Path) -> None:
    assert account(mini, SMALL, CARD) == account(mini, SMALL, CARD)


def test_leaving_repetitions_out_changes_no_peak(mini: Path) -> None:
    small = Request(128, 128)
    request = replace(small, vram=streamed_budget(mini, small, CARD))
    with slices((16, 64, 2, 4 << 20)):
        short, whole = (account(mini, request, CARD, repetitions=flag) for flag in (False, True))

    assert (short.peak, short.live, short.peak_at) == (whole.peak, whole.live, whole.peak_at)
    assert sum(short.kernels.values()) < sum(whole.kernels.values())


def slices(*choices: tuple[int, int, int, int]) -> AbstractContextManager[object]:
    """Tokens, queries and heads of a slice, and bytes of the decoder, instead of the canonical ones."""
    return patch("l2p_lowvram.tilings._CARD_CHOICES", choices)


def test_more_steps_take_no_more(mini: Path) -> None:
    once, often = (account(mini, replace(SMALL, steps=steps), CARD) for steps in (1, 3))

    assert often.live == once.live
    assert often.peak <= once.peak * 1.05


def test_without_a_fused_kernel_the_pipeline_keeps_its_own_tiles(mini: Path) -> None:
    found = account(mini, SMALL, ARCHES["sm75"])

    # Of the context refiner, one block of two captions: 64 x 64 scores a head are no matter.
    assert found.kernels == {"math": 2}


def test_a_score_matrix_would_be_caught(mini: Path) -> None:
    tiled = account(mini, SMALL, ARCHES["sm75"])
    with patch.object(Arch, "has_fused_attention", lambda self, dtype, width: True):
        mistaken = account(mini, SMALL, ARCHES["sm75"], limit_bytes=1 << 60)

    assert set(mistaken.kernels) == {"math"}
    tokens = 256 * 192 // 16**2
    assert mistaken.live > tiled.live + 4 * tokens**2 * 4


def test_a_step_that_runs_out_of_memory_is_done_again_in_smaller_slices(mini: Path) -> None:
    request, large, small = Request(2048, 1024), (8192, 8192, 4, 64 << 20), (256, 256, 1, 16 << 20)
    with slices(large):
        first = account(mini, request, CARD)
    with slices(small):
        second = account(mini, request, CARD)

    with slices(large, small):
        tight = account(mini, request, CARD, limit_bytes=(first.peak + second.peak) // 2 - WORKSPACE_BYTES)

    assert not first.notices
    assert [notice for notice in tight.notices if "out of memory in step 1" in notice]
    assert second.peak <= tight.peak < first.peak


def test_rows_have_what_others_read(capsys: pytest.CaptureFixture[str]) -> None:
    with patch.object(peak_memory, "PUBLISHED", {"1k": mini_config(dim=256, n_heads=4)}):
        peak_memory.main(["--family", "1k", "-W", "256", "-H", "192", "--json"])
        (row,) = json.loads(capsys.readouterr().out)
        peak_memory.main(["--family", "1k", "-W", "256", "-H", "192", "--vram", "1MiB"])
        refusal = capsys.readouterr().out

    assert (row["family"], row["width"], row["height"], row["fits"]) == ("1k", 256, 192, True)
    assert 0 < row["live_bytes"] <= row["peak_bytes"]
    assert row["predicted_bytes"] > WORKSPACE_BYTES
    assert row["decoder_arithmetic"] == 1.0
    assert "does not fit" in refusal


@pytest.mark.slow
@pytest.mark.parametrize("case", [peak_memory.CASES[index] for index in (0, 1, 4, 5)], ids=lambda case: case.family)
def test_at_full_size_the_allocator_reserves_what_the_plan_promised(tmp_path: Path, case: peak_memory.Case) -> None:
    assert case.target is not None
    model, request = two_layers(tmp_path / "model.safetensors", case.family), Request(case.width, case.height)
    vram = streamed_budget(model, request, CARD, case.target + CONTEXT_BYTES)

    found = account(model, replace(request, vram=vram), CARD)

    assert found.peak == pytest.approx(found.predicted, rel=0.05)
    assert found.peak <= min(vram - CONTEXT_BYTES, case.target)
    assert not found.notices
    assert not found.flushes
    assert set(found.kernels) == {"flash"}


@pytest.mark.slow
def test_without_segments_of_the_right_sizes_the_allocator_would_take_more(tmp_path: Path) -> None:
    model, request = two_layers(tmp_path / "model.safetensors", "10k"), Request(10240, 10240)

    with patch.object(FakeDevice, "reserve", lambda self, segments: None):
        found = account(model, request, CARD, limit_bytes=1 << 60)

    assert found.peak > found.predicted * 1.05
