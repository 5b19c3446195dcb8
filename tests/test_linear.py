"""Quantised linear layers: what is dequantised a few rows at a time equals what is dequantised at once."""

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import FakeCuda

from l2p_lowvram import int8_matmul
from l2p_lowvram import linear as linear_module
from l2p_lowvram.linear import Linear, RMSNorm, Rotation, converted_bytes, product_bytes

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


@pytest.mark.parametrize("rotation", [None, Rotation(16)], ids=["plain", "rotated"])
@pytest.mark.parametrize("scale", ["tensor", "row"])
@torch.inference_mode()
def test_scaled_outputs_are_those_of_scaled_weights(
    scale: str, rotation: Rotation | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_module, "_CPU_HALF_ROWS", 64)
    monkeypatch.setattr(int8_matmul, "_CPU_CACHED_BYTES", 3 * 4 * 64)  # three rows of outputs
    layer = quantized_linear(SCALES[scale], rotation)
    x = torch.randn(2, 5, COLUMNS).bfloat16()

    whole, (part,) = layer(x), layer.rows([slice(70, 150)], x.dtype, x.shape[0])

    expected = F.linear(x.double(), layer.dequantized().double(), layer.bias.double())
    assert (whole.double() - expected).norm() < 0.01 * expected.norm()
    expected = (expected - layer.bias)[..., 70:150]
    assert (part(x).double() - expected).norm() < 0.01 * expected.norm()


def by_formula(x: torch.Tensor, layer: Linear, rows: slice = slice(None)) -> torch.Tensor:
    expected = x.double() @ layer.dequantized().double().T[:, rows]
    return expected if layer.bias is None else expected + layer.bias.double()[rows]


