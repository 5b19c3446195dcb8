"""INT8 products by oneDNN's kernel for quantised models: views of weights, exact sums, and where it is not offered."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from l2p_lowvram import compute, onednn
from l2p_lowvram.compute import check_kernel, fast_kernels, has_amx, has_vnni
from l2p_lowvram.int8_matmul import ScalingMatmul, by_int_mm, in_fp32, multiply, quantize_rows
from l2p_lowvram.onednn import by_qlinear, has_qlinear

CPU = torch.device("cpu")
needs_views = pytest.mark.skipif(not has_qlinear(), reason="torch has no such views or no such kernel here")
needs_amx = pytest.mark.skipif(not (has_qlinear() and has_amx()), reason="needs a CPU with AMX")


def int8(rows: int, columns: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)


def view(weight: Tensor) -> Tensor:
    views = onednn._views()
    assert views is not None
    return views.transposed(weight)


@pytest.fixture
def _learnt_anew():
    onednn._views.cache_clear()
    yield
    onednn._views.cache_clear()


@needs_views
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (8, 1), (48, 128), (96, 40)])
def test_a_view_shows_the_weight_turned(rows: int, columns: int):
    weight = int8(rows, columns)

    assert torch.equal(view(weight).to_dense(), weight.T)


@needs_views
def test_a_view_is_no_copy():
    weight = int8(48, 128)
    seen = view(weight)

    weight[5, 7] = 99

    assert torch.ops.mkldnn.data_ptr(seen) == weight.data_ptr()
    assert seen.to_dense()[7, 5] == 99


@needs_views
def test_a_view_is_freed_with_its_last_reference():
    assert view(int8(4, 4))._use_count() == 1


@needs_amx
@pytest.mark.parametrize(
    ("rows", "columns", "outputs"), [(1, 64, 16), (17, 3840, 96), (33, 1000, 40), (7, 37, 11), (130, 512, 64)]
)
def test_sums_are_exact(rows: int, columns: int, outputs: int):
    q, weight = int8(rows, columns, 1), int8(outputs, columns)

    assert torch.equal(by_qlinear(q, weight), (q.long() @ weight.T.long()).float())
    assert check_kernel(by_qlinear, weight) is None
    assert isinstance(by_qlinear, ScalingMatmul)


@needs_amx
def test_sums_are_exact_where_all_products_are_the_largest():
    q, weight = torch.full((20, 3000), -127, dtype=torch.int8), torch.full((16, 3000), 127, dtype=torch.int8)

    assert torch.equal(by_qlinear(q, weight), torch.full((20, 16), -127.0 * 127 * 3000))


@needs_amx
def test_rows_of_a_weight_are_multiplied_where_they_lie():
    q, weight = int8(40, 64, 1), int8(96, 64)

    assert torch.equal(by_qlinear(q, weight[32:64]), in_fp32(q, weight)[:, 32:64].float())


@needs_amx
@pytest.mark.parametrize("shape", [(1, 1), (1, 96)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_has_the_bits_of_the_reference(shape: tuple[int, int], with_bias: bool, dtype: torch.dtype):
    """Whose sums of so many products need rounding, too."""
    generator = torch.Generator().manual_seed(3)
    x, weight = quantize_rows(torch.rand(70, 4096, generator=generator).to(dtype)), int8(96, 4096).abs_()
    scale = torch.rand(shape, generator=generator).T / 100
    bias = torch.randn(96, generator=generator) if with_bias else None

    found, expected = (multiply(kernel, x, weight, scale, bias) for kernel in (by_qlinear, in_fp32))

    assert in_fp32(x.values, weight).max() > 1 << 24
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of weights that go through `torch._int_mm`."""
    called = []

    def count(q: Tensor, w: Tensor) -> Tensor:
        called.append(w.shape)
        return by_int_mm(q, w)

    monkeypatch.setattr(onednn, "by_int_mm", count)
    return called


@pytest.mark.skipif(not has_vnni(), reason="needs a CPU with VNNI")
@pytest.mark.parametrize("reason", ["no views", "columns left out"])
def test_without_a_view_torchs_other_kernel_multiplies(reason: str, monkeypatch: pytest.MonkeyPatch):
    called = counted(monkeypatch)
    weight = int8(48, 128)[:, :64]
    if reason == "no views":
        weight = weight.contiguous()
        monkeypatch.setattr(onednn, "_views", lambda: None)
    q = int8(20, 64, 1)

    assert torch.equal(by_qlinear(q, weight).float(), in_fp32(q, weight).float())
    assert called == [weight.shape]


