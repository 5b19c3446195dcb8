"""`quantize` and `dequantize`: what is written, that it is right to the bit, and what is left after an error."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from l2p_lowvram import comparison, conversion
from l2p_lowvram.cli import main
from l2p_lowvram.comparison import ReadableLayout, layer_errors
from l2p_lowvram.conversion import Recipe, Rewriting, RowReader, read_any_layout
from l2p_lowvram.encoder import read_encoder_layout
from l2p_lowvram.export import (
    ORIGINAL,
    LayoutStyle,
    QuantizedWeight,
    quantized_state,
    row_runs,
    save_checkpoint,
    save_model,
)
from l2p_lowvram.families import PUBLISHED
from l2p_lowvram.layout import read_layout
from l2p_lowvram.linear import hadamard
from l2p_lowvram.quantization import Scheme
from l2p_lowvram.repository import DEMO_FOLDER
from l2p_lowvram.safetensors_writer import TensorEntry, encode_header, write_safetensors
from l2p_lowvram.synthetic import mini_config, parameter_shapes, random_state_dict, synthetic_state
from l2p_lowvram.weights import load_transformer
from l2p_lowvram.whole_file import whole_file
from offload import Checkpoint, CheckpointError, Reader

CONFIG = mini_config(ffn_dim=192)
STATE = random_state_dict(CONFIG, seed=9)
PREFIX = "model.diffusion_model."

Tensors = dict[str, Tensor]


def original(folder: Path, dtype: torch.dtype | None = torch.bfloat16, name: str = "original") -> Path:
    path = folder / f"{name}.safetensors"
    save_checkpoint(path, STATE, CONFIG, scheme=None, rest_dtype=dtype, style=ORIGINAL)
    return path


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def dequantized(path: Path) -> Tensors:
    """By the formulas of the format, without any of our reading code: name without prefix -> fp32 weight."""
    tensors = load_file(path)
    result = {}
    for name, value in tensors.items():
        module = name.removesuffix(".weight")
        if f"{module}.weight_scale" not in tensors or module == name:
            continue
        weight = value.float() * tensors[f"{module}.weight_scale"]
        marker = json.loads(bytes(tensors[f"{module}.comfy_quant"].tolist()))
        assert marker["format"] == "int8_tensorwise"
        if marker.get("convrot"):
            group = marker["convrot_groupsize"]
            weight = (weight.unflatten(1, (-1, group)) @ hadamard(group, "regular", torch.device("cpu"))).flatten(1)
        result[module.removeprefix(PREFIX)] = weight
    return result


# -- the file


def test_the_1k_original_becomes_the_published_tensors_and_bytes(tmp_path: Path) -> None:
    # A sparse original of full size: planning reads its header only.
    from l2p_lowvram.export import model_entries

    path = tmp_path / "original.safetensors"
    entries, metadata = model_entries(synthetic_state(PUBLISHED["1k"], scheme=None), ORIGINAL, 16)
    with path.open("wb") as file:
        file.write(encode_header(entries, metadata))
        file.truncate(file.tell() + sum(entry.nbytes for entry in entries))

    with (
        Checkpoint.open(path) as checkpoint,
        Rewriting(checkpoint, read_layout(checkpoint), Recipe(), LayoutStyle(marker="both")) as rewriting,
    ):
        planned = {entry.name: (entry.dtype, entry.shape) for entry in rewriting.entries}
        tensor_bytes = sum(entry.nbytes for entry in rewriting.entries)
        read = rewriting.source_bytes

    published, _ = model_entries(synthetic_state(PUBLISHED["1k"]), LayoutStyle(), 16)
    assert planned == {entry.name: (entry.dtype, entry.shape) for entry in published}
    assert len(planned) == 777
    assert tensor_bytes == sum(entry.nbytes for entry in published)
    assert read == checkpoint.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["row", "tensor", "convrot64"])
def test_streaming_gives_the_bits_of_quantising_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("l2p_lowvram.export._RUN_ELEMENTS", 1000)  # many runs, none of which ends with a part of qkv
    source = original(tmp_path, dtype)

    assert run("quantize", source, tmp_path / "q.safetensors", "--scheme", scheme, "-q") == 0

    given = {name: tensor.to(dtype) for name, tensor in STATE.items()}
    save_model(tmp_path / "whole.safetensors", quantized_state(given, scheme, rest_dtype=None), CONFIG)
    written, expected = load_file(tmp_path / "q.safetensors"), load_file(tmp_path / "whole.safetensors")
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == tensor.dtype
        if scheme == "convrot64" and tensor.dtype in (torch.int8, torch.float32):
            # A product's last bit depends on how many rows are multiplied at once.
            off = (written[name].float() - tensor.float()).abs()
            assert off.max() <= 1
            assert off.mean() < 1e-3
        else:
            assert torch.equal(written[name], tensor)


def test_floats_keep_their_dtypes_or_become_bf16(tmp_path: Path) -> None:
    path = tmp_path / "mixed.safetensors"
    save_model(path, synthetic_state(mini_config(n_layers=6), scheme=None), mini_config(n_layers=6), style=ORIGINAL)

    run("quantize", path, tmp_path / "kept.safetensors", "-q")
    run("quantize", path, tmp_path / "bf16.safetensors", "--bf16-rest", "-q")

    name = PREFIX + "layers.2.attention_norm1.weight"
    kept, cast = load_file(tmp_path / "kept.safetensors"), load_file(tmp_path / "bf16.safetensors")
    assert kept[name].dtype == torch.float32
    assert torch.equal(cast[name], kept[name].bfloat16())
    assert torch.equal(cast[PREFIX + "layers.2.attention.out.weight"], kept[PREFIX + "layers.2.attention.out.weight"])


def test_markers_stand_in_tensors_and_in_the_metadata_with_the_source(tmp_path: Path) -> None:
    source = original(tmp_path)

    run("quantize", source, tmp_path / "q.safetensors", "-q")

    with safe_open(tmp_path / "q.safetensors", "pt") as file:
        metadata = file.metadata()
        markers = {
            name.removesuffix(".comfy_quant"): json.loads(bytes(file.get_tensor(name).tolist()))
            for name in file.keys()  # noqa: SIM118
            if name.endswith(".comfy_quant")
        }
    assert json.loads(metadata["_quantization_metadata"])["layers"] == markers
    assert len(markers) == 5 * CONFIG.n_layers
    made = json.loads(metadata["l2p_conversion"])
    assert made["scheme"] == "row"
    assert made["source"]["file"] == "original.safetensors"
    with Checkpoint.open(source) as checkpoint:
        assert made["source"]["header_sha256"] == checkpoint.header_sha256


def test_patterns_choose_the_layers(tmp_path: Path) -> None:
    source = original(tmp_path)

    run(
        "quantize", source, tmp_path / "q.safetensors", "-q",
        "--include", "layers.*.feed_forward.w?", "x_embedder", "--exclude", "layers.0.*",
    )  # fmt: skip

    with Checkpoint.open(tmp_path / "q.safetensors") as checkpoint:
        found = read_layout(checkpoint).quantized
    assert set(found) == {"x_embedder", *(f"layers.1.feed_forward.w{number}" for number in (1, 2, 3))}


# -- every layout, there and back


@pytest.mark.parametrize("scheme", ["row", "tensor", "block16", "convrot16", "fp8"])
@pytest.mark.parametrize("naming", ["comfyui", "original"])
def test_foreign_layouts_make_the_same_pictures_after_a_round_trip(tmp_path: Path, scheme: str, naming: Any) -> None:
    style = LayoutStyle(prefix="net.", naming=naming, scale_key="scale_weight", marker="nested", extras=True)
    foreign = tmp_path / "foreign.safetensors"
    save_model(foreign, quantized_state(STATE, scheme, rest_dtype=torch.float32), CONFIG, style=style)

    kept, back, again = (tmp_path / f"{name}.safetensors" for name in ("kept", "back", "again"))
    run("quantize", foreign, kept, "--include", "x_embedder", "--scheme", "row", "-q")
    run("dequantize", foreign, back, "--names", "original", "--dtype", "fp32", "-q", "--verify")
    run("dequantize", back, again, "--dtype", "fp32", "-q", "--verify")

    expected, layers = weights_of(foreign)
    assert weights_of(kept)[1] == {*layers, "x_embedder"}
    for name, weight in weights_of(kept)[0].items():
        assert name == "x_embedder" or torch.equal(weight, expected[name])
    for path in (back, again):
        found, none = weights_of(path)
        assert not none
        for name, weight in found.items():
            torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(prediction(again), prediction(foreign), atol=1e-4, rtol=1e-4)


def weights_of(path: Path) -> tuple[Tensors, set[str]]:
    """Linear weights as the pipeline reads them, and which were quantised."""
    with Checkpoint.open(path) as checkpoint, Reader(checkpoint) as reader:
        layout = read_layout(checkpoint)
        readable = ReadableLayout(layout, RowReader(checkpoint, reader))
        names = conversion.linears(layout)
        rows = {name: layout.sources[f"{name}.weight"].shape[0] for name in names}
        weights = {name: readable.rows(f"{name}.weight", 0, rows[name]).float() for name in names}
        return weights, set(layout.quantized)


def prediction(path: Path) -> Tensor:
    with Checkpoint.open(path) as checkpoint, torch.inference_mode():
        model = load_transformer(checkpoint, read_layout(checkpoint))
        generator = torch.Generator().manual_seed(1)
        caption = model.encode_caption(torch.randn(5, CONFIG.caption_dim, generator=generator))
        return model(torch.randn(1, 3, 32, 48, generator=generator), torch.tensor([0.3]), caption)


def test_what_is_stored_in_the_scheme_already_is_copied(tmp_path: Path) -> None:
    run("quantize", original(tmp_path), tmp_path / "a.safetensors", "-q")

    run("quantize", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "-q")

    first, second = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_sharded_set_becomes_one_file(tmp_path: Path) -> None:
    whole = original(tmp_path)
    tensors, shards = load_file(whole), tmp_path / "shards"
    shards.mkdir()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, shards / file, {"l2p": '{"rope_axes": [8, 12, 12]}'})
    weight_map = {name: file for file, held in parts.items() for name in held}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    run("quantize", shards, tmp_path / "a.safetensors", "-q")
    run("quantize", whole, tmp_path / "b.safetensors", "-q")

    first, second = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


# -- other readers


@pytest.mark.parametrize("scheme", ["row", "tensor", "convrot64"])
def test_the_formulas_of_the_format_give_the_weights_back(tmp_path: Path, scheme: str) -> None:
    run("quantize", original(tmp_path, torch.float32), tmp_path / "q.safetensors", "--scheme", scheme, "-q")

    found = dequantized(tmp_path / "q.safetensors")

    assert len(found) == 5 * CONFIG.n_layers
    for name, weight in found.items():
        given = STATE[f"{name}.weight"]
        assert (weight - given).norm() / given.norm() < 0.02


@pytest.mark.skipif(importlib.util.find_spec("comfy_kitchen") is None, reason="the extra interop is not installed")
@pytest.mark.parametrize("scheme", ["row", "tensor", "convrot64"])
@pytest.mark.filterwarnings("ignore")
def test_the_library_comfyui_uses_reads_the_same_weights(tmp_path: Path, scheme: str) -> None:
    from comfy_kitchen.tensor.int8 import TensorWiseINT8Layout as Kitchen

    run("quantize", original(tmp_path, torch.float32), tmp_path / "q.safetensors", "--scheme", scheme, "-q")
    tensors, ours = load_file(tmp_path / "q.safetensors"), weights_of(tmp_path / "q.safetensors")[0]

    for name in (name.removesuffix(".comfy_quant") for name in tensors if name.endswith(".comfy_quant")):
        marker = json.loads(bytes(tensors[f"{name}.comfy_quant"].tolist()))
        stored, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        rotation = {key: marker[key] for key in ("convrot", "convrot_groupsize") if key in marker}
        params = Kitchen.Params(scale=scale, orig_dtype=torch.float32, orig_shape=tuple(stored.shape), **rotation)
        theirs = Kitchen.dequantize(stored, params)
        torch.testing.assert_close(theirs, ours[name.removeprefix(PREFIX)], atol=1e-6, rtol=1e-6)


# -- the text encoder


def test_a_text_encoder_becomes_one_int8_file_with_its_configuration(tmp_path: Path) -> None:
    source = DEMO_FOLDER / "text_encoder"

    assert run("quantize", source, tmp_path / "te", "--text-encoder", "--verify", "-q") == 0

    with Checkpoint.open(tmp_path / "te") as written, Checkpoint.open(source) as given:
        layout = read_encoder_layout(written)
        assert layout.config == read_encoder_layout(given).config
        assert len(layout.quantized) == 7 * (layout.config.num_hidden_layers - 1)
        stems = {name for name in written.tensors if not name.endswith((".weight_scale", ".comfy_quant"))}
        assert stems == set(given.tensors)
        assert written.tensors["model.embed_tokens.weight"].dtype == "BF16"
    assert (tmp_path / "te" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert sorted(path.name for path in (tmp_path / "te").iterdir()) == ["config.json", "model.safetensors"]


def test_the_configuration_of_another_encoder_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")

    code = run("quantize", DEMO_FOLDER / "text_encoder", tmp_path / "te.safetensors", "--text-encoder", "-q")

    assert code == 2
    assert "config.json: already exists and differs" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_verify_of_a_text_encoder_asks_no_other_files_configuration(tmp_path: Path) -> None:
    """What lies in the folder belongs to what is to be overwritten."""
    source = DEMO_FOLDER / "text_encoder"
    (tmp_path / "te").mkdir()
    other = json.loads((source / "config.json").read_text()) | {"hidden_size": 77}
    (tmp_path / "te" / "config.json").write_text(json.dumps(other))

    assert run("quantize", source, tmp_path / "te", "--text-encoder", "--verify", "--overwrite", "-q") == 0
    assert (tmp_path / "te" / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("scheme", ["row", "tensor"])
def test_an_encoder_is_replaced_only_where_its_configuration_can_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scheme: str
) -> None:
    (tmp_path / "config.json").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"the former model")
    source = DEMO_FOLDER / "text_encoder"

    code = run("quantize", source, tmp_path, "--text-encoder", "--scheme", scheme, "--overwrite", "-q")

    assert code == 2
    assert "config.json: is no file, so the configuration cannot go there; name another" in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").read_bytes() == b"the former model"


@pytest.mark.parametrize("stage", ["configuration", "model"])
def test_a_failure_leaves_the_former_encoder_and_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Found out only while writing, as a full disk is."""
    before = {"config.json": b"{}", "model.safetensors": b"the former model"}
    for name, raw in before.items():
        (tmp_path / name).write_bytes(raw)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    @contextmanager
    def full_disk(path: Path, *, overwrite: bool) -> Iterator[object]:
        with whole_file(path, overwrite=overwrite):
            yield SimpleNamespace(write=refuse)

    if stage == "model":
        monkeypatch.setattr(conversion._Quantizer, "rows", refuse)
    else:
        monkeypatch.setattr(conversion, "whole_file", full_disk)

    code = run("quantize", DEMO_FOLDER / "text_encoder", tmp_path, "--text-encoder", "--overwrite", "-q")

    assert code == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# -- verify


