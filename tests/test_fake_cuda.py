"""The fake card counts what can be worked out by hand, and tells kernels apart as a real build does."""

from __future__ import annotations

from collections.abc import Iterator

import fake_cuda
import pytest
import torch
import torch.nn.functional as F
from fake_cuda import ARCHES, TESTED_TORCH, DeviceGuardError, FakeCuda, device_guard
from torch import Tensor

BF16 = torch.bfloat16


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with FakeCuda() as cuda:
        yield cuda


def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=FakeCuda.device)


def test_fake_cuda_tensors_work_on_this_torch(cuda: FakeCuda) -> None:
    tensor = made(64)
    tensor[:32] = torch.ones(32)

    assert tensor.view(torch.int32).device == FakeCuda.device, f"looked at with torch {TESTED_TORCH}"
    assert cuda.memory.current == 512


def test_a_torch_whose_guards_lie_elsewhere_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_cuda, "_REGISTRY", "no_such_symbol")

    with pytest.raises(DeviceGuardError, match=f"torch {TESTED_TORCH}.*no_such_symbol"), device_guard():
        pass


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build has guards of its own")
def test_the_guard_is_taken_out_again() -> None:
    with device_guard():
        pass

    with pytest.raises((RuntimeError, AssertionError)):
        torch.empty(1, device="cuda:0")


def test_a_storage_counts_once_rounded_and_goes_with_its_last_view(cuda: FakeCuda) -> None:
    tensor = made(1000)
    view = tensor[10:20].view(2, 5)

    assert cuda.memory.current == 4096
    del tensor
    assert cuda.memory.current == 4096
    view.add_(1)
    del view
    assert cuda.memory.current == 0
    assert cuda.memory.peak == 4096


def test_host_tensors_do_not_count(cuda: FakeCuda) -> None:
    torch.empty(1 << 30).add_(1)

    assert cuda.memory.peak == 0


def test_a_naive_chain_peaks_where_it_must(cuda: FakeCuda) -> None:
    x, up, gate, down = made(256, 64), made(128, 64), made(128, 64), made(64, 128)
    weights = 4 * (256 * 64 + 3 * 128 * 64)

    hidden = F.silu(F.linear(x, up))  # while silu runs: its input and its output
    hidden = hidden * F.linear(x, gate)  # three of them
    F.linear(hidden, down)

    assert cuda.memory.peak == weights + 3 * 4 * 256 * 128
    assert cuda.memory.peak_at.startswith("mul.Tensor at test_fake_cuda.py:")
    alive = cuda.memory.alive_at_peak()
    assert sum(nbytes for nbytes, _ in alive) == cuda.memory.peak
    assert {site.split()[0] for _, site in alive} == {"empty.memory_format", "silu", "mm", "mul.Tensor"}


def test_in_place_work_takes_nothing(cuda: FakeCuda) -> None:
    x = made(256, 64)

    x.mul_(2).add_(1)
    F.silu(x, inplace=True)

    assert cuda.memory.peak == x.nbytes


def test_a_norm_is_one_kernel_where_the_dtypes_agree(cuda: FakeCuda) -> None:
    x, weight = made(100, 512, dtype=BF16), made(512, dtype=BF16)
    before = cuda.memory.current

    result = F.rms_norm(x, (512,), weight)

    assert cuda.memory.peak - before == result.nbytes + 512  # one fp32 number per row, 400 bytes


def test_a_norm_with_another_dtype_is_a_chain_in_fp32(cuda: FakeCuda) -> None:
    x, weight = made(100, 512, dtype=BF16), made(512)
    before = cuda.memory.current

    with pytest.warns(UserWarning, match="Mismatch dtype"):
        F.rms_norm(x, (512,), weight)

    assert cuda.memory.peak - before >= 2 * x.numel() * 4


