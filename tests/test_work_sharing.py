"""Threads that take pieces of work as they come free, and layers that are multiplied so."""

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from l2p_lowvram import linear as linear_module
from l2p_lowvram import work_sharing
from l2p_lowvram.linear import Linear, Rotation, converted_bytes
from l2p_lowvram.work_sharing import share, worker_count

SECONDS = 60
needs_libraries = pytest.mark.skipif(work_sharing._libraries() is None, reason="no OpenMP and MKL to be told apart by")


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.mark.skipif(not (sys.platform == "linux" and torch.backends.mkl.is_available()), reason="for torch with MKL")
def test_the_libraries_are_found() -> None:
    assert work_sharing._libraries() is not None


@needs_libraries
def test_as_many_threads_share_as_torch_has() -> None:
    assert worker_count() == 2

    torch.set_num_threads(work_sharing.MOST_WORKERS + 1)

    assert worker_count() == 1


@needs_libraries
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_each_piece_is_worked_on_once(workers: int) -> None:
    done = []

    share(range(40), lambda worker, piece: done.append((worker, piece)), workers)

    assert sorted(piece for _, piece in done) == list(range(40))
    assert {worker for worker, _ in done} <= set(range(workers))


@needs_libraries
def test_a_thread_that_is_held_up_holds_up_nobody() -> None:
    """The first piece ends when all others have: they must be taken by the other thread."""
    rest_done, done = threading.Event(), []

    def work(worker: int, piece: int) -> None:
        if piece == 0:
            assert rest_done.wait(SECONDS)
        done.append((worker, piece))
        if len(done) == 9:
            rest_done.set()

    share(range(10), work, 2)

    assert done[-1][1] == 0
    assert {worker for worker, piece in done if piece} == {1 - done[-1][0]}


@needs_libraries
def test_threads_compute_alone_and_the_caller_as_before_afterwards() -> None:
    libraries = work_sharing._libraries()
    assert libraries is not None
    alone, together = [], threading.Barrier(2)

    def work(worker: int, piece: int) -> None:
        together.wait(SECONDS)  # a piece for each
        alone.append((torch.get_num_threads(), libraries._mkl(), torch.is_grad_enabled()))

    share(range(2), work, 2)

    assert alone == [(1, 1, False)] * 2
    assert (torch.get_num_threads(), libraries._mkl()) == (2, 2)


@needs_libraries
@pytest.mark.parametrize("is_inference", [True, False])
def test_threads_are_in_the_callers_inference_mode(is_inference: bool) -> None:
    made: list[torch.Tensor] = []
    together = threading.Barrier(2)

    def work(worker: int, piece: int) -> None:
        together.wait(SECONDS)
        made.append(torch.ones(1))

    with torch.inference_mode(is_inference):
        share(range(2), work, 2)

    assert [tensor.is_inference() for tensor in made] == [is_inference] * 2


@needs_libraries
@pytest.mark.parametrize("failing", ["the caller", "another thread"])
@pytest.mark.parametrize("kind", [ValueError, IndexError, KeyboardInterrupt])
def test_an_error_is_raised_when_all_have_ended_and_nothing_more_is_begun(
    failing: str, kind: type[BaseException]
) -> None:
    begun, failed, together = [], threading.Event(), threading.Barrier(2)

    def work(worker: int, piece: int) -> None:
        begun.append(piece)
        together.wait(SECONDS)
        if (worker == 0) == (failing == "the caller"):
            failed.set()
            raise kind("no more")
        assert failed.wait(SECONDS)
        # Longer than the other takes from there to saying that nothing is to be begun.
        threading.Event().wait(0.2)

    with pytest.raises(kind, match="no more"):
        share(range(10), work, 2)

    assert sorted(begun) == [0, 1]
    assert torch.get_num_threads() == 2


