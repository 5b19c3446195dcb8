"""Quantising and writing: the arithmetic, the bytes, and what is left after an error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from l2p_lowvram.export import LayoutStyle, LazyTensor, QuantizedWeight, model_entries, save_checkpoint
from l2p_lowvram.linear import REGULAR, Linear, Rotation
from l2p_lowvram.quantization import Scheme
from l2p_lowvram.safetensors_writer import TensorEntry, encode_header, file_bytes, write_safetensors
from l2p_lowvram.synthetic import mini_config, random_state_dict
from tests import goldens

CONFIG = mini_config(n_layers=1)


def entry(name: str, tensor: torch.Tensor) -> TensorEntry:
    return TensorEntry.of(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


# -- arithmetic


@pytest.mark.parametrize(
    ("name", "scale_shape", "bound"),
    [
        ("row", (48, 1), 0.01),
        ("tensor", (), 0.02),
        ("block16", (3, 8), 0.01),
        ("convrot64", (48, 1), 0.01),
        ("quarot128", (48, 1), 0.01),
        ("fp8", (), 0.04),
    ],
)
def test_a_quantised_weight_comes_back_within_its_rounding(
    name: str, scale_shape: tuple[int, ...], bound: float
) -> None:
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(2))
    scheme = Scheme.parse(name)

    stored, scale = scheme.quantize(weight)
    linear = Linear(128, 48, bias=False)
    linear.quantize_(stored, scale, scheme.rotation)

    assert scale.shape == scale_shape
    assert scale.dtype == torch.float32
    assert (linear.dequantized() - weight).norm() / weight.norm() < bound


@pytest.mark.parametrize("name", ["row", "tensor", "block8"])
def test_int8_scales_are_absmax_over_127(name: str) -> None:
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(5))
    block = {"row": (1, 24), "tensor": (16, 24), "block8": (8, 8)}[name]

    stored, scale = Scheme.parse(name).quantize(weight)

    tiles = weight.unflatten(0, (-1, block[0])).unflatten(2, (-1, block[1]))
    assert torch.equal(scale.reshape(-1), (tiles.abs().amax((1, 3)) / 127).reshape(-1))
    assert stored.abs().max() == 127


@pytest.mark.parametrize("name", ["row", "tensor", "convrot64"])
def test_quantising_agrees_bit_for_bit_with_the_library_comfyui_uses(name: str) -> None:
    golden = goldens.tensors("int8_ragged")

    stored, scale = Scheme.parse(name).quantize(golden["w"])

    assert torch.equal(stored, golden[f"{name}.weight"])
    assert torch.equal(scale.reshape(-1), golden[f"{name}.weight_scale"].reshape(-1))


def test_rows_of_zeros_stay_zeros() -> None:
    stored, scale = Scheme.parse("row").quantize(torch.zeros(2, 4))

    assert not stored.any()
    assert (scale > 0).all()


@pytest.mark.parametrize("name", ["rows", "row8", "block", "convrot", "", "block-1", "fp4", "tensor ", "convrot32"])
def test_unknown_schemes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"scheme|power of four"):
        Scheme.parse(name)


def test_blocks_that_do_not_divide_the_weight_are_refused() -> None:
    with pytest.raises(ValueError, match="no whole number of blocks of 5"):
        Scheme.parse("block5").quantize(torch.ones(10, 12))
    with pytest.raises(ValueError, match="no multiple of the rotation group 16"):
        Scheme.parse("convrot16").quantize(torch.ones(10, 12))


# -- what is written


def test_defaults_write_the_published_int8_layout(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "m.safetensors", random_state_dict(CONFIG), CONFIG)

    tensors = load_file(tmp_path / "m.safetensors")

    stem = "model.diffusion_model.layers.0.attention.qkv"
    assert tensors[f"{stem}.weight"].dtype == torch.int8
    assert tensors[f"{stem}.weight"].shape == (192, 64)
    assert tensors[f"{stem}.weight_scale"].dtype == torch.float32
    assert tensors[f"{stem}.weight_scale"].shape == (192, 1)
    assert bytes(tensors[f"{stem}.comfy_quant"].tolist()) == b'{"format": "int8_tensorwise", "per_row": true}'
    quantised = {name for name, tensor in tensors.items() if tensor.dtype == torch.int8}
    assert len(quantised) == 5
    floats = {tensor.dtype for name, tensor in tensors.items() if "quant" not in name and "scale" not in name}
    assert floats == {torch.int8, torch.bfloat16}
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert json.loads(file.metadata()["l2p"])["rope_axes"] == list(CONFIG.rope_axes)


def test_every_tensor_is_aligned_to_its_elements(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, random_state_dict(CONFIG), CONFIG)

    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + header_bytes])

    sizes = {"F32": 4, "BF16": 2, "I8": 1, "U8": 1}
    header.pop("__metadata__")
    assert header_bytes % 8 == 0
    assert all(value["data_offsets"][0] % sizes[value["dtype"]] == 0 for value in header.values())


def test_a_layer_the_rotation_does_not_divide_stays_unrotated(tmp_path: Path) -> None:
    config = mini_config(n_layers=1, ffn_dim=176)
    save_checkpoint(tmp_path / "m.safetensors", random_state_dict(config), config, scheme="convrot64")

    tensors = load_file(tmp_path / "m.safetensors")

    stem = "model.diffusion_model.layers.0.feed_forward"
    assert "convrot" not in bytes(tensors[f"{stem}.w2.comfy_quant"].tolist()).decode()
    assert json.loads(bytes(tensors[f"{stem}.w1.comfy_quant"].tolist()))["convrot_groupsize"] == 64


def test_full_precision_is_declared() -> None:
    weight = QuantizedWeight(
        LazyTensor.of(torch.ones(32, 16, dtype=torch.int8)),
        LazyTensor.of(torch.ones(2, 1)),
        Rotation(16, REGULAR),
        full_precision_matmul=True,
    )

    entries, _ = model_entries({"layers.0.feed_forward.w1.weight": weight}, LayoutStyle(), 16)

    (marker,) = (e for e in entries if e.name.endswith("comfy_quant"))
    values = json.loads(b"".join(bytes(piece) for piece in marker.data()))
    assert values == {
        "format": "int8_blockwise",
        "group_size": 16,
        "convrot": True,
        "convrot_groupsize": 16,
        "full_precision_matrix_mult": True,
    }


# -- the writer


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "float": torch.randn(3, 5, generator=generator),
        "half": torch.randn(7, generator=generator).half(),
        "brain": torch.randn(2, 2, generator=generator).bfloat16(),
        "fp8": torch.randn(4, generator=generator).to(torch.float8_e4m3fn),
        "int": torch.arange(-3, 3, dtype=torch.int8),
        "turned": torch.randn(4, 6, generator=generator).T,
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 3),
    }
    path = tmp_path / "x.safetensors"
    pieces: list[int] = []

    entries = [entry(name, tensor) for name, tensor in tensors.items()]
    nbytes = write_safetensors(path, entries, {"note": "ü"}, progress=pieces.append)

    loaded = load_file(path)
    assert nbytes == path.stat().st_size == file_bytes(entries, {"note": "ü"})
    assert sum(pieces) == sum(e.nbytes for e in entries)
    assert list(path.parent.iterdir()) == [path]
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name].float(), tensor.float())
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stopped, OSError])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def broken() -> Iterator[bytes]:
        yield b"1234"
        raise error

    before = tmp_path / "x.safetensors"
    before.write_bytes(b"the old file")

    with pytest.raises(error):
        write_safetensors(before, [TensorEntry("a", "U8", (8,), broken)], overwrite=True)

    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
    assert before.read_bytes() == b"the old file"


def test_an_existing_file_is_only_replaced_on_request(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"the old file")

    with pytest.raises(FileExistsError, match=r"x\.safetensors"):
        write_safetensors(path, [entry("a", torch.ones(2))])
    assert path.read_bytes() == b"the old file"

    write_safetensors(path, [entry("a", torch.ones(2))], overwrite=True)
    assert torch.equal(load_file(path)["a"], torch.ones(2))


@pytest.mark.parametrize("data", [b"123", b"12345"])
def test_data_of_another_length_than_the_shape_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"tensor 'a': U8 \[4\] takes 4 bytes, its data has [35]"):
        write_safetensors(tmp_path / "x.safetensors", [TensorEntry("a", "U8", (4,), lambda: [data])])

    assert not list(tmp_path.iterdir())


def test_a_name_used_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="tensor 'a' is there twice"):
        encode_header([entry("a", torch.ones(1)), entry("a", torch.ones(2))])
