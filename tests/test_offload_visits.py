"""Ring and mapped blocks, closed by another thread at any moment, and in a forked child."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import save_file

from offload import (
    Block,
    BlockCost,
    Budget,
    Checkpoint,
    CpuDevice,
    PagedBlocks,
    Rates,
    Reader,
    Ring,
    plan_residency,
)
from offload.reading import ReadJob

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


class LateReader(Reader):
    """Each read begins up to 4 ms late."""

    delays = Random(0)

    def submit(self, *arguments: object, **named: object) -> ReadJob:
        time.sleep(self.delays.random() * 4e-3)
        return super().submit(*arguments, **named)  # type: ignore[arg-type]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Checkpoint]:
    save_file({f"{index}.w": torch.randn(64, 256) for index in range(7)}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path / "model.safetensors") as opened:
        yield opened


def cut(checkpoint: Checkpoint) -> list[Block]:
    return [Block.under(checkpoint, f"{index}.") for index in range(7)]


def opened(kind: str, checkpoint: Checkpoint, blocks: list[Block], reader: Reader, held: int) -> Ring | PagedBlocks:
    """held: blocks that there is memory for."""
    costs = [BlockCost(block.name, block.nbytes, 1e-3) for block in blocks]
    plan = plan_residency(costs, Rates(1e9), Budget(held * blocks[0].nbytes))
    return Ring(blocks, plan, CpuDevice(), reader) if kind == "ring" else PagedBlocks(checkpoint, blocks, plan)


@pytest.mark.parametrize("kind", ["ring", "mapped"])
def test_closing_from_another_thread_ends_every_wait_and_leaves_no_courier(checkpoint: Checkpoint, kind: str) -> None:
    blocks = cut(checkpoint)
    for seed in range(40):
        chance, unexpected = Random(seed), []
        with LateReader(checkpoint) as reader:
            source = opened(kind, checkpoint, blocks, reader, held=chance.choice([3, 4, 6]))

            def visit(source: Ring | PagedBlocks = source, chance: Random = chance, to: list = unexpected) -> None:
                try:
                    while True:
                        with source.visit(chance.choice(blocks).name) as weights:
                            assert weights["w"].shape == (64, 256)
                except ValueError as error:
                    if "closed" not in str(error):
                        to.append(error)
                except BaseException as error:
                    to.append(error)

            visitor = threading.Thread(target=visit)
            visitor.start()
            time.sleep(chance.random() * 0.02)
            source.close()
            visitor.join(30)

        assert not visitor.is_alive()
        assert unexpected == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("kind", ["ring", "mapped"])
def test_a_forked_child_is_told_and_does_not_wait_for_threads_it_has_not(checkpoint: Checkpoint, kind: str) -> None:
    blocks = cut(checkpoint)
    with Reader(checkpoint) as reader:
        source = opened(kind, checkpoint, blocks, reader, held=3)
        with source.visit(blocks[0].name):
            pass
        child = os.fork()
        if child == 0:
            told = 0
            for use in (
                lambda: source.visit(blocks[1].name).__enter__(),
                lambda: reader.submit("x", [], torch.empty(0)),
            ):
                try:
                    use()
                except RuntimeError as error:
                    told += "before a fork" in str(error)
            source.close()
            reader.close()
            os._exit(told)
        deadline = time.monotonic() + 60
        while (found := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        if found[0] == 0:
            os.kill(child, 9)
            os.waitpid(child, 0)
        source.close()

    assert os.waitstatus_to_exitcode(found[1]) == 2