def wide_linear(*, bias: bool = False, rotation: Rotation | None = None) -> Linear:
    generator = torch.Generator().manual_seed(1)
    layer = Linear(512, ROWS, bias=bias)
    weight = torch.randint(-127, 128, (ROWS, 512), dtype=torch.int8, generator=generator)
    layer.quantize_(weight, torch.rand(ROWS, 1, generator=generator) + 0.1, rotation)
    return layer.requires_grad_(False)


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Dtypes of the weights that oneDNN's own interface was given, or what stands for it where there is none."""
    given = []

    def multiply_into(out: torch.Tensor, x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> None:
        given.append(w.dtype)
        out.copy_(x.float() @ w.float().T * scale)

    monkeypatch.setattr(linear_module, "multiply_into", multiply_into)
    monkeypatch.setattr(linear_module, "multiplies", lambda inputs, weights: inputs != torch.float16)
    return given


@pytest.mark.parametrize(
    ("dtype", "tokens", "rotation", "stored"),
    [
        (torch.bfloat16, 8, None, torch.int8),
        (torch.bfloat16, 9, None, torch.bfloat16),
        (torch.bfloat16, 8, Rotation(16), torch.bfloat16),
        (torch.float32, 9, None, torch.int8),
        (torch.float32, 8, Rotation(16), torch.float32),
    ],
)
def test_wide_layers_are_multiplied_as_stored_or_written_scaled(
    dtype: torch.dtype,
    tokens: int,
    rotation: Rotation | None,
    stored: torch.dtype,
    multiplied: list[torch.dtype],
    monkeypatch: pytest.MonkeyPatch,
):
    """Many tokens in half precision convert the weight once, as do rotated ones, whose values are not the weight's."""
    monkeypatch.setattr(linear_module, "_MOST_STORED_TOKENS", 8)
    monkeypatch.setattr(linear_module, "_CPU_KERNEL_BYTES", 128 * 2 * 512)
    layer = wide_linear(rotation=rotation)
    x = torch.randn(1, tokens, 512, generator=torch.Generator().manual_seed(2)).to(dtype)

    whole, (part,) = layer(x), layer.rows([slice(70, 150)], x.dtype, tokens)
    of_rows = part(x)

    assert set(multiplied) == {stored}
    for found, rows in ((whole, slice(None)), (of_rows, slice(70, 150))):
        expected = by_formula(x, layer, rows)
        assert found.dtype == dtype
        assert found.shape == expected.shape
        assert (found.double() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize(
    "reason", ["fp16", "a bias", "autograd", "narrow", "blocks of scales", "a tensor of another class"]
)
def test_other_layers_go_through_torchs_operations(
    reason: str, multiplied: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
):
    layer = wide_linear(bias=reason == "a bias")
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(2))
    if reason == "fp16":
        x = x.half()
    if reason == "autograd":
        x.requires_grad_()
    if reason == "narrow":
        monkeypatch.setattr(linear_module, "_LEAST_KERNEL_COLUMNS", 513)
    if reason == "blocks of scales":
        layer.weight_scale = torch.rand(ROWS // 8, 64) + 0.1
    if reason == "a tensor of another class":
        layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(type("Other", (torch.Tensor,), {})), False)

    found = layer(x)

    expected = by_formula(x, layer)
    assert not multiplied
    assert (found.double() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_a_few_rows_at_a_time_is_torchs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_matmul, "_CPU_CACHED_BYTES", 3 * 4 * COLUMNS)
    norm = RMSNorm(COLUMNS, 1e-5).requires_grad_(False)
    norm.weight.copy_(torch.rand(COLUMNS))
    x = torch.randn(2, 5, COLUMNS).to(dtype)
    expected = F.rms_norm(x.float(), (COLUMNS,), norm.weight, 1e-5).to(dtype)

    with torch.inference_mode():
        found = norm(x)

    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("stored", [torch.float32, torch.int8])
def test_a_slice_of_a_longer_tensor_is_multiplied_as_one_matrix(stored: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """`F.linear` would multiply each item of its batch, in several times the time."""
    seen = []
    linear = torch.nn.functional.linear

    def watched(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        seen.append(x.dim())
        return linear(x, *rest)

    layer = Linear(16, 8).requires_grad_(False)
    if stored == torch.int8:
        layer.quantize_(torch.randint(-127, 128, (8, 16), dtype=torch.int8), torch.rand(8, 1))
    x = torch.randn(1, 40, 16)[:, 3:20]
    expected = x.double() @ layer.dequantized().double().T + layer.bias.double()
    monkeypatch.setattr(torch.nn.functional, "linear", watched)

    found = layer(x)
    (part,) = layer.rows([slice(0, 8)], torch.float32, 4)
    without_bias = part(x)

    assert seen == [2, 2]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((without_bias + layer.bias).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("scale", "rotation"), [((), None), ((3840, 1), None), ((30, 80), None), ((3840, 1), Rotation(256))]
)
def test_on_a_card_a_layer_takes_no_more_beside_its_result_than_is_planned(
    scale: tuple[int, ...], rotation: Rotation | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = lru_cache(linear_module.hadamard.__wrapped__)  # no fake one for other tests
    monkeypatch.setattr(linear_module, "hadamard", kept)
    with torch.device("meta"):
        layer = Linear(10240, 3840, bias=False)
    with FakeCuda() as cuda, torch.inference_mode():
        weight = torch.empty(3840, 10240, dtype=torch.int8, device=cuda.device)
        layer.quantize_(weight, torch.empty(scale, device=cuda.device), rotation)
        x = torch.empty(1, 512, 10240, dtype=dtype, device=cuda.device)
        if rotation is not None:
            rotation.apply(x)  # makes its matrix, which stays
        before = cuda.memory.current

        y = layer(x)

        assert y.is_contiguous()
        most = converted_bytes(cuda.device, dtype.itemsize) + product_bytes(cuda.device, dtype, 512, 10240, 3840)
        assert y.nbytes < cuda.memory.peak - before <= y.nbytes + most + (1 << 20)


@pytest.mark.parametrize("scale", [(), (4400, 1), (55, 5)])
@pytest.mark.parametrize("rotation", [None, Rotation(16)])
def test_what_cards_compute_is_the_dequantised_product(
    scale: tuple[int, ...], rotation: Rotation | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their way, on the CPU: products of slices, written where they are to be."""
    generator = torch.Generator().manual_seed(0)
    layer = Linear(400, 4400, bias=False)
    weight = torch.randint(-127, 128, (4400, 400), dtype=torch.int8, generator=generator)
    layer.quantize_(weight, torch.rand(scale, generator=generator) + 0.5, rotation)
    x = torch.randn(2, 3, 400, generator=generator)
    expected = x.double() @ layer.dequantized().double().T
    monkeypatch.setattr(linear_module, "is_card", lambda device: True)
    monkeypatch.setattr(linear_module, "_CARD_PRODUCT_BYTES", 1 << 20)  # several slices
    monkeypatch.setattr(Linear, "_output_scale", lambda *_: None)

    with torch.inference_mode():
        y = layer(x)

    assert (y - expected).abs().max() < 1e-5 * expected.abs().max()


def test_other_devices_than_cards_take_their_products_as_before() -> None:
    """MPS writes a product wrongly into a part of a tensor with some releases of torch: planned, and made, apart."""
    mps, cpu = torch.device("mps"), torch.device("cpu")

    assert product_bytes(mps, torch.float32, 8, 400, 4400) > 0
    assert converted_bytes(mps, 4) < converted_bytes(torch.device("cuda"), 4)
    assert product_bytes(cpu, torch.float32, 8, 400, 4400) > 0
