"""INT8 arithmetic: against the reference's outputs, kernels against each other, slices against the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from l2p_lowvram import int8_matmul
from l2p_lowvram.compute import check_kernel, has_vnni
from l2p_lowvram.config import ModelConfig
from l2p_lowvram.int8_matmul import Int8Matmul, by_int_mm, in_fp32, int_mm_fits, quantize_rows
from l2p_lowvram.linear import Linear, Rotation
from l2p_lowvram.model import L2PTransformer
from l2p_lowvram.onednn import by_onednn, multiplies
from l2p_lowvram.quantization import Scheme
from l2p_lowvram.synthetic import mini_config, random_state_dict
from tests import goldens
from tests.test_golden_int8 import CASES
from tests.test_tiling_model import TINY, random_inputs

KERNELS = {"reference": in_fp32, "_int_mm": by_int_mm}
if multiplies(torch.int8):
    KERNELS["oneDNN's matmul"] = by_onednn


def golden_layer(name: str, mode: str, matmul: Int8Matmul | None) -> tuple[Linear, dict[str, Tensor]]:
    stored = goldens.tensors(name)
    rows, columns = stored[f"{mode}.weight"].shape
    layer = Linear(columns, rows)
    layer.bias = nn.Parameter(stored["bias"])
    rotation = Rotation(int(mode.removeprefix("convrot"))) if mode.startswith("convrot") else None
    layer.quantize_(stored[f"{mode}.weight"], stored[f"{mode}.weight_scale"], rotation)
    layer.int8_matmul = matmul
    return layer.requires_grad_(False), stored


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def random_layer(rows: int, columns: int, matmul: Int8Matmul | None, rotation: Rotation | None = None) -> Linear:
    generator = torch.Generator().manual_seed(5)
    layer = Linear(columns, rows)
    weight = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)
    layer.quantize_(weight, torch.rand(rows, 1, generator=generator) / 1000, rotation)
    layer.int8_matmul = matmul
    return layer.requires_grad_(False)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_outputs_are_those_of_the_reference(name: str, mode: str, kernel: Int8Matmul):
    layer, stored = golden_layer(name, mode, kernel)

    output = layer(stored["x"])

    assert relative(output, stored[f"{mode}.w8a8_out"]) <= 1e-6
    golden_error = relative(stored[f"{mode}.w8a8_out"], stored["float_out"])
    assert relative(output, stored["float_out"]) <= golden_error * (1 + 1e-5)


def test_activations_that_are_not_rotated_would_be_seen():
    layer, stored = golden_layer("int8_ragged", "convrot64", in_fp32)
    layer.rotation = None

    assert relative(layer(stored["x"]), stored["convrot64.w8a8_out"]) > 1


@pytest.mark.parametrize("columns", [8, 1024, 3000])
def test_sums_are_exact_where_all_products_are_the_largest(columns: int):
    q, w = torch.full((20, columns), -127, dtype=torch.int8), torch.full((16, columns), 127, dtype=torch.int8)

    for kernel in KERNELS.values():
        assert torch.equal(kernel(q, w).long(), torch.full((20, 16), -127 * 127 * columns))


@pytest.mark.skipif(not has_vnni(), reason="needs a CPU with VNNI")
@pytest.mark.parametrize(("rows", "columns", "outputs"), [(64, 512, 64), (17, 3840, 96), (33, 1000, 40)])
def test_int_mm_sums_exactly_with_vnni(rows: int, columns: int, outputs: int):
    generator = torch.Generator().manual_seed(2)
    q = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)
    weight = torch.randint(-127, 128, (outputs, columns), dtype=torch.int8, generator=generator)

    assert torch.equal(by_int_mm(q, weight).long(), q.long() @ weight.T.long())
    assert check_kernel(by_int_mm, weight) is None


@pytest.mark.parametrize(
    ("rows", "columns", "outputs", "fits"),
    [(17, 8, 8, True), (16, 8, 8, False), (17, 12, 8, False), (17, 8, 12, False), (4096, 3840, 10240, True)],
)
def test_the_limits_of_int_mm_on_cuda(rows: int, columns: int, outputs: int, fits: bool):
    assert int_mm_fits(rows, columns, outputs) is fits


@pytest.mark.parametrize(
    ("rows", "columns", "outputs"), [(1, 64, 16), (16, 64, 16), (17, 64, 16), (40, 60, 16), (40, 64, 20)]
)
def test_int_mm_is_called_with_what_cuda_takes_alone(
    rows: int, columns: int, outputs: int, monkeypatch: pytest.MonkeyPatch
):
    called = []
    real = torch._int_mm

    def checked(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
        called.append(a.shape)
        assert int_mm_fits(*a.shape, b.shape[1])
        assert b.stride(0) == 1, "column by column"
        assert out is None or (out.is_contiguous() and out.shape == (a.shape[0], b.shape[1]))
        return real(a, b) if out is None else real(a, b, out=out)

    monkeypatch.setattr(torch, "_int_mm", checked)
    layer = random_layer(outputs, columns, by_int_mm)
    x = torch.randn(rows, columns)

    output = layer(x)

    assert bool(called) is (columns % 8 == 0 and outputs % 8 == 0)
    layer.int8_matmul = in_fp32
    assert torch.equal(output, layer(x))


@pytest.mark.parametrize("rotation", [None, Rotation(64)], ids=["plain", "rotated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slices_have_the_bits_of_the_whole(
    dtype: torch.dtype, rotation: Rotation | None, monkeypatch: pytest.MonkeyPatch
):
    layer = random_layer(200, 192, in_fp32, rotation)
    x = torch.randn(2, 50, 192, generator=torch.Generator().manual_seed(6)).to(dtype)
    whole = layer(x)

    monkeypatch.setattr(int8_matmul, "CPU_SLICE_BYTES", 4 * 1024 * 7)  # 7 rows, 64 outputs

    assert whole.dtype == dtype
    assert torch.equal(layer(x), whole)
    assert torch.equal(torch.cat([layer(part) for part in x.split(13, dim=1)], dim=1), whole)


def test_layers_that_read_the_same_quantise_it_once():
    layer, other = random_layer(64, 64, in_fp32, Rotation(16)), random_layer(72, 64, in_fp32, Rotation(16))
    x = torch.randn(20, 64)

    read = layer.read(x)

    assert isinstance(read, int8_matmul.QuantizedRows)
    assert torch.equal(layer(read), layer(x))
    assert torch.equal(other(read), other(x))


@pytest.mark.parametrize("change", ["rotation", "dequantised"])
def test_a_layer_that_reads_otherwise_takes_the_source(change: str):
    layer, other = random_layer(64, 64, in_fp32, Rotation(16)), random_layer(72, 64, in_fp32, Rotation(4))
    other.full_precision_matmul = change == "dequantised"
    x = torch.randn(20, 64)

    assert torch.equal(other(layer.read(x)), other(x))


def test_a_row_that_overflowed_is_not_hidden():
    layer = random_layer(64, 64, in_fp32)
    x = torch.randn(3, 64)
    x[0, 5], x[1, 5] = float("inf"), float("nan")

    finite = layer(x).isfinite()

    assert not finite[0].any()
    assert not finite[1].any()
    assert finite[2].all()


def test_a_row_of_zeros_stays_one():
    assert not quantize_rows(torch.zeros(2, 8)).values.any()
    assert not random_layer(64, 64, in_fp32)(torch.zeros(2, 64)).sub(random_layer(64, 64, None).bias).any()


@pytest.mark.parametrize(
    ("scheme", "allowed"), [("row", True), ("tensor", True), ("block16", False), ("full precision", False)]
)
def test_what_may_be_multiplied_in_integers(scheme: str, allowed: bool):
    layer = Linear(64, 32)
    layer.quantize_(*Scheme.parse("row" if scheme == "full precision" else scheme).quantize(torch.randn(32, 64)))
    layer.full_precision_matmul = scheme == "full precision"
    layer.int8_matmul = in_fp32
    x = torch.randn(20, 64)

    output = layer(x)

    layer.int8_matmul = None
    assert torch.equal(output, layer(x)) is not allowed


def int8_model(config: ModelConfig, *, everywhere: bool) -> L2PTransformer:
    """With INT8 weights in the blocks' five layers; or in every linear layer."""
    model = L2PTransformer(config)
    model.load_state_dict(random_state_dict(config))
    for module in model.requires_grad_(False).modules():
        if isinstance(module, Linear) and (everywhere or module.bias is None):
            module.quantize_(*Scheme.parse("row").quantize(module.weight))
    return model


