"""Quantised linear layers against the library that ComfyUI loads such files with."""

from __future__ import annotations

import pytest
import torch

from l2p_lowvram.linear import REGULAR, SYLVESTER, Linear, Rotation, hadamard
from tests import goldens

CASES = [
    ("int8_a", mode) for mode in ("tensor", "row", "convrot16", "convrot64", "convrot256")
] + [("int8_ragged", mode) for mode in ("tensor", "row", "convrot64")]  # fmt: skip


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_dequantised_weights_and_outputs_match_the_reference(name: str, mode: str):
    stored = goldens.tensors(name)
    weight = stored[f"{mode}.weight"]
    linear = Linear(weight.shape[1], weight.shape[0])
    linear.bias = torch.nn.Parameter(stored["bias"])
    rotation = Rotation(int(mode.removeprefix("convrot"))) if mode.startswith("convrot") else None
    linear.quantize_(weight, stored[f"{mode}.weight_scale"], rotation)

    with torch.no_grad():
        output = linear(stored["x"])

    # A rotation is a matrix product, whose sums another processor's kernel makes in another order.
    atol = 0 if rotation is None else 1e-6
    torch.testing.assert_close(linear.dequantized(), stored[f"{mode}.dequantized"], atol=atol, rtol=0)
    expected = stored[f"{mode}.w8a16_out"]
    assert (output - expected).norm() <= 1e-6 * expected.norm()
    torch.testing.assert_close(output, expected, atol=2e-5, rtol=0)  # outputs go up to 11


def test_a_missing_rotation_would_be_seen():
    stored = goldens.tensors("int8_ragged")
    linear = Linear(320, stored["convrot64.weight"].shape[0], bias=False)
    linear.quantize_(stored["convrot64.weight"], stored["convrot64.weight_scale"])

    error = (linear.dequantized() - stored["convrot64.dequantized"]).norm() / stored["convrot64.dequantized"].norm()

    assert error > 1


@pytest.mark.parametrize(("size", "kind"), [(4, REGULAR), (64, REGULAR), (1024, REGULAR), (128, SYLVESTER)])
def test_rotations_are_symmetric_and_their_own_inverse(size: int, kind: str):
    matrix = hadamard(size, kind, torch.device("cpu"))

    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size), atol=1e-5, rtol=0)
    if kind == REGULAR:
        torch.testing.assert_close(matrix.sum(1), torch.ones(size), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("group", "kind"), [(0, REGULAR), (1, REGULAR), (48, REGULAR), (128, REGULAR), (16, "haar")])
def test_rotations_that_cannot_be_are_refused(group: int, kind: str):
    with pytest.raises(ValueError, match="rotation"):
        Rotation(group, kind)