def test_verify_reports_every_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = original(tmp_path), tmp_path / "q.safetensors"

    run("quantize", source, target, "--verify", "-q", "--json")
    result = json.loads(capsys.readouterr().out)
    run("quantize", source, target, "--verify", "-q", "--overwrite")
    table = capsys.readouterr().out.splitlines()

    layers = {layer["layer"]: layer for layer in result["verify"]["layers"]}
    given, found = STATE["layers.0.attention.qkv.weight"].bfloat16().float(), dequantized(target)
    error = (found["layers.0.attention.qkv"] - given).norm() / given.norm()
    assert len(layers) == 10
    assert layers["layers.0.attention.qkv"]["relative_l2"] == pytest.approx(float(error), rel=1e-4)
    assert 0.4 < result["verify"]["largest"]["max_steps"] < 0.501
    assert result["bytes"] == target.stat().st_size
    assert [line.split()[0] for line in table] == ["layer", *layers, "largest", str(target)]


@pytest.mark.parametrize(
    "name", ["layers.0.attention.qkv.weight", "layers.0.attention.qkv.weight_scale", "layers.1.ffn_norm1.weight"]
)
@pytest.mark.parametrize("first", ["", "row"])
@pytest.mark.parametrize("scheme", ["row", "tensor", "convrot64"])
def test_verify_sees_a_single_wrong_value(tmp_path: Path, scheme: str, first: str, name: str) -> None:
    """In files made of floats, and of INT8 values, whether they are kept or made anew."""
    source, target = original(tmp_path), tmp_path / "q.safetensors"
    if first:
        run("quantize", source, tmp_path / "first.safetensors", "--scheme", first, "-q")
        source = tmp_path / "first.safetensors"
    assert run("quantize", source, target, "--scheme", scheme, "-q", "--verify") == 0
    tensors = load_file(target)
    if name.endswith(".weight_scale"):
        tensors[PREFIX + name] *= 1.0035
    else:
        value = tensors[PREFIX + name].view(-1)[7]
        value += -1 if value == 127 else 1
    with safe_open(target, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, target, metadata)

    with (
        Checkpoint.open(source) as one,
        Checkpoint.open(target) as other,
        Reader(one) as first,
        Reader(other) as second,
        pytest.raises(CheckpointError, match=name.removesuffix("_scale").removesuffix(".weight")),
    ):
        layer_errors(
            ReadableLayout(read_any_layout(one, text_encoder=False), RowReader(one, first)),
            ReadableLayout(read_any_layout(other, text_encoder=False), RowReader(other, second)),
        )


