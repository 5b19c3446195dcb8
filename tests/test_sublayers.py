"""Halves of layers, the unit of streaming: together they are the layer to the bit, and every weight is in one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from l2p_lowvram.layout import read_layout
from l2p_lowvram.model import ATTENTION, FEED_FORWARD, Slices, State, sublayer_of
from l2p_lowvram.model_weights import CAPTION_EMBEDDER, IMAGE_EMBEDDER, LOCAL_DECODER, cut_into_blocks, visit_seconds
from l2p_lowvram.synthetic import mini_config
from l2p_lowvram.tilings import PictureWork
from l2p_lowvram.weights import load_transformer
from offload import Checkpoint
from tests import goldens
from tests.test_tiling_model import TINY, random_inputs, random_model


@torch.inference_mode()
@pytest.mark.parametrize("slices", [None, TINY.slices()], ids=["whole", "sliced"])
def test_the_sublayers_of_a_block_do_what_it_does(slices: Slices | None) -> None:
    config = mini_config(16)
    model = random_model(config, torch.float32)
    pixels, t, features = random_inputs(config)
    pixels, t = pixels.float(), t.float()
    caption = model.encode_caption(features, torch.float32)

    def start() -> State:
        return model.prelude(pixels, t, caption, slices)

    blocks = halves = start()
    if slices is not None:
        halves = start()  # in a room of its own
    for block in model.blocks():
        blocks = block.visit(blocks, slices)
        for sublayer in block.sublayers():
            halves = sublayer.visit(halves, slices)
        assert torch.equal(halves.tokens, blocks.tokens)
        assert halves.modulation is None
    assert [sublayer.name for sublayer in model.sublayers()][:2] == [
        "noise_refiner.0.attention",
        f"noise_refiner.0.{FEED_FORWARD}",
    ]


@torch.inference_mode()
def test_the_sublayers_of_the_context_refiner_refine_a_caption() -> None:
    config = mini_config(16)
    model = random_model(config, torch.float32)
    features = random_inputs(config)[2]

    caption = model.embed_caption(features, torch.float32)
    for sublayer in model.refiner_sublayers():
        caption = sublayer.refine(caption)

    assert torch.equal(caption.tokens, model.encode_caption(features, torch.float32).tokens)


def test_every_weight_streams_with_one_block_in_the_order_of_their_visits(tmp_path: Path) -> None:
    with Checkpoint.open(goldens.write_checkpoint("a_mini", tmp_path)) as checkpoint:
        layout = read_layout(checkpoint)
        model = load_transformer(checkpoint, layout)

    blocks, once = cut_into_blocks(layout)

    held = Counter(source.name for block in blocks for source in block.sources)
    assert held == Counter(list(layout.sources))
    refiner, rounds = ([half.name for half in halves] for halves in (model.refiner_sublayers(), model.sublayers()))
    assert [block.name for block in blocks] == [CAPTION_EMBEDDER, *refiner, IMAGE_EMBEDDER, *rounds, LOCAL_DECODER]
    assert once == {CAPTION_EMBEDDER, *refiner}


def test_a_sublayer_has_what_its_modules_are_called(tmp_path: Path) -> None:
    with Checkpoint.open(goldens.write_checkpoint("a_mini", tmp_path)) as checkpoint:
        blocks = {block.name: block for block in cut_into_blocks(read_layout(checkpoint))[0]}

    modules = {
        kind: {source.name.split(".")[2] for source in blocks[f"layers.1.{kind}"].sources}
        for kind in (ATTENTION, FEED_FORWARD)
    }

    assert modules == {
        ATTENTION: {"adaLN_modulation", "attention", "attention_norm1", "attention_norm2"},
        FEED_FORWARD: {"feed_forward", "ffn_norm1", "ffn_norm2"},
    }
    assert sublayer_of("attention_norm2.weight") == ATTENTION


def test_a_layer_takes_as_long_as_its_halves(tmp_path: Path) -> None:
    """Products of all tokens with the weights, and attention's with keys and values."""
    with Checkpoint.open(goldens.write_checkpoint("a_mini", tmp_path)) as checkpoint:
        layout = read_layout(checkpoint)
        blocks = cut_into_blocks(layout)[0]
    work = PictureWork(64, 32, 1, True, 32, torch.float32, on_cpu=True)

    seconds = visit_seconds(layout.config, work, blocks, flops=1.0)

    tokens, dim, hidden = work.tokens(layout.config), layout.config.dim, layout.config.ffn_dim
    assert seconds["layers.0.attention"] == 2 * tokens * (2 * 4 * dim * dim + 4 * tokens * dim)
    assert seconds["layers.0.feed_forward"] == 2 * tokens * 2 * 3 * dim * hidden
    assert seconds["noise_refiner.0.feed_forward"] < seconds["layers.0.feed_forward"]
