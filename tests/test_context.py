"""What a card's driver holds for a run, measured before the run."""

from __future__ import annotations

import hashlib
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


@pytest.mark.parametrize(
    ("told", "expected"),
    [((700 * MIB, True), 736), ((1500 * MIB, True), 1536), ((1500 * MIB, False), 1056), ((300 * MIB, False), 320)],
)
def test_kernels_are_loaded_and_the_driver_asked_once(
    monkeypatch: pytest.MonkeyPatch, told: tuple[int, bool], expected: int
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(context, "load_kernels", lambda *_: calls.append("load"))
    monkeypatch.setattr(context, "driver_bytes", lambda device: (calls.append("ask"), told)[1])
    card = torch.device("cuda", 0)

    assert [context_bytes(card, torch.bfloat16) for _ in range(2)] == [expected * MIB] * 2
    assert calls == ["load", "ask"]


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
        before = torch.cuda.memory_reserved()
        with L2PPipeline.from_pretrained(model, device=device, dtype=dtype, vram=vram, compute="dequant") as pipe:
            images = pipe(**asked, seed=1, output_type="pt").images
            if vram is not None:
                held, is_exact = driver_bytes(device)
                assert torch.cuda.max_memory_reserved() - before <= vram - pipe.streamer.context_bytes
                assert not is_exact or held <= pipe.streamer.context_bytes
            pictures.append(hashlib.sha256(images.numpy().tobytes()).hexdigest())
            assert images.isfinite().all()

    assert pictures[0] == pictures[1]


_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