def test_kernels_copy_strided_inputs_for_as_long_as_they_run(cuda: FakeCuda) -> None:
    whole, weight = made(1, 3, 64, 128), made(4, 3, 1, 1)
    crop = whole[..., :64]
    before = cuda.memory.current

    result = F.conv2d(crop, weight)

    assert cuda.memory.peak - before == crop.nbytes + result.nbytes
    assert cuda.memory.current - before == result.nbytes


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_convolutions_turn_maps_that_lie_otherwise_than_the_kernel_wants(
    cuda: FakeCuda, is_last: bool, dtype: torch.dtype
) -> None:
    order = torch.channels_last if is_last else torch.contiguous_format
    x = torch.empty(1, 64, 32, 32, device=FakeCuda.device, memory_format=order, dtype=dtype)
    weight = made(16, 64, 3, 3, dtype=dtype)
    before = cuda.memory.current

    result = F.conv2d(x, weight, padding=1)

    turned = 0 if is_last == (dtype == torch.bfloat16) else x.nbytes + result.nbytes
    assert cuda.memory.peak - before == result.nbytes + turned
    assert result.is_contiguous(memory_format=order)


def test_a_transposed_weight_is_multiplied_as_it_is_and_every_second_column_is_not(cuda: FakeCuda) -> None:
    x, weight, wide = made(64, 256), made(128, 256), made(128, 512)
    before = cuda.memory.current

    x @ weight.t()
    plain = cuda.memory.peak - before
    x @ wide[:, ::2].t()

    assert plain == 4 * 64 * 128
    assert cuda.memory.peak - before == plain + weight.nbytes


def attend(arch: str, dtype: torch.dtype, width: int = 128) -> tuple[FakeCuda, int]:
    """The card, and what attention takes at most beside its inputs; 4 heads of 1024 tokens."""
    with FakeCuda(ARCHES[arch]) as cuda:
        q, k, v = (made(1, 4, 1024, width, dtype=dtype) for _ in range(3))
        before = cuda.memory.current
        F.scaled_dot_product_attention(q, k, v)
    return cuda, cuda.memory.peak - before


@pytest.mark.parametrize(
    ("arch", "dtype", "kernel"),
    [
        ("sm86", BF16, "flash"),
        ("sm89", torch.float16, "flash"),
        ("sm120", BF16, "flash"),
        ("sm90", BF16, "cudnn"),
        ("sm86", torch.float32, "efficient"),
        ("sm75", torch.float16, "efficient"),
        ("sm75", BF16, "math"),
    ],
)
def test_attention_takes_the_kernel_of_the_card(arch: str, dtype: torch.dtype, kernel: str) -> None:
    cuda, nbytes = attend(arch, dtype)
    result, scores = 4 * 1024 * 128 * dtype.itemsize, 4 * 1024 * 1024 * 4

    assert dict(cuda.routing.kernels) == {kernel: 1}
    assert ARCHES[arch].has_fused_attention(dtype, 128) == (kernel != "math")
    assert (nbytes >= scores) == (kernel == "math")
    if kernel == "flash":
        # One fp32 number per query and head, and a few words for a random generator that is not used.
        assert result + 4 * 4 * 1024 <= nbytes <= result + 4 * 4 * 1024 + 1024


def test_a_head_wider_than_flash_takes_goes_elsewhere() -> None:
    assert set(attend("sm86", BF16, 264)[0].routing.kernels) == {"efficient"}


def test_what_makes_the_host_wait_is_listed_by_line(cuda: FakeCuda) -> None:
    x = made(4, 4)

    assert x.isfinite().all()
    x.to("cpu")
    torch.ones(4).to(FakeCuda.device, non_blocking=True)
    torch.ones(4).isfinite().all()

    assert [line.split(" at ")[0] for line in cuda.memory.host_syncs] == ["__bool__", "copy to cpu"]


def test_a_strided_tensor_is_staged_on_its_way_to_the_host(cuda: FakeCuda) -> None:
    x, out = made(64, 64), torch.empty(64, 32)
    before = cuda.memory.current

    out.copy_(x[:, :32])

    assert cuda.memory.peak - before == out.nbytes


def test_the_limit_raises_what_torch_raises() -> None:
    with FakeCuda(limit_bytes=31 << 20) as cuda:
        x = made(4 << 20)
        with pytest.raises(torch.OutOfMemoryError):
            x + 1

        assert cuda.memory.current == x.nbytes
        x.add_(1)
