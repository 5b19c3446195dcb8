"""Blocks laid out in slots: filling a slot from the file equals reading every tensor the plain way."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from offload import Block, Checkpoint, SlotLayout, TensorInfo
from offload.blocks import ALIGNMENT, Part, TensorSource, lay_out


def fill(layout: SlotLayout, chunk_bytes: int | None = None) -> Tensor:
    """A slot filled by plain file reads; garbage wherever nothing is read."""
    slot = torch.randint(0, 256, (layout.nbytes,), dtype=torch.uint8)
    for chunk in layout.chunks(chunk_bytes or layout.nbytes):
        for extent in chunk.extents:
            with extent.path.open("rb") as file:
                file.seek(extent.offset)
                read = torch.frombuffer(bytearray(file.read(extent.nbytes)), dtype=torch.uint8)
            begin = chunk.offset + extent.target
            assert extent.target + extent.nbytes <= chunk.nbytes
            slot[begin : begin + extent.nbytes] = read
    for place, raw in layout.cast_views(slot):
        place.copy_(raw)
    return slot


def expected(checkpoint: Checkpoint, source: TensorSource) -> Tensor:
    """The tensor made without a slot: cast, repeat, stack."""
    parts = []
    for part in source.parts:
        stored = checkpoint.tensor(part.tensor.name).to(source.dtype)
        parts.append(stored.reshape(part.shape) if stored.numel() != 1 else stored.reshape(()).expand(part.shape))
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(source.shape)


def as_bytes(tensor: Tensor) -> Tensor:
    """A copy: an expanded tensor of one element counts as contiguous and still has a stride of 0."""
    return torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.flatten()).view(torch.uint8)


def same_bits(one: Tensor, two: Tensor) -> bool:
    return (one.dtype, one.shape) == (two.dtype, two.shape) and torch.equal(as_bytes(one), as_bytes(two))


def checkpoint_of(tmp_path: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    return Checkpoint.open(path)


@pytest.fixture
def attention(tmp_path: Path) -> tuple[Checkpoint, tuple[TensorSource, ...]]:
    """A split qkv in INT8 with scales of two dtypes and granularities, a norm in BF16, a bias of odd size."""
    rows, columns = 5, 24
    tensors = {name: torch.randint(-128, 128, (rows, columns), dtype=torch.int8) for name in ("q", "k", "v")}
    tensors |= {"q.scale": torch.rand(rows, 1).bfloat16(), "k.scale": torch.rand(1), "v.scale": torch.rand(())}
    tensors |= {"norm": torch.rand(columns).bfloat16(), "bias": torch.rand(7)}
    checkpoint = checkpoint_of(tmp_path, tensors)
    info = checkpoint.tensors
    qkv = tuple(Part(info[name], (rows, columns)) for name in ("q", "k", "v"))
    scales = tuple(Part(info[f"{name}.scale"], (rows, 1)) for name in ("q", "k", "v"))
    sources = (
        TensorSource("qkv.weight", (3 * rows, columns), torch.int8, qkv),
        TensorSource("qkv.weight_scale", (3 * rows, 1), torch.float32, scales),
        TensorSource.plain(info["norm"]),
        TensorSource.plain(info["bias"], "out.bias"),
    )
    return checkpoint, sources


@pytest.mark.parametrize("chunk_bytes", [None, 1, 100, 256, 1000])
def test_a_filled_slot_holds_every_tensor_bit_for_bit(
    attention: tuple[Checkpoint, tuple[TensorSource, ...]], chunk_bytes: int | None
) -> None:
    checkpoint, sources = attention
    layout = lay_out(sources)

    views = layout.views(fill(layout, chunk_bytes))

    assert views.keys() == {source.name for source in sources}
    for source in sources:
        assert same_bits(views[source.name], expected(checkpoint, source)), source.name


def test_tensors_begin_on_the_alignment_and_never_overlap(
    attention: tuple[Checkpoint, tuple[TensorSource, ...]],
) -> None:
    layout = lay_out(attention[1])

    ranges = sorted((tensor.offset, tensor.offset + tensor.nbytes) for tensor in layout.tensors.values())
    ranges += sorted((raw.offset, raw.offset + raw.nbytes) for raw, _ in layout.casts)
    assert all(begin % ALIGNMENT == 0 for begin, _ in ranges)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(ranges))
    assert ranges[-1][1] <= layout.nbytes
    assert layout.nbytes % ALIGNMENT == 0


def test_split_parts_lie_fused_in_their_own_order_whatever_the_files(
    attention: tuple[Checkpoint, tuple[TensorSource, ...]],
) -> None:
    checkpoint, sources = attention
    layout = lay_out(sources)
    slot = fill(layout)

    qkv = layout.tensors["qkv.weight"]
    stored = torch.cat([checkpoint.tensor(name) for name in ("q", "k", "v")])

    assert torch.equal(slot[qkv.offset : qkv.offset + qkv.nbytes].view(torch.int8), stored.flatten())


def test_neighbours_in_file_and_slot_are_read_at_once(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, {f"w.{i}": torch.rand(2, 64) for i in range(4)} | {"x.bias": torch.rand(3)})

    layout = Block.under(checkpoint, "w.").layout

    assert [(extent.nbytes, extent.target) for extent in layout.extents] == [(4 * 512, 0)]
    assert layout.read_bytes == layout.nbytes


def test_a_hole_for_alignment_splits_a_read(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, {"w.a": torch.rand(3), "w.b": torch.rand(3)})

    layout = Block.under(checkpoint, "w.").layout

    assert [extent.target for extent in layout.extents] == [0, ALIGNMENT]
    assert sorted(layout.tensors) == ["a", "b"]


def test_extents_are_in_file_order(attention: tuple[Checkpoint, tuple[TensorSource, ...]]) -> None:
    extents = lay_out(attention[1]).extents

    assert list(extents) == sorted(extents, key=lambda extent: (extent.path, extent.offset))


def test_layouts_work_on_the_meta_device(attention: tuple[Checkpoint, tuple[TensorSource, ...]]) -> None:
    layout = lay_out(attention[1])

    views = layout.views(torch.empty(layout.nbytes, dtype=torch.uint8, device="meta"))

    assert views["qkv.weight"].shape == (15, 24)
    assert views["qkv.weight"].storage_offset() == layout.tensors["qkv.weight"].offset


def test_an_empty_tensor_takes_no_read(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, {"w.a": torch.rand(0, 4), "w.b": torch.rand(2)})
    layout = Block.under(checkpoint, "w.").layout

    views = layout.views(fill(layout))

    assert views["a"].shape == (0, 4)
    assert torch.equal(views["b"], checkpoint.tensor("w.b"))
    assert layout.read_bytes == 8


def test_parts_that_do_not_make_up_the_shape_are_refused(tmp_path: Path) -> None:
    info = TensorInfo("w", "F32", (2, 3), tmp_path, 8, 24)

    with pytest.raises(ValueError, match="'w' has 6 elements"):
        TensorSource("w", (2, 4), torch.float32, (Part(info, (2, 4)),))
    with pytest.raises(ValueError, match="its parts have 6 elements"):
        TensorSource("w", (2, 4), torch.float32, (Part(info, (2, 3)),))
    with pytest.raises(ValueError, match="two tensors named 'w'"):
        lay_out([TensorSource.plain(info), TensorSource.plain(info)])


def test_an_unknown_prefix_is_named(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, {"w": torch.rand(2)})

    with pytest.raises(KeyError, match=r"layers\.7\."):
        Block.under(checkpoint, "layers.7.")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.int8, torch.bfloat16, torch.float16, torch.float32]),
            st.sampled_from([None, torch.float32, torch.float64]),
            st.integers(0, 9),
            st.integers(1, 40),
            st.integers(1, 3),
            st.booleans(),
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 2000),
    st.randoms(use_true_random=False),
)
def test_any_mix_of_moved_cast_fused_and_repeated_tensors_comes_out_right(
    tmp_path: Path, wanted: list, chunk_bytes: int, random: object
) -> None:
    tensors: dict[str, Tensor] = {}
    for index, (dtype, _, rows, columns, parts, scalar) in enumerate(wanted):
        for part in range(parts):
            shape = () if scalar else (rows, columns)
            tensors[f"{random.random()}.{index}.{part}"] = (torch.randn(shape) * 50).to(dtype)  # type: ignore[attr-defined]
    checkpoint = checkpoint_of(tmp_path, tensors)
    sources = []
    for index, (dtype, cast, rows, columns, parts, _) in enumerate(wanted):
        names = [name for part in range(parts) for name in tensors if name.endswith(f".{index}.{part}")]
        stacked = tuple(Part(checkpoint.tensors[name], (rows, columns)) for name in names)
        sources.append(TensorSource(f"t{index}", (rows * parts, columns), cast or dtype, stacked))

    layout = lay_out(sources)
    views = layout.views(fill(layout, chunk_bytes))

    for source in sources:
        assert same_bits(views[source.name], expected(checkpoint, source))
