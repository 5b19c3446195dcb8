"""Checking scales, which lie scattered over a file, leaves no page that would be in the way of large ones."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from l2p_lowvram.weights import check_scales
from offload import Block, Checkpoint
from offload.page_cache import cached_pages
from offload.paging import PageTable
from tests.file_systems import require_page_cache

MIB = 1 << 20


def count(descriptor: int, offset: int, nbytes: int) -> int:
    try:
        return cached_pages(descriptor, offset, nbytes)
    except OSError as error:
        pytest.skip(f"this system does not tell what is cached: {error.strerror}")


def test_no_scale_stays_in_the_page_cache(tmp_path: Path) -> None:
    require_page_cache(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {f"{index}.weight": torch.ones(1024, 1024) for index in range(4)}
    save_file(tensors | {f"{index}.weight_scale": torch.ones(1024) for index in range(4)}, path)
    with path.open("rb") as file, Checkpoint.open(path) as checkpoint:
        os.fsync(file.fileno())
        # Only the header was read. What is mapped already stays, so far from it alone is looked at.
        scale = checkpoint.tensors["2.weight_scale"]
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert count(file.fileno(), scale.offset, scale.nbytes) == 0
        os.pread(file.fileno(), 1, scale.offset)
        assert count(file.fileno(), scale.offset, scale.nbytes) > 0, "reading it leaves it there"

        check_scales(checkpoint, Block.under(checkpoint, "").sources)

        assert count(file.fileno(), scale.offset, scale.nbytes) == 0


def test_a_file_that_is_cached_stays_so(tmp_path: Path) -> None:
    require_page_cache(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({"0.weight": torch.ones(2048, 1024), "0.weight_scale": torch.ones(2048)}, path)
    with path.open("rb") as file, Checkpoint.open(path) as checkpoint:
        os.fsync(file.fileno())
        file.read()
        before = count(file.fileno(), 0, path.stat().st_size)

        check_scales(checkpoint, Block.under(checkpoint, "").sources)

        assert count(file.fileno(), 0, path.stat().st_size) == before


def test_files_are_opened_again_one_at_a_time_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may have few descriptors left beside those of a checkpoint of many files."""
    index = {}
    for shard in range(3):
        scales = {f"{shard}.weight_scale": torch.ones(8)} if shard < 2 else {}
        tensors = {f"{shard}.weight": torch.ones(8, 8)} | scales
        save_file(tensors, tmp_path / f"{shard}.safetensors")
        index |= dict.fromkeys(tensors, f"{shard}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    taken, given_back = PageTable.__init__, PageTable.close
    asked: list[Path] = []
    open_now: list[PageTable] = []

    def take(table: PageTable, path: Path, *rest: Any) -> None:
        assert not open_now, "another is still open"
        asked.append(path)
        if len(asked) > 1:
            raise OSError(errno.EMFILE, "too many open files")
        taken(table, path, *rest)
        open_now.append(table)

    def give_back(table: PageTable) -> None:
        given_back(table)
        open_now.remove(table)

    monkeypatch.setattr(PageTable, "__init__", take)
    monkeypatch.setattr(PageTable, "close", give_back)
    with Checkpoint.open(tmp_path) as checkpoint:
        check_scales(checkpoint, Block.under(checkpoint, "").sources)

    assert {path.name for path in asked} == {"0.safetensors", "1.safetensors"}
    assert not open_now