@needs_libraries
def test_an_interrupted_caller_waits_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while it waits: the weights that they read are about to be given back."""
    ended, join, interrupted = [], threading.Thread.join, []

    def join_interrupted(thread: threading.Thread, timeout: float | None = None) -> None:
        if not interrupted:
            interrupted.append(thread)
            raise KeyboardInterrupt
        join(thread, timeout)

    together = threading.Barrier(2)

    def work(worker: int, piece: int) -> None:
        together.wait(SECONDS)
        if worker == 1:
            threading.Event().wait(0.2)
            ended.append(piece)

    monkeypatch.setattr(threading.Thread, "join", join_interrupted)
    with pytest.raises(KeyboardInterrupt):
        share(range(2), work, 2)

    assert interrupted
    assert len(ended) == 1


@needs_libraries
def test_what_failed_is_not_kept_alive() -> None:
    class Held:
        pass

    held = Held()
    alive, together = weakref.ref(held), threading.Barrier(2)

    def work(worker: int, piece: int, held: Held = held) -> None:
        together.wait(SECONDS)
        raise MemoryError("too little")

    del held
    gc.disable()
    try:
        with pytest.raises(MemoryError):
            share(range(2), work, 2)
        del work
        assert alive() is None
    finally:
        gc.enable()


@needs_libraries
def test_an_interrupt_goes_before_an_error() -> None:
    together, failed = threading.Barrier(2), threading.Event()

    def work(worker: int, piece: int) -> None:
        together.wait(SECONDS)
        if worker == 1:
            failed.set()
            raise ValueError("first")
        assert failed.wait(SECONDS)
        threading.Event().wait(0.1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        share(range(2), work, 2)


@needs_libraries
def test_where_no_thread_can_be_started_the_caller_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    done: list[tuple[int, int]] = []

    share(range(5), lambda worker, piece: done.append((worker, piece)), 3)

    assert done == [(0, piece) for piece in range(5)]


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_without_the_libraries_the_caller_does_the_work(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise error("not here")

    work_sharing._libraries.cache_clear()
    monkeypatch.setattr(work_sharing, "_Libraries", missing)
    done: list[int] = []
    try:
        assert worker_count() == 1
        share(range(3), lambda worker, piece: done.append(worker), 2)
    finally:
        work_sharing._libraries.cache_clear()

    assert done == [0, 0, 0]


# Layers

OUTPUTS, COLUMNS, TOKENS = 1000, 1024, 320
STORED = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp8, per tensor": (torch.float8_e4m3fn, ()),
    "int8, per tensor": (torch.int8, ()),
    "int8, by row": (torch.int8, (OUTPUTS, 1)),
    "int8, by block": (torch.int8, (OUTPUTS // 8, COLUMNS // 8)),
}


def wide_layer(stored: str, rotation: Rotation | None = None, bias: bool = False) -> Linear:
    generator = torch.Generator().manual_seed(0)
    dtype, scale = STORED[stored]
    layer = Linear(COLUMNS, OUTPUTS, bias=bias)
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias, std=200, generator=generator)
    weight = (torch.randn(OUTPUTS, COLUMNS, generator=generator) * 20).to(dtype)
    if scale is None:
        layer.weight = torch.nn.Parameter(weight)
    else:
        layer.quantize_(weight, torch.rand(scale, generator=generator) + 0.5, rotation)
    return layer.requires_grad_(False)


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, COLUMNS, generator=torch.Generator().manual_seed(1))


def without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which multiplies INT8 weights where they lie on CPUs with AVX-512."""
    monkeypatch.setattr(linear_module, "multiplies", lambda *_: False)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pieces each `share` of a layer has had, of small pieces."""
    counts: list[int] = []

    def counted(pieces: list[object], work: Callable[[int, object], None], workers: int) -> None:
        if workers > 1:
            counts.append(len(pieces))
        share(pieces, work, workers)

    monkeypatch.setattr(linear_module, "share", counted)
    without_onednn(monkeypatch)
    monkeypatch.setattr(linear_module, "_PIECE_BYTES", 256 << 10)  # 64 rows
    monkeypatch.setattr(linear_module, "CPU_SLICE_BYTES", 512 << 10)
    return counts


@needs_libraries
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_a_shared_layer_is_the_product(stored: str, bias: bool, shared: list[int]) -> None:
    layer, x = wide_layer(stored, bias=bias), inputs(2, TOKENS // 2)
    expected = F.linear(x.double(), layer.dequantized().double(), None if layer.bias is None else layer.bias.double())

    y = layer(x)

    assert shared == ([] if "block" in stored else [16])
    assert y.is_contiguous()
    assert (y - expected).abs().max() < 2e-6 * expected.abs().max()


@needs_libraries
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parts_of_a_layer_are_the_product(stored: str, dtype: torch.dtype, shared: list[int]) -> None:
    """Several times, since threads that get into each other's way may do so or not."""
    layer, x = wide_layer(stored), inputs(TOKENS).to(dtype)
    parts = [slice(0, 480), slice(-500, None)]
    expected = x.double() @ layer.dequantized().double().T

    for _ in range(5):
        shared.clear()
        made = [to_part(x) for to_part in layer.rows(parts, dtype, TOKENS)]

        converted = [] if stored == "fp32" or "block" in stored else [8]
        assert shared == ([*converted, 8, 8] if dtype == torch.float32 else [])
        for y, part in zip(made, parts, strict=True):
            # Products, and weights where they are scaled, are rounded to the dtype.
            most = (2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps) * expected.abs().max()
            assert (y - expected[:, part]).abs().max() < most


