"""What a card's driver holds for a run, measured before the run."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from l2p_lowvram import context
from l2p_lowvram.context import context_bytes, held_context_bytes
from l2p_lowvram.estimates import CONTEXT_BYTES, WORKSPACE_BYTES
from l2p_lowvram.pipeline import L2PPipeline
from l2p_lowvram.synthetic import main as make_synthetic
from offload import driver_bytes

MIB = 1 << 20
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: asks its driver")


@pytest.fixture(autouse=True)
def _measured_anew():
    context_bytes.cache_clear()
    yield
    context_bytes.cache_clear()


CARD = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("before", "after", "is_exact", "expected"),
    [
        (400, 700, True, 736),
        (400, 1500, True, 1536),
        (3400, 3700, False, CONTEXT_BYTES // MIB + 320),  # other programs' in both
        (3400, 3400, False, CONTEXT_BYTES // MIB),
        (3400, 9000, False, 1056),  # another program's, meanwhile
    ],
)
def test_kernels_are_loaded_and_the_driver_asked_once(
    monkeypatch: pytest.MonkeyPatch, before: int, after: int, is_exact: bool, expected: int
) -> None:
    held = [before]
    monkeypatch.setattr(context, "load_kernels", lambda *_: held.append(after))
    monkeypatch.setattr(context, "driver_bytes", lambda device: (held[-1] * MIB, is_exact))

    assert [context_bytes(CARD, torch.bfloat16) for _ in range(2)] == [expected * MIB] * 2
    assert len(held) == 2


def test_a_card_without_room_for_its_kernels_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    monkeypatch.setattr(context, "full_fp32", lambda *_: nullcontext())
    monkeypatch.setattr(context, "on_device", lambda *_: nullcontext())
    monkeypatch.setattr(context, "_use_transformer_kernels", run_out)

    with pytest.raises(torch.OutOfMemoryError):
        context.load_kernels(CARD, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernels_that_are_tried_are_ones_that_there_are(dtype: torch.dtype) -> None:
    """On the CPU, where a mistake in them would be hidden from no one."""
    with torch.inference_mode():
        context._use_transformer_kernels(torch.device("cpu"), dtype)
        context._use_decoder_kernels(torch.device("cpu"), dtype)


def test_other_devices_have_the_usual_allowance() -> None:
    cpu = torch.device("cpu")

    assert context_bytes(cpu, torch.float32) == CONTEXT_BYTES
    assert held_context_bytes(cpu, 7) == 7


@pytest.mark.cuda  # loads real kernels
@needs_card
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_on_a_card_a_run_stays_within_its_budget_and_draws_what_it_draws_without(tmp_path: Path, dtype: str) -> None:
    """A model as wide as the published one, of few layers: what the driver and torch hold together, in the end and at
    torch's peak, is within --vram; and the bits are those of weights that stay."""
    model = tmp_path / "model.safetensors"
    make_synthetic([str(model), "--layers", "3", "--refiners", "1"])
    device = torch.device("cuda", torch.cuda.current_device())
    features = torch.randn(33, 2560, generator=torch.Generator().manual_seed(0))
    asked = {"prompt_embeds": features, "width": 512, "height": 768, "num_inference_steps": 2, "cfg_scale": 1.0}
    pictures = []
    for room in (None, 900 * MIB):
        vram = None if room is None else context_bytes(device, getattr(torch, _NAMES[dtype])) + WORKSPACE_BYTES + room
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_reserved()  # of other tests; what cuBLAS works in is not among them
        with L2PPipeline.from_pretrained(model, device=device, dtype=dtype, vram=vram, compute="dequant") as pipe:
            images = pipe(**asked, seed=1, output_type="pt").images
            if vram is not None:
                held, is_exact = driver_bytes(device)
                assert torch.cuda.max_memory_reserved() - others <= vram - pipe.streamer.context_bytes
                assert not is_exact or held <= pipe.streamer.context_bytes
            pictures.append(hashlib.sha256(images.numpy().tobytes()).hexdigest())
            assert images.isfinite().all()

    assert pictures[0] == pictures[1]


_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
