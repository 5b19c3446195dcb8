"""Prompt template, token ids and encoder features against Qwen3's own implementations."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from l2p_lowvram import streamed_encoder
from l2p_lowvram.streamed_encoder import StreamedTextEncoder
from l2p_lowvram.streaming import MemoryOptions, Streamer
from l2p_lowvram.text import MAX_TOKENS, render_prompt
from l2p_lowvram.tokenizer_file import read_tokenizer
from offload import CheckpointError
from tests import goldens

PROMPTS = goldens.values("prompts")
SPECIAL = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}


def spelled(text: str) -> str:
    """Byte-level BPE's spelling of a text: a printable character per byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return "".join(characters[byte] for byte in text.encode())


# The part of Qwen's vocabulary that the prompts below need, as byte-level BPE spells it.
# In this order the merges never get in each other's way.
VOCABULARY = {
    "Ċ": 198, "Ġ": 220, "a": 64, "user": 872, "assistant": 77091, "Ġcat": 8251, "agram": 5745, "Ġand": 323, "an": 276,
    "Ġorig": 2713, "ami": 10606, "Ġpig": 23694, "Ġon": 389, "Ġfire": 3940, "Ġin": 304, "Ġthe": 279,
    "Ġmiddle": 6149, "Ġof": 315, "Ġa": 264, "Ġdark": 6319, "Ġroom": 3054, "Ġwith": 448, "Ġpent": 20189,
    "Ġfloor": 6422, "word": 1158, "Ġword": 3409, "Ġleading": 6388, "Ġtrailing": 27748,
    "Ġspaces": 12621, "ĠĠ": 256, "Ġprompt": 9934, "Ġinside": 4766,
    "H": 39, "lo": 385, "ld": 507, "ĊĊ": 271, "Ġw": 289, "Ġline": 1555, "new": 931, "ĉtab": 58149,
    "1": 16, "2": 17, "3": 18, "4": 19, "5": 20,
}  # fmt: skip
# Likewise, as text: in their bytes nobody could read them.
TEXTS = {
    "él": 18503, "ör": 9416, " 🙂": 27484, "一幅": 107814, "为": 17714, "名为": 101599, "“": 2073, "造": 66078,
    "相": 48921, "”的": 97907, "项目": 73345, "设计": 70500, "的": 9370, "创意": 102343, "海报": 108755,
}  # fmt: skip
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json with Qwen's rules and the entries of its vocabulary at hand."""
    vocabulary = {**VOCABULARY, **{spelled(text): number for text, number in TEXTS.items()}, **SPECIAL}
    merges: list[str] = []

    def join(pieces: list[str]) -> str:
        """Merge rules that build the pieces' whole from left to right."""
        whole = pieces[0]
        for piece in pieces[1:]:
            merges.append(f"{whole} {piece}")
            whole += piece
            vocabulary.setdefault(whole, 200_000 + len(vocabulary))
        return whole

    for byte in spelled("".join(map(chr, range(256)))) + "".join(map(spelled, TEXTS)):
        vocabulary.setdefault(byte, 200_000 + len(vocabulary))
    for token in VOCABULARY:
        join(list(token))
    for text in TEXTS:
        join([join(list(spelled(character))) for character in text])
    split = {"type": "Split", "pattern": {"Regex": QWEN_PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": text, **flags} for text, number in SPECIAL.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": list(dict.fromkeys(merges))},
    }
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("case", PROMPTS, ids=lambda case: ascii(case["prompt"])[:24])
def test_rendered_prompt_matches_the_reference(case):
    assert render_prompt(case["prompt"]) == case["rendered"]


@pytest.mark.parametrize("case", PROMPTS, ids=lambda case: ascii(case["prompt"])[:24])
def test_token_ids_match_the_reference(tokenizer_file: Path, case):
    ids = read_tokenizer(tokenizer_file)(case["prompt"])

    assert ids == case["input_ids"]
    assert len(ids) <= MAX_TOKENS


