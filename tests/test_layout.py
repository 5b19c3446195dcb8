"""Every published layout is read, everything else is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from l2p_lowvram.config import ModelConfig
from l2p_lowvram.export import (
    ORIGINAL,
    LayoutStyle,
    LazyTensor,
    QuantizedWeight,
    quantized_state,
    save_checkpoint,
    save_model,
)
from l2p_lowvram.layout import ModelLayout, read_layout
from l2p_lowvram.linear import SYLVESTER, Linear, Rotation
from l2p_lowvram.model import L2PTransformer
from l2p_lowvram.naming import PREFIXES
from l2p_lowvram.synthetic import mini_config, random_state_dict
from l2p_lowvram.weights import load_transformer
from offload import Block, Checkpoint, CheckpointError

CONFIG = mini_config(ffn_dim=192)
STATE = random_state_dict(CONFIG, seed=3)
PREFIX = "model.diffusion_model."
OUT = PREFIX + "layers.1.attention.out"

Tensors = dict[str, Tensor]


def load(path: Path) -> tuple[ModelLayout, L2PTransformer]:
    with Checkpoint.open(path) as checkpoint:
        layout = read_layout(checkpoint)
        return layout, load_transformer(checkpoint, layout)


def predict(model: L2PTransformer, config: ModelConfig = CONFIG) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    side = config.size_multiple
    pixels = torch.randn(1, 3, side, 2 * side, generator=generator)
    caption = torch.randn(5, config.caption_dim, generator=generator)
    with torch.inference_mode():
        return model(pixels, torch.tensor([0.3]), model.encode_caption(caption))


def dequantized(model: L2PTransformer) -> Tensors:
    return {name: m.dequantized() for name, m in model.named_modules() if isinstance(m, Linear)}


STYLES = st.builds(
    LayoutStyle,
    prefix=st.sampled_from(PREFIXES),
    naming=st.sampled_from(["comfyui", "original"]),
    split_qkv=st.sampled_from([None, True, False]),
    adaln_index=st.sampled_from([0, 1]),
    scale_key=st.sampled_from(["weight_scale", "scale_weight"]),
    scale_rank=st.sampled_from([None, 0, 1, 2]),
    marker=st.sampled_from(["tensor", "no-format", "nested", "metadata"]),
    metadata_prefix=st.booleans(),
    extras=st.booleans(),
)
SCHEMES = ["row", "tensor", "block16", "convrot16", "convrot64", "fp8"]
TARGETS = st.sets(
    st.sampled_from(["*.attention.qkv", "*.attention.out", "layers.*.w?", "*.adaLN_modulation.0", "x_embedder"]),
    min_size=1,
)


# Not shrunk: an example is small as it is, and takes a tenth of a second.
@settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(style=STYLES, scheme=st.sampled_from(SCHEMES), targets=TARGETS, rest=st.sampled_from(["F32", "BF16", "F16"]))
def test_the_same_weights_in_every_layout_are_the_same_model(
    tmp_path_factory: pytest.TempPathFactory,
    style: LayoutStyle,
    scheme: str,
    targets: set[str],
    rest: str,
) -> None:
    folder = tmp_path_factory.mktemp("layouts")
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[rest]
    state = quantized_state(STATE, scheme, targets=sorted(targets), rest_dtype=dtype)
    save_model(folder / "plain.safetensors", state, CONFIG)
    save_model(folder / "styled.safetensors", state, CONFIG, style=style)

    plain_layout, plain = load(folder / "plain.safetensors")
    layout, model = load(folder / "styled.safetensors")

    assert layout.config == plain_layout.config == CONFIG
    assert layout.prefix == style.prefix
    assert layout.quantized.keys() == plain_layout.quantized.keys() != set()
    expected = dequantized(plain)
    assert all(torch.equal(weight, expected[name]) for name, weight in dequantized(model).items())
    # Copies, which torch aligns: a product with one row rounds by the address of its F32 weight.
    assert torch.equal(predict(deepcopy(model)), predict(deepcopy(plain)))


@pytest.mark.parametrize("style", [LayoutStyle(), ORIGINAL], ids=["comfyui", "original"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float_files_hold_the_weights_they_were_given(tmp_path: Path, style: LayoutStyle, dtype: torch.dtype) -> None:
    path = tmp_path / "float.safetensors"
    save_checkpoint(path, STATE, CONFIG, scheme=None, rest_dtype=dtype, style=style)

    layout, model = load(path)

    assert not layout.quantized
    assert layout.naming == style.naming
    assert all(torch.equal(value, STATE[name].to(dtype)) for name, value in model.state_dict().items())


def test_quantised_layers_without_any_marker_are_recognised_by_their_scale(tmp_path: Path) -> None:
    path = tmp_path / "bare.safetensors"
    save_checkpoint(path, STATE, CONFIG, style=LayoutStyle(marker="none", extras=True))

    layout, model = load(path)

    assert len(layout.quantized) == 5 * CONFIG.n_layers
    assert {entry.granularity for entry in layout.quantized.values()} == {"row"}
    assert predict(model).isfinite().all()


@pytest.mark.parametrize("patch", [16, 64, 128, 160])
def test_every_family_is_read_from_its_tensors(tmp_path: Path, patch: int) -> None:
    config = mini_config(patch, dim=48, n_heads=3, n_layers=1, ffn_dim=64, caption_dim=24)
    path = tmp_path / "family.safetensors"
    save_checkpoint(path, random_state_dict(config), config, style=replace(ORIGINAL, prefix="net."))

    layout, model = load(path)

    assert layout.config == config
    assert layout.family == {16: "1K", 64: "4K", 128: "8K", 160: "10K"}[patch]
    assert layout.config.defaults.steps == (30 if patch == 16 else 50)
    assert layout.config.defaults.width == {16: 1024, 64: 4096, 128: 8192, 160: 10240}[patch]
    if patch < 128:
        assert predict(model, config).isfinite().all()


def test_blocks_name_the_bytes_to_read_for_them(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, STATE, CONFIG, style=replace(ORIGINAL, marker="tensor"))
    layout, model = load(path)
    raw = path.read_bytes()

    names = list(layout.blocks)
    extents = Block("layers.1", layout.blocks["layers.1"]).layout.extents

    assert names == ["noise_refiner.0", "context_refiner.0", "layers.0", "layers.1"]
    assert layout.block_bytes["layers.1"] == sum(extent.nbytes for extent in extents)
    assert sum(layout.block_bytes.values()) + layout.rest_bytes == sum(s.nbytes for s in layout.sources.values())
    assert [extent.offset for extent in extents] == sorted(extent.offset for extent in extents)
    source = next(s for s in layout.blocks["layers.1"] if s.name == "layers.1.attention.qkv.weight")
    stored = b"".join(raw[p.tensor.offset : p.tensor.offset + p.tensor.nbytes] for p in source.parts)
    assert len(source.parts) == 3
    assert not source.is_view
    assert stored == model.layers[1].attention.qkv.weight.numpy().tobytes()  # type: ignore[union-attr]


def test_parameters_are_views_of_the_file_where_they_can_be(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, STATE, CONFIG)

    with Checkpoint.open(path) as checkpoint:
        layout = read_layout(checkpoint)
        model = load_transformer(checkpoint, layout)
        mapped = {checkpoint.tensor(name).data_ptr() for name in checkpoint.tensors}

    held = dict(model.named_parameters()) | dict(model.named_buffers())
    copied = [tensor for tensor in held.values() if tensor.data_ptr() not in mapped]
    # Floats that the file does not align, and nothing else.
    assert all(tensor.dtype.is_floating_point and tensor.data_ptr() % 256 == 0 for tensor in copied)
    assert {tensor.dtype for tensor in held.values() if tensor.data_ptr() in mapped} >= {torch.int8}
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in held.values())


def test_mixed_spellings_are_read(tmp_path: Path) -> None:
    renamed = edited(tmp_path, style=ORIGINAL)
    renamed["x_embedder.weight"] = renamed.pop("all_x_embedder.16-1.weight")
    renamed["layers.0.attention.q_norm.weight"] = renamed.pop("layers.0.attention.norm_q.weight")
    renamed["layers.1.adaLN_modulation.1.bias"] = renamed.pop("layers.1.adaLN_modulation.0.bias")
    save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / "l2p.json").write_text('{"rope_axes": [8, 12, 12]}')

    layout, _ = load(tmp_path / "model.safetensors")

    assert layout.naming == "mixed"


def test_a_sharded_set_is_read_as_one_model(tmp_path: Path) -> None:
    tensors = edited(tmp_path, style=ORIGINAL, scheme=None)
    weight_map = {}
    for number in (1, 2):
        shard = f"model-{number:05}-of-00002.safetensors"
        names = sorted(tensors)[number - 1 :: 2]
        save_file({name: tensors[name] for name in names}, tmp_path / shard)
        weight_map.update(dict.fromkeys(names, shard))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "l2p.json").write_text('{"rope_axes": [8, 12, 12], "defaults": {"cfg_scale": 3}}')

    layout, model = load(tmp_path)

    assert layout.config.defaults.cfg_scale == 3.0
    assert len({part.tensor.path for part in layout.sources["layers.0.attention.qkv.weight"].parts}) == 2
    assert torch.equal(
        model.get_parameter("layers.0.attention.qkv.weight"),
        STATE["layers.0.attention.qkv.weight"].bfloat16(),
    )


def test_split_float_parts_of_different_dtypes_become_the_widest(tmp_path: Path) -> None:
    tensors = edited(tmp_path, style=ORIGINAL, scheme=None)
    key = tensors["layers.0.attention.to_k.weight"] = tensors["layers.0.attention.to_k.weight"].float() + 1e-4
    write(tmp_path, tensors)

    _, model = load(tmp_path / "edited.safetensors")

    weight = model.get_parameter("layers.0.attention.qkv.weight")
    assert weight.dtype == torch.float32
    assert torch.equal(weight[64:128], key)


def test_a_single_scale_is_repeated_beside_row_scales(tmp_path: Path) -> None:
    tensors = edited(tmp_path, style=replace(ORIGINAL, marker="none"))
    stem = "layers.0.attention.to_"
    tensors[f"{stem}k.weight_scale"] = torch.tensor(0.25)
    write(tmp_path, tensors)

    layout, model = load(tmp_path / "edited.safetensors")

    scale = model.get_submodule("layers.0.attention.qkv").weight_scale
    assert isinstance(scale, Tensor)
    assert scale.shape == (192, 1)
    assert torch.equal(scale[64:128], torch.full((64, 1), 0.25))
    assert torch.equal(scale[128:], tensors[f"{stem}v.weight_scale"])
    assert layout.quantized["layers.0.attention.qkv"].granularity == "row"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scales_become_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    save_checkpoint(tmp_path / "half.safetensors", STATE, CONFIG, style=LayoutStyle(scale_dtype=dtype))

    layout, model = load(tmp_path / "half.safetensors")

    scale = model.get_submodule("layers.0.attention.out").weight_scale
    assert isinstance(scale, Tensor)
    assert scale.dtype == torch.float32
    assert layout.sources["layers.0.attention.out.weight_scale"].dtype == torch.float32


def test_fp8_without_a_scale_is_a_plain_float(tmp_path: Path) -> None:
    path = tmp_path / "fp8.safetensors"
    save_checkpoint(path, STATE, CONFIG, scheme=None, rest_dtype=torch.float8_e4m3fn, style=ORIGINAL)

    layout, model = load(path)

    assert not layout.quantized
    assert torch.equal(
        model.get_parameter("layers.0.attention.qkv.weight").float(),
        STATE["layers.0.attention.qkv.weight"].to(torch.float8_e4m3fn).float(),
    )
    assert predict(model).isfinite().all()


def test_a_sylvester_rotation_is_read_with_a_warning(tmp_path: Path) -> None:
    config = mini_config(dim=128, n_heads=4, ffn_dim=256, n_layers=1)
    path = tmp_path / "quarot.safetensors"
    save_checkpoint(path, random_state_dict(config), config, scheme="quarot128")

    layout, _ = load(path)

    assert layout.quantized["layers.0.feed_forward.w2"].rotation == Rotation(128, SYLVESTER)
    assert ["Sylvester" in warning for warning in layout.warnings] == [True]


def test_a_rotation_without_a_group_size_has_256(tmp_path: Path) -> None:
    tensors = edited(tmp_path, config=mini_config(dim=256, n_heads=8, ffn_dim=256, n_layers=1))
    name = PREFIX + "layers.0.feed_forward.w2.comfy_quant"
    tensors[name] = text_tensor('{"convrot": true, "per_row": true}')
    write(tmp_path, tensors)

    layout, _ = load(tmp_path / "edited.safetensors")

    assert layout.quantized["layers.0.feed_forward.w2"].rotation == Rotation(256)
    assert layout.quantized["layers.0.feed_forward.w1"].rotation is None


def test_shape_is_trusted_over_label(tmp_path: Path) -> None:
    tensors = edited(tmp_path)
    tensors[f"{OUT}.comfy_quant"] = text_tensor('{"format": "int8_blockwise", "params": {"group_size": 1}}')
    write(tmp_path, tensors)

    layout, _ = load(tmp_path / "edited.safetensors")

    assert layout.quantized["layers.1.attention.out"].granularity == "row"


def test_markers_in_the_metadata_win_over_those_in_tensors(tmp_path: Path) -> None:
    tensors = edited(tmp_path)
    layer = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}
    layer["full_precision_matrix_mult"] = True
    write(tmp_path, tensors, layers={"layers.1.attention.out": layer, "layers.9.attention.out": layer})

    layout, model = load(tmp_path / "edited.safetensors")

    linear = model.get_submodule("layers.1.attention.out")
    assert isinstance(linear, Linear)
    assert linear.rotation == Rotation(16)
    assert linear.full_precision_matmul
    assert layout.quantized["layers.0.attention.out"].rotation is None
    assert ["1 layers it does not have" in warning for warning in layout.warnings] == [True]


# -- settings


def test_settings_beside_the_file_win_over_its_metadata(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model.safetensors", STATE, CONFIG)
    (tmp_path / "l2p.json").write_text('{"rope_axes": [16, 8, 8], "defaults": {"steps": 7}, "note": 1}')

    layout, _ = load(tmp_path / "model.safetensors")

    assert layout.config.rope_axes == (16, 8, 8)
    assert layout.config.defaults == replace(CONFIG.defaults, steps=7)


def test_settings_of_a_folder_do_not_apply_to_any_file_in_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "other.safetensors", STATE, CONFIG)
    (tmp_path / "l2p.json").write_text("broken")

    layout, _ = load(tmp_path / "other.safetensors")

    assert layout.config == CONFIG


def test_unknown_rope_axes_are_asked_for(tmp_path: Path) -> None:
    write(tmp_path, edited(tmp_path), metadata={})

    with Checkpoint.open(tmp_path / "edited.safetensors") as checkpoint:
        with pytest.raises(CheckpointError, match=r"head width 32 .* l2p\.json .* metadata entry 'l2p'"):
            read_layout(checkpoint)
        assert read_layout(checkpoint, rope_axes=(8, 12, 12)).config.rope_axes == (8, 12, 12)
        with pytest.raises(CheckpointError, match="add up to the head width 32"):
            read_layout(checkpoint, rope_axes=(8, 8, 8))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"rope_axes": "8,12,12"}', "rope_axes must be three whole numbers"),
        ('{"rope_axes": [8, 12, true]}', "rope_axes must be three whole numbers"),
        ('{"rope_axes": [8, 12, 10]}', "add up to the head width 32"),
        ('{"defaults": [1]}', "defaults must be an object"),
        ('{"defaults": {"stepz": 1}}', "unknown default 'stepz'"),
        (json.dumps({"defaults": {"x" * 900_000: 1}}), "unknown default 'x{79}; known are"),
        (json.dumps({"defaults": {"steps": "x" * 900_000}}), "must be a whole number, got 'x{79}$"),
        ('{"defaults": {"steps": 2.5}}', "steps must be a whole number"),
        ('{"defaults": {"width": 1000}}', "width must be a multiple of 16"),
        ("[]", "must be a JSON object"),
        ("{", "not valid"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    save_checkpoint(tmp_path / "model.safetensors", STATE, CONFIG)
    (tmp_path / "l2p.json").write_text(text)

    with pytest.raises(CheckpointError, match=reason):
        load(tmp_path / "model.safetensors")


# -- refusals


def edited(
    folder: Path,
    *,
    style: LayoutStyle | None = None,
    scheme: str | None = "row",
    config: ModelConfig = CONFIG,
) -> Tensors:
    """The tensors of a sound file, to be changed and written with `write`."""
    path = folder / "sound.safetensors"
    state = STATE if config is CONFIG else random_state_dict(config)
    save_checkpoint(path, state, config, scheme=scheme, style=style, overwrite=True)
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def write(
    folder: Path,
    tensors: Tensors,
    *,
    metadata: dict[str, str] | None = None,
    layers: dict[str, dict[str, object]] | None = None,
) -> Path:
    metadata = {"l2p": '{"rope_axes": [8, 12, 12]}'} if metadata is None else metadata
    if layers is not None:
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    save_file(tensors, folder / "edited.safetensors", metadata)
    return folder / "edited.safetensors"


def text_tensor(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def marked(text: str, module: str = OUT) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({f"{module}.comfy_quant": text_tensor(text)})


def replaced(name: str, tensor: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor})


def without(*names: str) -> Callable[[Tensors], None]:
    return lambda tensors: [tensors.pop(name) for name in names] and None


SCALE_SHAPES = [(63,), (64, 2), (1, 64), (3, 3), (2, 4), (64, 1, 1), (0, 1), (1, 1, 1)]
REFUSED: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "int8 without scale": (without(f"{OUT}.weight_scale"), f"'{OUT}.weight' is I8 but has no weight_scale"),
    **{
        f"scale of shape {shape}": (
            replaced(f"{OUT}.weight_scale", torch.ones(shape)),
            f"'{OUT}.weight_scale': scale of shape",
        )
        for shape in SCALE_SHAPES
    },
    "integer scale": (
        replaced(f"{OUT}.weight_scale", torch.ones(64, 1, dtype=torch.int32)),
        f"'{OUT}.weight_scale' is I32; a scale is",
    ),
    **{
        f"sidecar {leaf}": (replaced(f"{OUT}.{leaf}", torch.ones(64)), f"'{OUT}.{leaf}' belongs to {what}")
        for leaf, what in {
            "quip_s_u": "a QuIP",
            "quip_s_v": "a QuIP",
            "sign_row": "a QuIP",
            "sign_col": "a QuIP",
            "smooth_factors": "a QuIP or SmoothQuant",
            "weight_s_rel": "a packed 4-bit",
            "weight_codebook": "a packed 4-bit",
            "weight_scale_2": "a packed 4-bit",
            "SCB": "a bitsandbytes",
            "weight._data": "an optimum-quanto",
        }.items()
    },
    **{
        f"format {name}": (marked(json.dumps({"format": name})), f"marker '{OUT}.comfy_quant' names .*'{name}'")
        for name in ("convrot_w4a4", "asym_w4a8_int8", "awq_w4a16", "nvfp4", "int3_something")
    },
    "format of no string": (marked('{"format": {"a": 1}}'), f"'{OUT}.comfy_quant' names the unknown format"),
    "format of another dtype": (marked('{"format": "float8_e4m3fn"}'), f"'{OUT}.weight' is I8 but its marker says F8"),
    "marker no JSON": (marked("{nope"), f"marker '{OUT}.comfy_quant' is not valid"),
    "marker no object": (marked("[1]"), f"marker '{OUT}.comfy_quant' must be a JSON object"),
    "marker empty": (marked(""), f"marker '{OUT}.comfy_quant' is not valid"),
    "marker nested": (marked("[" * 60_000), f"marker '{OUT}.comfy_quant' is nested too deeply"),
    "marker huge": (marked(" " * 70_000), f"marker '{OUT}.comfy_quant' must be 1-D U8 of at most 65536 bytes"),
    "marker of floats": (replaced(f"{OUT}.comfy_quant", torch.ones(4)), f"marker '{OUT}.comfy_quant' must be 1-D U8"),
    "marker with bad params": (marked('{"params": 3}'), f"marker '{OUT}.comfy_quant': params must be an object"),
    "marker with bad flag": (marked('{"convrot": "yes"}'), f"'{OUT}.comfy_quant': convrot must be true or false"),
    "marker with unknown group": (
        marked('{"convrot": true, "convrot_groupsize": 32}'),
        f"'{OUT}.comfy_quant' names the rotation group 32; known are 16, 64",
    ),
    "marker with true as group": (marked('{"convrot": true, "convrot_groupsize": true}'), "rotation group True"),
    "rotation wider than the weight": (
        marked('{"convrot": true}'),
        f"'{OUT}.weight' has 64 columns, no multiple of the rotation group 256",
    ),
    "marker without layer": (
        marked('{"format": "int8_tensorwise"}', PREFIX + "layers.1.nothing"),
        "1 tensors that no L2P model has, first is 'layers.1.nothing.comfy_quant'".replace("'", f"'{PREFIX}", 1),
    ),
    "scale without layer": (
        replaced(PREFIX + "layers.1.attention_norm1.weight_scale", torch.ones(1)),
        "layers.1.attention_norm1.weight_scale",
    ),
    "marker of a float layer": (
        marked('{"format": "int8_tensorwise"}', PREFIX + "x_embedder"),
        f"'{PREFIX}x_embedder.weight' is BF16 but its marker says I8",
    ),
    "rotated float layer": (
        marked('{"convrot": true, "convrot_groupsize": 16}', PREFIX + "x_embedder"),
        f"'{PREFIX}x_embedder.weight' is rotated but has no weight_scale",
    ),
    "packed weight": (
        replaced(f"{OUT}.weight", torch.ones(64, 32, dtype=torch.int8)),
        rf"'{OUT}.weight' has shape \[64, 32\], expected \[64, 64\]",
    ),
    "unsigned weight": (
        replaced(f"{OUT}.weight", torch.ones(64, 64, dtype=torch.uint8)),
        f"'{OUT}.weight' is U8, which a linear layer's weight cannot be",
    ),
    "int8 norm": (
        replaced(PREFIX + "layers.0.ffn_norm1.weight", torch.ones(64, dtype=torch.int8)),
        f"'{PREFIX}layers.0.ffn_norm1.weight' is I8",
    ),
    "wrong shape": (
        replaced(PREFIX + "local_decoder.enc2.0.bias", torch.ones(15)),
        rf"'{PREFIX}local_decoder.enc2.0.bias' has shape \[15\], expected \[16\]",
    ),
    "broken decoder chain": (
        replaced(PREFIX + "local_decoder.enc2.0.weight", torch.ones(16, 9, 3, 3)),
        rf"'{PREFIX}local_decoder.enc2.0.weight' has shape \[16, 9, 3, 3\], expected \[16, 8, 3, 3\]",
    ),
    "unknown decoder level": (
        replaced(PREFIX + "local_decoder.enc7x.0.weight", torch.ones(16, 9, 3, 3)),
        "no L2P model has, first is .*enc7x",
    ),
    "missing tensor": (without(PREFIX + "cap_pad_token"), "lacks 1 of .* tensors, first is 'cap_pad_token'"),
    "missing dimension": (without(PREFIX + "layers.0.attention.q_norm.weight"), "lacks layers.0.attention.q_norm"),
    "many left over": (
        lambda tensors: tensors.update({f"{PREFIX}extra.{i}": torch.ones(1) for i in range(5)}),
        f"has 5 tensors that no L2P model has, first are '{PREFIX}extra.0', .*extra.1', .*extra.2'$",
    ),
    "outside the prefix": (replaced("vae.decoder", torch.ones(1)), "has 1 tensors .* first is 'vae.decoder'"),
    "two scales": (
        replaced(f"{OUT}.scale_weight", torch.ones(64)),
        f"'{OUT}.scale_weight' and '{OUT}.weight_scale' are the same|"
        f"'{OUT}.weight_scale' and '{OUT}.scale_weight' are the same",
    ),
    "two adaLN": (
        replaced(PREFIX + "layers.0.adaLN_modulation.1.bias", torch.ones(256)),
        r"adaLN_modulation\.[01]\.bias' and .*adaLN_modulation\.[01]\.bias' are the same",
    ),
    "fused and split": (
        replaced(PREFIX + "layers.0.attention.to_q.weight", torch.ones(64, 64)),
        "layers.0.attention.to_q.weight' and .*layers.0.attention.qkv.weight' are both there",
    ),
    "gap in the blocks": (
        lambda tensors: [
            tensors.update({name.replace("layers.1.", "layers.3."): tensors.pop(name)})
            for name in list(tensors)
            if "layers.1." in name
        ],
        r"lacks block layers.1, though it has blocks up to layers.3",
    ),
    "patch of no square": (
        replaced(PREFIX + "x_embedder.weight", torch.ones(64, 700)),
        "x_embedder.weight takes 700 inputs, which are no square patch",
    ),
    "latent patch": (
        replaced(PREFIX + "x_embedder.weight", torch.ones(64, 64)),
        "takes 64 inputs.*; is this latent Z-Image rather than L2P",
    ),
    "odd head width": (
        replaced(PREFIX + "layers.0.attention.q_norm.weight", torch.ones(48)),
        "token width 64 is no multiple of the head width 48",
    ),
    "scalar where a vector is expected": (
        replaced(PREFIX + "cap_embedder.0.weight", torch.ones(())),
        "cap_embedder.0.weight' has shape .*; it must have 1 axes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_sound_l2p_file_is_refused_by_name(tmp_path: Path, case: str) -> None:
    edit, reason = REFUSED[case]
    tensors = edited(tmp_path)
    edit(tensors)
    path = write(tmp_path, tensors)

    with pytest.raises(CheckpointError, match=reason) as caught:
        load(path)

    assert caught.value.path == path


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("row", [0, 63])
def test_scales_that_are_no_sizes_are_refused_when_they_are_read(tmp_path: Path, bad: float, row: int) -> None:
    tensors = edited(tmp_path)
    tensors[f"{OUT}.weight_scale"][row] = bad
    path = write(tmp_path, tensors)

    with pytest.raises(CheckpointError, match=f"'{OUT}.weight_scale' holds scales from"):
        load(path)


SPLIT = "layers.0.attention.to_"
REFUSED_SPLIT: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "one rotated": (
        marked('{"convrot": true, "convrot_groupsize": 16}', SPLIT + "k"),
        "is part of q, k, v with different rotation groups, None and 16; they cannot be fused",
    ),
    "one missing": (
        without(SPLIT + "v.weight", SPLIT + "v.weight_scale"),
        "lacks 1 of .* tensors, first is 'layers.0.attention.to_v.weight'",
    ),
    "one float": (
        replaced(SPLIT + "k.weight", torch.ones(64, 64)),
        "'layers.0.attention.to_k.weight' is F32 but 'layers.0.attention.to_q.weight' is I8",
    ),
    "one without scale": (
        without(SPLIT + "k.weight_scale"),
        "'layers.0.attention.to_k.weight' is I8 but has no weight_scale",
    ),
    "rows beside blocks": (
        replaced(SPLIT + "k.weight_scale", torch.ones(4, 4)),
        r"to_q.weight_scale' \[64, 1\], .*to_k.weight_scale' \[4, 4\].* follow different rules",
    ),
    "another patch in the name": (
        lambda tensors: tensors.update({"all_x_embedder.2-1.weight": tensors.pop("all_x_embedder.16-1.weight")}),
        "all_x_embedder.2-1 has 768 inputs, which are a patch of 16, not 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED_SPLIT)
def test_split_projections_that_do_not_fit_together_are_refused(tmp_path: Path, case: str) -> None:
    edit, reason = REFUSED_SPLIT[case]
    tensors = edited(tmp_path, style=replace(ORIGINAL, marker="none"))
    edit(tensors)
    path = write(tmp_path, tensors)

    with pytest.raises(CheckpointError, match=reason):
        load(path)


def test_a_rotation_that_is_told_for_one_of_three_fused_parts_is_refused(tmp_path: Path) -> None:
    layer: dict[str, object] = {"convrot": True, "convrot_groupsize": 16}
    path = write(tmp_path, edited(tmp_path), layers={PREFIX + SPLIT + "k": layer})
    with_all = {f"layers.0.attention.to_{part}": layer for part in "qkv"}

    (tmp_path / "marked").mkdir()
    tensors = edited(tmp_path, style=LayoutStyle(marker="none"))
    agreed = write(tmp_path / "marked", tensors, layers=with_all)

    layout, _ = load(agreed)
    assert layout.quantized["layers.0.attention.qkv"].rotation == Rotation(16)
    tensors = edited(tmp_path, style=LayoutStyle(marker="none"))
    write(tmp_path, tensors, layers={PREFIX + SPLIT + "k": layer})
    with pytest.raises(CheckpointError, match="different rotation groups, None and 16"):
        load(path)


FOREIGN = {
    "latent Z-Image": ["all_x_embedder.2-1.weight", "noise_refiner.0.attention.to_q.weight", "all_final_layer.2-1.x"],
    "zimage_pixel": ["model.diffusion_model.dec_net.cond_embed.weight", "model.diffusion_model.x_embedder.weight"],
    "FLUX": ["double_blocks.0.img_attn.qkv.weight", "final_layer.linear.weight"],
    "Stable Diffusion": ["model.diffusion_model.input_blocks.0.0.weight"],
    "a text encoder": ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"],
    "a LoRA": ["diffusion_model.layers.0.attention.to_q.lora_A.weight"],
    "a VAE": ["decoder.conv_in.weight", "decoder.up.0.block.0.weight"],
    "another diffusion transformer": ["transformer_blocks.0.attn.to_q.weight"],
    "no L2P model": ["something.weight"],
}


@pytest.mark.parametrize("what", FOREIGN)
def test_other_models_are_called_by_their_name(tmp_path: Path, what: str) -> None:
    save_file({name: torch.ones(2, 2) for name in FOREIGN[what]}, tmp_path / "other.safetensors")

    with pytest.raises(CheckpointError, match=what):
        load(tmp_path / "other.safetensors")


def test_hostile_names_and_counts_cost_little_time(tmp_path: Path) -> None:
    tensors = edited(tmp_path)
    tensors |= {f"{PREFIX}layers.{i}.x": torch.ones(0) for i in range(5000)}
    layer: dict[str, object] = {"format": "int8_tensorwise"}
    path = write(tmp_path, tensors, layers={f"{PREFIX}layers.{i}.y": layer for i in range(20_000)})

    with pytest.raises(CheckpointError, match=r"\+ 5000 layers\), the limit is 400"):
        load(path)


def test_quantisation_metadata_that_is_no_table_is_refused(tmp_path: Path) -> None:
    metadata = {"l2p": '{"rope_axes": [8, 12, 12]}', "_quantization_metadata": '{"layers": {"a": 1}}'}
    path = write(tmp_path, edited(tmp_path), metadata=metadata)

    with pytest.raises(CheckpointError, match="layers must map names to objects"):
        load(path)


def test_a_rotated_weight_cannot_be_written_without_a_marker(tmp_path: Path) -> None:
    rotated = QuantizedWeight(
        LazyTensor.of(torch.ones(64, 64, dtype=torch.int8)), LazyTensor.of(torch.ones(64, 1)), Rotation(16)
    )

    with pytest.raises(ValueError, match=r"layers.0.attention.out is rotated"):
        save_model(
            tmp_path / "x.safetensors",
            {"layers.0.attention.out.weight": rotated},
            CONFIG,
            style=LayoutStyle(marker="none"),
        )


def test_the_blocks_of_all_stacks_together_have_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    many = {f"{stack}.{i}.x": torch.ones(1) for stack in ("noise_refiner", "context_refiner") for i in range(200)}
    save_file({**STATE, **many}, path)

    spelled = rf"\(200 noise_refiner \+ 200 context_refiner \+ {CONFIG.n_layers} layers\)"
    told = rf"has {400 + CONFIG.n_layers} blocks {spelled}, the limit is 400"
    with Checkpoint.open(path) as checkpoint, pytest.raises(CheckpointError, match=told):
        read_layout(checkpoint)