def test_five_layers_of_a_block_multiply_int8_and_nothing_else():
    model = int8_model(mini_config(16, dim=96, n_heads=3), everywhere=True)
    model.use_int8(in_fp32)

    found = {name for name, module in model.named_modules() if isinstance(module, Linear) and module.multiplies_int8}

    ends = ("attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    blocks = [
        f"{kind}.{i}"
        for kind in ("noise_refiner", "context_refiner", "layers")
        for i, _ in enumerate(getattr(model, kind))
    ]
    assert found == {f"{block}.{end}" for block in blocks for end in ends}


@torch.inference_mode()
def test_a_sliced_model_computes_as_the_whole_one():
    config = mini_config(16, dim=96, n_heads=3)
    model = int8_model(config, everywhere=False)
    pixels, t, features = random_inputs(config)
    inputs = (pixels.float(), t.float(), model.encode_caption([item.float() for item in features]))
    dequantised = model(*inputs)
    model.use_int8(in_fp32)

    whole, sliced = model(*inputs), model(*inputs, slices=TINY.slices())

    # A value at the border of two levels may fall to either side: sums before it differ in their last bits.
    assert relative(sliced, whole) < 1e-5
    assert 1e-6 < relative(whole, dequantised) < 1e-3
    model.use_int8(None)
    assert torch.equal(model(*inputs), dequantised)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_sums_are_scaled_alike_on_cards_and_cpus(dtype: torch.dtype, with_bias: bool):
    generator = torch.Generator().manual_seed(2)
    sums = torch.randint(-(2**27), 2**27, (37, 24), dtype=torch.int32, generator=generator)
    row_scale, factor = torch.rand(37, 1, generator=generator) * 1e-4, torch.rand(1, 24, generator=generator) * 1e-3
    bias = torch.randn(24, generator=generator) if with_bias else None
    on_card, on_cpu = torch.empty(37, 24, dtype=dtype), torch.empty(37, 24, dtype=dtype)

    int8_matmul._scale_at_once(on_card, sums.clone(), row_scale, factor, bias)
    int8_matmul._scale_in_cache(on_cpu, sums.clone(), row_scale, factor, bias)

    assert torch.equal(on_card, on_cpu)
    exact = sums.double() * row_scale.double() * factor.double() + (0 if bias is None else bias.double())
    assert relative(on_card, exact) < {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cards_quantise_to_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their one reduction, on the CPU."""
    x = torch.randn(70, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[3], x[5, 7], x[6, 1] = 0.0, float("nan"), float("-inf")
    plain = int8_matmul.quantize_rows(x)
    monkeypatch.setattr(int8_matmul, "is_card", lambda device: True)

    found = int8_matmul.quantize_rows(x)

    assert torch.equal(found.scale.nan_to_num(-1), plain.scale.nan_to_num(-1))
    finite = plain.scale.isfinite().flatten()
    assert torch.equal(found.values[finite], plain.values[finite])
    assert finite.sum() == 68
