"""Stand-ins have the real files' names, shapes and sizes, and run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from l2p_lowvram.export import ORIGINAL, LayoutStyle, model_entries
from l2p_lowvram.families import PUBLISHED, family_name
from l2p_lowvram.inspection import inspect_model
from l2p_lowvram.layout import read_layout
from l2p_lowvram.naming import strip_any_prefix
from l2p_lowvram.safetensors_writer import encode_header, file_bytes
from l2p_lowvram.synthetic import main, mini_config, parameter_shapes, split_axes, synthetic_state
from l2p_lowvram.weights import load_transformer
from offload import Checkpoint


def test_the_full_size_int8_file_has_the_published_size() -> None:
    entries, metadata = model_entries(synthetic_state(PUBLISHED["1k"]), LayoutStyle(), 16)

    assert len(entries) == 777
    assert file_bytes(entries, metadata) == 7_187_907_602
    assert sum(entry.nbytes for entry in entries if entry.dtype == "I8") == 5_308_416_000


@pytest.mark.parametrize(
    ("marker", "scheme", "keep_f32", "tensors", "nbytes"),
    [
        ("tensor", "row", False, 777, 7_029_382_322),
        ("none", "row", True, 627, None),
        ("tensor", "tensor", True, 777, 7_183_143_060),
        ("tensor", None, True, 477, None),
    ],
)
def test_other_full_size_files_have_the_computed_sizes(
    marker: str, scheme: str | None, keep_f32: bool, tensors: int, nbytes: int | None
) -> None:
    style = replace(LayoutStyle(), marker=marker)  # type: ignore[arg-type]
    entries, metadata = model_entries(synthetic_state(PUBLISHED["1k"], scheme=scheme, keep_f32=keep_f32), style, 16)

    assert len(entries) == tensors
    assert nbytes is None or file_bytes(entries, metadata) == nbytes


@pytest.mark.parametrize(
    ("family", "tensors", "values"),
    [
        ("1k", 545, 6_166_464_515),
        ("4k", 557, 6_210_711_491),
        ("8k", 563, 6_352_274_407),
        ("10k", 557, 6_453_001_959),
    ],
)
def test_the_originals_have_the_published_tensors_and_values(family: str, tensors: int, values: int) -> None:
    config = PUBLISHED[family]
    entries, _ = model_entries(synthetic_state(config, scheme=None), ORIGINAL, config.patch_size)

    names = {entry.name for entry in entries}
    assert len(names) == tensors
    assert sum(math.prod(shape) for shape in parameter_shapes(config).values()) == values
    assert f"all_x_embedder.{config.patch_size}-1.weight" in names
    assert "layers.29.attention.to_out.0.weight" in names
    assert {name.partition(".")[0] for name in names} == {
        "all_x_embedder",
        "cap_embedder",
        "cap_pad_token",
        "context_refiner",
        "layers",
        "local_decoder",
        "noise_refiner",
        "t_embedder",
        "x_pad_token",
    }
    if family == "1k":
        assert round(sum(entry.nbytes for entry in entries) / 1e9, 3) == 19.569
        assert sum(entry.dtype == "F32" for entry in entries) == 300


def test_full_size_blocks_are_read_from_the_header_alone(tmp_path: Path) -> None:
    # A sparse file: only the header and the markers at its end are real.
    entries, metadata = model_entries(synthetic_state(PUBLISHED["1k"]), LayoutStyle(), 16)
    path = tmp_path / "full.safetensors"
    with path.open("wb") as file:
        header = encode_header(entries, metadata)
        file.write(header)
        file.truncate(len(header) + sum(entry.nbytes for entry in entries))
        file.seek(-sum(entry.nbytes for entry in entries if entry.name.endswith("comfy_quant")), 2)
        for entry in entries:
            if entry.name.endswith("comfy_quant"):
                file.writelines(entry.data())

    with Checkpoint.open(path) as checkpoint:
        layout = read_layout(checkpoint)

    assert path.stat().st_size == 7_187_907_602
    assert layout.config == PUBLISHED["1k"]
    assert len(layout.quantized) == 150
    assert layout.block_bytes["layers.0"] == 185_032_192
    assert layout.block_bytes["noise_refiner.1"] == 361_820_672
    assert all(source.is_view for source in layout.sources.values())


@pytest.mark.parametrize("scheme", ["row", "tensor", "block16", "convrot64", None])
def test_a_forward_through_random_weights_stays_finite(tmp_path: Path, scheme: str | None) -> None:
    path = tmp_path / "mini.safetensors"
    arguments = ["--mini", "--layers", "6", "--dim", "128", "--heads", "2", "--ffn-dim", "192"]
    main([str(path), *arguments, "--caption-dim", "24", "--scheme", scheme or "none", "--seed", "5"])

    with Checkpoint.open(path) as checkpoint:
        layout = read_layout(checkpoint)
        model = load_transformer(checkpoint, layout)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        caption = model.encode_caption(torch.randn(3, 24, generator=generator))
        velocity = model(torch.randn(1, 3, 32, 48, generator=generator), torch.tensor([0.1]), caption)

    assert len(layout.quantized) == (30 if scheme else 0)
    assert velocity.isfinite().all()
    assert 0.01 < float(velocity.std()) < 100
    assert model.get_parameter("layers.0.ffn_norm1.weight").dtype == torch.bfloat16
    assert model.get_parameter("layers.2.ffn_norm1.weight").dtype == torch.float32


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    common = ["--mini", "--layers", "1", "--dim", "32"]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main([str(tmp_path / name), *common, "--seed", seed]) == 0

    contents = {name: (tmp_path / name).read_bytes() for name in "abc"}

    assert contents["a"] == contents["b"]
    assert contents["a"] != contents["c"]


def test_the_command_writes_other_families_and_originals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.safetensors"
    sizes = ["--mini", "--layers", "1", "--dim", "32"]

    assert main([str(path), "--family", "8k", "--original", "--prefix", "net.", *sizes]) == 0

    report = inspect_model(path)
    assert report.model is not None
    assert (report.model.family, report.model.naming, report.model.prefix) == ("8K", "original", "net.")
    assert str(path) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--dim", "100", "--heads", "3"], "--dim 100 is no multiple of --heads 3"),
        (["--dim", "32", "--heads", "1", "--scheme", "fp4"], "unknown quantisation scheme 'fp4'"),
        (["--dim", "32", "--heads", "1", "--scheme", "block128"], "no whole number of blocks of 128"),
    ],
)
def test_sizes_that_do_not_fit_end_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "m.safetensors"), "--layers", "1", *arguments])

    assert caught.value.code == 1
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("head_dim", range(6, 130, 2))
def test_axes_for_any_head_width_add_up(head_dim: int) -> None:
    axes = split_axes(head_dim)

    assert sum(axes) == head_dim
    assert all(axis > 0 and axis % 2 == 0 for axis in axes)


def test_names_of_the_published_patch_sizes() -> None:
    assert [family_name(config.patch_size) for config in PUBLISHED.values()] == ["1K", "4K", "8K", "10K"]
    assert family_name(24) == "patch-24"
    assert mini_config(64).defaults == PUBLISHED["4k"].defaults
    assert strip_any_prefix("model.diffusion_model.x") == strip_any_prefix("net.x") == "x"