@pytest.mark.parametrize(("error", "code"), [(None, 2), (KeyboardInterrupt, 130)])
def test_what_is_not_verified_gets_no_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Any, code: int
) -> None:
    source, target = original(tmp_path), tmp_path / "q.safetensors"
    rows = conversion._Quantizer.rows

    def wrong_rows(self: conversion._Quantizer, start: int, stop: int) -> Tensor:
        if error is None:
            return rows(self, start, stop).clamp(max=100)
        return rows(self, start, stop)

    monkeypatch.setattr(conversion._Quantizer, "rows", wrong_rows)
    if error is not None:
        monkeypatch.setattr(comparison, "_layer_error", lambda *_: (_ for _ in ()).throw(error))

    assert run("quantize", source, target, "-q", "--verify") == code

    assert [path.name for path in tmp_path.iterdir()] == ["original.safetensors"]
    if error is None:
        message = f"{target}: layers.0.attention.qkv is off by 2[67]"
        assert re.search(
            message + r".* steps .*; it was not written as computed, and not kept\n", capsys.readouterr().err
        )


@pytest.mark.parametrize("first", ["", "row", "tensor", "fp8"])
@pytest.mark.parametrize("scheme", ["row", "tensor", "convrot64"])
def test_as_much_is_read_as_was_planned(tmp_path: Path, scheme: str, first: str) -> None:
    source = original(tmp_path)
    if first == "fp8":
        source = fp8_file(tmp_path, torch.float8_e4m3fn)
    elif first:
        run("quantize", source, tmp_path / "first.safetensors", "--scheme", first, "-q")
        source = tmp_path / "first.safetensors"

    with (
        Checkpoint.open(source) as checkpoint,
        Rewriting(checkpoint, read_layout(checkpoint), Recipe(scheme)) as rewriting,
    ):
        rewriting.write(tmp_path / "q.safetensors")
        assert rewriting.reader.read_bytes == rewriting.source_bytes