def encoder_folder(folder: Path, weights: dict[str, torch.Tensor], *, shards: int = 1) -> Path:
    """A Hugging Face folder: config.json, shards and their index."""
    config = goldens.values("te_a.config")
    keep = {key: value for key, value in config.items() if key not in ("kind", "set", "digest_all", "rope_theta")}
    keep |= {"model_type": "qwen3", "rope_parameters": {"rope_theta": config["rope_theta"]}}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(keep))
    names = sorted(weights)
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    index = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in names[number::shards]}
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def without_last_layer(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights.items() if not name.startswith(("model.layers.2.", "model.norm"))}


def with_head(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}


def bare_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): value for name, value in weights.items()}


def open_encoder(path: Path, dtype: torch.dtype = torch.float32) -> StreamedTextEncoder:
    return StreamedTextEncoder(path, device=torch.device("cpu"), dtype=dtype)


def check_features(encoder: StreamedTextEncoder, tolerance: float = 3e-5) -> None:
    stored = goldens.tensors("te_a.goldens")
    for index in range(4):
        mask = stored[f"case{index}.attention_mask"].bool()
        ids = stored[f"case{index}.input_ids"][mask][None]
        features = encoder(ids)[0].float()
        expected = stored[f"case{index}.prompt_embeds"]
        if tolerance < 1e-3:
            torch.testing.assert_close(features, expected, atol=tolerance, rtol=0)
        else:
            assert (features - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("change", [dict, without_last_layer, with_head])
def test_encoder_folder_matches_the_reference(tmp_path: Path, shards: int, change):
    folder = encoder_folder(tmp_path / "text_encoder", change(goldens.weights("te_a")), shards=shards)

    check_features(open_encoder(folder))


@pytest.mark.parametrize("change", [dict, with_head, bare_names])
def test_single_file_encoder_matches_the_reference(tmp_path: Path, change):
    save_file(change(goldens.weights("te_a")), tmp_path / "encoder.safetensors")

    check_features(open_encoder(tmp_path / "encoder.safetensors"))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_half_precision_encoder_is_close(tmp_path: Path, dtype: torch.dtype, tolerance: float):
    weights = {name: value.to(dtype) for name, value in goldens.weights("te_a").items()}
    save_file(weights, tmp_path / "encoder.safetensors")

    check_features(open_encoder(tmp_path / "encoder.safetensors"), tolerance)


@pytest.mark.parametrize("key", ["weight_scale", "scale_weight"])
def test_scaled_fp8_encoder_is_close(tmp_path: Path, key: str):
    weights = {}
    for name, value in goldens.weights("te_a").items():
        if value.dim() == 2 and "embed" not in name:
            scale = value.abs().max() / 448
            weights[name] = (value / scale).to(torch.float8_e4m3fn)
            weights[name.removesuffix("weight") + key] = scale.reshape(())
            weights[name.removesuffix("weight") + "input_scale"] = torch.ones(())
        else:
            weights[name] = value
    weights["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(weights, tmp_path / "encoder.safetensors")

    check_features(open_encoder(tmp_path / "encoder.safetensors"), 0.1)


def test_every_weight_but_the_vocabulary_streams_with_one_half_of_a_layer(tmp_path: Path):
    encoder = open_encoder(encoder_folder(tmp_path / "text_encoder", goldens.weights("te_a")))
    blocks, sources = encoder.layout.blocks, encoder.layout.sources

    assert list(blocks) == [sublayer.name for sublayer in encoder._model.sublayers()]
    assert Counter(source.name for held in blocks.values() for source in held) == Counter(
        name for name in sources if name != "embed_tokens.weight"
    )
    assert {source.name.split(".")[2] for source in blocks["layers.1.mlp"]} == {"mlp", "post_attention_layernorm"}


def test_the_ring_of_an_encoder_is_planned_for_one_visit_of_each_block(tmp_path: Path):
    """Visited once in all, blocks are not worth keeping, but their reading is to be hidden."""
    encoder = open_encoder(encoder_folder(tmp_path / "text_encoder", goldens.weights("te_a")))

    costs = encoder.demand([64]).costs()

    assert [cost.name for cost in costs] == list(encoder.layout.blocks)
    assert {(cost.visits, cost.may_stay) for cost in costs} == {(1, False)}
    assert all(cost.seconds > 0 for cost in costs)


def test_prompts_share_one_reading_of_the_encoder_and_nothing_stays(tmp_path: Path):
    save_file(goldens.weights("te_a"), tmp_path / "encoder.safetensors")
    streamer = Streamer(torch.device("cpu"), MemoryOptions(poison=True))
    encoder = StreamedTextEncoder(
        tmp_path / "encoder.safetensors", device=torch.device("cpu"), dtype=torch.float32, streamer=streamer
    )
    prompts = [torch.tensor([[1, 2, 3]]), torch.tensor([[4]])]

    together = encoder.encode(prompts)
    alone = [encoder(ids) for ids in prompts]

    rows = 4 * encoder.config.hidden_size * 4  # four tokens of fp32
    assert streamer.streams[0].read_bytes == sum(encoder.layout.block_bytes.values()) + rows
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))
    assert [stream.closed for stream in streamer.streams] == [True] * 3
    assert [thread.name for thread in threading.enumerate() if "offload" in thread.name] == []


