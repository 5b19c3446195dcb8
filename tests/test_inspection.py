"""`inspect` says what a file is, and why it is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from l2p_lowvram.export import save_checkpoint
from l2p_lowvram.inspection import MODEL, TEXT_ENCODER, inspect_model
from l2p_lowvram.synthetic import mini_config, random_state_dict

CONFIG = mini_config(ffn_dim=192, n_layers=3)


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, random_state_dict(CONFIG), CONFIG, scheme="convrot64")
    return path


def test_a_model_is_described(model_file: Path) -> None:
    report = inspect_model(model_file)

    assert report.accepted
    assert report.kind == MODEL
    assert report.bytes == model_file.stat().st_size
    assert report.model is not None
    assert report.model.config == CONFIG
    assert report.model.parameters == sum(t.numel() for t in random_state_dict(CONFIG).values())
    assert report.model.linears["layers"] == {"INT8, row scales, ConvRot 64": 15, "BF16": 3}
    assert report.model.linears["noise_refiner"] == {"BF16": 6}
    assert report.dtypes is not None
    assert report.dtypes["I8"].tensors == 15
    assert sum(report.model.blocks.values()) + report.model.rest_bytes < report.bytes


def test_the_json_and_the_text_say_the_same(model_file: Path) -> None:
    report = inspect_model(model_file)

    values = json.loads(report.as_json())
    text = report.as_text()

    assert values["accepted"] is True
    assert values["model"]["config"]["rope_axes"] == list(CONFIG.rope_axes)
    assert values["model"]["blocks"]["layers.2"] == report.model.blocks["layers.2"]  # type: ignore[union-attr]
    assert text.startswith(f"{model_file}: L2P model\n")
    for line in (
        "family        1K (patch 16)",
        "layers: 15 of 18 INT8, row scales, ConvRot 64",
        "layers.0-2: 3 x ",
        "1024x1024, 30 steps, cfg scale 2, shift 3",
        "comfyui, prefix 'model.diffusion_model.'",
    ):
        assert line in text


def test_a_folder_is_looked_into(model_file: Path) -> None:
    (model_file.parent / "l2p.json").write_text('{"defaults": {"width": 128, "height": 64}}')

    report = inspect_model(model_file.parent)

    assert "128x64, 30 steps" in report.as_text()


def test_a_refused_model_is_reported_with_its_reason(model_file: Path) -> None:
    tensors = load_file(model_file)
    del tensors["model.diffusion_model.layers.1.attention.out.weight_scale"]
    save_file(tensors, model_file, {"l2p": '{"rope_axes": [8, 12, 12]}'})

    report = inspect_model(model_file)

    assert not report.accepted
    assert report.reason is not None
    assert "layers.1.attention.out.weight' is rotated but has no weight_scale" in report.reason
    assert report.tensors == len(tensors)
    assert "refused" in report.as_text()
    assert json.loads(report.as_json())["model"] is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"GGUF\3\0\0\0 and so on", "GGUF"),
        (b"PK\3\4 and so on", "pickle"),
        (b"", "at least 10"),
        (b"\xff" * 64, "safetensors file"),
        (None, "no such file"),
    ],
)
def test_what_is_no_checkpoint_is_reported_too(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)

    report = inspect_model(path)

    assert not report.accepted
    assert report.reason is not None
    assert reason in report.reason
    assert reason in report.as_text()


def test_a_text_encoder_is_recognised(tmp_path: Path) -> None:
    shapes = {
        "embed_tokens.weight": (32, 16),
        "norm.weight": (16,),
        **{
            f"layers.{i}.{name}.weight": shape
            for i in range(2)
            for name, shape in {
                "input_layernorm": (16,),
                "post_attention_layernorm": (16,),
                "self_attn.q_proj": (16, 16),
                "self_attn.k_proj": (8, 16),
                "self_attn.v_proj": (8, 16),
                "self_attn.o_proj": (16, 16),
                "self_attn.q_norm": (8,),
                "self_attn.k_norm": (8,),
                "mlp.gate_proj": (24, 16),
                "mlp.up_proj": (24, 16),
                "mlp.down_proj": (16, 24),
            }.items()
        },
    }
    path = tmp_path / "te.safetensors"
    save_file({f"model.{name}": torch.ones(shape) for name, shape in shapes.items()}, path)

    report = inspect_model(path)

    assert report.kind == TEXT_ENCODER
    assert report.model is None
    assert "hidden_size 16" in report.as_text()
    assert json.loads(report.as_json())["text_encoder"]["num_hidden_layers"] == 2


def test_names_from_the_file_cannot_steer_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x_embedder.weight": torch.ones(2), "a\x1b[2J\nb": torch.ones(2)}, path, {"k\x1b[2J": "v"})

    text = inspect_model(path).as_text()

    assert "\x1b" not in text


def test_the_text_for_people_steers_no_terminal(tmp_path: Path) -> None:
    report = inspect_model(tmp_path / "\x1b[31mred\r\n.safetensors")

    told = report.as_text()

    assert all(line.isprintable() for line in told.split("\n"))
    assert len(told.split("\n")) == 2
    assert r"\x1b[31mred\r\n" in told
    assert replace(report, reason="\x9b2J").as_text().endswith(r"reason        \x9b2J")