def fp8_file(folder: Path, dtype: torch.dtype) -> Path:
    """A file one of whose layers, which `quantize` leaves alone, and one it takes are FP8 with a scale."""
    path = folder / "fp8.safetensors"
    save_checkpoint(path, STATE, CONFIG, scheme=None, rest_dtype=torch.bfloat16)
    tensors = load_file(path)
    for name in ("layers.0.attention.out", "x_embedder"):
        tensors[f"{PREFIX}{name}.weight"] = (tensors[f"{PREFIX}{name}.weight"].float() * 64).to(dtype)
        tensors[f"{PREFIX}{name}.weight_scale"] = torch.tensor(1 / 64)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_layers_that_are_kept_are_declared_as_what_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    target = tmp_path / "q.safetensors"

    assert run("quantize", fp8_file(tmp_path, dtype), target, "-q", "--verify") == 0

    tensors = load_file(target)
    assert tensors[f"{PREFIX}x_embedder.weight"].dtype == dtype
    marker = json.loads(bytes(tensors[f"{PREFIX}x_embedder.comfy_quant"].tolist()))
    assert marker["format"] == str(dtype).removeprefix("torch.")
    assert tensors[f"{PREFIX}layers.0.attention.out.weight"].dtype == torch.int8


def test_sources_that_differ_in_values_alone_are_told_apart(tmp_path: Path) -> None:
    def source_of(path: Path) -> dict[str, Any]:
        with Checkpoint.open(path) as checkpoint, Rewriting(checkpoint, read_layout(checkpoint), Recipe()) as made:
            return json.loads(made.metadata["l2p_conversion"])["source"]

    first, same = original(tmp_path), original(tmp_path, name="same")
    tensors = load_file(first)
    tensors["layers.1.ffn_norm1.weight"][3] += 1
    with safe_open(first, "pt") as file:
        save_file(tensors, tmp_path / "other.safetensors", file.metadata())

    found, equal, other = (source_of(path) for path in (first, same, tmp_path / "other.safetensors"))
    assert found["sample_sha256"] == equal["sample_sha256"] != other["sample_sha256"]