def test_an_encoder_that_was_replaced_meanwhile_is_refused(tmp_path: Path):
    """Its tensors lie elsewhere: read by the old places they would be noise, and noise that a cache would keep."""
    weights, path = goldens.weights("te_a"), tmp_path / "encoder.safetensors"
    save_file(weights, path)
    encoder = open_encoder(path)
    encoder(torch.tensor([[1, 2, 3]]))
    save_file({name: weights[name].double().float() for name in reversed(weights)}, tmp_path / "new.safetensors")
    (tmp_path / "new.safetensors").replace(path)

    with pytest.raises(CheckpointError, match=r"replaced or modified since it was opened; load the model again"):
        encoder(torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}),
        ("rope_parameters", [1e6]),
    ],
)
def test_scaled_rope_is_refused_in_either_spelling(tmp_path: Path, name: str, said: object):
    folder = encoder_folder(tmp_path / "text_encoder", goldens.weights("te_a"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: said}))

    with pytest.raises(ValueError, match=rf"{name} is .*; only plain RoPE is supported"):
        open_encoder(folder)


def test_plain_rope_may_be_named(tmp_path: Path):
    folder = encoder_folder(tmp_path / "text_encoder", goldens.weights("te_a"))
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_type"] = "default"
    (folder / "config.json").write_text(json.dumps({**config, "rope_scaling": {"rope_type": "default"}}))

    check_features(open_encoder(folder))


def test_encoders_of_the_same_size_and_time_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Prompts of one are not the other's; unpacking gives files the times of the archive."""
    monkeypatch.setattr(streamed_encoder, "_HEADER_BYTES", 64)  # what differs lies further on
    weights = goldens.weights("te_a")
    identities = []
    for change in (0.0, 0.0, 1.0):
        path = tmp_path / "encoder.safetensors"
        weights["model.layers.1.mlp.down_proj.weight"] = weights["model.layers.1.mlp.down_proj.weight"] + change
        save_file(weights, path)
        os.utime(path, ns=(1, 1))
        identities.append(open_encoder(path).identity())

    assert identities[0] == identities[1] != identities[2]


def test_encoder_folder_of_another_model_is_refused(tmp_path: Path):
    folder = encoder_folder(tmp_path / "text_encoder", goldens.weights("te_a"))
    config = json.loads((folder / "config.json").read_text())

    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(ValueError, match="only qwen3"):
        open_encoder(folder)
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 65}))
    with pytest.raises(ValueError, match=r"hidden_size is 65 but the tensors say 64"):
        open_encoder(folder)
    shutil.rmtree(folder)


