"""Products with INT8 weights by oneDNN's own interface: exact sums, scales, and where they are not offered."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from l2p_lowvram import compute, onednn
from l2p_lowvram.compute import check_kernel, fast_kernels, has_amx
from l2p_lowvram.families import PUBLISHED
from l2p_lowvram.int8_matmul import WritingMatmul, in_fp32, multiply, quantize_rows, working_bytes
from l2p_lowvram.onednn import OneDnnError, by_onednn, multiplies, multiply_into

CPU = torch.device("cpu")
needs_amx = pytest.mark.skipif(not multiplies(torch.int8), reason="needs a CPU with AMX, and torch's symbol table")
needs_fp32 = pytest.mark.skipif(not multiplies(torch.float32), reason="needs AVX-512, and torch's symbol table")
FLOATS = [
    pytest.param(torch.float32, torch.int8, marks=needs_fp32),
    pytest.param(torch.bfloat16, torch.int8, marks=needs_amx),
    pytest.param(torch.bfloat16, torch.bfloat16, marks=needs_amx),
]


def int8(rows: int, columns: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)


def rand(*shape: int, seed: int = 3) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def _tried_anew() -> Iterator[None]:
    for cached in (multiplies, onednn._interface):
        cached.cache_clear()
    yield
    for cached in (multiplies, onednn._interface):
        cached.cache_clear()


@needs_amx
@pytest.mark.parametrize(
    ("rows", "columns", "outputs"),
    [(1, 64, 16), (17, 3840, 96), (33, 1000, 40), (7, 37, 11), (130, 512, 64), (9, 5, 1)],
)
def test_sums_are_exact(rows: int, columns: int, outputs: int):
    q, weight = int8(rows, columns, 1), int8(outputs, columns)

    assert torch.equal(by_onednn(q, weight), (q.long() @ weight.T.long()).float())
    assert check_kernel(by_onednn, weight) is None
    assert isinstance(by_onednn, WritingMatmul)


@needs_amx
def test_sums_are_exact_where_all_products_are_the_largest():
    q, weight = torch.full((20, 3000), -127, dtype=torch.int8), torch.full((16, 3000), 127, dtype=torch.int8)

    assert torch.equal(by_onednn(q, weight), torch.full((20, 16), -127.0 * 127 * 3000))


@needs_amx
@pytest.mark.parametrize("part", ["rows", "columns", "turned"])
def test_parts_of_a_weight_are_multiplied_where_they_lie(part: str):
    weight = int8(96, 64)
    chosen = {"rows": weight[32:64], "columns": weight[:, 16:48], "turned": weight.T}[part]
    q = int8(40, chosen.shape[1], 1)

    assert torch.equal(by_onednn(q, chosen), in_fp32(q, chosen).float())


@needs_amx
@pytest.mark.parametrize("shape", [(1, 1), (96, 1)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_has_the_bits_of_the_reference(
    shape: tuple[int, int], with_bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """Whose sums of so many products need rounding, too; in parts, as many rows are."""
    monkeypatch.setattr(onednn, "_MOST_ROWS", 40)
    x, weight = quantize_rows((rand(70, 4096) * rand(70, 1, seed=4)).to(dtype)), int8(96, 4096).abs_()
    scale = rand(*shape) / 100
    bias = rand(96, seed=4) if with_bias else None

    found, expected = (multiply(kernel, x, weight, scale, bias) for kernel in (by_onednn, in_fp32))

    assert in_fp32(x.values, weight).max() > 1 << 24
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@needs_amx
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_lie_apart_have_their_own_factors(dtype: torch.dtype):
    """To oneDNN they are those of other rows."""
    x, weight, scale = quantize_rows(rand(70, 256) * rand(70, 1, seed=4)), int8(96, 256), rand(96)
    dense, room = torch.empty(70, 96, dtype=dtype), torch.full((70, 200), 7.0, dtype=dtype)

    multiply_into(dense, x.values, weight, scale, x.scale)
    multiply_into(room[:, 50:146], x.values, weight, scale, x.scale)

    assert torch.equal(room[:, 50:146], dense)
    assert (room[:, :50] == 7).all()
    assert (room[:, 146:] == 7).all()


@pytest.mark.parametrize(("dtype", "stored"), FLOATS)
@pytest.mark.parametrize("scale_count", [1, 200])
def test_floats_are_multiplied_with_stored_values(dtype: torch.dtype, stored: torch.dtype, scale_count: int):
    weight, scale = int8(200, 700).to(stored), rand(scale_count) / 50
    x = (rand(90, 700, seed=5) - 0.5).to(dtype)
    room = torch.full((90, 256), 7.0, dtype=dtype)

    multiply_into(room[:, 20:220], x, weight, scale)

    expected = x.double() @ weight.double().T * scale
    error = (room[:, 20:220].double() - expected).norm() / expected.norm()
    assert error < (1e-6 if dtype == torch.float32 else 2e-3)  # of bf16 half a last place, 2^-9, at most
    assert (room[:, :20] == 7).all()
    assert (room[:, 220:] == 7).all()


@pytest.mark.parametrize(("dtype", "stored"), FLOATS)
@pytest.mark.parametrize("rows", [1, 33, 576])
def test_where_a_weight_lies_changes_no_bit(dtype: torch.dtype, stored: torch.dtype, rows: int):
    """A mapped file aligns nothing; a slot does."""
    weight, scale = int8(192, 640).to(stored), rand(192)
    x = (rand(rows, 640, seed=5) - 0.5).to(dtype)
    expected = torch.empty(rows, 192, dtype=dtype)
    multiply_into(expected, x, weight, scale)
    room = torch.empty(weight.nbytes + 256, dtype=torch.uint8)

    for offset in range(0, 72, stored.itemsize):
        moved = room[offset : offset + weight.nbytes].view(stored).view_as(weight).copy_(weight)
        found = torch.empty_like(expected)
        multiply_into(found, x, moved, scale)
        assert torch.equal(found, expected), offset


@needs_amx
@pytest.mark.parametrize("rows", [16, 576, 2112, 4096])
def test_onednns_own_memory_is_within_what_is_planned_for_int8(rows: int):
    config = PUBLISHED["1k"]
    planned = working_bytes(CPU, rows, config.ffn_dim)
    for columns, outputs in (
        (config.dim, 3 * config.dim),
        (config.dim, config.dim),
        (config.dim, config.ffn_dim),
        (config.ffn_dim, config.dim),
    ):
        q, weight = torch.empty(rows, columns, dtype=torch.int8), torch.empty(outputs, columns, dtype=torch.int8)
        out = torch.empty(rows, outputs, dtype=torch.bfloat16)

        with onednn._Matmul(out, q, weight, torch.ones(outputs), torch.ones(rows, 1)) as matmul:
            assert 0 < matmul.scratchpad_bytes <= planned


@needs_amx
def test_a_product_leaves_no_object_of_onednn(monkeypatch: pytest.MonkeyPatch):
    interface = onednn._interface()
    assert interface is not None
    calls: collections.Counter[str] = collections.Counter()

    def counted(name: str, function):
        def call(*arguments):
            calls[name] += 1
            return function(*arguments)

        return call

    functions = {name: counted(name, function) for name, function in interface._functions.items()}
    monkeypatch.setattr(interface, "_functions", functions)
    x = quantize_rows(rand(20, 64))

    multiply(by_onednn, x, int8(96, 64), rand(96, 1), None)
    with pytest.raises(OneDnnError, match="status"):
        multiply_into(torch.empty(20, 5), x.values, int8(96, 64), rand(96))  # of another width

    made = sum(count for name, count in calls.items() if "_create" in name)
    # The refused product made none of its description and asked for it once.
    assert made - 1 == sum(count for name, count in calls.items() if name.endswith("_destroy")) > 10


def fail(*_: object) -> None:
    raise OneDnnError("oneDNN's primitive_execute fails with status 2")


def find_nothing(*_: object) -> None:
    raise ValueError("no symbol table")


@needs_amx
@pytest.mark.usefixtures("_tried_anew")
@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (onednn._Matmul, "_kernel", lambda matmul: "brg_matmul:avx2_vnni"),
        (onednn._Matmul, "_kernel", lambda matmul: "ref_int8:any"),
        (onednn._Matmul, "run", fail),
        (onednn, "_MULTIPLY", 0x1FFF0),  # which adds
        (onednn, "_AFTERWARDS", 16384),  # as in older versions
        (onednn, "function_addresses", find_nothing),
        (torch.backends.cpu, "get_cpu_capability", lambda: "AVX2"),
    ],
    ids=["another kernel", "its reference", "fails", "wrong result", "other numbers", "no table", "an older CPU"],
)
def test_what_is_not_fast_and_right_is_not_used(
    owner: object, name: str, value: object, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(owner, name, value)

    assert not multiplies(torch.int8)


def test_what_onednn_has_no_kernel_for_is_not_asked_of_it():
    assert not multiplies(torch.float16)
    assert not multiplies(torch.float32, torch.float32)


@needs_amx
def test_a_reference_that_takes_minutes_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onednn._Matmul, "_kernel", lambda matmul: "ref:any")

    with pytest.raises(OneDnnError, match=r"only its reference for \[20, 64\] times \[64, 96\]"):
        by_onednn(int8(20, 64), int8(96, 64))


@needs_amx
@pytest.mark.usefixtures("_tried_anew")
@pytest.mark.parametrize("surroundings", [torch.device("meta"), torch.autocast("cpu", torch.bfloat16)])
def test_a_programs_default_device_and_autocast_change_nothing(surroundings: Any):
    q, weight = int8(20, 64, seed=1), int8(96, 64)
    expected = in_fp32(q, weight).float()

    with surroundings:
        assert all(multiplies(*dtypes) for dtypes in ((torch.int8,), (torch.bfloat16,), (torch.bfloat16,) * 2))
        assert torch.equal(by_onednn(q, weight), expected)


@pytest.mark.parametrize(("has", "names"), [(True, ["oneDNN's matmul"]), (False, ["torch._int_mm"])])
def test_the_kernel_is_offered_where_it_is_fast_alone(has: bool, names: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compute, "has_vnni", lambda: True)
    monkeypatch.setattr(compute, "multiplies", lambda dtype: has)

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