def test_layers_cannot_be_quantised_into_parts(tmp_path: Path) -> None:
    with (
        Checkpoint.open(original(tmp_path)) as checkpoint,
        pytest.raises(ValueError, match="INT8 layers are written with q, k and v in one tensor"),
    ):
        Rewriting(checkpoint, read_layout(checkpoint), Recipe(), ORIGINAL)


# -- refusals


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--include", "layers.*.to_q"], "--include 'layers.*.to_q' names none of"),
        (["--exclude", "layers.9.*"], "--exclude 'layers.9.*' names none of"),
        (["--exclude", "*"], "leave no layer to quantise"),
        (["--scheme", "fp4"], "invalid choice: 'fp4'"),
        (["--keep-dtype", "--bf16-rest"], "not allowed with"),
        (["--text-encoder"], "no text encoder"),
    ],
)
def test_wrong_options_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    source = original(tmp_path)

    code = run("quantize", source, tmp_path / "q.safetensors", *arguments)

    message = capsys.readouterr().err
    assert code == 2
    assert reason in message
    assert message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["original.safetensors"]


def test_the_input_is_never_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = original(tmp_path)
    before = source.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(source)

    codes = [run("quantize", source, tmp_path / name, "--overwrite") for name in (source.name, "link.safetensors")]

    assert codes == [2, 2]
    assert capsys.readouterr().err.count("is the input itself") == 2
    assert source.read_bytes() == before