def test_incomplete_encoder_is_refused_by_name(tmp_path: Path):
    weights = dict(goldens.weights("te_a"))
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "encoder.safetensors")

    with pytest.raises(ValueError, match=r"lacks 1 of \d+ tensors, first is layers\.1\.mlp\.up_proj\.weight"):
        open_encoder(tmp_path / "encoder.safetensors")


def test_token_outside_the_vocabulary_is_refused(tmp_path: Path):
    save_file(goldens.weights("te_a"), tmp_path / "encoder.safetensors")

    with pytest.raises(ValueError, match="token id 512 is outside the encoder's vocabulary of 512"):
        open_encoder(tmp_path / "encoder.safetensors")(torch.tensor([[512]]))


def sparse_file(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A safetensors file of int8 zeros that takes no room on the disk."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape)
        header[name] = {"dtype": "I8", "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return path


def first_layer(*, hidden: int = 2, head: int = 2, heads: int = 1, shared: int = 1) -> dict[str, tuple[int, ...]]:
    """Shapes of what an encoder's dimensions are read from."""
    return {
        "embed_tokens.weight": (4, hidden),
        "layers.0.self_attn.q_norm.weight": (head,),
        "layers.0.self_attn.q_proj.weight": (heads * head, hidden),
        "layers.0.self_attn.k_proj.weight": (shared * head, hidden),
        "layers.0.mlp.gate_proj.weight": (2, hidden),
        "layers.1.mlp.gate_proj.weight": (2, hidden),
    }


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        (first_layer(heads=3, shared=2), "num_attention_heads 3 is no multiple of num_key_value_heads 2"),
        (first_layer(head=3), "head_dim must be even"),
        (first_layer(hidden=1 << 21), r"tensor embed_tokens\.weight has shape \[4, 2097152\]"),
        (
            first_layer() | {"layers.0.mlp.gate_proj.weight": ((1 << 20) + 1, 2)},
            r"gate_proj\.weight has shape \[1048577",
        ),
        (first_layer() | {f"layers.{i}.x": (1,) for i in range(9999)}, "has 9999 layers, the limit is 200"),
    ],
    ids=["heads", "odd", "wide", "wide MLP", "layers"],
)
def test_dimensions_that_no_encoder_has_are_refused_by_name(tmp_path: Path, shapes, told: str):
    path = sparse_file(tmp_path / "encoder.safetensors", shapes)

    with pytest.raises(CheckpointError, match=rf"encoder\.safetensors: .*{told}"):
        open_encoder(path)


@pytest.mark.parametrize(
    ("name", "twin"),
    [
        ("model.layers.1.mlp.up_proj.weight", "layers.1.mlp.up_proj.weight"),
        ("model.layers.1.mlp.up_proj.weight_scale", "model.layers.1.mlp.up_proj.scale_weight"),
        ("model.layers.1.mlp.up_proj.comfy_quant", "layers.1.mlp.up_proj.comfy_quant"),
    ],
)
def test_tensors_of_one_name_are_refused(tmp_path: Path, name: str, twin: str):
    weights = dict(goldens.weights("te_a"))
    save_file(
        {**weights, **dict.fromkeys([name], torch.ones(2)), twin: torch.ones(2)}, tmp_path / "encoder.safetensors"
    )

    with pytest.raises(CheckpointError, match="are the same") as refused:
        open_encoder(tmp_path / "encoder.safetensors")

    assert repr(name) in str(refused.value)
    assert repr(twin) in str(refused.value)


def test_metadata_that_describes_a_layer_twice_is_refused(tmp_path: Path):
    layers = {"model.layers.1.mlp.up_proj": {}, "layers.1.mlp.up_proj": {"full_precision_matrix_mult": True}}
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
    save_file(goldens.weights("te_a"), tmp_path / "encoder.safetensors", metadata)

    with pytest.raises(CheckpointError, match=r"describes layer 'layers\.1\.mlp\.up_proj' twice"):
        open_encoder(tmp_path / "encoder.safetensors")
