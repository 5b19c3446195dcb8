"""Single forwards and the decoder alone against other people's implementations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from l2p_lowvram.layout import read_layout
from l2p_lowvram.model import L2PTransformer, patchify
from l2p_lowvram.sampling import model_time
from l2p_lowvram.weights import load_transformer
from offload import Checkpoint
from tests import goldens

TOLERANCE = {"a": 3e-5, "a_mini": 3e-5, "hr64_a": 2e-4, "hr128_a": 2e-4, "hr160_a": 2e-4}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    """Golden set -> model, loaded from a file in the original's layout."""
    folder = tmp_path_factory.mktemp("goldens")
    loaded: dict[str, L2PTransformer] = {}

    def model(name: str) -> L2PTransformer:
        if name not in loaded:
            loaded[name] = load(goldens.write_checkpoint(name, folder))
        return loaded[name]

    return model


def load(path: Path) -> L2PTransformer:
    with Checkpoint.open(path) as checkpoint:
        return load_transformer(checkpoint, read_layout(checkpoint))


def forward_cases(name: str) -> list[tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]]:
    """(pixels, caption features, sigma, outputs by name) of every case."""
    stored, found = goldens.tensors(f"{name}.forward"), goldens.values(f"{name}.forward")
    cases = found if isinstance(found, list) else found["cases"]
    result = []
    for index, case in enumerate(cases):
        source = index if case.get("x_from_case") is None else case["x_from_case"]
        outputs = {key.split(".", 1)[1]: value for key, value in stored.items() if key.startswith(f"case{index}.")}
        sigma = outputs["timestep"] / 1000
        result.append((stored[f"case{source}.x"].float(), outputs["cap"], sigma, outputs))
    return result


@torch.inference_mode()
@pytest.mark.parametrize("name", TOLERANCE)
def test_velocity_matches_the_reference(models, name: str):
    model = models(name)

    for pixels, features, sigma, outputs in forward_cases(name):
        velocity = model(pixels, model_time(sigma), model.encode_caption(features))

        (key,) = [key for key in outputs if key.startswith("velocity")]
        rows = int(key.removeprefix("velocity_rows") or 1) if key != "velocity" else 1
        torch.testing.assert_close(velocity[:, :, ::rows], outputs[key], atol=TOLERANCE[name], rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["hr64_a", "hr128_a", "hr160_a"])
def test_feature_map_and_decoder_match_the_reference(models, name: str):
    model = models(name)

    for pixels, features, sigma, outputs in forward_cases(name):
        state = model.prelude(pixels, model_time(sigma), model.encode_caption(features))
        for block in model.blocks():
            state = block.visit(state)
        decoded = model.local_decoder(pixels, outputs["feat_map"])

        torch.testing.assert_close(model.feature_map(state, pixels), outputs["feat_map"], atol=5e-5, rtol=0)
        (key,) = [key for key in outputs if key.startswith("velocity")]
        rows = int(key.removeprefix("velocity_rows") or 1) if key != "velocity" else 1
        torch.testing.assert_close(-decoded[:, :, ::rows], outputs[key], atol=2e-4, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize(("name", "tolerance"), [("a", 3e-5), ("a_mini", 3e-5), ("hr64_a", 2e-4), ("hr128_a", 2e-4)])
def test_decoder_alone_matches_the_reference(models, name: str, tolerance: float):
    stored = goldens.tensors(f"{name}.decoder")
    cases = [key.removesuffix("x") for key in stored if key == "x" or key.endswith(".x")]
    assert cases

    for case in cases:
        decoded = models(name).local_decoder(stored[f"{case}x"].float(), stored[f"{case}feat"])

        torch.testing.assert_close(decoded, stored[f"{case}out"], atol=tolerance, rtol=0)


@torch.inference_mode()
def test_published_4k_decoder_matches_the_reference():
    """The decoder at its real channel counts, whose weights come without a transformer."""
    from l2p_lowvram.decoder import LocalDecoder
    from l2p_lowvram.families import PUBLISHED

    stored = goldens.tensors("hr64_real_a.decoder")
    weights = {k.removeprefix("local_decoder."): v for k, v in goldens.weights("hr64_real_a").items()}
    decoder = LocalDecoder(PUBLISHED["4k"].decoder, 3840)
    decoder.load_state_dict(weights)

    decoded = decoder(stored["x"].float(), stored["feat"])

    torch.testing.assert_close(decoded, stored["out"], atol=2e-4, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["a", "a_mini"])
def test_every_intermediate_matches_the_reference(models, name: str):
    model, stored = models(name), goldens.tensors(f"{name}.intermediates")
    checked = 0

    for index, (pixels, features, sigma, _) in enumerate(forward_cases(name)):
        expected = {key.split(".", 1)[1]: value for key, value in stored.items() if key.startswith(f"case{index}.")}
        if not expected:
            continue
        checked += 1
        caption = model.encode_caption(features)
        state = model.prelude(pixels, model_time(sigma), caption)
        close(state.timestep_embedding, expected["t_emb"])
        close(torch.view_as_real(caption.rope), expected["cap_freqs"][0])
        close(torch.view_as_real(state.rope), expected["x_freqs"][0])
        patches = patchify(pixels, model.config.patch_size)[0]
        close(patches, expected["patches_padded"][: len(patches)])
        for block in model.blocks():
            state = state.join() if block.joint else state
            if block.name == "layers.0":
                close(state.tokens, expected["unified_in"])
            state = block.visit(state)
            close(state.tokens, expected[block.name])
        close(model.feature_map(state, pixels), expected["feat_map"])
        close(-model.epilogue(state, pixels), expected["decoder_out"])

    assert checked


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=3e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize(("key", "rounded"), [("velocity", True), ("velocity_fp32_timestep", False)])
def test_bf16_stays_within_the_stated_distance(models, key: str, rounded: bool):
    model, stored = models("a"), goldens.tensors("a.bf16_reference")
    checked = 0

    for index, (pixels, features, sigma, _) in enumerate(forward_cases("a")):
        if f"case{index}.{key}" not in stored:
            continue
        checked += 1
        caption = model.encode_caption(features, torch.bfloat16)
        velocity = model(pixels.bfloat16(), model_time(sigma, bf16=rounded), caption).float()

        expected = stored[f"case{index}.{key}"]
        assert (velocity - expected).norm() / expected.norm() < 0.03
        # The other treatment of the timestep is 8 to 13 % away wherever bf16 cannot hold it.
        if index == 1:
            other = model(pixels.bfloat16(), model_time(sigma, bf16=not rounded), caption).float()
            assert (other - expected).norm() / expected.norm() > 0.05

    assert checked >= 5
