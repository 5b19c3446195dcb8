"""Quantised linear layers: what is dequantised a few rows at a time equals what is dequantised at once."""

import pytest
import torch
import torch.nn.functional as F

from l2p_lowvram import linear as linear_module
from l2p_lowvram.linear import Linear, Rotation

ROWS, COLUMNS = 200, 128
SCALES = {
    "tensor": (),
    "row": (ROWS,),
    "row column": (ROWS, 1),
    "block 8": (ROWS // 8, COLUMNS // 8),
    "block 1": (ROWS, COLUMNS),
}


def quantized_linear(scale_shape: tuple[int, ...], rotation: Rotation | None = None) -> Linear:
    torch.manual_seed(0)
    layer = Linear(COLUMNS, ROWS)
    weight = torch.randint(-127, 128, (ROWS, COLUMNS), dtype=torch.int8)
    layer.quantize_(weight, torch.rand(scale_shape) + 0.1, rotation)
    return layer.requires_grad_(False)


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("rotation", [None, Rotation(16)], ids=["plain", "rotated"])
def test_rows_dequantised_alone_have_the_bits_of_the_whole(scale: tuple[int, ...], rotation: Rotation | None) -> None:
    layer = quantized_linear(scale, rotation)

    whole = layer.dequantized()

    for start, stop in ((0, 7), (3, 64), (64, 200), (199, 300)):
        assert torch.equal(layer.dequantized(rows=slice(start, stop)), whole[start:stop])


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_slices_change_memory_not_the_result(scale: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "CPU_SLICE_BYTES", 64 * 4 * COLUMNS)  # 64 rows, the last slice shorter
    layer = quantized_linear(scale)
    x = torch.randn(2, 5, COLUMNS)

    result = layer(x)

    expected = F.linear(x.double(), layer.dequantized().double(), layer.bias.double())
    assert torch.allclose(result.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_weight_of_another_float_dtype_is_cast_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "CPU_SLICE_BYTES", 64 * 4 * COLUMNS)
    torch.manual_seed(0)
    layer = Linear(COLUMNS, ROWS).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(3, COLUMNS)

    result = layer(x)

    assert result.dtype == torch.float32
    assert torch.allclose(result, F.linear(x, layer.weight.float(), layer.bias.float()), atol=1e-5)