def test_existing_files_and_missing_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = original(tmp_path)
    (tmp_path / "q.safetensors").write_bytes(b"mine")

    assert run("quantize", source, tmp_path / "q.safetensors") == 2
    assert "already exists; name another file or give --overwrite" in capsys.readouterr().err
    assert run("quantize", source, tmp_path / "none" / "q.safetensors") == 2
    assert "the folder" in capsys.readouterr().err
    assert run("quantize", source, tmp_path / "q.ckpt") == 2
    assert "must end in .safetensors" in capsys.readouterr().err
    assert (tmp_path / "q.safetensors").read_bytes() == b"mine"


def test_a_file_that_another_program_has_open_is_noticed_before_the_work_on_windows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = original(tmp_path), tmp_path / "q.safetensors"
    target.write_bytes(b"mine")
    rename = os.rename

    def refuse(old: Any, new: Any, **options: Any) -> None:
        if Path(new) == target:
            raise PermissionError(13, "The process cannot access the file", str(old), 32, str(new))
        rename(old, new, **options)

    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "rename", refuse)
    monkeypatch.setattr(conversion, "write_safetensors", work)

    assert run("quantize", source, target, "--overwrite") == 2

    message = capsys.readouterr().err
    told = "cannot be replaced (The process cannot access the file); close it where it is open, or name another file"
    assert f"{target}: {told}" in message
    assert message.count("\n") == 1
    assert target.read_bytes() == b"mine"