@needs_libraries
@pytest.mark.parametrize("stored", STORED)
def test_bits_do_not_depend_on_who_computes_a_piece(
    stored: str, shared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = wide_layer(stored), inputs(TOKENS)
    expected = layer(x)

    def by_turns(pieces: list[object], work: Callable[[int, object], None], workers: int) -> None:
        libraries = work_sharing._libraries()
        assert libraries is not None
        with libraries.alone():
            for turn, piece in enumerate(reversed(pieces)):
                work(turn % workers, piece)

    monkeypatch.setattr(linear_module, "share", by_turns)

    assert torch.equal(layer(x), expected)


@needs_libraries
def test_what_is_small_narrow_rotated_in_half_precision_or_wants_gradients_is_left_to_torch(shared: list[int]) -> None:
    wide_layer("int8, by row")(inputs(1))
    wide_layer("int8, by row", Rotation(256))(inputs(TOKENS))
    wide_layer("bf16")(inputs(TOKENS).bfloat16())
    wide_layer("fp32")(inputs(TOKENS).requires_grad_())
    wide_layer("bf16")(inputs(TOKENS).requires_grad_())
    with torch.autocast("cpu"):
        wide_layer("int8, by row")(inputs(TOKENS))
    narrow = Linear(256, 4096, bias=False).requires_grad_(False)
    narrow(torch.randn(TOKENS, 256))

    biased = wide_layer("int8, by row", bias=True)
    assert biased.bias is not None
    biased.bias.requires_grad_()
    assert biased(inputs(TOKENS)).requires_grad

    assert shared == []

    torch.set_num_threads(5)  # and what is too little for each of them
    wide_layer("int8, by row")(inputs(TOKENS))

    assert shared == []


@needs_libraries
@pytest.mark.parametrize("threads", [2, 5, work_sharing.MOST_WORKERS, work_sharing.MOST_WORKERS + 1])
def test_what_threads_convert_into_is_planned(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    without_onednn(monkeypatch)
    torch.set_num_threads(threads)
    most = 0
    for columns, outputs, tokens in ((1024, 40_000, 160), (10_240, 4_000, 300), (10_240, 4_000, 100)):
        layer = Linear(columns, outputs, bias=False)
        layer.quantize_(torch.zeros(outputs, columns, dtype=torch.int8), torch.ones(outputs))

        with torch.inference_mode():
            layer(torch.zeros(tokens, columns))

        most = max(most, sum(buffer.nbytes for buffer in layer.scratch._buffers.values()))
    planned = converted_bytes(torch.device("cpu"), 4) - 2 * linear_module.CPU_SLICE_BYTES
    assert 0.8 * planned < most <= planned
