"""FP8 values widened by shifts."""

import pytest
import torch

from l2p_lowvram.fp8 import widen_into
from l2p_lowvram.linear import Linear

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_code_has_its_value(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3).view(2, 128)
    expected = codes.to(torch.float32).to(dtype)

    widened = widen_into(torch.full((2, 128), 7.0, dtype=dtype), codes)

    assert expected.isnan().sum() == 2
    assert torch.equal(widened.isnan(), expected.isnan())
    finite = ~expected.isnan()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(widened.view(bits)[finite], expected.view(bits)[finite])  # -0.0 included


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_lone_nan_of_either_sign_is_one(code: int) -> None:
    codes = torch.tensor([0x38, code], dtype=torch.uint8).view(E4M3)

    widened = widen_into(torch.empty(2), codes)

    assert widened[0] == 1
    assert widened[1].isnan()


@pytest.mark.parametrize("count", [0, 1, (1 << 17) - 1, (1 << 17) + 3, 3 << 17])
def test_any_number_of_values(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # Within E4M3's range: torch made NaN of what is beyond it before it made 448.
    values = (torch.randn(count, generator=generator) * 100).clamp(-448, 448).to(E4M3)

    assert torch.equal(widen_into(torch.empty(count), values), values.float())


@pytest.mark.parametrize("stored", [E4M3, E5M2], ids=["E4M3", "E5M2"])
@pytest.mark.parametrize("scale", [None, (), (200,), (25, 16)], ids=["plain", "tensor", "row", "block"])
def test_layers_dequantise_to_the_values_of_torch(stored: torch.dtype, scale: tuple[int, ...] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 128, generator=generator).to(stored)
    layer = Linear(128, 200, bias=False)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    expected = weight.float()
    if scale is not None:
        factors = torch.rand(scale, generator=generator) + 0.5
        layer.quantize_(weight, factors)
        blocks = 200 // len(factors) if len(scale) == 2 else 1
        spread = factors.repeat_interleave(blocks, 0).repeat_interleave(blocks, 1) if len(scale) == 2 else factors
        expected = expected * (spread if len(scale) != 1 else spread[:, None])
    x = torch.randn(3, 128, generator=generator)

    assert torch.equal(layer.dequantized(), expected)
    assert torch.allclose(layer(x), x @ expected.T, rtol=1e-5, atol=1e-5)