def test_a_file_that_nobody_has_open_is_replaced_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = original(tmp_path), tmp_path / "q.safetensors"
    target.write_bytes(b"mine")
    monkeypatch.setattr(sys, "platform", "win32")

    assert run("quantize", source, target, "--overwrite", "-q") == 0
    assert target.read_bytes() != b"mine"


def test_a_full_disk_is_noticed_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = original(tmp_path)
    usage = conversion.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: usage._replace(free=1000))

    assert run("quantize", source, tmp_path / "folder") == 2

    assert "but its disk has 1000 B free" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["original.safetensors"]


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (OSError(28, "no space left on device"), 2)])
def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any, code: int
) -> None:
    source, calls = original(tmp_path), []
    read = RowReader.rows

    def failing(self: RowReader, *arguments: Any) -> Tensor:
        calls.append(arguments)
        if len(calls) > 20:
            raise error
        return read(self, *arguments)

    monkeypatch.setattr(RowReader, "rows", failing)

    assert run("quantize", source, tmp_path / "folder", "-q") == code
    assert [path.name for path in tmp_path.iterdir()] == ["original.safetensors"]


@pytest.mark.parametrize("scheme", ["row", "tensor", "convrot64"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_without_an_int8_value_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scheme: str, value: float
) -> None:
    source = original(tmp_path)
    tensors = load_file(source)
    tensors["layers.1.attention.to_k.weight"][3, 5] = value
    save_file(tensors, source, {"l2p": '{"rope_axes": [8, 12, 12]}'})

    assert run("quantize", source, tmp_path / "q.safetensors", "--scheme", scheme, "-q") == 2

    assert "holds NaN or infinity (layers.1.attention.qkv.weight" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["original.safetensors"]


# -- pieces


def test_memory_is_bounded_by_runs_of_rows_whatever_the_tensor() -> None:
    for shape in [*parameter_shapes(PUBLISHED["10k"]).values(), (151_936, 2560)]:
        runs = list(row_runs(shape))
        assert runs[0][0] == 0
        assert runs[-1][1] == shape[0]
        assert all(one[1] == other[0] for one, other in pairwise(runs))
        elements = torch.Size(shape).numel() // shape[0]
        assert max(stop - start for start, stop in runs) * elements <= 2 << 20


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_pieces_made_ahead_are_written_in_order(tmp_path: Path, threads: int) -> None:
    tensors = {name: torch.randn(rows, 7) for name, rows in (("a", 50), ("b", 1), ("c", 33))}
    order: list[str] = []

    def late(name: str) -> TensorEntry:
        def read() -> Tensor:
            order.append(name)
            return torch.tensor([float(len(order))])

        return TensorEntry.of(name, torch.float32, (1,), read)

    entries = []
    for name, tensor in tensors.items():

        def rows(start: int, stop: int, tensor: Tensor = tensor) -> Tensor:
            return tensor[start:stop]

        entries += [TensorEntry.of_rows(name, torch.float32, tuple(tensor.shape), rows, 4), late(f"{name}.late")]

    write_safetensors(tmp_path / "x.safetensors", entries, threads=threads)

    written = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    assert order == ["a.late", "b.late", "c.late"]


def test_large_weights_are_quantised_in_cached_runs_with_the_same_bits() -> None:
    weight = torch.randn(300, 4096, generator=torch.Generator().manual_seed(1)).bfloat16()

    for name in ("row", "tensor"):
        stored, scale = Scheme.parse(name).quantize(weight)
        absmax = weight.float().abs().amax(1, keepdim=True) if name == "row" else weight.float().abs().amax()
        assert torch.equal(scale, absmax / 127)
        assert torch.equal(stored, (weight.float() / scale).round().to(torch.int8))


@pytest.mark.parametrize(
    ("first", "scheme", "found"),
    [
        ("row", "convrot16", ("I8", "row", 16)),
        ("row", "tensor", ("I8", "tensor", None)),
        ("tensor", "row", ("I8", "row", None)),
        ("convrot16", "row", ("I8", "row", None)),
        ("fp8", "tensor", ("I8", "tensor", None)),
    ],
)
def test_what_is_stored_in_another_scheme_is_made_anew(
    tmp_path: Path, first: str, scheme: str, found: tuple[str, str, int | None]
) -> None:
    save_checkpoint(tmp_path / "first.safetensors", STATE, CONFIG, scheme=first)

    assert run("quantize", tmp_path / "first.safetensors", tmp_path / "q.safetensors", "--scheme", scheme, "-q") == 0

    with Checkpoint.open(tmp_path / "q.safetensors") as checkpoint:
        layers = read_layout(checkpoint).quantized.values()
    assert len(layers) == 5 * CONFIG.n_layers
    assert {(one.dtype, one.granularity, one.rotation and one.rotation.group) for one in layers} == {found}


@pytest.mark.parametrize("scheme", ["row", "tensor"])
def test_a_layer_that_asks_for_full_precision_goes_on_asking(tmp_path: Path, scheme: str) -> None:
    """Whether it is kept or quantised anew: else its activations would be quantised, too."""
    state, name = quantized_state(STATE, "row"), "layers.1.feed_forward.w2"
    weight = state[f"{name}.weight"]
    assert isinstance(weight, QuantizedWeight)
    state[f"{name}.weight"] = replace(weight, full_precision_matmul=True)
    save_model(tmp_path / "first.safetensors", state, CONFIG)

    assert run("quantize", tmp_path / "first.safetensors", tmp_path / "q.safetensors", "--scheme", scheme, "-q") == 0

    with Checkpoint.open(tmp_path / "q.safetensors") as checkpoint:
        layers = read_layout(checkpoint).quantized
    assert [module for module, layer in layers.items() if layer.full_precision_matmul] == [name]


def test_layers_that_a_rotation_leaves_alone_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(tmp_path / "plain.safetensors", STATE, CONFIG)

    for group, plain in ((16, 0), (1024, 5 * CONFIG.n_layers)):
        target = tmp_path / f"{group}.safetensors"
        scheme = f"convrot{group}"
        assert run("quantize", tmp_path / "plain.safetensors", target, "--scheme", scheme, "--json", "-q") == 0
        told = f"{plain} of {5 * CONFIG.n_layers} layers are not rotated: their columns are no multiple of {group}"
        assert json.loads(capsys.readouterr().out)["warnings"] == ([told] if plain else [])


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="asks the system what a descriptor is")
def test_a_power_cut_leaves_the_whole_file_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are on the disk before the file gets its name, and the name before the command ends."""
    synced: list[tuple[bool, bool]] = []
    target, sync = tmp_path / "q.safetensors", os.fsync

    def noted(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").is_dir(), target.exists()))
        sync(descriptor)

    source = original(tmp_path)
    monkeypatch.setattr(os, "fsync", noted)

    assert run("quantize", source, target, "-q") == 0
    assert synced == [(False, False), (True, True)]  # (a folder, the file has its name)
