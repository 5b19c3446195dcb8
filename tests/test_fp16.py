"""fp16: nothing overflows at the largest activation known of the published model, and it is as good as bf16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from l2p_lowvram import L2PPipeline, devices, model
from l2p_lowvram.devices import choose_dtype, stream_dtype
from l2p_lowvram.int8_matmul import Int8Matmul, in_fp32
from l2p_lowvram.linear import Linear
from l2p_lowvram.model import L2PTransformer, fp16_factor
from l2p_lowvram.quantization import Scheme
from l2p_lowvram.synthetic import mini_config, random_state_dict
from tests.test_tiling_model import TINY, random_inputs

# What layers.0.feed_forward.w2 of the published model is known to read; fp16 ends at 65,504.
LARGEST = 344_064.0
CONFIG = mini_config(16, dim=96, n_heads=3)


@torch.no_grad()
def outlier_model(*, int8: bool = False) -> L2PTransformer:
    """Random weights, made larger: layer 0's feed-forward multiplies up to 344,064, attention's output and the
    token stream pass 65,504 too."""
    found = L2PTransformer(CONFIG)
    found.load_state_dict(random_state_dict(CONFIG))
    block = found.requires_grad_(False).layers[0]
    block.feed_forward.w1.weight *= 300
    block.feed_forward.w3.weight *= 300
    block.feed_forward.w3.weight *= LARGEST / largest_read(found, block.feed_forward.w2)
    block.attention.qkv.weight[2 * CONFIG.dim :] *= 1e4
    block.attention.out.weight *= 10
    block.ffn_norm2.weight[3] = 2e5
    if int8:
        for module in found.layers.modules():
            if isinstance(module, Linear) and module.bias is None:
                module.quantize_(*Scheme.parse("row").quantize(module.weight))
    return found


def largest_read(found: L2PTransformer, layer: Linear) -> float:
    seen = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(float(inputs[0].abs().max())))
    velocity(found, torch.float32)
    handle.remove()
    return max(seen)


@torch.inference_mode()
def velocity(found: L2PTransformer, dtype: torch.dtype, *, sliced: bool = False) -> Tensor:
    """One forward with blocks in `dtype`, as the pipeline makes it."""
    stream = stream_dtype(dtype)
    found.narrow_blocks(None if stream == dtype else dtype)
    pixels, t, features = random_inputs(CONFIG)
    caption = found.encode_caption([item.to(stream) for item in features], stream)
    slices = TINY.slices() if sliced else None
    return found(pixels.to(stream), t.float(), caption, slices=slices).double()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("sliced", [False, True], ids=["whole", "sliced"])
def test_fp16_stays_finite_and_within_the_bounds_of_bf16(sliced: bool):
    found = outlier_model()
    assert largest_read(found, found.layers[0].feed_forward.w2) == pytest.approx(LARGEST, rel=1e-3)
    exact = velocity(found, torch.float32)

    narrow = velocity(found, torch.float16, sliced=sliced)

    assert narrow.isfinite().all()
    assert error(narrow, exact) <= error(velocity(found, torch.bfloat16, sliced=sliced), exact)


@pytest.mark.parametrize("matmul", [None, in_fp32], ids=["dequantised", "int8"])
def test_int8_weights_do_as_well(matmul: Int8Matmul | None):
    found = outlier_model(int8=True)
    found.use_int8(matmul)
    exact = velocity(found, torch.float32)

    narrow = velocity(found, torch.float16, sliced=True)

    assert narrow.isfinite().all()
    assert error(narrow, exact) <= error(velocity(found, torch.bfloat16, sliced=True), exact)


def test_without_the_factor_it_would_overflow(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model, "fp16_factor", lambda *rows: torch.ones((), dtype=torch.float16))

    assert not velocity(outlier_model(), torch.float16).isfinite().all()


@torch.inference_mode()
def test_with_an_fp16_token_stream_it_would_overflow():
    found = outlier_model()
    pixels, t, features = random_inputs(CONFIG)

    caption = found.encode_caption([item.half() for item in features], torch.float16)

    assert not found(pixels.half(), t.float(), caption).isfinite().all()


def test_the_factor_is_a_power_of_two_and_no_larger_than_it_must_be():
    rows = torch.tensor([[1.0, -586.0], [3.0, 0.5], [0.0, 0.0], [16_000.0, 1.0]], dtype=torch.float16)

    factor = fp16_factor(rows, rows)

    assert factor.dtype == torch.float16
    assert factor.squeeze(-1).tolist() == [2.0**-15, 1.0, 1.0, 2.0**-24]
    assert fp16_factor(rows).squeeze(-1).tolist() == [2.0**-6, 1.0, 1.0, 2.0**-10]


def test_the_largest_products_of_fp16_keep_a_factor():
    rows = torch.tensor([[60_000.0, -20_000.0, 1.0]], dtype=torch.float16)

    factor = fp16_factor(rows, rows)

    assert factor.item() == 2.0**-24
    assert (rows * factor * rows).isfinite().all()
    assert torch.equal((rows * factor).float() / factor.float(), rows.float())


def test_a_row_that_is_not_finite_stays_so():
    rows = torch.tensor([[float("inf"), 1.0], [float("nan"), 1.0]], dtype=torch.float16)

    assert not (rows * fp16_factor(rows)).isfinite().all(dim=-1).any()


@pytest.mark.parametrize(
    ("bf16", "capability", "dtype"),
    [
        (True, (8, 6), torch.bfloat16),
        (False, (7, 5), torch.float16),
        (False, (7, 0), torch.float16),
        (False, (6, 1), torch.float32),
    ],
)
def test_cards_without_bf16_compute_in_fp16_where_that_is_fast(
    bf16: bool, capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(devices, "computes_bf16", lambda device: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    assert choose_dtype("auto", torch.device("cuda", 0)) == dtype


def test_the_demo_draws_in_fp16_with_the_rest_in_fp32():
    pictures = {}
    for dtype in ("fp16", "fp32"):
        with L2PPipeline.from_pretrained("demo", dtype=dtype) as pipe:
            features = pipe.encode_prompts(["a red circle on a blue background", ""])
            assert {item.dtype for item in features} == {torch.float32}
            pictures[dtype] = pipe(
                prompt_embeds=features[0],
                negative_prompt_embeds=features[1],
                num_inference_steps=2,
                width=64,
                height=64,
                seed=1,
                output_type="pt",
            ).images

    assert pictures["fp16"].isfinite().all()
    assert 0 < (pictures["fp16"] - pictures["fp32"]).abs().max() < 0.05
