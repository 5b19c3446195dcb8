"""Blocks visited where they are mapped: the bits of a plain read, nothing copied that need not be."""

from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from offload import Block, Checkpoint
from offload.blocks import Part, TensorSource
from offload.mapped import MappedBlocks, read_source


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    made: dict[str, Tensor] = {}
    for index in range(3):
        made[f"{index}.a.bytes"] = torch.randint(-128, 128, (9, 7), dtype=torch.int8)
        made[f"{index}.b.float"] = torch.randn(5, 3)  # 63 odd bytes come before it
        for part in "qkv":
            made[f"{index}.{part}"] = torch.randint(-128, 128, (4, 6), dtype=torch.int8)
    return made


@pytest.fixture
def checkpoint(tmp_path: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    save_file(tensors, tmp_path / "model.safetensors")
    return Checkpoint.open(tmp_path / "model.safetensors")


def blocks_of(checkpoint: Checkpoint) -> list[Block]:
    blocks = []
    for index in range(3):
        infos = {name: checkpoint.tensors[f"{index}.{name}"] for name in ("a.bytes", "b.float", "q", "k", "v")}
        fused = TensorSource("qkv", (12, 6), torch.int8, tuple(Part(infos[part], (4, 6)) for part in "qkv"))
        plain = [TensorSource.plain(infos[name], name) for name in ("a.bytes", "b.float")]
        blocks.append(Block(str(index), (*plain, fused)))
    return blocks


def test_a_visit_lends_the_files_values_and_views_where_it_can(
    checkpoint: Checkpoint, tensors: dict[str, Tensor]
) -> None:
    with MappedBlocks(checkpoint, blocks_of(checkpoint)) as mapped:
        for index in (0, 1, 2, 0):
            with mapped.visit(str(index)) as weights:
                assert torch.equal(weights["a.bytes"], tensors[f"{index}.a.bytes"])
                assert torch.equal(weights["b.float"], tensors[f"{index}.b.float"])
                assert torch.equal(weights["qkv"], torch.cat([tensors[f"{index}.{part}"] for part in "qkv"]))
                assert weights["a.bytes"].data_ptr() == checkpoint.tensor(f"{index}.a.bytes").data_ptr()
                assert weights["b.float"].data_ptr() % 256 == 0

    assert mapped.visits == 4
    assert [span.what for span in mapped.timeline.lane("compute")] == ["0", "1", "2", "0"]


def test_closing_lets_go_of_every_descriptor(checkpoint: Checkpoint) -> None:
    before = psutil.Process().num_fds()
    mapped = MappedBlocks(checkpoint, blocks_of(checkpoint))
    mapped.close()
    mapped.close()

    assert psutil.Process().num_fds() == before


def test_a_removed_file_is_reported_and_no_descriptor_stays(checkpoint: Checkpoint) -> None:
    blocks, before = blocks_of(checkpoint), psutil.Process().num_fds()
    checkpoint.files[0].unlink()

    with pytest.raises(FileNotFoundError):
        MappedBlocks(checkpoint, blocks)

    assert psutil.Process().num_fds() == before


def test_a_scalar_stored_once_is_repeated(tmp_path: Path) -> None:
    save_file({"scale": torch.tensor(0.5, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path / "model.safetensors") as checkpoint:
        info = checkpoint.tensors["scale"]
        source = TensorSource("scale", (3, 1), torch.float32, (Part(info, (3, 1)),))

        assert torch.equal(read_source(checkpoint, source), torch.full((3, 1), 0.5))