def little(*values: int) -> bytes:
    return b"".join(value.to_bytes(8, sys.byteorder) for value in values)


def as_known(rows: int, columns: int) -> bytes:
    return little(2, rows, columns, 0, rows, columns, 0, columns, 1)


def test_a_descriptor_is_learnt_and_turned(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onednn, "_serialised", as_known)

    assert onednn._learn().of_transposed(6, 10) == little(2, 10, 6, 0, 10, 6, 0, 1, 10)


@pytest.mark.parametrize(
    "made",
    [
        lambda rows, columns: b"",
        lambda rows, columns: little(rows, columns),  # neither padded sizes nor strides
        lambda rows, columns: little(rows, columns, rows, columns, 1, columns),  # strides in another order
        lambda rows, columns: little(columns, rows, columns, rows, columns, 1),  # sizes in another order
        lambda rows, columns: as_known(rows, columns) + little(rows),  # one more number of rows
        lambda rows, columns: little(0) * (rows == 1009) + as_known(rows, columns),  # places that move
    ],
)
@pytest.mark.usefixtures("_learnt_anew")
def test_an_unknown_descriptor_is_not_used(made, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onednn, "_serialised", made)

    with pytest.raises(ValueError, match="descriptor"):
        onednn._learn()
    assert not has_qlinear()


@needs_views
@pytest.mark.usefixtures("_learnt_anew")
def test_a_view_that_shows_another_weight_is_not_used(monkeypatch: pytest.MonkeyPatch):
    class Untrue(onednn._Views):
        def transposed(self, weight: Tensor) -> Tensor:
            return super().transposed(weight.flip(0).contiguous())

    monkeypatch.setattr(onednn, "_Views", Untrue)

    assert not has_qlinear()


@needs_views
@pytest.mark.usefixtures("_learnt_anew")
@pytest.mark.parametrize("fault", ["refuses int8", "wrong sums"])
def test_a_kernel_that_cannot_is_not_used(fault: str, monkeypatch: pytest.MonkeyPatch):
    """Torch 2.6 has the views, and a kernel that takes uint8 alone."""
    product = onednn._product

    def faulty(view: Tensor, q: Tensor, factor: Tensor) -> Tensor:
        if fault == "refuses int8":
            raise RuntimeError("qlinear with mkldnn tensor: data type of input should be uint8 (unsigned char).")
        return product(view, q, factor) + 1

    monkeypatch.setattr(onednn, "_product", faulty)

    assert not has_qlinear()


@needs_amx
@pytest.mark.usefixtures("_learnt_anew")
def test_a_programs_default_device_changes_nothing():
    q, weight = int8(20, 64, seed=1), int8(96, 64)
    expected = in_fp32(q, weight).float()

    with torch.device("meta"):
        assert has_qlinear()
        assert torch.equal(by_qlinear(q, weight), expected)


@pytest.mark.usefixtures("_learnt_anew")
def test_a_torch_without_the_call_has_no_views(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(torch._C, "_aoti", raising=False)

    assert not has_qlinear()


@pytest.mark.parametrize(
    ("amx", "views", "names"),
    [
        (True, True, ["oneDNN's qlinear"]),
        *((amx, views, ["torch._int_mm"]) for amx, views in ((True, False), (False, True))),
    ],
)
def test_the_kernel_is_offered_on_matrix_units_alone(
    amx: bool, views: bool, names: list[str], monkeypatch: pytest.MonkeyPatch
):
    """Elsewhere the same call takes minutes."""
    monkeypatch.setattr(compute, "has_vnni", lambda: True)
    monkeypatch.setattr(compute, "has_amx", lambda: amx)
    monkeypatch.setattr(compute, "has_qlinear", lambda: views)

    assert list(fast_kernels(CPU)) == names


@pytest.mark.parametrize(
    ("limit", "used"),
    [
        *((limit, True) for limit in (None, "DEFAULT", "all", "AVX512_CORE_AMX", "avx10_1_512_amx_fp16")),
        *((limit, False) for limit in ("AVX512_CORE_BF16", "avx2")),
    ],
)
@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_matrix_units_that_onednn_may_not_use_do_not_count(
    name: str, limit: str | None, used: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(compute, "_cpu_has", lambda check: True)
    for other in compute._ISA_LIMITS:
        monkeypatch.delenv(other, raising=False)
    if limit is not None:
        monkeypatch.setenv(name, limit)

    assert has_amx() is used
